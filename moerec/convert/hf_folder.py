"""Folders of weights as Hugging Face keeps them: checked as a whole, then read row by row in little memory.

The format of a file (https://huggingface.co/docs/safetensors): 8 bytes, little-endian, for the header's length; the
header, a JSON object with the dtype, shape and place of each tensor; the tensors' bytes without gaps. Where there are
several files, an index says which one has a tensor.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moerec.errors import InputError
from moerec.files import parse_json, read_json

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
DTYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
LENGTH_BYTES = 8  # of the header's length, in front of it

_QUANTISED = ("I", "U", "F8_", "F6_", "F4")  # how dtypes of weights begin that mean nothing without their scales
_MOST_HEADER_BYTES = 100_000_000
_MOST_DIMS = 8
_PICKLED = re.compile(r"(pytorch_model|model|consolidated).*\.(bin|pth?|ckpt)(\.index\.json)?")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `stop` (not included) of `file`, one row of axis 0 after another."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Of axis 0; a tensor without axes is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return (self.stop - self.start) // self.n_rows


@dataclasses.dataclass(frozen=True)
class HFFolder:
    """A folder of which everything but the numbers has been checked.

    Attributes:
      config: what `config.json` holds. tensors: by name, in the order of the files.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first <= r < last` of axis 0, a copy of the caller's own.

        They are read from their place in the file, not mapped: mapped pages would count as memory in use.

        Raises:
          InputError: there is no such tensor or row, or the file can no longer be read.
        """
        info = self.tensors.get(name)
        if info is None:
            raise InputError(f"{self.path}: has no tensor {quote(name)}")
        if not 0 <= first <= last <= info.n_rows:
            raise InputError(f"{info.file}: tensor {quote(name)} has {info.n_rows} rows, not those of {first}:{last}")
        rows = np.empty((last - first) * info.row_bytes, np.uint8)
        _fill(rows.data, info.file, info.start + first * info.row_bytes)
        return rows.view(info.dtype).reshape(last - first, *info.shape[1:])

    def iter_blocks(self, name: str, max_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """All rows of a tensor in order: `(first row, rows)`, at most `max_bytes` at a time, but at least one row.

        Raises:
          InputError: as `read_rows`.
        """
        info = self.tensors.get(name)
        if info is None:
            raise InputError(f"{self.path}: has no tensor {quote(name)}")
        step = max(1, max_bytes // info.row_bytes)
        for first in range(0, info.n_rows, step):
            yield first, self.read_rows(name, first, min(first + step, info.n_rows))


def open_folder(path: Path) -> HFFolder:
    """Checks the files of a folder against each other, and every tensor's place; reads none.

    Raises:
      InputError: the folder or a file is missing or damaged, the files are not those of one model, or their tensors are
        of a dtype that is not read; in one line with the file and, where it is about one, the tensor.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: {'is no folder' if path.exists() else 'no such folder'}")
    config = read_json(path / CONFIG_NAME, missing="no such file; it has to tell what the model is")
    index = path / INDEX_NAME
    found = {entry for entry in os.listdir(path) if entry.endswith(SUFFIX)}
    if os.path.lexists(index):
        places, total_size = _read_index(index)
        files, reason = sorted(set(places.values())), f"is none of the files that {INDEX_NAME} names"
    elif SINGLE_NAME in found:
        places, total_size, files = None, None, [SINGLE_NAME]
        reason = f"lies beside {SINGLE_NAME}, and there is no {INDEX_NAME} that names both"
    else:
        raise InputError(f"{path}: {_explain_no_weights(path)}")
    strays = sorted(found - set(files))
    if strays:
        raise InputError(f"{path}: {quote(strays[0])} {reason}; are there weights of two models?")
    tensors = _collect(path, files, places)
    n_bytes = sum(info.stop - info.start for info in tensors.values())
    if total_size is not None and total_size != n_bytes:
        raise InputError(f"{index}: metadata.total_size is {total_size}, but the tensors have {n_bytes} bytes")
    return HFFolder(path, config, tensors)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copies those of `SIDE_FILES` that are there, byte for byte and not as links. Returns their names.

    Raises:
      InputError: there is no such folder, or one of the files is a link to nothing, or no file.
    """
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    names = [name for name in SIDE_FILES if os.path.lexists(source / name)]
    for name in names:
        _measure(source / name)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def quote(value: Any) -> str:
    """A value from a file as JSON on one line, cut where it is long."""
    text = json.dumps(value, default=str).replace("\x7f", "\\u007f")
    return text if len(text) <= 120 else f"{text[:120]}..."


def require_file_name(name: Any, told_by: Path) -> None:
    """Refuses what is not the plain name of a file for weights, such as a path out of the folder. Raises InputError."""
    plain = isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name) and ".." not in name
    if not plain or not name.endswith(SUFFIX):
        raise InputError(f"{told_by}: {quote(name)} is not the name of a {SUFFIX} file in the folder itself")


def _explain_no_weights(path: Path) -> str:
    names = sorted(os.listdir(path))
    if any(name.endswith(SUFFIX) for name in names):
        return f"has {SUFFIX} files, but neither {SINGLE_NAME} nor {INDEX_NAME}"
    pickles = [name for name in names if _PICKLED.fullmatch(name)]
    if pickles:
        return f"has its weights in {quote(pickles[0])} alone; pickles are not read, save them as {SUFFIX}"
    return f"holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}"


def _read_index(path: Path) -> tuple[dict[str, str], int | None]:
    """`(file of each tensor, bytes of all tensors or None)` that an index tells."""
    index = read_json(path, missing="is a link to nothing")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{path}: weight_map must be an object with a file for each tensor")
    for name, file in places.items():
        if not isinstance(file, str):
            raise InputError(f"{path}: weight_map has {quote(file)} for tensor {quote(name)}, which is no file name")
        require_file_name(file, path)
    metadata = index.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return places, total_size if type(total_size) is int else None


def _collect(folder: Path, files: list[str], places: dict[str, str] | None) -> dict[str, TensorInfo]:
    """The tensors of all files, each in the file where the index has it."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in _read_header(folder / file):
            where = f"{info.file}: tensor {quote(info.name)}"
            if info.name in tensors:
                raise InputError(f"{where} is in {tensors[info.name].file.name}, too")
            if places is not None and info.name not in places:
                raise InputError(f"{where} is not in {INDEX_NAME}")
            if places is not None and places[info.name] != file:
                raise InputError(f"{where} is in this file, but {INDEX_NAME} has it in {places[info.name]}")
            tensors[info.name] = info
    for name, file in (places or {}).items():
        if name not in tensors:
            raise InputError(f"{folder / file}: lacks tensor {quote(name)}, which {INDEX_NAME} has there")
    return tensors


def _measure(path: Path) -> int:
    """Bytes of a file, whose link is followed. Raises InputError where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: {'is a link to nothing' if os.path.islink(path) else 'no such file'}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: is no file")
    return found.st_size


def _read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a file in the order of their bytes, which are all of it that is not the header."""
    n_bytes = _measure(path)
    head = bytearray(min(n_bytes, LENGTH_BYTES))
    _fill(memoryview(head), path, 0)
    length = int.from_bytes(head, "little")
    if n_bytes < LENGTH_BYTES or length > min(n_bytes - LENGTH_BYTES, _MOST_HEADER_BYTES):
        told = f", its header would have {length}" if n_bytes >= LENGTH_BYTES else ""
        raise InputError(f"{path}: is damaged or no {SUFFIX} file: it has {n_bytes} bytes{told}")
    text = bytearray(length)
    _fill(memoryview(text), path, LENGTH_BYTES)
    header = _parse_header(path, bytes(text))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ of its header must be an object of strings")
    if not header:
        raise InputError(f"{path}: holds no tensors")
    base = LENGTH_BYTES + length
    infos = [_parse_entry(path, base, name, entry) for name, entry in header.items()]
    infos.sort(key=lambda info: info.start)
    stop = base
    for info in infos:
        if info.start != stop:
            fault = "begins before the one in front of it ends" if info.start < stop else "leaves a gap in front of it"
            raise InputError(f"{path}: tensor {quote(info.name)} {fault}: at byte {info.start}, not {stop}")
        stop = info.stop
    if stop > n_bytes:
        cut = next(info.name for info in infos if info.stop > n_bytes)
        raise InputError(f"{path}: is cut off in tensor {quote(cut)}: it has {n_bytes} bytes, its header says {stop}")
    if stop < n_bytes:
        raise InputError(f"{path}: {n_bytes - stop} bytes follow the last tensor {quote(infos[-1].name)}")
    return infos


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        if text[:1] != b"{":
            raise ValueError("it does not begin with {")
        parse_json(text)
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_make_object, parse_int=_parse_int)
    except ValueError as error:
        raise InputError(f"{path}: its header is no JSON object of tensors ({error})") from None
    return header


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What is twice in an object would be read by others as the one or the other."""
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"it has {quote(name)} twice")
        value[name] = item
    return value


def _parse_int(digits: str) -> int | float:
    """As other readers of the format do: minus zero is no integer."""
    return int(digits) if digits != "-0" else -0.0


def _parse_entry(path: Path, base: int, name: str, entry: Any) -> TensorInfo:
    """One tensor of a header, whose places count from byte `base` of the file."""
    where = f"{path}: tensor {quote(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        hint = "; quantised weights are not read" if str(kind).startswith(_QUANTISED) else ""
        raise InputError(f"{where} is of dtype {quote(kind)}; {', '.join(DTYPES)} are read{hint}")
    if not _are_sizes(shape, 1) or len(shape) > _MOST_DIMS:
        raise InputError(f"{where} has the shape {quote(shape)}, not at most {_MOST_DIMS} whole numbers of 1 or more")
    if not _are_sizes(offsets, 0) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where} has data_offsets {quote(offsets)}, not its first byte and the one after its last")
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes != offsets[1] - offsets[0]:
        has = f"data_offsets {quote(offsets)}, which are {offsets[1] - offsets[0]} bytes"
        raise InputError(f"{where} of dtype {kind} and shape {quote(shape)} has {n_bytes} bytes, but {has}")
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0], base + offsets[1])


def _are_sizes(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= least for value in values)


def _fill(buffer: memoryview, path: Path, offset: int) -> None:
    """Reads bytes of a file from `offset` on, as many as `buffer` takes."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while len(buffer):
                n_read = os.preadv(file, [buffer], offset)
                if not n_read:
                    raise InputError(f"{path}: has become shorter since it was checked")
                buffer, offset = buffer[n_read:], offset + n_read
        finally:
            os.close(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
