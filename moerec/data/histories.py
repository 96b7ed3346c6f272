"""What predictions may see: for each of them, rows of the event log, oldest first (compressed sparse rows)."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Histories:
    """The histories of `n` predictions.

    Attributes:
      offsets: `[n + 1]` int64, where each history begins in `rows`.
      rows: int64, rows of the log.
    """

    offsets: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def length(self) -> np.ndarray:
        """`[n]`, events of each history."""
        return np.diff(self.offsets)

    @functools.cached_property
    def owner(self) -> np.ndarray:
        """`[rows]`, which history each row stands in."""
        return np.repeat(np.arange(len(self)), self.length)

    def slice(self, start: int, stop: int) -> "Histories":
        """The histories `start <= i < stop`."""
        offsets = self.offsets[start : stop + 1]
        return Histories(offsets - offsets[0], self.rows[offsets[0] : offsets[-1]])

    def keep(self, is_kept: np.ndarray) -> "Histories":
        """Args: `[rows]` bool, which rows stay."""
        before = np.concatenate([[0], np.cumsum(is_kept)])
        return Histories(before[self.offsets], self.rows[is_kept])

    def last(self, n: int) -> "Histories":
        """At most the last `n` rows of each."""
        if self.length.max(initial=0) <= n:
            return self
        from_end = self.offsets[1:][self.owner] - np.arange(len(self.rows))
        return self.keep(from_end <= n)


def make_histories(start: np.ndarray, stop: np.ndarray) -> Histories:
    """Args: `[n]` each; history i is the rows `start[i]` to one before `stop[i]` of the log."""
    offsets = np.concatenate([[0], np.cumsum(stop - start)]).astype(np.int64)
    ahead = np.repeat(start - offsets[:-1], stop - start)
    return Histories(offsets, np.arange(offsets[-1], dtype=np.int64) + ahead)
