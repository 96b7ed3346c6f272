"""Targets with their histories, packed for ranking."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from moerec.config import Config
from moerec.data.dataset import Dataset
from moerec.data.histories import Histories
from moerec.data.load import RunData
from moerec.data.packing import Placement, Sequences, pack, place_sequences
from moerec.data.splits import TEST, VALID, gather_histories, select_targets
from moerec.errors import InputError
from moerec.tasks.base import render_targets
from moerec.tasks.next_event import NextEvent
from moerec.types import Array, Batch


class RankQueries(NamedTuple):
    """Predictions asked of one packed batch; all have a leading axis Q.

    Attributes:
      slot: int32 flat slot whose state answers, or -1 where the user has no slot.
      target: int32 item, -1 for padding.
      low, high: int32 range of the target's service in the catalogue.
      seen: `[Q, X]` int32 distinct items that are no candidates, -1 is padding.
    """

    slot: Array
    target: Array
    low: Array
    high: Array
    seen: Array


class PackedTargets(Protocol):
    """Targets with what stands before them, in batches of a fixed shape."""

    def batches(self) -> Iterator[tuple[slice, Batch, RankQueries]]:
        """Consecutive targets: which, what stands before them, and the queries."""
        ...

    def users_of(self, which: slice) -> np.ndarray:
        """`[sequences]`, the user of each sequence of a batch."""
        ...


class EvalDataset:
    """Targets with their histories, packed once per batch of a fixed shape (so that ranking compiles once)."""

    def __init__(
        self,
        dataset: Dataset,
        targets: np.ndarray,
        config: Config,
        visible: np.ndarray | None = None,
        history: str = "all",
    ):
        """Args: rows of the log to be predicted; `[events]` bool, which events may stand in histories (all); and
        whether all of those do, or of the target's `own` service alone, or of the `others`.
        """
        per_service = config.data.split.is_per_service
        self.dataset, self.targets, self.config = dataset, targets, config
        histories = gather_histories(dataset, targets, per_service)
        if visible is not None and not visible.all():
            histories = histories.keep_events(visible)
        if history != "all":
            service = dataset.event_service
            histories = histories.keep_group(service, service[targets], same=history == "own")
        self.histories = histories
        data = config.data
        # A sequence that leaves room for it begins with its control slot, as in training.
        self._has_control = data.first_event & (self.histories.length < data.history_len)
        self._events = self.histories.last(data.history_len)
        self._length = self._events.length + self._has_control
        # Each item once: else the mask would be as wide as the longest history, and not at most as the catalogue.
        self._seen = self.histories.distinct(dataset.log.item) if config.eval.mask_seen else None
        most = self._seen.length.max(initial=1) if self._seen is not None else 1
        self._seen_width = 1 << int(max(most - 1, 1)).bit_length() if config.eval.mask_seen else 1
        # Enough rows for an average batch; a batch of long histories simply holds fewer queries. In steps of an
        # eighth, so that what is compiled for the validation targets mostly serves for the test targets too.
        mean = max(float(self._length.mean()) if len(targets) else 1.0, 1.0)
        n_rows = max(int(np.ceil(config.eval.batch_size * mean / data.seq_len * 1.1)), 1)
        step = max(1 << n_rows.bit_length() >> 4, 1)
        self._n_rows = -(-n_rows // step) * step
        self.user = dataset.log.users_of(targets)
        self.target_item = dataset.log.item[targets]
        self.target_service = dataset.event_service[targets]

    @property
    def history_len(self) -> np.ndarray:
        """`[n]`, events before each target that its prediction may see (not cut to the model's window)."""
        return self.histories.length

    @property
    def has_slot(self) -> np.ndarray:
        """`[n]` bool, whether there is a slot to ask at: an event, or the control slot."""
        return self._length > 0

    @property
    def is_repeated(self) -> np.ndarray:
        """`[n]` bool, which targets stand in their own history; where seen items are masked, each is a miss."""
        item = self.dataset.log.item
        seen = self.histories.distinct(item) if self._seen is None else self._seen
        return find_repeated(seen, item, self.target_item)

    @property
    def repeated(self) -> float:
        """The share of those targets."""
        return float(self.is_repeated.mean()) if len(self.targets) else 0.0

    def batches(self) -> Iterator[tuple[slice, Batch, RankQueries]]:
        """Consecutive targets: which, their packed histories, and the queries."""
        done = 0
        while done < len(self.targets):
            ahead = self._length[done : done + self.config.eval.batch_size]
            placed = place_sequences(ahead, self._n_rows, self.config.data.seq_len)
            which = slice(done, done + placed.n)
            yield which, *self._pack(which, placed)
            done += placed.n

    def users_of(self, which: slice) -> np.ndarray:
        """`[sequences]`, the user of each sequence of a batch; targets without a slot have none."""
        return self.user[which][self.has_slot[which]]

    def _pack(self, which: slice, placed: Placement) -> tuple[Batch, RankQueries]:
        sequences = Sequences(
            self._events.slice(which.start, which.stop),
            self.targets[which],
            self._has_control[which],
            self.dataset.profile_codes[0][self.user[which]],
        )
        shape = (self._n_rows, self.config.data.seq_len)
        packed = pack(self.dataset.log, self.dataset.catalogue, sequences, placed, shape)
        length = self._length[which]
        batch = packed.batch._replace(targets=render_targets([NextEvent()], packed))
        return batch, self._ask(which, np.where(length > 0, placed.start + length - 1, -1))

    def _ask(self, which: slice, slot: np.ndarray) -> RankQueries:
        n, q = which.stop - which.start, self.config.eval.batch_size
        service = self.target_service[which]
        ranges = self.dataset.catalogue.offsets
        seen = np.full((n, self._seen_width), -1, np.int32)
        if self._seen is not None:
            histories = self._seen.slice(which.start, which.stop)
            seen = pad_seen(histories, self.dataset.log.item[histories.rows], self._seen_width)

        def pad(x, empty):
            return np.concatenate([x, np.full((q - n, *x.shape[1:]), empty)]).astype(np.int32)

        return RankQueries(
            pad(slot, -1),
            pad(self.target_item[which], -1),
            pad(ranges[service], 0),
            pad(ranges[service + 1], 1),
            pad(seen, -1),
        )


def pad_seen(histories: Histories, items: np.ndarray, width: int) -> np.ndarray:
    """`[n, width]` int32: each history's items, then -1. Args: distinct events (`Histories.distinct`); their items."""
    place = np.arange(len(items)) - histories.offsets[histories.owner]
    out = np.full((len(histories), width), -1, np.int32)
    out[histories.owner, place] = items
    return out


def find_repeated(seen: Histories, item: np.ndarray, target_item: np.ndarray) -> np.ndarray:
    """`[n]` bool, which targets' items their histories hold. Args: distinct events; `[events]` items; `[n]` items."""
    found = np.zeros(len(seen), bool)
    for which, part in seen.blocks():
        found[which.start + part.owner[item[part.rows] == target_item[which][part.owner]]] = True
    return found


def make_valid_set(config: Config, data: RunData) -> EvalDataset:
    """The validation targets, or a fixed sample of `train.n_valid`.

    Raises:
      InputError: the split leaves none.
    """
    targets = _sample_targets(data, VALID, config.train.n_valid, config.data.seed, "validation")
    # What picks the step must not see a test event, not even as the history of another service.
    return EvalDataset(data.dataset, targets, config, visible=data.split_ids != TEST)


def make_test_set(config: Config, data: RunData) -> EvalDataset:
    """All test targets, or a fixed sample of `eval.n_test`.

    Raises:
      InputError: the split leaves none.
    """
    return EvalDataset(data.dataset, _sample_targets(data, TEST, config.eval.n_test, config.data.seed, "test"), config)


def _sample_targets(data: RunData, split_id: int, most: int, seed: int, name: str) -> np.ndarray:
    targets = select_targets(data.dataset, data.split_ids, split_id)
    if not len(targets):
        raise InputError(f"data: the split leaves no {name} target")
    if not most:
        return targets
    return np.sort(np.random.default_rng([seed, split_id]).permutation(targets)[:most])
