"""The stream of documents against loops: each token once an epoch, behind what stands before it in its own document."""

import dataclasses
import functools
import itertools
import json
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.convert.logits import make_text_batch
from moerec.data.packing import Placement
from moerec.data.pipeline.events import StreamOptions
from moerec.data.text.corpus import Corpus
from moerec.data.text.stream import Pieces, TextStream, TokenReader, pack_tokens
from moerec.data.text.token_shards import MemoryTokens
from moerec.errors import InputError
from moerec.tasks import LanguageModel
from moerec.tasks.base import render_targets
from moerec.types import Batch

RENDER = functools.partial(render_targets, [LanguageModel()])
OPTIONS = StreamOptions(n_rows=2, row_len=7, history_len=5, seed=0)
END = 0  # in these tests the end before a document; its own last token is another one, so that it names its document
Piece = tuple[int, int, int]  # document, its first slot that is there, slots


def make_corpus(
    lengths: list[int],
    held: tuple[int, ...] = (),
    source: list[int] | None = None,
    weights: tuple[float, ...] = (),
    seed: int = 0,
) -> Corpus:
    """Every token is another one, so that it names its document and its place there."""
    rng, no_tokenizer = np.random.default_rng(seed), Any
    ids = rng.permutation(np.arange(1, 1 + sum(lengths))).astype("<u2")
    is_valid = np.isin(np.arange(len(lengths)), held)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    of = np.zeros(len(lengths), np.int32) if source is None else np.array(source, np.int32)
    names = tuple(f"corpus {k}" for k in range(int(of.max()) + 1))
    return Corpus(
        no_tokenizer, offsets, MemoryTokens(ids), np.array(lengths), is_valid, END, names, of, weights
    )  # fmt: skip


def open_stream(corpus: Corpus, options: StreamOptions = OPTIONS) -> TextStream:
    return TextStream(corpus, RENDER, options)


def documents_of(corpus: Corpus) -> list[list[int]]:
    ids = corpus.tokens.read(np.zeros(1, np.int64), corpus.offsets[-1:]).tolist()
    return [ids[a:b] for a, b in itertools.pairwise(corpus.offsets.tolist())]


def decode_rows(batch: Batch, corpus: Corpus) -> list[list[Piece]]:
    """The pieces of each row; every slot holds the token before its target, of the same document, or the end."""
    documents = documents_of(corpus)
    place = {token: (d, k) for d, document in enumerate(documents) for k, token in enumerate(document)}
    label_BT, weight_BT = batch.targets["lm"]
    assert (label_BT.dtype, weight_BT.dtype) == (np.int32, np.float32)
    assert np.all(weight_BT == 1), "a row that is not full"
    rows = []
    for b, segments in enumerate(np.asarray(batch.segment_BT).tolist()):
        assert segments == sorted(segments)
        assert set(segments) == set(range(1, segments[-1] + 1))
        pieces = []
        for number in range(1, segments[-1] + 1):
            slots = [t for t, segment in enumerate(segments) if segment == number]
            d, start = place[int(label_BT[b, slots[0]])]
            for k, t in enumerate(slots):
                assert label_BT[b, t] == documents[d][start + k], "a target of another document"
                assert batch.token_BT[b, t] == ([END, *documents[d]])[start + k]
                assert batch.position_BT[b, t] == k
            pieces.append((d, start, len(slots)))
        rows.append(pieces)
    return rows


def take_rows(stream: TextStream, corpus: Corpus, n_rows: int) -> list[list[Piece]]:
    rows = (row for batch in stream for row in decode_rows(batch, corpus))
    return list(itertools.islice(rows, n_rows))


def count_targets(rows: list[list[Piece]]) -> Counter:
    return Counter((d, first + k) for row in rows for d, first, length in row for k in range(length))


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
def test_every_token_is_a_target_once_an_epoch(documents, history_len, more, n_rows, seed):
    """Also the first one and the end; rows are full, and what is held out is not there."""
    lengths, is_held = zip(*documents, strict=True)
    corpus = make_corpus(list(lengths), tuple(np.flatnonzero(is_held).tolist()), seed=seed)
    options = StreamOptions(n_rows, history_len + more, history_len, seed)
    if all(is_held):
        with pytest.raises(InputError, match=r"^config\.data\.corpus: a corpus has no document to train on"):
            open_stream(corpus, options)
        return
    own = trained_on(corpus)
    n = sum(lengths[d] for d in own)
    # As many epochs as rows have slots end with a row.
    rows = take_rows(open_stream(corpus, options), corpus, n)
    assert count_targets(rows) == {(d, k): options.row_len for d in own for k in range(lengths[d])}
    assert all(length <= history_len for row in rows for _, _, length in row)


@pytest.mark.parametrize("n_epochs", [1, 2, 3])
def test_the_rows_of_an_epoch_have_each_token_once_but_where_the_last_one_goes_on_into_the_next(n_epochs):
    corpus = make_corpus([43, 3, 17, 8])
    n_rows = -(-71 * n_epochs // 7)
    counts = count_targets(take_rows(open_stream(corpus), corpus, n_rows))
    assert set(counts.values()) <= {n_epochs, n_epochs + 1}
    assert list(counts.values()).count(n_epochs + 1) == 7 * n_rows - 71 * n_epochs < 7
    assert len(counts) == 71


def test_a_short_document_is_whole_unless_a_row_ends_in_it_and_a_long_one_goes_on_where_it_was_cut():
    corpus = make_corpus([30, 3, 2, 4, 3])
    rows = take_rows(open_stream(corpus, dataclasses.replace(OPTIONS, row_len=10, history_len=6)), corpus, 42)
    for row in rows:
        for place, (d, first, length) in enumerate(row):
            is_cut_by_row = place in (0, len(row) - 1)
            assert is_cut_by_row or length in (6, 30 % 6, corpus.length[d]) or d == 0
            if place and row[place - 1][0] == d and first:
                assert first == row[place - 1][1] + row[place - 1][2]
                assert row[place - 1][2] == 6, "cut before it was as long as it may be"


def test_epochs_differ_in_order_and_in_cuts():
    corpus = make_corpus([43, 3, 18])
    rows = take_rows(open_stream(corpus), corpus, 64)  # seven epochs
    heads = {row[0][:2] for row in rows}
    assert len(heads) > 30, "rows begin at the same places"
    followers = [[b[0] - a[0] for a, b in itertools.pairwise(row)] for row in rows]
    assert len({tuple(x) for x in followers}) > 3, "documents come in the same order"
    firsts = [row[0][1] for row in rows[:9] if row[0][0] == 0]
    assert firsts != sorted(firsts), "the pieces of a long one come one after another"


def test_batches_are_those_that_a_model_is_asked_with():
    """The whole of them, columns of events, too."""
    corpus = make_corpus([9, 2, 30, 4])
    for batch in itertools.islice(open_stream(corpus), 12):
        expected = make_text_batch(batch.token_BT, batch.segment_BT)
        assert_same_batch(batch._replace(targets={}), expected)


def assert_same_batch(a: Batch, b: Batch) -> None:
    (named, structure), (others, other_structure) = (jax.tree_util.tree_flatten_with_path(x) for x in (a, b))
    assert structure == other_structure
    for (path, x), (_, y) in zip(named, others, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
        assert np.asarray(x).dtype == np.asarray(y).dtype, jax.tree_util.keystr(path)


MIXED = ([9, 2, 30, 4, 1, 6, 12, 5], (3,), [0, 0, 0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("weights", [(), (3.0, 1.0, 2.0)])
@pytest.mark.parametrize("n_seen", [0, 1, 3, 37])
def test_a_stream_goes_on_from_its_position_to_the_bit(n_seen, weights):
    corpus = make_corpus(*MIXED, weights)
    stream = iter(open_stream(corpus))
    for _ in range(n_seen):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(9)]
    other = iter(open_stream(corpus))
    next(other)
    other.set_state(state)
    for batch in expected:
        assert_same_batch(batch, next(other))


@pytest.mark.parametrize("state", [{}, {"rows": [1]}, {"rows": [1, 2, -1]}, {"rows": "many"}, {"epoch": 0}])
def test_the_position_of_another_stream_is_refused(state):
    with pytest.raises((LookupError, TypeError, ValueError)):
        iter(open_stream(make_corpus(*MIXED))).set_state(state)


@pytest.mark.parametrize("weights", [(), (3.0, 1.0, 2.0), (1.0, 0.0, 0.3), (1e-3, 1.0, 1.0)])
def test_shares_hold_over_tokens_at_every_time(weights):
    """To within two rows of each corpus, whatever the sizes of the corpora; by default these are the shares."""
    corpus = make_corpus(*MIXED, weights)
    share_K = np.array(weights or (9 + 2 + 30, 1 + 6, 12 + 5), float)
    share_K /= share_K.sum()
    seen_K = np.zeros(3)
    for row in take_rows(open_stream(corpus), corpus, 300):
        (k,) = {int(corpus.source[d]) for d, _, _ in row}
        seen_K[k] += sum(length for _, _, length in row)
        assert np.all(np.abs(seen_K - share_K * seen_K.sum()) <= 2 * OPTIONS.row_len)


def test_seeds_give_other_streams_and_the_same_seed_the_same():
    corpus = make_corpus([9, 2, 30, 4])
    first, again, other = (
        list(itertools.islice(open_stream(corpus, dataclasses.replace(OPTIONS, seed=seed)), 5)) for seed in (3, 3, 4)
    )
    for a, b in zip(first, again, strict=True):
        assert_same_batch(a, b)
    assert any(np.any(a.token_BT != b.token_BT) for a, b in zip(first, other, strict=True))


def test_processes_share_the_rows_of_each_batch():
    corpus = make_corpus(*MIXED)
    whole = iter(open_stream(corpus, dataclasses.replace(OPTIONS, n_rows=6)))
    parts = [
        iter(open_stream(corpus, dataclasses.replace(OPTIONS, process_index=process, process_count=3)))
        for process in range(3)
    ]
    for _ in range(8):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(next(part) for part in parts))
        assert_same_batch(joined, next(whole))


def test_readers_of_the_two_sides_have_all_documents_between_them():
    corpus = make_corpus([5, 2, 1, 8], held=(1, 3), source=[0, 0, 1, 1])
    documents = documents_of(corpus)
    for valid, source, own in ((False, None, [0, 2]), (True, None, [1, 3]), (False, 1, [2]), (True, 0, [1])):
        reader = TokenReader(corpus, valid, source)
        assert reader.lengths.tolist() == [len(documents[d]) for d in own]
        found = reader.tokens.read(reader.start, reader.lengths).tolist()
        assert found == [token for d in own for token in documents[d]]


def test_pieces_are_laid_where_they_are_placed():
    tokens = MemoryTokens(np.array([10, 11, 12, 13, 14, 15], np.uint16))
    placed = Placement(2, np.array([4, 1]), np.array([1, 1], np.int32))
    pieces = Pieces(np.array([3, 0]), np.array([2, 1]), np.array([False, True]))
    packed = pack_tokens(tokens, 7, pieces, placed, (2, 4))
    assert packed.batch.token_BT.tolist() == [[0, 7, 0, 0], [12, 13, 0, 0]]
    assert packed.next_token_BT is not None
    assert packed.next_token_BT.tolist() == [[-1, 10, -1, -1], [13, 14, -1, -1]]
    assert packed.next_item_BT.tolist() == [[-1] * 4] * 2
