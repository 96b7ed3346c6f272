"""What a pointer at an event gives to the items whose texts resemble that of the event's item.

An item that nobody has chosen yet has no row, and no pointer into the history finds it; its text's neighbours are
known. The tables of neighbours (`moerec.data.neighbors`) are data: they may be extended without training.
"""

import jax
import jax.numpy as jnp

from moerec.nn.layers import MASK_VALUE
from moerec.types import Catalog

FIRST_SHARPNESS = 8.0  # of similarities, which are cosines: the nearest have most of an event's weight


def has_neighbors(item: jax.Array, catalog: Catalog) -> jax.Array:
    """Bool `[...]`, whether there is anything that a pointer at these items could give to."""
    assert catalog.neighbor_IX is not None
    return catalog.neighbor_IX[item, 0] >= 0


def share_neighbors(item: jax.Array, sharpness: jax.Array, catalog: Catalog) -> jax.Array:
    """`[..., X]`, the share of each neighbour of these items: a softmax of sharpness times similarity.

    Args: items `[...]`, and the sharpness there.
    """
    assert catalog.neighbor_IX is not None
    assert catalog.similarity_IX is not None
    is_there = catalog.neighbor_IX[item] >= 0
    logit = jnp.where(is_there, sharpness[..., None] * catalog.similarity_IX[item], MASK_VALUE)
    return jnp.where(is_there, jax.nn.softmax(logit), 0)


def share_targets(share_BSX: jax.Array, item_BS: jax.Array, target_BT: jax.Array, catalog: Catalog) -> jax.Array:
    """`[B, T, S]`, the share that the target of slot t has among the neighbours of the event of slot s."""
    assert catalog.neighbor_IX is not None
    neighbor_BSX = catalog.neighbor_IX[item_BS]
    # One fused sum: `[B, T, S, X]` never stands in memory.
    hit_BTSX = neighbor_BSX[:, None] == target_BT[:, :, None, None]
    return jnp.sum(jnp.where(hit_BTSX, share_BSX[:, None], 0), axis=-1)
