"""A small random data set in which every event can be told from every other."""

import numpy as np

from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, Dataset, EventLog, ItemTable


def make_dataset(lengths, items_per_service=(5, 8), n_context=2, seed=0) -> Dataset:
    """Users with `lengths` events each, in random times (one in ten not known) of one second's grain."""
    rng = np.random.default_rng(seed)
    n, n_items = int(np.sum(lengths)), int(np.sum(items_per_service))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    time = (1_000_000_000 + np.cumsum(rng.integers(0, 90_000, n)).astype(np.int64)) * SECOND_US
    time[rng.random(n) < 0.1] = UNKNOWN_TIME
    return Dataset(
        catalogue=ItemTable(
            tuple(f"service {z}" for z in range(len(items_per_service))),
            np.concatenate([[0], np.cumsum(items_per_service)]).astype(np.int64),
            # in no order, so that a sort by id differs from the order of the items
            np.array([f"id {k}" for k in rng.permutation(n_items)]),
            np.array([f"item {k} of a kind {k % 3}" for k in range(n_items)]),
            np.array([f"brand={k % 4}" for k in range(n_items)]),
        ),
        log=EventLog(
            offsets,
            rng.integers(0, n_items, n).astype(np.int32),
            rng.integers(0, 3, n).astype(np.int16),
            time,
            rng.integers(0, 4, (n, n_context)).astype(np.int16),
        ),
        users=np.array([f"user {p}" for p in range(len(lengths))]),
        actions=("view", "click", "buy"),
        context={f"feature {c}": ("a", "b", "c") for c in range(n_context)},
    )
