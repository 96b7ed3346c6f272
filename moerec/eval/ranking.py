"""Full ranking of every target over its service's catalogue and over the union, on the device."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.data.dataset import Dataset
from moerec.data.packing import fill_batch, place_sequences
from moerec.data.splits import gather_histories
from moerec.errors import WorkError
from moerec.eval.metrics import MISS, RankCounts
from moerec.nn.model import SequenceModel
from moerec.nn.sharding import mesh_of
from moerec.types import Array, Batch, Catalog, Output


class RankQueries(NamedTuple):
    """Predictions asked of one packed batch; all have a leading axis Q.

    Attributes:
      slot: int32 flat slot whose state answers, or -1 where the user has no history.
      target: int32 item, -1 for padding.
      low, high: int32 range of the target's service in the catalogue.
      seen: `[Q, W]` int32 distinct items that are no candidates, -1 is padding.
    """

    slot: Array
    target: Array
    low: Array
    high: Array
    seen: Array


class Ranks(NamedTuple):
    """Candidates above (`greater`) and level with (`equal`, the target included) each target; int32 `[Q]`."""

    greater_in_service: jax.Array
    equal_in_service: jax.Array
    greater_union: jax.Array
    equal_union: jax.Array
    finite: jax.Array


@jax.jit
def catalogue_vectors(model: SequenceModel, table: Catalog) -> tuple[jax.Array, jax.Array]:
    """Vectors `[I, D]` and biases `[I]` of all items."""
    return model.item_vectors(jnp.arange(table.service_I.shape[0]), table)


def score_items(
    model: SequenceModel,
    batch: Batch,
    slot_Q: jax.Array,
    table: Catalog,
    vectors,
    profile_source_BT: jax.Array | None = None,
) -> jax.Array:
    """Scores `[Q, I]` of all items; without a history only the biases speak.

    Where answers are mixed, a score is the log-probability. `profile_source_BT` as in `SequenceModel.encode`.
    """
    return score_output(
        model.encode(batch, table, vector_ID=vectors[0], profile_source_BT=profile_source_BT), batch, slot_Q, vectors
    )


def score_output(output: Output, batch: Batch, slot_Q: jax.Array, vectors) -> jax.Array:
    """`score_items` of a batch that has been encoded."""
    vector_ID, bias_I = vectors
    known_Q1, at_Q = slot_Q[:, None] >= 0, jnp.maximum(slot_Q, 0)
    h_QD = jnp.where(known_Q1, output.state_BTD.reshape(-1, vector_ID.shape[1])[at_Q], 0)
    score_QI = h_QD @ vector_ID.T + bias_I
    if output.answers is None:
        return score_QI
    log_weight_BTX, copy_BTS = output.answers
    n_slots = copy_BTS.shape[-1]
    item_QS = batch.item_BT[at_Q // n_slots]
    copy_QS = jnp.where(known_Q1, copy_BTS.reshape(-1, n_slots)[at_Q], 0)
    log_share_Q1 = jnp.where(known_Q1, log_weight_BTX.reshape(-1, log_weight_BTX.shape[-1])[at_Q, :1], 0)
    copied_QI = jnp.zeros_like(score_QI).at[jnp.arange(len(at_Q))[:, None], item_QS].add(copy_QS)
    return jnp.logaddexp(jax.nn.log_softmax(score_QI) + log_share_Q1, jnp.log(copied_QI))


@jax.jit
def rank_batch(
    model: SequenceModel,
    batch: Batch,
    queries: RankQueries,
    table: Catalog,
    vectors,
    profile_source_BT: jax.Array | None = None,
) -> Ranks:
    """Counts by comparison, without a sort. A target that is itself among the seen items is a miss."""
    score_QI = score_items(model, batch, queries.slot, table, vectors, profile_source_BT)
    target = jnp.maximum(queries.target, 0)[:, None]
    level = jnp.take_along_axis(score_QI, target, axis=1)
    item_I = jnp.arange(score_QI.shape[1])
    own_QI = (item_I >= queries.low[:, None]) & (item_I < queries.high[:, None])
    seen = queries.seen
    seen_score = jnp.take_along_axis(score_QI, jnp.maximum(seen, 0), axis=1)
    masked = (seen >= 0) & (seen != target)
    masked_own = masked & (seen >= queries.low[:, None]) & (seen < queries.high[:, None])

    def count(relation, candidates, masked_candidates):
        kept = jnp.sum(relation(score_QI, level) & candidates, axis=1)
        return kept - jnp.sum(relation(seen_score, level) & masked_candidates, axis=1)

    missed = jnp.any(seen == target, axis=1) & (queries.target >= 0)
    greater_own = jnp.where(missed, MISS, count(jnp.greater, own_QI, masked_own))
    greater_all = jnp.where(missed, MISS, count(jnp.greater, True, masked))
    return Ranks(
        greater_own,
        jnp.where(missed, 1, count(jnp.equal, own_QI, masked_own)),
        greater_all,
        jnp.where(missed, 1, count(jnp.equal, True, masked)),
        jnp.all(jnp.isfinite(score_QI), axis=1),
    )


def pad_seen(offsets: np.ndarray, items: np.ndarray, width: int) -> np.ndarray:
    """`[n, width]` int32: each row's distinct items, then -1."""
    n = len(offsets) - 1
    owner = np.repeat(np.arange(n), np.diff(offsets))
    pairs = np.unique(np.stack([owner, items], axis=1), axis=0) if len(items) else np.zeros((0, 2), np.int64)
    place = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
    out = np.full((n, width), -1, np.int32)
    out[pairs[:, 0], place] = pairs[:, 1]
    return out


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
        per_service = config.data.split.kind == "leave_one_out" and config.data.split.per_service
        self.dataset, self.targets, self.config = dataset, targets, config
        self.offsets, self.rows = gather_histories(dataset, targets, per_service)
        keep = np.ones(len(self.rows), bool) if visible is None else visible[self.rows]
        if history != "all":
            service = dataset.event_service
            is_own = service[self.rows] == np.repeat(service[targets], np.diff(self.offsets))
            keep &= is_own if history == "own" else ~is_own
        if not keep.all():
            kept = np.concatenate([[0], np.cumsum(keep)])
            self.offsets, self.rows = kept[self.offsets], self.rows[keep]
        full = np.diff(self.offsets)
        self._length = np.minimum(full, config.data.history_len)
        self._seen_width = 1 << int(max(full.max(initial=1) - 1, 1)).bit_length() if config.eval.mask_seen else 1
        # Enough rows for an average batch; a batch of long histories simply holds fewer questions. In steps of an
        # eighth, so that what is compiled for the validation targets mostly serves for the test targets too.
        mean = max(float(self._length.mean()) if len(targets) else 1.0, 1.0)
        n_rows = max(int(np.ceil(config.eval.batch_size * mean / config.data.seq_len * 1.1)), 1)
        step = max(1 << n_rows.bit_length() >> 4, 1)
        self._n_rows = -(-n_rows // step) * step
        self._fields = dataset.profile_codes[0][dataset.log.user[targets]]
        self.target_item = dataset.log.item[targets]
        self.target_service = dataset.event_service[targets]

    @property
    def history_len(self) -> np.ndarray:
        """`[n]`, events before each target that its prediction may see (not cut to the model's window)."""
        return np.diff(self.offsets)

    @property
    def repeated(self) -> float:
        """The share of the targets that stand in their own history; where seen items are masked, each is a miss."""
        if not len(self.targets):
            return 0.0
        owner = np.repeat(np.arange(len(self.targets)), np.diff(self.offsets))
        hits = self.dataset.log.item[self.rows] == self.target_item[owner]
        return len(np.unique(owner[hits])) / len(self.targets)

    def batches(self) -> Iterator[tuple[slice, Batch, RankQueries]]:
        """Consecutive targets: which, their packed histories, and the questions."""
        done = 0
        while done < len(self.targets):
            ahead = self._length[done : done + self.config.eval.batch_size]
            placed = place_sequences(ahead, self._n_rows, self.config.data.seq_len)
            which = slice(done, done + placed.n)
            yield which, *self._pack(which, placed.start, placed.segment)
            done += placed.n

    def users_of(self, which: slice) -> np.ndarray:
        """`[sequences]`, the user of each history of a batch; targets without one have no sequence."""
        targets = self.targets[which][self._length[which] > 0]
        return np.searchsorted(self.dataset.log.offsets, targets, side="right") - 1

    def _pack(self, which: slice, start: np.ndarray, segment: np.ndarray) -> tuple[Batch, RankQueries]:
        length, target = self._length[which], self.targets[which]
        place = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        source = self.rows[np.repeat(self.offsets[which.start + 1 : which.stop + 1] - length, length) + place]
        last = np.cumsum(length) - 1
        following = np.append(source[1:], 0)
        following[last[length > 0]] = target[length > 0]
        batch = fill_batch(
            self.dataset.log,
            slot=np.repeat(start, length) + place,
            source=source,
            following=following,
            position=place,
            segment=np.repeat(segment, length),
            weight=np.zeros(len(source), np.float32),
            shape=(self._n_rows, self.config.data.seq_len),
            fields=np.repeat(self._fields[which], length, axis=0),
        )
        return batch, self._ask(which, np.where(length > 0, start + length - 1, -1))

    def _ask(self, which: slice, slot: np.ndarray) -> RankQueries:
        n, q = which.stop - which.start, self.config.eval.batch_size
        service = self.target_service[which]
        ranges = self.dataset.catalogue.offsets
        seen = np.full((n, self._seen_width), -1, np.int32)
        if self.config.eval.mask_seen:
            edges = self.offsets[which.start : which.stop + 1]
            items = self.dataset.log.item[self.rows[edges[0] : edges[-1]]]
            seen = pad_seen(edges - edges[0], items, self._seen_width)

        def pad(x, empty):
            return np.concatenate([x, np.full((q - n, *x.shape[1:]), empty)]).astype(np.int32)

        return RankQueries(
            pad(slot, -1),
            pad(self.target_item[which], -1),
            pad(ranges[service], 0),
            pad(ranges[service + 1], 1),
            pad(seen, -1),
        )


def rank_targets(
    model: SequenceModel,
    examples: EvalDataset,
    table: Catalog,
    intervention: Callable[[Batch, np.ndarray], tuple[Batch, Array | None]] | None = None,
) -> tuple[RankCounts, RankCounts]:
    """In-service and union rank counts of all targets.

    Args:
      edit: what is done to each batch of histories first, given whose each of them is, and the slots' donors
        (`SequenceModel.encode`).

    Raises:
      WorkError: a score is not finite.
    """
    vectors = catalogue_vectors(model, table)
    parts: list[tuple[slice, Ranks]] = []
    ranked: list[np.ndarray] = []

    def collect():
        which, ranks = parts.pop()
        n = which.stop - which.start
        counts = [np.asarray(x)[:n] for x in ranks]
        if not counts[-1].all():
            row = which.start + int(np.flatnonzero(~counts[-1])[0])
            raise WorkError(f"evaluation: target {row} got a score that is not finite")
        ranked.append(np.stack(counts[:-1]).astype(np.int64))

    with mesh_of(model):
        for which, batch, queries in examples.batches():
            batch, profile_source_BT = (
                (batch, None) if intervention is None else intervention(batch, examples.users_of(which))
            )
            ranks = rank_batch(model, batch, queries, table, vectors, profile_source_BT)
            if parts:  # the batch before has been computed while this one was packed
                collect()
            parts.append((which, ranks))
    if parts:
        collect()
    joined = np.concatenate(ranked, axis=1) if ranked else np.zeros((4, 0), np.int64)
    return RankCounts(joined[0], joined[1]), RankCounts(joined[2], joined[3])
