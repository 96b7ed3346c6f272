"""Sequences of different lengths laid into fixed rows, with a segment id for each: vectorised next-fit.

This is the one place where indices of packed slots are computed: for training, evaluation and single requests.
"""

from typing import NamedTuple

import numpy as np

from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, EventLog, ItemTable
from moerec.data.histories import Histories
from moerec.types import EPOCH_2000, EVENT, NO_TIME, PADDING, RECOMMEND, Batch, Request


class Sequences(NamedTuple):
    """What is to be packed: of each of `n` sequences the events that stand in it, and what comes after them.

    Attributes:
      events: rows of the log, by sequence.
      next_row: `[n]` row of the event after the last one, which the last slot is to predict.
      has_control: `[n]` bool, whether the sequence begins with the control slot `<|recommend|>`.
      field_UY: `[n, Y]` codes of the static profile fields of each sequence's user.
    """

    events: Histories
    next_row: np.ndarray
    has_control: np.ndarray
    field_UY: np.ndarray

    @property
    def n_slots(self) -> np.ndarray:
        """`[n]`, slots of each sequence."""
        return self.events.length + self.has_control


class Placement(NamedTuple):
    """Where the first `n` sequences went: sequence `u` starts at flat slot `start[u]` and is segment `segment[u]`."""

    n: int
    start: np.ndarray
    segment: np.ndarray


class Packed(NamedTuple):
    """Attributes:
    batch: the slots, without targets. next_item_BT: int32 item of the event after each slot, 0 in padding.
    """

    batch: Batch
    next_item_BT: np.ndarray


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


def device_time(time_us: np.ndarray) -> np.ndarray:
    """Microseconds since 1970 to int32 seconds since 2000, cut; what is unknown or does not fit becomes `NO_TIME`."""
    shifted = time_us // SECOND_US - np.int64(EPOCH_2000)
    limits = np.iinfo(np.int32)
    fits = (time_us != UNKNOWN_TIME) & (shifted > limits.min) & (shifted <= limits.max)
    return np.where(fits, shifted, NO_TIME).astype(np.int32)


def pack(log: EventLog, items: ItemTable, sequences: Sequences, placed: Placement, shape: tuple[int, int]) -> Packed:
    """Gathers events into packed rows.

    Args:
      log: columns that the sequences' rows index. items: the catalogue that its items index.
      sequences: as many as `placed` has.
      shape: rows and slots of a row.
    """
    n_slots = sequences.n_slots
    owner = np.repeat(np.arange(len(n_slots)), n_slots)
    position = np.arange(len(owner)) - (np.cumsum(n_slots) - n_slots)[owner]
    slot = placed.start[owner] + position
    is_event = position >= sequences.has_control[owner]
    source = np.zeros(len(owner), np.int64)  # of a control slot any row: nothing is read from it
    source[is_event] = sequences.events.rows
    following = np.append(source[1:], 0)  # of a sequence's last slot that is in another one: mended in the next lines
    last = np.cumsum(n_slots)[n_slots > 0] - 1
    following[last] = sequences.next_row[n_slots > 0]

    def lay(values: np.ndarray, dtype, empty=0) -> np.ndarray:
        out = np.full((shape[0] * shape[1], *values.shape[1:]), empty, dtype)
        out[slot] = values
        return out.reshape(*shape, *values.shape[1:])

    def of_event(values: np.ndarray, dtype, empty=0) -> np.ndarray:
        return lay(np.where(is_event, values, empty), dtype, empty)

    item = log.item[source]
    request = Request(
        time_BT=lay(device_time(log.time_us[following]), np.int32, NO_TIME),
        utc_offset_BT=lay(log.utc_offset[following], np.int32),
        context_BTC=lay(log.context[following], np.int32),
        field_BTY=lay(sequences.field_UY[owner], np.int32),
    )
    batch = Batch(
        kind_BT=lay(np.where(is_event, EVENT, RECOMMEND), np.int32, PADDING),
        item_BT=of_event(item, np.int32),
        service_BT=of_event(items.service[item], np.int32, items.n_services),
        action_BT=of_event(log.action[source], np.int32),
        time_BT=of_event(device_time(log.time_us[source]), np.int32, NO_TIME),
        utc_offset_BT=of_event(log.utc_offset[source], np.int32),
        position_BT=lay(position, np.int32),
        segment_BT=lay(placed.segment[owner], np.int32),
        request=request,
        targets={},
    )
    return Packed(batch, lay(log.item[following], np.int32))
