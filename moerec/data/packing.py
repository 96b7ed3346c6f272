"""Sequences of different lengths laid into fixed rows, with a segment id for each: vectorised next-fit.

This is the one place where indices of packed slots are computed: for training, evaluation and single requests.
"""

from typing import Any, NamedTuple

import numpy as np

from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, EventLog, ItemTable
from moerec.data.histories import Histories
from moerec.types import EPOCH_2000, EVENT, NO_TIME, PADDING, RECOMMEND, TOKEN, Batch, Request


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


class Words(NamedTuple):
    """What users say after their events; each of `n` sequences with words ends with the control slot `<|recommend|>`.

    Attributes:
      offsets: `[n + 1]` int64, where each sequence's tokens begin in `ids`; without tokens there is no control slot.
      ids: int32 tokens.
    """

    offsets: np.ndarray
    ids: np.ndarray

    @property
    def length(self) -> np.ndarray:
        """`[n]`, tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def n_slots(self) -> np.ndarray:
        """`[n]`, slots that they add to each sequence."""
        return self.length + (self.length > 0)


class Placement(NamedTuple):
    """Where the first `n` sequences went: sequence `u` starts at flat slot `start[u]` and is segment `segment[u]`."""

    n: int
    start: np.ndarray
    segment: np.ndarray


class Packed(NamedTuple):
    """Attributes:
    batch: the slots, without targets. next_item_BT: int32 item of the event that each slot is to predict, 0 in padding
      and -1 where none is: of words, and of the event before them. next_token_BT: int32 token after each slot, -1
      where none is; None without text.
    """

    batch: Batch
    next_item_BT: np.ndarray
    next_token_BT: np.ndarray | None = None


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


def pack(
    log: EventLog,
    items: ItemTable,
    sequences: Sequences,
    placed: Placement,
    shape: tuple[int, int],
    words: Words | None = None,
) -> Packed:
    """Gathers events into packed rows, and the words behind them, if there are some.

    After words the request is answered at the control slot behind them, which carries what is known of it.

    Args:
      log: columns that the sequences' rows index. items: the catalogue that its items index.
      sequences: as many as `placed` has.
      shape: rows and slots of a row. words: of as many sequences, whose placement has room for them.
    """
    n_slots = sequences.n_slots if words is None else sequences.n_slots + words.n_slots
    owner = np.repeat(np.arange(len(n_slots)), n_slots)
    position = np.arange(len(owner)) - (np.cumsum(n_slots) - n_slots)[owner]
    slot = placed.start[owner] + position
    is_event = (position >= sequences.has_control[owner]) & (position < sequences.n_slots[owner])
    source = np.zeros(len(owner), np.int64)  # of a control slot any row: nothing is read from it
    source[is_event] = sequences.events.rows
    following = np.append(source[1:], 0)  # of a sequence's last slot that is in another one: mended in the next lines
    is_last = position >= sequences.n_slots[owner] - 1  # of the events; or it is behind them
    following[is_last] = sequences.next_row[owner[is_last]]

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
    packed = Packed(batch, lay(log.item[following], np.int32))
    return packed if words is None else _add_words(packed, sequences, words, placed, owner, position, slot)


def assemble_words(token_BT: np.ndarray, position_BT: np.ndarray, segment_BT: np.ndarray) -> Batch:
    """A batch of words alone, without targets. Args: as `Batch`; in padding the segment is 0."""
    zero_BT, real_BT = np.zeros(token_BT.shape, np.int32), segment_BT > 0
    unknown_BT, nothing = np.full(token_BT.shape, NO_TIME), np.zeros((*token_BT.shape, 0), np.int32)
    return Batch(
        kind_BT=np.where(real_BT, TOKEN, PADDING).astype(np.int32),
        item_BT=zero_BT,
        service_BT=zero_BT,
        action_BT=zero_BT,
        time_BT=unknown_BT,
        utc_offset_BT=zero_BT,
        position_BT=position_BT.astype(np.int32),
        segment_BT=segment_BT.astype(np.int32),
        request=Request(unknown_BT, zero_BT, nothing, nothing),
        targets={},
        token_BT=token_BT.astype(np.int32),
    )


def _add_words(
    packed: Packed,
    sequences: Sequences,
    words: Words,
    placed: Placement,
    owner: np.ndarray,
    position: np.ndarray,
    slot: np.ndarray,
) -> Packed:
    """The slots behind the events of each sequence as its words and the control slot, which were laid as control slots.

    Args: of each slot its sequence, its place in it and in the flat batch.
    """
    behind = position - sequences.n_slots[owner]
    is_word = (behind >= 0) & (behind < words.length[owner])
    is_asked = (behind >= 0) & ~is_word
    before = (behind == -1) & (words.length[owner] > 0)
    unasked = before | is_word
    batch, shape = packed.batch, packed.batch.kind_BT.shape

    def change(values_BT: np.ndarray, *changes: tuple[np.ndarray, Any]) -> np.ndarray:
        flat = values_BT.reshape(shape[0] * shape[1], *values_BT.shape[2:]).copy()
        for where, value in changes:
            flat[slot[where]] = value
        return flat.reshape(values_BT.shape)

    kind_BT = change(batch.kind_BT, (is_word, TOKEN))
    token_BT = change(np.zeros(shape, np.int32), (is_word, words.ids))
    following = np.append(words.ids[1:], -1)[: len(words.ids)]
    is_inner = (behind + 1 < words.length[owner])[is_word]
    next_token_BT = change(np.full(shape, -1, np.int32), (is_word, np.where(is_inner, following, -1)))
    # As of the last event: of a sequence without events nothing is known.
    last = (placed.start + sequences.n_slots - 1)[owner]
    spoken = is_word | is_asked
    has_event = sequences.events.length[owner[spoken]] > 0
    time = batch.time_BT.reshape(-1)[last[spoken]]
    request = batch.request._replace(
        time_BT=change(batch.request.time_BT, (unasked, NO_TIME)),
        utc_offset_BT=change(batch.request.utc_offset_BT, (unasked, 0)),
        context_BTC=change(batch.request.context_BTC, (unasked, 0)),
    )
    batch = batch._replace(
        kind_BT=kind_BT,
        time_BT=change(batch.time_BT, (spoken, np.where(has_event, time, NO_TIME))),
        request=request,
        token_BT=token_BT,
    )
    return Packed(batch, change(packed.next_item_BT, (unasked, -1)), next_token_BT)
