"""The states: a Zarr v3 array uint8 [rows, bytes of a state] in shards of users, read by TensorStore.

A shard is `sharding_indexed`, its chunks uncompressed, all present, in order: a row lies at a fixed place, and the
index at the end of the file says so and never changes. A free row is zeros.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from moerec.errors import WorkError
from moerec.files import naming, parse_json
from moerec.serve.profile_store.folder import STATES, name_shard, open_file, open_parent
from moerec.serve.profile_store.journal import FileWrite, write_all
from moerec.serve.profile_store.layout import StoreLayout

ARRAY = f"{STATES}/zarr.json"
_RAW = [{"name": "bytes"}]
_RAW_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}]


class Shards:
    """The array of one open store. Growing and writing need the lock exclusively, reading needs it shared."""

    def __init__(self, folder: Path, layout: StoreLayout):
        self._folder, self._n_bytes = folder, layout.n_bytes
        self._per_shard, self._per_chunk = layout.users_per_shard, layout.users_per_chunk
        self._spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / STATES}/"}}
        # Nothing is cached: rows are overwritten in place, faster than the time stamps that TensorStore would trust.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._array: Any = None

    def create(self) -> None:
        """Makes the array, without rows. Raises WorkError where the disk is full."""
        (self._folder / STATES).mkdir()
        made = ts.Context()  # has a memory of its own; files are written by us alone
        spec = self._spec | {"kvstore": {"driver": "memory"}, "metadata": self._metadata()}
        ts.open(spec, create=True, context=made).result()
        self._replace(ARRAY, ts.KvStore.open({"driver": "memory"}, context=made).result()["zarr.json"])

    def grow(self, n_rows: int) -> None:
        """Makes room for rows below `n_rows`. What is there already stays, so it may be done twice."""
        if self._reach(n_rows).shape[0] >= n_rows:
            return
        n_shards = -(-n_rows // self._per_shard)
        for shard in range(self._array.shape[0] // self._per_shard, n_shards):
            if self._size_of(shard) is None:  # else a writer was killed before it could tell of this one
                # Zeros, which take no room on disk, and the index.
                self._replace(name_shard(shard), self._index().tobytes(), self._per_shard * self._n_bytes)
        with open_file(self._folder, ARRAY, os.O_RDONLY) as handle, open(handle, "rb", closefd=False) as file:
            data = file.read()
        with self._told():  # TensorStore has just read it, too, but it may have changed
            array = parse_json(data)
            if not isinstance(array, dict):
                raise ValueError("zarr.json holds no JSON object")
        array["shape"] = [n_shards * self._per_shard, self._n_bytes]
        self._replace(ARRAY, json.dumps(array).encode())
        self._array = None

    def check(self, n_rows: int) -> None:
        """Raises WorkError where a shard of the first `n_rows` rows is missing or cut: it would read as zeros."""
        size = self._per_shard * self._n_bytes + 16 * (self._per_shard // self._per_chunk)
        for shard in range(-(-n_rows // self._per_shard)):
            if self._size_of(shard) != size:
                raise WorkError(f"{self._folder / name_shard(shard)}: missing or not of {size} bytes")

    def read(self, rows: np.ndarray) -> np.ndarray:
        """States uint8 [P, n_bytes] of rows int64 [P]."""
        if not len(rows):
            return np.zeros((0, self._n_bytes), np.uint8)
        array = self._reach(int(rows.max()) + 1)
        with self._told():
            return array[rows].read().result()

    def plan(self, rows: np.ndarray, states: np.ndarray) -> Iterator[FileWrite]:
        """The writes that give rows (int64 [P], ascending) their `states`, uint8 [P, n_bytes], contiguous."""
        shard, place = np.divmod(rows, self._per_shard)
        first = np.flatnonzero(np.concatenate([[True], shard[1:] != shard[:-1]])).tolist()
        for lo, hi in zip(first, [*first[1:], len(rows)], strict=True):
            lengths = np.full(hi - lo, self._n_bytes, np.int64)
            offsets, data = place[lo:hi] * self._n_bytes, states[lo:hi].reshape(-1)
            yield FileWrite(name_shard(int(shard[lo])), offsets, lengths, data)

    def _size_of(self, shard: int) -> int | None:
        """Bytes of a shard's file; None where there is none."""
        try:
            with open_file(self._folder, name_shard(shard), os.O_RDONLY) as handle:
                return os.fstat(handle).st_size
        except FileNotFoundError:
            return None

    def _reach(self, n_rows: int) -> Any:
        """The array; opened anew where it is too short, since another process may have made it grow."""
        if self._array is None or self._array.shape[0] < n_rows:
            with self._told():
                array = ts.open(self._spec, context=self._context).result()
                layout = array.chunk_layout
                shapes = (layout.write_chunk.shape, layout.read_chunk.shape)
                wanted = ((self._per_shard, self._n_bytes), (self._per_chunk, self._n_bytes))
                if array.dtype != ts.uint8 or shapes != wanted or array.shape[1] != self._n_bytes:
                    raise ValueError("zarr.json describes other arrays than those of the store")
            self._array = array
        return self._array

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Within it, what TensorStore cannot do becomes WorkError."""
        try:
            yield
        except ValueError as error:
            raise WorkError(f"{self._folder / STATES}: {str(error).splitlines()[0]}") from error

    def _metadata(self) -> dict[str, Any]:
        chunks = {"chunk_shape": [self._per_chunk, self._n_bytes], "codecs": _RAW}
        index = {"index_codecs": _RAW_INDEX, "index_location": "end"}
        shards = {"chunk_shape": [self._per_shard, self._n_bytes]}
        return {
            "shape": [0, self._n_bytes],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": shards},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "sharding_indexed", "configuration": chunks | index}],
        }

    def _index(self) -> np.ndarray:
        """Place and size of each chunk."""
        size = self._per_chunk * self._n_bytes
        place = np.arange(self._per_shard // self._per_chunk) * size
        return np.stack([place, np.full(len(place), size)], axis=1).astype("<u8")

    def _replace(self, name: str, data: bytes, offset: int = 0) -> None:
        """Writes a file anew: `data` behind `offset` zeros. Raises WorkError where the disk is full."""
        temporary, path = f"{name}.tmp", self._folder / name
        with open_parent(self._folder, name) as (parent, base):
            try:
                with open_file(self._folder, temporary, os.O_WRONLY | os.O_CREAT) as handle, naming(path):
                    os.ftruncate(handle, 0)
                    write_all(handle, memoryview(data), offset)
                    os.fsync(handle)
            except WorkError:
                os.unlink(f"{base}.tmp", dir_fd=parent)
                raise
            os.rename(f"{base}.tmp", base, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
