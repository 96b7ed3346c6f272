"""A step on events and words together: each task's loss by hand, whatever rows it looks at, on parts and devices."""

import contextlib
import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import AskConfig, LossConfig
from moerec.convert.paths import flatten
from moerec.data.load import load_data
from moerec.data.pipeline.mixture import add_words
from moerec.nn.sharding import batch_sharding, make_mesh, param_shardings
from moerec.tasks import Draws, TaskSums, make_tasks
from moerec.tasks.base import find_rows
from moerec.train import step as step_module
from moerec.train.loop import make_stream, make_trainer
from moerec.train.run_dir import make_sizes
from moerec.train.state import init_state
from moerec.train.step import StepSums, make_train_step, sum_losses, total_loss
from moerec.types import EVENT, RECOMMEND, TOKEN
from tests.mixed import TASKS, make_mixed_config
from tests.small_model import fill, worst_gap

# A step of six rows has three of events, two of documents or one, and one of items with their texts or two.
CONFIG = make_mixed_config(batch_size=6)
MIX = dataclasses.replace(CONFIG.data.mix, events=3, documents=1.4, item_texts=1.6, max_tokens=6)
CONFIG = dataclasses.replace(
    CONFIG,
    data=dataclasses.replace(CONFIG.data, mix=MIX),
    model=dataclasses.replace(CONFIG.model, dropout=0.0, n_layers=1),
    loss=dataclasses.replace(CONFIG.loss, vocab_chunk=64, chunk=32),
    optim=dataclasses.replace(CONFIG.optim, clip_norm=0.0, warmup_steps=0, ema_decay=0.0),
)


@functools.cache
def load():
    """The data, and the first batches."""
    with tempfile.TemporaryDirectory() as folder:
        data = add_words(CONFIG, load_data(CONFIG.data, Path(folder)), Path(folder))
    stream = iter(make_stream(CONFIG, data, make_tasks(CONFIG)))
    return data, [next(stream) for _ in range(3)]


def make_params(config=CONFIG):
    return fill(jax.eval_shape(lambda: init_state(config, make_sizes(config, load()[0]))).params, stddev=0.2)


NO_DRAWS = {name: Draws() for name in TASKS}


def differentiate(config, params, batch):
    """The metrics of a batch and the gradient of its loss."""
    tasks = make_tasks(config)

    def loss(params, batch, catalog):
        return total_loss(sum_losses(params, batch, catalog, tasks, NO_DRAWS, config), config)

    return jax.jit(jax.grad(loss, has_aux=True))(params, batch, load()[0].catalog)


@functools.cache
def whole():
    return differentiate(CONFIG, make_params(), load()[1][1])


def test_each_tasks_loss_is_the_mean_over_its_own_targets():
    data, batches = load()
    batch, params = batches[1], make_params()

    @jax.jit
    def encode(params, batch, catalog):
        catalog = params.bind(catalog)
        return params.encode(batch, catalog).state_BTD, catalog

    state_BTD, catalog = encode(params, batch, data.catalog)
    state_BTD = np.asarray(state_BTD, np.float64)
    item_DI, bias_I = np.asarray(catalog.vector_ID, np.float64).T, np.asarray(catalog.bias_I, np.float64)
    token_DV = np.asarray(flatten(params)["token_encoder/row_VD"], np.float64).T
    if "text_head/row_VD" in flatten(params):
        token_DV = np.asarray(flatten(params)["text_head/row_VD"], np.float64).T
    metrics = whole()[1]
    for place, name in enumerate(TASKS):
        label_BT, weight_BT = batch.targets[name]
        total, n = 0.0, 0
        for b, t in zip(*np.nonzero(weight_BT), strict=True):
            is_item = name in ("next_event", "text_to_item")
            logit = state_BTD[b, t] @ (item_DI if is_item else token_DV) + (bias_I if is_item else 0)
            if is_item:  # those that nobody chose are no candidates, but where they are the target
                wanted = (np.asarray(data.catalog.count_I) > 0) | (np.arange(len(logit)) == label_BT[b, t])
                logit = np.where(wanted, logit, -np.inf)
            total -= logit[label_BT[b, t]] - np.log(np.sum(np.exp(logit - logit.max()))) - logit.max()
            n += 1
        prefix = f"{name}/" if place else ""
        assert n > 1
        assert metrics[f"{prefix}slots"] == n
        assert float(metrics[f"{prefix}loss"]) == pytest.approx(total / n, rel=2e-5), name


def test_shares_are_those_of_the_slots_of_rows_with_a_target_of_the_task():
    _, batches = load()
    batch, metrics = batches[1], whole()[1]
    n_B = (batch.segment_BT > 0).sum(axis=1)
    for place, name in enumerate(TASKS):
        rows = batch.targets[name].weight_BT.any(axis=1)
        assert metrics["share" if place == 0 else f"{name}/share"] == pytest.approx(n_B[rows].sum() / n_B.sum())


KINDS = {"next_event": {EVENT, RECOMMEND}, "lm": {TOKEN}, "item_to_text": {EVENT, RECOMMEND, TOKEN}}


def test_kinds_of_slots_are_in_the_rows_of_their_streams():
    for name, kinds in KINDS.items():
        found = set()
        for batch in load()[1]:
            found |= set(batch.kind_BT[batch.targets[name].weight_BT.any(axis=1)].ravel().tolist())
        assert found - {0} == kinds


def test_rows_that_a_task_does_not_look_at_have_no_target_of_it():
    for batch in load()[1]:
        for name in TASKS:
            rows = find_rows(name, CONFIG, 6)
            assert rows != slice(0, 6)
            outside = np.delete(batch.targets[name].weight_BT, rows, axis=0)
            assert not outside.any()


def test_losses_and_gradients_are_those_of_looking_at_all_rows(monkeypatch):
    monkeypatch.setattr(step_module, "find_rows", lambda name, config, n_rows: slice(0, n_rows))
    grads, metrics = differentiate(CONFIG, make_params(), load()[1][1])
    expected, expected_metrics = whole()
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {k: float(v) for k, v in expected_metrics.items()}
    )
    assert worst_gap(grads, expected) < 1e-5


@pytest.mark.parametrize("mesh", [(2, 1, 2)], ids=str)
def test_losses_and_gradients_on_a_mesh_are_those_of_one_device(mesh):
    on, (expected, expected_metrics) = make_mesh(*mesh), whole()
    with jax.set_mesh(on):
        params = jax.device_put(make_params(), param_shardings(make_params(), on))
        grads, metrics = differentiate(CONFIG, params, jax.device_put(load()[1][1], batch_sharding(on)))
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {k: float(v) for k, v in expected_metrics.items()}, rel=1e-4
    )
    assert worst_gap(grads, expected) < 1e-4


def step_once(n_microbatches: int):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, n_microbatches=n_microbatches))
    tasks, (data, batches) = make_tasks(config), load()
    state = jax.eval_shape(lambda: init_state(config, make_sizes(config, data)))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)._replace(params=make_params())
    constants = {task.name: task.constants(data.catalog, config) for task in tasks}
    state, metrics = jax.jit(make_train_step(config, tasks))(state, batches[1], data.catalog, constants)
    return state.params, {name: float(x) for name, x in metrics.items()}


def test_microbatches_give_the_step_of_the_whole_batch():
    """Though the streams' rows fall on them unevenly."""
    params, metrics = step_once(1)
    others, other_metrics = step_once(2)
    assert other_metrics == pytest.approx(metrics, rel=1e-4)
    assert worst_gap(others, params) < 2e-5
    assert worst_gap(params, make_params()) > 1e-3


def test_weights_of_tasks_multiply_their_means():
    config = dataclasses.replace(CONFIG, loss=LossConfig(task_weights=("lm=.25", "item_to_text=0")))
    sums = StepSums({name: TaskSums(jnp.float32(12 * k), jnp.float32(k + 1), {}) for k, name in enumerate(TASKS)}, None)
    means = [0, 12 / 2, 24 / 3, 36 / 4]
    assert float(total_loss(sums, CONFIG)[0]) == pytest.approx(sum(means))
    assert float(total_loss(sums, config)[0]) == pytest.approx(0.25 * means[1] + means[2])


def test_a_control_token_behind_words_asks_the_service_of_its_item(monkeypatch):
    """In training, where services are asked; words ask nobody."""
    asked = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, ask=AskConfig(from_layer=1), n_layers=2)
    )
    data, batches = load()
    catalog, seen = jax.tree.map(jnp.asarray, data.catalog), {}

    class Stop(Exception):
        pass

    class Params:
        n_services = len(data.dataset.catalogue.services)

        def bind(self, catalog):
            return catalog

        def encode(self, batch, catalog, key, **options):
            seen.update(options)
            raise Stop

    with contextlib.suppress(Stop):
        sum_losses(Params(), batches[1], catalog, make_tasks(asked), NO_DRAWS, asked)
    service_I, batch = np.asarray(data.catalog.service_I), batches[1]
    for b, t in np.ndindex(*batch.kind_BT.shape):
        expected = -1  # or whom a slot of the past asks: the service of the event behind it
        if t + 1 < batch.kind_BT.shape[1] and batch.segment_BT[b, t] == batch.segment_BT[b, t + 1]:
            expected = batch.service_BT[b, t + 1] if batch.kind_BT[b, t + 1] == EVENT else -1
        for name in ("next_event", "text_to_item"):
            if batch.targets[name].weight_BT[b, t]:
                expected = service_I[batch.targets[name].label_BT[b, t]]
        assert seen["hypothesis_BT"][b, t] == expected


def test_steps_go_on_from_a_position_to_the_bit_and_nothing_is_compiled_anew():
    data, _ = load()
    trainer = make_trainer(CONFIG, data)
    host = jax.tree.map(np.asarray, trainer.state)
    placed = jax.tree.map(lambda x: x.sharding, trainer.state)

    def begin(state):
        return jax.device_put(jax.tree.map(np.copy, state), placed, may_alias=False)

    with contextlib.closing(iter(trainer.stream)) as stream:
        state = begin(host)
        for _ in range(3):
            state, _ = trainer.step(state, next(stream))
        kept, position = jax.tree.map(np.asarray, state), stream.get_state()
        for _ in range(3):
            state, metrics = trainer.step(state, next(stream))
    with contextlib.closing(iter(trainer.stream)) as stream:
        next(stream)
        stream.set_state(position)
        resumed = begin(kept)
        for _ in range(3):
            resumed, other = trainer.step(resumed, next(stream))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in other.items()}
    assert trainer.train_step._cache_size() == 1
