"""Coded events on disk, a file for each block of users, so that sorting by user never holds more than one block.

Memory: the events of `USERS_PER_BLOCK` users, about `4 * itemsize` bytes each while they are sorted.
"""

from pathlib import Path

import numpy as np

from moerec.data.dataset import UNKNOWN_TIME
from moerec.files import naming

USERS_PER_BLOCK = 1 << 14


def event_dtype(n_context: int) -> np.dtype:
    """A coded event; `item` counts within its service, `time_us` is UNKNOWN_TIME or microseconds
    since 1970 UTC, `utc_offset` how many seconds the event's own clock is ahead of UTC.
    """
    return np.dtype(
        [
            ("user", "<i4"),
            ("service", "<i2"),
            ("item", "<i4"),
            ("action", "<i2"),
            ("time_us", "<i8"),
            ("utc_offset", "<i4"),
            ("row", "<i8"),
            ("context", "<i2", (n_context,)),
        ]
    )


class Spill:
    """Appends coded events in their published order; gives them back block by block."""

    def __init__(self, folder: Path, n_context: int):
        self.folder = folder
        self.dtype = event_dtype(n_context)
        folder.mkdir()

    def append(self, events: np.ndarray):
        """Appends coded events (`[n]` of `self.dtype`)."""
        if not len(events):
            return
        block = events["user"] // USERS_PER_BLOCK
        order = np.argsort(block, kind="stable")
        blocks, starts = np.unique(block[order], return_index=True)
        for number, part in zip(blocks, np.split(events[order], starts[1:]), strict=True):
            path = self._path(number)
            with naming(path), path.open("ab") as file:
                file.write(part.tobytes())

    def read(self, block: int) -> np.ndarray:
        """The events of users `block * USERS_PER_BLOCK` and on, as appended; the file is deleted."""
        path = self._path(block)
        events = np.fromfile(path, self.dtype)
        path.unlink()
        return events

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}.bin"


def order_by_user(events: np.ndarray) -> np.ndarray:
    """The order by user and time, equal times as published. A user with any unknown time stays as published."""
    user = events["user"] - events["user"].min()
    unknown = events["time_us"] == UNKNOWN_TIME
    as_published = np.zeros(int(user.max()) + 1, bool)
    as_published[user[unknown]] = True
    time = np.where(as_published[user], 0, events["time_us"])
    return np.lexsort((time, user))


def find_duplicates(events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of events that repeat user, item, action and time of an earlier one, and of the first of their kind.

    Unknown times are never the same.
    """
    place = events["service"].astype(np.int64) << 48 | events["item"].astype(np.int64) << 16 | events["action"]
    order = np.lexsort((events["time_us"], place, events["user"]))  # stable: the earliest row comes first
    same = np.zeros(len(order), bool)
    same[1:] = True
    for column in (events["time_us"], place, events["user"]):
        same[1:] &= column[order][1:] == column[order][:-1]
    same &= events["time_us"][order] != UNKNOWN_TIME
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    return order[same], order[first[same]]


class ServiceCounts:
    """Users and events of each service, and which items have an event."""

    def __init__(self, n_services: int, n_items: int):
        self.users = np.zeros(n_services, np.int64)
        self.events = np.zeros(n_services, np.int64)
        self.has_event = np.zeros(n_items, bool)

    def add(self, events: np.ndarray):
        n = len(self.users)
        user = (events["user"] - events["user"][0]).astype(np.int64)
        counts = np.bincount(user * n + events["service"])
        pairs = np.pad(counts, (0, -len(counts) % n)).reshape(-1, n)
        self.users += (pairs > 0).sum(0)
        self.events += pairs.sum(0)
