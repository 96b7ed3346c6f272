"""Decayed item-kNN: cosine-normalised co-occurrence in training, summed over the history with decaying weights."""

import dataclasses
import itertools

import numpy as np
import scipy.sparse

from moerec.data.dataset import Dataset
from moerec.data.histories import Histories
from moerec.data.splits import TRAIN
from moerec.eval.baselines.base import register_scorer
from moerec.eval.baselines.item_to_item import weigh_histories

_MOST_KEPT = 1 << 26  # similarities: half a GiB
_MOST_AT_ONCE = 1 << 24  # similarities, where they are not kept


@dataclasses.dataclass(frozen=True)
class ItemKnn:
    """`score(j) = sum_k decay^k similarity(item_k, j)` over the k-th last events of the history."""

    similarity: "Similarity"
    decay: float
    last_n: int | None
    within_service: bool

    def score(self, dataset: Dataset, targets: np.ndarray, histories: Histories) -> np.ndarray:
        weight = weigh_histories(dataset, histories, self.decay, self.last_n, self.within_service)
        return self.similarity.multiply(weight)


class Similarity:
    """The sparse matrix `[I, I]` float32 of cosines, kept as a whole where it is small.

    One user with 60,000 items makes 3.6 billion similarities. Then the rows of the items that most users have are kept:
    they are asked for most often, and are the most work. The others are computed for the request that needs them.
    """

    def __init__(self, ranges: list[scipy.sparse.csr_matrix]):
        """Args: `[users, items]` of each range of the catalogue within which items have similarities: the products of
        its columns.
        """
        is_kept = np.split(_choose_rows(ranges), np.cumsum([unit.shape[1] for unit in ranges])[:-1])
        self._ranges = [_Range(unit, kept) for unit, kept in zip(ranges, is_kept, strict=True)]

    def multiply(self, weight: scipy.sparse.csr_matrix) -> np.ndarray:
        """`[n, I]`: the weights of items, `[n, I]`, times the similarities."""
        found, lo = np.empty(weight.shape, np.float32), 0
        for part in self._ranges:
            hi = lo + len(part.is_kept)
            found[:, lo:hi] = part.multiply(weight[:, lo:hi])
            lo = hi
        return found


class _Range:
    """The similarities of items of one range, `[I, I]`: those rows that are kept, and what the others come from."""

    def __init__(self, unit: scipy.sparse.csr_matrix, is_kept: np.ndarray):
        users = scipy.sparse.csr_matrix(unit.T)
        self.is_kept, self._kept = is_kept, _spread_rows(users[is_kept] @ unit, is_kept)
        self._rest = None if is_kept.all() else (users, unit)

    def multiply(self, weight: scipy.sparse.csr_matrix) -> np.ndarray:
        found = (weight @ self._kept).toarray()
        if self._rest is not None:
            rest = weight.copy()
            rest.data[self.is_kept[rest.indices]] = 0
            rest.eliminate_zeros()
            found += _multiply(rest, *self._rest)
        return found


def _choose_rows(ranges: list[scipy.sparse.csr_matrix]) -> np.ndarray:
    """`[I]` bool, whose rows are kept: those of the items with most users, at most `_MOST_KEPT` similarities."""
    n_users = np.concatenate([np.bincount(unit.indices, minlength=unit.shape[1]) for unit in ranges])
    # An item has no more similarities than its users have items, and than there are items.
    most = [np.minimum((unit != 0).T @ np.diff(unit.indptr).astype(np.int64), unit.shape[1]) for unit in ranges]
    order = np.argsort(-n_users, kind="stable")
    is_kept = np.zeros(len(n_users), bool)
    is_kept[order] = np.cumsum(np.concatenate(most)[order]) <= _MOST_KEPT
    return is_kept


def _spread_rows(rows: scipy.sparse.csr_matrix, where: np.ndarray) -> scipy.sparse.csr_matrix:
    """A matrix with these rows `where` is true, and empty ones elsewhere."""
    length = np.zeros(len(where), rows.indptr.dtype)
    length[where] = np.diff(rows.indptr)
    return scipy.sparse.csr_matrix(
        (rows.data, rows.indices, np.concatenate([[0], np.cumsum(length)])), (len(where), rows.shape[1])
    )


def _multiply(
    weight: scipy.sparse.csr_matrix, users: scipy.sparse.csr_matrix, unit: scipy.sparse.csr_matrix
) -> np.ndarray:
    """`weight [n, I] @ (users [I, U] @ unit [U, I])`; of the rows of the product few are there at a time."""
    n, n_items = weight.shape
    found = np.zeros((n, n_items), np.float32)
    most = max(_MOST_AT_ONCE // max(n_items, 1), 1)
    lo = 0
    while lo < n:
        ends = weight.indptr[lo + 1 :] - weight.indptr[lo]
        hi = lo + max(int(np.searchsorted(ends, most, side="right")), 1)
        part = weight[lo:hi]
        items = np.unique(part.indices)
        for first in range(0, len(items), most):  # more than one time only for a request with very many items
            chosen = items[first : first + most]
            found[lo:hi] += (part[:, chosen] @ (users[chosen] @ unit)).toarray()
        lo = hi
    return found


@register_scorer("item_knn")  # each service by itself
def fit_item_knn(
    dataset: Dataset,
    split_ids: np.ndarray,
    decay: float = 0.7,
    last_n: int | None = 4,
    within_service: bool = True,
) -> ItemKnn:
    """Similarity `n_ij / sqrt(n_i n_j)`, where n counts the users who have the items among their training events.

    With `within_service` items of different services have no similarity, and places in the history are counted
    within a service: each service is then ranked as if it were the only one. An item's similarity to itself is 1, which
    only matters where seen items are candidates.

    The published row of amazon3 does not say how much of the history it sums. `last_n = 4` was fitted to it: the whole
    history (None) misses two of its nine values by .0021, this misses none by more than .0014.
    """
    log, n_items = dataset.log, dataset.catalogue.n_items
    trained = split_ids == TRAIN
    has = scipy.sparse.csr_matrix(
        (np.ones(trained.sum(), np.float32), (log.user[trained], log.item[trained])), (log.n_users, n_items)
    )
    has.data[:] = 1.0  # building the matrix added the repeats up
    norm = scipy.sparse.diags(1 / np.sqrt(np.maximum(np.asarray(has.sum(axis=0)).ravel(), 1)).astype(np.float32))
    unit = scipy.sparse.csr_matrix(has @ norm)
    ranges = _service_ranges(dataset) if within_service else [(0, n_items)]
    return ItemKnn(Similarity([unit[:, lo:hi] for lo, hi in ranges]), decay, last_n, within_service)


def _service_ranges(dataset: Dataset) -> list[tuple[int, int]]:
    offsets = dataset.catalogue.offsets.tolist()
    return list(itertools.pairwise(offsets))


@register_scorer("item_knn_cross")
def fit_cross_service_knn(dataset: Dataset, split_ids: np.ndarray) -> ItemKnn:
    """`fit_item_knn` over the items of all services together."""
    return fit_item_knn(dataset, split_ids, within_service=False)
