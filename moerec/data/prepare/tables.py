"""Readers of TSV, CSV (both gzipped too), Parquet and RecBole's atomic files, as streams of record batches.

Memory is one batch of the columns asked for, whatever the length of the table. Rows are numbered from 1 below the
header. Text columns come as raw bytes, so that a row with bad UTF-8 can be named; a row with the wrong number of fields
is handed over beside the batch.
"""

import csv
import dataclasses
import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from moerec.data.prepare import atomic
from moerec.errors import InputError

BLOCK_BYTES = 8 << 20  # of text; also the longest row that can be read
PARQUET_ROWS = 1 << 17
_BOM = "\ufeff".encode()


@dataclasses.dataclass(frozen=True)
class SourceTable:
    """An opened table. `label` is its name in messages; `separators` those inside the columns typed as lists."""

    path: Path
    label: str
    format: str
    columns: tuple[str, ...]
    raw_columns: tuple[str, ...]  # as the parser sees them: a text file's header as latin-1, with types
    separators: dict[str, str]
    bom: bool = False  # whether the text begins with a byte order mark, which no parser is shown
    one_line: bool = False  # whether a value of several lines is a defect

    def require(self, column: str, field: str):
        """Raises InputError if the column, which config field `field` names, is absent or ambiguous."""
        if self.columns.count(column) != 1:
            problem = "no such column" if column not in self.columns else "the name occurs twice"
            found = ", ".join(self.columns)
            raise InputError(f"{self.label}, header, column {column}: {problem} (config.{field}); there are: {found}")


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


def open_table(folder: Path, name: str, format: str = "auto") -> SourceTable:
    """Reads the header or schema of `folder/name`. Raises InputError if the file is absent or its format unclear."""
    path = folder / name
    if not path.is_file():
        raise InputError(f"{name}: no such file in {folder}")
    kind = _format_by_ending(name) if format == "auto" else format
    if kind == "parquet":
        try:
            columns = tuple(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{name}: cannot be read as Parquet: {_first_line(error)}") from error
        return SourceTable(path, name, kind, columns, columns, {})
    raw, bom = _read_header(path, name, kind)
    try:
        fields = [field.encode("latin-1").decode("utf-8") for field in raw]
    except UnicodeDecodeError as error:
        raise InputError(f"{name}, header: bad UTF-8 ({error.reason})") from error
    if kind != "atomic":
        return SourceTable(path, name, kind, tuple(fields), tuple(raw), {}, bom)
    types = atomic.parse_header(fields, name)
    return SourceTable(path, name, kind, tuple(types), tuple(raw), atomic.sequence_separators(types), bom)


def read_batches(table: SourceTable, columns: list[str]) -> Iterator[RowBatch]:
    """Streams the columns. Raises InputError, naming the row it got to, where the file is cut off or corrupt.

    Where the table's values are to be of one line, a CSV file's row with another is left out as ragged, whichever
    column it is in: nearly always a quote is not closed, which hides the rows below.
    """
    done = 0
    try:
        for batch in _read_parquet(table, columns) if table.format == "parquet" else _read_text(table, columns):
            yield batch
            done = int(batch.rows[-1]) if len(batch.rows) else done
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InputError(f"{table.label}, after row {done}: cannot be read on: {_first_line(error)}") from error


def as_binary(array: pa.Array, separator: str = ",") -> pa.Array:
    """Values as bytes: null becomes empty, the elements of a list are joined by `separator`, others are printed."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_list(array.type) for is_list in lists):
        # null elements are dropped by the join of a list without nulls
        array = pc.binary_join(array.cast(pa.list_(pa.string())), separator)
    kind = array.type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_string(kind)):
        array = array.cast(pa.string())
    array = array.cast(pa.binary())
    return array.fill_null(b"") if array.null_count else array


def _format_by_ending(name: str) -> str:
    bare = name.removesuffix(".gz")
    for ending, kind in {".tsv": "tsv", ".csv": "csv", **dict.fromkeys(atomic.ENDINGS, "atomic")}.items():
        if bare.endswith(ending):
            return kind
    if name.endswith(".parquet"):
        return "parquet"
    raise InputError(f"{name}: the format is not clear from the file's ending; set config.data.tables.format")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _read_header(path: Path, label: str, kind: str) -> tuple[list[str], bool]:
    """The fields of the header as latin-1, which any bytes are, and whether a byte order mark stands before them."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="latin-1", newline="") as lines:  # type: ignore[arg-type]
            bom = raw.read(len(_BOM)) == _BOM
            if not bom:
                raw.seek(0)
            if kind == "csv":
                fields = next(csv.reader(lines), [])
            else:
                fields = lines.readline(BLOCK_BYTES).rstrip("\r\n").split("\t")
    except (OSError, EOFError, csv.Error) as error:
        raise InputError(f"{label}, header: cannot be read: {_first_line(error)}") from error
    if not any(fields):
        raise InputError(f"{label}: the file is empty or its first line is; a header is needed")
    return fields, bom


def _read_text(table: SourceTable, columns: list[str]) -> Iterator[RowBatch]:
    ragged: list[Ragged] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        text = row.text.encode("latin-1").decode("utf-8", "backslashreplace")
        ragged.append(Ragged(row.number - 1, row.expected_columns, row.actual_columns, text))
        return "skip"

    quoting = table.format == "csv"
    raw = [table.raw_columns[table.columns.index(column)] for column in columns]
    one_line = quoting and table.one_line
    read = list(dict.fromkeys([*raw, *table.raw_columns])) if one_line else raw
    with pa.input_stream(str(table.path), "gzip" if table.path.suffix == ".gz" else None) as stream:
        if table.bom:
            stream.read(len(_BOM))
        reader = _open_csv(
            stream,
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
                column_types=dict.fromkeys(read, pa.binary()), include_columns=read, strings_can_be_null=False
            ),
        )
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


def _drop_broken(
    table: SourceTable, batch: pa.RecordBatch, rows: np.ndarray
) -> tuple[pa.RecordBatch, np.ndarray, tuple]:
    """The batch and its row numbers without the rows that have a value of several lines, and those."""
    ragged, good = [], np.ones(len(rows), bool)
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        is_broken = pc.match_substring_regex(array, b"[\r\n]").to_numpy(zero_copy_only=False) & good
        column = table.columns[table.raw_columns.index(name)]
        for k in np.flatnonzero(is_broken):
            text = array[int(k)].as_py().decode("utf-8").encode("latin-1").decode("utf-8", "backslashreplace")
            ragged.append(Ragged(int(rows[k]), 0, 0, text, column))
        good &= ~is_broken
    return (batch, rows, ()) if good.all() else (batch.filter(pa.array(good)), rows[good], tuple(ragged))


def _open_csv(stream: pa.NativeFile, **options) -> pa_csv.CSVStreamingReader | None:
    """The parser, or None where nothing follows the header."""
    try:
        return pa_csv.open_csv(stream, **options)
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


def _read_parquet(table: SourceTable, columns: list[str]) -> Iterator[RowBatch]:
    first = 1
    with pq.ParquetFile(table.path, pre_buffer=False) as file:
        for batch in file.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(columns)), use_threads=False):
            rows = np.arange(first, first + batch.num_rows)
            yield RowBatch(rows, {column: batch.column(column) for column in columns})
            first += batch.num_rows
