"""Parquet tables: one file, or a folder of files, its parts, one after another in the order of their names."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moerec.data.prepare.tables.source import RowBatch, SourceTable, first_line
from moerec.data.prepare.tables.values import is_list
from moerec.errors import InputError

PARQUET_ROWS = 1 << 17
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
        try:
            with pq.ParquetFile(part, pre_buffer=False) as file:
                for batch in file.iter_batches(PARQUET_ROWS, columns=wanted, use_threads=False):
                    rows = np.arange(first, first + batch.num_rows)
                    place = {name: batch.schema.get_all_field_indices(name)[0] for name in wanted}
                    yield RowBatch(rows, {name: batch.column(place[name]) for name in columns})
                    first += batch.num_rows
        except ERRORS as error:
            name = table.label if part == table.path else f"{table.label}/{part.name}"
            raise InputError(f"{name}, after row {first - 1}: cannot be read on: {first_line(error)}") from error


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
