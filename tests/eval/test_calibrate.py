"""Gates fitted on validation, and how a calibration is told and read again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.data.load import load_data
from moerec.eval.ranking import make_valid_set, rank_targets
from moerec.eval.ranking.calibrate import calibrate, fit_gates
from moerec.nn.model import Calibration, Predictor, SequenceModel, pick_calibration, read_calibration
from moerec.train.run_dir import make_sizes
from tests.tiny import make_config


def draw_mixture(n: int, shift_GX: np.ndarray, group_Q: np.ndarray):
    """Gates, and items drawn from mixtures whose gates are shifted; log-weights and log-parts of what was drawn."""
    rng = np.random.default_rng(3)
    n_parts, n_items = shift_GX.shape[1], 6
    logit_QX = rng.normal(size=(n, n_parts))
    part_QXI = rng.dirichlet(np.full(n_items, 0.3), (n, n_parts))
    true_QX = np.exp(logit_QX + shift_GX[group_Q])
    true_QX /= true_QX.sum(axis=1, keepdims=True)
    cdf_QI = np.cumsum(np.einsum("QX,QXI->QI", true_QX, part_QXI), axis=1)
    drawn_Q = np.minimum((rng.random(n)[:, None] > cdf_QI).sum(axis=1), n_items - 1)
    log_weight_QX = logit_QX - np.log(np.exp(logit_QX).sum(axis=1, keepdims=True))
    return log_weight_QX, np.log(part_QXI[np.arange(n), :, drawn_Q])


@pytest.mark.parametrize("n_groups", [1, 3])
def test_gates_that_were_shifted_are_found(n_groups):
    rng, n = np.random.default_rng(1), 60_000
    shift_GX, group_Q = rng.normal(size=(n_groups, 3)), rng.integers(0, n_groups, n)
    found = fit_gates(*draw_mixture(n, shift_GX, group_Q), group_Q, n_groups)
    centred, expected = (x - x.mean(axis=1, keepdims=True) for x in (found, shift_GX))
    np.testing.assert_allclose(centred, expected, atol=0.08)
    assert found.dtype == np.float32
    # Only differences matter: of all that fit the prior takes the smallest.
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-3)


def test_few_targets_move_gates_little_and_none_does_not():
    weight, part = np.log([[0.5, 0.5]]), np.array([[0.0, -np.inf]])
    shift = fit_gates(weight, part, np.zeros(1, int), 2)
    assert 0 < shift[0, 0] < 0.5
    np.testing.assert_array_equal(shift[1], 0)


@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_a_calibration_is_read_as_it_was_told(shape):
    told = Calibration(1.7, np.random.default_rng(0).normal(size=shape).astype(np.float32))
    metrics = {"valid/union/ndcg@10": 0.1, **told.list_metrics(), "valid/gates": 3.0}
    kept = pick_calibration(metrics)
    assert set(kept) == set(told.list_metrics())
    found = read_calibration(kept)
    assert found.temperature == told.temperature
    np.testing.assert_array_equal(found.gate_shift, told.gate_shift)


def test_numbers_of_no_calibration_are_refused():
    assert read_calibration({}) == Calibration()
    for metrics in (
        {"valid/temperature": 0.0},
        {"valid/temperature": float("nan")},
        {"valid/gate/0/0": 1.0, "valid/gate/1/1": 1.0},
        {"valid/gate/x": 1.0},
    ):
        with pytest.raises(ValueError, match=r"temperature|gate|invalid literal"):
            read_calibration(metrics)


@pytest.mark.parametrize("is_asked", [True, False])
def test_calibration_makes_validation_targets_more_likely_and_leaves_the_predictor_as_it_was(tmp_path, is_asked):
    config = make_config(steps=1)
    model = dataclasses.replace(
        config.model, pointer="services", text_pointer=True, transition_pointer=True, crossing_pointer=True
    )
    if is_asked:
        model = dataclasses.replace(model, ask=dataclasses.replace(model.ask, from_layer=1, d_analyser=8))
    data_config = dataclasses.replace(config.data, text_neighbors=4, transition_neighbors=4, crossing_neighbors=4)
    config = dataclasses.replace(config, model=model, data=data_config)
    data = load_data(config.data, tmp_path)
    model = jax.jit(lambda key: SequenceModel(key, config.model, make_sizes(config, data)))(jax.random.key(0))
    catalog = jax.jit(lambda m, c: m.bind(c))(model, jax.tree.map(jnp.asarray, data.catalog))
    predictor, examples = Predictor(model, None), make_valid_set(config, data)
    before = jax.tree.map(np.asarray, model)
    calibration = calibrate(predictor, catalog, examples)
    n_components = model.head.aggregator.gate_bias.shape[-1]
    n_services = data.dataset.catalogue.n_services
    assert calibration.gate_shift.shape == ((n_services, n_components) if is_asked else (n_components,))
    log_p = [rank_targets(p, examples, catalog).log_p.mean() for p in (predictor, calibration.apply(predictor))]
    assert log_p[1] > log_p[0] + 0.01
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(predictor.params), strict=True):
        np.testing.assert_array_equal(old, new)
