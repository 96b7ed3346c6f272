"""Asked models on fake devices: training and scores are those of one device."""

import dataclasses

import jax
import numpy as np
import pytest

from moerec.config import AskConfig, Config
from moerec.nn.model import Predictor
from moerec.nn.sharding import make_mesh, mesh_of, param_shardings, replicated
from moerec.train.state import start_state
from tests.nn.test_asking import ASKED_SIZES, CATALOG
from tests.nn.test_sharding import BATCHES, make_run_config, train_batches
from tests.small_model import make_model, worst_gap


def make_asked_config(n_data: int, n_expert: int, n_model: int, strategy: str) -> Config:
    """Experts, a profile and all pointers; some rows are dropped."""
    config = make_run_config(n_data, n_expert, n_model, "full_softmax", "union", strategy, "ema")
    ask, data = (
        AskConfig(from_layer=1, d_analyser=8),
        dataclasses.replace(config.data, text_neighbors=3, transition_neighbors=3, crossing_neighbors=5),
    )
    near = {"text_pointer": True, "transition_pointer": True, "crossing_pointer": True}
    model = dataclasses.replace(
        config.model, ask=ask, row_dropout=0.2, pointer_time_bias=True, repeat_bias=True, **near
    )
    return dataclasses.replace(config, data=data, model=model)


def train(mesh: tuple[int, int, int] | None, strategy: str):
    """Parameters and Adam's mean gradients after two steps, the last loss, and how often the step was compiled."""
    config = make_asked_config(*(mesh or (1, 1, 1)), strategy)
    state = start_state(config, make_model(config.model, 1, ASKED_SIZES))
    _, state, loss, n_compiled = train_batches(config, state, CATALOG, make_mesh(*mesh) if mesh else None)
    (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
    return jax.tree.leaves(state.params), jax.tree.leaves(adam.mu), loss, n_compiled


def share_apart(params, others, tolerance: float) -> float:
    """Share of the parameters that differ by more than `tolerance`."""
    return np.mean(np.concatenate([np.ravel(np.abs(w - v) > tolerance) for w, v in zip(params, others, strict=True)]))


@pytest.fixture(scope="module")
def alone():
    return train(None, "all_gather")


@pytest.mark.parametrize(
    ("mesh", "strategy"), [((2, 2, 2), "all_to_all"), ((1, 4, 1), "all_gather"), ((2, 1, 2), "all_gather")]
)
def test_sharded_training_is_unsharded_training(mesh, strategy, alone):
    params, gradients, loss, n_compiled = train(mesh, strategy)
    alone_params, alone_gradients, alone_loss, _ = alone
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    assert worst_gap(gradients, alone_gradients) < 1e-7
    # Of the rounding of a gradient that is all but zero Adam makes a step either way.
    assert share_apart(params, alone_params, 2e-6) < 1e-3
    assert n_compiled == 1


def test_sharded_answers_are_unsharded_answers():
    config = make_asked_config(2, 2, 2, "all_to_all")
    model = make_model(config.model, 1, ASKED_SIZES)
    slot_Q = np.array([-1, 4, 7, 15, 20], np.int32)

    @jax.jit
    def score_placed(model, batch, catalog):
        predictor, bound = Predictor(model, None, 1.2), model.head.bind(catalog, model.item_encoder, most=40)
        in_blocks = predictor.map_scores(lambda score_QI: score_QI, batch, slot_Q, bound, most=2 * ASKED_SIZES.n_items)
        return predictor.score(batch, slot_Q, bound), in_blocks

    def score(model, batch, catalog):
        with mesh_of(model):
            return score_placed(model, batch, catalog)

    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(model, param_shardings(model, mesh))
    sharded = score(placed, BATCHES[0], jax.device_put(CATALOG, replicated(mesh)))
    alone, in_blocks = score(model, BATCHES[0], CATALOG)
    for found in (*sharded, in_blocks):
        np.testing.assert_allclose(found, alone, atol=3e-5)
