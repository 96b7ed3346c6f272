"""Intervals and tests against closed forms and exhaustive enumeration."""

import itertools

import numpy as np
import pytest

from moerec.eval import significance


def interval_of(values, *args, **kwargs):
    return significance.bootstrap_intervals(values[:, None], *args, **kwargs)[0]


def test_interval_has_the_width_of_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    interval = interval_of(values, seed=1, n_boot=2000)
    assert interval.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.low == pytest.approx(interval.mean - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.1 * half)
    assert interval == interval_of(values, seed=1, n_boot=2000)


def test_copies_of_a_user_do_not_narrow_the_interval():
    values = np.random.default_rng(0).normal(0, 1, 300)
    once = interval_of(values, 2, user=np.arange(300))
    copied = interval_of(np.repeat(values, 9), 2, user=np.repeat(np.arange(300), 9))
    assert copied.low == pytest.approx(once.low)
    assert copied.high == pytest.approx(once.high)


def test_draws_are_bounded_without_changing_the_result(monkeypatch):
    values = np.random.default_rng(0).normal(0, 1, 50)
    whole = interval_of(values, 3)
    monkeypatch.setattr(significance, "_MOST_DRAWS", 170)
    assert interval_of(values, 3) == whole


def test_columns_share_the_draws_and_nothing_else():
    columns = np.random.default_rng(0).normal(0, 1, (60, 3))
    user = np.arange(60) // 3
    together = significance.bootstrap_intervals(columns, 4, user)
    for column, interval in zip(columns.T, together, strict=True):
        assert interval_of(column, 4, user) == pytest.approx(interval)


def test_interval_is_that_of_drawn_users_pooled():
    values, user = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 1, 1, 2])
    interval = interval_of(values, 0, user, n_boot=20_000, level=0.6)
    pooled = [
        np.concatenate([values[user == p] for p in draw]).mean() for draw in itertools.product(range(3), repeat=3)
    ]
    exact = np.quantile(pooled, [0.2, 0.8], method="inverted_cdf")  # in the middle of an atom
    assert (interval.low, interval.high) == pytest.approx(tuple(exact))


@pytest.mark.parametrize("seed", range(4))
def test_p_value_equals_the_enumeration_of_all_signs(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 4, 20) / 3.0, rng.integers(0, 3, 20) / 3.0
    user = np.arange(20) // 2
    total = (first - second).reshape(10, 2).sum(axis=1)
    signs = np.array(list(itertools.product([-1, 1], repeat=10)))
    exact = np.mean(np.abs(signs @ total) >= abs(total.sum()) - 1e-9)
    result = significance.paired_test(first, second, 0, user, n_perm=20000)
    assert result.p_value == pytest.approx(exact, abs=0.015)
    assert result.difference == pytest.approx(np.mean(first - second))
    assert result.n_users == 10


def test_no_difference_gives_one_and_a_plain_one_is_small():
    values = np.random.default_rng(0).random(200)
    assert significance.paired_test(values, values, 0).p_value == 1.0
    assert significance.paired_test(values + 0.1, values, 0, n_perm=999).p_value == pytest.approx(1e-3)
