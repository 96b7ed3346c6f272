"""The text of an item behind what a user did, as slots of one sequence.

    <event> … <event> <words> <|recommend|>

Either the words are the text of the item that comes next, which the control token predicts (text_to_item); or they are
that of the last event's item, which predicts the first of them (item_to_text), and the control token predicts nothing.

Events, and what is known of the request at the control token, are those of the user's training events; a sequence that
goes back to their beginning starts with a control token, as without words. The item whose text it is is never a held
out one: where an event's is, or has no text, nothing is made of it. Which event of a user it is, and in which order the
users come, is drawn anew in each epoch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moerec.data.dataset import ItemTable
from moerec.data.histories import make_histories
from moerec.data.packing import Packed, Placement, Sequences, Words, pack
from moerec.data.pipeline.events import EventReader, StreamOptions
from moerec.data.pipeline.item_texts import TO_ITEM, ItemTexts, look_up

_STREAM = 8  # which of the seeded orders this is


class TextsDrawn(NamedTuple):
    """Attributes:
    user: `[n]` numbers. first, stop: `[n]`, from which to before which of the user's training events stand there.
    place: `[n]`, the event whose item's text follows. to_item: `[n]` bool, whether that one is to be found.
    item: `[n]`, of the event. length: `[n]` slots, 0 where the item is held out or has no text.
    """

    user: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    place: np.ndarray
    to_item: np.ndarray
    item: np.ndarray
    length: np.ndarray

    def take(self, which: np.ndarray) -> "TextsDrawn":
        """Args: `[m]`, which of them."""
        return TextsDrawn(*(x[which] for x in self))


class TextsBehindEvents:
    """The sequences by their number, which counts on over epochs without end: each user once an epoch in each way."""

    def __init__(
        self,
        reader: EventReader,
        texts: ItemTexts,
        items: ItemTable,
        ways: Sequence[str],
        history: int,
        options: StreamOptions,
    ):
        """Args: ways: of `TO_ITEM` and `TO_TEXT`. history: most events of a sequence."""
        own = np.arange(options.process_index, len(reader.lengths), options.process_count)
        self._reader, self._texts, self._items = reader, texts, items
        self._history, self._options = history, options
        self._user = np.tile(own[reader.lengths[own] > 0], len(ways))
        n_each = len(self._user) // len(ways)
        self._to_item = np.repeat([way == TO_ITEM for way in ways], n_each)
        self._order = functools.lru_cache(maxsize=2)(self._order_epoch)

    def _order_epoch(self, epoch: int) -> np.ndarray:
        """An order of users and ways, and which of its user's events each one is about; `[2, n]`."""
        rng = np.random.default_rng((self._options.seed, epoch, self._options.process_index, _STREAM))
        order = rng.permutation(len(self._user))
        return np.stack([order, rng.integers(0, self._reader.lengths[self._user[order]])])

    def draw(self, number: np.ndarray) -> TextsDrawn:
        """The sequences of `[n]` numbers."""
        which, place = look_up(self._order, number, len(self._user))
        user, to_item = self._user[which], self._to_item[which]
        stop = place + ~to_item
        first = np.maximum(stop - self._history, 0)
        log, begin = self._reader.fetch(user)
        item = log.item[begin + place]
        n_tokens = self._texts.length[item]
        is_used = (n_tokens > 0) & ~self._texts.is_held_out[item]
        length = np.where(is_used, stop - first + self._has_control(first) + n_tokens + 1, 0)
        return TextsDrawn(user, first, stop, place, to_item, item, length)

    def _has_control(self, first: np.ndarray) -> np.ndarray:
        return (first == 0) & self._options.first_event

    def pack(self, drawn: TextsDrawn, placed: Placement, shape: tuple[int, int]) -> Packed:
        """Lays sequences into rows. Args: those that are used; where they go; rows and slots of one."""
        texts, n_tokens = self._texts, self._texts.length[drawn.item]
        assert not texts.is_held_out[drawn.item].any()
        log, begin = self._reader.fetch(drawn.user)
        has_control = self._has_control(drawn.first)
        history = make_histories(begin + drawn.first, begin + drawn.stop)
        sequences = Sequences(history, begin + drawn.place, has_control, self._reader.fields[drawn.user])
        offsets = np.concatenate([[0], np.cumsum(n_tokens)]).astype(np.int64)
        owner = np.repeat(np.arange(len(n_tokens)), n_tokens)
        within = np.arange(offsets[-1]) - offsets[owner]
        ids = texts.ids[texts.offsets[drawn.item][owner] + within]
        packed = pack(log, self._items, sequences, placed, shape, Words(offsets, ids))
        last_event = placed.start + sequences.n_slots - 1
        end = last_event + n_tokens
        next_item, next_token = np.full((2, shape[0] * shape[1]), -1, np.int32)
        next_item[end[drawn.to_item] + 1] = drawn.item[drawn.to_item]
        told = ~drawn.to_item
        next_token[(last_event[owner] + within)[told[owner]]] = ids[told[owner]]
        next_token[end[told & texts.is_whole[drawn.item]]] = texts.end
        return Packed(packed.batch, next_item.reshape(shape), next_token.reshape(shape))
