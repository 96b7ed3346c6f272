"""The best few of each row of a sparse matrix, in an order that does not depend on how items are numbered."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse

from moerec.data.dataset import ItemTable, encode_strings

MOST_PRODUCTS = 1 << 22  # of which a block of rows of a product is made: some 100 MB


class Neighbors(NamedTuple):
    """The nearest items of each item, X at most; the nearest first, of equally near ones that with the lower id.

    Ids are compared as strings. No item is its own neighbor.

    Attributes:
      item_IX: int32 index into the catalogue, -1 where there are fewer.
      similarity_IX: float32, falling; 0 where there is no item.
    """

    item_IX: np.ndarray
    similarity_IX: np.ndarray


def rank_ids(catalogue: ItemTable) -> np.ndarray:
    """`[I]` int64, which settles what is level: by the items' ids, those of several services by their order."""
    _, place = encode_strings(catalogue.ids)
    return place * catalogue.n_services + catalogue.service


def keep_best(
    row: np.ndarray, item: np.ndarray, similarity: np.ndarray, rank_I: np.ndarray, n_rows: int, n: int
) -> Neighbors:
    """The `n` best of each row among pairs of a row and an item, each pair at most once.

    Args:
      row, item: `[pairs]`, in any order.
      similarity: `[pairs]` float32; those that are not positive do not count.
      rank_I: which item comes first among level ones (`rank_ids`).
      n_rows, n: the shape of the result.
    """
    found = Neighbors(np.full((n_rows, n), -1, np.int32), np.zeros((n_rows, n), np.float32))
    positive = similarity > 0
    row, item, similarity = row[positive], item[positive], similarity[positive].astype(np.float32)
    if not len(row) or not n:
        return found
    # Bits of positive floats are in the order of the floats, so one sort of whole numbers finds each row's n-th best.
    key = (row.astype(np.uint64) << np.uint64(32)) | similarity.view(np.uint32)
    end = np.cumsum(np.bincount(row, minlength=n_rows))
    start = np.concatenate([[0], end[:-1]])
    nth = np.minimum(np.maximum(end - n, start), len(key) - 1)
    near = key >= np.sort(key)[nth][row]
    row, item, similarity = row[near], item[near], similarity[near]
    order = np.lexsort((rank_I[item], -similarity, row))
    row, item, similarity = row[order], item[order], similarity[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < n
    found.item_IX[row[kept], place[kept]] = item[kept]
    found.similarity_IX[row[kept], place[kept]] = similarity[kept]
    return found


def multiply_blocks(
    left: scipy.sparse.csr_matrix, right: scipy.sparse.csr_matrix
) -> Iterator[tuple[slice, scipy.sparse.coo_matrix]]:
    """`left @ right`, a few rows at a time: which, and they. A block takes `MOST_PRODUCTS`, or is one row."""
    n_products = np.concatenate([[0], np.cumsum(np.diff(right.indptr).astype(np.int64)[left.indices])])
    done, lo, n_rows = n_products[left.indptr], 0, left.shape[0]
    while lo < n_rows:
        hi = max(int(np.searchsorted(done, done[lo] + MOST_PRODUCTS, side="right")) - 1, lo + 1)
        yield slice(lo, hi), (left[lo:hi] @ right).tocoo()
        lo = hi
