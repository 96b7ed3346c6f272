"""Intervals and tests against closed forms and exhaustive enumeration."""

import itertools

import numpy as np
import pytest

from moerec.eval import significance
from moerec.eval.metrics import RankCounts, Ranks, per_target_metrics


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


def reject_by_holm(p_values, level):
    """Which hypotheses the step-down procedure rejects: the smallest p-value at level / m, the next at level / (m - 1),
    and so on until one is not rejected.
    """
    rejected = [False] * len(p_values)
    for n_done, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        if p_values[k] > level / (len(p_values) - n_done):
            break
        rejected[k] = True
    return rejected


@pytest.mark.parametrize("seed", range(5))
def test_corrected_p_values_reject_as_the_step_down_procedure_does(seed):
    rng = np.random.default_rng(seed)
    p_values = (rng.random(7) ** 3).tolist()
    p_values[2] = p_values[4]
    corrected = significance.correct_holm(p_values)
    for level in rng.random(50) ** 2:
        assert [p <= level for p in corrected] == reject_by_holm(p_values, level)
    assert significance.correct_holm([0.03]) == [0.03]
    assert significance.correct_holm([]) == []


COLUMNS = [("union", "all", "ndcg@10"), ("union", "all", "recall@10")]
COLUMNS += [("in_service", z, metric) for z in ("a", "b") for metric in ("ndcg@10", "recall@10")]


def draw_ranks(rng, n, places=(0, 2, 50)):
    """Ranks at a few places, so that a test has few sizes of differences."""
    return Ranks(*(RankCounts(rng.choice(places, n), np.ones(n, np.int64)) for _ in range(2)))


def compare_rows(rows, n):
    service, user = np.arange(n) % 2, np.arange(n) // 2
    others = {name: ranks for name, ranks in rows.items() if name is not None}
    return significance.compare_best_rows(rows[None], others, COLUMNS, service, ("a", "b"), user, 0)


def list_tests(found):
    return [found[part][key][metric] for part, key, metric in COLUMNS]


@pytest.mark.parametrize("n_rows", [2, 5])
def test_on_noise_any_row_is_called_the_best_in_one_table_of_twenty_at_most(n_rows):
    rng, n_tables = np.random.default_rng(0), 150
    raw, corrected = 0, 0
    for _ in range(n_tables):
        rows = {name: draw_ranks(rng, 80) for name in (None, *range(1, n_rows))}
        tests = list_tests(compare_rows(rows, 80))
        raw += any(test["p_value"] < significance.LEVEL for test in tests)
        corrected += any(test["p_holm"] < significance.LEVEL for test in tests)
    assert corrected / n_tables <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / n_tables)
    if n_rows == 2:
        assert corrected < raw / 2  # what is not corrected calls one the best far more often


def test_the_best_row_is_tested_against_the_next_best_of_its_own_column():
    rng = np.random.default_rng(1)
    rows = {None: draw_ranks(rng, 400), "worst": draw_ranks(rng, 400, (50,)), "good": draw_ranks(rng, 400, (0, 2, 2))}
    found = compare_rows(rows, 400)
    for part, key, metric in COLUMNS:
        chosen = np.isin(np.arange(400) % 2, [0, 1] if key == "all" else ["ab".index(key)])
        values = {name: per_target_metrics(getattr(ranks, part))[metric][chosen] for name, ranks in rows.items()}
        first, second, _ = sorted(values, key=lambda name: -values[name].mean())
        test = found[part][key][metric]
        expected = significance.paired_test(values[first], values[second], 0, (np.arange(400) // 2)[chosen])
        assert (test["row"], test["next"]) == (first, second) == ("good", None)
        assert (test["difference"], test["p_value"]) == (expected.difference, expected.p_value)
        assert test["p_value"] <= test["p_holm"] < significance.LEVEL


def test_equal_rows_and_one_row_have_no_best():
    rng = np.random.default_rng(2)
    ranks = draw_ranks(rng, 60)
    order = rng.permutation(60 // 4).repeat(4) * 4 + np.tile(np.arange(4), 15)  # whole users of both services
    moved = Ranks(*(RankCounts(counts.greater[order], counts.equal[order]) for counts in ranks))
    for other in (ranks, moved):  # to the target, and in the mean alone
        tests = list_tests(compare_rows({None: ranks, "other": other}, 60))
        assert all(test["difference"] == pytest.approx(0, abs=1e-12) for test in tests)
        assert all(test["p_value"] == test["p_holm"] == 1 for test in tests)
    assert compare_rows({None: ranks}, 60) == {}
    rows = {"twin": ranks, None: ranks, "worst": draw_ranks(rng, 60, (50,))}
    assert all(test["p_holm"] == 1 for test in list_tests(compare_rows(rows, 60)))


def test_differences_have_intervals_of_their_own():
    """Against a loop that resamples users, and is as wide; of a row against itself there is none."""
    rng = np.random.default_rng(0)
    user, service = np.arange(300) // 2, np.arange(300) % 2

    def ranks(seed):
        greater = np.random.default_rng(seed).integers(0, 30, 300)
        return Ranks(*[RankCounts(greater, np.ones(300, np.int64))] * 2)

    model, other = ranks(1), ranks(2)
    rows = {"other": other, "same": model}
    found = significance.table_tests(model, rows, service, ("a", "b"), user, 0, n_boot=2000)
    gain = per_target_metrics(model.union)["ndcg@10"] - per_target_metrics(other.union)["ndcg@10"]
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 150, 150)
        means.append(np.concatenate([gain[2 * drawn], gain[2 * drawn + 1]]).mean())
    assert found["other"]["difference"] == pytest.approx(gain.mean())
    assert found["other"]["interval"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)
    assert found["other"]["in_service"]["b"]["difference"] == pytest.approx(gain[1::2].mean())
    assert found["same"]["interval"] == [0, 0]
    assert significance.table_tests(model, {}, service, ("a", "b"), user, 0) == {}
