"""Checks of table rows, and what becomes of the bad ones: the first is an error, or all go to a quarantine file.

A row counts once, under the first check that it fails. Every check is a boolean column over a batch.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.prepare.binning import NUMBER
from moerec.data.prepare.tables import RowBatch, SourceTable, as_binary, find_inexact, print_any, read_batches
from moerec.data.prepare.times import TimeColumn, castable, has_lost_digits, matches
from moerec.errors import InputError
from moerec.files import naming

RAGGED = "wrong number of fields"
BROKEN = "value of several lines"
NUL = "NUL character"
BAD_UTF8 = "bad UTF-8"
BAD_TIME = "unparsable time"
OTHER_CLOCK = "time with a UTC offset where others have none, or without one where others have it"
NO_TIME = "empty time"
BAD_NUMBER = "unparsable number"
EMPTY = {name: f"empty {name}" for name in ("user", "item", "service", "action")}
INEXACT = "number that is no exact identifier"
UNKNOWN_SERVICE = "unknown service"
UNKNOWN_ITEM = "unknown item"
DUPLICATE_EVENT = "duplicate event"
DUPLICATE_ITEM = "duplicate item"
DUPLICATE_USER = "duplicate user"


def _say(text: str, _: int) -> str:
    return text


@dataclasses.dataclass(frozen=True)
class _First:
    row: int
    message: str


class DefectLog:
    """Collects the defects of all tables.

    With `quarantine` the numbers of the bad rows are kept (8 bytes each), otherwise only counts and the lowest row.
    """

    def __init__(self, quarantine: bool):
        self.quarantine = quarantine
        self.counts: dict[str, dict[str, int]] = {}  # label -> reason -> rows
        self._first: dict[str, _First] = {}
        self._rows: dict[str, list[tuple[str, str, np.ndarray]]] = {}

    @property
    def failed(self) -> bool:
        """Whether `check` is going to raise."""
        return bool(self.counts) and not self.quarantine

    def add(self, table: SourceTable, reason: str, column: str, rows: np.ndarray, describe: Callable[[int], str]):
        """Notes bad rows (`[n]` int64 row numbers); `describe(k)` says what is wrong with the k-th of them."""
        if not len(rows):
            return
        counts = self.counts.setdefault(table.label, {})
        counts[reason] = counts.get(reason, 0) + len(rows)
        k = int(np.argmin(rows))
        first = self._first.get(table.label)
        if first is None or rows[k] < first.row:
            where = f"column {column}: " if column else ""
            self._first[table.label] = _First(int(rows[k]), where + describe(k))
        if self.quarantine:
            self._rows.setdefault(table.label, []).append((reason, column, np.asarray(rows, np.int64)))

    def add_ragged(self, table: SourceTable, batch: RowBatch):
        """Notes the rows that the reader left out."""
        ragged = [row for row in batch.ragged if not row.column]
        rows = np.asarray([row.row for row in ragged], np.int64)
        self.add(
            table, RAGGED, "", rows, lambda k: f"{ragged[k].n_found} fields, the header has {ragged[k].n_expected}"
        )
        for row in batch.ragged:
            if row.column:
                text = f"{printed(row.text.encode())} has several lines; is a quote not closed?"
                self.add(table, BROKEN, row.column, np.array([row.row]), functools.partial(_say, text))

    def check(self, table: SourceTable):
        """Raises InputError at the table's lowest bad row, unless bad rows go to quarantine."""
        first = self._first.get(table.label)
        if first is None or self.quarantine:
            return
        counts = self.counts[table.label]
        total = sum(counts.values())
        kinds = ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.items()))
        more = f" (bad rows in all: {total:,}: {kinds})" if total > 1 else ""
        raise InputError(f"{table.label}, row {first.row}, {first.message}{more}")

    def write_quarantine(self, tables: list[SourceTable], path: Path):
        """Writes a JSON object per bad row: file, row, column, reason and the raw row. Reads the tables again."""
        tables = [table for table in tables if table.label in self._rows]
        if not tables:
            return
        with naming(path), path.open("w", encoding="utf-8") as out:
            for table in tables:
                for row in self._quarantined(table):
                    out.write(json.dumps({"file": table.label, **row}, ensure_ascii=False) + "\n")

    def _quarantined(self, table: SourceTable) -> Iterator[dict]:
        parts = self._rows[table.label]
        rows = np.concatenate([part[2] for part in parts])
        kind = np.repeat(np.arange(len(parts)), [len(part[2]) for part in parts])
        order = np.argsort(rows, kind="stable")
        rows, kind = rows[order], kind[order]
        for batch in read_batches(table, list(dict.fromkeys(table.columns))):
            for ragged in batch.ragged:
                reason = BROKEN if ragged.column else RAGGED
                yield {"row": ragged.row, "column": ragged.column, "reason": reason, "raw": ragged.text}
            if not len(batch.rows):
                continue
            lo, hi = np.searchsorted(rows, [batch.rows[0], batch.rows[-1] + 1])
            at = np.searchsorted(batch.rows, rows[lo:hi])
            here = batch.rows[at] == rows[lo:hi]  # a ragged row is in none
            at, kinds = at[here], kind[lo:hi][here]
            values = {name: _print_at(array, at) for name, array in batch.columns.items()}
            for k in range(len(at)):
                reason, column, _ = parts[kinds[k]]
                raw = {name: value[k] for name, value in values.items()}
                yield {"row": int(batch.rows[at[k]]), "column": column, "reason": reason, "raw": raw}


class RowCheck:
    """Runs checks over the rows of a batch; `good` (`[n]` bool) is what is left after them."""

    def __init__(self, log: DefectLog, table: SourceTable, rows: np.ndarray):
        self.log, self.table, self.rows = log, table, rows
        self.good = np.ones(len(rows), bool)

    def refuse(self, bad: np.ndarray, reason: str, column: str, describe: Callable[[int], str]):
        """Notes rows that are bad (`[n]` bool) and were good so far; `describe` is given a position in the batch."""
        at = np.flatnonzero(bad & self.good)
        self.good[at] = False
        self.log.add(self.table, reason, column, self.rows[at], lambda k: describe(int(at[k])))

    def utf8(self, column: str, values: pa.Array):
        bad = ~castable(values, pa.string())
        self.refuse(bad, BAD_UTF8, column, lambda k: f"bad UTF-8 in {printed(values[k].as_py())}")

    def filled(self, column: str, values: pa.Array, what: str):
        """Refuses values of a user, item, service or action that are empty or hold a NUL (digests are of ids with one
        between them).
        """
        bad = pc.equal(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
        self.refuse(bad, EMPTY[what], column, lambda k: f"the {what} is empty")
        bad = pc.match_substring(values, b"\0").to_numpy(zero_copy_only=False)
        self.refuse(bad, NUL, column, lambda k: f"the {what} {printed(values[k].as_py())} holds a NUL character")

    def exact(self, column: str, values: pa.Array, what: str):
        """Refuses floats, as the table holds them, that are no whole numbers or too large to be told apart."""
        self.refuse(
            find_inexact(values), INEXACT, column,
            lambda k: f"the {what} {print_any(values.slice(k, 1))[0]} of type {values.type} is no exact whole number",
        )  # fmt: skip

    def first(self, repeated: np.ndarray, reason: str, column: str, ids: pa.Array):
        """Refuses the rows of a keyed table whose id had a row before."""
        self.refuse(repeated, reason, column, lambda k: f"{printed(ids[k].as_py())} has an earlier row")

    def times(self, column: TimeColumn, values: pa.Array, keep_unknown: bool) -> tuple[np.ndarray, np.ndarray]:
        """Microseconds since 1970 UTC, UNKNOWN_TIME where empty, and seconds that the clocks they were read from are
        ahead of UTC, each `[n]`; refuses what cannot be read.
        """
        try:
            times, is_other = column.read(values)
        except pa.ArrowException as error:
            raise InputError(f"{self.table.label}, column {column.name}: {values.type} is no type of a time") from error
        except ValueError as error:
            raise InputError(f"{self.table.label}, column {column.name}: {error}") from error

        def say(k: int) -> str:
            text = as_binary(values.slice(k, 1))
            lost = ", whose last digits are lost" if has_lost_digits(text)[0] else ""
            return f"cannot read {printed(text[0].as_py())} as {column.meaning} (data.schema.time_unit){lost}"

        self.refuse(times.is_bad, BAD_TIME, column.name, say)
        has = "no offset from UTC; others have one" if column.has_offsets else "an offset from UTC; others have none"
        self.refuse(
            is_other,
            OTHER_CLOCK,
            column.name,
            lambda k: f"{printed(as_binary(values.slice(k, 1))[0].as_py())} has {has}",
        )
        if not keep_unknown:
            self.refuse(times.time_us == UNKNOWN_TIME, NO_TIME, column.name, lambda k: "the time is empty")
        return times.time_us, times.utc_offset

    def numbers(self, column: str, values: pa.Array) -> np.ndarray:
        """`[n]` float64, NaN where empty or "nan" (a missing float of pandas); refuses what is no finite number."""
        filled = ~matches(values, r"^([nN]a[nN])?$")
        is_number = matches(values, NUMBER)
        numbers = np.full(len(values), np.nan)
        texts = values.filter(pa.array(is_number)).cast(pa.string())
        numbers[is_number] = texts.cast(pa.float64()).to_numpy(zero_copy_only=False)
        bad = filled & ~np.isfinite(numbers)
        self.refuse(bad, BAD_NUMBER, column, lambda k: f"cannot read {printed(values[k].as_py())} as a number")
        return numbers


def _print_at(array: pa.Array, at: np.ndarray) -> list[str]:
    """The values at these places; views and other types that arrow cannot take from are sliced."""
    if not len(at):
        return []
    try:
        return print_any(array.take(pa.array(at)))
    except pa.ArrowNotImplementedError:
        return [print_any(array.slice(int(k), 1))[0] for k in at]


def printed(value: bytes) -> str:
    """A value as messages show it."""
    text = repr(value.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 60 else text[:56] + "...'"
