"""Transitions, the item graph and its neighbors against loops over users."""

import collections
import dataclasses

import numpy as np
import pytest

from moerec.data.dataset import permute_items
from moerec.data.neighbors import (
    count_transitions,
    find_transition_neighbors,
    make_item_graph,
    weigh_transitions,
)
from moerec.data.splits import TEST, TRAIN
from tests.data.neighbors.small_items import name_neighbors
from tests.eval.small_logs import hold_out, make_world, train_sequences


def count_by_hand(dataset, split_ids, gap, within_service):
    found = collections.Counter()
    for sequence in train_sequences(dataset, split_ids, within_service).values():
        found.update(zip(sequence, sequence[gap:], strict=False))
    return found


@pytest.mark.parametrize("within_service", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_counts_equal_a_loop(within_service, seed):
    dataset = make_world(seed, sizes=(6, 0, 5))
    split_ids, _, _ = hold_out(dataset, within_service)
    counts = count_transitions(dataset, split_ids, 3, within_service)
    assert len(counts) == 3
    for gap, count_II in enumerate(counts, 1):
        expected = count_by_hand(dataset, split_ids, gap, within_service)
        assert expected
        coo = count_II.tocoo()
        assert dict(zip(zip(coo.row, coo.col, strict=True), coo.data, strict=True)) == expected


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_weights_and_graph_equal_dense_algebra(decay):
    dataset = make_world(2)
    split_ids, _, _ = hold_out(dataset)
    counts = count_transitions(dataset, split_ids, 3, within_service=False)
    weight_II = weigh_transitions(counts, decay)
    dense = sum(decay**k * count.toarray() for k, count in enumerate(counts))
    assert weight_II.dtype == np.float32
    np.testing.assert_allclose(weight_II.toarray(), dense, rtol=1e-6)
    graph_II = make_item_graph(weight_II)
    both = dense + dense.T
    np.fill_diagonal(both, 0)
    root = np.sqrt(np.maximum(both.sum(axis=0), 1))
    assert graph_II.dtype == np.float32
    np.testing.assert_allclose(graph_II.toarray(), both / root / root[:, None], rtol=1e-5)


@pytest.mark.parametrize(("n", "within_service"), [(1, True), (4, True), (20, True), (3, False), (20, False)])
def test_neighbors_equal_a_sort(n, within_service):
    dataset = make_world(3, sizes=(6, 0, 5))
    split_ids, _, _ = hold_out(dataset, per_service=True)
    found = find_transition_neighbors(dataset, split_ids, n, within_service)
    counts = [count_by_hand(dataset, split_ids, gap, within_service) for gap in range(1, 11)]
    ids, service, n_items = dataset.catalogue.ids, dataset.catalogue.service, dataset.catalogue.n_items

    def weigh(i: int, j: int) -> np.float32:
        """As floats of single precision are added, one way and then the other."""
        return sum(np.float32(sum(0.8**g * c[pair] for g, c in enumerate(counts))) for pair in ((i, j), (j, i)))

    some = 0
    for i in range(n_items):
        others = [j for j in range(n_items) if j != i and (service[j] == service[i]) == within_service]
        expected = sorted((-float(weigh(i, j)), ids[j], service[j], j) for j in others if weigh(i, j) > 0)[:n]
        missing = n - len(expected)
        assert found.item_IX[i].tolist() == [j for *_, j in expected] + [-1] * missing
        assert found.similarity_IX[i].tolist() == [-w for w, *_ in expected] + [0] * missing
        some += len(expected)
    assert some >= 10


@pytest.mark.parametrize("seed", range(4))
def test_the_numbering_of_items_changes_nothing(seed):
    dataset = make_world(4, n_users=200, sizes=(20, 15))
    split_ids, _, _ = hold_out(dataset, per_service=True)
    other, _ = permute_items(dataset, seed)
    expected, found = (
        name_neighbors(x.catalogue, find_transition_neighbors(x, split_ids, 5)) for x in (dataset, other)
    )
    assert found == expected


def test_only_training_events_are_looked_at():
    dataset = make_world(5)
    split_ids, _, _ = hold_out(dataset)
    item = dataset.log.item.copy()
    item[split_ids != TRAIN] = 0
    other = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, item=item))
    for one, changed in zip(*(find_transition_neighbors(x, split_ids, 4) for x in (dataset, other)), strict=True):
        np.testing.assert_array_equal(one, changed)
    nothing = find_transition_neighbors(dataset, np.full_like(split_ids, TEST), 4)
    assert np.all(nothing.item_IX == -1)
