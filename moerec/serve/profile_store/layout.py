"""What a state is: its leaves by name, shape and type, as the folder's JSON file tells; and the checks against it."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moerec.errors import InputError
from moerec.files import parse_json
from moerec.serve.profile_store.folder import META, open_file

FORMAT_VERSION = 1
_MOST_SHARD_BYTES = 1 << 46
_CHUNK_BYTES = 1 << 12
_LONGEST_NAME = 1000
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DTYPES = ("bool", *_INTEGERS, "bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a user's state."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class StoreLayout:
    """What profile_store.json holds. A user's state on disk is the bytes of the leaves, one after another.

    Attributes:
      users_per_shard: of one file; users_per_chunk of them, which divides it, are read together.
      label: what the states are, to whoever made the store.
    """

    leaves: tuple[Leaf, ...]
    users_per_shard: int
    users_per_chunk: int
    label: str = ""

    @classmethod
    def of(cls, template: Any, users_per_shard: int, label: str = "") -> "StoreLayout":
        """Chunks get as near to 4 KiB as they can. Raises InputError for what cannot be stored."""
        if users_per_shard < 1:
            raise InputError(f"users_per_shard is {users_per_shard}; at least 1 is needed")
        leaves = list_leaves_of(template)
        wanted = max(_CHUNK_BYTES // sum(leaf.n_bytes for leaf in leaves), 1)
        return cls(leaves, users_per_shard, math.gcd(users_per_shard, 1 << (wanted.bit_length() - 1)), label)

    @property
    def n_bytes(self) -> int:
        """Bytes of a user's state."""
        return sum(leaf.n_bytes for leaf in self.leaves)

    def pack(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Leaves [P, ...] in the store's order to uint8 [P, n_bytes]."""
        flat = [np.ascontiguousarray(value).reshape(-1).view(np.uint8) for value in values]
        parts = [part.reshape(-1, leaf.n_bytes) for part, leaf in zip(flat, self.leaves, strict=True)]
        return np.concatenate(parts, axis=1)

    def unpack(self, states: np.ndarray) -> list[np.ndarray]:
        """The reverse of `pack`."""
        values, lo = [], 0
        for leaf in self.leaves:
            part = np.ascontiguousarray(states[:, lo : lo + leaf.n_bytes])
            values.append(part.view(np.dtype(leaf.dtype)).reshape(len(states), *leaf.shape))
            lo += leaf.n_bytes
        return values

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> "StoreLayout":
        """Raises InputError where the folder is not a profile store of this version."""
        path = folder / META
        try:
            with open_file(folder, META, os.O_RDONLY) as handle, open(handle, "rb", closefd=False) as file:
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{folder}: not a profile store: it has no {META}") from None
        try:
            fields = parse_json(data)
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise InputError(f"{path}: format version {version!r} is unknown; this program knows {FORMAT_VERSION}")
            leaves = tuple(Leaf(**leaf | {"shape": tuple(leaf["shape"])}) for leaf in fields["leaves"])
            layout = cls(leaves, fields["users_per_shard"], fields["users_per_chunk"], fields.get("label", ""))
            if not layout._is_sound():
                raise ValueError("a leaf, or the number of users in a shard or chunk, makes no sense")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a description of a profile store ({error!r})") from error
        return layout

    def _is_sound(self) -> bool:
        sizes = [self.users_per_shard, self.users_per_chunk]
        sizes += [size for leaf in self.leaves for size in leaf.shape]
        names = [leaf.name for leaf in self.leaves]
        return (
            len(names) > 0
            and all(type(size) is int and size > 0 for size in sizes)
            and all(isinstance(leaf.dtype, str) and leaf.dtype in DTYPES for leaf in self.leaves)
            and all(isinstance(name, str) and is_leaf_name(name) for name in names)
            and len(set(names)) == len(names)
            and isinstance(self.label, str)
            and self.users_per_shard % self.users_per_chunk == 0
            and self.users_per_shard * self.n_bytes < _MOST_SHARD_BYTES
        )

    def check_template(self, template: Any, place: str) -> None:
        """Raises InputError, which names `place` and the leaf, where `template` is not a state of this store."""
        own, other = ({leaf.name: leaf for leaf in leaves} for leaves in (self.leaves, list_leaves_of(template)))
        for name in {**own, **other}:
            if name not in other:
                raise InputError(f"{place}: leaf {name} of the store is not in the template")
            if name not in own:
                raise InputError(f"{place}: leaf {name} of the template is not in the store")
            if str(own[name]) != str(other[name]):
                raise InputError(f"{place}: leaf {name} is {own[name]} in the store, {other[name]} in the template")

    def check_states(self, ids: Sequence[str], states: Any) -> list[np.ndarray]:
        """The leaves [P, ...] of `states` in the store's order.

        Raises InputError, which names the leaf, where they do not fit the store, or the user, where they are not
        finite.
        """
        given = flatten_state(states)
        unknown = given.keys() - {leaf.name for leaf in self.leaves}
        if unknown:
            raise InputError(f"leaf {min(unknown)} of the states is not in the store")
        found = []
        for leaf in self.leaves:
            if leaf.name not in given:
                raise InputError(f"leaf {leaf.name} of the store is not in the states")
            value = np.asarray(given[leaf.name])
            if value.dtype != np.dtype(leaf.dtype) or value.shape != (len(ids), *leaf.shape):
                wanted = f"{leaf.dtype}{[len(ids), *leaf.shape]} for {len(ids)} users"
                raise InputError(f"leaf {leaf.name} is {value.dtype}{list(value.shape)}, not {wanted}")
            _refuse_nonfinite(value, leaf.name, ids)
            found.append(value)
        return found


def is_leaf_name(name: str) -> bool:
    """Whether a leaf's name can be that of a member of an archive, wherever that is unpacked: it leads nowhere else."""
    parts = name.split("/")
    is_inside = all(part not in ("", ".", "..") for part in parts) and not re.match("[A-Za-z]:", name)
    return is_inside and name.isprintable() and "\\" not in name and len(name) <= _LONGEST_NAME


def flatten_state(tree: Any) -> dict[str, Any]:
    """`{name: leaf}`; a name is the path with slashes, or `state` where the tree is one leaf.

    Raises InputError where two leaves have one name.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        if name in leaves:
            raise InputError(f"two leaves of the state are called {name}")
        leaves[name] = leaf
    return leaves


def list_leaves_of(template: Any) -> tuple[Leaf, ...]:
    """The leaves of one user's state: a tree of arrays, or of anything else with a shape and a dtype.

    Raises InputError, which names the leaf, where one is no array of numbers or has no elements.
    """
    leaves = []
    for name, value in flatten_state(template).items():
        if not is_leaf_name(name):
            raise InputError(f"leaf {name!r} of the template: such a name cannot be stored")
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise InputError(f"leaf {name} of the template is {type(value).__name__}, not an array")
        leaf = Leaf(name, tuple(map(int, value.shape)), np.dtype(value.dtype).name)
        if leaf.dtype not in DTYPES:
            raise InputError(f"leaf {name} of the template is {leaf.dtype}, which is none of {', '.join(DTYPES)}")
        if leaf.n_bytes == 0:
            raise InputError(f"leaf {name} of the template is {leaf}: it has no elements")
        leaves.append(leaf)
    if not leaves:
        raise InputError("the template has no leaves")
    return tuple(leaves)


def _refuse_nonfinite(value: np.ndarray, name: str, ids: Sequence[str]) -> None:
    if value.dtype.kind in "biu":
        return
    wrong = ~np.isfinite(value).all(axis=tuple(range(1, value.ndim)))
    if wrong.any():
        raise InputError(f"user {ids[int(np.argmax(wrong))]!r}: leaf {name} of the state is not finite")
