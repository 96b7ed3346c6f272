"""Items as tokens: the vocabulary of a run's catalogue, kept with the run, and items encoded by it.

Of an item's slots, texts and attributes have their own shares, so that a long title pushes no brand out. The text goes
through a byte-level BPE, trained on the catalogue or given, or is split into words. Only texts and attributes of the
catalogue enter; nothing of the interactions does, so nothing can leak.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Regex, normalizers, pre_tokenizers

from moerec.config import DataConfig
from moerec.data.dataset import ItemTable
from moerec.data.text.tokenizer import TextTokenizer
from moerec.data.text.words import INVISIBLE, SIGNS, split_attributes, split_plain_words, split_texts
from moerec.errors import InputError
from moerec.files import read_json, write_json

ITEM_TOKENS = "item_tokens.json"  # in the directory of a run
PAD, UNKNOWN = 0, 1
N_SPECIAL = 2
SUBWORDS, WORDS, PLAIN_WORDS = "subwords", "words", "plain_words"
_FIELDS = {"kind": str, "tokenizer": str, "words": list, "attributes": list}


@dataclasses.dataclass(frozen=True)
class ItemVocabulary:
    """The tokens of items. Ids: 0 padding, 1 unknown; then the tokens of texts; then the attributes.

    Attributes:
      kind: subwords; words; or plain_words: words without marks, and the attributes behind them in the same slots and
        in the same vocabulary, as runs of format 1 have it.
      max_tokens, max_attributes: slots of an item for its text and for its attributes.
      tokenizer: of subwords, whose ids stand for texts. words: those of the other kinds.
      attributes: whole, such as `brand=acme`.
    """

    kind: str
    max_tokens: int
    max_attributes: int = 0
    tokenizer: TextTokenizer | None = None
    words: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    @property
    def n_text_tokens(self) -> int:
        return len(self.words) if self.tokenizer is None else self.tokenizer.n_vocab

    @property
    def n_tokens(self) -> int:
        """The largest id plus one."""
        return N_SPECIAL + self.n_text_tokens + len(self.attributes)

    @property
    def width(self) -> int:
        """W, the slots of an item."""
        return self.max_tokens if self.kind == PLAIN_WORDS else self.max_tokens + self.max_attributes

    def encode(self, texts: Sequence[str] | np.ndarray, attributes: Sequence[str] | np.ndarray = ()) -> np.ndarray:
        """`[n, W]` int32 ids of items, be they of the catalogue or new; padding behind.

        The tokens of the text come first, then the attributes that the vocabulary has, then `UNKNOWN` for each that it
        does not have. Subwords know every text, to its bytes; words may be unknown.

        Args:
          texts: of `n` items, as `ItemTable.text`.
          attributes: as `ItemTable.attributes`: tokens separated by a space. None at all: no item has any.

        Raises:
          InputError: a text has half of a surrogate pair.
        """
        return self.encode_items(texts, attributes).ids

    def encode_items(
        self, texts: Sequence[str] | np.ndarray, attributes: Sequence[str] | np.ndarray = ()
    ) -> "TokenTable":
        """`encode`, and what was cut."""
        text = np.asarray(texts, object)
        attribute = np.asarray(attributes if len(attributes) or not len(text) else [""] * len(text), object)
        if len(text) != len(attribute):
            raise InputError(f"items: {len(text)} texts, and attributes of {len(attribute)} items")
        ids = np.zeros((len(text), self.width), np.int32)
        n_text_I, text_ids = self._encode_texts(text, attribute)
        kept_I = _lay(ids, np.zeros(len(text), np.int64), text_ids, n_text_I, self.max_tokens)
        if self.kind == PLAIN_WORDS:
            n_attributes_I = np.diff(split_attributes(attribute)[0])
            are_cut_I = (n_text_I > kept_I) & (n_attributes_I > 0)
            return TokenTable(ids, self, n_text_I - n_attributes_I > kept_I, are_cut_I)
        offsets, names = split_attributes(attribute)
        found = self._attribute_ids(names)
        n_attributes_I = np.diff(offsets)
        owner = np.repeat(np.arange(len(text)), n_attributes_I)
        found = found[np.lexsort((found == UNKNOWN, owner))]  # those that say something are not cut for others
        kept = _lay(ids, kept_I, found, n_attributes_I, self.max_attributes)
        return TokenTable(ids, self, n_text_I > kept_I, n_attributes_I > kept)

    def _encode_texts(self, text: np.ndarray, attribute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many ids each text has, and all of them."""
        if self.tokenizer is not None:
            offsets, ids = self.tokenizer.encode_batch(text.tolist())
            return np.diff(offsets), ids + np.int32(N_SPECIAL)
        is_plain = self.kind == PLAIN_WORDS
        offsets, words = split_plain_words(text, attribute) if is_plain else split_texts(text)
        return np.diff(offsets), _find(words, self.words, N_SPECIAL)

    def _attribute_ids(self, names: pa.Array) -> np.ndarray:
        return _find(names, self.attributes, N_SPECIAL + self.n_text_tokens)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides which ids items get."""
        found = hashlib.sha256()
        plain = [self.kind, self.max_tokens, self.max_attributes, self.words, self.attributes]
        found.update(json.dumps(plain).encode())
        found.update(b"" if self.tokenizer is None else self.tokenizer.content)
        return found.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the vocabulary atomically. Its limits are the config's."""
        content = "" if self.tokenizer is None else self.tokenizer.content.decode()
        values = self.kind, content, self.words, self.attributes
        write_json(path, dict(zip(_FIELDS, values, strict=True)))

    @classmethod
    def load(cls, path: Path, config: DataConfig) -> Self:
        """A vocabulary that was saved.

        Raises:
          InputError: the file is missing or damaged, or is of another kind than the config's.
        """
        found = read_json(path, "no such file; without it the items of this run cannot be encoded")
        for name, kind in _FIELDS.items():
            if not isinstance(found.get(name), kind) or not _are_strings(found[name]):
                raise InputError(f"{path}: {name} is missing, or damaged")
        if found["kind"] != config.item_tokens or bool(found["tokenizer"]) != (config.item_tokens == SUBWORDS):
            raise InputError(f"{path}: is of {found['kind']!r}, and data.item_tokens is {config.item_tokens!r}")
        tokenizer = TextTokenizer(found["tokenizer"].encode(), path) if found["tokenizer"] else None
        known = tuple(found["words"]), tuple(found["attributes"])
        return cls(found["kind"], config.max_tokens, config.max_attributes, tokenizer, *known)


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Items as tokens. Attributes: ids `[I, W]` int32, 0 is padding; vocabulary: whose ids they are; and `[I]` bool,
    whose texts and whose attributes have more tokens than slots.
    """

    ids: np.ndarray
    vocabulary: ItemVocabulary
    is_text_cut: np.ndarray
    are_attributes_cut: np.ndarray

    @property
    def n_tokens(self) -> int:
        return self.vocabulary.n_tokens

    def trim(self) -> "TokenTable":
        """Without the columns in which no item has a token; one column at least. A step gathers them all."""
        used = np.flatnonzero(np.any(self.ids != PAD, axis=0))
        width = int(used[-1]) + 1 if len(used) else 1
        return dataclasses.replace(self, ids=np.ascontiguousarray(self.ids[:, :width]))

    def measure(self) -> dict[str, float]:
        """Shares of the items: whose text is cut, whose attributes are, who have no known token; and the sizes."""
        n = max(len(self.ids), 1)
        return {
            "vocabulary": self.n_tokens - N_SPECIAL,
            "slots": self.ids.shape[1],
            "mean_tokens": float(np.sum(self.ids != PAD)) / n,
            "text_cut": float(np.sum(self.is_text_cut)) / n,
            "attributes_cut": float(np.sum(self.are_attributes_cut)) / n,
            "unknown": float(np.sum(~np.any(self.ids > UNKNOWN, axis=1))) / n,
        }

    def describe(self) -> str:
        """`measure` in a line."""
        found, own = self.measure(), self.vocabulary
        return (
            f"items: {found['mean_tokens']:.1f} tokens an item, of a vocabulary of {found['vocabulary']:,}; "
            f"{found['text_cut']:.1%} have their text cut at {own.max_tokens} tokens (data.max_tokens), "
            f"{found['attributes_cut']:.1%} their attributes at "
            f"{own.width if own.kind == PLAIN_WORDS else own.max_attributes} (data.max_attributes); "
            f"{found['unknown']:.1%} have no token that is known"
        )


def make_vocabulary(catalogue: ItemTable, config: DataConfig) -> ItemVocabulary:
    """The vocabulary of a catalogue; it does not depend on the order of the items.

    Attributes and words are the most frequent ones that are used twice at least; `data.vocab_size` bounds the tokens of
    texts, and the attributes as well.

    Raises:
      InputError: `data.item_tokenizer` cannot be read, or `data.vocab_size` is too small for the bytes.
    """
    limits = config.max_tokens, config.max_attributes
    if config.item_tokens == PLAIN_WORDS:
        _, words = split_plain_words(catalogue.text, catalogue.attributes)
        return ItemVocabulary(PLAIN_WORDS, *limits, words=_rank(words, config.vocab_size))
    attributes = _rank(split_attributes(catalogue.attributes)[1], config.vocab_size)
    if config.item_tokens == WORDS:
        words = _rank(split_texts(catalogue.text)[1], config.vocab_size)
        return ItemVocabulary(WORDS, *limits, words=words, attributes=attributes)
    tokenizer = read_given(config.item_tokenizer) if config.item_tokenizer else train_subwords(catalogue, config)
    return ItemVocabulary(SUBWORDS, *limits, tokenizer=tokenizer, attributes=attributes)


def train_subwords(catalogue: ItemTable, config: DataConfig) -> TextTokenizer:
    """A byte-level BPE of the catalogue's texts, in which compatible and upper-case spellings are one.

    Titles have no order here: spaces and punctuation, which would take slots of words, are left out; symbols and emoji
    stay. Digits that stand together are one word. Everything that is left has tokens, its bytes if nothing else.
    """
    spelling = normalizers.Sequence(
        [
            normalizers.Replace(Regex(SIGNS), " "),
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(INVISIBLE), ""),
        ]
    )
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s\p{P}\p{C}]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"[\p{L}\p{M}]+|\p{N}+|[^\p{L}\p{M}\p{N}]+"), behavior="isolated"),
        ]
    )
    texts = sorted(catalogue.text.tolist())
    try:
        return TextTokenizer.train(texts, config.vocab_size, special=(), normalizer=spelling, words=words)
    except InputError as error:
        raise InputError(f"data.{error}" if str(error).startswith("vocab_size") else str(error)) from None


def read_given(name: str) -> TextTokenizer:
    """The tokenizer of a file, or of a folder with a tokenizer.json (or .json.gz). Raises InputError where none is."""
    path = Path(name)
    if path.is_dir():
        packed = path / "tokenizer.json.gz"
        path = packed if packed.is_file() else path / "tokenizer.json"
    return TextTokenizer.load(path)


def _rank(uses: pa.Array, most: int) -> tuple[str, ...]:
    """The most frequent of the words, used twice at least; ties are broken by the word."""
    encoded = uses.dictionary_encode()
    code = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    count = np.bincount(code, minlength=len(encoded.dictionary))
    by_use = [("count", "descending"), ("word", "ascending")]
    order = pc.sort_indices(pa.table({"count": count, "word": encoded.dictionary}), sort_keys=by_use)
    ranked = order.to_numpy()[:most].astype(np.int64)
    return tuple(encoded.dictionary.take(pa.array(ranked[count[ranked] >= 2])).to_pylist())


def _find(words: pa.Array, known: tuple[str, ...], first: int) -> np.ndarray:
    """`[n]` int32 ids of words, `UNKNOWN` for others. Args: first: the id of the first that is known."""
    place = pc.index_in(words, value_set=pa.array(known, pa.large_string()))
    return pc.fill_null(pc.add(place, first), UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int32)


def _lay(ids: np.ndarray, start_I: np.ndarray, flat: np.ndarray, count_I: np.ndarray, most: int) -> np.ndarray:
    """Lays the first `most` of each item's tokens into its row from `start_I` on. Returns `[I]`, how many it took."""
    owner = np.repeat(np.arange(len(ids)), count_I)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(count_I) - count_I, count_I)
    kept = place < most
    ids[owner[kept], start_I[owner[kept]] + place[kept]] = flat[kept]
    return np.minimum(count_I, most)


def _are_strings(value: Any) -> bool:
    return isinstance(value, str) or all(isinstance(entry, str) for entry in value)
