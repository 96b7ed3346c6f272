"""Documents to a prepared folder (`token_shards`), streaming: read once to be checked and told apart, then encoded.

Peak memory: two batches of documents, the tokenizer's counts of words while it is trained, and some 150 bytes a
document.
"""

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moerec.config import DataConfig
from moerec.config.terminal import printable
from moerec.data.prepare.shards import META, replace_folder
from moerec.data.text.sources import TextSource, list_sources
from moerec.data.text.token_shards import TOKENIZER, TextMeta, TokenWriter, write_documents_table
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError

END = "<|endoftext|>"  # behind every document, and before its first token
_BATCH, _BATCH_CHARACTERS = 1024, 2_000_000  # documents that are read and encoded at once
_SHARES = 1 << 32
_N_KEY = 16  # bytes of a document's SHA-256 by which it is known again
X = TypeVar("X")


@dataclasses.dataclass(frozen=True)
class TextReport:
    """Counts of what was written; of each corpus as `TextMeta` has them, and what went into it in a second."""

    folder: str
    corpora: tuple[dict, ...]
    n_vocab: int
    tokenizer: str  # "trained", or the file that it is of
    wall_s: float
    bytes_per_s: float
    replaced: bool


@dataclasses.dataclass(frozen=True)
class _Scan:
    """What the first reading tells of all documents, in their order.

    Attributes: `corpus` `[N]` int32; `n_bytes` `[N]` int64; `keep` `[N]` bool, no duplicate; `is_valid` `[N]` bool.
    """

    corpus: np.ndarray
    n_bytes: np.ndarray
    keep: np.ndarray
    is_valid: np.ndarray


def prepare_text(
    config: DataConfig,
    out: Path,
    tokenizer_path: Path | None = None,
    n_rows: int | None = None,
    check: Callable[[TextTokenizer], None] | None = None,
    accept: Callable[[TextMeta], None] | None = None,
) -> TextReport:
    """Reads the corpora of a config, trains or loads the tokenizer and writes the folder `out`, whole or not at all.

    Args:
      tokenizer_path: the tokenizer's file, instead of what the config names or of one that is trained.
      n_rows: of the model's embedding, below which all ids have to be.
      check, accept: raise InputError where they do not take the tokenizer, and what was written.

    Raises:
      InputError: a document or the tokenizer cannot be read, or no document is left to train on.
    """
    start, sources = time.monotonic(), list_sources(config)
    scan = _scan(sources, config)
    _require_training(sources, scan, config)
    named = Path(config.corpus.tokenizer) if config.corpus.tokenizer else None
    path = tokenizer_path or named
    if path is None:  # of the documents that are trained on alone
        texts = itertools.compress(_read_all(sources), (scan.keep & ~scan.is_valid).tolist())
        tokenizer = TextTokenizer.train(texts, config.corpus.vocab_size)
    else:
        tokenizer = TextTokenizer.load(path)
    end = _find_end(tokenizer, path)
    if n_rows is not None:
        require_rows(tokenizer, n_rows)
    if check is not None:
        check(tokenizer)
    replaced = (Path(out) / META).exists()
    with replace_folder(out) as folder:
        meta = _write(folder, config, sources, scan, tokenizer, end)
        meta.write(folder)
        if accept is not None:
            accept(meta)
    wall_s = time.monotonic() - start
    return TextReport(
        folder=str(out),
        corpora=meta.corpora,
        n_vocab=tokenizer.n_vocab,
        tokenizer="trained" if path is None else str(path),
        wall_s=round(wall_s, 2),
        bytes_per_s=round(int(scan.n_bytes.sum()) / wall_s),
        replaced=replaced,
    )


def require_rows(tokenizer: TextTokenizer, n_rows: int) -> None:
    """Raises: InputError, where a model's embedding has fewer rows than there are tokens."""
    if tokenizer.n_vocab > n_rows:
        told = f"the tokenizer has {tokenizer.n_vocab} tokens"
        raise InputError(f"config.model.text.vocab_size: {n_rows} rows, but {told}")


def describe_text_source(config: DataConfig) -> dict[str, Any]:
    """What a prepared folder is made from: the config that matters, and each corpus's files. Raises: InputError."""
    sources = {source.name: source.describe() for source in list_sources(config)}
    return json.loads(json.dumps({"corpus": dataclasses.asdict(config.corpus), "sources": sources}))


def is_current_text(config: DataConfig, folder: Path, tokenizer: Path) -> bool:
    """Whether the folder was prepared whole, from these documents, with this config, by the tokenizer of a file.

    Raises:
      InputError: its description is damaged.
    """
    if not (folder / META).exists() or not tokenizer.is_file():
        return False
    meta = TextMeta.load(folder)
    is_same = meta.tokenizer_sha256 == hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    return is_same and meta.source == describe_text_source(config)


def describe_corpora(corpora: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each corpus of a folder."""
    lines = []
    for row in corpora:
        documents = "document" if row["n_documents"] == 1 else "documents"
        told = f"{row['n_documents']:,} {documents} ({row['n_valid']:,} held out), {row['n_tokens']:,} tokens, "
        told += f"{row['n_bytes']:,} bytes"
        if row["n_duplicates"]:
            told += f"; {row['n_duplicates']:,} that were there before are dropped"
        lines.append(f"{printable(row['name'])}: {told}")
    return lines


def describe_text_report(report: TextReport) -> str:
    """What was prepared, in lines."""
    made = "trained" if report.tokenizer == "trained" else f"of {report.tokenizer}"
    speed = f"{report.wall_s} s, {report.bytes_per_s / 1e6:.1f} MB a second"
    lines = [*describe_corpora(report.corpora), f"tokenizer: {report.n_vocab:,} tokens, {made}"]
    return "\n".join([*lines, f"{report.folder}: {'replaced' if report.replaced else 'written'} in {speed}"])


def _read_all(sources: list[TextSource]) -> Iterator[str]:
    return itertools.chain.from_iterable(source.read() for source in sources)


def _ahead(values: Iterator[X]) -> Iterator[X]:
    """The values, of which the next one is made in another thread while one is worked with."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, values, None)
        while (value := coming.result()) is not None:
            coming = pool.submit(next, values, None)
            yield value


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in runs of at most `_BATCH`, or of about `_BATCH_CHARACTERS`."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _scan(sources: list[TextSource], config: DataConfig) -> _Scan:
    """Reads every document once: whatever is wrong with one is found before anything is written."""
    keys, sizes, counts = [], [], []
    for source in sources:
        n = 0
        for batch in _batched(source.read()):
            encoded = [text.encode() for text in batch]
            hashes = b"".join(hashlib.sha256(text).digest()[:_N_KEY] for text in encoded)
            keys.append(np.frombuffer(hashes, "<u8").reshape(-1, _N_KEY // 8))
            sizes.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            n += len(batch)
        counts.append(n)
    key = np.concatenate(keys) if keys else np.zeros((0, _N_KEY // 8), "<u8")
    keep = find_first(key) if config.corpus.duplicates == "drop" else np.ones(len(key), bool)
    # A document is held out by its own hash, so that it stays so whatever stands beside it, and with it its doubles.
    is_valid = (key[:, 0] & (_SHARES - 1)) < config.corpus.valid_fraction * _SHARES
    corpus = np.repeat(np.arange(len(sources), dtype=np.int32), counts)
    return _Scan(corpus, np.concatenate(sizes) if sizes else np.zeros(0, np.int64), keep, is_valid)


def find_first(key: np.ndarray) -> np.ndarray:
    """`[N]` bool, where no row before is equal. Args: `[N, 2]`, a hash of each document."""
    order = np.lexsort((key[:, 1], key[:, 0]))  # stable: of equal ones the first one comes first
    is_new = np.ones(len(key), bool)
    is_new[order[1:]] = np.any(key[order[1:]] != key[order[:-1]], axis=1)
    return is_new


def _require_training(sources: list[TextSource], scan: _Scan, config: DataConfig) -> None:
    """Raises: InputError, where nothing is left to train on, of all corpora or of one that has a weight."""
    trained = np.bincount(scan.corpus[scan.keep & ~scan.is_valid], minlength=len(sources))
    if not trained.any():
        raise InputError(f"{config.corpus.path or 'config.data.corpus.sources'}: no document is left to train on")
    for source, n in zip(sources, trained.tolist(), strict=True):
        if source.weight and not n:
            raise InputError(f"config.data.corpus.sources: {source.name}: no document is left to train on")


def _find_end(tokenizer: TextTokenizer, path: Path | None) -> int:
    """The id of `END`. Args: the file that the tokenizer is of. Raises InputError where there is none."""
    try:
        return tokenizer.id_of(END)
    except InputError as error:
        raise InputError(f"{path}: {error}, and it ends each document") from None


def _write(
    folder: Path, config: DataConfig, sources: list[TextSource], scan: _Scan, tokenizer: TextTokenizer, end: int
) -> TextMeta:
    """Encodes the documents that are kept. Raises: InputError, where there are others now than at the first reading."""
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    n_bytes, found, lengths = scan.n_bytes[scan.keep], hashlib.sha256(), []
    sizes, done = iter(n_bytes.tolist()), 0
    kept = itertools.compress(_read_all(sources), scan.keep.tolist())
    with TokenWriter(folder, int(n_bytes.sum()), config.n_shards, dtype) as writer:
        for batch in _ahead(_batched(kept)):
            offsets, ids = tokenizer.encode_batch(batch)
            ids = np.insert(ids, offsets[1:], end).astype("<i4")
            length = np.diff(offsets) + 1
            done += len(batch)
            if [len(text.encode()) for text in batch] != list(itertools.islice(sizes, len(batch))):
                raise InputError(f"{config.corpus.path or 'config.data.corpus.sources'}: has changed while it was read")
            writer.write(np.split(ids, np.cumsum(length)[:-1]), n_bytes[done - len(batch) : done].tolist())
            found.update(ids.tobytes())
            lengths.append(length)
    n_tokens = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    if len(n_tokens) != len(n_bytes):
        raise InputError(f"{config.corpus.path or 'config.data.corpus.sources'}: has changed while it was read")
    columns = {
        "corpus": scan.corpus[scan.keep], "n_tokens": n_tokens, "n_bytes": n_bytes, "is_valid": scan.is_valid[scan.keep]
    }  # fmt: skip
    for values in columns.values():
        found.update(np.ascontiguousarray(values).tobytes())
    write_documents_table(folder, columns)
    tokenizer.save(folder / TOKENIZER)
    return TextMeta(
        corpora=tuple(_count(source, k, scan, columns) for k, source in enumerate(sources)),
        source=describe_text_source(config),
        tokenizer_sha256=hashlib.sha256(tokenizer.content).hexdigest(),
        end=end,
        sha256=found.hexdigest(),
        token_bytes=dtype.itemsize,
        shards=writer.shards,
    )


def _count(source: TextSource, k: int, scan: _Scan, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    own = columns["corpus"] == k
    return {
        "name": source.name,
        "weight": source.weight,
        "n_documents": int(own.sum()),
        "n_tokens": int(columns["n_tokens"][own].sum()),
        "n_bytes": int(columns["n_bytes"][own].sum()),
        "n_valid": int(columns["is_valid"][own].sum()),
        "n_duplicates": int(np.sum((scan.corpus == k) & ~scan.keep)),
    }
