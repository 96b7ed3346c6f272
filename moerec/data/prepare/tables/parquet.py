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
MAX_ELEMENTS = 1 << 26  # of the lists of a column in a row group
_READ_BYTES = 1 << 20  # at once where a part of a column is read
_NUMBER_BYTES = 24  # of a number as it is printed
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
    references to it, in lists too: what a row may take is known from the dictionaries, which are read here. Of a plain
    column of texts that is done without the rows, of a column of lists with the references only.
    """
    dictionaries: dict[str, dict[int, int]] = {}  # by column and row group, how many rows may be read at a time
    with pq.ParquetFile(path, pre_buffer=False) as file:
        wanted = [field for field in file.schema_arrow if field.name in columns]
        lists = {field.name for field in wanted if is_list(field.type) or pa.types.is_nested(field.type)}
        leaves = [(k, file.schema.column(k)) for k in range(file.metadata.num_columns)]
        owned = [(k, leaf, name) for k, leaf in leaves for name in columns if f"{leaf.path}.".startswith(f"{name}.")]
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            for k, leaf, name in owned:
                chunk = file.metadata.row_group(group).column(k)
                _refuse_bombs(f"{label}, column {leaf.path}", chunk, name in lists)
                if name in lists:
                    most = max(1, PARQUET_ROWS * n_rows // max(1, chunk.num_values))
                    dictionaries.setdefault(name, {})[group] = most
                elif leaf.physical_type == "BYTE_ARRAY" and _has_dictionary(chunk):
                    dictionaries.setdefault(name, {})[group] = 1
    texts, longest = [leaf.path for _, leaf, _ in owned if leaf.physical_type == "BYTE_ARRAY"], 1
    with pq.ParquetFile(path, pre_buffer=False, read_dictionary=texts, buffer_size=_READ_BYTES) as file:
        for name, groups in dictionaries.items():
            for group, most in groups.items():
                for batch in file.iter_batches(most, row_groups=[group], columns=[name], use_threads=False):
                    array = batch.column(0)
                    if name not in lists and pa.types.is_dictionary(array.type):
                        array = array.dictionary
                    longest = max(longest, _refuse_long_values(label, {name: array}))
                    if name not in lists:
                        break  # the dictionary is that of all rows
    return max(1, min(PARQUET_ROWS, MAX_BATCH_BYTES // longest))


def _has_dictionary(chunk: pq.ColumnChunkMetaData) -> bool:
    return any("DICTIONARY" in encoding for encoding in chunk.encodings)


def _refuse_bombs(where: str, chunk: pq.ColumnChunkMetaData, in_lists: bool):
    n_bytes, packed = chunk.total_uncompressed_size, max(chunk.total_compressed_size, 1)
    if n_bytes > MAX_UNPACKED_BYTES and n_bytes > MAX_RATIO * packed:
        raise InputError(f"{where}: {packed:,} bytes that would unpack to {n_bytes:,}; is it damaged?")
    if in_lists and chunk.num_values > MAX_ELEMENTS:
        raise InputError(
            f"{where}: {chunk.num_values:,} elements of lists in one row group; the most is {MAX_ELEMENTS:,}"
        )


def _refuse_long_values(label: str, arrays: dict[str, pa.Array]) -> int:
    """The bytes of the longest text. Raises InputError where it has more than a line of a text table may have."""
    longest = 0
    for column, array in arrays.items():
        longest = max(longest, int(_count_bytes(array).max(initial=0)))
        if longest > MAX_LINE_BYTES:
            raise InputError(f"{label}, column {column}: a value has more than {MAX_LINE_BYTES:,} bytes")
    return longest


def _count_bytes(array: pa.Array) -> np.ndarray:
    """`[n]` int64 of each text, or of all in each list or struct, with a separator each; 0 for what is neither."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        of_entry, entry = _count_bytes(array.dictionary), pc.fill_null(array.indices, -1)
        return np.append(of_entry, 0)[entry.to_numpy(zero_copy_only=False)]
    if pa.types.is_struct(kind):
        return sum((_count_bytes(part) + 1 for part in array.flatten()), np.zeros(len(array), np.int64))
    if pa.types.is_map(kind):
        array = array.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
    if is_list(kind):
        within = pc.list_flatten(array)
        own = _count_bytes(within) if _is_text(within.type) else np.full(len(within), _NUMBER_BYTES)
        owner = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
        return np.bincount(owner, own + 1, len(array)).astype(np.int64)
    if not _is_text(kind):
        return np.zeros(len(array), np.int64)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        array = array.cast(pa.large_binary())
    return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_text(kind: pa.DataType) -> bool:
    """Of texts, and of lists and structs that hold some."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        return any(_is_text(kind.field(k).type) for k in range(kind.num_fields))
    if pa.types.is_dictionary(kind) or is_list(kind):
        return _is_text(kind.value_type)
    views = pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)
    return views or any(
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
