"""A step from shapes alone: that of the trainer, and what it can be made and run without."""

import contextlib
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moerec.config import MoEConfig, PersonalConfig
from moerec.data.load import load_data
from moerec.nn.sharding import make_mesh, mesh_of
from moerec.tasks import make_tasks
from moerec.train.loop import make_stream, make_trainer
from moerec.train.run_dir import make_sizes
from moerec.train.step import abstract_batch, lower_train_step
from tests.tiny import make_config

ROOT = Path(__file__).resolve().parents[2]


def make_own(**train):
    """With experts, a profile, pointers and drawn negatives."""
    config = make_config(**train)
    moe = MoEConfig(layers=(1,), n_per_group=1, d_expert=8, tile=8)
    personal = PersonalConfig(layers=(1,), n_aspects=2, d_memory=4)
    model = dataclasses.replace(config.model, moe=moe, personal=personal, pointer="services")
    loss = dataclasses.replace(config.loss, kind="sampled_softmax", n_negatives=16, sampling_power=0.5)
    return dataclasses.replace(config, model=model, loss=loss)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data(make_own().data, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("mesh", [None, (2, 1, 2)])
def test_a_step_lowered_from_shapes_is_the_trainers(data, mesh):
    """The same program to the letter: its arguments, where they and its results lie, and which are given up."""
    shape = (1, 1, 1) if mesh is None else mesh
    config = make_own(mesh_data=shape[0], mesh_expert=shape[1], mesh_model=shape[2], n_microbatches=2)
    trainer = make_trainer(config, data)
    with contextlib.closing(iter(trainer.stream)) as stream:
        batch = next(stream)
    arguments = trainer.state, batch, trainer.catalog, trainer.constants
    # The shapes are of the longest texts that the tokenizer lets through; the data's own table is narrower.
    width = trainer.catalog.token_IW.shape[1]
    assert width < config.data.item_width
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens=width, max_attributes=0))
    lowered = lower_train_step(own, make_sizes(config, data), None if mesh is None else make_mesh(*mesh))
    step = trainer.train_step
    if mesh is None:  # from shapes without a place
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        step = jax.jit(step.__wrapped__, donate_argnums=0)
    with mesh_of(trainer.state):
        expected = step.lower(*arguments)
    assert (lowered.in_tree, lowered.out_tree) == (expected.in_tree, expected.out_tree)
    lines = itertools.zip_longest(lowered.as_text().splitlines(), expected.as_text().splitlines())
    assert [pair for pair in lines if pair[0] != pair[1]][:3] == []


@pytest.mark.parametrize("first_event", [True, False])
def test_the_shapes_are_those_of_the_stream(data, first_event):
    config = make_own()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, first_event=first_event))
    tasks = make_tasks(config)
    with contextlib.closing(iter(make_stream(config, data, tasks))) as stream:
        batch = jax.device_put(next(stream))
    found = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_batch(config, make_sizes(config, data), tasks))
    assert found == shapes


BARE = """
import sys

BLOCKED = ("grain", "ml_collections", "array_record", "pyarrow")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
import moerec.config, moerec.config.cli, moerec.nn.model, moerec.tasks, moerec.train.step
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from moerec.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from moerec.nn.model import ModelSizes
from moerec.nn.sharding import make_mesh, param_shardings
from moerec.tasks import make_tasks
from moerec.train.state import init_state
from moerec.train.step import abstract_batch, lower_train_step
from moerec.types import Catalog

sizes = ModelSizes(n_items=6, n_tokens=5, n_services=2, n_actions=1, context_sizes=(3,), has_control=True)
moe = MoEConfig(layers=(0,), n_per_group=1, d_expert=8, tile=8)
config = Config(
    data=DataConfig(seq_len=8, history_len=8, max_tokens=3, max_attributes=0),
    model=ModelConfig(n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, d_head=8, d_ff=8, d_text=4, moe=moe),
    train=TrainConfig(steps=1, batch_size=2),
)
tasks = make_tasks(config)
compiled = lower_train_step(config, sizes).compile()
batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_batch(config, sizes, tasks))
arrays = np.repeat([0, 1], 3).astype(np.int32), np.ones((6, 3), np.int32), np.ones(6, np.float32)
catalog = Catalog(*map(jnp.asarray, arrays))
constants = {task.name: jax.tree.map(jnp.asarray, task.constants(catalog, config)) for task in tasks}
state = jax.jit(lambda: init_state(config, sizes))()
placed = param_shardings(state, make_mesh(1, 1, 1))  # as the trainer has it
state, metrics = compiled(jax.device_put(state, placed), batch, catalog, constants)
assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(placed)))
assert int(state.step) == 1 and np.isfinite(float(metrics["loss"])), metrics
print("done", [name for name in BLOCKED if name in sys.modules])
"""


def test_a_step_is_made_and_run_without_the_loader_and_the_shell():
    """Where neither grain nor ml_collections, array_record and pyarrow are installed."""
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done []\n"), done.stderr
