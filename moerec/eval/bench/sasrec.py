"""Our training step of SASRec against one in PyTorch: the same shape, batches, targets and threads, in turns."""

import contextlib
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.convert.paths import flatten
from moerec.data.load import load_data
from moerec.errors import InputError
from moerec.eval.baselines import sasrec_config
from moerec.nn.sharding import mesh_of
from moerec.train.loop import Trainer, make_trainer
from moerec.types import Batch

LOSSES = ("one_negative", "sampled_softmax", "full_softmax")
N_BATCHES = 8  # taken in turn
Shape = tuple[int, int, int, int]  # of matmuls [M, K] by [K, N], and how many of them


def require_torch() -> None:
    """Raises: InputError, where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise InputError("PyTorch is not installed, which this is a comparison with (pip install 'moerec[hf]')")


def measure_sasrec(
    config: Config, workdir: Path, losses: tuple[str, ...] = LOSSES, rounds: int = 20, is_compiled: bool = False
) -> list[dict[str, Any]]:
    """A row for each loss: targets a second of both, `ratio` (ours to theirs), and the milliseconds of processor time
    of a step and of its matmuls alone.

    Args: `rounds` of turns, each of which times one step of each; `is_compiled`: PyTorch compiles its model, too.

    Raises:
      InputError: PyTorch is not installed.
    """
    require_torch()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data, rows = load_data(config.data, workdir), []
    for kind in losses:
        own = sasrec_config(config, f"bench_{kind}", kind)
        trainer = make_trainer(own, data)
        with contextlib.closing(iter(trainer.stream)) as stream:
            batches = list(itertools.islice(stream, N_BATCHES))
        n_targets = float(np.mean([x.targets["next_event"].weight_BT.sum() for x in batches]))
        n_items = data.dataset.catalogue.n_items
        calls = {
            "theirs": _their_step(own, trainer, batches, n_items, is_compiled),
            "ours": _our_step(trainer, batches),
        }
        seconds = _take_turns(calls, rounds)
        rows.append({"loss": kind, **_describe(own, n_items, n_targets, seconds)})
    return rows


def _describe(
    config: Config, n_items: int, n_targets: float, seconds: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    matmuls = _take_turns(make_matmuls(list_matmuls(config, n_items)), 5)
    (our_wall, our_cpu), (their_wall, their_cpu) = seconds["ours"], seconds["theirs"]
    return {
        "targets_per_s": n_targets / our_wall,
        "torch_targets_per_s": n_targets / their_wall,
        "ratio": their_wall / our_wall,
        "step_cpu_ms": 1e3 * our_cpu,
        "torch_step_cpu_ms": 1e3 * their_cpu,
        "cpu_ratio": their_cpu / our_cpu,
        "matmuls_cpu_ms": 1e3 * matmuls["ours"][1],
        "torch_matmuls_cpu_ms": 1e3 * matmuls["theirs"][1],
    }


def _take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each, on the clock and of the processor; before each timed call goes one that is not timed."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (float(np.median(x[:, 0])), float(np.median(x[:, 1]))) for name, x in _stack(taken)}


def _stack(taken: dict[str, list[tuple[float, float]]]) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, np.array(times)) for name, times in taken.items())


def _our_step(trainer: Trainer, batches: list[Batch]) -> Callable[[], jax.Array]:
    state, turn = trainer.state, itertools.cycle(batches)

    def step() -> jax.Array:
        nonlocal state
        with mesh_of(state):
            state, metrics = trainer.step(state, next(turn))
        return metrics["loss"]

    return step


def _their_step(
    config: Config, trainer: Trainer, batches: list[Batch], n_items: int, is_compiled: bool
) -> Callable[[], Any]:
    from moerec.eval.bench.sasrec_torch import TorchSasrec, make_step

    model = TorchSasrec(config.model, n_items)
    model.load({path: np.asarray(x) for path, x in flatten(trainer.state.params).items()})
    step, turn = make_step(config, model, config.loss.chunk, is_compiled), itertools.cycle(map(to_torch, batches))
    kept = [next(turn) for _ in batches]
    turn = itertools.cycle(kept)
    return lambda: step(next(turn))


def to_torch(batch: Batch) -> dict[str, Any]:
    """What `sasrec_torch` reads of a batch."""
    import torch

    target = batch.targets["next_event"]
    whole = {"item": batch.item_BT, "position": batch.position_BT, "segment": batch.segment_BT}
    found = {name: torch.from_numpy(np.array(x, np.int64)) for name, x in (whole | {"target": target.label_BT}).items()}
    return {**found, "weight": torch.from_numpy(np.array(target.weight_BT, np.float32))}


def list_matmuls(config: Config, n_items: int) -> list[Shape]:
    """The matmuls of a step's forward pass, attention aside; backward each has two more of as much work."""
    model, s = config.model, config.train.batch_size * config.data.seq_len
    heads = model.d_head * (model.n_heads + 2 * model.n_kv_heads)
    n, d, f = model.n_layers, model.d_model, model.d_ff
    found = [(s, d, heads, n), (s, model.d_head * model.n_heads, d, n), (s, d, 2 * f, n), (s, f, d, n)]
    if config.loss.kind != "one_negative":
        chunk = min(config.loss.chunk, s)
        n_candidates = n_items if config.loss.kind == "full_softmax" else config.loss.n_negatives
        found.append((chunk, d, n_candidates, -(-s // chunk)))
    return found


def make_matmuls(shapes: list[Shape]) -> dict[str, Callable[[], Any]]:
    """All of them, forward and backward, by each of the two libraries and nothing else."""
    import torch

    rng = np.random.default_rng(0)
    drawn = [[rng.standard_normal(x, np.float32) for x in ((m, k), (k, n), (m, n))] for m, k, n, _ in shapes]
    ours = [tuple(map(jnp.asarray, x)) for x in drawn]
    theirs = [tuple(map(torch.from_numpy, x)) for x in drawn]
    multiply = jax.jit(lambda x, w, g: (x @ w, g @ w.T, x.T @ g))

    def run_ours() -> Any:
        return [multiply(*x) for x, (*_, n) in zip(ours, shapes, strict=True) for _ in range(n)]

    def run_theirs() -> None:
        for (x, w, g), (*_, n) in zip(theirs, shapes, strict=True):
            for _ in range(n):
                _ = x @ w, g @ w.T, x.T @ g

    return {"theirs": run_theirs, "ours": run_ours}
