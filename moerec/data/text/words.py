"""The words of items' texts, and their attributes, which stay whole.

Words are lower-case, of letters, digits and the marks that belong to letters (the vowels of Hindi and Thai are marks).
Compatible spellings are one (Unicode's NFKC: full-width letters, accents of their own, `㎏`). Scripts that have no
spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) give each two characters that stand side by side, a character with
its marks: without a dictionary these are what titles share.
"""

import itertools
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Signs that NFKC would write as letters of the word beside them; and what is inside words, and invisible.
SIGNS = "[™℠№]"
INVISIBLE = "[\u00ad\u200c\u200d\u2060\ufe0e\ufe0f\ufeff]"
# The mark of long vowels belongs to two scripts, and so to none.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\x{30FC}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_JOINED = "\u0001"  # before a piece of an unspaced script; a control character, which no word has


def split_words(text: np.ndarray, attributes: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """`(offsets [I + 1], words)`: the words of each text, then its attribute tokens."""
    return _join(split_texts(text), split_attributes(attributes))


def split_texts(text: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """`(offsets [I + 1], words)`: the words of each text."""
    texts = pc.replace_substring_regex(pa.array(text.tolist(), pa.large_string()), SIGNS, " ")
    texts = pc.utf8_lower(pc.utf8_normalize(texts, "NFKC"))
    texts = pc.replace_substring_regex(texts, INVISIBLE, "")
    offsets, words = _split(texts, r"[^\p{L}\p{M}\p{N}]+")
    words, owner = _pair_characters(words, np.repeat(np.arange(len(text)), np.diff(offsets)))
    return _select(words, owner, pc.match_substring_regex(words, r"[\p{L}\p{N}]"), len(text))


def split_attributes(attributes: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """`(offsets [I + 1], tokens)`: the attribute tokens of each item."""
    return _split(pa.array(attributes.tolist(), pa.large_string()), r"\s+")


def split_plain_words(text: np.ndarray, attributes: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """As `split_words` was before marks and scripts without spaces were heard: runs of letters and digits alone."""
    texts = pc.utf8_lower(pa.array(text.tolist(), pa.large_string()))
    return _join(_split(texts, r"[^\p{L}\p{N}]+"), split_attributes(attributes))


def _split(texts: pa.Array, pattern: str) -> tuple[np.ndarray, pa.Array]:
    parts = pc.split_pattern_regex(texts, pattern=pattern)
    flat = parts.flatten()
    return _select(flat, pc.list_parent_indices(parts).to_numpy(), pc.not_equal(flat, ""), len(texts))


def _select(flat: pa.Array, owner: np.ndarray, is_kept: pa.Array, n: int) -> tuple[np.ndarray, pa.Array]:
    """What is kept of `n` lists that lie one behind the other, with their offsets. Args: owner: rising."""
    kept = owner[is_kept.to_numpy(zero_copy_only=False)]
    return np.concatenate([[0], np.cumsum(np.bincount(kept, minlength=n))]), flat.filter(is_kept)


def _join(*parts: tuple[np.ndarray, pa.Array]) -> tuple[np.ndarray, pa.Array]:
    """Lists behind lists, of each owner."""
    owner = np.concatenate([np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) for offsets, _ in parts])
    flat = pa.concat_arrays([flat for _, flat in parts])
    return np.sum([offsets for offsets, _ in parts], axis=0), flat.take(pa.array(np.argsort(owner, kind="stable")))


def _pair_characters(words: pa.Array, owner: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Words with those of unspaced scripts as pairs of their characters; and whose they are."""
    is_unspaced = pc.match_substring_regex(words, _UNSPACED).to_numpy(zero_copy_only=False)
    if not is_unspaced.any():
        return words, owner
    mixed = words.filter(pa.array(is_unspaced))
    marked = pc.replace_substring_regex(mixed, rf"({_UNSPACED}[{_UNSPACED[1:-1]}\p{{M}}]*)", rf" {_JOINED}\1 ")
    found = {word: _list_pairs(pieces) for word, pieces in zip(mixed.to_pylist(), marked.to_pylist(), strict=True)}
    parts = [found[word] if unspaced else [word] for word, unspaced in zip(words.to_pylist(), is_unspaced, strict=True)]
    flat = pa.array([word for part in parts for word in part], pa.large_string())
    return flat, np.repeat(owner, [len(part) for part in parts])


def _list_pairs(pieces: str) -> list[str]:
    """The words of one whose unspaced pieces are marked."""
    found = []
    for piece in pieces.split():
        if not piece.startswith(_JOINED):
            found.append(piece)
            continue
        characters: list[str] = []
        for letter in piece[len(_JOINED) :]:
            if characters and unicodedata.category(letter).startswith("M"):
                characters[-1] += letter
            else:
                characters.append(letter)
        pairs = [a + b for a, b in itertools.pairwise(characters)]
        found += pairs or characters
    return found
