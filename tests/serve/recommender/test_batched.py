"""Answers for many users at once: those of a single request, whoever else is in the batch; each shape compiled once."""

import dataclasses

import jax
import numpy as np
import pytest

import moerec
from moerec.config import AskConfig, MoEConfig, PersonalConfig
from moerec.errors import InputError
from moerec.serve.explained import recommend
from moerec.serve.recommender import Recommender, UserEvent, UserHistory
from moerec.serve.recommender.packed_requests import WIDTHS
from moerec.serve.request import RecommendRequest
from tests.small_model import fill
from tests.tiny import make_config, make_untrained, replace_parts

TIME = 1_900_000_000.0
CONTEXT = {"weather": "rain"}


def make_run(folder, **model):
    config = make_config()
    data = dataclasses.replace(config.data, text_neighbors=4, transition_neighbors=5, crossing_neighbors=6)
    parts = dataclasses.replace(config.model, pointer="services", **model)
    evaluation = dataclasses.replace(config.eval, mask_seen=True)
    config = dataclasses.replace(config, data=data, model=parts, eval=evaluation)
    return make_untrained(folder, config, lambda shapes: fill(shapes, stddev=0.3))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    parts = {
        "ask": AskConfig(from_layer=1, d_analyser=8),
        "moe": MoEConfig(layers=(1,), n_per_group=2, d_expert=8, tile=8),
        "personal": PersonalConfig(layers=(1,), n_aspects=2, n_scales=2, d_memory=4),
        "repeat_bias": True,
    }
    pointers = {f"{name}_pointer": True for name in ("text", "transition", "crossing")}
    return make_run(tmp_path_factory.mktemp("asked"), **parts, **pointers)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of which no service is asked: experts, a profile and pointers."""
    moe = MoEConfig(layers=(1,), n_per_group=1, d_expert=8, tile=8)
    personal = PersonalConfig(layers=(1,), n_aspects=2, n_scales=2, d_memory=4)
    return make_run(tmp_path_factory.mktemp("mixed"), moe=moe, personal=personal, text_pointer=True)


@pytest.fixture(params=["asked", "mixed"])
def run(request):
    return request.getfixturevalue(request.param)


def name_users(run, *numbers):
    return [str(name) for name in run.data.dataset.users[list(numbers)]]


def as_history(run, user: int) -> UserHistory:
    """The events of a user of the data, as somebody in no table has them."""
    dataset, log = run.data.dataset, run.data.dataset.log
    events = []
    for row in range(*log.offsets[user : user + 2]):
        codes = zip(dataset.context.items(), log.context[row].tolist(), strict=True)
        context = {name: values[code - 1] for (name, values), code in codes if 0 < code <= len(values)}
        item, seconds = log.item[row], log.time_us[row] / 1e6
        service = dataset.catalogue.services[dataset.catalogue.service[item]]
        events.append(UserEvent(str(dataset.catalogue.ids[item]), service, seconds, context=context))
    fields = {name: str(values[user]) for name, values in dataset.profile.items() if values[user]}
    return UserHistory(events, fields)


def test_each_of_a_batch_gets_the_answer_of_a_single_request(run):
    users = name_users(run, 3, 11, 7, 30)
    found = Recommender(run).recommend(users, time=TIME, context=CONTEXT, k=6)
    for row, user in enumerate(users):
        alone = recommend(run, user, RecommendRequest(TIME, CONTEXT), 6)
        np.testing.assert_array_equal(found.item[row], alone.item)
        np.testing.assert_allclose(found.log_p[row], alone.log_p, atol=2e-5)
        np.testing.assert_allclose(found.domain[row], alone.domain, atol=1e-5)


def test_what_components_gave_of_an_item_is_as_in_the_answer_of_its_service(asked):
    (user,) = name_users(asked, 5)
    evaluation = dataclasses.replace(asked.config.eval, mask_seen=False)  # copies are of items that were seen
    asked = replace_parts(asked, config=dataclasses.replace(asked.config, eval=evaluation))
    found = Recommender(asked).recommend([user], time=TIME, k=90)
    alone = recommend(asked, user, RecommendRequest(TIME), 90).asked
    n_compared = 0
    for answer in alone.answers:
        for item, part in zip(answer.item.tolist(), answer.part, strict=True):
            (place,) = np.nonzero(found.item[0] == item)
            if len(place):
                np.testing.assert_allclose(found.part[0, place[0]], part, atol=1e-5)
                n_compared += 1
        name = asked.data.dataset.catalogue.services[answer.service]
        (trace,) = Recommender(asked).routing([user], time=TIME, service=name)
        weight_G = np.bincount(trace.expert_BLTA[0, 0, -1] // 2, trace.weight_BLTA[0, 0, -1], 4)  # two experts a group
        own = asked.data.dataset.catalogue.service[found.item[0]] == answer.service
        assert (found.group[0][own] == np.argmax(weight_G)).all()
    assert n_compared == 90
    assert (found.part[0] > 1e-6).any(axis=0).sum() >= 4  # of components that gave something


def test_parts_of_a_model_in_which_no_service_is_asked_add_up(mixed):
    found = Recommender(mixed).recommend(name_users(mixed, 1, 2), time=TIME, k=5)
    np.testing.assert_allclose(found.part.sum(axis=2), np.exp(found.log_p), rtol=1e-4)
    assert len(found.components) == found.part.shape[2]


def test_an_answer_is_bitwise_the_same_whoever_else_is_in_the_batch(run):
    recommender, users = Recommender(run), [str(name) for name in run.data.dataset.users[:40]]
    everybody = recommender.recommend(users, time=TIME)
    order = np.random.default_rng(0).permutation(40)
    shuffled = recommender.recommend([users[k] for k in order], time=TIME)
    some = recommender.recommend(users[4:31], time=TIME)  # as many as need rows of the same number
    for name in ("item", "log_p", "part", "group", "domain"):
        np.testing.assert_array_equal(getattr(everybody, name)[order], getattr(shuffled, name))
        np.testing.assert_array_equal(getattr(everybody, name)[4:31], getattr(some, name))


def test_the_second_call_of_a_shape_compiles_nothing(mixed):
    recommender, users = Recommender(mixed), name_users(mixed, 8, 9, 10)
    compiled = []

    def note(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    def answer(chosen, k):
        recommender.recommend(chosen, time=TIME, k=k)
        recommender.score(chosen)
        recommender.user_states(chosen)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        jax.clear_caches()
        answer(users, 5)
        assert compiled
        compiled.clear()
        answer(users[::-1], 5)
        answer(users[:2], 5)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_a_history_is_answered_as_the_user_who_has_it(run):
    recommender, user = Recommender(run), 6
    (name,) = name_users(run, user)
    known = recommender.recommend([name], time=TIME, context=CONTEXT)
    given = recommender.recommend(histories=[as_history(run, user)], time=TIME, context=CONTEXT)
    for field in ("item", "log_p", "part"):
        np.testing.assert_array_equal(getattr(known, field), getattr(given, field))


def test_times_are_of_one_meaning_in_all_their_forms(mixed):
    (name,) = name_users(mixed, 2)
    recommender = Recommender(mixed)
    forms = [TIME, "2030-03-17T17:46:40", np.datetime64("2030-03-17T17:46:40"), "2030-03-17T17:46:40Z"]
    found = recommender.recommend([name] * 4, time=forms)
    assert (found.log_p == found.log_p[0]).all()
    early = int(mixed.data.dataset.log.time_us[mixed.data.dataset.log.offsets[2] + 4] // 10**6)
    cut = recommender.recommend(
        histories=[as_history(mixed, 2)._replace(events=as_history(mixed, 2).events[:4])], time=early
    )
    np.testing.assert_array_equal(recommender.recommend([name], time=early).log_p, cut.log_p)


def test_scores_are_a_distribution_and_the_lists_are_their_best(run):
    recommender, users = Recommender(run), name_users(run, 0, 20)
    log_p = recommender.score(users, time=TIME)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, atol=1e-5)
    names, vectors = recommender.item_vectors()
    assert log_p.shape == (2, len(names))
    assert vectors.shape == (len(names), run.config.model.d_model)
    assert len(set(names)) == len(names)
    had = run.data.dataset.log.item[slice(*run.data.dataset.log.offsets[:2])]
    log_p[0, had] = -np.inf
    found = recommender.recommend(users[:1], time=TIME, k=7)
    np.testing.assert_array_equal(found.item[0], np.argsort(-log_p[0], kind="stable")[:7])


def test_services_and_exclusions_narrow_a_list_and_leave_its_probabilities(run):
    recommender, users = Recommender(run), name_users(run, 4, 12)
    catalogue = run.data.dataset.catalogue
    full = recommender.recommend(users, time=TIME, k=90)
    kuper = recommender.recommend(users, time=TIME, k=90, services=["kuper"])
    for row in range(2):
        is_own = (full.item[row] >= 0) & (catalogue.service[full.item[row]] == catalogue.services.index("kuper"))
        n = is_own.sum()
        np.testing.assert_array_equal(kuper.item[row, :n], full.item[row][is_own])
        np.testing.assert_array_equal(kuper.log_p[row, :n], full.log_p[row][is_own])
        assert (kuper.item[row, n:] == -1).all()
    best = [[(catalogue.services[catalogue.service[i]], str(catalogue.ids[i]))] for i in full.item[:, 0]]
    each = recommender.recommend(users, time=TIME, k=5, exclude=best)
    np.testing.assert_array_equal(each.item, full.item[:, 1:6])
    common = recommender.recommend(users, time=TIME, k=5, exclude=best[0])
    np.testing.assert_array_equal(common.item[0], full.item[0, 1:6])


def test_rows_of_a_table_name_everything(asked):
    users = name_users(asked, 3, 9)
    found = Recommender(asked).recommend(users, time=TIME, k=4)
    rows = found.to_table().to_pylist()
    assert [(row["user"], row["rank"]) for row in rows] == [(user, rank) for user in users for rank in (1, 2, 3, 4)]
    assert {row["group"] for row in rows} <= {*asked.data.dataset.catalogue.services, "cross"}
    assert {row["component"] for row in rows} <= {"softmax", "own", "shared", "text", "transitions", "crossings"}
    np.testing.assert_allclose([row["p"] for row in rows], np.exp(found.log_p).ravel(), rtol=1e-6)


def test_rows_of_a_table_tell_histories_apart(mixed):
    found = Recommender(mixed).recommend(histories=[as_history(mixed, 2), [], as_history(mixed, 3)], time=TIME, k=2)
    names = ["history 0", "history 0", "history 1", "history 1", "history 2", "history 2"]
    assert found.to_table()["user"].to_pylist() == names


def test_states_and_vectors_make_the_scores(mixed):
    """In a dense model without pointers: a dot product and a bias."""
    config = make_config()
    run = make_untrained(mixed.folder / "dense", config, fill)
    recommender, users = Recommender(run), name_users(run, 1, 2)
    _, vectors = recommender.item_vectors()
    logits = recommender.user_states(users) @ vectors.T + np.asarray(run.catalog.bias_I)
    by_hand = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    np.testing.assert_allclose(recommender.score(users), by_hand, atol=1e-5)


def test_slots_show_whom_they_attend_to_and_which_experts_they_go_to(asked):
    recommender, users = Recommender(asked), name_users(asked, 3, 14)
    lengths = [int(asked.data.dataset.log.offsets[k + 1] - asked.data.dataset.log.offsets[k]) for k in (3, 14)]
    slots = [min(n, 16) + (n < 16) for n in lengths]
    for trace, n in zip(recommender.attention(users, service="kuper"), slots, strict=True):
        assert trace.attention_BLNTS.shape == (1, 2, 2, n, n)
        total = trace.attention_BLNTS.sum(axis=-1) + trace.memory_BLNTM.sum(axis=-1)
        np.testing.assert_allclose(total, 1, atol=1e-5)
        assert (np.triu(trace.attention_BLNTS[0, 0, 0], 1) == 0).all()
    for trace, n in zip(recommender.routing(users, service="kuper"), slots, strict=True):
        assert trace.expert_BLTA.shape == (1, 1, n, 2)
        last = trace.expert_BLTA[0, 0, -1] // 2  # two experts a group; the own one and the cross group are open
        assert {*last.tolist()} <= {asked.data.dataset.catalogue.services.index("kuper"), 3}
        assert trace.attention_BLNTS is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "one of the two"),
        ({"users": "p1"}, "a list of names"),
        ({"users": ["nobody"]}, "no such user as 'nobody'"),
        ({"users": [], "time": "yesterday"}, "yesterday"),
        ({"histories": [[UserEvent("no such")]]}, "no item 'no such'"),
        ({"histories": [[UserEvent("x", "nowhere")]]}, "service 'nowhere' is none of"),
        ({"histories": [[]], "k": 0}, "k: must be a whole number of at least 1, not 0"),
        ({"histories": [[]], "k": 2.5}, "k: must be a whole number"),
        ({"histories": [UserEvent("x")]}, r"histories\[0\]: must be a list of UserEvent"),
        ({"histories": [[], ["abc"]]}, r"histories\[1\]: must be a list of UserEvent"),
        ({"histories": [[]], "time": True}, "True is no time"),
        ({"histories": [[]], "context": [None]}, r"context\[0\]: None is no mapping"),
        ({"histories": [UserHistory(fields={"no": "1"})]}, r"histories\[0\]: 'no' is none of"),
        ({"histories": [[]], "time": [1.0, 2.0]}, "2 times for 1 requests"),
        ({"histories": [[]], "services": ["nowhere"]}, "'nowhere' is none of"),
        ({"histories": [[]], "context": {"mood": "bad"}}, "'mood' is none of"),
        ({"histories": [[]], "exclude": [("kuper", "none")]}, "exclude: no item 'none' of kuper"),
        ({"histories": [[]], "time": 1e12}, "must lie between 1932 and 2068"),
    ],
)
def test_wrong_use_is_named(mixed, arguments, told):
    with pytest.raises(InputError, match=told):
        Recommender(mixed).recommend(**arguments)


def test_a_history_that_goes_back_in_time_is_refused(mixed):
    catalogue = mixed.data.dataset.catalogue
    keys = [(str(catalogue.ids[i]), catalogue.services[catalogue.service[i]]) for i in (3, 4, 5)]
    times = ["2024-01-02", None, "2024-01-01"]
    events = [UserEvent(item, service, time) for (item, service), time in zip(keys, times, strict=True)]
    with pytest.raises(InputError, match=r"histories\[1\]: events must be oldest first"):
        Recommender(mixed).recommend(histories=[[], events])
    Recommender(mixed).recommend(histories=[events[2:], events[:2]])


def test_rows_are_of_few_lengths_and_never_longer_than_in_training(mixed):
    assert WIDTHS[:3] == (16, 64, 256)
    (packed,) = moerec.serve.recommender.packed_requests.pack_requests(
        mixed, Recommender(mixed)._read(name_users(mixed, 0), None, None, None)
    )
    assert packed.batch.kind_BT.shape[1] <= mixed.config.data.seq_len
