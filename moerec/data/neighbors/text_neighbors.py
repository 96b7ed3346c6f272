"""The nearest items by the cosine of their TF-IDF vectors, within each service; built, or extended by new items."""

import numpy as np
import scipy.sparse

from moerec.config.terminal import printable
from moerec.data.dataset import ItemTable
from moerec.data.neighbors.best import Neighbors, keep_best, multiply_blocks, rank_ids
from moerec.data.neighbors.table import ItemNames, NeighborTable
from moerec.data.neighbors.text import WordCounts, count_words, make_text_vectors
from moerec.errors import InputError


def find_text_neighbors(catalogue: ItemTable, n: int, counts: WordCounts | None = None) -> Neighbors:
    """The `n` items of its own service whose texts and attributes are most like each item's, trained on or not.

    An item without words, or with none that another has, has no neighbors. Memory: a block of rows, never `[I, I]`.

    Args:
      counts: as in `make_text_vectors`.
    """
    vector_IV, rank_I = make_text_vectors(catalogue, counts), rank_ids(catalogue)
    found = _empty(catalogue.n_items, n)
    for lo, hi in zip(catalogue.offsets[:-1], catalogue.offsets[1:], strict=True):
        own = np.arange(lo, hi)
        _fill(found, vector_IV, own, own, rank_I)
    return found


def make_text_table(catalogue: ItemTable, n: int) -> NeighborTable:
    """`find_text_neighbors` with the names of the items and the counts of words, to be kept and extended."""
    counts = count_words(catalogue)
    return NeighborTable(ItemNames.of(catalogue), find_text_neighbors(catalogue, n, counts), counts)


def extend_text_neighbors(table: NeighborTable, old: ItemTable, new: ItemTable) -> NeighborTable:
    """The table of a catalogue that has more items, among them new neighbors of the old ones.

    Words are weighed by the table's counts, those of the first catalogue: the result is that of `find_text_neighbors`
    on `new` with these, however often a table is extended. (Counted anew, they would move every similarity.) The work
    is that of the new items' similarities to all, not of the old ones' to each other.

    Args:
      table: of `make_text_table` on `old`, or extended to it.

    Raises:
      InputError: the table has no counts of words, or not the items of `old`; or an item of `old` is not in `new`, or
        has another text there.
    """
    if table.counts is None:
        raise InputError("neighbors: a table without counts of words cannot be extended by texts")
    if len(table.names.ids) != old.n_items or np.any(table.names.find(old) < 0):
        raise InputError("neighbors: the table is of other items than the old catalogue")
    is_new = _find_new(old, new)
    vector_IV, rank_I = make_text_vectors(new, table.counts), rank_ids(new)
    found = table.align(new)
    for lo, hi in zip(new.offsets[:-1], new.offsets[1:], strict=True):
        own = np.arange(lo, hi)
        _fill(found, vector_IV, own[~is_new[lo:hi]], own[is_new[lo:hi]], rank_I)
        _fill(found, vector_IV, own[is_new[lo:hi]], own, rank_I)
    return NeighborTable(ItemNames.of(new), found, table.counts, table.source)


def _empty(n_items: int, n: int) -> Neighbors:
    return Neighbors(np.full((n_items, n), -1, np.int32), np.zeros((n_items, n), np.float32))


def _fill(
    found: Neighbors, vector_IV: scipy.sparse.csr_matrix, rows: np.ndarray, among: np.ndarray, rank_I: np.ndarray
) -> None:
    """Adds to the neighbors of the items `rows` what is near among other ones, none of which they have yet."""
    if not len(rows) or not len(among):
        return
    n = found.item_IX.shape[1]
    for block, near in multiply_blocks(vector_IV[rows], scipy.sparse.csr_matrix(vector_IV[among].T)):
        which = rows[block]
        item_BX, similarity_BX = found.item_IX[which], found.similarity_IX[which]
        known_row, known_place = np.nonzero(item_BX >= 0)
        other = which[near.row] != among[near.col]
        best = keep_best(
            np.concatenate([near.row[other], known_row]),
            np.concatenate([among[near.col[other]], item_BX[known_row, known_place]]),
            np.concatenate([near.data[other], similarity_BX[known_row, known_place]]),
            rank_I,
            len(which),
            n,
        )
        found.item_IX[which], found.similarity_IX[which] = best


def _find_new(old: ItemTable, new: ItemTable) -> np.ndarray:
    """`[I]` bool, which items of `new` are not in `old`."""
    place = ItemNames.of(new).find(old)
    _refuse(old, place < 0, "is not in the new catalogue")
    _refuse(old, new.text[place] != old.text, "has another text in the new catalogue")
    _refuse(old, new.attributes[place] != old.attributes, "has other attributes in the new catalogue")
    is_new = np.ones(new.n_items, bool)
    is_new[place] = False
    return is_new


def _refuse(old: ItemTable, is_wrong: np.ndarray, what: str) -> None:
    for i in np.flatnonzero(is_wrong).tolist():
        item, service = printable(str(old.ids[i])), printable(old.services[old.service[i]])
        raise InputError(f"neighbors: item {item} of {service} {what}")
