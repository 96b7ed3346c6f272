"""What predictions may see: for each of them, rows of the event log, oldest first.

`Histories` holds all rows of all histories, one after another. Those of a user with 60,000 events of which 10,000 are
targets would be 600 million, so histories that are ranges of a list of rows are `HistoryRanges`: the same to whoever
uses them, but the rows are written out only where they are asked for, which is done for a few histories at a time.
"""

import builtins
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

MOST_ROWS = 1 << 22  # written out at once


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
        return len(self.length)

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

    def take(self, which: np.ndarray) -> "Histories":
        """Args: `[n]`, which histories, in the order that they shall have."""
        offsets = np.concatenate([[0], np.cumsum(self.length[which])]).astype(np.int64)
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][which] - offsets[:-1], np.diff(offsets))
        return Histories(offsets, self.rows[places])

    def blocks(self, most: int | None = None) -> "Iterator[tuple[builtins.slice, Histories]]":
        """All histories in order, a few at a time: which, and they. Each block has at most `MOST_ROWS` rows, or is one
        history, and at most `most` histories.
        """
        ends = np.cumsum(self.length)
        lo = 0
        while lo < len(self):
            before = ends[lo - 1] if lo else 0
            hi = max(int(np.searchsorted(ends, before + MOST_ROWS, side="right")), lo + 1)
            hi = min(hi, len(self) if most is None else lo + most)
            yield builtins.slice(lo, hi), self.slice(lo, hi)
            lo = hi

    def keep(self, is_kept: np.ndarray) -> "Histories":
        """Args: `[rows]` bool, which rows stay."""
        before = np.concatenate([[0], np.cumsum(is_kept)])
        return Histories(before[self.offsets], self.rows[is_kept])

    def keep_events(self, is_kept: np.ndarray) -> "Histories":
        """Args: `[events]` bool, which events of the log stay."""
        return self.keep(is_kept[self.rows])

    def keep_group(self, group: np.ndarray, wanted: np.ndarray, same: bool = True) -> "Histories":
        """The events of a group, or those of all others. Args: `[events]` group of each; `[n]` that of each history."""
        return self.keep((group[self.rows] == wanted[self.owner]) == same)

    def last(self, n: int) -> "Histories":
        """At most the last `n` rows of each."""
        if self.length.max(initial=0) <= n:
            return self
        from_end = self.offsets[1:][self.owner] - np.arange(len(self.rows))
        return self.keep(from_end <= n)

    def distinct(self, item: np.ndarray) -> "Histories":
        """The first event of each item in each history. Args: `[events]` item of each."""
        is_first = np.zeros(len(self.rows), bool)
        n_items = int(item.max(initial=0)) + 1
        for which, part in self.blocks():
            key = part.owner * n_items + item[part.rows]
            is_first[self.offsets[which.start] + np.unique(key, return_index=True)[1]] = True
        return self.keep(is_first)


class HistoryRanges(Histories):
    """History i is `index[start[i]:stop[i]]`, or those rows themselves without an index."""

    _start: np.ndarray
    _stop: np.ndarray
    _index: np.ndarray | None

    def __init__(self, start: np.ndarray, stop: np.ndarray, index: np.ndarray | None = None):
        """Args: `[n]` int64 each; int64, rows of the log."""
        vars(self).update(_start=start, _stop=np.maximum(start, stop), _index=index)

    @functools.cached_property
    def length(self) -> np.ndarray:
        return self._stop - self._start

    @functools.cached_property
    def offsets(self) -> np.ndarray:  # type: ignore[override]
        return np.concatenate([[0], np.cumsum(self.length)]).astype(np.int64)

    @functools.cached_property
    def rows(self) -> np.ndarray:  # type: ignore[override]
        places = np.arange(self.offsets[-1]) + np.repeat(self._start - self.offsets[:-1], self.length)
        return places if self._index is None else self._index[places]

    def slice(self, start: int, stop: int) -> "HistoryRanges":
        return HistoryRanges(self._start[start:stop], self._stop[start:stop], self._index)

    def take(self, which: np.ndarray) -> "HistoryRanges":
        return HistoryRanges(self._start[which], self._stop[which], self._index)

    def keep_events(self, is_kept: np.ndarray) -> "HistoryRanges":
        own = self._rebase()
        return own._keep_places(is_kept[own._places])

    def keep_group(self, group: np.ndarray, wanted: np.ndarray, same: bool = True) -> "HistoryRanges":
        base = self._rebase()
        own = group[base._places]
        if same:  # the list group by group: in each, a history is a range again
            order = np.argsort(own, kind="stable")
            n = np.int64(len(own) + 1)
            key = own[order] * n + order
            start, stop = (np.searchsorted(key, wanted * n + edge) for edge in (base._start, base._stop))
            return HistoryRanges(start, stop, base._places[order])
        start, stop, lists, n_before = base._start.copy(), base._stop.copy(), [np.zeros(0, np.int64)], 0
        for code in np.unique(wanted):  # the list without each of the groups
            other = base._keep_places(own != code)
            of_code = wanted == code
            start[of_code], stop[of_code] = n_before + other._start[of_code], n_before + other._stop[of_code]
            lists.append(other._places)
            n_before += len(other._places)
        return HistoryRanges(start, stop, np.concatenate(lists))

    def last(self, n: int) -> "HistoryRanges":
        return HistoryRanges(np.maximum(self._start, self._stop - n), self._stop, self._index)

    def distinct(self, item: np.ndarray) -> Histories:
        base = self._rebase()
        is_filled = base.length > 0
        starts = np.unique(base._start[is_filled])
        place = np.arange(len(base._places))
        first = starts[np.maximum(np.searchsorted(starts, place, side="right") - 1, 0)] if len(starts) else place
        if (first[base._stop[is_filled] - 1] != base._start[is_filled]).any():
            return Histories(self.offsets, self.rows).distinct(item)  # ranges that begin within each other
        own = item[base._places]
        order = np.argsort(own, kind="stable")
        previous = np.full(len(own), -1)
        is_same = own[order[1:]] == own[order[:-1]]
        previous[order[1:][is_same]] = order[:-1][is_same]
        return base._keep_places(previous < first)

    def _rebase(self) -> "HistoryRanges":
        """The same histories over that part of the list alone which they reach, written out."""
        is_filled = self.length > 0
        lo, hi = (int(self._start[is_filled].min()), int(self._stop[is_filled].max())) if is_filled.any() else (0, 0)
        places = np.arange(lo, hi) if self._index is None else self._index[lo:hi]
        start, stop = (np.where(is_filled, edge - lo, 0) for edge in (self._start, self._stop))
        return HistoryRanges(start, stop, places)

    @property
    def _places(self) -> np.ndarray:
        assert self._index is not None
        return self._index

    def _keep_places(self, is_kept: np.ndarray) -> "HistoryRanges":
        before = np.concatenate([[0], np.cumsum(is_kept)])
        return HistoryRanges(before[self._start], before[self._stop], self._places[is_kept])


def make_histories(start: np.ndarray, stop: np.ndarray) -> HistoryRanges:
    """Args: `[n]` each; history i is the rows `start[i]` to one before `stop[i]` of the log."""
    return HistoryRanges(start, stop)
