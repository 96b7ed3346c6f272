"""An event planted in the future: whatever stands there, a prediction's inputs must stay what they are."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from moerec.config import AuditConfig, Config, DataConfig
from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, Dataset
from moerec.data.splits import TEST, VALID, select_targets
from moerec.eval.audit.report import AuditRow, make_row
from moerec.eval.audit.subject import Subject
from moerec.eval.ranking import EvalDataset, RankQueries
from moerec.types import Batch


def check_future_canary(subject: Subject, limits: AuditConfig) -> Iterator[AuditRow]:
    """Targets (one a user) whose inputs, as the model is given them, tell what happens from the target on.

    The user's future is written anew with other items, other actions and later times, and the evaluation batches
    are built from the true and from the rewritten log; only the targets may differ.
    """
    for split_id, name in ((TEST, "test"), (VALID, "valid")):
        targets = _one_a_user(subject, select_targets(subject.dataset, subject.split_ids, split_id))
        if not len(targets):
            continue
        visible = subject.split_ids != TEST if split_id == VALID else None
        changed = find_changed_inputs(subject, targets, plant_future(subject.dataset, targets), visible)
        text = f"of {len(targets)} {name} events, those whose inputs change with what is planted after them"
        yield make_row(f"future_canary_{name}", "all", changed.mean(), limits.max_future_canary, text)


def _one_a_user(subject: Subject, targets: np.ndarray) -> np.ndarray:
    """A random target of each user: the future of one must not be the past of another."""
    shuffled = np.random.default_rng(0).permutation(targets)
    _, first = np.unique(subject.user[shuffled], return_index=True)
    return np.sort(shuffled[first])


def plant_future(dataset: Dataset, targets: np.ndarray) -> Dataset:
    """The data set with other items and actions from each target on, and other contexts and later times after it.

    The future of a target is its own row, the rows behind it, tied ones among them, and whatever has a later time.
    """
    log = dataset.log
    target = np.full(log.n_users, -1)
    target[log.user[targets]] = targets
    own = target[log.user]  # each event's target
    row, known = np.arange(log.n_events), log.time_us != UNKNOWN_TIME
    after = (own >= 0) & ((row > own) | (known & known[own] & (log.time_us > log.time_us[own])))
    future = after | (row == own)
    start, size = dataset.catalogue.offsets[:-1], np.diff(dataset.catalogue.offsets)
    service = dataset.event_service
    other_item = start[service] + (log.item - start[service] + 1) % size[service]
    n_codes = np.array([len(values) + 1 for values in dataset.context.values()], int)
    planted = dataclasses.replace(
        log,
        item=np.where(future, other_item, log.item).astype(log.item.dtype),
        action=np.where(future, (log.action + 1) % len(dataset.actions), log.action).astype(log.action.dtype),
        context=np.where(after[:, None], (log.context + 1) % n_codes, log.context).astype(log.context.dtype),
        utc_offset=np.where(after, log.utc_offset + 3600, log.utc_offset).astype(log.utc_offset.dtype),
        time_us=np.where(after & known, log.time_us + 86_400 * SECOND_US, log.time_us),
    )
    return dataclasses.replace(dataset, log=planted)


def find_changed_inputs(
    subject: Subject, targets: np.ndarray, planted: Dataset, visible: np.ndarray | None
) -> np.ndarray:
    """`[n]` bool, which targets' histories or masked items differ between the two data sets."""
    split = subject.split
    longest = int(np.diff(subject.dataset.log.offsets).max())
    row_len = min(longest, 1024)
    config = Config(data=DataConfig(split=split, seq_len=row_len, history_len=row_len))
    true, rewritten = (EvalDataset(data, targets, config, visible) for data in (subject.dataset, planted))
    changed = true.history_len != rewritten.history_len
    if changed.any():
        return changed  # already found, and the batches of the two would not line up
    both = zip(true.batches(), rewritten.batches(), strict=True)
    for (which, batch, asked), (_, batch_planted, asked_planted) in both:
        n = which.stop - which.start
        changed[which] = _differs(batch, batch_planted, asked, asked_planted)[:n]
    return changed


def _differs(batch: Batch, other: Batch, asked: RankQueries, other_asked: RankQueries) -> np.ndarray:
    """`[Q]` bool; a query's inputs are the slots of its segment, the slot itself and the masked items."""
    inputs = (x._replace(targets={}) for x in (batch, other))
    pairs = zip(*(jax.tree.leaves(x) for x in inputs), strict=True)
    shape = batch.segment_BT.shape
    slot_changed = np.any([(a != b).reshape(*shape, -1).any(axis=2) for a, b in pairs], axis=0).reshape(-1)
    segment = np.asarray(batch.segment_BT)
    label = (np.arange(segment.shape[0])[:, None] * (segment.max() + 1) + segment).reshape(-1)
    n_changed = np.bincount(label, weights=slot_changed)
    in_history = n_changed[label[np.maximum(asked.slot, 0)]] > 0
    width = max(asked.seen.shape[1], other_asked.seen.shape[1])
    seen, other_seen = (np.pad(x.seen, ((0, 0), (0, width - x.seen.shape[1]))) for x in (asked, other_asked))
    same_query = (asked.slot == other_asked.slot) & np.all(seen == other_seen, axis=1)
    return np.where(asked.slot >= 0, in_history, False) | ~same_query
