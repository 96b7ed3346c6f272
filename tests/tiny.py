"""A run that is over in seconds: the built-in world, shrunk; and runs that were never trained."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import CityConfig, Config, DataConfig, EvalConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from moerec.data.load import RunData, load_data
from moerec.nn.block import zero_router_bias
from moerec.nn.model import Predictor, SequenceModel
from moerec.tasks.base import Task
from moerec.train import loop
from moerec.train.run_dir import Run, bind_catalog, make_sizes
from moerec.train.state import TrainState
from moerec.train.step import Constants, TrainStep
from moerec.types import Batch, Catalog


def make_config(**train) -> Config:
    """A tiny configuration; keywords replace fields of `train`."""
    steps = {"steps": 12, "batch_size": 4, "log_every": 2, "eval_every": 4, "save_every": 3, "n_valid": 40}
    return Config(
        name="tiny",
        data=DataConfig(
            city=CityConfig(n_users=60, events_per_user=12, items_per_service=30), seq_len=32, history_len=16
        ),
        model=ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24, d_text=8),
        loss=LossConfig(kind="full_softmax", chunk=64),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=3, ema_decay=0.9),
        train=TrainConfig(**{**steps, **train}),
        eval=EvalConfig(mask_seen=False, batch_size=32, n_boot=50),
        baselines=("popularity", "markov"),
    )


def make_untrained(folder: Path, config: Config, fill: Any = None) -> Run:
    """A run as it is opened again, with parameters that are as initialised, or filled."""
    data = load_data(config.data, folder)
    sizes = make_sizes(config, data)

    def init() -> SequenceModel:
        return SequenceModel(jax.random.key(config.seed), config.model, sizes)

    # Only shapes are filled: nothing is compiled for them.
    params = jax.jit(init)() if fill is None else fill(jax.eval_shape(init))
    return make_run(folder, config, data, params, zero_router_bias(config.model, sizes.n_services))


def make_run(folder: Path, config: Config, data: RunData, params: SequenceModel, router_bias_LE: Any = None) -> Run:
    """A run of these parts, in the place of what would be read from its folder."""
    predictor = Predictor(params, router_bias_LE)
    return replace_parts(
        Run(folder), config=config, data=data, predictor=predictor, catalog=bind_catalog(predictor, data.catalog)
    )


def replace_parts(run: Run, **parts: Any) -> Run:
    """The run with parts in the place of what it has read, or would read."""
    other = Run(run.folder)
    vars(other).update({**vars(run), **parts})
    return other


def make_moving_step(config: Config, tasks: list[Task]) -> TrainStep:
    """In the place of `make_train_step`: moves every parameter off where it started, without a gradient to compile."""

    def step(state: TrainState, batch: Batch, catalog: Catalog, constants: Constants):
        params = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.params)
        slots = jnp.sum(batch.targets[config.tasks[0]].weight_BT)
        average = None if state.average is None else params
        return state._replace(step=state.step + 1, params=params, average=average), {"loss": 1.0, "slots": slots}

    return step


@contextlib.contextmanager
def share_trainers() -> Iterator[None]:
    """Runs that differ only in when they log, save, validate and stop have one trainer, each with a fresh state.

    Even where programs are read from a cache on disk, tracing and reading those of a step takes seconds.
    """
    make, made = loop.make_trainer, {}

    def make_shared(config: Config, data: RunData) -> loop.Trainer:
        train = dataclasses.replace(config.train, log_every=1, save_every=1, eval_every=0, patience=0)
        key = data.digest, repr(dataclasses.asdict(dataclasses.replace(config, train=train, baselines=())))
        if key not in made:
            trainer = make(config, data)
            # The first step gives up the memory of the state that it is handed: of it there is a copy on the host.
            copy = jax.tree.map(lambda x: np.array(x), trainer.state)
            made[key] = trainer, copy, jax.tree.map(lambda x: x.sharding, trainer.state)
        trainer, copy, placed = made[key]
        return trainer._replace(state=jax.device_put(copy, placed, may_alias=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_trainer", make_shared)
        yield
