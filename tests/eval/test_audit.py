"""Each check on a data set that has its defect and on one that has not, and all of them on amazon3."""

import dataclasses
import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import AuditConfig, Config, SplitConfig
from moerec.data import splits
from moerec.data.dataset import Dataset, EventLog, ItemTable, permute_items
from moerec.data.histories import Histories
from moerec.data.packing import pack
from moerec.data.splits import shuffle_ties
from moerec.errors import InputError, WorkError
from moerec.eval.audit import prepare_subject, run_audit
from moerec.eval.audit.canary_checks import find_changed_inputs, plant_future
from moerec.eval.audit.copy_checks import digest_sequences
from moerec.eval.audit.id_checks import guess_by_arithmetic, number_ids
from moerec.eval.audit.report import AuditReport, make_row
from moerec.eval.ranking import dataset as evaluated
from tests.amazon3_tables import read_amazon3

DAY, DAY_0 = 86_400_000_000, 18_262  # microseconds; 2020-01-01


def build(users, sizes=(60, 60), ids=None):
    """`users`: lists of `(item, day)` in published order."""
    n = sum(sizes)
    blank = np.full(n, "")
    ids = np.concatenate([np.arange(size) for size in sizes]).astype(str) if ids is None else np.array(ids)
    catalogue = ItemTable(
        tuple(f"s{z}" for z in range(len(sizes))), np.concatenate([[0], np.cumsum(sizes)]), ids, blank, blank
    )
    events = [event for user in users for event in user]
    log = EventLog(
        np.concatenate([[0], np.cumsum([len(p) for p in users])]).astype(np.int64),
        np.array([item for item, _ in events], np.int32),
        np.zeros(len(events), np.int16),
        np.array([DAY_0 + day for _, day in events], np.int64) * DAY,
        np.zeros((len(events), 0), np.int16),
    )
    return Dataset(catalogue, log, np.arange(len(users)).astype(str))


def clean(seed=0, n_users=400, length=8, sizes=(60, 60)):
    """No defect: distinct items at random, services mixed, one event a day."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(sum(sizes))[:length].tolist() for _ in range(n_users)]
    return [[(i, day) for day, i in enumerate(order)] for order in orders]


def audit(users, split=None, limits=None, **shape):
    report = run_audit(build(users, **shape), split or SplitConfig(), limits or AuditConfig())
    return {(row.name, row.service): row for row in report.rows}


def exceeded(rows):
    return {name for (name, _), row in rows.items() if row.exceeded}


@pytest.mark.parametrize("seed", range(5))
def test_a_clean_data_set_passes(seed):
    assert not exceeded(audit(clean(seed)))


def test_ties_at_the_split_points_are_found():
    users = [[*p[:-1], (p[-1][0], p[-2][1])] if k % 5 == 0 else p for k, p in enumerate(clean())]
    rows = audit(users)
    assert exceeded(rows) == {"tied_test"}
    assert sum(rows["tied_test", s].value for s in ("s0", "s1")) / 2 == pytest.approx(0.2, abs=0.03)
    users = [[*p[:-2], (p[-2][0], p[-3][1]), p[-1]] if k % 5 == 0 else p for k, p in enumerate(clean())]
    assert exceeded(audit(users)) == {"tied_valid"}


def sorted_ties(key):
    """Two events a day, sorted by the key within the day."""
    users = [[(i, d // 2) for i, d in p] for p in clean(n_users=800)]
    return [sorted(p, key=lambda e: (e[1], key[e[0]])) for p in users]


def test_ids_that_sort_ties_are_found_and_shuffling_mends_it():
    users = sorted_ties(np.arange(120))
    assert {"id_order", "id_order_in_ties", "tie_order"} <= exceeded(audit(users))
    permuted, _ = permute_items(build(users), 3)
    assert np.any(permuted.catalogue.ids != build(users).catalogue.ids)
    names = {row.name for row in run_audit(permuted, SplitConfig(), AuditConfig()).rows if row.exceeded}
    assert {"id_order", "id_order_in_ties", "tie_order"} <= names
    report = run_audit(shuffle_ties(build(users), 0), SplitConfig(), AuditConfig())
    assert {row.name for row in report.rows if row.exceeded} == {"tied_test"}


def test_a_hidden_key_that_sorts_ties_is_found_without_the_ids():
    rows = audit(sorted_ties(np.random.default_rng(5).permutation(120)))
    assert rows["tie_order", "s0"].value == 1.0
    assert exceeded(rows) & {"id_order_in_ties", "tie_order", "id_canary"} == {"tie_order"}


def test_words_are_numbered_alphabetically_and_whole_numbers_by_value():
    catalogue = build([[(0, 0)] * 3], sizes=(3, 3), ids=["10", "9", "100", "b10", "b9", "a"]).catalogue
    assert number_ids(catalogue).tolist() == [10, 9, 100, 1, 2, 0]


def test_numbers_behind_a_common_stem_are_numbers():
    catalogue = build([[(0, 0)] * 3], sizes=(3, 3), ids=["i10", "i9", "i100", "same", "same", "same"]).catalogue
    assert number_ids(catalogue).tolist() == [10, 9, 100, 0, 0, 0]


def test_one_long_id_costs_no_more_than_itself():
    ids = ["i1", "i" + "9" * 12_000, *(f"i{k}" for k in range(2, 3000))]
    catalogue = build([[(0, 0)] * 3], sizes=(3000, 3)).catalogue
    catalogue = dataclasses.replace(catalogue, ids=np.array([*ids, "a", "b", "c"], object))
    tracemalloc.start()
    try:
        numbers = number_ids(catalogue)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 4 << 20  # as an array of letters they take 144 MB
    place = {name: k for k, name in enumerate(sorted(ids))}
    assert numbers[:3000].tolist() == [place[name] for name in ids]


def guess_by_hand(history, existing, answer):
    guesses = []
    for step in range(1, 11):
        for guess in (max(history) + step, history[-1] + step):
            if guess in existing and guess not in history and guess not in guesses:
                guesses.append(guess)
    return guesses.index(answer) + 1 if answer in guesses else None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_canary_guesses_as_by_hand(data):
    ids = sorted(data.draw(st.sets(st.integers(0, 60), min_size=5, max_size=30)))
    user = st.lists(st.integers(0, len(ids) + 3), min_size=3, max_size=12)
    users = [[(i, d) for d, i in enumerate(p)] for p in data.draw(st.lists(user, min_size=1, max_size=5))]
    dataset = build(users, sizes=(len(ids), 4), ids=[*map(str, ids), "a", "b", "c", "d"])
    subject = prepare_subject(dataset, SplitConfig(), 0)
    expected = []
    for p in users:
        if p[-1][0] < len(ids):
            history = [ids[i] for i, _ in p[:-1] if i < len(ids)]
            expected.append(guess_by_hand(history, ids, ids[p[-1][0]]) if history else None)
    found = [int(rank) if rank < 100 else None for rank in guess_by_arithmetic(subject, 0).rank]
    assert found == expected


def test_ids_in_order_of_first_appearance_are_found_by_the_canary():
    fresh = itertools.count()
    rng = np.random.default_rng(0)
    users, n_seen = [], 0
    for _ in range(300):
        user = []
        for day in range(6):
            item = next(fresh) if rng.random() < 0.3 or n_seen < 10 else int(rng.integers(n_seen))
            n_seen = max(n_seen, item + 1)
            user.append((item, day))
        users.append(user)
    assert "id_canary" in exceeded(audit(users, sizes=(n_seen,)))
    names = np.random.default_rng(1).permutation(n_seen).astype(str)
    assert "id_canary" not in exceeded(audit(users, sizes=(n_seen,), ids=names))


def test_a_canary_in_the_future_is_seen_only_where_the_log_is_out_of_order():
    names = ("future_canary_test", "all"), ("future_canary_valid", "all")
    for split in (SplitConfig(), SplitConfig(per_service=True), SplitConfig(kind="user")):
        rows = audit(clean(), split)
        assert [rows[name].value for name in names] == [0, 0]
    users = clean()
    users[3] = [(users[3][0][0], 30), *users[3][1:]]  # the oldest by place is the newest by time
    rows = audit(users)
    assert [rows[name].value for name in names] == [1 / 400, 1 / 400]
    assert {"future_canary_test", "future_canary_valid"} <= exceeded(rows)


def test_a_canary_is_seen_where_a_history_reaches_past_its_target(monkeypatch):
    whole = splits.gather_histories

    def leaky(dataset, targets, per_service):
        found = whole(dataset, targets, per_service)
        return Histories(found.offsets, found.rows + 1)  # the last of each is the target itself

    monkeypatch.setattr("moerec.eval.ranking.dataset.gather_histories", leaky)
    assert audit(clean())["future_canary_test", "all"].value == 1
    assert audit(clean())["future_in_history", "all"].value == 0  # which looks at times alone


def with_weather(users):
    """The data set with a random context."""
    dataset = build(users)
    context = np.random.default_rng(0).integers(1, 3, (dataset.log.n_events, 1)).astype(np.int16)
    log = dataclasses.replace(dataset.log, context=context)
    return dataclasses.replace(dataset, log=log, context={"weather": ("rain", "sun")})


def pack_later(log, items, sequences, placed, shape):
    """What `pack` makes of the events that come one later."""
    events = Histories(sequences.events.offsets, np.minimum(sequences.events.rows + 1, log.n_events - 1))
    following = np.minimum(sequences.next_row + 1, log.n_events - 1)
    return pack(log, items, sequences._replace(events=events, next_row=following), placed, shape)


def with_context(packed, context_BTC):
    request = packed.batch.request._replace(context_BTC=context_BTC)
    return packed._replace(batch=packed.batch._replace(request=request))


def test_a_canary_is_seen_where_a_request_is_that_of_a_later_event(monkeypatch):
    dataset = with_weather(clean())

    def leaky(*args):
        return with_context(pack(*args), pack_later(*args).batch.request.context_BTC)

    split = SplitConfig(kind="time", valid_from="2020-01-05", test_from="2020-01-06")
    for function, value in ((pack, 0), (leaky, 1)):
        monkeypatch.setattr("moerec.eval.ranking.dataset.pack", function)
        rows = {row.name: row for row in run_audit(dataset, split, AuditConfig()).rows}
        assert (rows["future_canary_valid"].value > 0.5) == value


def test_a_canary_is_seen_where_a_control_slot_tells_of_what_comes_after_the_target(monkeypatch):
    """Of targets behind other events, and of those that are their users' first."""
    users = [p if k % 2 else [(i, day + 4) for i, day in p[:4]] for k, p in enumerate(clean())]
    dataset, n_controls = with_weather(users), []

    def honest(*args):
        packed = pack(*args)
        n_controls.append(int((packed.batch.kind_BT == 2).sum()))
        return packed

    def leaky(log, items, sequences, placed, shape):
        packed = pack(log, items, sequences, placed, shape)
        context = packed.batch.request.context_BTC.copy()
        at = np.nonzero(packed.batch.kind_BT == 2)
        context[at] = log.context[np.minimum(sequences.next_row + 1, log.n_events - 1)]
        return with_context(packed, context)

    split = SplitConfig(kind="time", valid_from="2020-01-05", test_from="2020-01-06")
    subject = prepare_subject(dataset, split, 0)
    first = dataset.log.offsets[:-1]
    targets = np.where(np.arange(len(users)) % 2, first + 4, first)
    assert len(evaluated.EvalDataset(dataset, targets, Config()).histories.rows) == 4 * 200
    for function, value in ((honest, 0), (leaky, 1)):
        monkeypatch.setattr("moerec.eval.ranking.dataset.pack", function)
        rows = {row.name: row for row in run_audit(dataset, split, AuditConfig()).rows}
        assert (rows["future_canary_valid"].value > 0.5) == value
        changed = find_changed_inputs(subject, targets, plant_future(dataset, targets), None)
        assert (changed[::2].mean() > 0.9, changed[1::2].mean() > 0.9) == (value, value)
        assert changed.any() == value
    assert sum(n_controls) >= 2 * len(users), "every sequence has one, the true one's and the rewritten one's"


def test_a_canary_is_seen_where_a_history_holds_what_is_tied_behind_its_target(monkeypatch):
    users = [[(i, day // 2) for i, day in p] for p in clean()]
    whole = splits.gather_histories

    def leaky(dataset, targets, per_service):
        last = dataset.log.offsets[dataset.log.user[targets] + 1] - 1
        behind = np.minimum(targets + 1, last)
        tied = dataset.log.time_us[behind] == dataset.log.time_us[targets]
        found = whole(dataset, targets, per_service)
        rows = found.rows.copy()
        rows[found.offsets[1:][tied] - 1] = behind[tied]
        return Histories(found.offsets, rows)

    monkeypatch.setattr("moerec.eval.ranking.dataset.gather_histories", leaky)
    split = SplitConfig(kind="time", valid_from="2020-01-03", test_from="2020-01-04")
    assert audit(users, split)["future_canary_test", "all"].value > 0.1


def test_an_event_from_the_future_is_found_in_a_history():
    users = clean()
    assert audit(users)["future_in_history", "all"].value == 0
    users[7][2] = (users[7][2][0], 99)
    rows = audit(users)
    assert rows["future_in_history", "all"].value == 1 / 400
    assert "future_in_history" in exceeded(rows)


def test_training_after_a_test_event_is_found_and_a_time_split_has_none():
    users = clean()
    rows = audit(users, SplitConfig(per_service=True))
    item, own = [[i for i, _ in p] for p in users], []
    for sequence in item:
        groups = [[k for k, i in enumerate(sequence) if (i >= 60) == z] for z in (False, True)]
        train = [k for g in groups for k in (g if len(g) < 3 else g[:-2])]
        own += [any(k > g[-1] for k in train) for g in groups if len(g) >= 3]
    assert rows["train_after_own_test", "all"].value == pytest.approx(np.mean(own))
    assert "train_after_own_test" in exceeded(rows)
    assert audit(users)["train_after_test", "all"].value == 0  # everybody's test event is on the last day
    rows = audit(users, SplitConfig(kind="time", valid_from="2020-01-05", test_from="2020-01-06"))
    assert rows["train_after_test", "all"].value == rows["train_after_own_test", "all"].value == 0
    shifted = [[(i, d + 4 * (k % 2)) for i, d in p] for k, p in enumerate(users)]
    assert audit(shifted)["train_after_test", "all"].value == pytest.approx(0.5 * 0.5 * 2 / 6)


def test_repeats_among_targets_are_counted_by_service():
    users = clean()
    assert {audit(users)["repeats", s].value for s in ("s0", "s1")} == {0}
    changed = [[*p[:-1], (p[0][0], p[-1][1])] if p[0][0] < 60 else p for p in users]
    rows = audit(changed, limits=AuditConfig(max_repeats=0.2))
    n_repeat = sum(p[0][0] < 60 for p in users)
    n_s0 = n_repeat + sum(p[0][0] >= 60 and p[-1][0] < 60 for p in users)
    assert rows["repeats", "s0"].value == pytest.approx(n_repeat / n_s0)
    assert rows["repeats", "s1"].value == 0
    assert exceeded(rows) >= {"repeats"}


def test_a_service_that_follows_a_rule_is_predictable():
    rng = np.random.default_rng(0)

    def make(rule):
        users = []
        for _ in range(300):
            service = [int(rng.integers(2))]
            for _ in range(7):
                service.append(rule(service[-1]))
            users.append([(60 * z + int(rng.integers(60)), d) for d, z in enumerate(service)])
        return audit(users, limits=AuditConfig(max_service_last=0.9, max_service_markov=0.9))

    same, other, chance = make(lambda z: z), make(lambda z: 1 - z), make(lambda z: int(rng.integers(2)))
    assert (same["service_last", "all"].value, same["service_markov", "all"].value) == (1, 1)
    assert (other["service_last", "all"].value, other["service_markov", "all"].value) == (0, 1)
    assert exceeded(same) >= {"service_last", "service_markov"}
    for rows in (same, other, chance):
        assert rows["service_majority", "all"].value == pytest.approx(0.5, abs=0.1)
    assert not exceeded(chance) & {"service_last", "service_markov"}


def test_items_and_users_unseen_in_training_are_found():
    rows = audit([[(i, 0), (i + 10, 1), (i + 20, 2)] for i in range(10)], sizes=(60,))
    assert rows["unseen_items", "s0"].value == 1
    assert rows["unseen_users", "all"].value == 0
    assert "unseen_items" in exceeded(rows)
    rows = audit(clean(), SplitConfig(kind="user"), AuditConfig(max_unseen_users=0.5))
    assert rows["unseen_users", "all"].value == 1
    assert exceeded(rows) == {"unseen_users"}


def test_duplicates_and_copied_users_are_found():
    users = clean()
    rows = audit([[*p, *p[-1:] * 2] for p in users])
    assert rows["duplicates", "all"].value == pytest.approx(0.2)
    assert "duplicates" in exceeded(rows)
    rows = audit([*users, *[[(i, d + 1) for i, d in p] for p in users[:10]]])
    assert rows["identical_users", "s0"].value > 0.04
    assert exceeded(rows) == {"identical_users"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=12))
def test_digests_are_equal_exactly_where_sequences_are(sequences):
    users = [[(i, d) for d, i in enumerate(s)] for s in sequences]
    digest, length = digest_sequences(build(users, sizes=(2, 2)), 0)
    own = [tuple(i for i in s if i < 2) for s in sequences]
    for a, b in itertools.combinations(range(len(own)), 2):
        assert (digest[a].tolist() == digest[b].tolist() and length[a] == length[b]) == (own[a] == own[b])


def test_report_shows_and_counts_what_exceeds_its_limit():
    rows = (
        make_row("one", "all", 0.2, 0.1, "too much"),
        make_row("two", "s0", 0.2, 0.1, "by chance", chance=0.25),
        make_row("three", "s0", 1.0, 1.0, "reported"),
    )
    report = AuditReport(rows)
    lines = report.to_text().splitlines()
    assert ["FAIL" in line for line in lines] == [False, True, False, False, False]
    assert report.exit_code == 1
    assert AuditReport(rows[1:]).exit_code == 0
    assert json.loads(json.dumps(report.to_dict()))["rows"][2] == dataclasses.asdict(rows[2])
    assert rows[2].threshold is None


def test_bad_limits_and_empty_splits_are_refused():
    with pytest.raises(InputError, match=r"config\.audit\.max_repeats"):
        AuditConfig(max_repeats=1.5)
    with pytest.raises(WorkError, match="no test events"):
        run_audit(build([[(0, 0), (1, 1)]]), SplitConfig(), AuditConfig())


def test_amazon3_has_the_ties_and_the_telling_ids_of_its_description():
    dataset, _ = permute_items(read_amazon3(), 1)
    report = run_audit(dataset, SplitConfig(per_service=True), AuditConfig())
    rows = {(row.name, row.service): row for row in report.rows}
    assert report.exit_code == 1
    for service, hit in {"beauty": 0.0526, "sports": 0.0459, "toys": 0.0548}.items():
        assert rows["tied_test", service].exceeded
        assert rows["tie_order", service].value > 0.999
        assert rows["id_order", service].exceeded
        assert rows["id_canary", service].value == pytest.approx(hit, abs=0.001)
        # ties sorted by a key and the rest by chance: the share of tests beyond the validation item by that key
        tied = rows["tied_test", service].value
        assert 0.7 < tied + (1 - tied) / 2 < 0.76
    assert rows["identical_users", "toys"].explanation.startswith("35 of 19412")
    assert rows["future_in_history", "all"].value == 0
