"""CSV and TSV, and RecBole's atomic files, by arrow's parser: the header, then batches of rows as raw bytes."""

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from moerec.data.prepare.tables import atomic
from moerec.data.prepare.tables.lines import LineStream
from moerec.data.prepare.tables.source import Ragged, RowBatch, SourceTable, first_line
from moerec.errors import InputError

BLOCK_BYTES = 8 << 20  # of text; a row must fit into it
MAX_RAGGED = 1 << 16  # rows with the wrong number of fields that one block may have
_UTF_16 = ("\xff\xfe", "\xfe\xff")  # its byte order marks, as latin-1


def open_text(path: Path, label: str, kind: str) -> SourceTable:
    """Reads the header. Raises InputError where there is none, or where it is no UTF-8 or has no types it needs."""
    raw = _read_header(path, label, kind)
    try:
        fields = [field.encode("latin-1").decode("utf-8") for field in raw]
    except UnicodeDecodeError as error:
        hint = "; the file seems to be UTF-16" if raw[0].startswith(_UTF_16) else ""
        raise InputError(f"{label}, header: bad UTF-8 ({error.reason}){hint}") from error
    if kind != "atomic":
        return SourceTable(path, label, kind, tuple(fields), tuple(raw))
    types = atomic.parse_header(fields, label)
    separators = atomic.sequence_separators(types)
    lists = {name: types[name] for name in separators}
    return SourceTable(path, label, kind, tuple(types), tuple(raw), lists=lists, separators=separators)


def _read_header(path: Path, label: str, kind: str) -> list[str]:
    """The fields of the header as latin-1, which any bytes are."""
    try:
        with (
            LineStream(path, label) as raw,
            io.TextIOWrapper(io.BufferedReader(raw), encoding="latin-1", newline="") as lines,
        ):
            if kind == "csv":
                fields = next(csv.reader(lines), [])
            else:
                fields = lines.readline().rstrip("\r\n").split("\t")
    except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
        raise InputError(f"{label}, header: cannot be read: {first_line(error)}") from error
    if not any(fields):
        raise InputError(f"{label}: the file is empty or its first line is; a header is needed")
    return fields


def read_text(table: SourceTable, columns: list[str]) -> Iterator[RowBatch]:
    """Streams the columns. Raises InputError where almost no row is as the header says, ArrowException if damaged."""
    ragged: list[Ragged] = []
    quoting = table.format == "csv"
    raw = [table.raw_columns[table.columns.index(column)] for column in columns]
    one_line = quoting and table.one_line
    read = list(dict.fromkeys([*raw, *table.raw_columns])) if one_line else raw
    with LineStream(table.path, table.label) as stream, _explained(table.label, ragged):
        reader = _open_csv(stream, quoting, read, ragged)
        if reader is None:
            return
        first = 1
        waiting: list[int] = []  # ragged rows that the numbering has not passed yet
        with reader:
            for batch in reader:
                skipped = _drain(ragged)
                waiting += [row.row for row in skipped]
                rows = _number_rows(first, batch.num_rows, np.sort(np.asarray(waiting, np.int64)))
                first = int(rows[-1]) + 1 if len(rows) else first
                if one_line:
                    batch, rows, broken = _drop_broken(table, batch, rows)
                    skipped += broken
                arrays = [_undo_latin1(array) for array in batch.columns[: len(columns)]]
                yield RowBatch(rows, dict(zip(columns, arrays, strict=True)), skipped)
                waiting = [row for row in waiting if row >= first]
        if ragged:
            yield RowBatch(np.empty(0, np.int64), {c: pa.array([], pa.binary()) for c in columns}, _drain(ragged))


@contextlib.contextmanager
def _explained(label: str, ragged: list[Ragged]) -> Iterator[None]:
    """Raises InputError in place of the parser's errors that come from limits of ours."""
    try:
        yield
    except pa.ArrowInvalid as error:
        if len(ragged) >= MAX_RAGGED:
            row = ragged[0]
            raise InputError(
                f"{label}, row {row.row}, {row.n_found} fields, the header has {row.n_expected}; so have"
                f" {MAX_RAGGED:,} rows close by: the table is not as its header says"
            ) from None
        if "straddling" in str(error):
            raise InputError(f"{label}: a row has more than {BLOCK_BYTES:,} bytes; is a quote not closed?") from None
        raise


def _drop_broken(
    table: SourceTable, batch: pa.RecordBatch, rows: np.ndarray
) -> tuple[pa.RecordBatch, np.ndarray, tuple]:
    """The batch and its row numbers without the rows that have a value of several lines, and those."""
    ragged, good = [], np.ones(len(rows), bool)
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        is_broken = pc.match_substring_regex(array, b"[\r\n]").to_numpy(zero_copy_only=False) & good
        column = table.columns[table.raw_columns.index(name)]
        if np.count_nonzero(is_broken) > MAX_RAGGED:
            raise InputError(
                f"{table.label}, row {rows[is_broken.argmax()]}, column {column}: several lines; so in more than"
                f" {MAX_RAGGED:,} rows close by; texts of several lines need config.data.tables.line_breaks=keep"
            )
        for k in np.flatnonzero(is_broken):
            text = array[int(k)].as_py().decode("utf-8").encode("latin-1").decode("utf-8", "backslashreplace")
            ragged.append(Ragged(int(rows[k]), 0, 0, text, column))
        good &= ~is_broken
    return (batch, rows, ()) if good.all() else (batch.filter(pa.array(good)), rows[good], tuple(ragged))


def _open_csv(
    stream: LineStream, quoting: bool, columns: list[str], ragged: list[Ragged]
) -> pa_csv.CSVStreamingReader | None:
    """The parser, which appends rows with the wrong number of fields to `ragged`; None where only a header is there."""

    def skip(row: pa_csv.InvalidRow) -> str:
        text = row.text.encode("latin-1").decode("utf-8", "backslashreplace")
        ragged.append(Ragged(row.number - 1, row.expected_columns, row.actual_columns, text))
        return "skip" if len(ragged) < MAX_RAGGED else "error"

    try:
        return pa_csv.open_csv(
            pa.PythonFile(stream, mode="r"),
            # row numbers need a single thread; latin-1 lets rows through that are not UTF-8
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, encoding="latin-1"),
            parse_options=pa_csv.ParseOptions(
                delimiter="," if quoting else "\t",
                quote_char='"' if quoting else False,
                newlines_in_values=quoting,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.binary()), include_columns=columns, strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if "Empty CSV file" in str(error):
            return None
        raise


def _drain(ragged: list[Ragged]) -> tuple[Ragged, ...]:
    n = len(ragged)  # the parser reads ahead in a thread of its own, and may add rows at any moment
    taken = tuple(ragged[:n])
    del ragged[:n]
    return taken


def _number_rows(first: int, n: int, skipped: np.ndarray) -> np.ndarray:
    """Numbers of the next n rows that are not in `skipped` (sorted, all at least `first`)."""
    good_before = skipped - first - np.arange(len(skipped))
    k = np.arange(n)
    return first + k + np.searchsorted(good_before, k, side="right")


def _undo_latin1(array: pa.Array) -> pa.Array:
    """The bytes that stood in the file, from bytes that the parser took for latin-1 and turned into UTF-8."""
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    if not len(array) or array.buffers()[2] is None:
        return array
    values = memoryview(array.buffers()[2])[int(offsets[0]) : int(offsets[-1])]
    if not (np.frombuffer(values, np.uint8) & 0x80).any():
        return array
    lengths = pc.utf8_length(array.cast(pa.string())).to_numpy(zero_copy_only=False)
    new_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    data = str(values, "utf-8").encode("latin-1")
    return pa.Array.from_buffers(pa.binary(), len(array), [None, pa.py_buffer(new_offsets), pa.py_buffer(data)])
