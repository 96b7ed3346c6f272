"""Scores of all items for a few queries at a time, so that `[Q, I]` never stands in memory for a large catalogue.

The blocks are of queries, and not of items: a query has all of its scores at once, so that those that are compared were
computed alike, pointers are spread once, and a mesh that splits the items splits the work of every block.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")
MOST_NUMBERS = 1 << 20  # of a block, which then stays in the caches of a CPU
LEAST_ROWS, MOST_OF_LEAST = 32, 1 << 25  # fewer rows would read all items for little work, if these numbers allow them


def map_blocks(f: Callable[..., T], operands: Any, n_each: int, most: int = 0) -> T:
    """`f(*operands)`, where arrays and results all have one leading axis, computed block by block of it.

    The blocks are of one size; there is one where there is room for it.

    Args:
      operands: a tuple of trees of arrays. n_each: numbers that a row needs in memory, such as the scores of all items.
      most: numbers of a block; 0 for what suits scores.
    """
    n, n_each = jax.tree.leaves(operands)[0].shape[0], max(n_each, 1)
    least = min(LEAST_ROWS, MOST_OF_LEAST // n_each)
    n_blocks = -(-n // max(most // n_each if most else max(MOST_NUMBERS // n_each, least), 1))
    if n_blocks <= 1:
        return f(*operands)
    size = -(-n // n_blocks)
    n_blocks = -(-n // size)  # a last block of padding alone is none

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, n_blocks * size - n)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(n_blocks, size, *x.shape[1:])

    found = jax.lax.map(lambda block: f(*block), jax.tree.map(split, operands))
    return jax.tree.map(lambda x: x.reshape(n_blocks * size, *x.shape[2:])[:n], found)
