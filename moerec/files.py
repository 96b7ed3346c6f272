"""Files that are whole or not there, written atomically; JSON that is checked when it is read; a folder's lock."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from moerec.errors import InputError, WorkError

_MOST_NESTED = 100  # levels of a JSON file; ours have ten
_INT64 = range(-(2**63), 2**63)


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


def require_new_folder(target: Path) -> None:
    """Raises: InputError, where there is something at `target` besides an empty folder, or no folder can be there."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise InputError(f"{target}: is there already; a new or empty folder is needed")
    if not all(above.is_dir() for above in target.absolute().parents if above.exists()):
        raise InputError(f"{target}: cannot be made: it lies below a file")


@contextlib.contextmanager
def making_folder(target: Path) -> Iterator[Path]:
    """A folder to write what `target` is to hold; it takes that name when the block ends, or is gone.

    Raises:
      InputError: there is something at `target` (`require_new_folder`), or it cannot be made.
    """
    require_new_folder(target)
    whole = Path(os.path.abspath(target))
    temporary = whole.with_name(f".{whole.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be made: {error.strerror}") from None
    try:
        yield temporary
        try:
            temporary.rename(whole)
        except OSError as error:  # somebody else has made it meanwhile
            raise InputError(f"{target}: cannot be made: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` (see `to_plain`) atomically. Raises WorkError on NaN and infinities; `path` is then untouched."""
    plain = to_plain(value, refuse_nonfinite=True, where=f"{Path(path).name}: ")
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def require_plain_path(folder: Path) -> None:
    """Refuses what the libraries that write checkpoints take for a pattern, an escape or the address of a bucket.

    Raises:
      InputError: such a character is in the name of the folder, or of one above it.
    """
    try:
        resolved = folder.resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise InputError(f"{folder}: is no path to a folder ({error})") from None
    found = re.search(r"[*?\[\]\\]|:(?=/)|[\ud800-\udfff]", f"{resolved}/")
    if found:
        raise InputError(f"{folder}: {found[0]!a} may not be in the name of a run's directory, or of one above it")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, all of whose numbers and strings can be worked with.

    Raises:
      ValueError: it is none, or is nested too deeply; NaN, an infinity, a number beyond 64 bits or half of a surrogate
        pair is in it.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_int64)
    except RecursionError:
        raise ValueError(f"is nested more than {_MOST_NESTED} levels deep") from None
    level, n_levels = [value] if _is_nest(value) else [], 0
    while level := [x for part in level for x in (part.values() if isinstance(part, dict) else part) if _is_nest(x)]:
        n_levels += 1
        if n_levels >= _MOST_NESTED:
            raise ValueError(f"is nested more than {_MOST_NESTED} levels deep")
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs have no UTF-8
    return value


def _is_nest(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse_constant(digits)


def _int64(digits: str) -> int:
    value = int(digits) if len(digits) < 21 else 2**63
    if value not in _INT64:
        raise ValueError(f"a number of {len(digits)} digits is beyond 64 bits")
    return value


def read_json(path: Path | str, missing: str = "no such file") -> dict[str, Any]:
    """The object in a JSON file.

    Args: missing: what to say where there is none.

    Raises:
      InputError: there is no such file, or it is damaged: cut off, no UTF-8, no JSON (`parse_json`), no object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is no file' if path.exists() else missing}")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: is no JSON file ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object")
    return value


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; a last line that a killed run left half-written is dropped.

    Raises:
      InputError: any other line is no JSON object.
    """
    lines = Path(path).read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or half a line
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: is no JSON object")
        objects.append(value)
    return objects


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone, among those that ask; whoever only reads need not.

    The lock is the kernel's (`flock`): it ends with the process that holds it, however that ends, and a file that is
    left over blocks nobody. What the file holds, `{"host", "pid", "start"}`, is only for the message.

    Raises:
      InputError: another process, or another call in this one, has it.
    """
    path = folder / ".lock"
    file = _take(path)
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": _now()}
        os.truncate(file, 0)
        os.pwrite(file, json.dumps(owner).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: `_take` sees that the one it has opened is gone
        os.close(file)


def _take(path: Path) -> int:
    """The locked file. Where another process has removed it in the meantime, the next one is tried."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = _describe_owner(os.pread(file, 1000, 0))
            os.close(file)
            raise InputError(f"{path.parent}: another process is at work here ({told})") from None
        except OSError as error:
            told = f"cannot be locked ({error.strerror}); let one process at a time work there"
            print(f"{path.parent}: {told}", file=sys.stderr)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _describe_owner(content: bytes) -> str:
    try:
        owner = parse_json(content)
        return f"process {owner['pid']} on {owner['host']}, since {owner['start']}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        return "which has not written its name yet"


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
