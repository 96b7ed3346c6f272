"""Many writes into files of a folder as one: all of them, or none, also when the process is killed in between.

The writes go to a journal, flushed to disk; renaming it is the commit. Then they are carried out in place, flushed, and
the journal is removed. Carrying them out twice does no harm, so `recover` finishes whatever a dead process left.
"""

import contextlib
import dataclasses
import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moerec.errors import WorkError
from moerec.files import naming, parse_json
from moerec.serve.profile_store.folder import IDS, USERS, is_shard, open_file

JOURNAL = "journal"
TEMPORARY = "journal.tmp"  # one name for all writers: the next one removes what a dead one left
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

    Raises:
      InputError: a file of the store is a link; nothing is written.
      WorkError: the disk is full.
    """
    _check_writes(folder, writes, "a batch")
    temporary = folder / TEMPORARY
    try:
        with open_file(folder, TEMPORARY, os.O_WRONLY | os.O_CREAT) as handle, naming(temporary):
            os.ftruncate(handle, 0)  # not when it is opened: only then it is known to have no other name
            with open(handle, "wb", closefd=False) as file:
                checksum = 0
                for part in _serialise(writes):
                    checksum = zlib.crc32(part, checksum)
                    file.write(part)
                file.write(struct.pack("<I", checksum))
            os.fsync(handle)
    except WorkError:
        os.unlink(temporary)
        raise
    os.rename(temporary, folder / JOURNAL)
    sync(folder)
    _carry_out(folder, writes)


def recover(folder: Path) -> None:
    """Finishes the committed batch of a dead writer, if there is one. The caller holds the lock exclusively.

    Raises WorkError where the journal is damaged, which no kill does, or writes anything that no batch would.
    """
    if has_journal(folder):
        path = folder / JOURNAL
        with open_file(folder, JOURNAL, os.O_RDONLY) as handle:
            n_bytes = os.fstat(handle).st_size
            journal = mmap.mmap(handle, n_bytes, prot=mmap.PROT_READ) if n_bytes else b""
        writes = _parse(memoryview(journal), path)
        _check_writes(folder, writes, str(path))
        _carry_out(folder, writes)


def has_journal(folder: Path) -> bool:
    """Whether a committed batch is not finished: under the lock that means that its writer is dead."""
    return os.path.lexists(folder / JOURNAL)


@contextlib.contextmanager
def hold(folder: Path, exclusive: bool) -> Iterator[Callable[[], None]]:
    """Holds the folder's lock; waits for it. Gives a function that makes a shared hold exclusive.

    That is not atomic: another writer may come in between. The system lets go of the lock when the process dies.
    Everybody first stands in a queue, which a writer leaves last: without it readers who overlap would keep it out.
    """
    with contextlib.ExitStack() as stack:
        queue = stack.enter_context(_lock(folder, QUEUE, exclusive))
        handle = stack.enter_context(_lock(folder, LOCK, exclusive))
        if not exclusive:
            fcntl.flock(queue, fcntl.LOCK_UN)
        yield lambda: fcntl.flock(handle, fcntl.LOCK_EX)


@contextlib.contextmanager
def _lock(folder: Path, name: str, exclusive: bool) -> Iterator[int]:
    with open_file(folder, name, os.O_RDWR | os.O_CREAT) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield handle


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


def _parse(journal: memoryview, path: Path) -> list[FileWrite]:
    """The writes, which refer to `journal`. Raises WorkError for one that is not as `_serialise` would have it."""
    damaged = f"{path}: is damaged; the batch in it cannot be finished"
    if journal[:16] != _MAGIC or zlib.crc32(journal[:-4]) != int.from_bytes(journal[-4:], "little"):
        raise WorkError(damaged)
    at = 24 + int.from_bytes(journal[16:24], "little")
    writes = []
    try:
        for file, n_pieces, n_bytes in parse_json(bytes(journal[24:at])):
            if not isinstance(file, str) or n_pieces < 1 or n_bytes < 0:
                raise ValueError
            offsets, lengths = np.frombuffer(journal, "<i8", 2 * n_pieces, at).reshape(2, n_pieces)
            at += 16 * n_pieces
            writes.append(FileWrite(file, offsets, lengths, np.frombuffer(journal, np.uint8, n_bytes, at)))
            at += n_bytes
        if at != len(journal) - 4:
            raise ValueError
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        raise WorkError(damaged) from None
    return writes


def _check_writes(folder: Path, writes: Sequence[FileWrite], place: str) -> None:
    """Looks at all files before any is written.

    A batch fills places of shards, which have their size already, and makes the two other files longer by what it
    appends to them.

    Raises:
      WorkError: a write would go elsewhere. InputError: a file is a link.
    """
    for write in writes:
        if write.file not in (USERS, IDS) and not is_shard(write.file):
            raise WorkError(f"{place}: writes to {write.file}, which is not in the store")
        with open_file(folder, write.file, os.O_WRONLY) as handle:
            most = os.fstat(handle).st_size + (0 if is_shard(write.file) else len(write.data))
        offsets, lengths, bounds = write.offsets, write.lengths, np.cumsum(write.lengths)
        is_inside = (offsets >= 0) & (lengths >= 0) & (lengths <= most) & (offsets <= most - np.minimum(lengths, most))
        first, last = offsets[lengths > 0], (offsets + lengths)[lengths > 0]
        rises = (bounds[1:] >= bounds[:-1]).all() and (first[1:] >= last[:-1]).all()
        if not (is_inside.all() and rises and bounds[-1] == len(write.data)):
            raise WorkError(f"{place}: writes to {write.file} where no batch would")
    if len({write.file for write in writes}) < len(writes):
        raise WorkError(f"{place}: writes to one file twice")


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
    with open_file(folder, write.file, os.O_WRONLY) as handle, naming(folder / write.file):
        for offset, (lo, hi) in zip(write.offsets[first].tolist(), pieces, strict=True):
            write_all(handle, data[lo:hi], offset)
        os.fsync(handle)
