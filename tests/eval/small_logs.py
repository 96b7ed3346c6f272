"""Small logs of events for baselines."""

import collections

import numpy as np

from moerec.config import SplitConfig
from moerec.data import splits
from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog, ItemTable

HOUR = 3_600_000_000  # microseconds
DAY = 24 * HOUR


def make_world(seed=0, n_users=40, sizes=(6, 5), dated=True):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, n_users)
    n, n_items = int(lengths.sum()), sum(sizes)
    blank = np.full(n_items, "")
    catalogue = ItemTable(
        tuple("abc"[: len(sizes)]),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.arange(n_items).astype(str),
        blank,
        blank,
    )
    time = np.concatenate([np.sort(rng.integers(0, 300, size)) for size in lengths]) * DAY
    log = EventLog(
        np.concatenate([[0], np.cumsum(lengths)]),
        (rng.random(n) ** 2 * n_items).astype(np.int32),
        np.zeros(n, np.int16),
        time if dated else np.full(n, UNKNOWN_TIME),
        np.zeros((n, 0), np.int16),
    )
    return Dataset(catalogue, log, np.arange(n_users).astype(str))


def hold_out(dataset, per_service=False):
    split_ids = splits.assign_split_ids(dataset, SplitConfig(per_service=per_service), 0)
    targets = splits.select_targets(dataset, split_ids, splits.TEST)
    return split_ids, targets, splits.gather_histories(dataset, targets, per_service)


def train_sequences(dataset, split_ids, within_service=False):
    """Lists of items in order, one a user (or user and service)."""
    sequences = collections.defaultdict(list)
    for row, (p, i) in enumerate(zip(dataset.log.user.tolist(), dataset.log.item.tolist(), strict=True)):
        if split_ids[row] == splits.TRAIN:
            sequences[p, int(dataset.catalogue.service[i]) if within_service else 0].append(i)
    return sequences
