"""What chance gives, against enumeration, and audits of data that have nothing but chance in them."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from moerec.config import AuditConfig, SplitConfig
from moerec.eval.audit import chance, run_audit
from moerec.eval.audit.report import AuditReport, make_row
from tests.eval.test_audit import audit, build, clean


def draw_users(rng, n_users, sizes, lengths, skew, days=1.0):
    """Different items drawn by a Zipf's law over randomly dealt ids; `days` apart."""
    weights = [rng.permutation(1 / np.arange(1, size + 1) ** skew) for size in sizes]
    popularity = np.concatenate([w / w.sum() for w in weights]) / len(sizes)
    orders = [
        rng.choice(len(popularity), int(rng.choice(lengths)), replace=False, p=popularity) for _ in range(n_users)
    ]
    return [[(int(item), int(k * days)) for k, item in enumerate(order)] for order in orders]


CHANCE = {"id_order", "id_order_in_ties", "tie_order", "id_canary", "identical_users"}
# What `draw_users` is given; two events of a service or so, small catalogues, few users, ties, a few popular items.
WORLDS = {
    "short": (258, (60, 60), [3, 4], 1.0),
    "small_catalogue": (300, (12, 12), [5, 6], 0.5),
    "few_users": (8, (60, 60), [4, 5], 0.5),
    "ties": (200, (20, 20), [6, 8], 0.8, 0.5),
    "popular": (400, (40, 40), [4, 6], 1.6, 0.5),
}


@pytest.mark.parametrize("world", WORLDS)
def test_what_chance_gives_does_not_fail(world):
    """Nor is there a limit that no share can exceed."""
    n_failed, n_rows, limits = 0, 0, AuditConfig()
    for seed in range(5):
        users = draw_users(np.random.default_rng(seed), *WORLDS[world])
        report = run_audit(build(users, sizes=WORLDS[world][1]), SplitConfig(), limits)
        rows = [row for row in report.rows if row.name in CHANCE]
        n_failed, n_rows = n_failed + sum(row.exceeded for row in rows), n_rows + len(rows)
        assert all(row.threshold is None or row.threshold < 1 for row in report.rows)
        assert all(row.too_few or row.threshold is not None for row in rows)
        assert not any(row.too_few and row.exceeded for row in report.rows)
    assert n_failed <= stats.binom.isf(0.01, n_rows, 2 * chance.ALPHA), (n_failed, n_rows)


def test_users_of_one_item_are_nobodys_copies():
    """However often they have it: ten of 258 users, and of each of them two."""
    rng = np.random.default_rng(0)
    users = clean(n_users=248) + [[(int(rng.integers(3)), day) for day in range(1)] * 3 for _ in range(10)]
    rows = audit([[(item, day + k) for k, (item, day) in enumerate(user)] for user in users])
    assert not rows["identical_users", "s0"].exceeded
    assert rows["identical_users", "s0"].explanation.startswith("0 of ")


def test_copies_are_found_among_short_sequences_that_coincide_by_chance():
    rng = np.random.default_rng(0)
    users = draw_users(rng, 300, (60,), [3], 0.5)
    alone = audit(users, sizes=(60,))["identical_users", "s0"]
    assert not alone.exceeded
    copied = audit([*users, *[[(i, d + 1) for i, d in user] for user in users[:60]]], sizes=(60,))
    assert copied["identical_users", "s0"].exceeded
    assert copied["identical_users", "s0"].threshold < 0.2


def test_popularity_is_that_of_the_first_choice():
    """Of items drawn without replacement, whose shares of what users have are far flatter."""
    rng, n = np.random.default_rng(0), 4000
    popularity = np.array([0.5, 0.05, 0.25, 0.0, 0.15, 0.05])
    keys = rng.exponential(size=(n, 6)) / np.maximum(popularity, 1e-9)
    length = rng.integers(1, 6, n)
    drawn = [order[:k] for order, k in zip(np.argsort(keys, axis=1), length, strict=True)]
    found = chance.fit_popularity(np.repeat(np.arange(n), length), np.concatenate(drawn), 6)
    np.testing.assert_allclose(found, popularity, atol=0.02)
    assert np.bincount(np.concatenate(drawn), minlength=6)[0] / length.sum() < 0.35
    assert chance.fit_popularity(np.zeros(0, int), np.zeros(0, int), 3).tolist() == [0, 0, 0]


def expect_by_hand(popularity, n_users):
    """Over all sequences of different items."""
    expected = 0.0
    for length, sizes in n_users.items():
        for items, n in itertools.product(itertools.permutations(range(len(popularity)), length), sizes):
            p, left = 1.0, 1.0
            for item in items:
                p, left = p * popularity[item] / left, left - popularity[item]
            expected += n * p * (1 - (1 - p) ** (n - 1))
    return expected


@pytest.mark.parametrize("n_users", [{2: [30]}, {2: [200, 7], 3: [50, 50], 4: [2]}, {3: [1]}, {5: [400]}])
def test_shared_sequences_are_expected_as_by_hand(n_users):
    popularity = np.array([0.25, 0.4, 0.05, 0.2, 0.1])
    found = chance.expect_shared(popularity, {length: np.array(sizes) for length, sizes in n_users.items()})
    assert found[0] == pytest.approx(expect_by_hand(popularity, n_users), rel=0.02, abs=1e-9)


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_more_users_share_than_the_bound_about_once_in_741_draws(skew):
    """The users are drawn as the null hypothesis has it; so seldom that 1 of 300 is the most."""
    rng, n = np.random.default_rng(3), 200
    popularity = 1 / np.arange(1, 31) ** skew
    popularity /= popularity.sum()
    mean, variance = chance.expect_shared(popularity, {2: np.array([n])})
    bound = chance.bound_shared(mean, variance)
    drawn = []
    for _ in range(300):
        # Of exponential times by popularity the first two are drawn by popularity, without replacement.
        items = np.argsort(rng.exponential(size=(n, 30)) / popularity, axis=1)[:, :2]
        count = np.unique(items, axis=0, return_counts=True)[1]
        drawn.append(count[count > 1].sum())
    assert np.mean(np.array(drawn) > bound) <= 1 / 300
    assert mean == pytest.approx(np.mean(drawn), rel=0.02)
    assert np.sqrt(variance) == pytest.approx(np.std(drawn), rel=0.15)
    assert bound < np.mean(drawn) + 4 * np.std(drawn)


def list_shares(pairs):
    """The share of pairs whose later item has the larger number, for every numbering of the items."""
    items = sorted({item for pair in pairs for item in pair})
    numberings = (dict(zip(items, order, strict=True)) for order in itertools.permutations(range(len(items))))
    return np.array([np.mean([number[b] > number[a] for a, b in pairs]) for number in numberings])


@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 1)] * 100,  # one pair is on one side or on the other
        [(0, 1)] * 7 + [(1, 0)] * 3 + [(2, 3), (3, 4), (4, 2)],
        [(0, k) for k in (1, 2, 3, 4, 5)] * 3,  # one item before all others
        [(0, 1), (2, 3), (4, 5), (1, 2), (3, 0), (5, 1)],
    ],
)
def test_orders_of_ids_are_bounded_as_by_enumeration(pairs, monkeypatch):
    shares = list_shares(pairs)
    bound = chance.bound_order(*np.array(pairs).T)
    assert np.mean(shares > bound + 1e-9) <= chance.ALPHA + 0.0015
    assert np.mean(shares > bound - 1e-9) >= chance.ALPHA - 0.0005
    monkeypatch.setattr(chance, "_MOST_CELLS", 0)
    deviations = (chance.bound_order(*np.array(pairs).T) - 0.5) / stats.norm.isf(chance.ALPHA)
    assert deviations == pytest.approx(shares.std())


def test_different_pairs_of_ids_are_bounded_as_coins():
    for n in (8, 30, 400):
        found = chance.bound_order(np.arange(n), np.arange(n) + n)
        assert found == pytest.approx(stats.binom.isf(chance.ALPHA, n, 0.5) / n, abs=1.01 / n)
    assert chance.bound_order(np.arange(8), np.arange(8) + 8) == 1  # eight coins may fall on one side
    assert chance.bound_order(np.arange(20), np.arange(20) + 20) < 1


@pytest.mark.parametrize("count", [[2] * 12, [3, 3, 2, 4], [9, 5]])
def test_agreement_of_ties_is_bounded_as_by_enumeration(count):
    outcomes = [[(math.comb(c, r) / 2**c, math.comb(r, 2) + math.comb(c - r, 2)) for r in range(c + 1)] for c in count]
    total = sum(math.comb(c, 2) for c in count)
    exact: dict[int, float] = {}
    for each in itertools.product(*outcomes):
        agree = sum(same for _, same in each)
        exact[agree] = exact.get(agree, 0.0) + math.prod(p for p, _ in each)
    bound = chance.bound_agreement(np.array(count))
    assert sum(p for agree, p in exact.items() if agree > bound * total + 1e-9) <= chance.ALPHA + 0.0012
    assert sum(p for agree, p in exact.items() if agree > bound * total - 1e-9) >= chance.ALPHA - 0.0005


def test_many_ties_of_one_pair_are_bounded_by_the_normal_distribution(monkeypatch):
    exact = chance.bound_agreement(np.array([64] * 3))
    monkeypatch.setattr(chance, "_FEW", 0)
    assert chance.bound_agreement(np.array([64] * 3)) == pytest.approx(exact, abs=0.01)


def test_hits_that_recur_are_hit_together():
    alone = chance.bound_hits(np.ones(1000), np.full(1000, 0.01))
    assert alone == pytest.approx(stats.binom.isf(chance.ALPHA, 1000, 0.01), abs=2)
    together = chance.bound_hits(np.full(10, 100.0), np.full(10, 0.01))
    assert together == 100 * stats.binom.isf(chance.ALPHA, 10, 0.01)
    assert chance.bound_hits(np.zeros(0), np.zeros(0)) == 0


def test_too_few_events_cannot_tell_and_the_report_says_so():
    rows = (
        make_row("share", "s0", 1.0, 0.2, "of 4", n=4),
        make_row("share", "s1", 1.0, 0.2, "of 5", n=5),
        make_row("never", "all", 1.0, 0.0, "of 1", n=1),
        make_row("by chance", "all", 0.9, 0.5, "a bound", chance=1.0),
        make_row("nothing", "all", None, 0.5, "no value"),
        make_row("reported", "all", None, 1.0, "no value"),
    )
    assert [row.verdict for row in rows] == ["too few", "FAIL", "FAIL", "too few", "too few", ""]
    report = AuditReport(rows)
    assert report.exit_code == 1
    assert report.to_text().splitlines()[-1] == "2 of 6 checks exceed their limit; 3 cannot tell, with too few events"
    assert AuditReport(rows[3:]).exit_code == 0
    assert [row["too_few"] for row in report.to_dict()["rows"]] == [True, False, False, True, True, False]
    assert "too few" in report.to_text().splitlines()[1]


def test_ties_whose_items_are_not_tied_elsewhere_cannot_tell():
    users = [[(3 * k, 0), (3 * k + 1, 0), (3 * k + 2, 1)] for k in range(20)]
    row = audit(users, sizes=(60,))["tie_order", "s0"]
    assert (row.value, row.too_few, row.exceeded) == (None, True, False)
