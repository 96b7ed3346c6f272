"""Opens a table of any format and reads it as batches of rows."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from moerec.data.prepare.tables import atomic, text
from moerec.data.prepare.tables.parquet import open_parquet, read_parquet
from moerec.data.prepare.tables.source import RowBatch, SourceTable, first_line
from moerec.errors import InputError


def open_table(folder: Path, name: str, format: str = "auto") -> SourceTable:
    """Reads the header or schema of `folder/name`. Raises InputError if the file is absent or its format unclear."""
    name = name.rstrip("/") or name
    path = (folder / name).absolute()  # Arrow takes a relative `gs:…` or `~` for another place
    if not path.exists():
        raise InputError(f"{name}: no such file in {folder}")
    kind = _format_by_ending(name) if format == "auto" else format
    if not path.is_file() and not (path.is_dir() and kind == "parquet"):
        raise InputError(f"{name}: no file; only a Parquet table may be a folder, of its parts")
    if kind == "parquet":
        return open_parquet(path, name)
    return text.open_text(path, name, kind)


def read_batches(table: SourceTable, columns: list[str]) -> Iterator[RowBatch]:
    """Streams the columns. Raises InputError, naming the row it got to, where the file is cut off or corrupt.

    Where the table's values are to be of one line, a CSV file's row with another is left out as ragged, whichever
    column it is in: nearly always a quote is not closed, which hides the rows below.
    """
    if table.format == "parquet":
        yield from read_parquet(table, columns)
        return
    done = 0
    try:
        for batch in text.read_text(table, columns):
            yield batch
            done = int(batch.rows[-1]) if len(batch.rows) else done
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InputError(f"{table.label}, after row {done}: cannot be read on: {first_line(error)}") from error


def _format_by_ending(name: str) -> str:
    bare = name.removesuffix(".gz")
    for ending, kind in {".tsv": "tsv", ".csv": "csv", **dict.fromkeys(atomic.ENDINGS, "atomic")}.items():
        if bare.endswith(ending):
            return kind
    if name.endswith(".parquet"):
        return "parquet"
    raise InputError(f"{name}: the format is not clear from the file's ending; set config.data.tables.format")
