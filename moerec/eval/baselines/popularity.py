"""Popularity, overall and within the likely service."""

import dataclasses

import numpy as np

from moerec.data.dataset import Dataset
from moerec.data.histories import Histories
from moerec.data.splits import TRAIN
from moerec.eval.baselines.base import register_scorer


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
