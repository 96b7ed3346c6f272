"""Bytes that a `pallas_call` moves between HBM and VMEM, counted from its grid and block specs.

XLA takes a kernel's cost from what the kernel declares. A number declared by hand says what its author hoped; this one
follows from the specs that the kernel runs with, so a block that is fetched twice is counted twice.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax.experimental import pallas as pl


class Shaped(Protocol):
    """An array, or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


def count_moved_bytes(grid: Sequence[int], specs: Sequence[pl.BlockSpec], arrays: Sequence[Shaped]) -> int:
    """Bytes moved for the operands and results of one call.

    The grid runs in row-major order. A block stays in VMEM while its index stays the same: an operand's is fetched at
    the first step and whenever the index changes, a result's is written when the index changes and at the end. Both
    come to one transfer for every run of equal indices. A block that sticks out is moved as far as the array goes.

    Args:
      grid: steps along each axis.
      specs: of the operands and of the results. A spec without a block shape is the whole array, moved once.
      arrays: what the specs cut, in the same order.

    Raises:
      ValueError: a spec does not fit its array, or has dimensions that are neither a number nor None.
    """
    return sum(_count(tuple(grid), spec, array) for spec, array in zip(specs, arrays, strict=True))


def count_bytes(arrays: Sequence[Shaped]) -> int:
    """Bytes of the arrays: what a call moves at least, each operand read once and each result written once."""
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)


def _count(grid: tuple[int, ...], spec: pl.BlockSpec, array: Shaped) -> int:
    if spec.block_shape is None:
        return count_bytes([array])
    sizes = [1 if size is None else size for size in spec.block_shape]  # None: one, and no dimension in the kernel
    block = [size for size in sizes if isinstance(size, int)]
    if not len(block) == len(sizes) == len(array.shape):
        raise ValueError(f"count_moved_bytes: block {spec.block_shape} of an array {array.shape}")
    indices = _list_indices(grid, spec, len(block))
    is_new = np.ones(len(indices), bool)
    is_new[1:] = np.any(indices[1:] != indices[:-1], axis=1)
    starts = indices[is_new] * block
    moved = np.clip(np.array(array.shape) - starts, 0, block)
    return int(np.sum(np.prod(moved, axis=1))) * np.dtype(array.dtype).itemsize


def _list_indices(grid: tuple[int, ...], spec: pl.BlockSpec, n_dims: int) -> np.ndarray:
    """int64 `[steps, dimensions]` of the block's index at each step, all steps through the index map at once."""
    steps = [np.array(axis) for axis in zip(*np.ndindex(*grid), strict=True)]
    if spec.index_map is None:
        return np.zeros((math.prod(grid), n_dims), np.int64)
    with jax.ensure_compile_time_eval():  # an index map may use jnp, and the caller may be under jit
        index = [np.asarray(i) for i in spec.index_map(*steps)]
    return np.stack([np.broadcast_to(i, (math.prod(grid),)) for i in index], axis=1).astype(np.int64)
