"""Scores that are linear in a decayed history: what the Markov chain and the item-kNN have in common."""

import numpy as np
import scipy.sparse

from moerec.data.dataset import Dataset
from moerec.data.histories import Histories


def weigh_histories(
    dataset: Dataset, histories: Histories, decay: float, last_n: int | None, within_service: bool
) -> scipy.sparse.csr_matrix:
    """`[n, I]` weights `decay^k` of the item at the k-th last place, k = 0, 1, ... below `last_n`.

    Places are counted over the whole history, or with `within_service` over the events of the item's service.
    """
    item, owner = dataset.log.item[histories.rows].astype(np.int64), histories.owner
    if within_service:
        group = owner * dataset.catalogue.n_services + dataset.catalogue.service[item]
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
