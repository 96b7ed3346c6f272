"""How sure a mean or a difference of means is, with whole users as the unit, or runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from moerec.eval.metrics import PARTS, RankCounts, Ranks, per_target_metrics

INTERVAL_METRICS = ("ndcg@10", "recall@10")
LEVEL = 0.05  # a row is called the best where the corrected p-value is below

_MOST_DRAWS = 1 << 22  # random numbers held at once


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


class PairedResult(NamedTuple):
    difference: float
    p_value: float
    n_users: int


def bootstrap_intervals(
    columns: np.ndarray, seed: int, user: np.ndarray | None = None, n_boot: int = 1000, level: float = 0.95
) -> list[Interval]:
    """Percentile bootstrap of the means of columns `[n, K]`, resampling users (`user [n]`), or rows without it.

    All columns see the same draws, so that K of them cost little more than one.
    """
    sums = [_cluster_sums(column, user) for column in columns.T]
    total, count = np.stack([total for total, _ in sums], axis=1), sums[0][1]
    n = len(count)
    rng = np.random.default_rng(seed)
    means = []
    for size in _draw_sizes(n_boot, n):
        draw = rng.integers(0, n, (size, n)) + np.arange(size)[:, None] * n
        times = np.bincount(draw.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
        means.append(times @ total / (times @ count)[:, None])
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(*map(float, interval)) for interval in zip(columns.mean(axis=0), low, high, strict=True)]


def student_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """The mean of independent runs `[n]` with Student's interval; without end where there is one run alone."""
    n, mean = len(values), float(np.mean(values))
    if np.all(np.asarray(values) == values[0]):  # their computed mean may be another number
        mean = float(values[0])
        return Interval(mean, mean, mean) if n > 1 else Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired_test(
    first: np.ndarray, second: np.ndarray, seed: int, user: np.ndarray | None = None, n_perm: int = 10000
) -> PairedResult:
    """Two-sided sign-flip permutation test of `mean(first - second) = 0` over the same targets.

    The differences of one user flip together. Users with the same size of difference are drawn at once, by the
    binomial number of those whose sign stays. The p-value counts the observed arrangement: it is never 0.
    """
    total, _ = _cluster_sums(np.asarray(first, np.float64) - second, user)
    size, n_same = np.unique(np.abs(total[total != 0]), return_counts=True)
    difference = float(np.mean(first) - np.mean(second))
    if not len(size):
        return PairedResult(difference, 1.0, len(total))
    observed = abs(total.sum()) - 1e-9 * np.abs(total).sum()  # the sums are taken in another order below
    rng = np.random.default_rng(seed)
    extreme = 0
    for draws in _draw_sizes(n_perm, len(size)):
        kept = rng.binomial(n_same, 0.5, (draws, len(size)))
        extreme += int(np.count_nonzero(np.abs((2 * kept - n_same) @ size) >= observed))
    return PairedResult(difference, (1 + extreme) / (1 + n_perm), len(total))


def table_intervals(
    rows: Mapping[str, Ranks], service: np.ndarray, services: tuple[str, ...], user: np.ndarray, n_boot: int
) -> dict[str, dict[str, Any]]:
    """95 % bootstrap intervals over users of the main metrics, of every row of the table.

    Args:
      rows: by name. service, user: `[n]` of the targets.
    """
    parts = [(name, part) for name in rows for part in ("in_service", "union")]
    values = {(name, part): per_target_metrics(getattr(rows[name], part)) for name, part in parts}
    subsets = {name: service == code for code, name in enumerate(services)}
    subsets["all"] = np.ones(len(user), bool)
    out: dict[str, dict[str, Any]] = {name: {"in_service": {}, "union": {}} for name in rows}
    for subset, chosen in subsets.items():
        if not chosen.any():
            continue
        columns = np.stack([values[key][metric][chosen] for key in parts for metric in INTERVAL_METRICS], axis=1)
        intervals = iter(bootstrap_intervals(columns, 0, user[chosen], n_boot))
        for name, part in parts:
            out[name][part][subset] = {metric: list(next(intervals)[1:]) for metric in INTERVAL_METRICS}
    for table in out.values():
        table["in_service"].pop("all", None)  # a mean over catalogues of different sizes
    return out


def table_tests(
    model: Ranks,
    baselines: Mapping[str, Ranks],
    service: np.ndarray,
    services: tuple[str, ...],
    user: np.ndarray,
    seed: int,
    n_boot: int = 1000,
) -> dict[str, Any]:
    """The model against each baseline over the same targets: difference of NDCG@10, its p-value, and `interval`, the
    95 % bootstrap interval over users of the difference.
    """
    subsets = {name: service == code for code, name in enumerate(services)}

    def ndcg(counts: RankCounts) -> np.ndarray:
        return per_target_metrics(counts)["ndcg@10"]

    def test_all(own: np.ndarray, others: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, dict[str, Any]]:
        gains = np.stack([own[rows] - other[rows] for other in others.values()], axis=1)
        intervals = bootstrap_intervals(gains, 0, user[rows], n_boot)
        found = {}
        for (name, other), interval in zip(others.items(), intervals, strict=True):
            result = paired_test(own[rows], other[rows], seed, user[rows])
            found[name] = {
                "difference": result.difference,
                "p_value": result.p_value,
                "interval": [interval.low, interval.high],
            }
        return found

    if not baselines:
        return {}
    everything = np.ones(len(user), bool)
    union = test_all(ndcg(model.union), {name: ndcg(ranks.union) for name, ranks in baselines.items()}, everything)
    others, own = {name: ndcg(ranks.in_service) for name, ranks in baselines.items()}, ndcg(model.in_service)
    by_service = {z: test_all(own, others, rows) for z, rows in subsets.items() if rows.any()}
    return {
        name: {**union[name], "in_service": {z: found[name] for z, found in by_service.items()}} for name in baselines
    }


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method (Holm, 1979): the chance of one or more below a
    level, where nothing differs, is at most the level, however they depend on each other.
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def compare_best_rows(
    model: Ranks,
    baselines: Mapping[str, Ranks],
    columns: Sequence[tuple[str, str, str]],
    service: np.ndarray,
    services: tuple[str, ...],
    user: np.ndarray,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The best row of each column against the next best, paired over the same targets.

    With more than two rows the test is conservative: the best and the next best of equals are nearer to each other than
    two rows that were chosen beforehand.

    Args:
      columns: `(part, key, metric)`; the key is a service or "all".

    Returns:
      `{part: {key: {metric: {"row", "next", "difference", "p_value", "p_holm"}}}}`; rows by the baselines' names, the
      model as None; `p_holm` is corrected for all columns. Empty where there is no baseline.
    """
    if not baselines:
        return {}
    rows: dict[str | None, Ranks] = {None: model}
    for name, ranks in baselines.items():
        rows[name] = ranks
    values = {part: {name: per_target_metrics(getattr(r, part)) for name, r in rows.items()} for part in PARTS}
    found: dict[str, dict[str, dict[str, Any]]] = {part: {} for part in PARTS}
    tests = []
    for part, key, metric in columns:
        chosen = np.ones(len(user), bool) if key == "all" else service == services.index(key)
        column = {name: table[metric][chosen] for name, table in values[part].items()}
        best, *others = sorted(column, key=lambda name: -column[name].mean())
        nearest = [name for name in others if column[name].mean() == column[others[0]].mean()]
        results = {name: paired_test(column[best], column[name], seed, user[chosen]) for name in nearest}
        other = max(results, key=lambda name: results[name].p_value)
        test = {"row": best, "next": other, **results[other]._asdict()}
        del test["n_users"]
        found[part].setdefault(key, {})[metric] = test
        tests.append(test)
    for test, p_holm in zip(tests, correct_holm([test["p_value"] for test in tests]), strict=True):
        test["p_holm"] = p_holm
    return found


def _cluster_sums(values: np.ndarray, user: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if user is None:
        return np.asarray(values, np.float64), np.ones(len(values))
    _, code = np.unique(user, return_inverse=True)
    return np.bincount(code, weights=values), np.bincount(code).astype(np.float64)


def _draw_sizes(n_draws: int, width: int) -> list[int]:
    step = max(1, _MOST_DRAWS // max(width, 1))
    return [min(step, n_draws - done) for done in range(0, n_draws, step)]
