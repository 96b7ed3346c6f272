"""Answers of a trained run: those of the evaluation for the same history and request, and what a request may say."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from moerec.eval.run import run

from experiments import recommend as recommend_command
from moerec.config import MoEConfig, PersonalConfig, cli
from moerec.config.stored import read_config
from moerec.data.splits import TEST
from moerec.errors import InputError
from moerec.eval.metrics import per_target_metrics
from moerec.eval.probes.interventions import evaluate_interventions
from moerec.eval.ranking import EvalDataset, catalogue_vectors, rank_targets, score_items
from moerec.files import to_plain
from moerec.serve.recommender import (
    RecommendRequest,
    describe_answer,
    encode_context,
    load_run,
    read_request,
    recommend,
)
from moerec.train.loop import make_sizes
from moerec.train.step import init_state
from tests.tiny import make_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = make_config(steps=2, eval_every=2)
    moe = MoEConfig(layers=(1,), n_per_group=1, d_expert=8, tile=8)
    personal = PersonalConfig(layers=(1,), n_aspects=2, n_scales=2, d_memory=4)
    model = dataclasses.replace(config.model, moe=moe, personal=personal, pointer="services")
    folder = tmp_path_factory.mktemp("trained")
    evaluation = dataclasses.replace(config.eval, interventions=True)
    run(dataclasses.replace(config, model=model, eval=evaluation, baselines=()), folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return load_run(folder)


def test_a_run_reports_what_its_answers_lose_without_the_own_profile_and_context(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {part: set(edits) for part, edits in metrics["probes"]["interventions"].items()} == {
        "profile": {"swapped", "mean", "empty"},
        "context": {"permuted", "missing"},
    }
    own = metrics["test"]["union"]["all"]["ndcg@10"]
    interventions = [outcome for edits in metrics["probes"]["interventions"].values() for outcome in edits.values()]
    for outcome in interventions:
        assert outcome["difference"] == pytest.approx(own - outcome["ndcg@10"], abs=1e-9)
        assert 0 < outcome["p_value"] <= 1
    assert any(outcome["difference"] for outcome in interventions)
    report = (folder / "report.html").read_text()
    for word in ("profile: swapped", "context: missing", "Transfer", "by chance"):
        assert word in report
    assert set(metrics["probes"]["transfer"]) == set(metrics["dataset"]["services"])
    assert set(metrics["probes"]["attainable"]) == {"all", "no context"}


def ask_like(trained, event: int) -> RecommendRequest:
    """The request of an event of the log."""
    dataset = trained.data.dataset
    context = {
        name: values[code - 1]
        for (name, values), code in zip(dataset.context.items(), dataset.log.context[event], strict=True)
        if code
    }
    return RecommendRequest(int(dataset.log.time[event]), context)


@pytest.mark.parametrize("back", [1, 3])
def test_the_list_at_the_time_of_an_event_is_that_of_the_evaluation(trained, back):
    """What is asked at the time and in the context of an event is what the evaluation asks, without later events."""
    dataset, user = trained.data.dataset, 5
    row = int(dataset.log.offsets[user + 1]) - back
    examples = EvalDataset(dataset, np.array([row]), trained.config)
    ((_, batch, queries),) = examples.batches()
    vectors = catalogue_vectors(trained.model, trained.table)
    scores = score_items(trained.model, batch, queries.slot, trained.table, vectors)[0]
    log_p = np.asarray(jax.nn.log_softmax(scores))
    answer = recommend(trained, str(dataset.users[user]), ask_like(trained, row), 7)
    np.testing.assert_allclose(answer.log_p, np.sort(log_p)[::-1][:7], atol=1e-5)
    np.testing.assert_allclose(log_p[answer.item], answer.log_p, atol=1e-5)
    for share in (answer.domain, answer.relevance, answer.weight):
        assert share.sum() == pytest.approx(1, abs=1e-5)
    assert (len(answer.domain), len(answer.relevance), len(answer.weight)) == (3, 5, 5)


def test_a_service_and_seen_items_narrow_the_list(trained):
    dataset = trained.data.dataset
    user, (lo, hi) = str(dataset.users[0]), dataset.log.offsets[:2]
    everything = recommend(trained, user, RecommendRequest(), 10_000)
    assert sorted(everything.item.tolist()) == list(range(dataset.catalogue.n_items))
    assert np.exp(everything.log_p).sum() == pytest.approx(1, abs=1e-4)
    service = dataset.catalogue.services[1]
    own = recommend(trained, user, RecommendRequest(service=service), 10_000).item
    assert own.tolist() == [i for i in everything.item if dataset.catalogue.service[i] == 1]
    masking = dataclasses.replace(trained.config.eval, mask_seen=True)
    masked = dataclasses.replace(trained, config=dataclasses.replace(trained.config, eval=masking))
    rest = recommend(masked, user, RecommendRequest(), 10_000).item
    seen = set(dataset.log.item[lo:hi].tolist())
    assert rest.tolist() == [i for i in everything.item if i not in seen]


def test_context_and_time_change_the_answer(trained):
    user, features = str(trained.data.dataset.users[0]), trained.data.dataset.context
    plain = recommend(trained, user, RecommendRequest(), 5)
    name, values = next(iter(features.items()))
    later = int(trained.data.dataset.log.time.max()) + 7_200
    for request in (RecommendRequest(time=later), RecommendRequest(context={name: values[0]})):
        assert np.abs(recommend(trained, user, request, 5).log_p - plain.log_p).max() > 1e-6


def test_codes_of_a_request(trained):
    features = {"heat": ("below 0", "0 to 20", "from 20"), "sky": ("blue", "grey")}
    dataset = dataclasses.replace(trained.data.dataset, context=features)
    edges = {"heat": (0.0, 20.0)}
    for context, codes in (
        ({}, [0, 0]),
        ({"heat": "-3.5", "sky": "blue"}, [1, 1]),
        ({"heat": "0", "sky": "grey"}, [2, 2]),
        ({"heat": "0 to 20", "sky": "pink"}, [2, 3]),
        ({"heat": "31"}, [3, 0]),
    ):
        assert encode_context(dataset, edges, context).tolist() == codes
    assert encode_context(dataset, {"heat": (0.0, 5.0)}, {"heat": "31"}).tolist() == [4, 0]  # of another preparation
    with pytest.raises(InputError, match="heat=warm is no number"):
        encode_context(dataset, edges, {"heat": "warm"})
    for other in ("nan", "inf", "1_000", " 3"):
        with pytest.raises(InputError, match="is no number"):
            encode_context(dataset, edges, {"heat": other})


def test_an_answer_in_words(trained):
    answer = recommend(trained, str(trained.data.dataset.users[0]), RecommendRequest(), 3)
    found = describe_answer(trained, answer)
    assert len(found["items"]) == 3
    assert len(found["lines"]) == 7
    assert set(found["weight"]) == {"catalogue", "own history", *(f"own {z}" for z in found["domain"])}
    assert found["items"][0]["text"] in found["lines"][1]
    slots = answer.relevance.tolist()  # two aspects of two scales, and the fields
    by_aspect = {"aspect 0": slots[0] + slots[1], "aspect 1": slots[2] + slots[3], "fields": slots[4]}
    assert found["relevance"] == pytest.approx(by_aspect)
    assert json.loads(json.dumps(to_plain(found)))["domain"].keys() == set(trained.data.dataset.catalogue.services)


@pytest.mark.parametrize(
    ("user", "request_", "word"),
    [
        ("nobody at all", RecommendRequest(), "--user: nobody is called 'nobody at all'; the first is 'p000000'"),
        ("", RecommendRequest(context={"sky": "blue"}), "--context: 'sky' is none of"),
        ("", RecommendRequest(service="post"), "--service: 'post' is none of"),
        ("", RecommendRequest(time=4_102_444_800), "--time: must lie"),
        ("", RecommendRequest(time=0), "has no events before --time"),
    ],
)
def test_what_is_not_there_is_named(trained, user, request_, word):
    with pytest.raises(InputError, match=word):
        recommend(trained, user or str(trained.data.dataset.users[0]), request_, 3)


def test_requests_in_words():
    assert read_request(["weather=rain", "a=b=c"], "2024-05-01T09:00", "kuper") == RecommendRequest(
        1714554000, {"weather": "rain", "a": "b=c"}, "kuper"
    )
    assert read_request([], "2024-05-01T09:00+03:00", "").time == 1714554000 - 3 * 3600
    assert read_request([], "", "") == RecommendRequest()
    assert read_request(["city=Moscow, RU,sky=blue"], "", "").context == {"city": "Moscow, RU", "sky": "blue"}
    for context, time in ((["weather"], ""), (["=rain"], ""), (["a=1", "a=2"], ""), ([], "tomorrow")):
        with pytest.raises(InputError, match=r"^--(context|time): "):
            read_request(context, time, "")


def test_a_configuration_is_read_back(tmp_path):
    config = make_config()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_plain(dataclasses.asdict(config))))
    assert read_config(path) == config
    values = json.loads(path.read_text())
    for change, word in (
        ({**values, "extra": 1}, "config.extra is unknown"),
        ({k: v for k, v in values.items() if k != "seed"}, "config.seed is missing"),
        ({**values, "model": {**values["model"], "depth": 3}}, "config.model.depth is unknown"),
        ({**values, "model": 3}, "missing"),
        ({**values, "seed": None}, "config.seed: None is not of type int"),
        ({**values, "baselines": None}, "config.baselines: None is not of type"),
        ({**values, "train": {**values["train"], "steps": "many"}}, "config.train.steps: 'many' is not of type int"),
        ({**values, "model": {**values["model"], "dropout": 2.0}}, "config.model.dropout"),
    ):
        path.write_text(json.dumps(change))
        with pytest.raises(InputError, match=word) as error:
            read_config(path)
        assert str(error.value).startswith(str(path))
    path.write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        read_config(path)
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path / "nowhere.json")


def test_effects_are_those_of_data_that_were_changed_by_hand(trained):
    """Nobody's context is known."""
    dataset, table = trained.data.dataset, trained.table
    targets = np.flatnonzero(trained.data.split_ids == TEST)[:30]
    own = EvalDataset(dataset, targets, trained.config)
    log = dataclasses.replace(dataset.log, context=np.zeros_like(dataset.log.context))
    silent = EvalDataset(dataclasses.replace(dataset, log=log), targets, trained.config)
    plain = per_target_metrics(rank_targets(trained.model, own, table)[1])["ndcg@10"]
    interventions = evaluate_interventions(trained.config, trained.model, own, table, plain)
    by_hand = per_target_metrics(rank_targets(trained.model, silent, table)[1])["ndcg@10"]
    assert interventions["context"]["missing"]["ndcg@10"] == pytest.approx(by_hand.mean(), abs=1e-9)
    assert interventions["context"]["missing"]["difference"] == pytest.approx((plain - by_hand).mean(), abs=1e-9)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"personal": PersonalConfig()}, {"context"}),
        ({"personal": PersonalConfig(layers=(1,), memory="null")}, {"context"}),
        ({"personal": PersonalConfig(layers=(1,), memory="low_rank", n_aspects=2, n_scales=1)}, {"context", "profile"}),
        ({"personal": PersonalConfig(), "request_context": False}, set()),
    ],
)
def test_effects_are_measured_of_what_a_model_has(trained, fields, parts):
    config = dataclasses.replace(trained.config, model=dataclasses.replace(trained.config.model, **fields))
    examples = EvalDataset(trained.data.dataset, np.flatnonzero(trained.data.split_ids == TEST)[:5], config)
    model = init_state(config, make_sizes(trained.data)).model
    assert set(evaluate_interventions(config, model, examples, trained.table, np.zeros(5))) == parts


def test_the_command(folder, capsys):
    def execute(*flags: str) -> int:
        arguments = ["recommend", f"--workdir={folder}", *flags]
        return cli.execute(recommend_command.main, arguments, extra_flags=recommend_command.FLAGS, config_type=None)

    assert execute("--top_k=3", "--json", "--time=2030-01-01") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert len(json.loads(last)["items"]) == 3
    assert execute("--context=weather=hail") == 0
    assert capsys.readouterr().err == "weather=hail: never seen in training; there are clear, cloudy, rain, snow\n"
    assert execute("--context=weather=rain", "--context=temperature=hot") == 0
    both = capsys.readouterr().out
    assert execute("--context=weather=rain,temperature=hot") == 0
    assert capsys.readouterr().out == both
    assert execute("--context=weather=rain") == 0
    assert capsys.readouterr().out != both
    for wrong in ("--top_k=0", "--user=nobody", "--service=post", "--time=soon", "--context=sky"):
        assert execute(wrong) == 2
        assert capsys.readouterr().err.startswith(f"error: {wrong.partition('=')[0]}: ")


def test_nothing_is_written_into_a_run(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    half = folder / "checkpoints" / "last" / "99.orbax-checkpoint-tmp"
    half.mkdir()
    load_run(folder)
    assert half.exists()
    half.rmdir()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "last"} == {
        path: time for path, time in before.items() if path.name != "last"
    }


def test_a_run_that_is_not_finished_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("metrics.json"))
    with pytest.raises(InputError, match="not finished"):
        load_run(tmp_path / "run")


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        load_run(tmp_path)
