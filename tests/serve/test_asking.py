"""A run in which every service is asked: its answers, what they are made of, and what is reported of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moerec.config import AskConfig, MoEConfig
from moerec.data.dataset import ItemTable
from moerec.data.load import load_data, reload_data
from moerec.data.neighbors import NEIGHBOR_FILES, extend_text_neighbors, load_neighbors, save_neighbors
from moerec.data.splits import TEST
from moerec.errors import InputError
from moerec.eval.evaluate_run import run_experiment
from moerec.eval.probes.answers import choose_services
from moerec.eval.probes.example import describe_example, pick_row
from moerec.eval.ranking import EvalDataset, make_test_set, rank_targets
from moerec.eval.ranking.per_target import read_ranks
from moerec.eval.report import format_forced
from moerec.nn.model import pick_calibration
from moerec.serve.bench import bench_recommend
from moerec.serve.explained import describe_answer, recommend
from moerec.serve.request import RecommendRequest
from moerec.train.run_dir import load_run
from tests.tiny import make_config, make_moving_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = make_config(steps=2, eval_every=2)
    moe = MoEConfig(layers=(1,), n_per_group=1, d_expert=8, tile=8)
    ask = AskConfig(from_layer=1, d_analyser=8)
    model = dataclasses.replace(config.model, moe=moe, ask=ask, pointer="services")
    model = dataclasses.replace(model, text_pointer=True, transition_pointer=True, crossing_pointer=True)
    data = dataclasses.replace(config.data, text_neighbors=4, transition_neighbors=5, crossing_neighbors=6)
    evaluation = dataclasses.replace(config.eval, batch_size=8, n_probed=12)
    config = dataclasses.replace(config, model=model, data=data, eval=evaluation, baselines=())
    folder = tmp_path_factory.mktemp("asked")
    with pytest.MonkeyPatch.context() as patch:  # nothing here is of what a run has learnt
        patch.setattr("moerec.train.loop.make_train_step", make_moving_step)
        run_experiment(config, folder)
    return folder


@pytest.fixture(scope="module")
def asked(folder):
    return load_run(folder)


@pytest.fixture(scope="module")
def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_temperature_of_the_best_validation_is_kept(asked, metrics):
    assert asked.predictor.temperature == pytest.approx(metrics["valid"]["valid/temperature"])
    assert asked.predictor.temperature == pytest.approx(metrics["routing"]["analyser"]["temperature"])
    assert asked.predictor.temperature != 1


def test_answers_are_those_of_the_evaluation(asked):
    """The log-probability of a target by its own history and request; and the lists say what they are made of."""
    dataset, log = asked.data.dataset, asked.data.dataset.log
    row = int(np.flatnonzero(asked.data.split_ids == TEST)[3])
    examples = EvalDataset(dataset, np.array([row]), asked.config)
    wanted = rank_targets(asked.predictor, examples, asked.catalog).log_p[0]
    user = str(dataset.users[log.users_of(np.array([row]))[0]])
    names = dict(zip(dataset.context, log.context[row], strict=True))
    context = {name: dataset.context[name][code - 1] for name, code in names.items() if code}
    request = RecommendRequest(float(log.time_us[row] / 1e6), context)
    n = dataset.catalogue.n_items
    answer = recommend(asked, user, request, n)
    assert answer.log_p[answer.item == log.item[row]][0] == pytest.approx(wanted, abs=1e-4)
    assert np.exp(answer.log_p).sum() == pytest.approx(1, abs=1e-4)
    assert answer.asked is not None
    weights = {a.service: a.weight for a in answer.asked.answers}
    np.testing.assert_allclose([weights[z] for z in range(3)], answer.domain, atol=1e-6)
    for of_service in answer.asked.answers:
        np.testing.assert_allclose(of_service.part.sum(axis=1), of_service.p, atol=1e-6)
        assert of_service.p.sum() == pytest.approx(1, abs=1e-4)
        assert np.all(np.diff(of_service.p) <= 1e-9)
        np.testing.assert_allclose(of_service.expert.sum(), 1, atol=1e-5)
        closed = [g for g in range(3) if g != of_service.service]
        assert not of_service.expert[closed].any()
        union = {int(i): lp for i, lp in zip(answer.item, answer.log_p, strict=True)}
        own = [union[int(i)] for i in of_service.item]
        np.testing.assert_allclose(np.exp(own), of_service.weight * of_service.p, atol=1e-6)


def test_no_score_depends_on_the_target_or_on_what_comes_after_it(asked):
    """Whatever item, of whatever service, stands in the log from the target on."""
    dataset, log = asked.data.dataset, asked.data.dataset.log
    rows = np.flatnonzero(asked.data.split_ids == TEST)[:3]
    service = dataset.catalogue.service
    for row in rows.tolist():
        user = log.users_of(np.array([row]))[0]
        item = log.item.copy()
        item[row : log.offsets[user + 1]] = np.flatnonzero(service != service[item[row]])[row % 7]
        other = dataclasses.replace(dataset, log=dataclasses.replace(log, item=item))
        assert other.event_service[row] != dataset.event_service[row]
        scores = []
        for which in (dataset, other):
            ((_, batch, queries),) = EvalDataset(which, np.array([row]), asked.config).batches()
            scores.append(np.asarray(score(asked.predictor, batch, queries.slot, asked.catalog))[0])
        np.testing.assert_array_equal(*scores)


@jax.jit
def score(predictor, batch, slot_Q, catalog):
    return predictor.score(batch, slot_Q, catalog)


def test_less_mass_asks_fewer_services_whose_items_alone_are_listed(asked):
    request, n = RecommendRequest(), asked.data.dataset.catalogue.n_items
    whole = recommend(asked, None, request, n)
    first = int(np.argmax(whole.domain))
    one = recommend(asked, None, request, n, mass=0.01)
    assert [a.service for a in one.asked.answers] == [first]
    assert set(asked.data.dataset.catalogue.service[one.item]) == {first}
    np.testing.assert_allclose(np.exp(one.log_p).sum(), 1, atol=1e-4)
    kept = np.isin(whole.item, one.item)
    np.testing.assert_allclose(whole.log_p[kept] - np.log(whole.domain[first]), one.log_p, atol=1e-4)
    name = asked.data.dataset.catalogue.services[first]
    named = recommend(asked, None, RecommendRequest(service=name), n)
    np.testing.assert_allclose(named.log_p, whole.log_p[kept], atol=1e-4)
    others = [other for other in asked.data.dataset.catalogue.services if other != name]
    for answer, left in ((whole, None), (named, None), (one, others)):
        found = describe_answer(asked, answer)
        assert found.get("not_asked") == left
        assert any(line.startswith("not asked: ") for line in found["lines"]) == bool(left)
    for mass, service in ((0.0, ""), (0.5, name)):
        with pytest.raises(InputError, match="--mass"):
            recommend(asked, None, RecommendRequest(service=service), 5, mass=mass)


@pytest.mark.parametrize(
    ("share", "mass", "n"), [((0.9, 0.06, 0.04), 0.9, 1), ((0.5, 0.3, 0.2), 0.75, 2), ((0.5, 0.3, 0.2), 0.99, 3)]
)
def test_services_are_asked_until_they_have_the_mass(share, mass, n):
    chosen, log_weight = choose_services(np.log(np.array(share)[[2, 0, 1]]), mass, None)
    assert chosen.tolist() == [1, 2, 0][:n]
    np.testing.assert_allclose(np.exp(log_weight), np.array(share[:n]) / sum(share[:n]), rtol=1e-6)


def test_an_answer_names_services_experts_and_components(asked):
    found = describe_answer(asked, recommend(asked, None, RecommendRequest(), 4))
    assert set(found["services"]) == set(asked.data.dataset.catalogue.services)
    for name, answer in found["services"].items():
        assert set(answer["components"]) == {"softmax", "own", "shared", "crossings", "text", "transitions"}
        assert set(answer["experts"]) <= {name, "cross"}
        assert len(answer["items"]) == 4
        for item in answer["items"]:
            assert sum(item["components"].values()) == pytest.approx(item["p"], abs=1e-6)
    assert any("softmax" in line for line in found["lines"])
    json.dumps({key: value for key, value in found.items() if key != "lines"})


def test_a_run_reports_its_probes(asked, metrics):
    """What is forced and what is not are one where they must be, and own weights are those of the table."""
    probes, services = metrics["probes"]["asking"], metrics["dataset"]["services"]
    assert probes["n"] == 12
    for what in ("both", "experts", "vector"):
        assert np.shape(probes["forced"][what]) == (3, 3)
        np.testing.assert_allclose(np.diag(probes["forced"][what]), np.diag(probes["forced"]["both"]), atol=1e-5)
    assert set(probes["removed"]) == {*services, "cross"}
    assert set(probes["posteriors"]) == {"own", "most_probable", "uniform", "random", "exact"}
    components = metrics["probes"]["components"]
    assert set(components) == {"softmax", "own", "shared", "crossings", "text", "transitions"}
    for row in components.values():
        parts = list(row["target"].values())
        assert sum(part["n"] for part in parts) == row["all"]["n"] == 12
        for metric in ("log_p", "ndcg@10", "in_service_ndcg@10", "fell"):
            mean = sum(part["n"] * part[metric] for part in parts) / 12
            assert mean == pytest.approx(row["all"][metric], abs=1e-9)
    assert set(metrics["excess_log_loss"]) == {"all", *services}
    examples = make_test_set(asked.config, asked.data)
    rng = np.random.default_rng([asked.config.data.seed, TEST])
    chosen = np.sort(rng.permutation(np.flatnonzero(examples.has_slot))[:12])
    log_p = rank_targets(asked.predictor, examples, asked.catalog).log_p[chosen]
    assert probes["posteriors"]["own"]["log_loss"] == pytest.approx(-log_p.mean(), abs=1e-4)
    assert probes["posteriors"]["most_probable"]["log_loss"] < 20
    assert len({round(x["log_loss"], 5) for x in probes["posteriors"].values()}) > 2
    for rows in probes["forced_interval"].values():
        assert all(x is None or (x > 0) == (a != z) for a, row in enumerate(rows) for z, x in enumerate(row))
        assert any(x for row in rows for x in row)


def test_a_run_reports_one_request_and_prints_the_matrix_of_experts(asked, metrics, folder):
    example, services = metrics["example"], metrics["dataset"]["services"]
    log, users = asked.data.dataset.log, asked.data.dataset.users
    (row,) = np.flatnonzero(log.time_us == np.datetime64(example["time"], "us").astype(np.int64))
    assert example["user"] == users[log.users_of(np.array([row]))[0]]
    assert example["target"]["id"] == asked.data.dataset.catalogue.ids[log.item[row]]
    assert set(example["services"]) == set(services)
    for name, answer in example["services"].items():
        assert answer["weight"] == pytest.approx(example["domain"][name], abs=1e-6)
        assert len(answer["items"]) == 5
        for item in answer["items"]:
            assert sum(item["components"].values()) == pytest.approx(item["p"], abs=1e-6)
    page = (folder / "report.html").read_text()
    assert f"<dt>user</dt><dd>{example['user']}</dd>" in page
    assert all(f"{name}: weight {answer['weight']:.2f}" in page for name, answer in example["services"].items())
    lines = format_forced(metrics).splitlines()
    assert len(lines) == 5
    assert "+0.000 ± 0.000" in lines[2] + lines[3] + lines[4]
    assert format_forced({"dataset": metrics["dataset"]}) == ""
    forced = {"experts": [[1.0004, 2.0], [1.0, 1.5]]}, {"experts": [[0.0, 0.1], [0.2, 0.0]]}
    asking = dict(zip(("forced", "forced_interval"), forced, strict=True))
    shown = format_forced({"dataset": {"services": ["a", "b"]}, "probes": {"asking": asking}})
    assert "+0.000 ± 0.200" in shown
    assert "+0.500 ± 0.100" in shown


@pytest.mark.parametrize("mask_seen", [False, True])
def test_the_list_of_the_request_is_that_of_the_answers(asked, mask_seen):
    """The best of p(service) p(item | service), and a target that the user had is no candidate."""
    config = dataclasses.replace(asked.config, eval=dataclasses.replace(asked.config.eval, mask_seen=mask_seen))
    examples, log = make_test_set(config, asked.data), asked.data.dataset.log
    repeats = examples.targets[examples.is_repeated]
    row = int(repeats[0]) if mask_seen else pick_row(config, examples)
    example = describe_example(config, asked.data.dataset, row, asked.predictor, asked.catalog)
    weighed = {
        (name, item["id"]): answer["weight"] * item["p"]
        for name, answer in example["services"].items()
        for item in answer["items"]
    }
    best = sorted(weighed, key=lambda key: -weighed[key])[:3]
    assert [(item["service"], item["id"]) for item in example["items"]][:3] == best
    for item in example["items"]:
        assert sum(item["components"].values()) == pytest.approx(item["p"], rel=1e-4)
    before = log.item[log.offsets[log.users_of(np.array([row]))[0]] : row]
    ids = {str(asked.data.dataset.catalogue.ids[i]) for i in before}
    assert not mask_seen or not ids & {item["id"] for item in example["items"]}
    assert (example["target"]["rank"] is None) == mask_seen
    assert example["n_history"] == len(before)


def test_requests_are_timed(asked):
    found = bench_recommend(asked, 2, 0.5, 8)
    assert found["services"] == 3
    assert 1 <= found["services_asked"] <= 3
    assert found["explained"]["p50_ms"] > 0
    assert found["lists"]["users_per_s"] > 0
    with pytest.raises(InputError, match="--requests"):
        bench_recommend(asked, 0, 0.5)


@pytest.mark.parametrize(
    ("name", "file", "n"),
    [("text", "neighbors.npz", 4), ("transitions", "transitions.npz", 5), ("crossings", "crossings.npz", 6)],
)
def test_the_neighbors_are_data_beside_the_run(name, file, n, folder, asked):
    assert (folder / file).is_file()
    near = np.asarray(asked.catalog.near[name].item_IX)
    assert near.shape == (asked.data.dataset.catalogue.n_items, n)
    rows, columns = np.nonzero(near >= 0)
    service = asked.data.dataset.catalogue.service
    assert len(rows)
    assert np.all((service[rows] != service[near[rows, columns]]) == (name == "crossings"))


def test_tables_of_other_events_are_made_anew_and_not_read(folder, asked, tmp_path):
    """A run that was killed before its data was settled leaves tables that have counted what is now a target."""
    config = asked.config.data
    mine = load_data(config, tmp_path)
    counted = {name: (tmp_path / file).read_bytes() for name, file in NEIGHBOR_FILES.items()}
    other = load_data(dataclasses.replace(config, seed=config.seed + 1), tmp_path)
    again = load_data(dataclasses.replace(config, seed=config.seed + 1), tmp_path / "fresh")
    for name in NEIGHBOR_FILES:
        assert np.any(other.neighbors[name].item_IX != mine.neighbors[name].item_IX)
        np.testing.assert_array_equal(other.neighbors[name].item_IX, again.neighbors[name].item_IX)
    for name in ("text", "crossings"):
        kept = (tmp_path / NEIGHBOR_FILES[name]).read_bytes()
        (tmp_path / NEIGHBOR_FILES[name]).write_bytes(counted[name])
        with pytest.raises(InputError, match=rf"{NEIGHBOR_FILES[name]}: was made of other events or items"):
            reload_data(dataclasses.replace(config, seed=config.seed + 1), tmp_path)
        (tmp_path / NEIGHBOR_FILES[name]).write_bytes(kept)


def test_a_table_of_texts_that_was_extended_is_the_runs(asked, tmp_path):
    """Its new items are none of the run's, whose own neighbors stay as near as they were."""
    config = asked.config.data
    mine, path = load_data(config, tmp_path), tmp_path / NEIGHBOR_FILES["text"]
    old = mine.dataset.catalogue
    text, attributes = (np.append(x, x[-2:]) for x in (old.text, old.attributes))  # two of the last service
    offsets, ids = np.append(old.offsets[:-1], old.n_items + 2), np.append(old.ids, ["new 1", "new 2"])
    more = ItemTable(old.services, offsets, ids, text, attributes)
    save_neighbors(path, extend_text_neighbors(load_neighbors(path), old, more))
    again = reload_data(config, tmp_path).neighbors["text"]
    for own, known in zip(mine.neighbors["text"].item_IX, again.item_IX, strict=True):
        assert [i for i in own.tolist() if i in known and i >= 0] == [i for i in known.tolist() if i >= 0]


def test_a_run_with_other_widths_has_other_tables(asked, tmp_path):
    config = asked.config.data
    mine = load_data(config, tmp_path)
    fewer = load_data(dataclasses.replace(config, text_neighbors=2), tmp_path / "fewer")
    assert fewer.neighbors["text"].item_IX.shape == (mine.dataset.catalogue.n_items, 2)


def test_a_run_that_is_opened_again_ranks_as_it_was_evaluated(folder, asked):
    """With its gates and temperature."""
    shift = [value for name, value in asked_calibration(folder).items() if "gate" in name]
    assert max(map(abs, shift)) > 1e-3
    stored, examples = read_ranks(folder), make_test_set(asked.config, asked.data)
    found = rank_targets(asked.predictor, examples, asked.catalog)
    np.testing.assert_allclose(np.sort(found.log_p), np.sort(stored.log_p), rtol=1e-5)


def asked_calibration(folder) -> dict[str, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return pick_calibration(json.loads(next(line for line in reversed(lines) if "valid/temperature" in line)))
