"""How fast the parts of a run are, measured one after the other in one process on an otherwise idle machine."""

import dataclasses
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moerec.config import Config
from moerec.data.load import load_data, make_reader
from moerec.data.pipeline import PackedStream, StreamOptions
from moerec.evaluate import rank_batch, rank_targets
from moerec.results import make_test_set
from moerec.sharding import mesh_of
from moerec.state import evaluated_model
from moerec.train import set_up


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of `run`, whose result is waited for; the first call, which compiles, is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def count_compilations(jitted: Any) -> float:
    """How many programs a jitted function has been compiled to."""
    return float(jitted._cache_size())


def measure(config: Config, workdir: Path, repeats: int = 20, n_targets: int = 4000) -> dict[str, float]:
    """Slots per second of the step and of the loader, their ratio, targets per second of evaluation, peak memory."""
    started = time.perf_counter()
    data = load_data(config.data, workdir)
    load_s = time.perf_counter() - started
    setup = set_up(config, data)
    stream = iter(setup.stream)
    state, batch = setup.state, next(stream)
    slots = float(batch.weight_BT.sum())

    def step():
        nonlocal state
        with mesh_of(state):
            state, metrics = setup.train_step(state, batch, setup.table)
        return metrics["loss"]

    step_s = median_seconds(step, repeats)
    options = StreamOptions(config.train.batch_size, config.data.seq_len, config.data.history_len, config.seed)
    loader = iter(PackedStream(make_reader(config.data, data), options))
    loader_s = median_seconds(lambda: next(loader).item_BT, 5 * repeats)
    some = dataclasses.replace(config, eval=dataclasses.replace(config.eval, n_test=n_targets))
    examples = make_test_set(some, data).examples
    model = evaluated_model(state)
    eval_s = median_seconds(lambda: rank_targets(model, examples, setup.table)[0].greater, 3)
    n_rows = config.train.batch_size * config.data.seq_len
    return {
        "load_s": load_s,
        "step_ms": 1e3 * step_s,
        "step_slots_per_s": slots / step_s,
        "packing": slots / n_rows,
        "loader_slots_per_s": slots / loader_s,
        "loader_over_step": step_s / loader_s,
        "eval_targets_per_s": len(examples.targets) / eval_s,
        "eval_scores_per_s": len(examples.targets) * data.dataset.catalogue.n_items / eval_s,
        "step_compilations": count_compilations(setup.train_step),
        "eval_compilations": count_compilations(rank_batch),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
