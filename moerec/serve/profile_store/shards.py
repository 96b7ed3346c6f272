"""The states: a Zarr v3 array uint8 [rows, bytes of a state] in shards of users, read by TensorStore.

A shard is `sharding_indexed`, its chunks uncompressed, all present, in order: a row lies at a fixed place, and the
index at the end of the file says so and never changes. A free row is zeros.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from moerec.errors import WorkError
from moerec.serve.profile_store.journal import FileWrite, sync, write_all
from moerec.serve.profile_store.layout import StoreLayout

STATES = "states"
_RAW = [{"name": "bytes"}]
_RAW_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}]


class Shards:
    """The array of one open store. Growing and writing need the lock exclusively, reading needs it shared."""

    def __init__(self, folder: Path, layout: StoreLayout):
        self._folder, self._n_bytes = folder / STATES, layout.n_bytes
        self._per_shard, self._per_chunk = layout.users_per_shard, layout.users_per_chunk
        self._spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self._folder}/"}}
        # Nothing is cached: rows are overwritten in place, faster than the time stamps that TensorStore would trust.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._array: Any = None

    def create(self) -> None:
        """Makes the array, without rows."""
        self._folder.mkdir()
        ts.open(self._spec | {"metadata": self._metadata()}, create=True).result()

    def grow(self, n_rows: int) -> None:
        """Makes room for rows below `n_rows`. What is there already stays, so it may be done twice."""
        if self._reach(n_rows).shape[0] >= n_rows:
            return
        n_shards = -(-n_rows // self._per_shard)
        for shard in range(self._array.shape[0] // self._per_shard, n_shards):
            if not self._path(shard).exists():  # a writer was killed before it could tell of this one
                self._make_shard(self._path(shard))
        bounds = [n_shards * self._per_shard, self._n_bytes]
        self._array = self._array.resize(exclusive_max=bounds, expand_only=True, resize_metadata_only=True).result()

    def check(self, n_rows: int) -> None:
        """Raises WorkError where a shard of the first `n_rows` rows is missing or cut: it would read as zeros."""
        size = self._per_shard * self._n_bytes + self._index().nbytes
        for shard in range(-(-n_rows // self._per_shard)):
            path = self._path(shard)
            if not path.is_file() or path.stat().st_size != size:
                raise WorkError(f"{path}: missing or not of {size} bytes")

    def read(self, rows: np.ndarray) -> np.ndarray:
        """States uint8 [P, n_bytes] of rows int64 [P]."""
        if not len(rows):
            return np.zeros((0, self._n_bytes), np.uint8)
        return self._reach(int(rows.max()) + 1)[rows].read().result()

    def plan(self, rows: np.ndarray, states: np.ndarray) -> Iterator[FileWrite]:
        """The writes that give rows (int64 [P], ascending) their `states`, uint8 [P, n_bytes], contiguous."""
        shard, place = np.divmod(rows, self._per_shard)
        first = np.flatnonzero(np.concatenate([[True], shard[1:] != shard[:-1]])).tolist()
        for lo, hi in zip(first, [*first[1:], len(rows)], strict=True):
            file = f"{STATES}/{self._path(int(shard[lo])).name}"
            lengths = np.full(hi - lo, self._n_bytes, np.int64)
            yield FileWrite(file, place[lo:hi] * self._n_bytes, lengths, states[lo:hi].reshape(-1))

    def _path(self, shard: int) -> Path:
        return self._folder / f"c.{shard}.0"

    def _reach(self, n_rows: int) -> Any:
        """The array; opened anew where it is too short, since another process may have made it grow."""
        if self._array is None or self._array.shape[0] < n_rows:
            try:
                self._array = ts.open(self._spec, context=self._context).result()
            except ValueError as error:
                raise WorkError(f"{self._folder}: {str(error).splitlines()[0]}") from error
        return self._array

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

    def _make_shard(self, path: Path) -> None:
        """Zeros, which take no room on disk, and the index."""
        temporary = path.with_name(path.name + ".tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(handle, memoryview(self._index().tobytes()), self._per_shard * self._n_bytes)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.rename(temporary, path)
        sync(path.parent)
