"""Chance: what a check shows in a data set without its defect, but for a probability of `ALPHA` to show more.

The null hypotheses: an item's id is dealt to it at random; a tie is put in order by a coin; and the items of users who
are nobody's copy are drawn by popularity. Events that are not independent are taken as they are: those of all users who
go from one item to the same next one fall on one side together.
"""

from collections.abc import Mapping

import numpy as np
from scipy import stats

ALPHA = 0.00135  # what lies above three standard deviations of a normal distribution
_N_DRAWS = 10_000
_MOST_CELLS = 40_000_000  # random signs of all draws; beyond, the normal distribution of the same variance
_MOST_AT_ONCE = 250_000  # of them in memory
_FEW = 64  # comparisons of one pair of items that are drawn as they are; beyond, a normal distribution again
_MOST_ROUNDS = 30
_N_SEQUENCES = 100_000  # by which the chance of a sequence is averaged


def is_too_few(n: int, limit: float) -> bool:
    """Whether `n` events, each with a defect by a chance of `limit`, may all have it without a surprise."""
    return limit**n >= ALPHA


def bound_order(before: np.ndarray, after: np.ndarray) -> float:
    """Of the share of pairs whose later item has the larger id, where ids are dealt to the items at random.

    Args:
      before, after: `[n]`, the two different items of each pair.
    """
    n = len(before)
    item, code = np.unique(np.stack([before, after]), return_inverse=True)
    before, after = code.reshape(2, n)
    key = np.minimum(before, after) * len(item) + np.maximum(before, after)
    pair, which = np.unique(key, return_inverse=True)
    low, high = pair // len(item), pair % len(item)
    rising = np.bincount(which.ravel(), weights=np.where(after > before, 1.0, -1.0))  # more than falling
    if len(pair) * _N_DRAWS > _MOST_CELLS:
        # By Hoeffding's decomposition: of each item alone, what follows it less what is before it; then of pairs.
        surplus = np.bincount(high, rising, len(item)) - np.bincount(low, rising, len(item))
        variance = (np.sum(surplus**2) + np.sum(rising**2)) / 12
        return float(0.5 + stats.norm.isf(ALPHA) * np.sqrt(variance) / n)
    rng, shares = np.random.default_rng(0), []
    step = max(1, _MOST_AT_ONCE // max(len(item), len(pair)))
    for done in range(0, _N_DRAWS, step):
        number = rng.random((min(step, _N_DRAWS - done), len(item)))
        shares.append(0.5 + np.where(number[:, high] > number[:, low], 0.5, -0.5) @ rising / n)
    return _upper(np.concatenate(shares))


def bound_agreement(count: np.ndarray) -> float:
    """Of the share of comparisons that agree, where each tie is put in order by a coin.

    Args:
      count: `[pairs]`, how often each pair of items stands tied, at least twice; those of a pair are compared with each
        other.
    """
    rng, agree = np.random.default_rng(0), np.zeros(_N_DRAWS)
    for c, n_pairs in zip(*np.unique(count, return_counts=True), strict=True):
        if c <= _FEW:
            rising = np.arange(c + 1)
            same = (rising * (rising - 1) + (c - rising) * (c - rising - 1)) / 2
            agree += rng.multinomial(n_pairs, stats.binom.pmf(rising, c, 0.5), _N_DRAWS) @ same
        else:  # (2 rising - c)^2 / c is chi-squared
            agree += (n_pairs * (c * c / 2 - c) + c / 2 * rng.chisquare(n_pairs, _N_DRAWS)) / 2
    return _upper(agree / np.sum(count * (count - 1) / 2))


def bound_hits(repeats: np.ndarray, chance: np.ndarray) -> float:
    """Of the number of hits, where what recurs is hit or missed together.

    Args:
      repeats: `[groups]`, the hits that each group is worth. chance: `[groups]`, the probability of each.
    """
    rng, hits = np.random.default_rng(0), np.zeros(_N_DRAWS)
    sizes, which, n_groups = np.unique(repeats, return_inverse=True, return_counts=True)
    means = np.bincount(which.ravel(), chance) / n_groups
    for size, n, mean in zip(sizes, n_groups, means, strict=True):
        hits += size * rng.binomial(n, min(mean, 1.0), _N_DRAWS)
    return _upper(hits)


def fit_popularity(user: np.ndarray, item: np.ndarray, n_items: int) -> np.ndarray:
    """`[I]`, the items' shares of what may come next, by maximum likelihood (Plackett and Luce; the iteration of
    Hunter, 2004): shares of what users have are flatter, as nobody has an item twice.

    Args:
      user, item: `[n]`, different items of users in their order, those of a user together.
    """
    count = np.bincount(item, minlength=n_items).astype(np.float64)
    share = count / max(len(item), 1)
    start = np.flatnonzero(np.append(True, user[1:] != user[:-1])[: len(user)])
    length = np.diff(np.append(start, len(user)))
    for _ in range(_MOST_ROUNDS):
        total = np.cumsum(share[item])
        had = total - share[item] - np.repeat(total[start] - share[item[start]], length)
        inverse = 1 / np.maximum(1 - had, 1e-9)
        upto = np.cumsum(inverse)
        later = np.repeat(upto[start + length - 1], length) - upto  # when the item was not to be had
        fitted = count / np.maximum(inverse.sum() - np.bincount(item, later, n_items), 1e-9)
        fitted /= max(fitted.sum(), 1e-300)
        if np.abs(fitted - share).max(initial=0) < 1e-4:
            return fitted
        share = fitted
    return share


def expect_shared(popularity: np.ndarray, n_users: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Mean and variance of the number of users whose items are also somebody else's, in the same order.

    Each next item is one that the user has not had, drawn by popularity. The variance is that of independent Poisson
    numbers of users for each sequence, given their sum.

    Args:
      popularity: `[I]`, shares of the items. n_users: by the number of items `[groups]`; one shares within one's group.
    """
    rng, above, mean, variance = np.random.default_rng(0), np.cumsum(popularity), 0.0, 0.0
    left, log_p = np.ones(_N_SEQUENCES), np.zeros(_N_SEQUENCES)  # `left`: the share of what may come next
    had = np.zeros((0, _N_SEQUENCES), np.int64)
    most = max((int(sizes.max()) for sizes in n_users.values()), default=0)
    for length in range(1, max(n_users, default=0) + 1):
        place = rng.random(_N_SEQUENCES) * left
        for earlier in np.sort(had, axis=0):  # whose shares are skipped
            place += np.where(place >= above[earlier] - popularity[earlier], popularity[earlier], 0)
        item = np.minimum(np.searchsorted(above, place, side="right"), len(popularity) - 1)
        log_p += np.log(np.maximum(popularity[item], 1e-300) / left)
        left, had = np.maximum(left - popularity[item], 1e-12), np.concatenate([had, item[None]])
        p = np.minimum(np.exp(log_p), 1 - 1e-12)
        for n, n_groups in zip(*np.unique(n_users.get(length, []), return_counts=True), strict=True):
            mean += n_groups * n * float(np.mean(-np.expm1((n - 1) * np.log1p(-p))))
            shared = -np.expm1(-n * p)
            with_size = n * np.mean(shared + n * p * (1 - shared))
            variance += float(n_groups * (n * np.mean(n * p + shared - n * p * shared**2) - with_size**2 / n))
        if most * most * np.exp(log_p.max()) < 1e-9:
            break  # nobody shares as many
    return mean, max(variance, 0.0)


def bound_shared(mean: float, variance: float) -> float:
    """Of a number of this mean and variance: that of a Poisson distribution in steps of their ratio, of two users each
    where coincidences are rare.
    """
    step = variance / mean if mean > 0 and variance > 0 else 2.0
    return float(step * stats.poisson.isf(ALPHA, mean / step))


def _upper(draws: np.ndarray) -> float:
    return float(np.quantile(draws, 1 - ALPHA, method="higher"))
