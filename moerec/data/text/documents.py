"""Documents of text files and JSON lines, gzipped or not, and of Parquet files, one at a time."""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from moerec.errors import InputError
from moerec.files import parse_json

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_ROWS = 256  # read at once: documents may be books


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a file in order, without those that are empty.

    A `.txt` is one document; of a `.jsonl` each line holds one, in the field `text`, or where there is no such field
    (pages in several languages: `id`, `ru`, `en`) each string but `id` is one. Blank lines are skipped. A `.parquet`
    has the column `text`, or each of its columns of strings but `id` holds documents; a row may leave some of these
    out. One document, or some hundred rows of a Parquet file, are in memory at a time.

    Raises:
      InputError: at the first document that is read, there is no such file, or it has another suffix; later, it is
        damaged or no UTF-8, or a line or row (the message has its number, from 1 on) is no JSON object or holds no
        text.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
    if path.suffix == ".parquet":
        yield from filter(None, _read_parquet(path))
        return
    with _opened(path) as file:
        if path.name.removesuffix(".gz").endswith(".txt"):
            documents = [_decode_text(file.read(), path)]
            yield from filter(None, documents)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from filter(None, _texts_of(line, f"{path}:{number}"))


def read_folder(folder: Path) -> Iterator[str]:
    """The documents of a folder's files (`SUFFIXES`), in the order of their names. See `read_documents`.

    Raises:
      InputError: also where it is no folder or has no such file.
    """
    for path in list_files(folder):
        yield from read_documents(path)


def list_files(folder: Path) -> list[Path]:
    """The files of documents in a folder, in the order of their names. Raises: as `read_folder`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: {'is no folder' if folder.exists() else 'no such folder'}")
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.is_file())
    if not paths:
        raise InputError(f"{folder}: has no file of text ({', '.join(SUFFIXES)})")
    return paths


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked. Raises InputError where the reading finds it damaged."""
    packed = path.suffix == ".gz"
    try:
        with cast(BinaryIO, gzip.open(path) if packed else path.open("rb")) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is damaged ({error})") from None


def _decode_text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is no UTF-8 text (byte {error.start} of the file)") from None


def _texts_of(line: bytes, where: str) -> list[str]:
    """The documents of a JSON line. Raises InputError."""
    try:
        value: Any = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: is no JSON object")
    if "text" in value:
        if not isinstance(value["text"], str):
            raise InputError(f"{where}: the field text must be a string")
        return [value["text"]]
    texts = [item for key, item in value.items() if key != "id" and isinstance(item, str)]
    if not texts:
        raise InputError(f"{where}: has no field text, nor another string but the id")
    return texts


def _read_parquet(path: Path) -> Iterator[str]:
    """The documents of a Parquet file, row by row. Raises InputError."""
    row = 1
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            columns = _text_columns(file.schema_arrow, path)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
                _require_utf8(batch, path, row)
                named = [batch.column(batch.schema.get_field_index(name)).to_pylist() for name in columns]
                for number, texts in enumerate(zip(*named, strict=True), row):
                    if not any(text is not None for text in texts):
                        raise InputError(f"{path}, row {number}: has no text in {', '.join(columns)}")
                    yield from (text for text in texts if text is not None)
                row += batch.num_rows
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise InputError(f"{path}, after row {row - 1}: cannot be read on: {str(error).splitlines()[0]}") from None


def _text_columns(schema: pa.Schema, path: Path) -> list[str]:
    """The columns that hold documents. Raises InputError where there is none."""
    kinds = {field.name: field.type for field in schema}
    kinds = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in kinds.items()}
    texts = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    if "text" in kinds and "text" not in texts:
        raise InputError(f"{path}, column text: must hold strings, not {kinds['text']}")
    chosen = ["text"] if "text" in kinds else [name for name in texts if name != "id"]
    if not chosen:
        raise InputError(f"{path}: has no column text, nor another one of strings but the id")
    return chosen


def _require_utf8(batch: pa.RecordBatch, path: Path, first: int) -> None:
    """Parquet does not look at the bytes of its strings. Raises InputError, with the row that has no UTF-8."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            for number in range(batch.num_rows):
                try:
                    column[number].as_py()
                except UnicodeDecodeError as error:
                    where = f"{path}, row {first + number}, column {name}"
                    raise InputError(f"{where}: is no UTF-8 text (byte {error.start})") from None
            raise
