"""A word-level vocabulary over item texts and attributes, built from the catalogue alone.

Titles are short and full of brand and product names, so words carry more than sub-words would; nothing of the
interactions enters, so nothing can leak.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moerec.data.dataset import ItemTable

PAD, UNKNOWN = 0, 1
N_SPECIAL = 2


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """`ids` `[I, W]` int32 token ids, 0 is padding; `words[id - N_SPECIAL]` is the word of an id."""

    ids: np.ndarray
    words: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.words) + N_SPECIAL


def split_words(text: np.ndarray, attributes: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """`(offsets [I + 1], words)`: the lower-case words of each text, then its attribute tokens, which stay whole."""
    words = _split(pc.utf8_lower(pa.array(text.tolist(), pa.large_string())), r"[^\p{L}\p{N}]+")
    tokens = _split(pa.array(attributes.tolist(), pa.large_string()), r"\s+")
    flat = pa.concat_arrays([words.flatten(), tokens.flatten()])
    owner = np.concatenate([pc.list_parent_indices(x).to_numpy() for x in (words, tokens)])
    keep = pc.not_equal(flat, "").to_numpy(zero_copy_only=False)
    flat, owner = flat.filter(pa.array(keep)), owner[keep]
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(text)))])
    return offsets, flat.take(pa.array(order))


def _split(texts: pa.Array, pattern: str) -> pa.Array:
    return pc.split_pattern_regex(texts, pattern=pattern)


def tokenize(catalogue: ItemTable, max_tokens: int, vocab_size: int) -> TokenTable:
    """The most frequent words of the catalogue (at least two uses), and the first `max_tokens` of each item."""
    offsets, words = split_words(catalogue.text, catalogue.attributes)
    encoded = words.dictionary_encode()
    code = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    names = np.array(encoded.dictionary.to_pylist(), dtype=object)
    count = np.bincount(code, minlength=len(names))
    # Ties in frequency are broken by the word, so that the vocabulary does not depend on the order of the items.
    by_use = [("count", "descending"), ("word", "ascending")]
    order = pc.sort_indices(pa.table({"count": count, "word": encoded.dictionary}), sort_keys=by_use)
    ranked = order.to_numpy()[:vocab_size].astype(np.int64)
    ranked = ranked[count[ranked] >= 2]
    token_of = np.full(len(names), UNKNOWN, np.int32)
    token_of[ranked] = N_SPECIAL + np.arange(len(ranked), dtype=np.int32)
    place = np.arange(len(code)) - np.repeat(offsets[:-1], np.diff(offsets))
    owner = np.repeat(np.arange(catalogue.n_items), np.diff(offsets))
    width = int(min(max_tokens, max(1, np.diff(offsets).max(initial=1))))
    ids = np.zeros((catalogue.n_items, width), np.int32)
    kept = place < width
    ids[owner[kept], place[kept]] = token_of[code[kept]]
    return TokenTable(ids, tuple(names[ranked].tolist()))
