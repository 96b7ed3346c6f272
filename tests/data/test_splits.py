"""Roles and histories against plain loops over users."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import SplitConfig
from moerec.data import histories, splits
from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog, ItemTable
from moerec.errors import InputError

DAY = 86_400_000_000  # microseconds


def make_dataset(users, sizes=(4, 3, 5)):
    """`users`: a list of lists of `(item, day or None)`, in published order."""
    n = sum(sizes)
    blank = np.array([""] * n)
    catalogue = ItemTable(
        tuple(f"s{z}" for z in range(len(sizes))),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.array([f"i{i}" for i in range(n)]),
        blank,
        blank,
    )
    events = [event for user in users for event in user]
    log = EventLog(
        np.concatenate([[0], np.cumsum([len(p) for p in users])]).astype(np.int64),
        np.array([item for item, _ in events], np.int32),
        np.zeros(len(events), np.int16),
        np.array([UNKNOWN_TIME if day is None else day * DAY for _, day in events], np.int64),
        np.zeros((len(events), 0), np.int16),
    )
    return Dataset(catalogue, log, np.array([f"p{i}" for i in range(len(users))]))


@st.composite
def datasets(draw, unknown=True):
    days = st.one_of(st.integers(0, 6), st.none()) if unknown else st.integers(0, 6)
    user = st.lists(st.tuples(st.integers(0, 11), days), max_size=12).map(
        lambda events: sorted(events, key=lambda e: -1 if e[1] is None else e[1])
    )
    return make_dataset(draw(st.lists(user, min_size=1, max_size=6)))


def rows_of(dataset, p):
    return range(dataset.log.offsets[p], dataset.log.offsets[p + 1])


@settings(max_examples=60, deadline=None)
@given(datasets())
def test_past_only_learns_from_what_all_that_is_held_out_may_see(dataset):
    whole = splits.assign_split_ids(dataset, SplitConfig(per_service=True), 0)
    split_ids = splits.assign_split_ids(dataset, SplitConfig(per_service=True, past_only=True), 0)
    held_out = np.flatnonzero((whole == splits.VALID) | (whole == splits.TEST))
    found = splits.gather_histories(dataset, held_out, True)
    bounds = zip(held_out, found.offsets[:-1], found.offsets[1:], strict=True)
    seen = {row: set(found.rows[lo:hi]) for row, lo, hi in bounds}
    for row in range(dataset.log.n_events):
        if whole[row] != splits.TRAIN:
            assert split_ids[row] == whole[row]
            continue
        others = [at for at in held_out if dataset.log.user[at] == dataset.log.user[row]]
        others = [at for at in others if dataset.event_service[at] != dataset.event_service[row]]
        assert split_ids[row] == (splits.TRAIN if all(row in seen[at] for at in others) else splits.UNUSED)


@settings(max_examples=60, deadline=None)
@given(datasets(), st.booleans())
def test_leave_one_out_takes_the_last_two_of_each_group(dataset, per_service):
    split_ids = splits.assign_split_ids(dataset, SplitConfig(per_service=per_service), 0)
    expected = {}
    for p in range(dataset.log.n_users):
        groups = collections.defaultdict(list)
        for row in rows_of(dataset, p):
            groups[int(dataset.event_service[row]) if per_service else 0].append(row)
        for rows in groups.values():
            expected.update(dict.fromkeys(rows, splits.TRAIN))
            if len(rows) >= 3:
                expected[rows[-1]], expected[rows[-2]] = splits.TEST, splits.VALID
    assert split_ids.dtype == np.int8
    assert split_ids.tolist() == [expected[row] for row in range(dataset.log.n_events)]


@settings(max_examples=60, deadline=None)
@given(datasets())
def test_time_split_puts_every_event_on_its_side(dataset):
    split = SplitConfig(kind="time", valid_from="1970-01-03", test_from="1970-01-05T00:00:00+00:00")
    split_ids = splits.assign_split_ids(dataset, split, 0)
    for p in range(dataset.log.n_users):
        times = [int(dataset.log.time_us[row]) for row in rows_of(dataset, p)]
        undated = UNKNOWN_TIME in times
        for row, time in zip(rows_of(dataset, p), times, strict=True):
            side = splits.TRAIN if time < 2 * DAY else splits.VALID if time < 4 * DAY else splits.TEST
            assert split_ids[row] == (splits.UNUSED if undated else side)


def test_time_split_refuses_bad_dates():
    dataset = make_dataset([[(0, 1)]])
    with pytest.raises(InputError, match=r"valid_from.*no ISO date"):
        splits.assign_split_ids(dataset, SplitConfig(kind="time", valid_from="soon", test_from="2019-01-01"), 0)
    with pytest.raises(InputError, match="test_from"):
        splits.assign_split_ids(dataset, SplitConfig(kind="time", valid_from="2019-01-02", test_from="2019-01-01"), 0)


def test_user_split_holds_out_whole_users_and_follows_the_seed():
    dataset = make_dataset([[(i % 12, d) for d in range(1 + i % 4)] for i in range(80)])
    split = SplitConfig(kind="user", user_fraction=0.1)
    split_ids = splits.assign_split_ids(dataset, split, 3)
    np.testing.assert_array_equal(split_ids, splits.assign_split_ids(dataset, split, 3))
    assert np.any(split_ids != splits.assign_split_ids(dataset, split, 4))
    counts = collections.Counter()
    for p in range(dataset.log.n_users):
        own = split_ids[list(rows_of(dataset, p))].tolist()
        counts[own[-1]] += 1
        if own[-1] == splits.TRAIN:
            assert set(own) == {splits.TRAIN}
        else:
            assert len(own) >= 2
            assert set(own[:-1]) == {splits.UNUSED}
    assert counts[splits.VALID] == counts[splits.TEST] == 6  # a tenth of the 60 users with two events or more
    with pytest.raises(InputError, match="nobody"):
        splits.assign_split_ids(make_dataset([[(0, 1), (1, 2)]]), split, 0)


@settings(max_examples=60, deadline=None)
@given(datasets(), st.integers(0, 5))
def test_shuffled_ties_move_events_only_within_their_known_time(dataset, seed):
    shuffled = splits.shuffle_ties(dataset, seed)
    np.testing.assert_array_equal(shuffled.log.time_us, dataset.log.time_us)
    np.testing.assert_array_equal(shuffled.log.offsets, dataset.log.offsets)
    for p in range(dataset.log.n_users):
        before, after = collections.defaultdict(list), collections.defaultdict(list)
        for row in rows_of(dataset, p):
            before[int(dataset.log.time_us[row])].append(int(dataset.log.item[row]))
            after[int(dataset.log.time_us[row])].append(int(shuffled.log.item[row]))
        assert before.pop(UNKNOWN_TIME, None) == after.pop(UNKNOWN_TIME, None)
        assert {t: sorted(v) for t, v in before.items()} == {t: sorted(v) for t, v in after.items()}


def test_shuffled_ties_are_uniform():
    dataset = make_dataset([[(0, 1), (1, 1), (2, 1)]] * 3000)
    orders = collections.Counter(map(tuple, splits.shuffle_ties(dataset, 0).log.item.reshape(-1, 3).tolist()))
    assert len(orders) == 6
    assert min(orders.values()) > 400


@settings(max_examples=80, deadline=None)
@given(datasets(), st.booleans(), st.sampled_from([1, 5, 1 << 23]))
def test_histories_equal_a_loop(dataset, per_service, most):
    targets = np.arange(dataset.log.n_events)[::2]
    before, histories.MOST_ROWS = histories.MOST_ROWS, most
    try:
        found = splits.gather_histories(dataset, targets, per_service)
    finally:
        histories.MOST_ROWS = before
    time, service, user = dataset.log.time_us, dataset.event_service, dataset.log.user
    offsets, rows = found.offsets, found.rows
    assert len(found) == len(targets) == len(offsets) - 1
    assert offsets[-1] == len(rows)
    for i, target in enumerate(targets):
        expected = [
            row
            for row in range(target)
            if user[row] == user[target]
            and (
                not per_service
                or service[row] == service[target]
                or (time[row] != UNKNOWN_TIME and time[row] < time[target])
            )
        ]
        assert rows[offsets[i] : offsets[i + 1]].tolist() == expected


def test_targets_have_their_role():
    dataset = make_dataset([[(0, 1), (1, 2), (2, 3)]] * 2)
    split_ids = splits.assign_split_ids(dataset, SplitConfig(), 0)
    assert splits.select_targets(dataset, split_ids, splits.TEST).tolist() == [2, 5]
    assert splits.select_targets(dataset, split_ids, splits.VALID).tolist() == [1, 4]
    with pytest.raises(InputError, match="split ids: 5 entries for 6 events"):
        splits.select_targets(dataset, split_ids[:-1], splits.TEST)
