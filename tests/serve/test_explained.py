"""Answers of a trained run: those of the evaluation for the same history and request, and what a request may say."""

import dataclasses
import json
import re
import shutil
from math import ceil

import jax
import numpy as np
import pytest

from experiments import recommend as recommend_command
from moerec.config import MoEConfig, PersonalConfig, cli
from moerec.data.splits import TEST
from moerec.data.timezones import Zones
from moerec.errors import InputError
from moerec.eval.evaluate_run import run_experiment
from moerec.eval.metrics import per_target_metrics
from moerec.eval.probes.interventions import evaluate_interventions
from moerec.eval.ranking import EvalDataset, rank_targets
from moerec.files import to_plain
from moerec.nn.heads.item import score_items
from moerec.nn.model import Predictor, SequenceModel
from moerec.serve.explained import _make_batch, describe_answer, find_history, recommend
from moerec.serve.request import RecommendRequest, encode_context, encode_fields, read_request
from moerec.train.run_dir import load_run, make_sizes
from moerec.types import RECOMMEND
from tests.small_model import fill
from tests.tiny import make_config, make_moving_step, make_untrained, replace_parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = make_config(steps=2, eval_every=2)
    moe = MoEConfig(layers=(0,), n_per_group=1, d_expert=8, tile=8)
    personal = PersonalConfig(layers=(0,), n_aspects=2, n_scales=2, d_memory=4)
    model = dataclasses.replace(config.model, n_layers=1, moe=moe, personal=personal, pointer="services")
    folder = tmp_path_factory.mktemp("trained")
    # Two targets have room in a row, whatever histories they are given: all are ranked by one program.
    evaluation = dataclasses.replace(config.eval, batch_size=2, interventions=True)
    with pytest.MonkeyPatch.context() as patch:  # nothing here is of what a run has learnt
        patch.setattr("moerec.train.loop.make_train_step", make_moving_step)
        run_experiment(dataclasses.replace(config, model=model, eval=evaluation, baselines=()), folder)
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


def test_a_run_tells_of_its_items_tokens_and_encodes_items_by_the_vocabulary_that_it_keeps(folder, trained):
    data, metrics = trained.data, json.loads((folder / "metrics.json").read_text())
    assert metrics["dataset"]["item_tokens"] == data.tokens.measure()
    assert json.loads((folder / "item_tokens.json").read_text())["attributes"] == list(data.item_tokens.attributes)
    catalogue, known = data.dataset.catalogue, data.tokens.ids
    ids = data.item_tokens.encode([catalogue.text[3], "🍵 new"], [catalogue.attributes[3], "brand=new"])
    assert ids[0, : known.shape[1]].tolist() == known[3].tolist()
    assert ids[1].any()
    assert ids.max() < data.tokens.n_tokens


def ask_like(trained, event: int) -> RecommendRequest:
    """The request of an event of the log."""
    dataset = trained.data.dataset
    context = {
        name: values[code - 1]
        for (name, values), code in zip(dataset.context.items(), dataset.log.context[event], strict=True)
        if code
    }
    return RecommendRequest(int(dataset.log.time_us[event]) // 10**6, context)


@jax.jit
def log_prob_by_hand(predictor, batch, slot_Q, catalog):
    outputs = predictor.encode(batch, catalog)
    return jax.nn.log_softmax(score_items(outputs, batch, slot_Q, catalog)[0])


def pack_alone(trained, row: int):
    """What the evaluation asks of one event: a batch of one row, and the query in it."""
    config = dataclasses.replace(trained.config, eval=dataclasses.replace(trained.config.eval, batch_size=1))
    ((_, batch, queries),) = EvalDataset(trained.data.dataset, np.array([row]), config).batches()
    return batch, queries


@pytest.mark.parametrize("back", [1, 3])
def test_the_list_at_the_time_of_an_event_is_that_of_the_evaluation(trained, back):
    """What is asked at the time and in the context of an event is what the evaluation asks, without later events."""
    dataset, user = trained.data.dataset, 5
    row = int(dataset.log.offsets[user + 1]) - back
    batch, queries = pack_alone(trained, row)
    log_p = np.asarray(log_prob_by_hand(trained.predictor, batch, queries.slot, trained.catalog))
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
    masked = replace_parts(trained, config=dataclasses.replace(trained.config, eval=masking))
    rest = recommend(masked, user, RecommendRequest(), 10_000).item
    seen = set(dataset.log.item[lo:hi].tolist())
    assert rest.tolist() == [i for i in everything.item if i not in seen]


def test_context_and_time_change_the_answer(trained):
    user, features = str(trained.data.dataset.users[0]), trained.data.dataset.context
    plain = recommend(trained, user, RecommendRequest(), 5)
    name, values = next(iter(features.items()))
    later = int(trained.data.dataset.log.time_us.max()) // 10**6 + 7_200
    for request in (RecommendRequest(time=later), RecommendRequest(context={name: values[0]})):
        assert np.abs(recommend(trained, user, request, 5).log_p - plain.log_p).max() > 1e-6


def test_events_are_before_a_request_to_the_microsecond(trained):
    dataset, user = trained.data.dataset, 5
    lo, hi = dataset.log.offsets[user : user + 2]
    time_us = dataset.log.time_us.copy()
    time_us[lo:hi] = 1_700_000_000_000_000 + 250_000 * np.arange(hi - lo)
    moved = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, time_us=time_us))
    run = replace_parts(trained, data=dataclasses.replace(trained.data, dataset=moved))
    for quarters in (0, 1, 3.5, 4):
        request = RecommendRequest(1_700_000_000 + quarters / 4)
        assert find_history(run, str(dataset.users[user]), request).tolist() == list(range(lo, lo + ceil(quarters)))


def test_the_clock_of_a_request_is_its_own_or_that_of_the_last_event(trained):
    """What zones say comes between the two."""
    dataset, user = trained.data.dataset, str(trained.data.dataset.users[5])
    log = dataclasses.replace(dataset.log, utc_offset=np.full(dataset.log.n_events, 7 * 3600, np.int32))
    own = replace_parts(trained, data=dataclasses.replace(trained.data, dataset=dataclasses.replace(dataset, log=log)))
    tokyo = replace_parts(own, data=dataclasses.replace(own.data, zones=Zones(("Asia/Tokyo",))))
    rows = find_history(own, user, RecommendRequest())
    for run, asked, hours in (
        (trained, None, 0),
        (own, None, 7),
        (own, 0, 0),
        (own, -5, -5),
        (tokyo, None, 9),
        (tokyo, 0, 0),
    ):
        request = RecommendRequest(1_735_000_000, utc_offset=None if asked is None else asked * 3600)
        batch, slot = _make_batch(run, user, rows, request, False)
        assert batch.request.utc_offset_BT[0, slot] == hours * 3600


def first_event(trained, user: int) -> int:
    return int(trained.data.dataset.log.offsets[user])


def test_before_any_event_a_user_is_answered_from_the_control_slot(trained):
    """What is asked before the first event is what the evaluation asks of it: one slot, that is no event."""
    dataset, user = trained.data.dataset, 5
    row = first_event(trained, user)
    batch, queries = pack_alone(trained, row)
    assert batch.kind_BT[batch.segment_BT > 0].tolist() == [RECOMMEND]
    log_p = np.asarray(log_prob_by_hand(trained.predictor, batch, queries.slot, trained.catalog))
    answer = recommend(trained, str(dataset.users[user]), ask_like(trained, row), 7)
    np.testing.assert_allclose(answer.log_p, np.sort(log_p)[::-1][:7], atol=1e-5)
    np.testing.assert_allclose(log_p[answer.item], answer.log_p, atol=1e-5)
    assert answer.weight[0] == pytest.approx(1)  # there is no history to point into


def test_somebody_new_is_a_user_before_any_event_with_the_fields_that_are_said(trained):
    """Nobody's name counts, nor do events that are not there; the fields of a request stand in for a user's own."""
    dataset, user = trained.data.dataset, 5
    request = ask_like(trained, first_event(trained, user))
    known = recommend(trained, str(dataset.users[user]), request, 9)
    fields = {name: str(values[user]) for name, values in dataset.profile.items() if values[user]}
    assert fields
    new = recommend(trained, None, request._replace(fields=fields), 9)
    np.testing.assert_array_equal(new.item, known.item)
    np.testing.assert_allclose(new.log_p, known.log_p, atol=1e-6)
    assert new.relevance is not None
    without = recommend(trained, None, request, 9)
    assert without.relevance is None  # there is no profile that could matter
    assert not any("profile" in line for line in describe_answer(trained, without)["lines"])
    everything = (recommend(trained, None, r, 10_000) for r in (request, request._replace(fields=fields)))
    one, other = (answer.log_p[np.argsort(answer.item)] for answer in everything)
    assert np.abs(one - other).max() > 1e-6


def test_fields_of_a_request_are_the_codes_of_the_data(trained):
    dataset = trained.data.dataset
    codes_UY, sizes = dataset.profile_codes
    nobody = np.zeros(len(sizes), np.int32)
    for user in range(10):
        fields = {name: str(values[user]) for name, values in dataset.profile.items() if values[user]}
        np.testing.assert_array_equal(encode_fields(dataset, fields, nobody), codes_UY[user])
    name = next(iter(dataset.profile))
    own = codes_UY[3].copy()
    value = next(str(x) for x in dataset.profile[name] if x and x != dataset.profile[name][3])
    found = encode_fields(dataset, {name: value}, own)
    assert found[0] != own[0]
    np.testing.assert_array_equal(found[1:], own[1:])
    np.testing.assert_array_equal(own, codes_UY[3])
    with pytest.raises(InputError, match=f"--fields: {name}=none at all: there are "):
        encode_fields(dataset, {name: "none at all"}, own)


def test_a_run_that_was_not_trained_to_do_without_events_says_so(tmp_path):
    config = make_config()
    data, model = dataclasses.replace(config.data, first_event=False), dataclasses.replace(config.model, n_layers=1)
    config = dataclasses.replace(config, data=data, model=model)
    trained = make_untrained(tmp_path, config, fill)
    assert trained.predictor.params.slot_encoder.control_D is None
    user = str(trained.data.dataset.users[0])
    for who, request in ((None, RecommendRequest()), (user, RecommendRequest(time=0))):
        with pytest.raises(InputError, match=r"^--user: .* has no events before .* data\.first_event=false$") as error:
            recommend(trained, who, request, 3)
        assert "\n" not in str(error.value)
    assert len(recommend(trained, user, RecommendRequest(), 3).item) == 3


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
    names = list(found["relevance"])
    assert [name[:8] for name in names] == ["aspect 0", "aspect 1", "fields"]
    tokens = {token for text in trained.data.dataset.catalogue.attributes for token in text.split()}
    for name in names[:2]:  # by what it stands for
        assert {*re.fullmatch(r"aspect \d \((.*)\)", name)[1].split(", ")} <= tokens
    by_aspect = [slots[0] + slots[1], slots[2] + slots[3], slots[4]]
    assert list(found["relevance"].values()) == pytest.approx(by_aspect)
    assert json.loads(json.dumps(to_plain(found)))["domain"].keys() == set(trained.data.dataset.catalogue.services)


@pytest.mark.parametrize(
    ("user", "request_", "word"),
    [
        ("nobody at all", RecommendRequest(), "--user: no such user as 'nobody at all'; the first is 'p000000'"),
        ("", RecommendRequest(context={"sky": "blue"}), "--context: 'sky' is none of"),
        ("", RecommendRequest(service="post"), "--service: 'post' is none of"),
        ("", RecommendRequest(time=4_102_444_800), "--time: must lie"),
        ("", RecommendRequest(fields={"mood": "good"}), "--fields: 'mood' is none of "),
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
    local = read_request([], "2024-05-01T09:00:00.25+03:00", "")
    assert (local.time, local.utc_offset, local.time_us.tolist()) == (1714543200.25, 10800, [1714543200_250_000])
    for time, utc_offset in (("09:00", None), ("09:00Z", None), ("09:00+00:00", 0), ("04:00-05:00", -18000)):
        same = read_request([], f"2024-05-01T{time}", "")
        assert (same.time, same.utc_offset) == (1714554000, utc_offset)
    assert read_request([], "", "") == RecommendRequest()
    assert read_request(["city=Moscow, RU,sky=blue"], "", "").context == {"city": "Moscow, RU", "sky": "blue"}
    asked = read_request([], "", "", ["age=35-49,gender=f"])
    assert asked == RecommendRequest(fields={"age": "35-49", "gender": "f"})
    with pytest.raises(InputError, match=r"^--fields: 'age' is not of the form name=value"):
        read_request([], "", "", ["age"])
    for context, time in ((["weather"], ""), (["=rain"], ""), (["a=1", "a=2"], ""), ([], "tomorrow")):
        with pytest.raises(InputError, match=r"^--(context|time): "):
            read_request(context, time, "")


def test_effects_are_those_of_data_that_were_changed_by_hand(trained):
    """Nobody's context is known."""
    dataset, catalog = trained.data.dataset, trained.catalog
    targets = np.flatnonzero(trained.data.split_ids == TEST)[:30]
    own = EvalDataset(dataset, targets, trained.config)
    log = dataclasses.replace(dataset.log, context=np.zeros_like(dataset.log.context))
    silent = EvalDataset(dataclasses.replace(dataset, log=log), targets, trained.config)
    plain = per_target_metrics(rank_targets(trained.predictor, own, catalog).union)["ndcg@10"]
    interventions = evaluate_interventions(trained.config, trained.predictor, own, catalog, plain)
    by_hand = per_target_metrics(rank_targets(trained.predictor, silent, catalog).union)["ndcg@10"]
    assert interventions["context"]["missing"]["ndcg@10"] == pytest.approx(by_hand.mean(), abs=1e-9)
    assert interventions["context"]["missing"]["difference"] == pytest.approx((plain - by_hand).mean(), abs=1e-9)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"personal": PersonalConfig()}, {"context"}),
        ({"personal": PersonalConfig(layers=(0,), memory="null")}, {"context"}),
        ({"personal": PersonalConfig(layers=(0,), memory="low_rank", n_aspects=2, n_scales=1)}, {"context", "profile"}),
        ({"personal": PersonalConfig(), "request_context": False}, set()),
    ],
)
def test_effects_are_measured_of_what_a_model_has(trained, fields, parts):
    plain = dataclasses.replace(trained.config.model, moe=MoEConfig(), pointer="none")
    config = dataclasses.replace(trained.config, model=dataclasses.replace(plain, **fields))
    examples = EvalDataset(trained.data.dataset, np.flatnonzero(trained.data.split_ids == TEST)[:5], config)
    sizes = make_sizes(config, trained.data)
    model = fill(jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config.model, sizes)))
    predictor = Predictor(model, None)
    assert set(evaluate_interventions(config, predictor, examples, trained.catalog, np.zeros(5))) == parts


def test_the_command(folder, capsys):
    def execute(*flags: str) -> int:
        arguments = ["recommend", f"--workdir={folder}", *flags]
        return cli.execute(recommend_command.main, arguments, extra_flags=recommend_command.FLAGS, config_type=None)

    assert execute("--top_k=3", "--json", "--time=2030-01-01") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 14  # the history has seven of them
    assert lines[0].startswith("p000000: ")
    assert len(json.loads(last)["items"]) == 3
    assert execute("--context=weather=hail") == 0
    assert capsys.readouterr().err == "weather=hail: never seen in training; there are clear, cloudy, rain, snow\n"
    assert execute("--context=weather=rain", "--context=temperature=hot") == 0
    both = capsys.readouterr().out
    assert execute("--context=weather=rain,temperature=hot") == 0
    assert capsys.readouterr().out == both
    assert execute("--context=weather=rain") == 0
    assert capsys.readouterr().out != both
    field, values = next(iter(load_run(folder).data.dataset.profile.items()))
    value = next(str(value) for value in values if value)
    assert execute("--new_user") == 0
    nobody = capsys.readouterr().out
    assert execute() == 0
    assert capsys.readouterr().out != nobody
    assert execute("--new_user", f"--fields={field}={value}") == 0
    assert capsys.readouterr().out != nobody
    assert execute("--new_user", "--user=p000000") == 2
    assert capsys.readouterr().err.startswith("error: --new_user: ")
    for wrong in ("--top_k=0", "--user=nobody", "--service=post", "--time=soon", "--context=sky", "--fields=mood=good"):
        assert execute(wrong) == 2
        assert capsys.readouterr().err.startswith(f"error: {wrong.partition('=')[0]}: ")


def test_nothing_is_written_into_a_run_and_its_parts_are_read_once(folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    half = folder / "checkpoints" / "last" / "99.orbax-checkpoint-tmp"
    half.mkdir()
    opened = load_run(folder)
    parts = {name: getattr(opened, name) for name in ("config", "metrics", "data", "predictor", "catalog")}
    assert half.exists()
    half.rmdir()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "last"} == {
        path: time for path, time in before.items() if path.name != "last"
    }
    for name in ("read_config", "reload_data", "Checkpoints", "bind_catalog"):  # whatever reads anything again fails
        monkeypatch.setattr(f"moerec.train.run_dir.{name}", None)
    assert all(getattr(opened, name) is part for name, part in parts.items())


def test_what_is_not_asked_for_is_not_read(folder, tmp_path):
    """The metrics of a run are there without its data and its checkpoints."""
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "data"))
    opened = load_run(tmp_path / "run")
    assert opened.metrics["steps"] == 2
    with pytest.raises(InputError, match="holds no checkpoint"):
        _ = opened.predictor


def test_a_run_that_is_not_finished_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("metrics.json"))
    with pytest.raises(InputError, match="not finished"):
        load_run(tmp_path / "run")


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize("pointer", ["none", "all", "services"])
def test_components_of_a_model_in_which_nobody_is_asked_have_names(pointer, tmp_path):
    config = make_config(steps=1)
    near = {f"{name}_pointer": True for name in ("text", "transition", "crossing")}
    sizes = {f"{name}_neighbors": 3 for name in ("text", "transition", "crossing")}
    model = dataclasses.replace(config.model, pointer=pointer, **near)
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **sizes))
    run = make_untrained(tmp_path, config)
    user = str(run.data.dataset.users[0])
    found = describe_answer(run, recommend(run, user, RecommendRequest(), 3))
    names = [f"neighbors by {name}" for name in ("crossings", "text", "transitions")]
    assert list(found["weight"])[-3:] == names
    assert sum(found["weight"].values()) == pytest.approx(1, abs=1e-5)
    assert ("own history" in found["weight"]) == (pointer != "none")
