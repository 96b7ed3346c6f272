"""Folders of weights written as Hugging Face keeps them, block after block; whole or not at all."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moerec.convert.hf_folder import (
    CONFIG_NAME,
    DTYPES,
    INDEX_NAME,
    LENGTH_BYTES,
    SINGLE_NAME,
    SUFFIX,
    copy_side_files,
    quote,
    require_file_name,
)
from moerec.errors import InputError, WorkError
from moerec.files import making_folder, naming, write_json

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes; tensors that are mapped must begin at a multiple of their numbers' size


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor to write, and the `file` of the folder that it goes into."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: str = SINGLE_NAME

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def plan_files(sizes: Mapping[str, int], max_bytes: int) -> dict[str, str]:
    """The file of each tensor, in order, so that a file has at most `max_bytes` of them, or a single larger one.

    Args: sizes: bytes of each tensor, by name.
    """
    shards: list[int] = []
    room = 0
    n_shards = 0
    for n_bytes in sizes.values():
        if n_bytes > room or not n_shards:
            n_shards, room = n_shards + 1, max_bytes
        room -= n_bytes
        shards.append(n_shards)
    if n_shards <= 1:
        return dict.fromkeys(sizes, SINGLE_NAME)
    names = (f"model-{shard:05d}-of-{n_shards:05d}{SUFFIX}" for shard in shards)
    return dict(zip(sizes, names, strict=True))


def write_folder(
    target: Path,
    tensors: Sequence[TensorPlan],
    blocks: Callable[[str], Iterator[np.ndarray]],
    config: Mapping[str, Any],
    side_files_from: Path | None = None,
    files: Mapping[str, bytes] = {},
) -> None:
    """Writes weights, index, `config.json` and side files into a new folder, which takes its name when all is there.

    Args:
      target: does not exist yet, or is an empty folder.
      tensors: within a file they lie in this order.
      blocks: of a tensor's name, arrays of its dtype whose bytes, one after another, are the tensor's.
      side_files_from: the folder whose `SIDE_FILES` are copied. files: further ones, by name.

    Raises:
      InputError: there is something at `target`, or `tensors` make no folder.
      WorkError: the blocks of a tensor are not what was planned, or a file cannot be written.
    """
    target = Path(target)
    _check_plans(target, tensors)
    with making_folder(target) as temporary:
        by_file: dict[str, list[TensorPlan]] = {}
        for plan in tensors:
            by_file.setdefault(plan.file, []).append(plan)
        for file, plans in by_file.items():
            _write_file(temporary / file, target / file, plans, blocks)
        if by_file.keys() != {SINGLE_NAME}:
            total_size = sum(plan.n_bytes for plan in tensors)
            places = {plan.name: plan.file for plan in tensors}
            write_json(temporary / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": places})
        write_json(temporary / CONFIG_NAME, config)
        if side_files_from is not None:
            copy_side_files(Path(side_files_from), temporary)
        for name, content in files.items():
            with naming(target / name):
                (temporary / name).write_bytes(content)


def _check_plans(target: Path, tensors: Sequence[TensorPlan]) -> None:
    """Refuses what could not be read again."""
    if not tensors:
        raise InputError(f"{target}: no tensors are to be written")
    seen: set[str] = set()
    for plan in tensors:
        require_file_name(plan.file, target)
        where = f"{target / plan.file}: tensor {quote(plan.name)}"
        if plan.name in seen or plan.name == "__metadata__":
            raise InputError(f"{where} {'is there twice' if plan.name in seen else 'has a name that is taken'}")
        if plan.dtype not in _KINDS:
            raise InputError(f"{where} is of dtype {plan.dtype}; {', '.join(map(str, _KINDS))} are written")
        if min(plan.shape, default=1) < 1:
            raise InputError(f"{where} has the shape {quote(plan.shape)} and so no numbers")
        seen.add(plan.name)


def _write_file(
    path: Path, shown: Path, plans: Sequence[TensorPlan], blocks: Callable[[str], Iterator[np.ndarray]]
) -> None:
    """Args: shown: the file's later place, for messages."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it, other libraries refuse the file
    stop = 0
    for plan in plans:
        start, stop = stop, stop + plan.n_bytes
        header[plan.name] = {"dtype": _KINDS[plan.dtype], "shape": list(plan.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with naming(shown), path.open("xb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for plan in plans:
            for block in _check_blocks(shown, plan, blocks(plan.name)):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _check_blocks(shown: Path, plan: TensorPlan, blocks: Iterator[np.ndarray]) -> Iterator[memoryview]:
    """The bytes of each block. Raises WorkError where they are not those of the plan."""
    where = f"{shown}: tensor {quote(plan.name)}"
    left = plan.n_bytes
    for block in blocks:
        if block.dtype != plan.dtype:
            raise WorkError(f"{where} was to be {plan.dtype}, but a block of it is {block.dtype}")
        left -= block.nbytes
        if left < 0:
            raise WorkError(f"{where} was to have {plan.n_bytes} bytes, but has {plan.n_bytes - left} or more")
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
    if left:
        raise WorkError(f"{where} was to have {plan.n_bytes} bytes, but has {plan.n_bytes - left}")
