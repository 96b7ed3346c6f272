"""Gates fitted on validation, and how a calibration is told and read again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.data.load import load_data
from moerec.eval.metrics import per_target_metrics
from moerec.eval.ranking import make_valid_set, rank_targets
from moerec.eval.ranking.calibrate import calibrate
from moerec.eval.ranking.gates import NDCG_WEIGHT, GateTargets, fit_gates, read_gates, smooth_ndcg
from moerec.eval.ranking.rank import rank_batch
from moerec.nn.model import Calibration, Predictor, SequenceModel, pick_calibration, read_calibration
from moerec.train.run_dir import make_sizes
from tests.tiny import make_config


def make_targets(log_weight_QX: np.ndarray, log_part_QCX: np.ndarray, is_rival: bool = True) -> GateTargets:
    """Targets that are all ranked, among all the other candidates or among none."""
    n, n_candidates = log_part_QCX.shape[:2]
    is_rival_QC = np.broadcast_to(is_rival & (np.arange(n_candidates) > 0), (n, n_candidates))
    return GateTargets(log_weight_QX, log_part_QCX, is_rival_QC, np.ones(n, bool))


def draw_mixture(n: int, shift_GX: np.ndarray, group_Q: np.ndarray):
    """Gates, and items drawn from mixtures whose gates are shifted: what the gates are fitted to, without rivals."""
    rng = np.random.default_rng(3)
    n_parts, n_items = shift_GX.shape[1], 6
    logit_QX = rng.normal(size=(n, n_parts))
    part_QXI = rng.dirichlet(np.full(n_items, 0.3), (n, n_parts))
    true_QX = np.exp(logit_QX + shift_GX[group_Q])
    true_QX /= true_QX.sum(axis=1, keepdims=True)
    cdf_QI = np.cumsum(np.einsum("QX,QXI->QI", true_QX, part_QXI), axis=1)
    drawn_Q = np.minimum((rng.random(n)[:, None] > cdf_QI).sum(axis=1), n_items - 1)
    log_weight_QX = logit_QX - np.log(np.exp(logit_QX).sum(axis=1, keepdims=True))
    log_part_Q1X = np.log(part_QXI[np.arange(n), :, drawn_Q])[:, None]
    return make_targets(log_weight_QX, log_part_Q1X)


@pytest.mark.parametrize("n_groups", [1, 3])
def test_gates_that_were_shifted_are_found(n_groups):
    rng, n = np.random.default_rng(1), 60_000
    shift_GX, group_Q = rng.normal(size=(n_groups, 3)), rng.integers(0, n_groups, n)
    found = fit_gates(draw_mixture(n, shift_GX, group_Q), group_Q, n_groups, by_service=n_groups > 1)
    found = found.reshape(n_groups, 3)
    centred, expected = (x - x.mean(axis=1, keepdims=True) for x in (found, shift_GX))
    np.testing.assert_allclose(centred, expected, atol=0.1)
    assert found.dtype == np.float32
    # Only differences matter: of all that fit the prior takes the smallest.
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-2)


def test_few_targets_move_gates_little_and_none_does_not():
    one = make_targets(np.log([[0.5, 0.5]]), np.array([[[0.0, -80.0]]]))
    shift = fit_gates(one, np.zeros(1, int), 2, by_service=True)
    assert 0 < shift[1, 0] < shift[0, 0] < 0.5  # a service without targets has what is common to all
    nothing = make_targets(np.zeros((0, 2)), np.zeros((0, 1, 2)))
    np.testing.assert_array_equal(fit_gates(nothing, np.zeros(0, int), 2, by_service=False), [0, 0])


def make_contest(n: int) -> GateTargets:
    """Two components are as likely to give the targets, but only the first one puts them before their rivals."""
    rng = np.random.default_rng(0)
    target_Q2 = np.log(np.full((n, 2), 0.01))
    rival_Q2 = np.log(np.stack([rng.uniform(0.002, 0.008, n), rng.uniform(0.012, 0.03, n)], axis=1))
    return make_targets(np.log(np.full((n, 2), 0.5)), np.stack([target_Q2, *[rival_Q2] * 20], axis=1))


def test_gates_are_fitted_to_the_order_too():
    contest, service_Q = make_contest(500), np.zeros(500, int)
    first, second = fit_gates(contest, service_Q, 1, by_service=False)
    assert first > second + 0.5
    for without in (
        contest._replace(is_rival_QC=np.zeros_like(contest.is_rival_QC)),
        contest._replace(is_ranked_Q=np.zeros(500, bool)),
    ):
        np.testing.assert_allclose(fit_gates(without, service_Q, 1, by_service=False), 0, atol=1e-4)


def test_a_small_service_does_not_decide_for_a_large_one():
    """One target with rivals among two thousand to which gates make no difference."""
    contest, service_Q = make_contest(2001), np.arange(2001) // 2000
    contest = contest._replace(is_rival_QC=contest.is_rival_QC & (service_Q == 1)[:, None])
    shift = fit_gates(contest, service_Q, 2, by_service=True)
    assert 0 < shift[1, 0] < 2
    alone = fit_gates(GateTargets(*(x[-1:] for x in contest)), np.zeros(1, int), 1, by_service=False)
    assert shift[0, 0] < alone[0] + 0.1


def test_smooth_ndcg_is_that_of_clear_ranks():
    score_QC = np.array([[5.0, 1.0, 2.0, 3.0], [2.0, 5.0, 4.0, 0.0], [0.0, *[9.0] * 3]])
    is_rival_QC = np.array([[False, True, True, True]] * 3)
    found = np.asarray(smooth_ndcg(score_QC, is_rival_QC))
    np.testing.assert_allclose(found, 1 / np.log2(1 + np.array([1, 3, 4])), rtol=2e-3)
    many = np.concatenate([np.zeros((1, 1)), np.ones((1, 30))], axis=1)
    assert smooth_ndcg(many, np.arange(31)[None] > 0)[0] < 1e-6
    assert smooth_ndcg(many, np.arange(31)[None] > 21)[0] == pytest.approx(1 / np.log2(11), rel=0.4)


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


def make_run(folder, is_asked: bool):
    """A model with all pointers to neighbors as it begins, its catalogue, and validation's targets."""
    config = make_config(steps=1)
    model = dataclasses.replace(
        config.model, pointer="services", text_pointer=True, transition_pointer=True, crossing_pointer=True
    )
    if is_asked:
        model = dataclasses.replace(model, ask=dataclasses.replace(model.ask, from_layer=1, d_analyser=8))
    data_config = dataclasses.replace(config.data, text_neighbors=4, transition_neighbors=4, crossing_neighbors=4)
    evaluation = dataclasses.replace(config.eval, mask_seen=True)
    config = dataclasses.replace(config, model=model, data=data_config, eval=evaluation)
    data = load_data(config.data, folder)
    model = jax.jit(lambda key: SequenceModel(key, config.model, make_sizes(config, data)))(jax.random.key(0))
    catalog = jax.jit(lambda m, c: m.bind(c))(model, jax.tree.map(jnp.asarray, data.catalog))
    return Predictor(model, None), catalog, make_valid_set(config, data)


@pytest.mark.parametrize("is_asked", [True, False])
def test_calibration_improves_what_it_is_fitted_to_and_leaves_the_predictor_as_it_was(tmp_path, is_asked):
    predictor, catalog, examples = make_run(tmp_path, is_asked)
    before = jax.tree.map(np.asarray, predictor.params)
    calibration = calibrate(predictor, catalog, examples)
    n_components = predictor.params.head.aggregator.gate_bias.shape[-1]
    n_services = examples.dataset.catalogue.n_services
    assert calibration.gate_shift.shape == ((n_services, n_components) if is_asked else (n_components,))

    def measure(calibration: Calibration) -> float:
        ranks = rank_targets(calibration.apply(predictor), examples, catalog)
        ndcg = per_target_metrics(ranks.in_service)["ndcg@10"]
        service = examples.target_service
        return ranks.log_p.mean() + NDCG_WEIGHT * np.mean([ndcg[service == z].mean() for z in range(n_services)])

    # The gates' part alone; places are of whole ranks, and not of smooth ones that gates are fitted to.
    assert measure(calibration) > measure(Calibration(calibration.temperature))
    assert np.abs(calibration.gate_shift).max() > 0.1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(predictor.params), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("is_asked", [True, False])
def test_targets_stand_among_their_rivals_where_the_evaluation_ranks_them(tmp_path, is_asked):
    predictor, catalog, examples = make_run(tmp_path, is_asked)
    _, batch, queries = next(iter(examples.batches()))
    found, log_domain_QZ = read_gates(predictor, batch, queries, catalog, n_rivals=len(catalog.service_I))
    assert (log_domain_QZ is not None) == is_asked
    score_QC = np.logaddexp.reduce(found.log_weight_QX[:, None] + found.log_part_QCX, axis=-1)
    ranks, known = rank_batch(predictor, batch, queries, catalog), np.asarray(queries.slot) >= 0
    missed = (np.asarray(queries.seen) == np.asarray(queries.target)[:, None]).any(axis=1)
    above = ((score_QC > score_QC[:, :1] + 1e-5) & np.asarray(found.is_rival_QC)).sum(axis=1)
    kept = known & ~missed
    assert kept.sum() > 10
    np.testing.assert_array_equal(above[kept], np.asarray(ranks.greater_in_service)[kept])
    # Of fewer those that lead by the mixture, and the first by each component.
    fewer, _ = read_gates(predictor, batch, queries, catalog, n_rivals=5, n_of_each=1)
    open_QC = np.where(found.is_rival_QC, score_QC, -np.inf)
    few_QC = np.logaddexp.reduce(fewer.log_weight_QX[:, None] + fewer.log_part_QCX, axis=-1)
    few_QC = np.where(fewer.is_rival_QC, few_QC, -np.inf)
    best, leading = (-np.sort(-x[kept], axis=1)[:, :4] for x in (open_QC, few_QC))  # the target may be one of the five
    np.testing.assert_allclose(leading, best, rtol=1e-5)
    part_QX, few_part_QX = (
        np.where(x.is_rival_QC[..., None], x.log_part_QCX, -np.inf)[kept].max(axis=1) for x in (found, fewer)
    )
    is_other = np.asarray(found.log_part_QCX)[kept, 0] < part_QX - 1e-4  # the target does not lead
    np.testing.assert_allclose(few_part_QX[is_other], part_QX[is_other], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.is_ranked_Q)[known], ~missed[known])
