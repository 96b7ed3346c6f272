"""Answers of a trained run: those of the evaluation for the same history and request, and what a request may say."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moerec.config import MoEConfig, PersonalConfig
from moerec.config.stored import read_config
from moerec.errors import InputError
from moerec.evaluate import EvaluationSet, catalogue_vectors, score_items
from moerec.recommend import Request, describe_answer, encode_context, load_run, read_request, recommend
from moerec.run import run
from moerec.writer import to_plain
from tests.tiny import make_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = make_config(steps=2, eval_every=2)
    moe = MoEConfig(layers=(1,), n_per_group=1, d_expert=8, tile=8)
    personal = PersonalConfig(layers=(1,), n_aspects=2, n_scales=2, d_memory=4)
    model = dataclasses.replace(config.model, moe=moe, personal=personal, copy="services")
    folder = tmp_path_factory.mktemp("trained")
    evaluation = dataclasses.replace(config.eval, effects=True)
    run(dataclasses.replace(config, model=model, eval=evaluation, baselines=()), folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return load_run(folder)


def test_a_run_reports_what_its_answers_lose_without_the_own_profile_and_context(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {part: set(edits) for part, edits in metrics["proofs"].items()} == {
        "profile": {"swapped", "mean", "empty"},
        "context": {"permuted", "missing"},
    }
    own = metrics["test"]["union"]["all"]["ndcg@10"]
    effects = [effect for edits in metrics["proofs"].values() for effect in edits.values()]
    for effect in effects:
        assert effect["difference"] == pytest.approx(own - effect["ndcg@10"], abs=1e-9)
        assert 0 < effect["p_value"] <= 1
    assert any(effect["difference"] for effect in effects)


def ask_like(trained, event: int) -> Request:
    """The request of an event of the log."""
    dataset = trained.data.dataset
    context = {
        name: values[code - 1]
        for (name, values), code in zip(dataset.context.items(), dataset.log.context[event], strict=True)
        if code
    }
    return Request(int(dataset.log.time[event]), context)


def test_the_list_is_that_of_the_evaluation(trained):
    """All events of a person are the history, behind which one more event stands, with the request of their first."""
    dataset, config = trained.data.dataset, trained.config
    log, person = dataset.log, 5
    rows = np.arange(*log.offsets[person : person + 2])
    order = np.concatenate([rows, rows[:1]])
    longer = log.take(order, np.array([0, len(order)]))
    alone = dataclasses.replace(
        dataset,
        log=longer,
        people=dataset.people[[person]],
        profile={name: values[[person]] for name, values in dataset.profile.items()},
    )
    examples = EvaluationSet(alone, np.array([len(rows)]), config)
    ((_, batch, questions),) = examples.batches()
    # The codes of the fields are those of the whole data set.
    fields = np.where(batch.segment_BT[..., None] > 0, dataset.profile_codes[0][person], 0).astype(np.int32)
    vectors = catalogue_vectors(trained.model, trained.table)
    scores = score_items(trained.model, batch._replace(field_BTY=fields), questions.slot, trained.table, vectors)[0]
    log_p = np.asarray(jax.nn.log_softmax(scores))
    answer = recommend(trained, str(dataset.people[person]), ask_like(trained, int(rows[0])), 7)
    np.testing.assert_allclose(answer.log_p, np.sort(log_p)[::-1][:7], atol=1e-5)
    np.testing.assert_allclose(log_p[answer.item], answer.log_p, atol=1e-5)
    for share in (answer.domain, answer.relevance, answer.weight):
        assert share.sum() == pytest.approx(1, abs=1e-5)
    assert (len(answer.domain), len(answer.relevance), len(answer.weight)) == (3, 5, 5)


def test_a_service_and_seen_items_narrow_the_list(trained):
    dataset = trained.data.dataset
    person, (lo, hi) = str(dataset.people[0]), dataset.log.offsets[:2]
    everything = recommend(trained, person, Request(), 10_000)
    assert sorted(everything.item.tolist()) == list(range(dataset.catalogue.n_items))
    assert np.exp(everything.log_p).sum() == pytest.approx(1, abs=1e-4)
    service = dataset.catalogue.services[1]
    own = recommend(trained, person, Request(service=service), 10_000).item
    assert own.tolist() == [i for i in everything.item if dataset.catalogue.service[i] == 1]
    masked = trained._replace(
        config=dataclasses.replace(trained.config, eval=dataclasses.replace(trained.config.eval, mask_seen=True))
    )
    rest = recommend(masked, person, Request(), 10_000).item
    seen = set(dataset.log.item[lo:hi].tolist())
    assert rest.tolist() == [i for i in everything.item if i not in seen]


def test_context_and_time_change_the_answer(trained):
    person, features = str(trained.data.dataset.people[0]), trained.data.dataset.context
    plain = recommend(trained, person, Request(), 5)
    name, values = next(iter(features.items()))
    for request in (Request(time=1_700_000_000), Request(context={name: values[0]}), Request(context={name: "new"})):
        assert np.abs(recommend(trained, person, request, 5).log_p - plain.log_p).max() > 1e-6


def test_a_value_that_no_event_has_is_unseen_and_a_number_finds_its_range(trained):
    dataset, schema = trained.data.dataset, trained.config.data.schema
    features = {"heat": ("below 0", "0 to 20", "from 20"), "sky": ("blue", "grey")}
    log = dataset.log.take(np.arange(3), np.array([0, 3]))
    log = dataclasses.replace(log, context=np.array([[1, 1], [2, 0], [4, 1]], np.int16))
    data = dataclasses.replace(trained.data, dataset=dataclasses.replace(dataset, context=features, log=log))
    schema = dataclasses.replace(schema, context=("heat", "sky"), context_edges=("heat=0,20",))
    config = dataclasses.replace(trained.config, data=dataclasses.replace(trained.config.data, schema=schema))
    own = trained._replace(config=config, data=data)
    for context, codes in (
        ({}, [0, 0]),
        ({"heat": "-3.5", "sky": "blue"}, [1, 1]),
        ({"heat": "0", "sky": "grey"}, [2, 3]),
        ({"heat": "0 to 20", "sky": "pink"}, [2, 3]),
        ({"heat": "31"}, [4, 0]),
        ({"heat": "nan"}, [0, 0]),
    ):
        assert encode_context(own, context) == codes
    with pytest.raises(InputError, match="'warm' is no number"):
        encode_context(own, {"heat": "warm"})


def test_an_answer_in_words(trained):
    answer = recommend(trained, str(trained.data.dataset.people[0]), Request(), 3)
    found = describe_answer(trained, answer)
    assert len(found["items"]) == 3
    assert len(found["lines"]) == 5
    assert found["items"][0]["text"] in found["lines"][0]
    assert json.loads(json.dumps(to_plain(found)))["domain"].keys() == set(trained.data.dataset.catalogue.services)


@pytest.mark.parametrize(
    ("person", "request_", "word"),
    [
        ("nobody at all", Request(), "person 'nobody at all': nobody is called so; the first is 'p000000'"),
        ("", Request(context={"sky": "blue"}), "context 'sky'"),
        ("", Request(service="post"), "service 'post'"),
    ],
)
def test_what_is_not_there_is_named(trained, person, request_, word):
    with pytest.raises(InputError, match=word):
        recommend(trained, person or str(trained.data.dataset.people[0]), request_, 3)


def test_requests_in_words():
    assert read_request(["weather=rain", "a=b=c"], "2024-05-01T09:00", "kuper") == Request(
        1714554000, {"weather": "rain", "a": "b=c"}, "kuper"
    )
    assert read_request([], "2024-05-01T09:00+03:00", "").time == 1714554000 - 3 * 3600
    assert read_request([], "", "") == Request()
    for context, time in ((["weather"], ""), (["=rain"], ""), ([], "tomorrow")):
        with pytest.raises(InputError):
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
    ):
        path.write_text(json.dumps(change))
        with pytest.raises(InputError, match=word):
            read_config(path)
    path.write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        read_config(path)
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path / "nowhere.json")


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        load_run(tmp_path)
