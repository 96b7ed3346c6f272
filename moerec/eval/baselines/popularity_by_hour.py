"""Popularity by service and hour: what is known of a request without a history."""

import dataclasses

import numpy as np

from moerec.data.dataset import UNKNOWN_TIME, Dataset, floor_seconds
from moerec.data.histories import Histories
from moerec.data.splits import TRAIN
from moerec.eval.baselines.base import register_scorer

N_HOURS = 24
STRENGTH = 20.0  # events' worth of the service's overall shares in each hour's


@dataclasses.dataclass(frozen=True)
class HourPopularity:
    """`p(service | hour) p(item | service, hour)`, by the hour of the request at its own place.

    The shares of an hour are smoothed towards those of all hours.
    """

    share: np.ndarray  # [hours + 1, I]; the last row is for requests of an unknown time

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        return self.share[find_hours(dataset, targets)]


def find_hours(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """`[n]` the hour of the day on the clocks at each event's place, `N_HOURS` where it is not known."""
    time = floor_seconds(dataset.log.time_us[rows])
    hour = (time + dataset.log.utc_offset[rows]) // 3600 % N_HOURS
    return np.where(time == UNKNOWN_TIME, N_HOURS, hour)


@register_scorer("popularity_by_hour")
def fit_hour_popularity(dataset: Dataset, split_ids: np.ndarray) -> HourPopularity:
    """Counts the training events of each item and hour."""
    catalogue, trained = dataset.catalogue, np.flatnonzero(split_ids == TRAIN)
    hour, n_items = find_hours(dataset, trained), catalogue.n_items
    pairs = hour * n_items + dataset.log.item[trained]
    count = np.bincount(pairs, minlength=(N_HOURS + 1) * n_items).reshape(-1, n_items).astype(np.float64)
    whole, start = count.sum(axis=0), catalogue.offsets[:-1]
    count[N_HOURS] = whole
    share = whole / max(whole.sum(), 1)
    of_service = np.add.reduceat(share, start)
    p_service = np.add.reduceat(count, start, axis=1) + STRENGTH * of_service
    p_service /= np.maximum(p_service.sum(axis=1, keepdims=True), 1e-30)
    service = catalogue.service
    within = share / np.maximum(of_service, 1e-30)[service]
    p_item = count + STRENGTH * within
    total = np.add.reduceat(p_item, start, axis=1)
    return HourPopularity((p_service[:, service] * p_item / np.maximum(total, 1e-30)[:, service]).astype(np.float32))
