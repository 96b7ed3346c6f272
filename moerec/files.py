"""Files that are whole or not there: JSON, JSON lines and any other file, written atomically."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from moerec.errors import InputError, WorkError


def to_plain(value: Any, refuse_nonfinite: bool = False, where: str = "") -> Any:
    """`value` as JSON types: dataclasses and mappings to dicts, arrays to lists, numpy and jax scalars to numbers.

    NaN and infinities become None or, with `refuse_nonfinite`, raise WorkError with their place.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if refuse_nonfinite:
            raise WorkError(f"{where.lstrip('.') or 'the value'} is {value}, which has no place in JSON")
        return None
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, refuse_nonfinite, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [to_plain(item, refuse_nonfinite, f"{where}[{index}]") for index, item in enumerate(items)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{where.lstrip('.') or 'the value'}: {type(value).__name__} has no JSON form")


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Within it an error of the operating system (a full disk, a limit on sizes) that names no file is about `path`.

    Raises WorkError in its place, with the file and the reason.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        reason = os.strerror(error.errno) if error.errno else str(error).split("\n")[0]
        raise WorkError(f"{path}: cannot be written: {reason}") from error


def require_utf8(path: Path | str) -> None:
    """Refuses a path that the libraries for Zarr, ArrayRecord and Parquet cannot be given. Raises InputError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{os.fsencode(path)!r}: the name of this folder must be UTF-8") from None


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write what `path` is to hold: whoever reads that sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` (see `to_plain`) atomically. Raises WorkError on NaN and infinities; `path` is then untouched."""
    plain = to_plain(value, refuse_nonfinite=True, where=f"{Path(path).name}: ")
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; a last line that a killed run left half-written is dropped.

    Raises WorkError on any other line that is not a JSON object.
    """
    lines = Path(path).read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or half a line
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise WorkError(f"{path}:{number}: is no JSON object")
        objects.append(value)
    return objects
