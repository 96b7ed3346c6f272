"""Many writes into files of a folder as one: all of them, or none, also when the process is killed in between.

The writes go to a journal, flushed to disk; renaming it is the commit. Then they are carried out in place, flushed, and
the journal is removed. Carrying them out twice does no harm, so `recover` finishes whatever a dead process left.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from moerec.errors import WorkError

JOURNAL = "journal"
TEMPORARY = "journal.tmp"  # one name for all writers: the next one overwrites what a dead one left
LOCK = "lock"
QUEUE = "queue"
_MAGIC = b"moerec journal 1"
_THREADS = 8  # they wait for the disk


@dataclasses.dataclass(frozen=True)
class FileWrite:
    """Pieces to write into one file: piece r of `lengths[r]` bytes at `offsets[r]`, from `data` one after another.

    Attributes:
      file: path below the folder.
      offsets: int64 [R], ascending; pieces do not overlap.
      lengths: int64 [R].
      data: uint8 [sum of lengths].
    """

    file: str
    offsets: np.ndarray
    lengths: np.ndarray
    data: np.ndarray


def commit(folder: Path, writes: Sequence[FileWrite]) -> None:
    """Carries out all writes, or none. The caller holds the lock exclusively, and no journal is left to recover.

    When this returns the writes are on disk. Where it raises, the batch is either not begun, or committed and finished
    by the next `recover` (the disk is full).
    """
    with (folder / TEMPORARY).open("wb") as file:
        checksum = 0
        for part in _serialise(writes):
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        file.write(struct.pack("<I", checksum))
        file.flush()
        os.fsync(file.fileno())
    os.rename(folder / TEMPORARY, folder / JOURNAL)
    sync(folder)
    _carry_out(folder, writes)


def recover(folder: Path) -> None:
    """Finishes the committed batch of a dead writer, if there is one. The caller holds the lock exclusively.

    Raises WorkError where the journal is damaged, which no kill does.
    """
    if has_journal(folder):
        _carry_out(folder, _parse((folder / JOURNAL).read_bytes(), folder / JOURNAL))


def has_journal(folder: Path) -> bool:
    """Whether a committed batch is not finished: under the lock that means that its writer is dead."""
    return (folder / JOURNAL).exists()


@contextlib.contextmanager
def hold(folder: Path, exclusive: bool) -> Iterator[Callable[[], None]]:
    """Holds the folder's lock; waits for it. Gives a function that makes a shared hold exclusive.

    That is not atomic: another writer may come in between. The system lets go of the lock when the process dies.
    Everybody first stands in a queue, which a writer leaves last: without it readers who overlap would keep it out.
    """
    with contextlib.ExitStack() as stack:
        queue = stack.enter_context(_lock(folder / QUEUE, exclusive))
        handle = stack.enter_context(_lock(folder / LOCK, exclusive))
        if not exclusive:
            fcntl.flock(queue, fcntl.LOCK_UN)
        yield lambda: fcntl.flock(handle, fcntl.LOCK_EX)


@contextlib.contextmanager
def _lock(path: Path, exclusive: bool) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield handle
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: memoryview, offset: int) -> None:
    """`os.pwrite` until everything is written."""
    while data:
        n = os.pwrite(handle, data, offset)
        data, offset = data[n:], offset + n


def _serialise(writes: Sequence[FileWrite]) -> Iterator[bytes | memoryview]:
    header = json.dumps([[write.file, len(write.offsets), len(write.data)] for write in writes]).encode()
    yield _MAGIC + struct.pack("<Q", len(header)) + header
    for write in writes:
        yield write.offsets.astype("<i8").tobytes()
        yield write.lengths.astype("<i8").tobytes()
        yield write.data.data


def _parse(journal: bytes, path: Path) -> list[FileWrite]:
    if journal[:16] != _MAGIC or zlib.crc32(journal[:-4]) != int.from_bytes(journal[-4:], "little"):
        raise WorkError(f"{path}: is damaged; the batch in it cannot be finished")
    at = 24 + int.from_bytes(journal[16:24], "little")
    header = json.loads(journal[24:at])
    writes = []
    for file, n_pieces, n_bytes in header:
        place = PurePosixPath(file)
        if place.is_absolute() or ".." in place.parts:
            raise WorkError(f"{path}: writes to {file}, which is not in the store")
        offsets = np.frombuffer(journal, "<i8", n_pieces, at)
        lengths = np.frombuffer(journal, "<i8", n_pieces, at + 8 * n_pieces)
        at += 16 * n_pieces
        writes.append(FileWrite(file, offsets, lengths, np.frombuffer(journal, np.uint8, n_bytes, at)))
        at += n_bytes
    return writes


def _carry_out(folder: Path, writes: Sequence[FileWrite]) -> None:
    with ThreadPoolExecutor(max(min(_THREADS, len(writes)), 1)) as pool:
        list(pool.map(lambda write: _write_pieces(folder, write), writes))
    # Not flushed: should a power cut bring the journal back, it is carried out once more; a later one replaces it.
    (folder / JOURNAL).unlink()


def _write_pieces(folder: Path, write: FileWrite) -> None:
    ends = write.offsets + write.lengths
    first = np.flatnonzero(np.concatenate([[True], write.offsets[1:] != ends[:-1]]))  # of each run without gaps
    bounds = np.concatenate([[0], np.cumsum(write.lengths)])
    pieces = zip(bounds[first].tolist(), [*bounds[first[1:]].tolist(), int(bounds[-1])], strict=True)
    data = write.data.data
    handle = os.open(folder / write.file, os.O_WRONLY)
    try:
        for offset, (lo, hi) in zip(write.offsets[first].tolist(), pieces, strict=True):
            write_all(handle, data[lo:hi], offset)
        os.fsync(handle)
    finally:
        os.close(handle)
