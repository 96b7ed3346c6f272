"""Popularity, three ways: overall, within the likely service, and of late."""

import dataclasses

import numpy as np
import scipy.sparse

from moerec.data.dataset import UNKNOWN_TIME, Dataset
from moerec.data.histories import Histories
from moerec.data.splits import TRAIN
from moerec.errors import WorkError
from moerec.eval.baselines.base import register_scorer

_DAY = 86400
_MOST_TABLE_ENTRIES = 1 << 25


def count_items(dataset: Dataset, split_ids: np.ndarray) -> np.ndarray:
    """`[I]` float64, how often each item occurs in training."""
    return np.bincount(dataset.log.item[split_ids == TRAIN], minlength=dataset.catalogue.n_items).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Popularity:
    """The share of each item in the training events, for everybody."""

    share: np.ndarray  # [I]

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        return np.broadcast_to(self.share.astype(np.float32), (len(targets), len(self.share)))


@register_scorer("popularity")
def fit_popularity(dataset: Dataset, split_ids: np.ndarray) -> Popularity:
    """Counts the training events of each item."""
    count = count_items(dataset, split_ids)
    return Popularity(count / max(count.sum(), 1))


@dataclasses.dataclass(frozen=True)
class ServicePopularity:
    """`p(service | service of the last event) p(item | service)`, with one pseudo-count per transition."""

    item_given_service: np.ndarray  # [I]
    transition: np.ndarray  # [Z + 1, Z]; the last row is for users without a history

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        service = dataset.catalogue.service
        last = np.full(len(targets), dataset.catalogue.n_services)
        known = histories.length > 0
        last[known] = service[dataset.log.item[histories.last(1).rows]]
        return (self.transition[:, service] * self.item_given_service).astype(np.float32)[last]


@register_scorer("popularity_by_service")
def fit_service_popularity(dataset: Dataset, split_ids: np.ndarray) -> ServicePopularity:
    """Counts the items of each service, and which service follows which among a user's training events."""
    n = dataset.catalogue.n_services
    trained = np.flatnonzero(split_ids == TRAIN)
    service, user = dataset.event_service[trained], dataset.log.user[trained]
    follows = user[1:] == user[:-1]
    pair = service[:-1][follows].astype(np.int64) * n + service[1:][follows]
    transition = 1.0 + np.concatenate(
        [np.bincount(pair, minlength=n * n).reshape(n, n), np.bincount(service, minlength=n)[None]]
    )
    count = count_items(dataset, split_ids)
    total = np.add.reduceat(count, dataset.catalogue.offsets[:-1])
    share = count / np.maximum(total, 1)[dataset.catalogue.service]
    return ServicePopularity(share, transition / transition.sum(axis=1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class RecentPopularity:
    """Popularity as it stood shortly before the request: no training event later than the target counts.

    `table[b]` holds the decayed counts of the training events in time buckets before `b`.
    """

    table: np.ndarray  # [buckets, I] float32
    start: int  # unix seconds of bucket 0
    width: int  # seconds of a bucket; 0 where training has no times, and then every request sees the one row

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        time = dataset.log.time[targets]
        last = len(self.table) - 1
        if not self.width:
            return self.table[np.zeros(len(targets), np.int64)]
        elapsed = np.where(time == UNKNOWN_TIME, self.start, time) - self.start
        bucket = np.clip(elapsed // self.width, 0, last)
        return self.table[np.where(time == UNKNOWN_TIME, last, bucket)]


@register_scorer("popularity_recent")
def fit_recent_popularity(
    dataset: Dataset, split_ids: np.ndarray, half_life_days: float = 30.0, last_share: float = 0.2
) -> RecentPopularity:
    """Exponentially decayed counts in buckets of a quarter of the half-life.

    Without times the training events count whose place is among the last `last_share` of their user's.
    """
    log, n_items = dataset.log, dataset.catalogue.n_items
    if half_life_days <= 0:
        raise WorkError(f"recent popularity: a half-life of {half_life_days} days")
    dated = np.flatnonzero((split_ids == TRAIN) & (log.time != UNKNOWN_TIME))
    if not len(dated):
        trained = np.flatnonzero(split_ids == TRAIN)
        user = log.user[trained]
        size = np.bincount(user, minlength=log.n_users)
        from_end = np.cumsum(size)[user] - np.arange(len(trained))
        late = trained[from_end <= np.ceil(last_share * size)[user]]
        return RecentPopularity(np.bincount(log.item[late], minlength=n_items)[None].astype(np.float32), 0, 0)
    start, end = int(log.time[dated].min()), int(log.time[dated].max())
    most = max(2, min(256, _MOST_TABLE_ENTRIES // n_items))
    half_life = half_life_days * _DAY
    width = max(int(half_life / 4), -(-(end - start + 1) // (most - 1)), 1)
    n_buckets = (end - start) // width + 1
    bucket = (log.time[dated] - start) // width
    counts = scipy.sparse.csr_matrix((np.ones(len(dated), np.float32), (bucket, log.item[dated])), (n_buckets, n_items))
    table = np.zeros((n_buckets + 1, n_items), np.float32)
    for b in range(n_buckets):
        table[b + 1] = (table[b] + counts[[b]].toarray()[0]) * np.float32(0.5 ** (width / half_life))
    return RecentPopularity(table, start, width)
