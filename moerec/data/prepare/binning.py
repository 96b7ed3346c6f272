"""Numbers as categories: the ranges between given edges, each edge belonging to the range above it."""

import itertools
from collections.abc import Sequence

import numpy as np

NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"  # what is read as one


def name_ranges(edges: Sequence[float]) -> list[str]:
    """Names of the `len(edges) + 1` ranges, from the lowest."""
    names = [repr(edge).removesuffix(".0") for edge in edges]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(names)]
    return [f"below {names[0]}", *between, f"from {names[-1]}"]


def find_ranges(numbers: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """`[n]` codes of the ranges of `[n]` numbers, from 1; 0 for NaN."""
    return np.where(np.isnan(numbers), 0, 1 + np.searchsorted(edges, numbers, side="right"))
