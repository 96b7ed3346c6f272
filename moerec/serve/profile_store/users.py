"""Who is in the store: ids, their rows and versions. users.bin and ids.bin on disk, a table and a dict in memory.

A row is a user's place in every array. A deleted user's row, and room in ids.bin, go to a later one.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moerec.errors import InputError, WorkError
from moerec.files import naming
from moerec.serve.profile_store.folder import IDS, USERS, open_file
from moerec.serve.profile_store.journal import FileWrite

_HEAD_BYTES = 64
_MOST_BATCHES = 1 << 62
# `sequence` counts the committed batches; `n_rows` rows are or were in use; the ids take `n_id_bytes`.
_HEAD = np.dtype([("sequence", "<u8"), ("n_rows", "<u8"), ("n_id_bytes", "<u8")])
# `birth` is the sequence number that the user came with, 0 in a free row: it tells another process that a row has
# changed hands. The id is `length` bytes at `start`, where `room` bytes are the row's own.
_ROW = np.dtype([("version", "<u8"), ("birth", "<u8"), ("start", "<u8"), ("length", "<u4"), ("room", "<u4")])


class VersionConflict(WorkError):
    """Another writer was faster: a user's version is not the expected one. Nothing was written."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What a batch does to the table.

    Attributes:
      head: `_HEAD` after it.
      rows: int64 [P], ascending; records are `_ROW` [P] of them after it.
      ids: [P], of the same order; None for a user who goes.
      writes: the same for the files.
    """

    head: np.ndarray
    rows: np.ndarray
    records: np.ndarray
    ids: Sequence[str | None]
    writes: list[FileWrite]


class Users:
    """The table of one open store; `refresh` under the lock makes it that of the disk."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._head = np.zeros((), _HEAD)
        self._table = np.zeros(0, _ROW)  # with spare rows at the end
        self._ids: list[str | None] = []
        self._row_of: dict[str, int] = {}

    @staticmethod
    def create(folder: Path) -> None:
        with naming(folder / USERS):
            (folder / USERS).write_bytes(bytes(_HEAD_BYTES))
            (folder / IDS).write_bytes(b"")

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def n_rows(self) -> int:
        return int(self._head["n_rows"])

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """Rows int64 [P]; -1 for who is not in the store."""
        return np.fromiter((self._row_of.get(name, -1) for name in ids), np.int64, len(ids))

    def versions(self, rows: np.ndarray) -> np.ndarray:
        """Int64 [P]; 0 where the row is -1."""
        versions = np.zeros(len(rows), np.int64)
        versions[rows >= 0] = self._table["version"][rows[rows >= 0]]
        return versions

    def list_users(self) -> tuple[list[str], np.ndarray]:
        """All ids, by row, and their rows int64 [N]."""
        rows = np.flatnonzero(self._table["version"][: self.n_rows])
        return [name for name in self._ids if name is not None], rows

    def refresh(self) -> None:
        """Takes over what other processes have changed.

        Raises:
          WorkError: the files are cut, or say what no batch would have written.
          InputError: one is a link.
        """
        with open_file(self._folder, USERS, os.O_RDONLY) as handle, open(handle, "rb", closefd=False) as file:
            head = np.fromfile(file, _HEAD, 1)
            if len(head) and head[0]["sequence"] == self._head["sequence"]:
                return
            # Looked at before it is believed: a damaged number would ask for more memory than there is.
            n_left = max(os.fstat(handle).st_size - _HEAD_BYTES, 0) // _ROW.itemsize
            if not len(head) or head[0]["n_rows"] > n_left:
                raise WorkError(f"{self._folder / USERS}: is cut short")
            file.seek(_HEAD_BYTES)
            table = np.fromfile(file, _ROW, int(head[0]["n_rows"]))
        self._check(head[0], table)
        before = np.zeros(len(table), np.uint64)
        n_known = min(self.n_rows, len(table))
        before[:n_known] = self._table["birth"][:n_known]
        changed = np.flatnonzero(before != table["birth"])
        self._take_ids(changed, self._read_ids(table[changed]), len(table))
        if len(self._row_of) != np.count_nonzero(table["version"]):
            raise WorkError(f"{self._folder / USERS}: is damaged: two users have one id")
        self._table = table
        self._head = head[0].copy()  # last: an interruption before it has everything done once more

    def _check(self, head: np.void, table: np.ndarray) -> None:
        """Raises WorkError where the numbers of the table contradict each other."""
        start, length, room = table["start"], table["length"], table["room"]
        n_id_bytes, used = head["n_id_bytes"], table["birth"] > 0
        with open_file(self._folder, IDS, os.O_RDONLY) as handle:
            if n_id_bytes > os.fstat(handle).st_size:
                raise WorkError(f"{self._folder / IDS}: is cut short")
        sound = (
            (head["sequence"] <= _MOST_BATCHES)
            & (table["birth"] <= head["sequence"])
            & (used == (table["version"] > 0))
            & (table["version"] <= head["sequence"])
            & (length <= room)
            & (room <= n_id_bytes)
            & (start <= n_id_bytes - np.minimum(room, n_id_bytes))
        )
        if not sound.all():
            raise WorkError(f"{self._folder / USERS}: is damaged (row {int(np.argmin(sound))})")

    def plan_update(self, ids: Sequence[str], expected: np.ndarray | None) -> tuple[Change, np.ndarray]:
        """The change that gives each of `ids` the next version, and the order of `ids` that its rows have, int64 [P].

        Raises VersionConflict where a version is not `expected` (int64 [P]; 0 for a user who is not there).
        """
        rows = self.find(ids)
        versions = self.versions(rows)
        if expected is not None and (versions != expected).any():
            k = int(np.argmax(versions != expected))
            raise VersionConflict(f"user {ids[k]!r}: the version is {versions[k]}, not the expected {expected[k]}")
        new = np.flatnonzero(rows < 0)
        rows[new] = self._allocate(len(new))
        order = np.argsort(rows)
        rows, new = rows[order], np.flatnonzero(self._is_free(rows[order]))
        names = [ids[k] for k in order.tolist()]
        records = self._copy_records(rows)
        records["version"] += np.uint64(1)
        records["birth"][new] = self._head["sequence"] + np.uint64(1)
        texts = [names[k].encode() for k in new.tolist()]
        n_id_bytes = self._place_ids(records, new, np.array([len(text) for text in texts], np.uint32))
        writes = [self._write_ids(records[new], texts)] if texts else []
        return self._make_change(rows, records, names, n_id_bytes, writes), order

    def plan_delete(self, rows: np.ndarray) -> Change:
        """The change that frees rows (int64 [P], ascending) and erases their ids."""
        records = self._copy_records(rows)
        erase = self._write_ids(records, [bytes(length) for length in records["length"].tolist()])
        for name in ("version", "birth", "length"):
            records[name] = 0
        return self._make_change(rows, records, [None] * len(rows), int(self._head["n_id_bytes"]), [erase])

    def accept(self, change: Change) -> None:
        """Takes over a change that is on disk."""
        n_rows = int(change.head["n_rows"])
        if n_rows > len(self._table):  # doubled, so that many small batches do not copy the table each time
            self._table = np.concatenate([self._table, np.zeros(max(n_rows, 1024), _ROW)])
        moved = np.flatnonzero(self._table["birth"][change.rows] != change.records["birth"])
        self._take_ids(change.rows[moved], [change.ids[k] for k in moved.tolist()], n_rows)
        self._table[change.rows] = change.records
        self._head = change.head  # last, as in `refresh`

    def _make_change(self, rows, records, ids, n_id_bytes: int, writes: list[FileWrite]) -> Change:
        head = self._head.copy()
        head["sequence"] += np.uint64(1)
        head["n_rows"] = max(self.n_rows, int(rows[-1]) + 1)
        head["n_id_bytes"] = n_id_bytes
        offsets = np.concatenate([[0], _HEAD_BYTES + _ROW.itemsize * rows])
        lengths = np.array([_HEAD.itemsize] + [_ROW.itemsize] * len(rows), np.int64)
        data = np.frombuffer(head.tobytes() + records.tobytes(), np.uint8)
        return Change(head, rows, records, ids, [FileWrite(USERS, offsets, lengths, data), *writes])

    def _allocate(self, n: int) -> np.ndarray:
        """Rows for n new users: free ones first."""
        free = np.zeros(0, np.int64)
        if len(self) < self.n_rows:
            free = np.flatnonzero(self._table["version"][: self.n_rows] == 0)[:n]
        return np.concatenate([free, self.n_rows + np.arange(n - len(free))])

    def _is_free(self, rows: np.ndarray) -> np.ndarray:
        return self._copy_records(rows)["version"] == 0

    def _copy_records(self, rows: np.ndarray) -> np.ndarray:
        """`_ROW` [P]; zeros for rows that have never been used."""
        records = np.zeros(len(rows), _ROW)
        used = rows < self.n_rows
        records[used] = self._table[rows[used]]
        return records

    def _place_ids(self, records: np.ndarray, new: np.ndarray, lengths: np.ndarray) -> int:
        """Finds room for ids of `lengths` in the records `new`: the row's own, or at the end, which is returned."""
        end = int(self._head["n_id_bytes"])
        records["length"][new] = lengths
        grow = new[lengths > records["room"][new]]
        sizes = records["length"][grow].astype(np.int64)
        records["start"][grow] = end + np.cumsum(sizes) - sizes
        records["room"][grow] = sizes
        return end + int(sizes.sum())

    @staticmethod
    def _write_ids(records: np.ndarray, texts: list[bytes]) -> FileWrite:
        starts = records["start"].astype(np.int64)
        order = np.argsort(starts, kind="stable")
        lengths = np.array([len(texts[k]) for k in order.tolist()], np.int64)
        data = b"".join([texts[k] for k in order.tolist()])
        return FileWrite(IDS, starts[order], lengths, np.frombuffer(data, np.uint8))

    def _read_ids(self, records: np.ndarray) -> list[str | None]:
        """Ids of `_ROW` [P] as they are on disk; None for free rows."""
        if not len(records):
            return []
        first = int(records["start"].min())
        ends = records["start"] + records["length"]
        with open_file(self._folder, IDS, os.O_RDONLY) as handle, open(handle, "rb", closefd=False) as file:
            file.seek(first)
            heap = file.read(int(ends.max()) - first)
        if len(heap) < int(ends.max()) - first:
            raise WorkError(f"{self._folder / IDS}: is cut short")
        bounds = zip((records["start"] - first).tolist(), (ends - first).tolist(), strict=True)
        births = records["birth"].tolist()
        try:
            return [heap[lo:hi].decode() if birth else None for (lo, hi), birth in zip(bounds, births, strict=True)]
        except UnicodeDecodeError:
            raise WorkError(f"{self._folder / IDS}: is damaged: an id is not UTF-8") from None

    def _take_ids(self, rows: np.ndarray, ids: Sequence[str | None], n_rows: int) -> None:
        """Gives rows to other users, or to nobody. Doing so again, also after half of it, does no harm."""
        self._ids += [None] * (n_rows - len(self._ids))
        for row in rows.tolist():  # all go before any comes: a user may have moved to another row
            old = self._ids[row]
            if old is not None:
                self._row_of.pop(old, None)
                self._ids[row] = None
        for row, name in zip(rows.tolist(), ids, strict=True):
            self._ids[row] = name
            if name is not None:
                self._row_of[name] = row


def check_ids(ids: Any) -> list[str]:
    """The ids as plain strings. Raises InputError for one that is no string, occurs twice, or cannot be written."""
    if isinstance(ids, (str, bytes)):
        raise InputError(f"ids must be a sequence of strings, not the one string {ids!r}")
    found: list[str] = []
    for name in ids:
        if not isinstance(name, str):
            raise InputError(f"user {name!r}: an id must be a string, not {type(name).__name__}")
        if "\0" in name:  # arrays of strings cannot hold it at the end
            raise InputError(f"user {name!r}: an id must not contain a NUL character")
        found.append(str(name))
    return found


def check_unique_ids(ids: Any) -> list[str]:
    """`check_ids`, and no id may occur twice or be impossible to write as UTF-8."""
    found = check_ids(ids)
    seen: set[str] = set()
    for name in found:
        if name in seen:
            raise InputError(f"user {name!r} is twice in the batch")
        seen.add(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"user {name!r}: the id is no valid Unicode text") from None
    return found
