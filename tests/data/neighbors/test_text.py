"""Vectors of texts and nearest items against loops over dictionaries."""

import collections
import math
import re

import numpy as np
import pytest

from moerec.data.dataset import ItemTable
from moerec.data.neighbors import best, count_words, find_text_neighbors, make_text_vectors
from tests.data.neighbors.small_items import make_items, name_neighbors, shuffle_items, take_items


def weigh_by_hand(catalogue, counted=None):
    """One dictionary word -> weight an item."""
    bags = [
        re.findall(r"\w+", str(t).lower()) + str(a).split()
        for t, a in zip(catalogue.text, catalogue.attributes, strict=True)
    ]
    counted = catalogue if counted is None else counted
    found = []
    for i, bag in enumerate(bags):
        name = catalogue.services[catalogue.service[i]]
        others = []
        if name in counted.services:
            lo, hi = counted.offsets[counted.services.index(name) :][:2]
            others = [
                {*re.findall(r"\w+", str(counted.text[j]).lower()), *str(counted.attributes[j]).split()}
                for j in range(lo, hi)
            ]
        row = {
            word: n * (math.log((1 + len(others)) / (1 + sum(word in other for other in others))) + 1)
            for word, n in collections.Counter(bag).items()
        }
        length = math.sqrt(sum(x * x for x in row.values()))
        found.append({word: x / length for word, x in row.items()})
    return found


def find_by_hand(catalogue, n, counted=None):
    rows, of = weigh_by_hand(catalogue, counted), catalogue.service
    found = []
    for i, row in enumerate(rows):
        near = []
        for j, other in enumerate(rows):
            similarity = sum(x * other.get(word, 0) for word, x in row.items())
            if i != j and of[i] == of[j] and similarity > 0:
                near.append((-round(similarity, 5), catalogue.ids[j], j, similarity))
        found.append([(j, s) for _, _, j, s in sorted(near)[:n]])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_vectors_equal_dictionaries(seed):
    catalogue = make_items(seed)
    vector_IV = make_text_vectors(catalogue)
    assert vector_IV.dtype == np.float32
    words = count_words(catalogue).words
    assert list(words) == sorted(words)
    for i, row in enumerate(weigh_by_hand(catalogue)):
        found = {words[v]: x for v, x in enumerate(vector_IV[i].toarray().ravel().tolist()) if x}
        assert found == pytest.approx(row, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_vectors_by_other_counts_equal_dictionaries(seed):
    """Some words, and a service, are not in the catalogue that was counted."""
    catalogue, counted = make_items(seed), make_items(seed + 10, (3, 2), ("toys", "food"))
    vector_IV = make_text_vectors(catalogue, count_words(counted))
    words = count_words(catalogue).words
    for i, row in enumerate(weigh_by_hand(catalogue, counted)):
        found = {words[v]: x for v, x in enumerate(vector_IV[i].toarray().ravel().tolist()) if x}
        assert found == pytest.approx(row, rel=1e-5)


@pytest.mark.parametrize("most", [1, 40, 1 << 22])
@pytest.mark.parametrize("n", [1, 3, 30])
def test_neighbors_equal_a_loop(monkeypatch, most, n):
    monkeypatch.setattr(best, "MOST_PRODUCTS", most)
    catalogue = make_items(1)
    found = find_text_neighbors(catalogue, n)
    assert (found.item_IX.dtype, found.similarity_IX.dtype) == (np.int32, np.float32)
    expected = find_by_hand(catalogue, n)
    for i, row in enumerate(expected):
        items = [j for j, _ in row]
        assert found.item_IX[i].tolist() == items + [-1] * (n - len(row))
        assert found.similarity_IX[i].tolist() == pytest.approx([s for _, s in row] + [0.0] * (n - len(row)), rel=1e-5)


def test_an_item_is_not_its_own_neighbor_and_services_are_apart():
    catalogue = make_items(2)
    found = find_text_neighbors(catalogue, 20).item_IX
    row, place = np.nonzero(found >= 0)
    assert np.all(found[row, place] != row)
    np.testing.assert_array_equal(catalogue.service[found[row, place]], catalogue.service[row])
    assert np.all(found[catalogue.offsets[3]] == -1)  # it is alone in its service


@pytest.mark.parametrize("seed", range(5))
def test_the_numbering_of_items_changes_nothing(seed):
    """To the bit; the order of the services may change, too."""
    catalogue = make_items(3, sizes=(40, 0, 30, 1))
    expected = name_neighbors(catalogue, find_text_neighbors(catalogue, 5))
    other = take_items(catalogue, shuffle_items(catalogue, seed))
    assert name_neighbors(other, find_text_neighbors(other, 5)) == expected


def test_level_items_stand_by_their_ids():
    ids = np.array(["9", "10", "b", "a", "B"], object)
    text, blank = np.array(["same words"] * 5, object), np.array([""] * 5, object)
    catalogue = ItemTable(("one",), np.array([0, 5]), ids, text, blank)
    found = find_text_neighbors(catalogue, 3).item_IX
    assert [[ids[j] for j in row] for row in found] == [
        ["10", "B", "a"],
        ["9", "B", "a"],
        ["10", "9", "B"],
        ["10", "9", "B"],
        ["10", "9", "a"],
    ]


@pytest.mark.parametrize("sizes", [(0, 0), (3, 0), (0, 2)])
def test_catalogues_without_words_or_items(sizes):
    n = sum(sizes)
    blank = np.array([""] * n, object)
    names = np.array([str(i) for i in range(n)], object)
    catalogue = ItemTable(("a", "b"), np.array([0, sizes[0], n]), names, blank, blank)
    assert make_text_vectors(catalogue).shape == (n, 0)
    found = find_text_neighbors(catalogue, 4)
    assert found.item_IX.shape == (n, 4)
    assert np.all(found.item_IX == -1)
    assert not np.any(found.similarity_IX)
