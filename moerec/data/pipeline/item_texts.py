"""Items with their texts as slots: the text and then the item to be found, or the item and then its text.

    <words> <|recommend|>     the control token predicts the item (the task text_to_item)
    <event> <words>           the event predicts the first token, each token the next one (item_to_text)

A share of the items is held out from both. It is chosen by a hash of the text, not of the item, so that of several
items with one text all are held out, or none. A leak is impossible by construction: the places in which tokens of an
item's text are laid into a sequence are `pack_item_texts` and `TextsBehindEvents.pack`; training gives the former the
items of `ItemTexts.list_items(held_out=False)` alone, and the latter refuses others. A segment sees no other segment,
the users' sequences have no words but those, and the documents no items. (What the vector of an item is made of,
`model.item_text`, is part of the item: it is how one that was never trained on is known at all.)
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np

from moerec.data.dataset import ItemTable
from moerec.data.packing import Packed, Placement, assemble_words, place_sequences
from moerec.data.pipeline.events import Render, StreamOptions
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.types import EVENT, RECOMMEND, Batch

TO_ITEM, TO_TEXT = "text_to_item", "item_to_text"  # the tasks, and what their sequences are called
_LIKELY_SLOTS = 8  # of a sequence
_SHARES, _STREAM = 1 << 32, 7  # parts that hashes are told apart in; which of the seeded orders this is


@dataclasses.dataclass(frozen=True)
class ItemTexts:
    """The texts of the items as tokens of a run's text tokenizer, cut to a length.

    Attributes:
      offsets: `[I + 1]` int64, where each item's tokens begin in `ids`, int32.
      n_bytes: `[I]` int64, UTF-8 bytes that the tokens spell.
      is_whole: `[I]` bool, where nothing was cut: behind the last token comes `end`, which else is not predicted.
      is_held_out: `[I]` bool.
      end: the id behind a text.
    """

    offsets: np.ndarray
    ids: np.ndarray
    n_bytes: np.ndarray
    is_whole: np.ndarray
    is_held_out: np.ndarray
    end: int

    @property
    def length(self) -> np.ndarray:
        """`[I]`, tokens of each item."""
        return np.diff(self.offsets)

    def list_items(self, held_out: bool) -> np.ndarray:
        """Those that have a text and are held out, or trained on."""
        return np.flatnonzero((self.length > 0) & (self.is_held_out == held_out))


def make_item_texts(
    items: ItemTable, tokenizer: TextTokenizer, end: int, most_tokens: int, held_out: float
) -> ItemTexts:
    """Encodes the texts of a catalogue. Args: most tokens of a text; the share of the items that is held out."""
    texts = items.text.tolist()
    whole_offsets, ids = tokenizer.encode_batch(texts)
    n_whole = np.diff(whole_offsets)
    length = np.minimum(n_whole, most_tokens)
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    owner = np.repeat(np.arange(len(texts)), length)
    place = np.arange(len(owner)) - offsets[owner]
    ids = ids[whole_offsets[owner] + place].astype(np.int32)
    is_whole = n_whole == length
    n_bytes = np.array([len(text.encode()) for text in texts], np.int64)
    for i in np.flatnonzero(~is_whole).tolist():  # a character that was cut is not counted
        spelled = tokenizer.decode(ids[offsets[i] : offsets[i + 1]]).rstrip("\ufffd")
        n_bytes[i] = len(spelled.encode())
    hashes = b"".join(hashlib.sha256(text.encode()).digest()[:4] for text in texts)
    is_held_out = np.frombuffer(hashes, "<u4") < held_out * _SHARES
    return ItemTexts(offsets, ids, n_bytes, is_whole, is_held_out, end)


def pack_item_texts(
    texts: ItemTexts, items: ItemTable, item: np.ndarray, to_item: np.ndarray, placed: Placement, shape: tuple[int, int]
) -> Packed:
    """Lays items with their texts into rows, a slot more each than the text has tokens.

    Args: `[n]` items that have a text; `[n]` bool, whether the text comes first; where they go; rows and slots of one.
    """
    n_tokens = texts.length[item]
    owner = np.repeat(np.arange(len(item)), n_tokens + 1)
    position = np.arange(len(owner)) - (np.cumsum(n_tokens + 1) - n_tokens - 1)[owner]
    first, is_to_item, last = texts.offsets[item][owner], to_item[owner], n_tokens[owner]
    is_item = position == np.where(is_to_item, last, 0)
    # A token's place in its text is its position, or where the item comes first one less.
    token = np.where(is_item, 0, texts.ids[np.where(is_item, 0, first + position - ~is_to_item)])
    follows = np.where(position < last, texts.ids[first + np.minimum(position, last - 1)], texts.end)
    is_told = ~is_to_item & ((position < last) | texts.is_whole[item][owner])
    slot = placed.start[owner] + position

    def lay(values: np.ndarray, empty: int = 0) -> np.ndarray:
        out = np.full(shape[0] * shape[1], empty, np.int32)
        out[slot] = values
        return out.reshape(shape)

    asked, shown = is_item & is_to_item, is_item & ~is_to_item
    kind_BT = lay(np.select([asked, shown], [RECOMMEND, EVENT], -1), -1)
    batch = assemble_words(lay(token), lay(position), lay(placed.segment[owner]))
    batch = batch._replace(
        kind_BT=np.where(kind_BT < 0, batch.kind_BT, kind_BT),
        item_BT=lay(np.where(shown, item[owner], 0)),
        service_BT=lay(np.where(shown, items.service[item[owner]], items.n_services), items.n_services),
    )
    next_item_BT = lay(np.where(asked, item[owner], -1), -1)
    return Packed(batch, next_item_BT, lay(np.where(is_told, follows, -1), -1))


class ItemTextSource(Protocol):
    """Endless sequences with an item's text, known by their numbers. `length` of what is drawn has 0 for what is not
    to be used.
    """

    def draw(self, number: np.ndarray) -> Any: ...

    def pack(self, drawn: Any, placed: Placement, shape: tuple[int, int]) -> Packed: ...


class _Drawn(NamedTuple):
    item: np.ndarray
    to_item: np.ndarray
    length: np.ndarray

    def take(self, which: np.ndarray) -> "_Drawn":
        return _Drawn(*(x[which] for x in self))


class ItemsAlone:
    """Each item that is trained on once an epoch in each of its ways, with its text and nothing else."""

    def __init__(self, texts: ItemTexts, items: ItemTable, ways: Sequence[str], options: StreamOptions):
        """Args: ways: of `TO_ITEM` and `TO_TEXT`, those that are wanted."""
        self._texts, self._items, self._options = texts, items, options
        item = texts.list_items(held_out=False)[options.process_index :: options.process_count]
        self._item = np.tile(item, len(ways))
        self._to_item = np.repeat([way == TO_ITEM for way in ways], len(item))
        self._order = functools.lru_cache(maxsize=2)(self._order_epoch)

    def draw(self, number: np.ndarray) -> _Drawn:
        """The sequences of `[n]` numbers."""
        (which,) = look_up(self._order, number, len(self._item))
        item = self._item[which]
        return _Drawn(item, self._to_item[which], self._texts.length[item] + 1)

    def pack(self, drawn: _Drawn, placed: Placement, shape: tuple[int, int]) -> Packed:
        """Lays sequences into rows."""
        return pack_item_texts(self._texts, self._items, drawn.item, drawn.to_item, placed, shape)

    def _order_epoch(self, epoch: int) -> np.ndarray:
        seed = self._options.seed, epoch, self._options.process_index, _STREAM
        return np.random.default_rng(seed).permutation(len(self._item))[None]


def look_up(order: Callable[[int], np.ndarray], number: np.ndarray, n: int) -> np.ndarray:
    """`[X, numbers]`, what an order of epochs of `n` has at numbers that count on over them.

    Args: order: of an epoch, `[X, n]`.
    """
    epoch, place = np.divmod(number, n)
    found = [order(e)[:, place[epoch == e]] for e in np.unique(epoch).tolist()]  # numbers rise, and so do epochs
    return np.concatenate(found, axis=1)


class ItemTextStream(grain.IterDataset[Batch]):
    """Endless packed batches of items with their texts: each that is trained on once an epoch in each of its ways."""

    def __init__(
        self,
        texts: ItemTexts,
        items: ItemTable,
        ways: Sequence[str],
        render: Render,
        options: StreamOptions,
        behind: ItemTextSource | None = None,
    ):
        """Args: ways: of `TO_ITEM` and `TO_TEXT`, those that are wanted. behind: what every second sequence is of."""
        super().__init__()
        if len(texts.list_items(held_out=False)) < options.process_count:
            raise InputError("config.data.mix.item_texts: no item with a text is left to train on")
        sources: list[ItemTextSource] = [ItemsAlone(texts, items, ways, options)]
        self._parts = [*sources, behind] if behind is not None else sources, render, options

    def __iter__(self) -> "ItemTextIterator":
        return ItemTextIterator(*self._parts)


class ItemTextIterator(grain.DatasetIterator[Batch]):
    """State: how many sequences have been handed out, of all sources in turn."""

    def __init__(self, sources: Sequence[ItemTextSource], render: Render, options: StreamOptions):
        super().__init__()
        self._sources, self._render, self._options = sources, render, options
        self._taken = 0

    def __next__(self) -> Batch:
        return self.take(self._options.n_rows)

    def take(self, n_rows: int) -> Batch:
        """The next rows, which are the same however many are taken at a time."""
        shape, n_sources = (n_rows, self._options.row_len), len(self._sources)
        # So many as may be placed: what is drawn of users has to be read.
        n_drawn, n_slots = n_sources * (2 + shape[0] * shape[1] // _LIKELY_SLOTS), shape[0] * shape[1]
        while True:
            number = self._taken + np.arange(n_drawn)
            length = np.zeros(n_drawn, np.int64)
            own = [np.flatnonzero(number % n_sources == k) for k in range(n_sources)]
            drawn = [source.draw(number[mine] // n_sources) for source, mine in zip(self._sources, own, strict=True)]
            for mine, found in zip(own, drawn, strict=True):
                length[mine] = found.length
            if length.sum() > n_slots:
                break
            n_drawn *= 2
        placed = place_sequences(length, *shape)
        self._taken += placed.n
        parts = []
        for source, mine, found in zip(self._sources, own, drawn, strict=True):
            used = np.flatnonzero((mine < placed.n) & (found.length > 0))
            at = mine[used]
            there = Placement(len(at), placed.start[at], placed.segment[at])
            parts.append(source.pack(found.take(used), there, shape))
        packed = functools.reduce(_overlay, parts)
        return packed.batch._replace(targets=self._render(packed))

    def get_state(self) -> dict[str, Any]:
        return {"sequences": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = int(state["sequences"])


def _overlay(below: Packed, above: Packed) -> Packed:
    """Two batches of which no slot is in use in both; codes of what one of them lacks are 0."""
    is_above_BT = above.batch.segment_BT > 0

    def choose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if b.ndim == 2:
            return np.where(is_above_BT, b, a)
        return np.where(is_above_BT[..., None], b, np.pad(a, ((0, 0), (0, 0), (0, b.shape[2] - a.shape[2]))))

    return jax.tree.map(choose, below, above)
