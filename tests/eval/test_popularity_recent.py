"""Popularity of late against loops: its window, which is chosen on validation targets."""

import dataclasses

import numpy as np
import pytest

from moerec.config import EvalConfig, SplitConfig
from moerec.data import splits
from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog, ItemTable
from moerec.data.load import load_data
from moerec.errors import InputError, WorkError
from moerec.eval import baselines, metrics
from moerec.eval.baselines import BASELINES, BaselineInputs, popularity_recent, rank_by_scores
from moerec.eval.baselines.popularity_recent import choose_window
from moerec.eval.ranking import make_test_set
from tests.eval.small_logs import DAY, HOUR, hold_out, make_world, train_sequences
from tests.tiny import make_config


def count_in_window(dataset, split_ids, target, window):
    """How often each item is taken within the window before a target, and at all before it, by a loop."""
    log, n_items = dataset.log, dataset.catalogue.n_items
    recent, ever = np.zeros(n_items, int), np.zeros(n_items, int)
    asked, trained = log.time_us[target], np.flatnonzero(split_ids == splits.TRAIN)
    if asked != UNKNOWN_TIME:
        asked = min(asked, max(t for t in log.time_us[trained] if t != UNKNOWN_TIME) + 1)
    for row in trained:
        time_us = log.time_us[row]
        if time_us != UNKNOWN_TIME and (asked == UNKNOWN_TIME or time_us < asked):
            ever[log.item[row]] += 1
            recent[log.item[row]] += asked != UNKNOWN_TIME and time_us >= asked - window
    return recent, ever


@pytest.mark.parametrize(("days", "every"), [(0.5, 1), (3.0, 7), (40.0, 50), (1000.0, 10**6)])
def test_recent_popularity_counts_a_rolling_window_and_never_sees_the_future(days, every, monkeypatch):
    """Level items by what was taken before; a target of unknown time sees all of training. However many places of the
    log are kept.
    """
    dataset = make_world()
    monkeypatch.setattr(popularity_recent, "MOST_KEPT", dataset.log.n_events * dataset.catalogue.n_items // every)
    monkeypatch.setattr(popularity_recent, "MARKS", dataset.log.n_events)
    time_us = dataset.log.time_us + np.random.default_rng(1).integers(0, 2, dataset.log.n_events) * HOUR
    time_us[::7] = UNKNOWN_TIME
    dataset = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, time_us=time_us))
    split_ids, targets, histories = hold_out(dataset)
    assert np.any(time_us[targets] == UNKNOWN_TIME)
    scorer = baselines.fit_recent_popularity(dataset, split_ids, days)
    scores = scorer.score(dataset, targets, histories)
    assert scores.dtype == np.float32
    for t in (0, len(targets) // 2, len(targets) - 1):  # by itself, too
        alone = scorer.score(dataset, targets[t : t + 1], histories.slice(t, t + 1))
        np.testing.assert_array_equal(alone[0], scores[t])
    n = np.sum((split_ids == splits.TRAIN) & (time_us != UNKNOWN_TIME))
    for t, target in enumerate(targets):
        recent, ever = count_in_window(dataset, split_ids, target, days * DAY)
        np.testing.assert_allclose(scores[t], recent + ever / (2 * n), rtol=1e-5)


def test_an_outlier_does_not_move_recent_popularity():
    """Events at time 0 and in the year 9999 count for nobody but those who ask there, or later."""
    dataset = make_world(5)
    split_ids, targets, histories = hold_out(dataset)
    trained = np.flatnonzero(split_ids == splits.TRAIN)
    time_us = dataset.log.time_us + 18_000 * DAY
    before = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, time_us=time_us))
    moved = time_us.copy()
    moved[trained[0]], moved[trained[-1]] = 0, 2_932_896 * DAY
    after = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, time_us=moved))
    scores = [baselines.fit_recent_popularity(x, split_ids, 20.0).score(x, targets, histories) for x in (before, after)]
    for t, target in enumerate(targets):
        touched = [dataset.log.item[row] for row in (trained[0], trained[-1]) if time_us[row] < time_us[target]]
        same = np.setdiff1d(np.arange(dataset.catalogue.n_items), [*touched, dataset.log.item[trained[0]]])
        np.testing.assert_array_equal(scores[0][t, same], scores[1][t, same])
        assert np.floor(scores[0][t] - scores[1][t]).max() <= len(touched)


def test_under_a_split_by_time_the_window_is_full_at_the_test_too():
    """It ends where training ends, not at a target months later."""
    dataset = make_world(3)
    split_ids, targets, histories = hold_out(dataset)
    late = dataset.log.time_us.copy()
    late[targets] = late.max() + 200 * DAY
    late = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, time_us=late))
    scorer = baselines.fit_recent_popularity(late, split_ids, 2.0)
    scores = scorer.score(late, targets, histories)
    trained = np.flatnonzero(split_ids == splits.TRAIN)
    recent = trained[late.log.time_us[trained] >= late.log.time_us[trained].max() + 1 - 2 * DAY]
    expected = np.bincount(late.log.item[recent], minlength=late.catalogue.n_items)
    assert expected.sum()
    np.testing.assert_array_equal(np.floor(scores), np.broadcast_to(expected, scores.shape))


def test_the_window_of_a_split_by_time_is_that_of_its_validation(tmp_path):
    """A day of training, a day of validation, a day of tests: an hour is chosen on the one and full for the other."""
    dataset = make_news()
    start = 19_000 * DAY
    own = SplitConfig(kind="time", valid_from="2022-01-13", test_from="2022-01-14")
    assert start == splits.parse_date("2022-01-08", "").time_us
    config, split_ids = make_config(), splits.assign_split_ids(dataset, own, 0)
    data = dataclasses.replace(load_data(config.data, tmp_path), dataset=dataset, split_ids=split_ids)
    test = make_test_set(config, data)
    for days in (1 / 24, 3.0):
        scorer = baselines.fit_recent_popularity(dataset, split_ids, days)
        for targets in (np.flatnonzero(split_ids == splits.VALID)[:5], test.targets[:5]):
            asked = dataset.log.time_us[targets]
            assert np.all(asked > scorer.time_us[-1])
            scores = scorer.score(dataset, targets, None)
            assert np.all(np.floor(scores).sum(axis=1) == np.sum(scorer.time_us > scorer.time_us[-1] - days * DAY))


def make_news(n_users=1000, seed=0):
    """A week in which what is read changes by the hour, one of a hundred items most of the time; ten events a user."""
    rng = np.random.default_rng(seed)
    n, n_items = 10 * n_users, 100
    time_us = 19_000 * DAY + np.sort(rng.integers(0, 7 * DAY, (n_users, 10)), axis=1).ravel()
    item = np.where(rng.random(n) < 0.8, time_us // HOUR * 31 % n_items, rng.integers(0, n_items, n))
    blank = np.full(n_items, "")
    catalogue = ItemTable(("news",), np.array([0, n_items]), np.arange(n_items).astype(str), blank, blank)
    log = EventLog(
        np.arange(0, n + 1, 10), item.astype(np.int32), np.zeros(n, np.int16), time_us, np.zeros((n, 0), np.int16)
    )
    return Dataset(catalogue, log, np.arange(n_users).astype(str))


@pytest.mark.parametrize("outlier", [None, 0, 2_932_896 * DAY])
def test_the_window_is_chosen_on_validation_targets_and_fits_a_week_of_news(tmp_path, outlier):
    """By hours, whatever one event's time; a window that is given is taken as it is."""
    dataset = make_news()
    if outlier is not None:
        time_us = dataset.log.time_us.copy()
        time_us[4] = outlier
        dataset = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, time_us=time_us))
    config, split_ids = make_config(), splits.assign_split_ids(dataset, SplitConfig(), 0)
    data = dataclasses.replace(load_data(config.data, tmp_path), dataset=dataset, split_ids=split_ids)
    inputs = BaselineInputs(config, data, make_test_set(config, data), tmp_path)
    assert choose_window(inputs) == 1 / 24
    examples, recall = inputs.examples, {}
    for days in (0.0, 1 / 24, 30.0):
        own = inputs._replace(
            config=dataclasses.replace(config, eval=dataclasses.replace(config.eval, popularity_days=days))
        )
        ranked = BASELINES["popularity_recent"](own)
        assert ranked.settings == {"days": days or 1 / 24, "chosen": not days}
        scorer = baselines.fit_recent_popularity(dataset, split_ids, days or 1 / 24)
        by_hand = rank_by_scores(scorer, dataset, examples.targets, examples.histories, config.eval.mask_seen)
        np.testing.assert_array_equal(ranked.union.greater, by_hand.union.greater)
        recall[days] = metrics.per_target_metrics(ranked.union)["recall@10"].mean()
    assert recall[0.0] > 0.5 > 0.1 > recall[30.0]


def test_no_validation_target_and_no_window_of_sense(tmp_path):
    dataset = make_news(20)
    split_ids = np.full(dataset.log.n_events, splits.TRAIN, np.int8)
    split_ids[9::10] = splits.TEST
    config = make_config()
    data = dataclasses.replace(load_data(config.data, tmp_path), dataset=dataset, split_ids=split_ids)
    assert choose_window(BaselineInputs(config, data, make_test_set(config, data), tmp_path)) == 30
    with pytest.raises(WorkError, match="a window of 0 days"):
        baselines.fit_recent_popularity(dataset, split_ids, 0)
    for days in (-1.0, np.inf, np.nan):
        with pytest.raises(InputError, match=r"eval\.popularity_days"):
            EvalConfig(popularity_days=days)


def test_recent_popularity_without_times_counts_the_last_training_events():
    dataset = make_world(dated=False)
    split_ids, targets, histories = hold_out(dataset)
    scores = baselines.fit_recent_popularity(dataset, split_ids).score(dataset, targets, histories)
    late = [i for s in train_sequences(dataset, split_ids).values() for i in s[-int(np.ceil(0.2 * len(s))) :]]
    expected = np.bincount(late, minlength=dataset.catalogue.n_items)
    np.testing.assert_array_equal(scores, np.tile(expected, (len(targets), 1)))
