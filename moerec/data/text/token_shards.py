"""The prepared folder of documents: token ids in ArrayRecord shards, read by position, and each document's counts.

    meta.json                corpora, sources and tokenizer, with checksums of the following files; written last
    tokenizer.json           that the ids are of
    documents.parquet        corpus, n_tokens, n_bytes (of the text, UTF-8) and is_valid (held out) of each document
    tokens-0000k.array_record

The documents' tokens, each document closed by the end of documents, stand one behind another in little-endian uint16,
or uint32 where the vocabulary needs it. A record has up to `RECORD_TOKENS` tokens of one document, so that a row is
read without the rest of a book. The folder appears under its name only when it is whole.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from moerec.data.prepare.checksums import describe_file, require_intact, sum_fields
from moerec.data.prepare.shards import META
from moerec.errors import InputError, WorkError
from moerec.files import naming, read_json, require_utf8, to_plain

FORMAT_VERSION, KIND = 1, "text"  # `KIND` tells the folder from that of tables
TOKENIZER, DOCUMENTS = "tokenizer.json", "documents.parquet"
RECORD_TOKENS = 4096


class TokenArray(Protocol):
    """Random access to the tokens of a corpus."""

    def read(self, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """int32 tokens of `[n]` runs, one run behind another. Args: positions among all tokens; tokens of each run."""
        ...


class MemoryTokens:
    """Tokens held in memory, in the bytes that the folder has of each."""

    def __init__(self, ids: np.ndarray):
        self._ids = ids

    def read(self, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        return self._ids[_spell_out(start, length)].astype(np.int32)


class ShardTokens:
    """Tokens read from the shards as they are needed: in memory is the first token's position of each record."""

    def __init__(self, records: grain.sources.ArrayRecordDataSource, record_start: np.ndarray, dtype: np.dtype):
        """Args: `[records + 1]` int64 positions, the last one that of the end."""
        self._records, self._start, self._dtype = records, record_start, dtype

    def read(self, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = start[length > 0], length[length > 0]
        if not len(start):
            return np.zeros(0, np.int32)
        first = np.searchsorted(self._start, start, side="right") - 1
        last = np.searchsorted(self._start, start + length, side="left") - 1
        wanted = np.unique(_spell_out(first, last - first + 1))
        read = b"".join(self._records.__getitems__(wanted.tolist()))
        ids = np.frombuffer(read, self._dtype)
        # Where each record that was read begins among what was read, less where it begins among all tokens.
        n_tokens = self._start[wanted + 1] - self._start[wanted]
        shift = np.cumsum(n_tokens) - n_tokens - self._start[wanted]
        position = _spell_out(start, length)
        record = np.searchsorted(self._start, position, side="right") - 1
        return ids[position + shift[np.searchsorted(wanted, record)]].astype(np.int32)


def _spell_out(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as its length, one run behind another."""
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(int(length.sum()))


def list_records(n_tokens: np.ndarray) -> np.ndarray:
    """`[records + 1]` int64, where each record begins among all tokens, and the end. Args: tokens of each document."""
    n_records = -(-n_tokens // RECORD_TOKENS)
    place = _spell_out(np.zeros(len(n_tokens), np.int64), n_records)
    begin = np.cumsum(n_tokens) - n_tokens
    return np.append(np.repeat(begin, n_records) + place * RECORD_TOKENS, n_tokens.sum())


@dataclasses.dataclass(frozen=True)
class TextMeta:
    """What meta.json holds, beside a checksum of its own.

    Attributes:
      corpora: each one's name, weight (None: by size) and counts: documents, tokens, bytes, those held out, and the
        duplicates that were dropped.
      source: what it was made of, and with which config. tokenizer_sha256: of the tokenizer's bytes.
      end: the id that closes each document. sha256: of tokens, documents, sides and corpora.
      token_bytes: 2 or 4. shards, files: number of bytes and CRC-32 by name.
    """

    corpora: tuple[dict, ...]
    source: dict
    tokenizer_sha256: str
    end: int
    sha256: str
    token_bytes: int
    shards: dict[str, dict[str, int]]
    files: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    kind: str = KIND
    format_version: int = FORMAT_VERSION

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"<u{self.token_bytes}")

    def write(self, folder: Path) -> None:
        """Writes meta.json; whatever it tells of must be there already."""
        files = {name: describe_file(folder / name) for name in (TOKENIZER, DOCUMENTS)}
        fields = to_plain(dataclasses.replace(self, files=files))
        with naming(folder / META):
            content = json.dumps(fields | {"crc32": sum_fields(fields)}, ensure_ascii=False, indent=1)
            (folder / META).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TextMeta":
        """Raises InputError where the folder is not a whole prepared one of documents, of this version."""
        require_utf8(folder)
        path = Path(folder) / META
        if not path.is_file():
            raise InputError(f"{folder}: not a prepared folder, or not a whole one: it has no {META}")
        fields = read_json(path)
        if fields.get("kind") != KIND:
            raise InputError(f"{folder}: holds no documents of text; data.source=prepared reads tables")
        if fields.get("format_version") != FORMAT_VERSION:
            told = f"format version {fields.get('format_version')}, not {FORMAT_VERSION}"
            raise InputError(f"{path}: {told}; prepare again")
        if fields.pop("crc32", None) != sum_fields(fields):
            raise InputError(f"{path}: is damaged: its checksum is not its own; prepare the folder again")
        try:
            return cls(**fields | {"corpora": tuple(fields["corpora"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: not a description of a prepared folder ({error!r})") from error

    def require_intact(self, folder: Path) -> None:
        """Checks all files, each once in a process. Raises InputError, which names the one that is not as written."""
        require_intact(folder, self.shards | self.files, META)


class TokenWriter:
    """Writes documents in order into shards of about equal size. A context; `shards` describes the files after it."""

    def __init__(self, folder: Path, n_bytes: int, n_shards: int, dtype: np.dtype):
        """Args: bytes of all texts, of which each shard takes its part."""
        self._folder, self._dtype = folder, dtype
        self._share, self._seen = n_bytes / n_shards, 0
        self._paths: list[Path] = []
        self._writer: ArrayRecordWriter | None = None

    def write(self, documents: Iterable[np.ndarray], n_bytes: Iterable[int]) -> None:
        """Appends documents, given as ids with their ends, and the bytes of their texts."""
        for ids, size in zip(documents, n_bytes, strict=True):
            if self._writer is None or self._seen >= len(self._paths) * self._share:
                self._open()
            content = ids.astype(self._dtype).tobytes()
            step = RECORD_TOKENS * self._dtype.itemsize
            for first in range(0, len(content), step):
                self._writer.write(content[first : first + step])  # type: ignore[union-attr]
            self._seen += size
        if self._writer is not None and not self._writer.ok():  # `write` alone tells nothing of a full disk
            self._close()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind, *error):
        with contextlib.nullcontext() if kind is None else contextlib.suppress(WorkError):
            self._close()

    @property
    def shards(self) -> dict[str, dict[str, int]]:
        return {path.name: describe_file(path) for path in self._paths}

    def _open(self) -> None:
        self._close()
        self._paths.append(self._folder / f"tokens-{len(self._paths):05d}.array_record")
        # grain reads single records only from groups of one
        self._writer = ArrayRecordWriter(str(self._paths[-1]), "group_size:1,uncompressed")

    def _close(self) -> None:
        """Raises WorkError where not all could be written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except RuntimeError as error:
                raise WorkError(f"{self._paths[-1]}: cannot be written: {str(error).split(';')[0]}") from error


def write_documents_table(folder: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes documents.parquet: corpus, n_tokens, n_bytes, is_valid."""
    with naming(folder / DOCUMENTS):
        pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), folder / DOCUMENTS)


def read_documents_table(folder: Path) -> dict[str, np.ndarray]:
    """The columns of documents.parquet. Raises InputError where it cannot be read."""
    path = folder / DOCUMENTS
    try:
        table = pq.read_table(path.absolute())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    return {name: table[name].combine_chunks().to_numpy(zero_copy_only=False) for name in table.schema.names}


def open_tokens(folder: Path, meta: TextMeta, n_tokens: np.ndarray, in_memory: bool) -> TokenArray:
    """The tokens of a folder, read into memory or as they are needed. Args: tokens of each document.

    Raises:
      InputError: the shards hold other records than the documents have.
    """
    paths, start = [str(folder / name) for name in meta.shards], list_records(n_tokens)
    if in_memory:
        ids, done = np.empty(int(start[-1]), meta.dtype), 0
        for path in paths:
            reader = ArrayRecordReader(path)
            part = np.frombuffer(b"".join(reader.read_all()), meta.dtype)
            reader.close()
            ids[done : done + len(part)] = part[: len(ids) - done]
            done += len(part)
        if done != len(ids):
            raise InputError(f"{folder}: the shards hold {done} tokens, unlike {DOCUMENTS}")
        return MemoryTokens(ids)
    records = grain.sources.ArrayRecordDataSource(paths)
    if len(records) != len(start) - 1:
        raise InputError(f"{folder}: the shards hold {len(records)} records, unlike {DOCUMENTS}")
    return ShardTokens(records, start, meta.dtype)
