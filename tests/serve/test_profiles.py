"""Profiles in a store: answers from one and the last events against those from the whole history in one row."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import observe as observe_command
from experiments import recommend as recommend_command
from moerec.config import Config, PersonalConfig, cli
from moerec.errors import InputError
from moerec.nn.profile import Event, make_personalizer
from moerec.serve.explained import recommend
from moerec.serve.profiles import (
    count_recent,
    describe_feed,
    explain_difference,
    feed,
    forget,
    observe_events,
    open_profiles,
    read_profile,
    start_profile,
)
from moerec.serve.request import RecommendRequest
from moerec.train.run_dir import Run
from tests.small_model import fill
from tests.tiny import make_config, make_untrained, replace_parts

WINDOW = 2
# The two ways to a state differ by few of float32's steps (`test_memory` holds both against float64), and changing a
# state by three steps moves these answers, whose logarithms lie near -8, by up to 5e-6.
ROUNDING = {"atol": 1e-5, "rtol": 4e-6}


def make_long_config(memory: str = "ema", window: int = WINDOW) -> Config:
    """Two layers that see two events each, and a profile; a row holds whole histories."""
    config = make_config()
    personal = PersonalConfig(layers=(1,), memory=memory, n_aspects=3, d_memory=4, rank=2)
    city = dataclasses.replace(config.data.city, n_users=12, events_per_user=24)
    data = dataclasses.replace(config.data, city=city, seq_len=64, history_len=64)
    model = dataclasses.replace(config.model, window=window, event_time=True, personal=personal)
    return dataclasses.replace(config, data=data, model=model)


def make_trained(folder, config: Config, seed: int = 0) -> Run:
    return make_untrained(folder, config, lambda params: fill(params, seed, stddev=0.3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def trained(folder):
    return make_trained(folder, make_long_config())


def feed_all(trained: Run, store, recent: int, before_us: int | None = None):
    return feed(store, trained.predictor.params, trained.data.dataset, trained.catalog, recent, before_us)


def ask_later(trained: Run) -> RecommendRequest:
    return RecommendRequest(int(trained.data.dataset.log.time_us.max()) // 10**6 + 3600, {"weather": "rain"})


@pytest.mark.parametrize("memory", ["ema", "delta", "low_rank"])
def test_the_last_events_and_a_profile_answer_as_the_whole_history_does(tmp_path, memory):
    trained = make_trained(tmp_path, make_long_config(memory))
    dataset, recent = trained.data.dataset, count_recent(trained.config)
    assert recent == 2 * (WINDOW - 1) + 2
    store = open_profiles(tmp_path / "store", trained.predictor.params, create=True)
    done = feed_all(trained, store, recent)
    lengths = np.diff(dataset.log.offsets)
    assert done[:3] == (np.sum(lengths > recent), np.sum(np.maximum(lengths - recent, 0)), np.sum(lengths <= recent))
    request = ask_later(trained)
    for user in dataset.users[:6]:
        profile, is_stored = read_profile(store, trained.predictor.params, dataset, str(user))
        assert is_stored
        whole = recommend(trained, str(user), request, 20)
        found = recommend(trained, str(user), request, 20, profile)
        np.testing.assert_array_equal(found.item, whole.item)
        np.testing.assert_allclose(found.log_p, whole.log_p, **ROUNDING)
        np.testing.assert_allclose(found.relevance, whole.relevance, atol=1e-5)
        nobody = recommend(trained, str(user), request, 20, start_profile(trained.predictor.params))
        np.testing.assert_allclose(nobody.log_p, whole.log_p, **ROUNDING)
        cut = profile._replace(memory_MP=0 * profile.memory_MP)
        other = recommend(trained, str(user), request, 20, cut)
        assert np.abs(other.log_p - whole.log_p).max() > 1e-4  # what lies before counts


def test_events_that_a_row_does_not_hold_go_into_the_profile(tmp_path):
    """A history longer than a row, without a store: what does not fit is observed first."""
    config = make_long_config()
    trained = make_trained(tmp_path, config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, history_len=6))
    short, request = replace_parts(trained, config=config), ask_later(trained)
    user, nobody = str(trained.data.dataset.users[1]), start_profile(trained.predictor.params)
    whole = recommend(trained, user, request, 9)
    np.testing.assert_allclose(recommend(short, user, request, 9, nobody).log_p, whole.log_p, atol=1e-5)
    assert np.abs(recommend(short, user, request, 9).log_p - whole.log_p).max() > 1e-4


def test_profiles_go_on_where_they_are(trained, tmp_path):
    """In two steps by date, and at once: the states of one event after the other."""
    dataset, model = trained.data.dataset, trained.predictor.params
    log, middle = dataset.log, int(np.median(dataset.log.time_us))
    steps, once = (open_profiles(tmp_path / name, model, create=True) for name in ("steps", "once"))
    first = feed_all(trained, steps, 0, middle)
    assert first.n_events == np.sum(log.time_us < middle)
    assert first.n_events + feed_all(trained, steps, 0).n_events == log.n_events
    assert feed_all(trained, steps, 0)[:4] == (0, 0, 0, 0)
    assert feed_all(trained, once, 0).n_users == log.n_users
    personalizer = make_personalizer(trained.config.model, model.field_sizes)
    names = [str(name) for name in dataset.users]
    states, versions, _ = steps.read(names)
    assert set(versions) <= {1, 2}
    for a, b in zip(states, once.read(names)[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    device = trained.data.dataset.log.time_us // 10**6 - 946_684_800
    for p in (0, 5):
        state = personalizer.init_user()
        for row in range(*log.offsets[p : p + 2]):
            x_D = model.event_vectors(log.item[row], log.action[row], trained.catalog)
            state = personalizer.update(model.profile, state, Event(x_D, jnp.int32(device[row])))
        for found, expected in zip(states, state, strict=True):
            np.testing.assert_allclose(found[p], expected, atol=1e-5)


def test_a_store_belongs_to_one_run_and_one_log(trained, tmp_path):
    dataset, model = trained.data.dataset, trained.predictor.params
    with pytest.raises(InputError, match="makes a store"):
        open_profiles(tmp_path / "none", model)
    store = open_profiles(tmp_path / "store", model, create=True)
    feed_all(trained, store, 0)
    assert len(open_profiles(tmp_path / "store", model, create=True)) == dataset.log.n_users
    with pytest.raises(InputError, match="profiles of another run"):
        open_profiles(tmp_path / "store", fill(model, 7))
    log = dataset.log
    time = log.time_us.copy()
    time[log.offsets[4] - 1] += 60 * 10**6  # the last event of the fourth user
    changed = dataclasses.replace(dataset, log=dataclasses.replace(log, time_us=time))
    with pytest.raises(InputError, match="has seen other events"):
        read_profile(store, model, changed, str(dataset.users[3]))
    assert read_profile(store, model, changed, str(dataset.users[4]))[0].n_events
    user = str(dataset.users[6])
    states, _, _ = store.read([user])
    for damaged in (-3, -(2**31), 2**31 - 1):  # what no model has written
        store.update([user], states._replace(n_events=np.full(1, damaged, np.int32)))
        with pytest.raises(InputError, match=f"{user!r} has seen other events"):
            read_profile(store, model, dataset, user)
    store.update([user], states)
    done = feed(store, model, changed, trained.catalog, 0)
    assert (done.n_refused, done.refused) == (1, (str(dataset.users[3]),))
    assert any("begin it anew" in line for line in describe_feed(done, 0, len(store)))


def test_one_late_event_keeps_nobody_else_back(trained, tmp_path):
    """Whose profile has seen other events is left out, and everybody else is taken further."""
    dataset, model = trained.data.dataset, trained.predictor.params
    store = open_profiles(tmp_path / "store", model, create=True)
    feed_all(trained, store, 2)
    before, versions, _ = store.read([str(dataset.users[3])])
    log = dataset.log
    time = log.time_us.copy()
    time[log.offsets[3]] -= 10**6 * 3600
    first = log.offsets[3] + int(before.n_events[0]) - 1
    time[first] += 10**6
    changed = dataclasses.replace(dataset, log=dataclasses.replace(log, time_us=time))
    done = feed(store, model, changed, trained.catalog, 0)
    assert done.n_refused == 1
    after, same, _ = store.read([str(dataset.users[3])])
    np.testing.assert_array_equal(same, versions)
    np.testing.assert_array_equal(after.memory_MP, before.memory_MP)
    others = [str(name) for k, name in enumerate(dataset.users) if k != 3]
    states, _, _ = store.read(others)
    np.testing.assert_array_equal(states.n_events, np.delete(np.diff(log.offsets), 3))


def test_who_is_forgotten_is_nobody(trained, tmp_path):
    dataset, model = trained.data.dataset, trained.predictor.params
    store = open_profiles(tmp_path / "store", model, create=True)
    feed_all(trained, store, 3)
    one, two = map(str, dataset.users[:2])
    assert forget(store, [one, "x"]) == ["x"]
    (found, is_stored), nobody = read_profile(store, model, dataset, one), start_profile(model)
    assert not is_stored
    for a, b in zip(found, nobody, strict=True):
        np.testing.assert_array_equal(a, b)
    assert read_profile(store, model, dataset, two)[0].n_events > 0


def test_a_profile_that_has_seen_everything_leaves_nothing_to_ask_with(trained):
    log, model = trained.data.dataset.log, trained.predictor.params
    start = jax.tree.map(lambda leaf: leaf[None], start_profile(model))
    n = np.diff(log.offsets[:2])
    states = observe_events(model, trained.catalog, log, start, log.offsets[:1], n)
    profile = jax.tree.map(lambda leaf: leaf[0], states)
    assert profile.n_events == n[0]
    with pytest.raises(InputError, match="has seen all events before the request"):
        recommend(trained, str(trained.data.dataset.users[0]), RecommendRequest(), 3, profile)


def test_a_run_without_a_profile_has_no_store(tmp_path):
    config = make_config()
    with pytest.raises(InputError, match="keeps no profile"):
        open_profiles(tmp_path / "store", make_trained(tmp_path, config).predictor.params, create=True)
    assert not (tmp_path / "store").exists()


def answer_by_profile(run: Run, store, user: str, request: RecommendRequest):
    profile, is_stored = read_profile(store, run.predictor.params, run.data.dataset, user)
    assert is_stored
    return recommend(run, user, request, 20, profile)


@pytest.mark.parametrize(
    ("window", "service_gap", "recent"),
    [(WINDOW, False, 3), (WINDOW, False, 4), (0, False, 10), (WINDOW, True, 10)],
)
def test_what_is_said_to_differ_differs_and_nothing_else_does(tmp_path, window, service_gap, recent):
    """Answers by a profile and the last events against those of the whole history in one row."""
    config = make_long_config(window=window)
    time = dataclasses.replace(config.model.time, service_gap=service_gap)
    run = make_trained(tmp_path, dataclasses.replace(config, model=dataclasses.replace(config.model, time=time)))
    store = open_profiles(tmp_path / "store", run.predictor.params, create=True)
    feed_all(run, store, recent)
    gaps = []
    for user in map(str, run.data.dataset.users[:4]):
        found, whole = answer_by_profile(run, store, user, ask_later(run)), recommend(run, user, ask_later(run), 20)
        gaps.append(np.abs(np.sort(found.log_p) - np.sort(whole.log_p)).max())
    assert bool(explain_difference(run.config, recent)) == (max(gaps) > 1e-4)


def test_without_a_window_a_row_of_events_stays_out():
    config = make_long_config(window=0)
    assert count_recent(config) == config.data.history_len


def test_the_commands(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moerec.serve.new_data.extend.load_run", lambda _: trained)
    user, store = str(trained.data.dataset.users[2]), f"--profiles={tmp_path / 'store'}"

    def call(module, *flags):
        arguments = ["command", "--workdir=run", *flags, "--json"]
        code = cli.execute(module.main, arguments, extra_flags=module.FLAGS, config_type=None)
        said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]) if code == 0 else said.err

    assert call(recommend_command, store)[0] == 2
    n_events, n_users = trained.data.dataset.log.n_events, trained.data.dataset.log.n_users
    left_out = count_recent(trained.config) * n_users
    done = {"n_users": n_users, "n_events": n_events - left_out, "n_too_recent": 0}
    done |= {"n_refused": 0, "refused": [], "n_stored": n_users}
    assert call(observe_command, store, f"--export={tmp_path / 'all.npz'}") == (0, done)
    with np.load(tmp_path / "all.npz") as found:
        ids, offsets = found["id_bytes"].tobytes(), found["id_offsets"]
        assert {ids[a:b].decode() for a, b in itertools.pairwise(offsets)} == set(trained.data.dataset.users)
        assert found["states/n_events"].sum() == n_events - left_out
    time = "--time=2026-01-01"
    code, with_store = call(recommend_command, store, f"--user={user}", time)
    assert code == 0
    whole = call(recommend_command, f"--user={user}", time)[1]
    assert [item["id"] for item in with_store["items"]] == [item["id"] for item in whole["items"]]
    assert [item["p"] for item in with_store["items"]] == pytest.approx(
        [item["p"] for item in whole["items"]], rel=1e-4
    )
    forgotten = {"n_forgotten": 1, "absent": ["x"], "n_stored": n_users - 1}
    assert call(observe_command, store, f"--forget={user},x") == (0, forgotten)
    code, error = call(observe_command)
    assert (code, error.startswith("error: --profiles is missing: ")) == (2, True)
    (tmp_path / "file").write_text("")
    wrong = {
        f"--profiles={tmp_path / 'file'}": "is no folder",
        "--recent=-5": "--recent: -5 is no number",
        "--before=soon": "--before: 'soon' is no ISO date",
    }
    for flag, words in wrong.items():
        code, error = call(observe_command, f"--profiles={tmp_path / 'new'}", flag)
        assert (code, words in error, error.count("\n")) == (2, True, 1)
    assert not (tmp_path / "new").exists()
    arguments = ["command", "--workdir=run", store, f"--user={user}"]
    assert cli.execute(recommend_command.main, arguments, extra_flags=recommend_command.FLAGS, config_type=None) == 0
    said = capsys.readouterr()
    assert said.err == f"{user}: no profile in the store; the last events alone count\n"
    assert "profile" not in said.out  # nor does any matter
    assert "relevance" not in call(recommend_command, store, f"--user={user}")[1]
    code, answer = call(observe_command, store, "--recent=100")
    assert (code, answer["n_too_recent"]) == (0, n_users)


def test_the_commands_say_where_a_profile_answers_otherwise_than_the_whole_history(tmp_path, monkeypatch, capsys):
    run = make_trained(tmp_path, make_long_config(window=0))
    monkeypatch.setattr("moerec.serve.new_data.extend.load_run", lambda _: run)
    user = str(run.data.dataset.users[2])

    def call(module, *flags):
        arguments = ["command", "--workdir=run", f"--profiles={tmp_path / 'store'}", *flags]
        assert cli.execute(module.main, arguments, extra_flags=module.FLAGS, config_type=None) == 0
        return capsys.readouterr().err

    reason = explain_difference(run.config, 5)
    assert call(observe_command) == ""  # a row holds the whole history of everybody: there is no profile
    assert (
        call(observe_command, "--recent=5") == f"answers by these profiles are not those of whole histories: {reason}\n"
    )
    assert call(recommend_command, f"--user={user}") == (
        f"{user}: not the answer that the whole history would give: {reason}\n"
    )


def test_a_request_back_in_time_is_told_that_its_profile_has_seen_too_much(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moerec.serve.new_data.extend.load_run", lambda _: trained)
    dataset, store = trained.data.dataset, open_profiles(tmp_path / "store", trained.predictor.params, create=True)
    feed_all(trained, store, count_recent(trained.config))
    user, end = str(dataset.users[2]), dataset.log.offsets[3]
    for back, reason in ((4, "error: --profiles: "), (2, "attention reaches the last 4 events, not 2 alone"), (0, "")):
        time = np.datetime64(int(dataset.log.time_us[end - 1 - back]) // 10**6 + 1, "s")
        arguments = ["command", "--workdir=run", f"--profiles={tmp_path / 'store'}", f"--user={user}", f"--time={time}"]
        code = cli.execute(recommend_command.main, arguments, extra_flags=recommend_command.FLAGS, config_type=None)
        said = capsys.readouterr().err
        assert (code, reason in said, said.count("\n")) == (2 if back == 4 else 0, True, int(back > 0))
