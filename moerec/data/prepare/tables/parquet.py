"""Parquet tables: one file, or a folder of files, its parts, one after another in the order of their names."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moerec.data.prepare.tables.lines import MAX_LINE_BYTES
from moerec.data.prepare.tables.source import RowBatch, SourceTable, first_line
from moerec.data.prepare.tables.values import is_list
from moerec.errors import InputError

PARQUET_ROWS = 1 << 17
MAX_BATCH_BYTES = 256 << 20  # of a column's texts that dictionaries give
MAX_UNPACKED_BYTES, MAX_RATIO = 256 << 20, 1000  # a column of a row group unpacks to no more than either
ERRORS = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError)  # what damaged files end in


def open_parquet(path: Path, label: str) -> SourceTable:
    """Reads the schemas of all parts. Raises InputError where one cannot be read or has other columns."""
    parts = tuple(_list_parts(path, label)) if path.is_dir() else (path,)
    table: SourceTable | None = None
    for part in parts:
        schema = _read_schema(part, label if part == path else f"{label}/{part.name}")
        lists = {field.name: str(field.type) for field in schema if is_list(field.type)}
        if table is None:
            columns = tuple(schema.names)
            table = SourceTable(path, label, "parquet", columns, columns, parts, lists)
        elif sorted(schema.names) != sorted(table.columns) or lists.keys() != table.lists.keys():
            raise InputError(f"{label}/{part.name}: other columns than {label}/{parts[0].name}")
    assert table is not None
    return table


def read_parquet(table: SourceTable, columns: list[str]) -> Iterator[RowBatch]:
    """Streams the columns; of two columns of one name the first. Rows are numbered through all parts."""
    wanted, first = list(dict.fromkeys(columns)), 1
    for part in table.parts:
        name = table.label if part == table.path else f"{table.label}/{part.name}"
        try:
            n_rows = _plan_batches(part, name, wanted)
            with pq.ParquetFile(part, pre_buffer=False) as file:
                for batch in file.iter_batches(n_rows, columns=wanted, use_threads=False):
                    rows = np.arange(first, first + batch.num_rows)
                    place = {column: batch.schema.get_all_field_indices(column)[0] for column in wanted}
                    arrays = {column: batch.column(place[column]) for column in columns}
                    _refuse_long_values(name, arrays)
                    yield RowBatch(rows, arrays)
                    first += batch.num_rows
        except ERRORS as error:
            raise InputError(f"{name}, after row {first - 1}: cannot be read on: {first_line(error)}") from error


def _plan_batches(path: Path, label: str, columns: list[str]) -> int:
    """How many rows may be unpacked at a time. Raises InputError where a column unpacks to much more than it takes.

    A file of a few kilobytes may hold a value of megabytes once, in the dictionary of a column, and a million
    references to it: what a row may take is known from the dictionaries, which are read here, without the rows.
    """
    with pq.ParquetFile(path, pre_buffer=False) as file:
        texts = [field.name for field in file.schema_arrow if field.name in columns and _is_text(field.type)]
        leaves = [k for k in range(file.metadata.num_columns) if file.schema.column(k).path.split(".")[0] in columns]
        for group in range(file.num_row_groups):
            for leaf in leaves:
                chunk = file.metadata.row_group(group).column(leaf)
                n_bytes, packed = chunk.total_uncompressed_size, max(chunk.total_compressed_size, 1)
                if n_bytes > MAX_UNPACKED_BYTES and n_bytes > MAX_RATIO * packed:
                    where = f"{label}, column {chunk.path_in_schema}"
                    raise InputError(f"{where}: {packed:,} bytes that would unpack to {n_bytes:,}; is it damaged?")
    longest = 1
    with pq.ParquetFile(path, pre_buffer=False, read_dictionary=texts) as file:
        for group in range(file.num_row_groups if texts else 0):
            for batch in file.iter_batches(1, row_groups=[group], columns=texts, use_threads=False):
                arrays = {
                    field.name: array.dictionary
                    for field, array in zip(batch.schema, batch.columns, strict=True)
                    if pa.types.is_dictionary(array.type)
                }
                longest = max(longest, _refuse_long_values(label, arrays))
                break
    return max(1, min(PARQUET_ROWS, MAX_BATCH_BYTES // longest))


def _refuse_long_values(label: str, arrays: dict[str, pa.Array]) -> int:
    """The bytes of the longest text. Raises InputError where it has more than a line of a text table may have."""
    longest = 0
    for column, array in arrays.items():
        if _is_text(array.type):
            array = array.dictionary if pa.types.is_dictionary(array.type) else array
            longest = max(longest, pc.max(pc.binary_length(array)).as_py() or 0)
        if longest > MAX_LINE_BYTES:
            raise InputError(f"{label}, column {column}: a value has more than {MAX_LINE_BYTES:,} bytes")
    return longest


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def _list_parts(folder: Path, label: str) -> list[Path]:
    """Files of the ending .parquet; those that Spark and others put beside them begin with `_` or `.`."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(("_", ".")))
    for entry in entries:
        if entry.is_dir():
            raise InputError(f"{label}/{entry.name}: a folder within a table; partitions by column are not read")
        if entry.suffix != ".parquet":
            raise InputError(f"{label}/{entry.name}: no Parquet file; all parts of a table need the ending .parquet")
    if not entries:
        raise InputError(f"{label}: a folder without a Parquet file")
    return entries


def _read_schema(path: Path, label: str) -> pa.Schema:
    try:
        schema = pq.read_schema(path)
        schema.names  # noqa: B018 - decodes the names
        return schema
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: a column's name is bad UTF-8 ({error.reason})") from error
    except ERRORS as error:
        raise InputError(f"{label}: cannot be read as Parquet: {first_line(error)}") from error
