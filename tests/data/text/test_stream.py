"""The stream of documents against loops: each token once an epoch, behind what stands before it in its own document."""

import dataclasses
import functools
import itertools
import json
from collections import Counter
from typing import Any

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.convert.logits import make_text_batch
from moerec.data.packing import Placement
from moerec.data.pipeline import StreamOptions
from moerec.data.text.corpus import Corpus
from moerec.data.text.stream import TextStream, TokenReader, pack_tokens
from moerec.errors import InputError
from moerec.tasks import LanguageModel
from moerec.tasks.base import render_targets
from moerec.types import Batch

RENDER = functools.partial(render_targets, [LanguageModel()])
OPTIONS = StreamOptions(n_rows=2, row_len=7, history_len=5, seed=0)  # of `first_event`, which is of events, the default
Window = tuple[int, int, int]  # document, first slot, slots


def make_corpus(lengths: list[int], held: tuple[int, ...] = (), seed: int = 0) -> Corpus:
    """Every token is another one, so that it names its document and its place there."""
    rng, no_tokenizer = np.random.default_rng(seed), Any
    ids = rng.permutation(np.arange(1, 1 + sum(lengths))).astype(np.int32)
    is_valid = np.isin(np.arange(len(lengths)), held)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(no_tokenizer, offsets, ids, np.array(lengths), is_valid)


def open_stream(corpus: Corpus, options: StreamOptions) -> TextStream:
    return TextStream(TokenReader(corpus), RENDER, options)


def documents_of(corpus: Corpus) -> list[list[int]]:
    return [corpus.ids[a:b].tolist() for a, b in itertools.pairwise(corpus.offsets.tolist())]


def decode(batch: Batch, corpus: Corpus) -> list[Window]:
    """The windows of a batch in their order, each slot with the next token of its own document as its target."""
    place = {token: (d, k) for d, document in enumerate(documents_of(corpus)) for k, token in enumerate(document)}
    documents, windows = documents_of(corpus), []
    label_BT, weight_BT = batch.targets["lm"]
    assert (label_BT.dtype, weight_BT.dtype) == (np.int32, np.float32)
    for b, segments in enumerate(np.asarray(batch.segment_BT).tolist()):
        numbers = [segment for segment in segments if segment]
        assert segments == sorted(numbers) + [0] * (len(segments) - len(numbers)), "a hole in a row"
        assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1))
        for number in sorted(set(numbers)):
            slots = [t for t, segment in enumerate(segments) if segment == number]
            d, start = place[int(batch.token_BT[b, slots[0]])]
            for k, t in enumerate(slots):
                assert batch.token_BT[b, t] == documents[d][start + k]
                assert label_BT[b, t] == documents[d][start + k + 1], "a target of another document"
                assert (batch.position_BT[b, t], weight_BT[b, t]) == (k, 1)
            windows.append((d, start, len(slots)))
        assert not np.any(weight_BT[b, len(numbers) :])
        assert not np.any(label_BT[b, len(numbers) :])
    return windows


def take_epochs(stream: grain.IterDataset, corpus: Corpus, n_slots: int, n_epochs: int) -> list[list[Window]]:
    """The windows of the first epochs; fails where an epoch ends inside a window."""
    windows = (window for batch in stream for window in decode(batch, corpus))
    epochs = []
    for _ in range(n_epochs):
        epoch: list[Window] = []
        while sum(length for _, _, length in epoch) < n_slots:
            epoch.append(next(windows))
        assert sum(length for _, _, length in epoch) == n_slots
        epochs.append(epoch)
    return epochs


def slots_of(windows: list[Window]) -> Counter:
    return Counter((d, first + k) for d, first, length in windows for k in range(length))


def all_slots(corpus: Corpus, documents) -> Counter:
    """Of each document a slot less than it has tokens: behind the last one comes nothing."""
    return Counter((d, k) for d in documents for k in range(len(documents_of(corpus)[d]) - 1))


def trained_on(corpus: Corpus) -> list[int]:
    return [d for d, is_held in enumerate(corpus.is_valid.tolist()) if not is_held]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(1, 3),
    st.integers(0, 10_000),
)
def test_every_token_but_the_first_of_a_document_is_a_target_once_an_epoch(documents, history_len, more, n_rows, seed):
    """And no document that is held out is there, nor one of a single token."""
    lengths, is_held = zip(*documents, strict=True)
    corpus = make_corpus(list(lengths), tuple(np.flatnonzero(is_held).tolist()), seed)
    options = StreamOptions(n_rows, history_len + more, history_len, seed)
    expected = all_slots(corpus, trained_on(corpus))
    if not expected:
        with pytest.raises(InputError, match=r"^config\.data\.corpus\.path: no document has two tokens"):
            open_stream(corpus, options)
        return
    for windows in take_epochs(open_stream(corpus, options), corpus, sum(expected.values()), 2):
        assert slots_of(windows) == expected
        assert all(length <= history_len for _, _, length in windows)
        for d in trained_on(corpus):
            if 2 <= lengths[d] <= history_len + 1:
                assert [w for w in windows if w[0] == d] == [(d, 0, lengths[d] - 1)], "a short one is cut"


def test_a_long_document_is_cut_elsewhere_in_each_epoch():
    corpus = make_corpus([43, 3, 17])
    epochs = take_epochs(open_stream(corpus, OPTIONS), corpus, 42 + 2 + 16, 30)
    for d in (0, 2):
        heads = [next(length for x, first, length in epoch if (x, first) == (d, 0)) for epoch in epochs]
        assert set(heads) == {1, 2, 3, 4, 5}
    orders = [[d for d, _, _ in epoch] for epoch in epochs]
    assert len(set(map(tuple, orders))) > 20, "documents come in the same order"
    assert any(a != b for a, b in zip(orders[0], sorted(orders[0]), strict=True)), "a long one's windows lie together"


def test_batches_are_those_that_a_model_is_asked_with():
    """The whole of them, padding and columns of events, too."""
    corpus = make_corpus([9, 2, 30, 4])
    for batch in itertools.islice(open_stream(corpus, OPTIONS), 12):
        expected = make_text_batch(batch.token_BT, batch.segment_BT)
        assert_same_batch(batch._replace(targets={}), expected)


def assert_same_batch(a: Batch, b: Batch) -> None:
    (named, structure), (others, other_structure) = (jax.tree_util.tree_flatten_with_path(x) for x in (a, b))
    assert structure == other_structure
    for (path, x), (_, y) in zip(named, others, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
        assert np.asarray(x).dtype == np.asarray(y).dtype, jax.tree_util.keystr(path)


@pytest.mark.parametrize("n_seen", [0, 1, 3, 11])
def test_a_stream_goes_on_from_its_position_to_the_bit(n_seen):
    corpus = make_corpus([9, 2, 30, 4, 1, 6], held=(3,))
    stream = iter(open_stream(corpus, OPTIONS))
    for _ in range(n_seen):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(9)]
    other = iter(open_stream(corpus, OPTIONS))
    next(other)
    other.set_state(state)
    for batch in expected:
        assert_same_batch(batch, next(other))


def test_seeds_give_other_streams_and_the_same_seed_the_same():
    corpus = make_corpus([9, 2, 30, 4])
    first, again, other = (
        list(itertools.islice(open_stream(corpus, dataclasses.replace(OPTIONS, seed=seed)), 5)) for seed in (3, 3, 4)
    )
    for a, b in zip(first, again, strict=True):
        assert_same_batch(a, b)
    assert any(np.any(a.token_BT != b.token_BT) for a, b in zip(first, other, strict=True))


def test_processes_share_the_documents():
    corpus = make_corpus([5, 21, 3, 8, 2, 13, 1, 9], held=(1, 4))
    seen = []
    for process in range(2):
        own = trained_on(corpus)[process::2]
        options = dataclasses.replace(OPTIONS, process_index=process, process_count=2)
        expected = all_slots(corpus, own)
        (windows,) = take_epochs(open_stream(corpus, options), corpus, sum(expected.values()), 1)
        assert slots_of(windows) == expected
        seen.append({d for d, _, _ in windows})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == {0, 2, 3, 5, 7}  # all but the held-out ones, and the one of a single token


def test_readers_of_the_two_sides_have_all_documents_between_them():
    corpus = make_corpus([5, 2, 1, 8], held=(1, 3))
    documents = documents_of(corpus)
    for valid, own in ((False, [0, 2]), (True, [1, 3])):
        reader = TokenReader(corpus, valid)
        found = [reader.ids[a : a + n].tolist() for a, n in zip(reader.start, reader.lengths, strict=True)]
        assert found == [documents[d] for d in own]


def test_windows_are_laid_where_they_are_placed():
    ids = np.array([10, 11, 12, 13, 14, 15], np.int32)
    placed = Placement(2, np.array([4, 1]), np.array([1, 1], np.int32))
    packed = pack_tokens(ids, np.array([3, 0]), np.array([2, 1]), placed, (2, 4))
    assert packed.batch.token_BT.tolist() == [[0, 10, 0, 0], [13, 14, 0, 0]]
    assert packed.next_token_BT is not None
    assert packed.next_token_BT.tolist() == [[-1, 11, -1, -1], [14, 15, -1, -1]]
    assert packed.next_item_BT.tolist() == [[-1] * 4] * 2
