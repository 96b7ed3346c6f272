"""The training stream of documents: full rows, corpora mixed by their shares, and a position that can be saved.

Of each corpus the documents of an epoch stand one behind another in a seeded order, epoch behind epoch without end, and
this endless line of slots is cut into rows. So each row is full, and each token is a target once an epoch. A document
that goes on in another row, or is longer than `data.history_len`, is another segment there, at position 0: its first
slot repeats the token that the piece before it has predicted last, and predicts the next one. The rows that begin in
an epoch are read in a seeded order of their own, so that the pieces of a book do not come together.

Which corpus the next row is of follows from how many rows each one has given so far: the one that is furthest behind
its share. So shares hold over tokens at every time, to within a row or so; and the position in the stream is one number
a corpus, from which everything else is computed.
"""

import functools
import itertools
from typing import Any, NamedTuple

import grain
import numpy as np

from moerec.data.packing import Packed, Placement, assemble_words
from moerec.data.pipeline.events import Render, StreamOptions
from moerec.data.text.corpus import Corpus
from moerec.data.text.token_shards import TokenArray
from moerec.errors import InputError
from moerec.types import Batch


class TokenReader:
    """The documents that are trained on, or those that are held out.

    Attributes:
      start, lengths: `[n]`, where each document begins in `tokens`, and its tokens with its end: as many are predicted.
      tokens: of all documents. end: the token that stands before a document's first one.
    """

    def __init__(self, corpus: Corpus, valid: bool = False, source: int | None = None):
        """Args: the number of a corpus, where the documents are of one alone."""
        is_chosen = corpus.is_valid == valid
        chosen = np.flatnonzero(is_chosen if source is None else is_chosen & (corpus.source == source))
        self.start, self.lengths, self.tokens = corpus.offsets[:-1][chosen], corpus.length[chosen], corpus.tokens
        self.end = corpus.end


class Pieces(NamedTuple):
    """Pieces of documents, each a segment of a row; `[n]` arrays.

    Attributes:
      first: position, among all tokens, of the first one that the piece predicts.
      length: slots, of which each predicts a token.
      is_head: bool, whether this is a document's beginning, with `end` in its first slot.
    """

    first: np.ndarray
    length: np.ndarray
    is_head: np.ndarray

    def split(self, most: int) -> "Pieces":
        """Pieces of at most so many slots."""
        n = -(-self.length // most)
        owner = np.repeat(np.arange(len(n)), n)
        skipped = (np.arange(len(owner)) - np.repeat(np.cumsum(n) - n, n)) * most
        length = np.minimum(self.length[owner] - skipped, most)
        return Pieces(self.first[owner] + skipped, length, self.is_head[owner] & (skipped == 0))


def pack_tokens(tokens: TokenArray, end: int, pieces: Pieces, placed: Placement, shape: tuple[int, int]) -> Packed:
    """Lays pieces of documents into rows. A slot holds the token before the one that it predicts, `end` at a beginning.

    Args: as many pieces as are placed; rows and slots of a row.
    """
    # Read with the token before the first predicted one, where that is of the same document.
    before = (~pieces.is_head).astype(np.int64)
    n_read = pieces.length + before
    ids = tokens.read(pieces.first - before, n_read)
    owner = np.repeat(np.arange(len(n_read)), pieces.length)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(pieces.length) - pieces.length, pieces.length)
    following = (np.cumsum(n_read) - n_read + before)[owner] + position
    is_first = pieces.is_head[owner] & (position == 0)
    token = np.where(is_first, end, ids[np.where(is_first, 0, following - 1)])
    slot = placed.start[owner] + position

    def lay(values: np.ndarray, empty: int = 0) -> np.ndarray:
        out = np.full(shape[0] * shape[1], empty, np.int32)
        out[slot] = values
        return out.reshape(shape)

    batch = assemble_words(lay(token), lay(position), lay(placed.segment[owner]))
    return Packed(batch, np.full(shape, -1, np.int32), lay(ids[following], -1))


class _EndlessRows:
    """The rows of one corpus, each known by its number in the order of reading."""

    def __init__(self, reader: TokenReader, row_len: int, seed: tuple[int, ...]):
        self._reader, self._row_len, self._seed = reader, row_len, seed
        self.n_slots = int(reader.lengths.sum())
        self._order = functools.lru_cache(maxsize=4)(self._order_documents)
        self._row_order = functools.lru_cache(maxsize=2)(self._order_rows)

    def locate(self, number: int) -> Pieces:
        """The pieces of a row, which fill it."""
        epoch = number * self._row_len // self.n_slots
        first_row = -(-epoch * self.n_slots // self._row_len)
        row = first_row + int(self._row_order(epoch)[number - first_row])
        slot, left, parts = row * self._row_len, self._row_len, []
        while left:  # over epochs: of a corpus of less than a row there are several in a row
            epoch, place = divmod(slot, self.n_slots)
            part = self._locate(epoch, place, min(left, self.n_slots - place))
            n = int(part.length.sum())
            slot, left = slot + n, left - n
            parts.append(part)
        return Pieces(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    def _locate(self, epoch: int, place: int, n: int) -> Pieces:
        """The pieces of slots that lie within an epoch. Args: the first one's place in it; how many there are."""
        order, stops = self._order(epoch)
        inner = slice(int(np.searchsorted(stops, place, side="right")), int(np.searchsorted(stops, place + n)) + 1)
        document, stop = order[inner], stops[inner]
        begin = stop - self._reader.lengths[document]
        skipped = np.maximum(place - begin, 0)
        length = np.minimum(place + n, stop) - begin - skipped
        return Pieces(self._reader.start[document] + skipped, length, skipped == 0)

    def _order_documents(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in their order, and the place behind each one's last slot."""
        order = np.random.default_rng((*self._seed, epoch, 0)).permutation(len(self._reader.lengths))
        return order, np.cumsum(self._reader.lengths[order])

    def _order_rows(self, epoch: int) -> np.ndarray:
        """The order in which the rows that begin in an epoch are read."""
        first, stop = (-(-e * self.n_slots // self._row_len) for e in (epoch, epoch + 1))
        return np.random.default_rng((*self._seed, epoch, 1)).permutation(stop - first)


class TextStream(grain.IterDataset[Batch]):
    """Endless full batches of documents."""

    def __init__(self, corpus: Corpus, render: Render, options: StreamOptions):
        super().__init__()
        if not corpus.shares_K.any() or 0 in itertools.compress(corpus.n_trained_K, corpus.shares_K):
            raise InputError("config.data.corpus: a corpus has no document to train on")
        self._parts = corpus, render, options

    def __iter__(self) -> "TextIterator":
        return TextIterator(*self._parts)


class TextIterator(grain.DatasetIterator[Batch]):
    """State: how many rows of each corpus have been handed out, to all processes together."""

    def __init__(self, corpus: Corpus, render: Render, options: StreamOptions):
        super().__init__()
        self._corpus, self._render, self._options = corpus, render, options
        self._share_K = corpus.shares_K
        self._rows = [
            _EndlessRows(TokenReader(corpus, source=k), options.row_len, (options.seed, k))
            for k in range(len(corpus.names))
        ]
        self._taken_K = np.zeros(len(corpus.names), np.int64)

    def __next__(self) -> Batch:
        return self.take(self._options.n_rows)

    def take(self, n_rows: int) -> Batch:
        """The next rows of this process, which takes as many as each of the others."""
        options, located = self._options, []
        first = options.process_index * n_rows  # of the rows of a batch, those of this process
        for row in range(n_rows * options.process_count):
            behind_K = self._share_K * (int(self._taken_K.sum()) + 1) - self._taken_K
            k = int(np.argmax(behind_K))
            if first <= row < first + n_rows:
                located.append(self._rows[k].locate(int(self._taken_K[k])).split(options.history_len))
            self._taken_K[k] += 1
        pieces = Pieces(*(np.concatenate(x) for x in zip(*located, strict=True)))
        segment = np.concatenate([np.arange(1, len(x.length) + 1, dtype=np.int32) for x in located])
        placed = Placement(len(segment), np.cumsum(pieces.length) - pieces.length, segment)  # rows are full
        shape = (n_rows, options.row_len)
        packed = pack_tokens(self._corpus.tokens, self._corpus.end, pieces, placed, shape)
        return packed.batch._replace(targets=self._render(packed))

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._taken_K.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        taken_K = np.array(state["rows"], np.int64)
        if taken_K.shape != self._taken_K.shape or np.any(taken_K < 0):
            raise ValueError(f"rows of {taken_K.size} corpora, not of {self._taken_K.size}")
        self._taken_K = taken_K
