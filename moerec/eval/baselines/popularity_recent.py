"""Popularity of late: what was taken in a rolling window before the request."""

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy.sparse

from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, Dataset
from moerec.data.histories import Histories
from moerec.data.splits import TRAIN, VALID
from moerec.errors import WorkError
from moerec.eval.baselines.base import BaselineInputs, TunedRanks, count_stored, rank_by_scores, register_baseline
from moerec.eval.metrics import RankCounts, Ranks, per_target_metrics
from moerec.eval.ranking.dataset import EvalDataset, make_valid_set

DAY_US = 86_400 * SECOND_US
LAST_SHARE = 0.2  # of a user's training events, which count where no event has a time
WINDOWS = (1 / 24, 0.25, 1.0, 3.0, 7.0, 30.0, 90.0, 365.0, np.inf)  # days, among which the window is chosen

BLOCK = 32  # targets counted at once, few enough for the caches
MARKS = 256  # places of the log whose counts are kept, at most
MOST_KEPT = 1 << 24  # counts
MOST_VALID = 2000  # validation targets that choose


@dataclasses.dataclass(frozen=True)
class RecentPopularity:
    """Counts of the training events in `[end - window, end)`; level ones by those of all time before `end`.

    `end` is the target's time, so that no training event at that time or later counts; or the end of training where
    that is earlier: under a split by time the window is as full at the test as at the validation. A target of unknown
    time sees all of training, and no window.

    Attributes:
      time_us, item: `[events]` of the training events whose time is known, by time.
      window_us: the length of the window.
    """

    time_us: np.ndarray
    item: np.ndarray
    window_us: int

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        if not len(targets):
            return np.zeros((0, dataset.catalogue.n_items), np.float32)
        asked, last = dataset.log.time_us[targets], self.time_us[-1] + 1
        end = np.where(asked == UNKNOWN_TIME, last + 1, np.minimum(asked, last))
        order = np.argsort(end, kind="stable")
        n_items, end = dataset.catalogue.n_items, end[order]
        start = np.where(end > last, end, end - self.window_us)
        marks = self._count_marks(n_items)
        until, before = (_Counter(self.item, np.searchsorted(self.time_us, t), marks) for t in (end, start))
        scores = np.empty((len(targets), n_items), np.float32)
        for first in range(0, len(targets), BLOCK):
            block = slice(first, first + BLOCK)
            ever, recent = until.count(block, n_items), before.count(block, n_items)
            np.subtract(ever, recent, out=recent)
            ever *= np.float32(0.5 / len(self.time_us))  # less than one event in all: it only settles what is level
            recent += ever
            scores[order[block]] = recent
        return scores

    def _count_marks(self, n_items: int) -> "_Marks":
        """Made once: it is as much work as counting all events."""
        if "_marks" not in vars(self):
            vars(self)["_marks"] = _count_marks(self.item, n_items)
        return vars(self)["_marks"]


class _Marks(NamedTuple):
    """Attributes:
    every: events between marks.
    so_far: `[marks, I]` float32, how often each item is among the first `0, every, 2 every, ...` events.
    """

    every: int
    so_far: np.ndarray


def _count_marks(item: np.ndarray, n_items: int) -> _Marks:
    n = max(min(MARKS, MOST_KEPT // n_items), 1)
    every = max(-(-len(item) // n), 1)
    count = np.zeros((-(-len(item) // every), n_items), np.float32)
    for k in range(1, len(count)):
        count[k] = count[k - 1] + np.bincount(item[(k - 1) * every : k * every], minlength=n_items)
    return _Marks(every, count)


class _Counter:
    """Counts how often each item is among the first events, for places that rise, block by block."""

    def __init__(self, item: np.ndarray, place: np.ndarray, marks: _Marks):
        """Args: `[events]`; `[n]`, how many of the events are to be counted; and where counting may begin."""
        self.item, self.place = item, place
        mark = min(int(place[0]) // marks.every, len(marks.so_far) - 1)
        self.done, self.total = mark * marks.every, marks.so_far[mark]

    def count(self, block: slice, n_items: int) -> np.ndarray:
        """`[block, I]` float32 for the next block of the places."""
        place = self.place[block]
        row = np.repeat(np.arange(len(place)), np.diff(place, prepend=self.done))
        events = (np.ones(len(row), np.float32), (row, self.item[self.done : place[-1]]))
        count = scipy.sparse.coo_matrix(events, (len(place), n_items)).toarray()
        count[0] += self.total
        for k in range(1, len(count)):  # of all items at once; numpy's running sum along this axis is many times slower
            count[k] += count[k - 1]
        self.done, self.total = place[-1], count[-1].copy()
        return count


@dataclasses.dataclass(frozen=True)
class LatePopularity:
    """Counts of each user's last training events, for data without times."""

    count: np.ndarray  # [I]

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        return np.broadcast_to(self.count, (len(targets), len(self.count)))


def fit_recent_popularity(
    dataset: Dataset, split_ids: np.ndarray, days: float = 30.0
) -> RecentPopularity | LatePopularity:
    """Sorts the training events by time; without times those count that are in the last fifth of their user's.

    Args:
      days: the length of the window.
    """
    if not days > 0:
        raise WorkError(f"recent popularity: a window of {days} days")
    log, trained = dataset.log, np.flatnonzero(split_ids == TRAIN)
    dated = trained[log.time_us[trained] != UNKNOWN_TIME]
    if len(dated):
        order = dated[np.argsort(log.time_us[dated], kind="stable")]
        return RecentPopularity(log.time_us[order], log.item[order], int(min(days * DAY_US, 1 << 61)))
    user = log.users_of(trained)
    size = np.bincount(user, minlength=log.n_users)
    from_end = np.cumsum(size)[user] - np.arange(len(trained))
    late = trained[from_end <= np.ceil(LAST_SHARE * size)[user]]
    return LatePopularity(np.bincount(log.item[late], minlength=dataset.catalogue.n_items).astype(np.float32))


def choose_window(inputs: BaselineInputs) -> float:
    """Days, of `WINDOWS`: the window that ranks the validation targets best (MRR in the union), the longest if several
    do; 30 days if there are no such targets.
    """
    config, data = inputs.config, inputs.data
    if not np.any(data.split_ids == VALID):
        return 30.0
    n_valid = min(config.train.n_valid or MOST_VALID, MOST_VALID)
    train = dataclasses.replace(config.train, n_valid=n_valid)
    examples, found = make_valid_set(dataclasses.replace(config, train=train), data), {}
    for days in WINDOWS:
        scorer = fit_recent_popularity(data.dataset, data.split_ids, days)
        ranks = _rank_by_time(scorer, data.dataset, examples, config.eval.mask_seen)
        found[days] = per_target_metrics(ranks.union)["mrr"].mean()
    return max(WINDOWS, key=lambda days: (found[days], days))


@register_baseline("popularity_recent")
def rank_recent_popularity(inputs: BaselineInputs) -> Ranks:
    """Ranks by the window that the config gives, or by the best on validation targets. Where events have times the
    settings tell it: `days`, None for all of the past, and whether it was `chosen`.
    """
    config, data, examples = inputs.config, inputs.data, inputs.examples
    days = config.eval.popularity_days or choose_window(inputs)
    scorer = fit_recent_popularity(data.dataset, data.split_ids, days)
    ranks = _rank_by_time(scorer, data.dataset, examples, config.eval.mask_seen)
    size = {"n_stored": count_stored(scorer)}
    if isinstance(scorer, LatePopularity):
        return TunedRanks(ranks, {}, size)
    is_chosen = not config.eval.popularity_days and bool(np.any(data.split_ids == VALID))
    return TunedRanks(ranks, {"days": days if np.isfinite(days) else None, "chosen": is_chosen}, size)


def _rank_by_time(
    scorer: RecentPopularity | LatePopularity, dataset: Dataset, examples: EvalDataset, mask_seen: bool
) -> Ranks:
    """Targets next to each other in time are scored together: each event between two chunks is counted once."""
    order = np.argsort(dataset.log.time_us[examples.targets], kind="stable")
    ranks = rank_by_scores(scorer, dataset, examples.targets[order], examples.histories.take(order), mask_seen)
    back = np.argsort(order)
    own, union = (RankCounts(counts.greater[back], counts.equal[back]) for counts in (ranks.in_service, ranks.union))
    return Ranks(own, union)


rank_recent_popularity.__wrapped__ = fit_recent_popularity  # type: ignore[attr-defined]
