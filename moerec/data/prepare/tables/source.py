"""What the readers of every format share: an opened table, and the batches of rows that it is read as."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from moerec.errors import InputError

_SEPARATORS = {";": "';'", ",": "','", "|": "'|'", "\t": "a tab"}


@dataclasses.dataclass(frozen=True)
class SourceTable:
    """An opened table.

    Attributes:
      label: its name in messages. parts: the files of a Parquet table, one after another; a text table has one.
      raw_columns: as the parser sees them: a text file's header as latin-1, with types.
      lists: the columns whose values are lists, and their type as the table names it.
      separators: those inside the columns typed as lists. one_line: whether a value of several lines is a defect.
    """

    path: Path
    label: str
    format: str
    columns: tuple[str, ...]
    raw_columns: tuple[str, ...]
    parts: tuple[Path, ...] = ()
    lists: dict[str, str] = dataclasses.field(default_factory=dict)
    separators: dict[str, str] = dataclasses.field(default_factory=dict)
    one_line: bool = False

    def require(self, column: str, field: str, single: bool = False):
        """Raises InputError if the column, which config field `field` names, is absent or ambiguous.

        With `single` also if its values are lists.
        """
        if self.columns.count(column) != 1:
            problem = "no such column" if column not in self.columns else "the name occurs twice"
            found = ", ".join(self.columns)
            raise InputError(
                f"{self.label}, header, column {column}: {problem} (config.{field}); there are: {found}{self._hint()}"
            )
        if single and column in self.lists:
            raise InputError(
                f"{self.label}, column {column}: values of type {self.lists[column]}, where config.{field} needs one"
                " value a row"
            )

    def _hint(self) -> str:
        """What is to be said of a text file whose header seems to have another separator."""
        if len(self.columns) > 1 or self.format == "parquet":
            return ""
        for separator, name in _SEPARATORS.items():
            if separator in self.columns[0]:
                own = "','" if self.format == "csv" else "a tab"
                return f" (one column that holds {name}; the separator of format {self.format} is {own})"
        return ""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """A row that is not as the header says: the wrong number of fields, or, in `column`, a value of several lines."""

    row: int
    n_expected: int
    n_found: int
    text: str
    column: str = ""


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """`rows`: `[n]` int64 row numbers; `columns`: arrow arrays of n values; `ragged`: rows met on the way, left out."""

    rows: np.ndarray
    columns: dict[str, pa.Array]
    ragged: tuple[Ragged, ...] = ()


def first_line(error: BaseException) -> str:
    """An error's reason in one line."""
    return str(error).strip().split("\n")[0]
