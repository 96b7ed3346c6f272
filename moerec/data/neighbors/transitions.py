"""What follows what in training: counts of pairs of items by how far apart they stand, the item graph."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from moerec.data.dataset import Dataset
from moerec.data.neighbors.best import Neighbors, keep_best, rank_ids
from moerec.data.splits import TRAIN
from moerec.types import TRANSITION_DECAY, TRANSITION_GAP


def count_transitions(
    dataset: Dataset, split_ids: np.ndarray, max_gap: int, within_service: bool = True
) -> list[scipy.sparse.csr_matrix]:
    """For each gap 1, 2, … `max_gap` the matrix `[I, I]` int32: how often a user has item j that many places after i.

    Only training events are looked at, and take places. With `within_service` places are counted among a user's events
    of one service, so that pairs of two services have no count; otherwise among all of a user's events.
    """
    log, catalogue = dataset.log, dataset.catalogue
    trained = np.flatnonzero(split_ids == TRAIN)
    item, chain = log.item[trained].astype(np.int64), log.users_of(trained)
    if within_service:
        chain = chain * catalogue.n_services + dataset.event_service[trained]
        order = np.argsort(chain, kind="stable")
        item, chain = item[order], chain[order]
    counts = []
    for gap in range(1, max_gap + 1):
        same = chain[gap:] == chain[:-gap]
        before, after = item[:-gap][same], item[gap:][same]
        pairs = (np.ones(len(before), np.int32), (before, after))
        counts.append(scipy.sparse.csr_matrix(pairs, (catalogue.n_items, catalogue.n_items)))
    return counts


def weigh_transitions(counts: Sequence[scipy.sparse.csr_matrix], decay: float) -> scipy.sparse.csr_matrix:
    """`[I, I]` float32, the sum over gaps of `decay^(gap - 1)` times the counts; a decay of 0 leaves gap 1 alone.

    Counts are whole, and gaps are added in their order: the sum is the same to the bit however items are numbered.
    """
    weight_II = counts[0].astype(np.float64)
    for k, count_II in enumerate(counts[1:], 1):
        weight_II = weight_II + decay**k * count_II
    weight_II = scipy.sparse.csr_matrix(weight_II, dtype=np.float32)
    weight_II.eliminate_zeros()
    return weight_II


def make_item_graph(weight_II: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """`[I, I]` float32: `D^-1/2 (W + W^T) D^-1/2` without its diagonal, where D has the sums of its rows.

    The normalised adjacency of spectral graph theory, as in LightGCN (He et al. 2020), of items instead of users and
    items. Degrees below one count as one, as a single transition's.
    """
    graph_II = scipy.sparse.coo_matrix(weight_II + weight_II.T)
    other = graph_II.row != graph_II.col
    row, column, data = graph_II.row[other], graph_II.col[other], graph_II.data[other].astype(np.float64)
    degree_I = np.maximum(np.bincount(row, data, minlength=graph_II.shape[0]), 1)
    data = (data / np.sqrt(degree_I[row] * degree_I[column])).astype(np.float32)
    return scipy.sparse.csr_matrix((data, (row, column)), graph_II.shape)


def find_transition_neighbors(
    dataset: Dataset, split_ids: np.ndarray, n: int, within_service: bool = True
) -> Neighbors:
    """The `n` other items of its service that most often stand near each item in training, nearer ones counting more;
    or those of other services, by their places among the events of all.

    The similarity is the weight of `weigh_transitions`, both ways, with the decay and the gaps by which models take
    out what a training target's own user has given. An item without a training event has no neighbors.
    """
    counts = count_transitions(dataset, split_ids, TRANSITION_GAP, within_service)
    weight_II = weigh_transitions(counts, TRANSITION_DECAY)
    weight_II = scipy.sparse.coo_matrix(weight_II + weight_II.T)
    service, n_items = dataset.catalogue.service, dataset.catalogue.n_items
    is_within = service[weight_II.row] == service[weight_II.col]
    other = (weight_II.row != weight_II.col) & (is_within if within_service else ~is_within)
    pairs = (weight_II.row[other], weight_II.col[other], weight_II.data[other])
    return keep_best(*pairs, rank_ids(dataset.catalogue), n_items, n)
