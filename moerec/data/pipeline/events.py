"""The training stream: deterministic, shuffled, packed, sharded by process, with a position that can be saved.

A grain `IterDataset` whose elements are whole batches, so that no Python code runs per user or per event. An epoch
is a seeded permutation of the users' windows; the stream of epochs has no end, and its position is two integers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from moerec.data.dataset import EventLog, ItemTable
from moerec.data.histories import make_histories
from moerec.data.packing import Packed, Placement, Sequences, pack, place_sequences
from moerec.data.prepare.shards import UserSource, read_users
from moerec.errors import InputError
from moerec.types import Batch, Target


class EventReader(Protocol):
    """Random access to the training events of users."""

    lengths: np.ndarray  # [users], number of training events
    fields: np.ndarray  # [users, Y], codes of their static profile fields

    def fetch(self, users: np.ndarray) -> tuple[EventLog, np.ndarray]:
        """A log, and `[n]` the row in it at which each asked user's training events start."""
        ...


class MemoryReader:
    """Training events held in memory."""

    def __init__(self, log: EventLog, keep: np.ndarray, fields: np.ndarray | None = None):
        """Args: the whole log; `[events]` bool, which of them are trained on; the users' profile codes."""
        kept_before = np.concatenate([[0], np.cumsum(keep)])
        offsets = kept_before[log.offsets]
        self._log = log.take(keep, offsets)
        self.lengths = np.diff(offsets)
        self.fields = np.zeros((log.n_users, 0), np.int32) if fields is None else fields

    def fetch(self, users: np.ndarray) -> tuple[EventLog, np.ndarray]:
        return self._log, self._log.offsets[users]


class ShardReader:
    """Training events read from ArrayRecord shards as they are needed, without a copy of them in memory."""

    def __init__(
        self,
        source: UserSource,
        offsets: np.ndarray,
        keep: np.ndarray,
        item_numbers: np.ndarray,
        fields: np.ndarray | None = None,
        utc_offset: np.ndarray | None = None,
    ):
        """Args: the shards; `[users + 1]` offsets of all events; `[events]` bool, which of them are trained on;
        `[I]` int32, the number that each of the shards' items has in the catalogue; the users' profile codes;
        `[events]`, how far the clocks at all events are ahead of UTC (nowhere).
        """
        self._source, self._offsets, self._keep, self._item_numbers = source, offsets, keep, item_numbers
        self._utc_offset = np.zeros(len(keep), np.int32) if utc_offset is None else utc_offset
        kept_before = np.concatenate([[0], np.cumsum(keep)])
        self.lengths = np.diff(kept_before[offsets])
        self.fields = np.zeros((len(offsets) - 1, 0), np.int32) if fields is None else fields

    def fetch(self, users: np.ndarray) -> tuple[EventLog, np.ndarray]:
        users, which = np.unique(users, return_inverse=True)  # one of many windows would be read many times
        rows, n_events = read_users(self._source, users)
        first = np.repeat(self._offsets[users] - np.concatenate([[0], np.cumsum(n_events)[:-1]]), n_events)
        event = first + np.arange(len(rows))
        kept = self._keep[event]
        rows = rows[kept]
        start = np.concatenate([[0], np.cumsum(self.lengths[users])])
        utc_offset = self._utc_offset[event[kept]]
        columns = (self._item_numbers[rows["item"]], rows["action"], rows["time_us"], rows["context"], utc_offset)
        return EventLog(start, *columns), start[:-1][which]


class EpochPlan(NamedTuple):
    """One epoch's windows, shuffled: user, first slot within the user's events, and number of slots."""

    user: np.ndarray
    first: np.ndarray
    length: np.ndarray


def plan_epoch(n_slots_U: np.ndarray, users: np.ndarray, history_len: int, rng: np.random.Generator) -> EpochPlan:
    """Cuts each user's slots into windows of at most `history_len` and shuffles them.

    A user with n events has n - 1 slots (an event and the one to predict), or n with the control slot that predicts the
    first event. Those who do not fit into one window start at a random offset, so that over epochs every slot is seen
    with different lengths of history.
    """
    slots = n_slots_U[users]
    users, slots = users[slots > 0], slots[slots > 0]
    head = np.where(slots > history_len, rng.integers(1, history_len + 1, len(slots)), slots)
    n_windows = 1 + -(-(slots - head) // history_len)
    owner = np.repeat(np.arange(len(users)), n_windows)
    k = np.arange(len(owner)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    first = np.where(k == 0, 0, head[owner] + (k - 1) * history_len)
    last = np.minimum(head[owner] + k * history_len, slots[owner])
    order = rng.permutation(len(owner))
    return EpochPlan(users[owner][order], first[order], (last - first)[order])


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Attributes: `n_rows` packed rows of this process's batch, each of `row_len` slots; most slots of a window;
    the seed; whether a control slot predicts each user's first event; and which of the processes this is.
    """

    n_rows: int
    row_len: int
    history_len: int
    seed: int
    first_event: bool = True
    process_index: int = 0
    process_count: int = 1


Render = Callable[[Packed], dict[str, Target]]  # what the tasks want of packed slots


class PackedStream(grain.IterDataset[Batch]):
    """Endless packed batches of this process's users (every `process_count`-th one)."""

    def __init__(self, reader: EventReader, items: ItemTable, render: Render, options: StreamOptions):
        super().__init__()
        own = reader.lengths[options.process_index :: options.process_count]
        if not np.any(own + options.first_event >= 2):
            n = "one training event" if options.first_event else "two training events"
            raise InputError(f"data: no user has {n}, so there is nothing to predict")
        self._parts = reader, items, render, options

    def __iter__(self) -> "PackedIterator":
        return PackedIterator(*self._parts)


class PackedIterator(grain.DatasetIterator[Batch]):
    """State: the epoch, and how many of its windows have been handed out."""

    def __init__(self, reader: EventReader, items: ItemTable, render: Render, options: StreamOptions):
        super().__init__()
        self._reader, self._items, self._render, self._options = reader, items, render, options
        self._users = np.arange(options.process_index, len(reader.lengths), options.process_count)
        self._epoch, self._window = 0, 0
        self._plan = self._plan_epoch()

    def _plan_epoch(self) -> EpochPlan:
        options = self._options
        rng = np.random.default_rng((options.seed, self._epoch, options.process_index))
        n_slots_U = self._reader.lengths - (not options.first_event)
        return plan_epoch(n_slots_U, self._users, options.history_len, rng)

    def __next__(self) -> Batch:
        return self.take(self._options.n_rows)

    def take(self, n_rows: int) -> Batch:
        """The next rows, which are the same however many are taken at a time."""
        options = self._options
        row, parts = 0, []
        while row < n_rows:
            if self._window == len(self._plan.user):
                self._epoch, self._window = self._epoch + 1, 0
                self._plan = self._plan_epoch()
            # No more windows than slots can be placed, so the rest of the epoch need not be looked at.
            ahead = slice(self._window, self._window + (n_rows - row) * options.row_len)
            plan = EpochPlan(*(x[ahead] for x in self._plan))
            placed = place_sequences(plan.length, n_rows - row, options.row_len)
            taken = EpochPlan(*(x[: placed.n] for x in plan))
            parts.append((taken, placed.start + row * options.row_len, placed.segment))
            row = int(parts[-1][1][-1]) // options.row_len + 1
            self._window += placed.n
        plan = EpochPlan(*(np.concatenate(x) for x in zip(*(p[0] for p in parts), strict=True)))
        placed = Placement(len(plan.user), *(np.concatenate([p[k] for p in parts]) for k in (1, 2)))
        packed = self._pack(plan, placed, n_rows)
        return packed.batch._replace(targets=self._render(packed))

    def _pack(self, plan: EpochPlan, placed: Placement, n_rows: int) -> Packed:
        log, first_row = self._reader.fetch(plan.user)
        # With a control slot at their front, a user's slots stand one behind their events.
        ahead = int(self._options.first_event)
        start = first_row + np.maximum(plan.first - ahead, 0)
        next_row = first_row + plan.first + plan.length - ahead
        sequences = Sequences(
            make_histories(start, next_row),
            next_row,
            (plan.first == 0) & self._options.first_event,
            self._reader.fields[plan.user],
        )
        return pack(log, self._items, sequences, placed, (n_rows, self._options.row_len))

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "window": self._window}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._window = state["epoch"], state["window"]
        self._plan = self._plan_epoch()
