"""Full ranking by the size of the catalogue: users a second, and memory, on made-up items and histories."""

import dataclasses
import multiprocessing
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import AskConfig, Config, MoEConfig
from moerec.data.dataset import SECOND_US, Dataset, EventLog, ItemTable
from moerec.errors import InputError
from moerec.eval.bench.step import median_seconds
from moerec.eval.ranking import EvalDataset, rank_batch, rank_targets
from moerec.nn.block import zero_router_bias
from moerec.nn.heads.near_pointers import CROSSINGS, near_names
from moerec.nn.model import ModelSizes, Predictor, SequenceModel
from moerec.train.run_dir import bind_catalog
from moerec.types import Catalog, NearItems

MODELS = ("dense", "mixture", "asked")
N_SERVICES, N_WORDS, N_TOKENS = 6, 16, 5000
N_BATCHES = 2  # of users, whose ranking is timed


def measure_ranking(
    config: Config, sizes: Sequence[int], models: Sequence[str] = MODELS, repeats: int = 3
) -> Iterator[dict[str, Any]]:
    """A row for each size and model: `{model, n_items, users_per_s, temporary_gib, bind_gib, peak_gib}`.

    The models have the shape of the config's and random weights: `dense`, a softmax alone; `mixture`, with the
    config's pointers; `asked`, with these and every service asked. Temporaries are what the compiled ranking of a
    batch, and the computation of all items' vectors (`bind`), hold beside their arguments and results; the peak is a
    process's own, catalogue and compiler included.

    Args:
      sizes: items of the catalogues. models: which of the three.

    Raises:
      InputError: a catalogue has fewer than 100 items, or a model is none of the three.
    """
    if min(sizes, default=0) < 100:
        raise InputError("--items: a catalogue of at least 100 items is needed")
    if not set(models) <= set(MODELS):
        raise InputError(f"--models: {','.join(models)!r} are not all of {', '.join(MODELS)}")
    for n_items in sizes:
        for model in models:
            # Peak memory is a process's, and a fork would begin with ours.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                yield pool.apply(_measure, (config, n_items, model, repeats))


def _measure(config: Config, n_items: int, model: str, repeats: int) -> dict[str, Any]:
    config = _shape(config, model)
    dataset, catalog = _draw_dataset(config, n_items), _draw_catalog(config, n_items)
    sizes = ModelSizes(n_items, N_TOKENS, N_SERVICES, 1, (), service_offsets=tuple(dataset.catalogue.offsets.tolist()))
    params = jax.jit(lambda: SequenceModel(jax.random.key(0), config.model, sizes))()
    predictor = Predictor(params, zero_router_bias(config.model, N_SERVICES))
    catalog = jax.tree.map(jnp.asarray, catalog)
    bind_bytes = _temporary_bytes(bind_catalog, predictor, catalog)
    catalog = bind_catalog(predictor, catalog)
    targets = dataset.log.offsets[1:] - 1
    examples = EvalDataset(dataset, targets, config)
    _, batch, queries = next(examples.batches())
    rank_bytes = _temporary_bytes(rank_batch, predictor, batch, queries, catalog, None)
    seconds = median_seconds(lambda: rank_targets(predictor, examples, catalog).union.greater, repeats)
    return {
        "model": model,
        "n_items": n_items,
        "users_per_s": len(targets) / seconds,
        "temporary_gib": rank_bytes / 2**30,
        "bind_gib": bind_bytes / 2**30,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _temporary_bytes(jitted: Any, *arguments: Any) -> int:
    return jitted.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def _shape(config: Config, model: str) -> Config:
    shape = config.model
    if model == "dense":
        near: dict[str, Any] = {f"{name}_pointer": False for name in ("text", "transition", "crossing")}
        shape = dataclasses.replace(
            shape, **near, pointer="none", moe=MoEConfig(), ask=AskConfig(), pointer_time_bias=False
        )
    elif model == "mixture":
        shape = dataclasses.replace(shape, moe=MoEConfig(), ask=AskConfig(), pointer_time_bias=False)
    elif not shape.is_asked:
        shape = dataclasses.replace(shape, ask=dataclasses.replace(shape.ask, from_layer=1))
    data = dataclasses.replace(config.data, first_event=False)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(shape, item_states=False))


def _offsets(n_items: int) -> np.ndarray:
    """Services of unlike sizes, the first of them the largest."""
    return n_items - n_items * np.arange(N_SERVICES, -1, -1) ** 2 // N_SERVICES**2


def _draw_dataset(config: Config, n_items: int) -> Dataset:
    """Users with 5 to 20 events, the last of which are the targets."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(5, 21, N_BATCHES * config.eval.batch_size))])
    n = int(offsets[-1])
    none, names = np.full(n_items, ""), tuple(f"service {z}" for z in range(N_SERVICES))
    log = EventLog(
        offsets,
        rng.integers(0, n_items, n).astype(np.int32),
        np.zeros(n, np.int16),
        (1_400_000_000 + 3600 * np.arange(n, dtype=np.int64)) * SECOND_US,
        np.zeros((n, 0), np.int16),
    )
    users = np.arange(len(offsets) - 1).astype(str)
    return Dataset(ItemTable(names, _offsets(n_items), none, none, none), log, users)


def _draw_catalog(config: Config, n_items: int) -> Catalog:
    rng, offsets = np.random.default_rng(1), _offsets(n_items)
    service_I = np.repeat(np.arange(N_SERVICES, dtype=np.int32), np.diff(offsets))
    near = {}
    for name in near_names(config.model):
        low, size = (0, n_items) if name == CROSSINGS else (offsets[service_I], np.diff(offsets)[service_I])
        width = config.data.neighbor_widths.get(name, 1)
        place_XI = low + (rng.random((width, n_items), np.float32) * size * 0.999).astype(np.int32)
        weight_IX = np.broadcast_to(np.linspace(1, 0.1, width, dtype=np.float32), (n_items, width))
        near[name] = NearItems(place_XI.T.astype(np.int32), weight_IX)
    token_IW = rng.integers(0, N_TOKENS, (n_items, N_WORDS), np.int32)
    return Catalog(service_I, token_IW, rng.integers(0, 9, n_items).astype(np.float32), near=near)
