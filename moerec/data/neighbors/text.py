"""TF-IDF vectors of the items' texts and attributes (Salton & Buckley 1988), with the document counts of each service.

A word counts as often as the item has it, times `log((1 + n) / (1 + df)) + 1`, where df of the service's n items have
it. The counts can be kept: items that come later are then weighed as the earlier ones were.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse

from moerec.data.dataset import ItemTable
from moerec.data.text.words import split_words


class WordCounts(NamedTuple):
    """Of each service, how many of its items have each word.

    Attributes:
      services: names. words: `[V]` str, sorted; lower-case words of texts, and attributes (`brand=acme`) as they are.
      count_ZV: int32, compressed sparse rows. n_items_Z: int64.
    """

    services: tuple[str, ...]
    words: tuple[str, ...]
    count_ZV: scipy.sparse.csr_matrix
    n_items_Z: np.ndarray

    def find_idf(self, service: str, words: tuple[str, ...]) -> np.ndarray:
        """`[words]` float64. A word that no item of the service had has df 0; an unknown service has no item."""
        if service not in self.services:
            return np.ones(len(words))
        z, place = self.services.index(service), {word: v for v, word in enumerate(self.words)}
        column = np.fromiter((place.get(word, -1) for word in words), np.int64, len(words))
        df_V = np.append(self.count_ZV[z].toarray().ravel(), 0)  # the last is for words that are not known
        return np.log((1 + self.n_items_Z[z]) / (1 + df_V[column])) + 1


def count_words(catalogue: ItemTable) -> WordCounts:
    """The counts of a catalogue."""
    words, use_IV = _read_uses(catalogue)
    return _count(catalogue, words, use_IV)


def make_text_vectors(catalogue: ItemTable, counts: WordCounts | None = None) -> scipy.sparse.csr_matrix:
    """`[I, V]` float32, the words of the catalogue in sorted order; rows of length 1, empty where an item has none.

    Args:
      counts: by which words are weighed; the catalogue's own if None. Words and services that they do not have get the
        weight of a word that no item has.
    """
    words, use_IV = _read_uses(catalogue)
    counts = _count(catalogue, words, use_IV) if counts is None else counts
    weight = use_IV.data.astype(np.float64)
    for z, (lo, hi) in enumerate(zip(catalogue.offsets[:-1], catalogue.offsets[1:], strict=True)):
        own = slice(use_IV.indptr[lo], use_IV.indptr[hi])
        weight[own] *= counts.find_idf(catalogue.services[z], words)[use_IV.indices[own]]
    row = np.repeat(np.arange(catalogue.n_items), np.diff(use_IV.indptr))
    length = np.sqrt(np.bincount(row, weight**2, minlength=catalogue.n_items))
    weight /= length[row]
    return scipy.sparse.csr_matrix((weight.astype(np.float32), use_IV.indices, use_IV.indptr), use_IV.shape)


def _read_uses(catalogue: ItemTable) -> tuple[tuple[str, ...], scipy.sparse.csr_matrix]:
    """The words in sorted order, and `[I, V]` how often each item has them.

    Products then add up in the order of the words, and come out the same to the bit however items are numbered.
    """
    offsets, flat = split_words(catalogue.text, catalogue.attributes)
    encoded = flat.dictionary_encode()
    known = encoded.dictionary.to_pylist()
    code = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    order = sorted(range(len(known)), key=known.__getitem__)
    column = np.empty(len(known), np.int64)
    column[order] = np.arange(len(known))
    shape = (catalogue.n_items, len(known))
    use_IV = scipy.sparse.csr_matrix((np.ones(len(code), np.int32), column[code], offsets), shape)
    use_IV.sum_duplicates()  # which sorts them, too
    return tuple(known[k] for k in order), use_IV


def _count(catalogue: ItemTable, words: tuple[str, ...], use_IV: scipy.sparse.csr_matrix) -> WordCounts:
    service = np.repeat(catalogue.service, np.diff(use_IV.indptr))
    ones = np.ones(use_IV.nnz, np.int32)
    count_ZV = scipy.sparse.csr_matrix((ones, (service, use_IV.indices)), (catalogue.n_services, len(words)))
    return WordCounts(catalogue.services, words, count_ZV, np.diff(catalogue.offsets).astype(np.int64))
