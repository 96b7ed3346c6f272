"""The training stream of documents: packed like users' sequences, with the same epochs and the same position."""

import dataclasses

import numpy as np

from moerec.data.dataset import EventLog
from moerec.data.packing import Packed, Placement, assemble_words
from moerec.data.pipeline import EpochPlan, PackedIterator, PackedStream, Render, StreamOptions
from moerec.data.text.corpus import Corpus
from moerec.errors import InputError


class TokenReader:
    """The documents that are trained on, or those that are held out, with what `PackedIterator` asks of a reader."""

    def __init__(self, corpus: Corpus, valid: bool = False, source: int | None = None):
        """Args: the source of the documents, where it is one alone."""
        is_chosen = corpus.is_valid == valid
        chosen = np.flatnonzero(is_chosen if source is None else is_chosen & (corpus.source == source))
        self.start, self.lengths, self.ids = corpus.offsets[:-1][chosen], corpus.length[chosen], corpus.ids
        self.fields = np.zeros((len(chosen), 0), np.int32)

    def fetch(self, users: np.ndarray) -> tuple[EventLog, np.ndarray]:
        """There are no events."""
        raise TypeError("documents have no events")


class TextStream(PackedStream):
    """Endless packed batches of documents; a long one is cut into windows, which begin elsewhere in each epoch."""

    def __init__(self, reader: TokenReader, render: Render, options: StreamOptions):
        if not np.any(reader.lengths >= 2):
            raise InputError("config.data.corpus.path: no document has two tokens, so there is nothing to predict")
        options = dataclasses.replace(options, first_event=False)  # or the last token would have a target
        super().__init__(reader, None, render, options)  # type: ignore[arg-type]

    def __iter__(self) -> "TextIterator":
        return TextIterator(*self._parts)


class TextIterator(PackedIterator):
    """`PackedIterator`, over tokens in the place of events."""

    def _pack(self, plan: EpochPlan, placed: Placement) -> Packed:
        reader, options = self._reader, self._options
        assert isinstance(reader, TokenReader)
        return pack_tokens(
            reader.ids, reader.start[plan.user] + plan.first, plan.length, placed, (options.n_rows, options.row_len)
        )


def pack_tokens(
    ids: np.ndarray, first: np.ndarray, length: np.ndarray, placed: Placement, shape: tuple[int, int]
) -> Packed:
    """Lays windows of tokens into rows; each token's target is the one after it, which is of the same document.

    Args: all tokens; `[n]`, where each window begins in them and its slots, behind which one more token stands.
    """
    owner = np.repeat(np.arange(len(length)), length)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
    slot, source = placed.start[owner] + position, first[owner] + position

    def lay(values: np.ndarray, empty: int = 0) -> np.ndarray:
        out = np.full(shape[0] * shape[1], empty, np.int32)
        out[slot] = values
        return out.reshape(shape)

    batch = assemble_words(lay(ids[source]), lay(position), lay(placed.segment[owner]))
    return Packed(batch, np.full(shape, -1, np.int32), lay(ids[source + 1], -1))
