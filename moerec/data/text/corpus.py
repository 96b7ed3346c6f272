"""Documents as token ids: what a language model is trained and validated on."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moerec.config import CorpusConfig
from moerec.data.text.documents import list_files, read_documents
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.types import NO_ITEMS

TOKENIZER = "tokenizer.json"  # in the directory of a run
END = "<|endoftext|>"  # behind every document
_BATCH = 1024  # documents that are encoded at once
_SHARES = 1 << 32


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Attributes:
    tokenizer: whose ids they are.
    offsets: `[N + 1]` int64, where each document begins in `ids`; each ends with `END`.
    ids: int32 tokens.
    n_bytes: `[N]` int64, UTF-8 bytes of each document's text.
    is_valid: `[N]` bool, the documents that are held out.
    sources: names of the files that the documents are of. source: `[N]` int32, which of them.
    """

    tokenizer: TextTokenizer
    offsets: np.ndarray
    ids: np.ndarray
    n_bytes: np.ndarray
    is_valid: np.ndarray
    sources: tuple[str, ...] = ()
    source: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    catalog = NO_ITEMS

    @property
    def length(self) -> np.ndarray:
        """`[N]`, tokens of each document, its end among them."""
        return np.diff(self.offsets)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens and of which are held out: equal for equal data."""
        found = hashlib.sha256()
        for array in (self.offsets, self.ids, self.is_valid):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    @property
    def items_digest(self) -> str:
        """That of no items."""
        return hashlib.sha256().hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """What the run keeps of its data, to know it again."""
        return {"sha256": self.digest, "items_sha256": self.items_digest}


def load_corpus(
    config: CorpusConfig,
    workdir: Path,
    vocab_size: int,
    first_tokenizer: Path | None = None,
    accept: Callable[[TextTokenizer], None] | None = None,
) -> Corpus:
    """Reads and encodes the documents; the tokenizer is kept in `workdir`, and taken from there the next time.

    Args:
      vocab_size: rows of the model's embedding, below which all ids have to be.
      first_tokenizer: of the model that training begins with, for a config that names none.
      accept: raises InputError where it does not take a tokenizer, before that is kept.

    Raises:
      InputError: a document or the tokenizer cannot be read, there is none, or the tokenizer has too many tokens.
    """
    if not config.path:
        raise InputError("config.data.corpus.path is missing: a file of documents, or a folder of such files")
    path, kept = Path(config.path), workdir / TOKENIZER
    files = list_files(path) if path.is_dir() else [path]
    by_file = [list(read_documents(file)) for file in files]
    texts = list(itertools.chain.from_iterable(by_file))
    is_valid = np.array([_hold_out(text, config.valid_fraction) for text in texts], bool)
    if is_valid.all():
        raise InputError(f"{path}: no document is left to train on")
    named = Path(config.tokenizer) if config.tokenizer else first_tokenizer
    source = kept if kept.is_file() else named
    if source is None:  # of the documents that are trained on alone
        tokenizer = TextTokenizer.train(itertools.compress(texts, ~is_valid), config.vocab_size)
    else:
        tokenizer = TextTokenizer.load(source)
    if tokenizer.n_vocab > vocab_size:
        told = f"the tokenizer has {tokenizer.n_vocab} tokens"
        raise InputError(f"config.model.text.vocab_size: {vocab_size} rows, but {told}")
    offsets, ids = _encode(tokenizer, texts, _find_end(tokenizer, source))
    if accept is not None:
        accept(tokenizer)
    if source != kept:  # only now: what was refused must not bind the directory
        tokenizer.save(kept)
    n_bytes = np.array([len(text.encode()) for text in texts], np.int64)
    of_file = np.repeat(np.arange(len(files), dtype=np.int32), [len(part) for part in by_file])
    return Corpus(tokenizer, offsets, ids, n_bytes, is_valid, tuple(file.name for file in files), of_file)


def _hold_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: by its own hash, so that it stays so whatever stands beside it."""
    word = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    return word < fraction * _SHARES


def _find_end(tokenizer: TextTokenizer, source: Path | None) -> int:
    """The id of `END`. Args: the file that the tokenizer is of. Raises InputError where there is none."""
    try:
        return tokenizer.id_of(END)
    except InputError as error:
        raise InputError(f"{source}: {error}, and it ends each document") from None


def _encode(tokenizer: TextTokenizer, texts: list[str], end: int) -> tuple[np.ndarray, np.ndarray]:
    offsets, parts = [np.zeros(1, np.int64)], []
    for first in range(0, len(texts), _BATCH):
        own, ids = tokenizer.encode_batch(texts[first : first + _BATCH])
        parts.append(np.insert(ids, own[1:], end))
        offsets.append(offsets[-1][-1] + own[1:] + np.arange(1, len(own)))
    return np.concatenate(offsets), np.concatenate(parts).astype(np.int32)
