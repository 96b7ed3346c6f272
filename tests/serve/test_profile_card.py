"""Portraits against sums by hand, and the lists in them against those that are asked for one by one."""

import dataclasses
import datetime
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import profile as command
from moerec.config import PersonalConfig, cli
from moerec.data.dataset import ItemTable
from moerec.errors import InputError
from moerec.nn.profile.memory import decay_rates
from moerec.serve.aspects import name_aspects
from moerec.serve.explained import recommend
from moerec.serve.profile_card import describe_card, next_time, render_card, summarize_profile
from moerec.serve.request import RecommendRequest
from moerec.train.run_dir import Run
from tests.tiny import make_config, make_untrained

N_ASPECTS, N_SCALES = 3, 2


def make_trained(folder, personal: PersonalConfig) -> Run:
    config = make_config()
    model = dataclasses.replace(config.model, personal=personal)
    return make_untrained(folder, dataclasses.replace(config, model=model))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    personal = PersonalConfig(layers=(1,), n_aspects=N_ASPECTS, n_scales=N_SCALES, d_memory=4)
    return make_trained(tmp_path_factory.mktemp("card"), personal)


def test_evidence_is_what_the_events_left_by_the_time_of_the_request(trained):
    dataset, model, user = trained.data.dataset, trained.predictor.params, 7
    rows = np.arange(*dataset.log.offsets[user : user + 2])
    time = int(dataset.log.time_us[rows[-1]]) // 10**6 + 5 * 86400
    found = summarize_profile(trained, str(dataset.users[user]), [time], {}, "weather", 3)
    x_TD = np.asarray(
        model.event_vectors(dataset.log.item[rows], dataset.log.action[rows], trained.catalog), np.float64
    )
    x_TD /= np.sqrt((x_TD**2).mean(axis=1, keepdims=True) + 1e-6)
    weight_TA = np.exp(x_TD @ np.asarray(model.profile.aspect_DX[...], np.float64))
    share_TA = weight_TA / weight_TA.sum(axis=1, keepdims=True)  # at first a strength of one
    rate_AS = np.asarray(decay_rates(model.profile), np.float64).reshape(N_ASPECTS, N_SCALES)
    hours_T = (time - dataset.log.time_us[rows] / 10**6) / 3600
    left = np.einsum("TA,TAS->A", share_TA, np.exp(-rate_AS * hours_T[:, None, None]))
    for aspect in found.aspects:
        assert aspect.evidence == pytest.approx(left[aspect.number], rel=1e-4)
        np.testing.assert_allclose(aspect.half_lives, np.log(2) / rate_AS[aspect.number], rtol=1e-5)
    assert sum(found.n_events.values()) == len(rows)
    total = sum(aspect.relevance[0] for aspect in found.aspects) + found.field_relevance[0]
    assert total == pytest.approx(1, abs=1e-5)


def test_lists_are_those_that_are_asked_for_in_each_context(trained):
    dataset, name = trained.data.dataset, str(trained.data.dataset.users[3])
    rows = np.arange(*dataset.log.offsets[3:5])
    found = summarize_profile(trained, name, [], {"holiday": "none"}, "weather", 4)
    last = dict(zip(dataset.context, dataset.log.context[rows[-1]], strict=True))
    temperature = dataset.context["temperature"][last["temperature"] - 1]
    assert found.context["temperature"] == temperature
    time = int(datetime.datetime.strptime(found.requests[0] + "+0000", "%a %Y-%m-%d %H:%M%z").timestamp())
    listed = set()
    for value in dataset.context["weather"]:
        context = {"weather": value, "holiday": "none", "temperature": temperature}
        answer = recommend(trained, name, RecommendRequest(time, context), 4)
        listed |= {str(dataset.catalogue.text[i]) for i in answer.item}
        for place, (item, log_p) in enumerate(zip(answer.item, answer.log_p, strict=True), 1):
            (effect,) = [
                w
                for w in found.context_effects
                if (w.id, w.text) == (dataset.catalogue.ids[item], dataset.catalogue.text[item])
            ]
            assert (effect.rank[value], effect.p[value]) == (place, pytest.approx(np.exp(log_p)))
    assert {effect.text for effect in found.context_effects} == listed


def test_requests_are_a_saturday_evening_and_a_monday_morning_after_the_last_event(trained):
    dataset = trained.data.dataset
    found = summarize_profile(trained, str(dataset.users[0]), [], {}, "weather", 1)
    last = dataset.log.time_us[dataset.log.offsets[1] - 1] / 10**6
    for text, weekday, hour in zip(found.requests, (5, 0), (20, 8), strict=True):
        when = datetime.datetime.strptime(text + "+0000", "%a %Y-%m-%d %H:%M%z")
        assert (when.weekday(), when.hour) == (weekday, hour)
        assert 0 < when.timestamp() - last <= 7 * 86400
    monday_8 = int(datetime.datetime(2024, 1, 1, 8, tzinfo=datetime.UTC).timestamp())
    assert next_time(monday_8, 0, 8) == monday_8 + 7 * 86400
    assert next_time(monday_8 - 1, 0, 8) == monday_8


def test_a_request_in_the_past_has_the_context_of_the_event_before_it(trained):
    dataset = trained.data.dataset
    rows = np.arange(*dataset.log.offsets[4:6])
    before = rows[np.flatnonzero(np.diff(dataset.log.time_us[rows]) > 60 * 10**6)[0]]
    found = summarize_profile(
        trained, str(dataset.users[4]), [int(dataset.log.time_us[before]) // 10**6 + 30], {}, "weather", 1
    )
    told = {
        name: values[code - 1]
        for (name, values), code in zip(dataset.context.items(), dataset.log.context[before], strict=True)
    }
    assert found.context == told
    assert next(iter(found.context_effects[0].rank)) == told["weather"]  # the value in force comes first


def test_columns_of_requests_are_told_apart(trained):
    name, monday_8 = (
        str(trained.data.dataset.users[1]),
        int(datetime.datetime(2025, 1, 6, 8, tzinfo=datetime.UTC).timestamp()),
    )
    for second, heads in ((86400, "Mon 08:00  Tue 08:00"), (7 * 86400, "Mon 2025-01-06 08:00  Mon 2025-01-13 08:00")):
        found = summarize_profile(trained, name, [monday_8, monday_8 + second], {}, "weather", 1)
        head, *rows = render_card(found).splitlines()[3 : 3 + 1 + N_ASPECTS + 1]
        assert f"relevance to {heads} " in head
        right = [head.index(heads) + len(part) for part in (heads.split("  ")[0], heads)]
        assert all(row[end - 3 : end - 2] == "." for row in rows for end in right)


def test_an_aspect_is_named_by_what_writes_more_into_it_than_into_others(trained, monkeypatch):
    attributes = np.array(["kind=tea brand=a", "kind=tea brand=b", "kind=toy brand=a", ""])
    catalogue = ItemTable(("z",), np.array([0, 4]), np.array(["1", "2", "3", "x4"]), np.array([""] * 4), attributes)
    share_IX = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    monkeypatch.setattr("moerec.eval.probes.profile_aspects.share_items", lambda *_: share_IX)
    monkeypatch.setattr("moerec.serve.aspects.LEAST_EVENTS", 2)
    table = trained.catalog._replace(count_I=jnp.array([4, 2, 4, 2]))
    first, second = name_aspects(catalogue, trained.predictor.params, table)
    # Aspect 0 gets 3.6 + 1.8 + .8 + 1 = 7.2 of 12, of which tea 5.4 of 6 events.
    assert next(iter(first)) == "brand=b"
    assert first["kind=tea"] == pytest.approx((5.4 / 7.2) / (6 / 12))
    assert next(iter(second)) == "kind=toy"
    assert second["x4"] == pytest.approx((1 / 4.8) / (2 / 12))
    assert "kind=tea" not in second


def test_items_of_a_large_catalogue_name_aspects_where_there_are_no_attributes(trained, monkeypatch):
    n = 3000
    ids, blank = np.array([f"i{k}" for k in range(n)]), np.array([""] * n)
    catalogue = ItemTable(("z",), np.array([0, n]), ids, blank, blank)
    share_IX = np.full((n, 2), 0.5)
    share_IX[7], share_IX[8] = (1, 0), (1, 0)
    monkeypatch.setattr("moerec.eval.probes.profile_aspects.share_items", lambda *_: share_IX)
    count = np.full(n, 30)
    count[8] = 3  # too few to tell
    first, second = name_aspects(
        catalogue, trained.predictor.params, trained.catalog._replace(count_I=jnp.asarray(count))
    )
    assert next(iter(first)) == "i7"
    assert not {"i7", "i8"} & set(second)
    assert "i8" not in first


def test_without_a_feature_there_is_one_list(trained):
    name = str(trained.data.dataset.users[2])
    found = summarize_profile(trained, name, [], {}, "", 3)
    assert [effect.rank for effect in found.context_effects] == [{"": 1}, {"": 2}, {"": 3}]
    assert "rank and p\n" in render_card(found)


@pytest.mark.parametrize("personal", [PersonalConfig(), PersonalConfig(layers=(1,), memory="low_rank")])
def test_a_run_without_aspects_has_no_profile_card(tmp_path, personal):
    trained = make_trained(tmp_path, personal)
    with pytest.raises(InputError, match="keeps no profile of aspects"):
        summarize_profile(trained, str(trained.data.dataset.users[0]), [], {}, "weather", 3)


def test_the_command_prints_it_and_refuses_an_unknown_feature(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("moerec.train.run_dir.load_run", lambda _: trained)

    def run(*flags):
        code = cli.execute(
            command.main, ["profile", f"--workdir={tmp_path}", *flags], None, command.FLAGS, config_type=None
        )
        return code, capsys.readouterr()

    code, said = run("--time=2025-01-01T09:00,2025-01-04T20:00", "--top_k=2", "--vary=temperature", "--json")
    assert code == 0
    *lines, last = said.out.splitlines()
    found = json.loads(last)
    assert found["requests"] == ["Wed 2025-01-01 09:00", "Sat 2025-01-04 20:00"]
    assert len(found["aspects"]) == N_ASPECTS
    user = str(trained.data.dataset.users[0])
    times = [int(datetime.datetime(2025, 1, d, h, tzinfo=datetime.UTC).timestamp()) for d, h in ((1, 9), (4, 20))]
    card = summarize_profile(trained, user, times, {}, "temperature", 2)
    assert "\n".join(lines) == render_card(card)
    assert json.loads(json.dumps(describe_card(card))) == found
    code, said = run("--vary=mood")
    assert (code, said.err.count("\n")) == (2, 1)
    assert "--vary: 'mood' is none of" in said.err
