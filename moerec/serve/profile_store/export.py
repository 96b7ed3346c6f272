"""Writes an .npz file array by array, and the states piece by piece. No pickle."""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moerec.files import replacing
from moerec.serve.profile_store.layout import StoreLayout

_BLOCK_BYTES = 1 << 26

Reader = Callable[[int, int], np.ndarray]  # users from, users to -> uint8 [n, bytes of a state]


def encode_ids(names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `id_bytes` and `id_offsets`. An array of unicode would give each id the room of the longest."""
    texts = [name.encode() for name in names]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return {"id_bytes": np.frombuffer(b"".join(texts), np.uint8), "id_offsets": offsets}


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], layout: StoreLayout, read: Reader) -> None:
    """Writes `arrays`, then `states/NAME` [N, ...] of as many users; whoever reads `path` sees a whole file."""
    n_users = len(arrays["versions"])
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        for k, leaf in enumerate(layout.leaves):
            with archive.open(f"states/{leaf.name}.npy", "w", force_zip64=True) as member:
                _write_leaf(member, layout, k, n_users, read)


def _write_leaf(member, layout: StoreLayout, k: int, n_users: int, read: Reader) -> None:
    """The states are read once for each leaf, since a member is written in one go."""
    leaf = layout.leaves[k]
    dtype = np.dtype(np.float32 if leaf.dtype == "bfloat16" else leaf.dtype)
    descr = np.lib.format.dtype_to_descr(dtype)
    shape = (n_users, *leaf.shape)
    np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
    step = max(_BLOCK_BYTES // layout.n_bytes, 1)
    for lo in range(0, n_users, step):
        values = layout.unpack(read(lo, min(lo + step, n_users)))[k]
        member.write(values.astype(dtype, copy=False).tobytes())
