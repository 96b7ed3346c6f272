"""Scores that are linear in a decayed history: what the Markov chain and the item-kNN have in common."""

import numpy as np
import scipy.sparse

from moerec.data.dataset import Dataset
from moerec.data.histories import Histories

_MANY_ROWS = 1 << 20


def weigh_histories(
    dataset: Dataset, histories: Histories, decay: float, last_n: int | None, within_service: bool
) -> scipy.sparse.csr_matrix:
    """`[n, I]` weights `decay^k` of the item at the k-th last place, k = 0, 1, ... below `last_n`.

    Places are counted over the whole history, or with `within_service` over the events of the item's service.
    """
    n_services = dataset.catalogue.n_services
    parts = [histories]
    if last_n is not None and not within_service:
        parts = [histories.last(last_n)]
    elif last_n is not None and histories.length.sum() > _MANY_ROWS:  # which would all be sorted for a few
        ones = np.ones(len(histories), np.int64)
        parts = [histories.keep_group(dataset.event_service, z * ones).last(last_n) for z in range(n_services)]
    item = np.concatenate([dataset.log.item[part.rows] for part in parts]).astype(np.int64)
    owner = np.concatenate([part.owner for part in parts])
    if within_service:
        group = owner * n_services + dataset.catalogue.service[item]
        order = np.argsort(group, kind="stable")
        group, item, owner = group[order], item[order], owner[order]
    else:
        group = owner
    place = count_from_end(group)
    kept = np.full(len(item), True) if last_n is None else place < last_n
    weight = np.power(decay, place[kept], dtype=np.float64).astype(np.float32)
    shape = (len(histories), dataset.catalogue.n_items)
    return scipy.sparse.csr_matrix((weight, (owner[kept], item[kept])), shape)


def count_from_end(group: np.ndarray) -> np.ndarray:
    """`[n]` how many entries of the same group follow, for ascending groups."""
    return np.searchsorted(group, group, side="right") - 1 - np.arange(len(group))
