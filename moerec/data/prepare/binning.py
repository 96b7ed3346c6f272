"""Numbers as categories: the ranges between given edges, each edge belonging to the range above it; and what to say of
numbers that are read as categories without ranges.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"  # what is read as one
MOST_CODES = 200  # different whole numbers that may pass for codes, such as years


def name_ranges(edges: Sequence[float]) -> list[str]:
    """Names of the `len(edges) + 1` ranges, from the lowest."""
    names = [repr(edge).removesuffix(".0") for edge in edges]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(names)]
    return [f"below {names[0]}", *between, f"from {names[-1]}"]


def find_ranges(numbers: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """`[n]` codes of the ranges of `[n]` numbers, from 1; 0 for NaN."""
    return np.where(np.isnan(numbers), 0, 1 + np.searchsorted(edges, numbers, side="right"))


def find_quantiles(numbers: np.ndarray, n_ranges: int) -> tuple[float, ...]:
    """Edges that cut `[n]` numbers (NaN: missing) into ranges of like size; fewer than `n_ranges` where values repeat.

    Each edge is one of the numbers above the lowest, so no range is empty. No edges where all are equal or missing.
    """
    known = np.sort(numbers[~np.isnan(numbers)])
    above = np.unique(known)[1:]
    if not len(above):
        return ()
    edges = known[np.arange(1, n_ranges) * len(known) // n_ranges]
    return tuple(np.unique(np.maximum(edges, above[0])).tolist())


class AmountScan:
    """Looks for amounts in a column that is read as categories: nothing but numbers, and one that is no likely code; or
    more than `MOST_CODES` different numbers where no row has two.

    Attributes:
      example: the first number that is no code, if all values so far are numbers; otherwise the empty string.
    """

    def __init__(self, is_code: Callable[[np.ndarray], np.ndarray]):
        self._is_code, self._is_numeric, self._is_single = is_code, True, True
        self._example, self._one_of_many = "", ""
        self._known: set[str] = set()

    @property
    def example(self) -> str:
        of_many = self._one_of_many if self._is_single else ""
        return (self._example or of_many) if self._is_numeric else ""

    def add(self, values: pa.Array) -> None:
        """Looks at `[n]` strings, or lists of strings; empty ones and "nan" are missing."""
        if not self._is_numeric:
            return
        if pa.types.is_list(values.type):
            self._is_single &= pc.max(pc.list_value_length(values)).as_py() in (None, 0, 1)
            values = values.flatten()
        values = values.filter(pc.invert(pc.match_substring_regex(values, r"^([nN]a[nN])?$")))
        self._is_numeric = bool(pc.all(pc.match_substring_regex(values, NUMBER), min_count=0).as_py())
        if self._is_numeric and not self._example:
            strange = np.flatnonzero(~self._is_code(values.cast(pa.float64()).to_numpy(zero_copy_only=False)))
            self._example = values[int(strange[0])].as_py() if len(strange) else ""
        if self._is_numeric and self._is_single and not self._one_of_many:
            self._known.update(pc.unique(values).to_pylist())
            self._one_of_many = values[-1].as_py() if len(self._known) > MOST_CODES else ""


def is_whole(numbers: np.ndarray) -> np.ndarray:
    """`[n]` bool: numbers such as codes of categories or years."""
    return numbers == np.rint(numbers)


def is_flag(numbers: np.ndarray) -> np.ndarray:
    """`[n]` bool: numbers that tell yes from no."""
    return (numbers == 0) | (numbers == 1)
