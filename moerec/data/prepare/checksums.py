"""Whether the files of a folder are those that were written: their sizes and CRC-32, checked once in a process.

CRC-32 finds every damage of up to 32 bits in a row and all but one of 2^32 others, which is what a disk, a copy or a
cut download do to a file; it costs a third of SHA-256's time. It is no protection against somebody who means harm.
"""

import json
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moerec.errors import InputError

_BLOCK_BYTES = 1 << 20
_THREADS = 4  # the sum is taken without Python's lock
_intact: set[tuple] = set()  # what has been checked: a file by its place, inode, size, time of change and checksum


def describe_file(path: Path) -> dict[str, int]:
    """`{"n_bytes", "crc32"}` of a file."""
    return {"n_bytes": path.stat().st_size, "crc32": compute_crc32(path)}


def compute_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes, in the memory of one block."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def sum_fields(fields: Mapping[str, Any]) -> int:
    """CRC-32 of the fields of a meta.json, in whatever order they stand."""
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def require_intact(folder: Path, files: Mapping[str, Mapping[str, int]], told_by: str) -> None:
    """Checks files of a folder against what `describe_file` gave when they were written.

    Args:
      files: by name. told_by: the file that tells of them, for messages.

    Raises:
      InputError: a file is missing, is not the one that was written, or lies elsewhere; in one line that names it.
    """
    for name in files:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise InputError(f"{folder / told_by}: {name!r} is no name of a file in the folder")
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda name: _find_damage(folder / name, files[name]), files)
        for name, reason in zip(files, reasons, strict=True):
            if reason:
                raise InputError(f"{folder / name}: {reason} {told_by} tells; prepare the folder again")


def _find_damage(path: Path, wanted: Mapping[str, int]) -> str:
    """What is wrong with a file, as the beginning of a sentence; empty where nothing is."""
    n_bytes, crc32 = wanted["n_bytes"], wanted["crc32"]
    if not path.is_file() or path.stat().st_size != n_bytes:
        return f"missing or not of the {n_bytes} bytes that"
    found = path.stat()
    key = (str(path.absolute()), found.st_ino, n_bytes, found.st_mtime_ns, crc32)
    if key not in _intact:
        if compute_crc32(path) != crc32:
            return "is damaged: its checksum is not the one that"
        _intact.add(key)
    return ""
