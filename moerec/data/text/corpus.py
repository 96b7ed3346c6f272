"""Documents as token ids: what a language model is trained and validated on."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moerec.config import DataConfig
from moerec.data.text.prepare import END, is_current_text, prepare_text, require_rows
from moerec.data.text.token_shards import TOKENIZER, TextMeta, TokenArray, open_tokens, read_documents_table
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.types import NO_ITEMS

FOLDER = "data"  # in the directory of a run: its documents, prepared; beside them the tokenizer, `TOKENIZER`


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Attributes:
    tokenizer: whose ids they are.
    offsets: `[N + 1]` int64, where each document begins in `tokens`; each ends with `end`.
    tokens: the ids of all documents, by position.
    n_bytes: `[N]` int64, UTF-8 bytes of each document's text.
    is_valid: `[N]` bool, the documents that are held out.
    end: the id of `END`, which also stands before a document's first token.
    names: of the corpora. source: `[N]` int32, which of them each document is of.
    weights: of the corpora, their shares of the tokens that are trained on; empty: by their sizes.
    counts: of each corpus, as `TextMeta.corpora`; empty where it is of no folder.
    digest: SHA-256 of tokens, documents, sides and corpora: equal for equal data.
    """

    tokenizer: TextTokenizer
    offsets: np.ndarray
    tokens: TokenArray
    n_bytes: np.ndarray
    is_valid: np.ndarray
    end: int
    names: tuple[str, ...]
    source: np.ndarray
    weights: tuple[float, ...] = ()
    counts: tuple[dict, ...] = ()
    digest: str = ""

    catalog = NO_ITEMS

    @property
    def length(self) -> np.ndarray:
        """`[N]`, tokens of each document, its end among them; as many are predicted."""
        return np.diff(self.offsets)

    @functools.cached_property
    def n_trained_K(self) -> tuple[int, ...]:
        """Tokens of each corpus that are trained on."""
        own, length = self.source[~self.is_valid], self.length[~self.is_valid]
        return tuple(int(length[own == k].sum()) for k in range(len(self.names)))

    @property
    def shares_K(self) -> np.ndarray:
        """The share of each corpus in the tokens that training reads."""
        weight_K = np.array(self.weights or self.n_trained_K, float)
        return weight_K / (weight_K.sum() or 1)

    @property
    def items_digest(self) -> str:
        """That of no items."""
        return hashlib.sha256().hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """What the run keeps of its data, to know it again."""
        return {"sha256": self.digest, "items_sha256": self.items_digest}


def open_corpus(folder: Path, in_memory: bool) -> tuple[Corpus, TextMeta]:
    """The documents of a prepared folder. Raises: InputError, where something there is not as written."""
    meta = TextMeta.load(folder)
    meta.require_intact(folder)
    table = read_documents_table(folder)
    offsets = np.concatenate([[0], np.cumsum(table["n_tokens"])]).astype(np.int64)
    weights = [row["weight"] for row in meta.corpora]
    corpus = Corpus(
        tokenizer=TextTokenizer.load(folder / TOKENIZER),
        offsets=offsets,
        tokens=open_tokens(folder, meta, table["n_tokens"], in_memory),
        n_bytes=table["n_bytes"],
        is_valid=table["is_valid"],
        end=meta.end,
        names=tuple(row["name"] for row in meta.corpora),
        source=table["corpus"],
        weights=() if None in weights else tuple(weights),
        counts=meta.corpora,
        digest=meta.sha256,
    )
    return corpus, meta


def load_corpus(
    config: DataConfig,
    workdir: Path,
    vocab_size: int,
    first_tokenizer: Path | None = None,
    accept: Callable[[TextTokenizer], None] | None = None,
    known: str = "",
    folder: str = FOLDER,
) -> Corpus:
    """The documents of a config: of its prepared folder, or prepared in `workdir`, where they stay for the next time.

    The tokenizer is kept in `workdir`, and taken from there the next time.

    Args:
      vocab_size: rows of the model's embedding, below which all ids have to be.
      first_tokenizer: of the model that training begins with, for a config that names none.
      accept: raises InputError where it does not take a tokenizer, before that is kept.
      known: the digest of the documents that `workdir` holds a run on, if it does; no others take their place.
      folder: in `workdir`, where they are prepared.

    Raises:
      InputError: a document or the tokenizer cannot be read, there is none, the tokenizer has too many tokens or is
        another one than the run's, or `workdir` holds a run on other documents.
    """
    kept = workdir / TOKENIZER

    def require_known(digest: str) -> None:
        if known and digest != known:
            raise InputError(f"{workdir}: this directory holds a run on other documents")

    is_made = False
    if config.prepared:
        corpus, _ = open_corpus(Path(config.prepared), config.reader == "memory")
        if kept.is_file() and kept.read_bytes() != corpus.tokenizer.content:
            raise InputError(f"{kept}: is not the tokenizer of {config.prepared}")
    else:
        own = workdir / folder
        is_made = not is_current_text(config, own, kept)
        if is_made:
            named = Path(config.corpus.tokenizer) if config.corpus.tokenizer else first_tokenizer
            path = kept if kept.is_file() else named
            prepare_text(config, own, path, vocab_size, accept, lambda meta: require_known(meta.sha256))
        corpus, _ = open_corpus(own, config.reader == "memory")
    require_rows(corpus.tokenizer, vocab_size)
    if accept is not None and not is_made:  # else it has been asked
        accept(corpus.tokenizer)
    require_known(corpus.digest)
    if not kept.is_file():  # only now: what was refused must not bind the directory
        corpus.tokenizer.save(kept)
    return corpus


__all__ = ["END", "TOKENIZER", "Corpus", "load_corpus", "open_corpus"]
