"""Lists of the items that are wanted most, among those that may be listed; equal ones in the order of the catalogue."""

import numpy as np


def best_items(score: np.ndarray, is_allowed: np.ndarray, n: int) -> np.ndarray:
    """`[J]` int64, the `n` best of the items that are allowed, of one query on the host; without a sort of all.

    Args: `[I]` scores, finite where `[I]` bool says so; how many at most.
    """
    (allowed,) = np.nonzero(is_allowed)
    n = min(n, len(allowed))
    if n < 1:
        return allowed[:0]
    of_allowed = score[allowed]
    least = np.partition(of_allowed, len(allowed) - n)[len(allowed) - n]
    kept = allowed[of_allowed >= least]  # with all that share the last place
    return kept[np.argsort(-score[kept], kind="stable")[:n]]
