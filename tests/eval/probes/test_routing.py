"""What is told of a mixture's routing: macro-F1 and calibration by hand, and a run that reports them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import MoEConfig
from moerec.data.load import load_data
from moerec.eval.evaluate_run import run_experiment
from moerec.eval.probes.routing import collect_routing, describe_mixture, macro_f1
from moerec.eval.ranking import EvalDataset, make_test_set
from moerec.eval.ranking.calibrate import calibration_error, fit_temperature
from moerec.eval.report import write_report
from moerec.nn.model import Predictor, SequenceModel
from moerec.train.run_dir import bind_catalog, make_sizes
from tests.small_model import fill
from tests.tiny import make_config


def test_macro_f1_by_hand():
    truth, guess = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 2])
    # class 0: 2 of 3 named, 2 of 3 wanted; class 1: 1 of 2, 1 of 2; class 3: nothing; class 2 does not occur
    assert macro_f1(guess, truth, 4) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macro_f1(truth, truth, 4) == 1


def draw_posteriors(n: int, temperature: float):
    """Log-posteriors, over- or underconfident by the temperature, of classes drawn from the true ones."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), n)
    truth = (rng.random(n)[:, None] > np.cumsum(p, axis=1)).sum(axis=1)
    sharp = temperature * np.log(p)
    return sharp - np.logaddexp.reduce(sharp, axis=1, keepdims=True), truth


def test_a_true_posterior_is_calibrated_and_a_sharpened_one_is_not():
    log_p, truth = draw_posteriors(50_000, 1.0)
    assert calibration_error(log_p, truth) < 0.01
    assert calibration_error(draw_posteriors(50_000, 3.0)[0], truth) > 0.1


def test_calibration_error_by_hand():
    log_p = np.log([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.25, 0.75]])
    # bins of .9 (one hit of two), of .7 and of .75: both hits are apart from their confidence
    expected = (abs(1 - 1.8) + abs(1 - 0.7) + abs(1 - 0.75)) / 4
    assert calibration_error(log_p, np.array([0, 1, 1, 1])) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_undoes_the_distortion(temperature):
    log_p, truth = draw_posteriors(50_000, temperature)
    assert fit_temperature(log_p, truth) == pytest.approx(temperature, rel=0.05)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    config = dataclasses.replace(make_config(steps=4), baselines=("popularity", "sasrec_sampled"))
    moe = MoEConfig(layers=(0,), n_per_group=2, d_expert=8, n_active=2, tile=8)
    folder = tmp_path_factory.mktemp("mixture")
    model = dataclasses.replace(config.model, n_layers=1, moe=moe)
    return folder, run_experiment(dataclasses.replace(config, model=model), folder)


def test_a_run_of_a_mixture_reports_its_routing(mixture):
    folder, metrics = mixture
    routing = json.loads((folder / "metrics.json").read_text())["routing"]
    np.testing.assert_allclose(np.sum(routing["load"], axis=1), 1, atol=1e-6)
    assert np.shape(routing["load"]) == (3, 8)
    assert routing["dropped"] == 0
    assert routing["max_over_mean"] >= 1
    analyser = routing["analyser"]
    assert 0 <= analyser["macro_f1"] <= 1
    assert 0 < analyser["exact_macro_f1"] <= 1
    assert 0 <= analyser["ece"] <= 1
    unused = 3 * 8 * metrics["config"]["model"]["d_model"] * 6  # three matrices of each of the six experts left out
    assert metrics["n_params"] - metrics["n_active_params"] == unused
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(
        {"analyser", "balance", "domain_balance", "router_z", "dropped"} <= line.keys()
        for line in lines
        if "loss" in line
    )
    page = (folder / "report.html").read_text()
    assert "Load by service and expert" in page
    assert "Mixture weights" not in page
    assert f"<dt>user</dt><dd>{metrics['example']['user']}</dd>" in page


def test_a_run_reports_sizes_and_the_differences_intervals(mixture):
    metrics = json.loads((mixture[0] / "metrics.json").read_text())
    sizes = metrics["baseline_sizes"]
    assert sizes["popularity"] == {"n_stored": metrics["dataset"]["n_items"], "seconds": sizes["popularity"]["seconds"]}
    trained = sizes["sasrec_sampled"]
    assert 0 < trained["n_params"] < metrics["n_params"] == sum(metrics["n_params_by_part"].values())
    assert trained["steps"] == metrics["steps"]
    assert trained["seconds"] > 0
    for found in metrics["paired"].values():
        for part in (found, *found["in_service"].values()):
            assert part["interval"][0] <= part["difference"] <= part["interval"][1]


@pytest.mark.parametrize("rows", [[[0.5, 0.1, 0.1, 0.1, 0.2], None, [0.2] * 5], [[0.7, 0.3]] * 3])
def test_the_report_shows_the_mixture_weights(mixture, tmp_path, rows):
    _, metrics = mixture
    names = [f"part {n}" for n in range(len(rows[0]))]
    probes = {"mixture_weights": rows, "mixture_components": names}
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "probes": probes}))
    page = write_report(tmp_path).read_text()
    assert "Mixture weights" in page
    assert all(name in page for name in names)
    assert ">70<" in page if len(rows[0]) == 2 else ">50<" in page


def test_the_mixture_weights_are_means_by_service(tmp_path):
    """The catalogue's weight is made .5 and the pointers' of each service known, by biases alone.

    At a control slot alone there is no event to point at: the catalogue has it all.
    """
    config = make_config(steps=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pointer="services"))
    data = load_data(config.data, tmp_path)
    log = data.dataset.log
    targets = np.concatenate([make_test_set(config, data).targets, log.offsets[:9], log.offsets[:9] + 1])
    test = EvalDataset(data.dataset, targets, config)
    assert 0 < (test.history_len == 0).sum() < len(targets)
    assert test.has_slot.all()
    model = fill(jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config.model, make_sizes(config, data))))
    weight, bias = model.head.aggregator.weight_DX, model.head.aggregator.gate_bias
    weight[...], bias[...] = jnp.zeros_like(weight[...]), jnp.log(jnp.asarray([5.0, 1, 2, 3, 4]))
    predictor = Predictor(model, None)
    found = describe_mixture(collect_routing(predictor, test, bind_catalog(predictor, data.catalog)), 3)
    assert np.shape(found) == (3, 5)
    expected = []
    for target in targets:
        rows = range(log.offsets[log.user[target]], target)[-config.data.history_len :]
        known = np.isin([0, 1, 2], test.dataset.event_service[list(rows)])
        w = np.array([5.0, 1, 2, 3, 4]) * [1, *known, len(rows) > 0]
        expected.append(w / w.sum())
    for z, row in enumerate(found):
        np.testing.assert_allclose(row, np.mean(np.array(expected)[test.target_service == z], axis=0), atol=1e-5)


def test_the_baselines_of_a_mixture_are_dense(mixture):
    folder, _ = mixture
    lines = (folder / "baselines" / "sasrec_sampled" / "metrics.jsonl").read_text().splitlines()
    assert not any("balance" in json.loads(line) for line in lines)
