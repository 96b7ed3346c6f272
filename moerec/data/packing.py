"""Sequences of different lengths laid into fixed rows, with a segment id for each: vectorised next-fit."""

from typing import NamedTuple

import numpy as np

from moerec.data.dataset import UNKNOWN_TIME, EventLog
from moerec.types import EPOCH_2000, NO_TIME, Batch


class Placement(NamedTuple):
    """Where the first `n` sequences went: sequence `u` starts at flat slot `start[u]` and is segment `segment[u]`."""

    n: int
    start: np.ndarray
    segment: np.ndarray


def place_sequences(lengths: np.ndarray, n_rows: int, row_len: int) -> Placement:
    """Next-fit in the given order: rows are filled until the next sequence does not fit.

    Args:
      lengths: `[U]`, each between 0 and `row_len` (a sequence of no slots takes none).
    """
    ends = np.cumsum(lengths)
    first_of_row = [0]
    for _ in range(n_rows):  # over packed rows; each step is one binary search
        used = ends[first_of_row[-1] - 1] if first_of_row[-1] else 0
        first_of_row.append(int(np.searchsorted(ends, used + row_len, side="right")))
        if first_of_row[-1] == len(lengths):
            break
    n = first_of_row[-1]
    bounds = np.asarray(first_of_row)
    row = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    before = np.concatenate([[0], ends])[:n]
    start = row * row_len + before - before[bounds[row]] if n else np.zeros(0, np.int64)
    return Placement(n, start, (np.arange(n) - bounds[row] + 1).astype(np.int32))


def device_time(time: np.ndarray) -> np.ndarray:
    """Unix seconds to int32 seconds since 2000; times that are unknown or do not fit become `NO_TIME`."""
    shifted = time - np.int64(EPOCH_2000)
    limits = np.iinfo(np.int32)
    fits = (time != UNKNOWN_TIME) & (shifted > limits.min) & (shifted <= limits.max)
    return np.where(fits, shifted, NO_TIME).astype(np.int32)


def fill_batch(
    log: EventLog,
    slot: np.ndarray,
    source: np.ndarray,
    following: np.ndarray,
    position: np.ndarray,
    segment: np.ndarray,
    weight: np.ndarray,
    shape: tuple[int, int],
    fields: np.ndarray | None = None,
) -> Batch:
    """Gathers events into packed rows.

    Args:
      log: columns that `source` and `following` index.
      slot: `[n]` flat slot of each event. source: its row in the log. following: row of the event after it, whose
        item is the target and whose time and context are the request's.
      position, segment, weight: `[n]`, as in `Batch`.
      shape: rows and slots of a row.
      fields: `[n, Y]` codes of the static profile fields of each event's user; None where there are none.
    """

    def lay(values: np.ndarray, dtype, empty=0) -> np.ndarray:
        out = np.full((shape[0] * shape[1], *values.shape[1:]), empty, dtype)
        out[slot] = values
        return out.reshape(*shape, *values.shape[1:])

    return Batch(
        item_BT=lay(log.item[source], np.int32),
        action_BT=lay(log.action[source], np.int32),
        time_BT=lay(device_time(log.time[source]), np.int32, NO_TIME),
        utc_offset_BT=lay(log.utc_offset[source], np.int32),
        position_BT=lay(position, np.int32),
        segment_BT=lay(segment, np.int32),
        request_time_BT=lay(device_time(log.time[following]), np.int32, NO_TIME),
        request_utc_offset_BT=lay(log.utc_offset[following], np.int32),
        request_context_BTC=lay(log.context[following], np.int32),
        field_BTY=lay(np.zeros((len(slot), 0)) if fields is None else fields, np.int32),
        target_BT=lay(log.item[following], np.int32),
        weight_BT=lay(weight, np.float32),
    )
