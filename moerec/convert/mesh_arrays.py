"""Arrays of a mesh, filled block by block in their places: nothing is ever whole anywhere but in its own shards."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

Span = tuple[int, int]  # first, and one behind the last


class MeshArrayWriter:
    """One array under way; blocks are given in a flat view of it, in which neighbouring axes may be merged.

    Of merged axes only the first may be split over devices.
    """

    def __init__(self, shape: Sequence[int], sharding: Sharding, flat_shape: Sequence[int], dtype=np.float32):
        """Args: the array's shape and placement; the shape that blocks are given in.

        Raises:
          ValueError: the flat shape is no merging of neighbouring axes, or splits a merged axis that is not the first.
        """
        self._shape, self._sharding, self._flat_shape = tuple(shape), sharding, tuple(flat_shape)
        groups = _merge_axes(self._shape, self._flat_shape)
        self._spans, self._parts = {}, {}
        for device, index in sharding.addressable_devices_indices_map(self._shape).items():
            assert index is not None
            self._spans[device] = _flatten_index(index, self._shape, groups)
            local = tuple(last - first for first, last in self._spans[device])
            self._parts[device] = jnp.zeros(local, dtype, device=device)
        self._dtype, self._n_written = dtype, 0

    def write(self, starts: Sequence[int], block: np.ndarray) -> None:
        """Args: where the block begins in the flat view, and the block, with as many axes."""
        self._n_written += block.size
        for device, spans in self._spans.items():
            cut, at = [], []
            for (first, last), start, size in zip(spans, starts, block.shape, strict=True):
                low, high = max(first, start), min(last, start + size)
                cut.append(slice(low - start, high - start))
                at.append(np.int32(low - first))
            part = block[tuple(cut)]
            if part.size and all(c.start < c.stop for c in cut):
                here = jax.device_put(np.ascontiguousarray(part).astype(self._dtype, copy=False), device)
                # Waited for: what is dispatched and not done yet would hold as many blocks as it is behind.
                self._parts[device] = jax.block_until_ready(_update(self._parts[device], here, tuple(at)))

    def finish(self) -> jax.Array:
        """The array.

        Raises:
          ValueError: not as many numbers were written as it has.
        """
        if self._n_written != math.prod(self._shape):
            raise ValueError(f"{self._n_written} of {math.prod(self._shape)} numbers were written")
        local_shape = self._sharding.shard_shape(self._shape)
        parts = [_reshape(self._parts.pop(device), local_shape) for device in list(self._parts)]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)


def _merge_axes(shape: tuple[int, ...], flat_shape: tuple[int, ...]) -> list[list[int]]:
    """Of each axis of the flat shape the axes that are merged in it; none where one of size 1 was put in."""
    groups, axis = [], 0
    for size in flat_shape:
        group: list[int] = []
        while axis < len(shape) and math.prod(shape[a] for a in group) * shape[axis] <= size:
            if group and math.prod(shape[a] for a in group) == size:
                break
            group.append(axis)
            axis += 1
        if math.prod(shape[a] for a in group) != size:
            raise ValueError(f"{flat_shape} is no merging of {shape}")
        groups.append(group)
    if axis != len(shape):
        raise ValueError(f"{flat_shape} is no merging of {shape}")
    return groups


def _flatten_index(index: tuple[slice, ...], shape: tuple[int, ...], groups: list[list[int]]) -> list[Span]:
    whole = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    spans = []
    for group in groups:
        rest = math.prod(shape[a] for a in group[1:])
        if any(len(whole[a]) != shape[a] for a in group[1:]):
            raise ValueError(f"axes {group} of {shape} are merged, and one behind the first is split")
        first = whole[group[0]] if group else range(1)
        spans.append((first.start * rest, first.stop * rest))
    return spans


@jax.jit(donate_argnums=0)
def _update(part: jax.Array, block: jax.Array, starts: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(part, block, starts)


def _reshape(part: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return part if part.shape == shape else jax.jit(lambda x: x.reshape(shape), donate_argnums=0)(part)
