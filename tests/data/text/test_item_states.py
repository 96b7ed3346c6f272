"""The store of items' states: its parts, whose texts and model they are of, and what reads them."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moerec.data.dataset import Dataset, permute_items
from moerec.data.load import RunData, with_item_states
from moerec.data.text import item_states as module
from moerec.data.text.item_states import (
    FOLDER,
    META,
    StateStore,
    digest_texts,
    open_store,
    order_as_source,
    standardise,
)
from moerec.data.text.item_tokens import ItemVocabulary
from moerec.errors import InputError
from moerec.files import write_json
from tests.random_dataset import make_dataset

X = 5


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """The 13 items of the data set are in four parts."""
    monkeypatch.setattr(module, "PART", 4)


def make_data(seed: int | None, change: dict[int, str] | None = None) -> RunData:
    """Data whose items are numbered anew by a seed; texts that are replaced, by the number in the source."""
    source = make_dataset([3, 4])
    text = source.catalogue.text.astype(object)
    for item, other in (change or {}).items():
        text[item] = other
    source = dataclasses.replace(source, catalogue=dataclasses.replace(source.catalogue, text=text))
    dataset, item_number = source, np.arange(13, dtype=np.int32)
    if seed is not None:
        dataset, item_number = permute_items(source, seed)
    tokens = ItemVocabulary("words", 1).encode_items([""] * 13)
    return RunData(dataset, np.zeros(dataset.log.n_events, np.int8), tokens, None, None, item_number)


def open_for(folder: Path, model: str | None = "a model", seed: int | None = 0, **data) -> StateStore:
    found = make_data(seed, **data)
    return open_store(folder, found.dataset.catalogue, found.item_number, model)


def draw_states(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((13, X)).astype(np.float32)


def fill(store: StateStore, state: np.ndarray) -> None:
    for part in store.list_missing():
        store.write(part, state[store.span(part)])


def test_parts_hold_all_items_and_only_missing_ones_are_asked_for(tmp_path):
    store, state = open_for(tmp_path), draw_states()
    assert store.list_missing() == [0, 1, 2, 3]
    assert [x for part in range(4) for x in range(13)[store.span(part)]] == list(range(13))
    store.write(2, state[8:12].astype(np.float64))
    assert open_for(tmp_path).list_missing() == [0, 1, 3]
    fill(store, state)
    np.testing.assert_array_equal(open_for(tmp_path).read(), state)
    assert store.read().dtype == np.float32
    (tmp_path / FOLDER / "part-00001.npy").unlink()
    assert open_for(tmp_path).list_missing() == [1]
    with pytest.raises(
        InputError,
        match=r"^\S*part-00001\.npy: states of items cannot be read \(FileNotFoundError.*\); where there is no file,",
    ):
        store.read()


def test_a_store_is_the_same_however_items_are_numbered(tmp_path):
    fill(open_for(tmp_path, seed=0), draw_states())
    for seed in (None, 1, 2):
        assert open_for(tmp_path, seed=seed).list_missing() == []
        assert open_for(tmp_path, model=None, seed=seed).list_missing() == []


@pytest.mark.parametrize(
    "other",
    [{"model": "another"}, {"change": {12: "another"}}, {"change": {0: "item 1 of a kind 1", 1: "item 0 of a kind 0"}}],
)
def test_other_texts_or_another_model_empty_the_store(tmp_path, other):
    fill(open_for(tmp_path), draw_states())
    store = open_for(tmp_path, **other)
    assert store.list_missing() == [0, 1, 2, 3]
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [META]
    fill(store, draw_states(1))
    assert open_for(tmp_path, **other).list_missing() == []
    assert open_for(tmp_path).list_missing() == [0, 1, 2, 3], "the way back is no shorter"


def test_who_only_reads_changes_nothing_and_refuses_other_texts(tmp_path):
    told = r"item_states: holds no states of these items' texts; training computes them$"
    with pytest.raises(InputError, match=told):
        open_for(tmp_path, model=None)
    assert not list(tmp_path.iterdir())
    fill(open_for(tmp_path), draw_states())
    with pytest.raises(InputError, match=told):
        open_for(tmp_path, model=None, change={3: ""})
    np.testing.assert_array_equal(open_for(tmp_path, model=None).read(), draw_states())


def as_bytes(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, states=np.zeros((4, X), np.float32))
    return file.getvalue()


GOOD = np.ones((4, X), np.float32)
HUGE = as_bytes(GOOD).replace(b"(4, 5)", b"(9999999999, 99999)").replace(b" " * 15 + b"\n", b"\n")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        as_bytes(GOOD)[:-3],
        as_bytes(GOOD)[:40],
        as_bytes(GOOD[:3]),
        as_bytes(GOOD[:, :4]),
        as_bytes(GOOD.astype(np.float64)),
        as_bytes(GOOD[..., None]),
        as_bytes(np.where(np.eye(4, X), np.nan, GOOD).astype(np.float32)),
        as_bytes(np.full((4, X), {}, object), allow_pickle=True),
        zipped(),
        zipped()[:60],
        HUGE,
    ],
    ids=lambda content: content[:4].hex() + f" {len(content)}",
)
def test_a_damaged_part_is_refused_by_name(tmp_path, content):
    store = open_for(tmp_path)
    fill(store, draw_states())
    (tmp_path / FOLDER / "part-00001.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"^\S*part-00001\.npy: ") as error:
        store.read()
    assert "\n" not in str(error.value)


def test_a_part_with_a_wrong_byte_is_refused_by_name_or_read_as_an_array(tmp_path):
    """Wherever in its header it is."""
    store, rng, n_refused = StateStore(tmp_path / FOLDER, 4), np.random.default_rng(0), 0
    store.folder.mkdir()
    for place in range(128):
        content = bytearray(as_bytes(GOOD))
        content[place] = (content[place] + rng.integers(1, 256)) % 256
        (store.folder / "part-00000.npy").write_bytes(content)
        try:
            assert store.read().shape == (4, X)
        except InputError as error:
            n_refused += 1
            refused = str(error)
            assert "part-00000.npy" in refused
            assert "\n" not in refused
    assert n_refused > 30


def test_a_damaged_description_is_refused_by_name(tmp_path):
    fill(open_for(tmp_path), draw_states())
    (tmp_path / FOLDER / META).write_text("{")
    for model in ("a model", None):
        with pytest.raises(InputError, match=r"item_states/meta\.json"):
            open_for(tmp_path, model=model)


def test_what_is_kept_tells_the_texts_in_the_order_of_the_source(tmp_path):
    open_for(tmp_path, seed=3)
    known = json.loads((tmp_path / FOLDER / META).read_text())
    texts = make_dataset([3, 4]).catalogue.text
    assert known == {"texts": digest_texts(texts), "model": "a model"}
    assert digest_texts(np.array(["a", "bc"])) != digest_texts(np.array(["ab", "c"]))
    data = make_data(3)
    np.testing.assert_array_equal(order_as_source(data.dataset.catalogue.text, data.item_number), texts)


def by_name(dataset: Dataset, values: np.ndarray) -> dict[str, list[float]]:
    return {str(name): row.tolist() for name, row in zip(dataset.catalogue.ids, values, strict=True)}


def test_states_go_to_their_items_whatever_the_numbers_are():
    state, plain, other = draw_states(), make_data(None), make_data(7)
    assert np.any(other.item_number != plain.item_number)
    found = [with_item_states(data, state, Path("nowhere")) for data in (plain, other)]
    named = [by_name(data.dataset, data.catalog.state_IX) for data in found]
    assert named[0] == named[1] == by_name(plain.dataset, standardise(state))


def test_a_run_keeps_to_its_states(tmp_path):
    data, state = make_data(7), draw_states()
    found = with_item_states(data, state, tmp_path)
    assert found.digest == data.digest
    assert found.items_digest == data.items_digest
    write_json(tmp_path / "data.json", found.digests)
    assert with_item_states(data, state, tmp_path).digests == found.digests
    state[4, 2] += 0.1
    with pytest.raises(InputError, match=r"this directory holds a run on other states of items \(data\.item_states\)"):
        with_item_states(data, state, tmp_path)
    write_json(tmp_path / "data.json", data.digests)
    with_item_states(data, state, tmp_path)


@given(
    arrays.arrays(np.float32, (9, 3), elements=st.floats(-1000, 1000, width=16)),
    st.sets(st.integers(0, 8), max_size=9),
    st.floats(-100, 100, width=16),
)
def test_columns_have_mean_zero_and_deviation_one_over_the_items_with_a_text(state, empty, offset):
    state = (state + np.float32(offset)).astype(np.float32)
    state[sorted(empty)] = 0
    has_text = [k for k in range(9) if any(state[k])]
    found = standardise(state)
    assert found.dtype == np.float32
    for k in range(9):
        assert k in has_text or not any(found[k])
    for x in range(3):
        column = [float(state[k, x]) for k in has_text]
        mean = sum(column) / max(len(column), 1)
        deviation = (sum((value - mean) ** 2 for value in column) / max(len(column), 1)) ** 0.5
        if deviation > 1e-3:
            expected = [(value - mean) / deviation for value in column]
            np.testing.assert_allclose(found[has_text, x], expected, rtol=1e-4, atol=1e-5)
        else:
            # A column that says nothing, or little: no value is further off than any can be from a mean of so many.
            assert not np.any(np.abs(found[:, x]) > len(has_text) ** 0.5 + 1e-3)
