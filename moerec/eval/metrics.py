"""Full-ranking metrics with ties at their expected rank, their tables and slices.

A target that shares its score with others is taken to stand anywhere among them with equal probability, and every
metric is its exact expectation over that order: a constant model has recall@K = K / candidates.
"""

import dataclasses
import re
from typing import NamedTuple

import numpy as np

from moerec.errors import WorkError

CUTOFFS = (5, 10, 20)
MRR_CUTOFF = 10
COLDNESS = ("0", "1-4", "5-9", "10-49", "50+")  # training events of an item

Seen = tuple[np.ndarray, np.ndarray] | np.ndarray | None


@dataclasses.dataclass(frozen=True)
class RankCounts:
    """Where each target stands among its candidates.

    Attributes:
      greater: `[n]` int64, candidates with a strictly higher score.
      equal: `[n]` int64, candidates with the target's score, the target itself included (so at least 1).
    """

    greater: np.ndarray
    equal: np.ndarray

    def __post_init__(self):
        if self.greater.shape != self.equal.shape or np.any(self.greater < 0) or np.any(self.equal < 1):
            raise WorkError("rank counts: every target needs greater >= 0 and equal >= 1 (itself)")

    def __len__(self) -> int:
        return len(self.greater)


PARTS = ("in_service", "union")  # of `Ranks`: among what targets are ranked


class Ranks(NamedTuple):
    """Where each target stands in its service's catalogue and among the items of all services: of a model, a baseline
    or the oracle.
    """

    in_service: RankCounts
    union: RankCounts


class ScoredRanks(Ranks):
    """Ranks of what gives probabilities. `log_p`: `[n]` float64, the targets' log-probabilities over the union."""

    log_p: np.ndarray

    def __new__(cls, ranks: Ranks, log_p: np.ndarray) -> "ScoredRanks":
        made = super().__new__(cls, *ranks)
        made.log_p = log_p
        return made


def concatenate_counts(parts: list[RankCounts]) -> RankCounts:
    """The counts of consecutive chunks of targets as one."""
    empty = np.zeros(0, np.int64)
    return RankCounts(
        np.concatenate([empty, *(part.greater for part in parts)]),
        np.concatenate([empty, *(part.equal for part in parts)]),
    )


MISS = 1 << 30  # what stands above a target that may not be recommended, so that it counts for nothing


def count_ranks(
    scores: np.ndarray,
    target: np.ndarray,
    seen: Seen = None,
    ranges: tuple[np.ndarray, np.ndarray] | None = None,
    first_row: int = 0,
) -> RankCounts:
    """Counts the candidates above and level with each target.

    Args:
      scores: `[n, I]` float, finite.
      target: `[n]` the item to be found.
      seen: items that are no candidates: `(offsets [n + 1], items)` or `[n, I]` bool, repeats counting once. A target
        that is itself seen is a miss (`MISS`).
      ranges: `(first [n], last [n])`, when only the items `first <= i < last` are candidates.
      first_row: the number of row 0 in messages.

    Raises:
      WorkError: a score is not finite, or a target lies outside its range.
    """
    _refuse_non_finite(scores, first_row)
    n, n_items = scores.shape
    low, high = ranges if ranges is not None else (np.zeros(n, np.int64), np.full(n, n_items, np.int64))
    if np.any((target < low) | (target >= high)):
        row = int(np.flatnonzero((target < low) | (target >= high))[0])
        raise WorkError(f"row {first_row + row}: target {target[row]} is no candidate of [{low[row]}, {high[row]})")
    level = scores[np.arange(n), target]
    greater, equal = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for lo, hi in np.unique(np.stack([low, high], axis=1), axis=0).tolist():
        rows = np.flatnonzero((low == lo) & (high == hi))
        part = scores[:, lo:hi] if len(rows) == n else scores[rows, lo:hi]
        greater[rows] = _count_true(part > level[rows, None])
        equal[rows] = _count_true(part == level[rows, None])
    row_of, item = _seen_pairs(seen, n, n_items)
    missed = np.zeros(n, bool)
    missed[row_of[item == target[row_of]]] = True
    inside = (item >= low[row_of]) & (item < high[row_of])
    row_of, item = row_of[inside], item[inside]
    score = scores[row_of, item]
    greater -= np.bincount(row_of[score > level[row_of]], minlength=n)
    equal -= np.bincount(row_of[score == level[row_of]], minlength=n)
    return RankCounts(np.where(missed, MISS, greater), np.where(missed, 1, equal))


def _count_true(x: np.ndarray) -> np.ndarray:
    """`[n]` how many of each row `[n, I]` are true; row by row, since with an axis NumPy adds up whole numbers."""
    return np.fromiter(map(np.count_nonzero, x), np.int64, len(x))


def _refuse_non_finite(scores: np.ndarray, first_row: int):
    # the sum of a row is finite only if all of it is, except for overflow: look closer only where it is not
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(scores.sum(axis=1)))
    for row in suspects:
        bad = np.flatnonzero(~np.isfinite(scores[row]))
        if len(bad):
            raise WorkError(f"row {first_row + row}: the score of item {bad[0]} is {scores[row, bad[0]]}")


def _seen_pairs(seen: Seen, n: int, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    if seen is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if isinstance(seen, np.ndarray):
        row, item = np.nonzero(seen)
        return row, item
    offsets, items = seen
    if len(items) > n * n_items // 8:  # long histories: a table is smaller than what a sort of them takes
        table = np.zeros((n, n_items), bool)
        table[np.repeat(np.arange(n), np.diff(offsets)), items] = True
        row, item = np.nonzero(table)
        return row, item
    pair = np.repeat(np.arange(n, dtype=np.int64), np.diff(offsets)) * n_items + items
    pair = np.unique(pair)
    return pair // n_items, pair % n_items


def ndcg_at(counts: RankCounts, k: int) -> np.ndarray:
    """`[n]` float64, the NDCG@k of each target: the gain of its rank, the best being 1."""
    first, last = counts.greater, counts.greater + counts.equal  # zero-based ranks first <= r < last
    gain = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2))])
    return (gain[np.minimum(last, k)] - gain[np.minimum(first, k)]) / counts.equal


def per_target_metrics(counts: RankCounts) -> dict[str, np.ndarray]:
    """`{"recall@5": [n] float64, ..., "ndcg@5": ..., "mrr@10": ..., "mrr": ...}`, expectations over the order of ties.

    `mrr@10` counts a target below the tenth place as 0; `mrr` is the reciprocal rank wherever the target stands.
    """
    first, last = counts.greater, counts.greater + counts.equal  # zero-based ranks first <= r < last
    metrics = {f"recall@{k}": (np.minimum(last, k) - np.minimum(first, k)) / counts.equal for k in CUTOFFS}
    metrics |= {f"ndcg@{k}": ndcg_at(counts, k) for k in CUTOFFS}
    first, last = (np.where(counts.greater < MISS, place, 0) for place in (first, last))
    reciprocal = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, last.max(initial=0) + 1))])
    within = [np.minimum(place, MRR_CUTOFF) for place in (first, last)]
    metrics[f"mrr@{MRR_CUTOFF}"] = (reciprocal[within[1]] - reciprocal[within[0]]) / counts.equal
    metrics["mrr"] = (reciprocal[last] - reciprocal[first]) / counts.equal
    return metrics


def summarise(per_target: dict[str, np.ndarray], rows: np.ndarray | None = None) -> dict[str, float | int]:
    """Means over the targets (those of `rows`, a mask or indices), and their number `n`.

    Raises:
      WorkError: there is no target to take the mean of.
    """
    chosen = {name: values if rows is None else values[rows] for name, values in per_target.items()}
    n = len(next(iter(chosen.values())))
    if n == 0:
        raise WorkError("no targets to summarise")
    return {**{name: float(values.mean()) for name, values in chosen.items()}, "n": n}


def build_table(
    ranks: Ranks, target_service: np.ndarray, services: tuple[str, ...]
) -> dict[str, dict[str, dict[str, float | int]]]:
    """`{"in_service": {service: M}, "union": {service: M, "all": M}}`; a service without targets has no row."""
    rows = {name: target_service == code for code, name in enumerate(services) if np.any(target_service == code)}
    own, all_items = per_target_metrics(ranks.in_service), per_target_metrics(ranks.union)
    return {
        "in_service": {name: summarise(own, mask) for name, mask in rows.items()},
        "union": {**{name: summarise(all_items, mask) for name, mask in rows.items()}, "all": summarise(all_items)},
    }


def slice_table(
    per_target: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> dict[str, dict[str, dict[str, float | int]]]:
    """`{slice: {label: M}}` for each `slice: [n] labels`; numeric buckets in their order."""
    return {
        name: {str(x): summarise(per_target, values == x) for x in sorted(np.unique(values), key=_by_number)}
        for name, values in labels.items()
    }


def _by_number(label: str) -> tuple[int, str]:
    number = re.match(r"\d+", label)
    return (int(number.group()) if number else -1, str(label))


def bucket_history_length(length: np.ndarray) -> np.ndarray:
    """`[n]` labels 0, 1-4, 5-9, 10-19, 20-49, 50+."""
    return np.array(["0", "1-4", "5-9", "10-19", "20-49", "50+"])[np.digitize(length, [1, 5, 10, 20, 50])]


def bucket_coldness(train_count: np.ndarray) -> np.ndarray:
    """`[n]` labels, of `COLDNESS`, of how often the target item occurs in training."""
    return np.array(COLDNESS)[np.digitize(train_count, [1, 5, 10, 50])]
