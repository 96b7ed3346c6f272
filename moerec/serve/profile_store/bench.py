"""Time and memory of a profile store with states of 4 KiB."""

import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moerec.serve.profile_store.store import ProfileStore

TEMPLATE = {
    "memory": np.zeros((15, 64), np.float32),
    "last_time": np.zeros(32, np.int32),
    "seen": np.zeros(32, np.int32),
}
_REPEATS = 5


def measure_store(folder: Path, n_users: int, batch_size: int = 1000, n_read: int = 10_000) -> dict[str, float]:
    """Fills a store at `folder`, updates random users, reads random users; medians, from the page cache.

    Rates are users a second of batches that are on disk; `memory_bytes` is what a user costs an open store.
    """
    rng = np.random.default_rng(0)
    ids = np.array([f"user-{k:08d}" for k in range(n_users)])
    store = ProfileStore.create(folder, TEMPLATE)
    parts = (ids[lo : lo + 10_000] for lo in range(0, n_users, 10_000))
    add_s = sum(_time(store.update, part, _draw(rng, len(part))) for part in parts)
    batches = [rng.choice(ids, batch_size, replace=False) for _ in range(_REPEATS)]
    states = _draw(rng, batch_size)
    update_s = statistics.median([_time(store.update, batch, states) for batch in batches])
    reads = [rng.choice(ids, n_read, replace=False) for _ in range(_REPEATS)]
    read_s = statistics.median([_time(store.read, batch) for batch in reads])
    read_one_s = statistics.median([_time(store.read, batch[:1]) for batch in reads])
    open_s = _time(ProfileStore.open, folder)
    tracemalloc.start()
    opened = ProfileStore.open(folder)
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "users": len(opened),
        "state_bytes": sum(leaf.nbytes for leaf in TEMPLATE.values()),
        "added_per_s": n_users / add_s,
        "updated_per_s": batch_size / update_s,
        "read_s": read_s,
        "read_one_s": read_one_s,
        "open_s": open_s,
        "memory_bytes": memory / n_users,
    }


def _time(work: Callable[..., object], *arguments) -> float:
    """Seconds of wall time."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def _draw(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    return {
        "memory": rng.standard_normal((n, 15, 64), np.float32),
        "last_time": rng.integers(0, 1 << 30, (n, 32), np.int32),
        "seen": rng.integers(0, 100, (n, 32), np.int32),
    }
