"""Ranks and metrics against enumeration of every order of the ties."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.errors import WorkError
from moerec.eval import metrics


def brute_force(scores, target, excluded, low, high):
    """Mean over all orders of the candidates that keep higher scores first: a dict of metrics."""
    if target in excluded:
        missed = {f"{name}@{k}": 0.0 for name in ("recall", "ndcg") for k in metrics.CUTOFFS}
        return {**missed, "mrr@10": 0.0, "mrr": 0.0}
    candidates = [i for i in range(low, high) if i not in excluded]
    above = [i for i in candidates if scores[i] > scores[target]]
    level = [i for i in candidates if scores[i] == scores[target]]
    ranks = [len(above) + 1 + order.index(target) for order in itertools.permutations(level)]
    result = {f"recall@{k}": np.mean([r <= k for r in ranks]) for k in metrics.CUTOFFS}
    for k in metrics.CUTOFFS:
        result[f"ndcg@{k}"] = np.mean([1 / math.log2(r + 1) if r <= k else 0.0 for r in ranks])
    cut = np.mean([1 / r if r <= 10 else 0.0 for r in ranks])
    return {**result, "mrr@10": cut, "mrr": np.mean([1 / r for r in ranks])}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_metrics_equal_the_mean_over_all_orders_of_ties(data):
    n_items = data.draw(st.integers(1, 30))
    level = data.draw(st.integers(0, 6))  # at most seven items share the target's score: 5,040 orders
    target = data.draw(st.integers(0, n_items - 1))
    scores = np.array(data.draw(st.permutations(range(n_items))), np.float32)
    scores[np.abs(scores - scores[target]) <= level // 2] = scores[target]
    excluded = data.draw(st.lists(st.integers(0, n_items - 1), max_size=8))
    low = data.draw(st.integers(0, target))
    high = data.draw(st.integers(target + 1, n_items))
    counts = metrics.count_ranks(
        scores[None],
        np.array([target]),
        (np.array([0, len(excluded)]), np.array(excluded, np.int64)),
        (np.array([low]), np.array([high])),
    )
    found, expected = metrics.per_target_metrics(counts), brute_force(scores, target, set(excluded), low, high)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name][0] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("n_items", [1, 7, 100, 12101])
def test_a_constant_model_scores_k_over_n(n_items):
    n = 5
    counts = metrics.count_ranks(np.full((n, n_items), 0.3, np.float32), np.arange(n) % n_items)
    found = metrics.per_target_metrics(counts)
    for k in metrics.CUTOFFS:
        assert np.all(found[f"recall@{k}"] == min(k, n_items) / n_items)


def test_only_what_says_so_is_cut_off():
    """Of a target at each of the first thirty places: NDCG, recall and MRR by the places that they count."""
    found = metrics.per_target_metrics(metrics.RankCounts(np.arange(30), np.ones(30, np.int64)))
    for name, values in found.items():
        cutoff = int(name.partition("@")[2] or 30)
        assert np.count_nonzero(values) == cutoff, name
        assert np.all(values[:cutoff] > 0), name
    np.testing.assert_allclose(found["mrr"], 1 / np.arange(1, 31))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_refused_by_row_and_item(bad):
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = bad
    with pytest.raises(WorkError, match="row 11: the score of item 2"):
        metrics.count_ranks(scores, np.zeros(3, np.int64), first_row=10)


def test_huge_finite_scores_pass():
    counts = metrics.count_ranks(np.full((1, 3), 3e38, np.float32), np.array([0]))
    assert (counts.greater[0], counts.equal[0]) == (0, 3)


def test_targets_outside_their_range_are_refused():
    with pytest.raises(WorkError, match="row 0: target 3"):
        metrics.count_ranks(np.zeros((1, 4)), np.array([3]), ranges=(np.array([0]), np.array([3])))


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_boolean_and_sparse_masks_agree_and_a_seen_target_is_a_miss(share):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (20, 9)).astype(np.float64)
    target = rng.integers(0, 9, 20)
    mask = rng.random((20, 9)) < share
    row, item = np.nonzero(mask)
    offsets = np.concatenate([[0], np.cumsum(2 * np.bincount(row, minlength=20))])
    dense = metrics.count_ranks(scores, target, mask)
    sparse = metrics.count_ranks(scores, target, (offsets, np.repeat(item, 2)))
    missed = mask[np.arange(20), target]
    assert missed.any()
    assert not missed.all()
    masked = np.where(mask, -np.inf, scores)
    level = scores[np.arange(20), target][:, None]
    for counts in (dense, sparse):
        np.testing.assert_array_equal(counts.greater, np.where(missed, metrics.MISS, (masked > level).sum(axis=1)))
        np.testing.assert_array_equal(counts.equal, np.where(missed, 1, (masked == level).sum(axis=1)))


def test_table_has_a_row_for_each_service_with_targets_and_for_all():
    own = metrics.RankCounts(np.array([0, 4, 30]), np.array([1, 2, 1]))
    union = metrics.RankCounts(np.array([1, 9, 90]), np.array([1, 2, 5]))
    table = metrics.build_table(metrics.Ranks(own, union), np.array([0, 2, 2]), ("a", "b", "c"))
    assert set(table["in_service"]) == {"a", "c"}
    assert set(table["union"]) == {"a", "c", "all"}
    assert table["in_service"]["c"]["recall@5"] == 0.25
    assert table["in_service"]["c"]["n"] == 2
    assert table["union"]["a"]["mrr"] == pytest.approx(0.5)
    assert table["union"]["all"]["recall@10"] == pytest.approx((1 + 0.5 + 0) / 3)
    for part in table.values():
        for row in part.values():
            assert row["ndcg@5"] <= row["ndcg@10"] <= row["ndcg@20"]
            assert row["ndcg@10"] <= row["recall@10"]
    empty = metrics.concatenate_counts([])
    with pytest.raises(WorkError, match="no targets"):
        metrics.build_table(metrics.Ranks(empty, empty), np.zeros(0, np.int64), ("a",))


def test_slices_weigh_up_to_the_whole():
    rng = np.random.default_rng(1)
    counts = metrics.RankCounts(rng.integers(0, 40, 200), rng.integers(1, 4, 200))
    per_target = metrics.per_target_metrics(counts)
    length, count = np.arange(200) % 80, rng.integers(0, 80, 200)
    labels = {"history": metrics.bucket_history_length(length), "coldness": metrics.bucket_coldness(count)}
    slices = metrics.slice_table(per_target, labels)
    assert list(slices["history"]) == ["0", "1-4", "5-9", "10-19", "20-49", "50+"]
    assert slices["coldness"]["5-9"]["n"] == np.sum((count >= 5) & (count <= 9))
    whole = metrics.summarise(per_target)
    for rows in slices.values():
        for name in ("recall@10", "ndcg@20", "mrr"):
            assert sum(m[name] * m["n"] for m in rows.values()) / 200 == pytest.approx(whole[name])
