"""Text to token ids and back, by a byte-level BPE trained on the texts at hand or by a published tokenizer.json."""

import contextlib
import gzip
import json
import re
import secrets
import string
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moerec.errors import InputError
from moerec.files import parse_json, read_json, replacing

# In a trained tokenizer these have the ids 0 to 4, the 256 bytes have the next ones, and what was learned follows.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|recommend|>", "<|explain|>")
N_BYTES = 256
# Qwen2's pattern (Yang et al. 2024): English contractions, words with what precedes them, digits one by one,
# punctuation, white space. Marks count as letters here, so that accents of their own do not split a word.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BATCH_CHARACTERS = 4_000_000  # the library keeps some hundred bytes a token until a batch is done
_UNFINISHED = "\ufffd"  # how bytes that are no character are shown


class TextTokenizer:
    """A tokenizer of the `tokenizers` library that keeps what a user types apart from control tokens.

    The control tokens are those that were added to the vocabulary, special ones (`<|im_start|>`) and others
    (`<tool_call>`), except runs of white space, which are text. The library can be told to take special tokens of a
    text for plain text, but not the others, nor those that are in the model's own vocabulary too. Thus there are two
    tokenizers here: `_trusted` is the file as it is, and in `_plain` every control token has a random name of 26
    letters that is drawn anew each time and never leaves this class, so no text holds it.

    Attributes:
      content: the tokenizer.json, byte for byte.
      n_vocab: the largest id plus one, added tokens included.
      control_tokens: what a text may hold and must not stand for; `control_ids` are their ids.
      special_ids: the ids of those that the file calls special, which `decode` can leave out.
      byte_ids: the ids of tokens that stand for one byte each where the decoder joins such bytes (ByteFallback).
    """

    def __init__(self, content: bytes, name: Path | str = "tokenizer.json"):
        """Reads a tokenizer.json; padding, truncation and dropout are off, whatever it says.

        Raises:
          InputError: it is none; the message begins with `name`.
        """
        self.content = content
        spec = _parse(content, name)
        self._trusted = _build(content, name)
        added = {token.content: (id, token) for id, token in self._trusted.get_added_tokens_decoder().items()}
        control = {text: id for text, (id, _) in added.items() if text.strip(f"{string.whitespace}▁")}
        self._names = {text: _draw_name() for text in control}
        self._plain = _build(json.dumps(_rename(spec, self._names), ensure_ascii=False).encode(), name)
        listed = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        for text, id in control.items():
            if listed.get(text) != id or self._plain.token_to_id(self._names[text]) != id:
                raise InputError(f"{name}: the added token {text!r} cannot have the id {listed.get(text)}")
        tokens = [added[text][1] for text in sorted(control, key=len, reverse=True)]
        # The library looks for these in the text first, and in what is between them, normalised, for the others.
        self._patterns = [_match_any([token for token in tokens if token.normalized == late]) for late in (False, True)]
        self.n_vocab = max(self._trusted.get_vocab().values(), default=-1) + 1
        self.control_tokens = tuple(control)
        self.control_ids = frozenset(control.values())
        self.special_ids = frozenset(id for id, token in added.values() if token.special)
        joins_bytes = '"ByteFallback"' in json.dumps(spec.get("decoder"))
        found = [self._trusted.token_to_id(f"<0x{byte:02X}>") for byte in range(N_BYTES)] if joins_bytes else []
        self.byte_ids = frozenset(id for id in found if id is not None)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The tokenizer of a tokenizer.json, which may be gzipped (`.gz`).

        Raises:
          InputError: there is no such file, or it is damaged or no tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
        content = path.read_bytes()
        if path.suffix == ".gz":
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{path}: is damaged ({error})") from None
        return cls(content, path)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special: Sequence[str] = SPECIAL,
        normalizer: normalizers.Normalizer | None = None,
        words: pre_tokenizers.PreTokenizer | None = None,
    ) -> Self:
        """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of the texts; the same texts give the same bytes.

        Every text round-trips, since all bytes are tokens, where nothing is normalised and no word left out.

        Args:
          vocab_size: how many ids there are at most; a small corpus has fewer pairs of tokens that occur twice.
          special: gets the ids from 0 on.
          normalizer: what is done to texts first; None: nothing.
          words: splits a text into the words within which tokens are learned; None: as Qwen2's tokenizer does.

        Raises:
          InputError: `vocab_size` has no room for the bytes and `special`; one of these is twice there or is not of
            visible ASCII characters; a text has half of a surrogate pair.
        """
        bad = [text for text in special if not re.fullmatch("[!-~]+", text) or special.count(text) > 1]
        if bad:
            raise InputError(f"special token {bad[0]!r}: must be visible ASCII, and there once")
        if vocab_size < N_BYTES + len(special):
            told = f"{N_BYTES} bytes and {len(special)} special tokens"
            raise InputError(f"vocab_size {vocab_size} is too small: {told} need {N_BYTES + len(special)}")
        tokenizer = Tokenizer(models.BPE())
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        words = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated") if words is None else words
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[AddedToken(text, special=True, normalized=False) for text in special],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(_whole(texts), trainer)
        return cls(tokenizer.to_str(pretty=True).encode())

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json atomically, byte for byte as it was read; gzipped where `path` ends in `.gz`."""
        with replacing(path) as file:
            file.write(gzip.compress(self.content, mtime=0) if Path(path).suffix == ".gz" else self.content)

    def encode(self, text: str, add_special: bool = False) -> np.ndarray:
        """`[n]` int32 ids of what a user typed, in which nothing stands for a control token.

        Args: add_special: whether the file's post-processor adds what it has (BOS, EOS).

        Raises:
          InputError: half of a surrogate pair is in the text.
        """
        return _encode(self._plain, text, add_special)

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """`(offsets [n + 1] int64, ids int32)`: text i, as `encode` has it, is `ids[offsets[i]:offsets[i + 1]]`."""
        parts = [np.zeros(0, np.int32)]
        for batch in _split(texts):
            with _naming_texts(texts):
                encoded = self._plain.encode_batch_fast(batch, add_special_tokens=add_special)
            parts += [np.array(encoding.ids, np.int32) for encoding in encoded]
        offsets = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return offsets, np.concatenate(parts)

    def encode_template(self, text: str, add_special: bool = False) -> np.ndarray:
        """`[n]` int32 ids of a text of our own, such as a prompt, in which control tokens count. See `encode`."""
        return _encode(self._trusted, text, add_special)

    def encode_marked(self, text: str, marker: str) -> np.ndarray:
        """As `encode_template`; but a control token with `marker` (a character) in it or after it is plain text.

        The marker itself is left out. What is around such a token is encoded together with it, as if it had never been
        added. A control token counts only where it is spelled as in `control_tokens`, while in `encode_template` it may
        come out of the file's normaliser.
        """
        patterns = [rf"({pattern})(?!{re.escape(marker)})" for pattern in self._patterns if pattern]
        text = self._name_control(text, patterns)
        return _encode(self._plain, text.replace(marker, ""), add_special=False)

    def _name_control(self, text: str, patterns: list[str]) -> str:
        """The text with other names for what the patterns, each of one group, find one after the other."""
        if not patterns:
            return text
        pieces = [
            self._names[piece] if place % 2 else self._name_control(piece, patterns[1:])
            for place, piece in enumerate(re.split(patterns[0], text))
        ]
        return "".join(pieces)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        Args: skip_special: leaves out `special_ids`.

        Raises:
          InputError: an id is not in the vocabulary.
        """
        listed = np.asarray(ids).tolist()
        if listed and not (min(listed) >= 0 and max(listed) < self.n_vocab):
            bad = next(id for id in listed if not 0 <= id < self.n_vocab)
            raise InputError(f"token id {bad} is not in the vocabulary, which has {self.n_vocab}")
        return self._trusted.decode(listed, skip_special_tokens=skip_special)

    def find_conflict(self, other: "TextTokenizer") -> str:
        """A token to which both give ids, but not the same, or the one of two with one id; empty where there is none.

        One may know tokens that the other does not, such as those that a later release has added.
        """
        own, there = self._trusted.get_vocab(), other._trusted.get_vocab()
        by_id = {id: token for token, id in there.items()}
        for token, id in own.items():
            if there.get(token, id) != id or by_id.get(id, token) != token:
                return token
        return ""

    def id_of(self, token: str) -> int:
        """The id of a token as the vocabulary spells it. Raises InputError where there is none."""
        id = self._trusted.token_to_id(token)
        if id is None:
            raise InputError(f"token {token!r} is not in the vocabulary")
        return id


class DecodeStream:
    """The text of ids that come one by one: what `push` and at last `finish` return is together what `decode` returns.

    A character whose bytes are spread over tokens is held back until it is whole, and with ByteFallback, where one
    wrong byte spoils the whole run, so is a run of bytes. Each step decodes the last few tokens alone: enough of them
    that the decoder sees no beginning, before which some drop white space, and that a character is whole.
    """

    _CONTEXT = 8  # tokens, of at least a byte each

    def __init__(self, tokenizer: TextTokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._window: list[int] = []
        self._n_sent = 0  # characters of the window's text

    def push(self, id: int) -> str:
        """What has become readable with this id. Raises InputError where it is not in the vocabulary."""
        if id in self._skipped:
            return ""
        if id in self._tokenizer.byte_ids:
            self._window.append(id)
            return ""
        window = [*self._window, id]
        text = self._tokenizer.decode(window)
        self._window = window
        n_held = int(text.endswith(_UNFINISHED))  # up to three bytes of a character are shown as one
        new = text[self._n_sent : len(text) - n_held]
        self._n_sent += len(new)
        if len(window) >= 2 * self._CONTEXT and (recent := self._tokenizer.decode(window[-self._CONTEXT :])):
            self._window = window[-self._CONTEXT :]
            self._n_sent = len(recent) - n_held
        return new

    def finish(self) -> str:
        """What was held back. The stream can then be used anew."""
        text = self._tokenizer.decode(self._window)[self._n_sent :]
        self._window, self._n_sent = [], 0
        return text


def read_stop_ids(folder: Path) -> tuple[int, ...]:
    """The ids at which a model's text ends: `eos_token_id` of generation_config.json, else of config.json, else none.

    Raises:
      InputError: it is neither an id nor a list of ids.
    """
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        value = read_json(path).get("eos_token_id") if path.exists() else None
        ids = value if isinstance(value, list) else [value]
        if value is None:
            continue
        if not all(type(id) is int and id >= 0 for id in ids):
            raise InputError(f"{path}: eos_token_id must be a token id or a list of them, not {json.dumps(value)}")
        return tuple(ids)
    return ()


def _parse(content: bytes, name: Path | str) -> Any:
    """The JSON of a tokenizer. Raises InputError.

    The library cuts a subword's prefix off without looking at it: one that is not there leaves half of a letter, at
    which it ends the process. So that is looked at here.
    """
    try:
        spec = parse_json(content)
    except ValueError as error:
        raise InputError(f"{name}: is no tokenizer ({error})") from None
    model = spec.get("model") if isinstance(spec, dict) else None
    model = model if isinstance(model, dict) else {}
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if isinstance(prefix, str) and prefix and isinstance(merges, list):
        for merge in merges:
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(parts, list) or not str(*parts[1:2]).startswith(prefix):
                raise InputError(f"{name}: is no tokenizer ({json.dumps(merge)} does not go on with {prefix!r})")
    return spec


def _build(content: bytes, name: Path | str) -> Tokenizer:
    """The library's tokenizer, without padding, truncation and dropout. Raises InputError."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":  # of Rust, an exception too
            raise
        reason = str(error).split("\n")[0].removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise InputError(f"{name}: is no tokenizer ({reason})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def _match_any(tokens: Sequence[AddedToken]) -> str:
    """A pattern for the first of the tokens that is there; some count only where they are no part of a word."""
    texts = [(re.escape(token.content), token.single_word) for token in tokens]
    return "|".join(rf"(?<!\w){text}(?!\w)" if alone else text for text, alone in texts)


def _draw_name() -> str:
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(26))


def _rename(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json in which some added tokens have other names, with the same ids, and no text gives them."""
    added = [
        {**token, "content": names[token["content"]], "single_word": False} if token["content"] in names else token
        for token in spec.get("added_tokens") or ()
    ]
    model = dict(spec["model"])
    vocab = model["vocab"]  # token -> id, or for Unigram [token, score] in the order of the ids
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): id for token, id in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    merges = model.get("merges") if model.get("type", "BPE") == "BPE" else None
    if merges and not names.keys().isdisjoint(vocab):
        inner = model.get("continuing_subword_prefix") or ""
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        model["merges"] = [x for x in pairs if names.keys().isdisjoint((*x, x[0] + x[-1].removeprefix(inner)))]
    return {**spec, "added_tokens": added, "model": model}


def _encode(tokenizer: Tokenizer, text: str, add_special: bool) -> np.ndarray:
    with _naming_texts([text]):
        return np.array(tokenizer.encode(text, add_special_tokens=add_special).ids, np.int32)


@contextlib.contextmanager
def _naming_texts(texts: Sequence[str]) -> Iterator[None]:
    """Within it what the library raises becomes an InputError: of the text that has no UTF-8, or of all."""
    try:
        yield
    except Exception as error:  # which is what the library raises: no kind of its own
        list(_whole(texts))
        raise InputError(f"the tokenizer cannot encode such a text ({error})") from None


def _whole(texts: Iterable[str]) -> Iterator[str]:
    """The texts. Raises InputError at one that has no UTF-8."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text {index}: half of a surrogate pair at character {error.start}") from None
        yield text


def _split(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in runs of about `_BATCH_CHARACTERS`."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
