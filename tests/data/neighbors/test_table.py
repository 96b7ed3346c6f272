"""Tables of neighbors: kept and read again, read against other catalogues, extended by new items."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest

from moerec.data.neighbors import (
    NEIGHBOR_FILES,
    ItemNames,
    Neighbors,
    NeighborTable,
    count_words,
    extend_text_neighbors,
    find_text_neighbors,
    load_neighbors,
    make_text_table,
    save_neighbors,
)
from moerec.errors import InputError
from tests.data.neighbors.small_items import make_items, name_neighbors, shuffle_items, take_items

FILE = NEIGHBOR_FILES["text"]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("has_counts", [False, True])
def test_what_is_kept_is_what_is_read(tmp_path, has_counts):
    table = make_text_table(make_items(sizes=(12, 0, 9, 1)), 3)
    table.names.ids[0] = "кот\0" * 100
    kept = table if has_counts else dataclasses.replace(table, counts=None)
    save_neighbors(tmp_path / FILE, kept)
    found = load_neighbors(tmp_path / FILE)
    assert found.names.services == table.names.services
    assert found.names.ids.tolist() == table.names.ids.tolist()
    np.testing.assert_array_equal(found.names.offsets, table.names.offsets)
    assert_same(found.neighbors, table.neighbors)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    if not has_counts:
        assert found.counts is None
        return
    assert found.counts[:2] == table.counts[:2]
    np.testing.assert_array_equal(found.counts.count_ZV.toarray(), table.counts.count_ZV.toarray())
    np.testing.assert_array_equal(found.counts.n_items_Z, table.counts.n_items_Z)


def test_a_table_without_items(tmp_path):
    save_neighbors(tmp_path / FILE, make_text_table(make_items(sizes=(1,), services=("a",)), 2))
    empty = take_items(make_items(), np.zeros(0, np.int64))
    save_neighbors(tmp_path / FILE, make_text_table(empty, 2))
    assert load_neighbors(tmp_path / FILE).neighbors.item_IX.shape == (0, 2)


def test_a_table_is_read_against_a_catalogue_with_more_items_and_fewer():
    """In another order of items and services."""
    everything = make_items(5, (15, 0, 10, 2))
    rng = np.random.default_rng(0)
    old = take_items(everything, np.flatnonzero(rng.random(27) < 0.7))
    order = shuffle_items(everything, 1)
    other = take_items(everything, order[rng.random(27) < 0.8])
    table = make_text_table(old, 30)
    expected, found = name_neighbors(old, table.neighbors), name_neighbors(other, table.align(other))
    assert set(found) - set(expected)
    assert set(expected) - set(found)
    for name, row in found.items():
        assert row == [near for near in expected.get(name, []) if near[:2] in found]
    assert_same(table.align(old), table.neighbors)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 4, 40])
def test_extended_equals_built_anew_with_the_words_counted_first(seed, n):
    """Twice extended; with new words and a new service; into another numbering."""
    everything = make_items(seed, (15, 3, 10, 5))
    everything.text[[2, 3, 20]] = "unheard thing", "thing", "unheard ball"
    stage = np.random.default_rng(seed).integers(0, 3, 33)
    stage[:2] = 0
    stage[28:] = 2  # the service `single` comes at the end
    order = shuffle_items(everything, seed + 1)
    first = take_items(everything, np.flatnonzero(stage == 0))
    second = take_items(everything, order[stage[order] <= 1])
    table = make_text_table(first, n)
    assert_same(table.neighbors, find_text_neighbors(first, n))
    once = extend_text_neighbors(table, first, second)
    assert_same(once.neighbors, find_text_neighbors(second, n, count_words(first)))
    twice = extend_text_neighbors(once, second, everything)
    assert_same(twice.neighbors, find_text_neighbors(everything, n, count_words(first)))
    assert_same(twice.names[1:], ItemNames.of(everything)[1:])


def test_new_items_become_neighbors_of_old_ones():
    new = make_items(0)
    new.text[5] = new.text[3] = "a text of its own"
    old = take_items(new, np.delete(np.arange(new.n_items), 5))
    found = extend_text_neighbors(make_text_table(old, 2), old, new).neighbors
    assert found.item_IX[3, 0] == 5
    assert found.item_IX[5, 0] == 3


def test_what_cannot_be_extended_is_refused():
    new = make_items(0)
    old = take_items(new, np.arange(1, new.n_items))
    table = make_text_table(old, 2)
    with pytest.raises(InputError, match="without counts of words"):
        extend_text_neighbors(dataclasses.replace(table, counts=None), old, new)
    with pytest.raises(InputError, match="of other items than the old catalogue"):
        extend_text_neighbors(table, new, new)
    with pytest.raises(InputError, match=f"item {old.ids[0]} of food is not in the new catalogue"):
        extend_text_neighbors(table, old, take_items(new, np.arange(2, new.n_items)))
    with pytest.raises(InputError, match="is not in the new catalogue"):
        extend_text_neighbors(table, old, take_items(new, np.zeros(0, np.int64)))
    text, brand = new.text.copy(), new.attributes.copy()
    text[4], brand[4] = "another", "brand=other"
    for field, values, told in (("text", text, "another text"), ("attributes", brand, "other attributes")):
        with pytest.raises(InputError, match=f"item {new.ids[4]} of food has {told}") as error:
            extend_text_neighbors(table, old, dataclasses.replace(new, **{field: values}))
        assert "\n" not in str(error.value)


def rewrite(path, **columns):
    """The same file with other columns; those that are None are left out."""
    with np.load(path) as stored:
        kept = {**{name: stored[name] for name in stored.files}, **columns}
    np.savez(path, **{name: column for name, column in kept.items() if column is not None})


@pytest.mark.parametrize(
    "damage",
    [
        {"ids_utf8": None},
        {"item_IX": None},
        {"format": np.int64(2)},
        {"offsets": np.array([0, 9, 5, 9, 22])},
        {"offsets": np.array([0, 22])},
        {"offsets": np.array([0.0, 12, 12, 21, 22])},
        {"item_IX": np.full((22, 3), 22, np.int32)},
        {"item_IX": np.zeros((22, 3), np.int64)},
        {"item_IX": np.zeros((22, 2), np.int32)},
        {"item_IX": np.zeros(22, np.int32)},
        {"similarity_IX": np.full((22, 3), np.nan, np.float32)},
        {"ids_edges": np.zeros(23, np.int64)},
        {"ids_edges": np.zeros(0, np.int64)},
        {"ids_utf8": np.full(40, 255, np.uint8)},
        {"count_indptr": np.array([0, 10**6, 1, 2, 3], np.int32)},
        {"count_indices": np.full(3, 10**6, np.int32)},
        {"n_items_Z": np.zeros(2, np.int64)},
        {"words_utf8": None},
    ],
    ids=str,
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage):
    save_neighbors(tmp_path / FILE, make_text_table(make_items(), 3))
    rewrite(tmp_path / FILE)
    load_neighbors(tmp_path / FILE)
    rewrite(tmp_path / FILE, **damage)
    with pytest.raises(InputError, match=rf"{NEIGHBOR_FILES['text']}: holds no neighbors \(") as error:
        load_neighbors(tmp_path / FILE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no archive", "cut", "pickle"])
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / FILE
    save_neighbors(path, make_text_table(make_items(), 3))
    if content == "cut":
        content = path.read_bytes()[:-30]
    elif content == "pickle":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive, archive.open("format.npy", "w") as file:
            np.lib.format.write_array(file, np.array([{}], object), allow_pickle=True)
        content = packed.getvalue()
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{NEIGHBOR_FILES['text']}: holds no neighbors \(") as error:
        load_neighbors(path)
    assert "\n" not in str(error.value)


def test_no_file_is_told(tmp_path):
    with pytest.raises(InputError, match=f"{NEIGHBOR_FILES['text']}: no such file"):
        load_neighbors(tmp_path / FILE)


def test_neighbors_of_a_table_by_hand():
    names = ItemNames(("a",), np.array([0, 2]), np.array(["x", "y"], object))
    near = Neighbors(np.array([[1], [-1]], np.int32), np.array([[0.5], [0]], np.float32))
    catalogue = take_items(make_items(sizes=(3,), services=("a",)), np.arange(3))
    catalogue.ids[:] = ["y", "z", "x"]
    found = NeighborTable(names, near).align(catalogue)
    assert found.item_IX.tolist() == [[-1], [-1], [0]]
    assert found.similarity_IX.tolist() == [[0], [0], [0.5]]
