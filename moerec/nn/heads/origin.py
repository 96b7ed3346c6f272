"""Where a listed item is from: what each component of the mixture gave of its probability."""

import jax
import jax.numpy as jnp

from moerec.nn.heads.near_pointers import share_targets
from moerec.types import Catalog, NearPointer, PointerMixture


def split_listed(
    p_QK: jax.Array,
    pointers: PointerMixture | None,
    place_QK: jax.Array,
    item_QK: jax.Array,
    item_QS: jax.Array,
    catalog: Catalog,
) -> jax.Array:
    """`[Q, K, C]`, what the softmax and then each pointer gave of K items' probabilities; rows add up to `p_QK`.

    What `split_components` and `spread_each` lay over all items, for a few of them. The softmax has what the pointers
    leave.

    Args:
      p_QK: p(item | service) of the items. pointers: `[Q, X, ...]`, of X answers. place_QK: int32, which of these is
        the item's. item_QK: int32 items, -1 for none, which get nothing. item_QS: int32 items of the row's slots.
    """
    is_item_QK = item_QK >= 0
    p_QK = jnp.where(is_item_QK, p_QK, 0)
    if pointers is None:
        return p_QK[..., None]
    item_QK, row_Q1 = jnp.maximum(item_QK, 0), jnp.arange(item_QK.shape[0])[:, None]
    is_hit_QKS = item_QS[:, None] == item_QK[..., None]
    # `[Q, P, X, S]` at each item's own answer: `[Q, K, P, S]`.
    given_QKPS = jnp.moveaxis(pointers.part_BXTS, 1, 2)[row_Q1, place_QK]
    copies = [given_QKPS[:, :, x] for x in range(pointers.n_copies)]
    if pointers.owner_BS is not None:
        owner_Q1S = pointers.owner_BS[:, None]
        copies = [*(jnp.where(owner_Q1S == z, copies[0], 0) for z in range(pointers.n_owners)), *copies[1:]]
    parts = [jnp.sum(jnp.where(is_hit_QKS, copy_QKS, 0), axis=-1) for copy_QKS in copies]
    for x, name in enumerate(sorted(pointers.near), pointers.n_copies):
        pointer = pointers.near[name]
        part_QKS = None if pointer.part_BTS is None else pointer.part_BTS[row_Q1, place_QK]
        near = NearPointer(pointer.share_BSX, part_QKS)
        share_QKS = share_targets(near, catalog.near[name].item_IX, item_QS, item_QK)
        parts.append(jnp.sum(given_QKPS[:, :, x] * share_QKS, axis=-1))
    pointed_QKX = jnp.where(is_item_QK[..., None], jnp.stack(parts, axis=-1), 0)
    softmax_QK = jnp.maximum(p_QK - jnp.sum(pointed_QKX, axis=-1), 0)
    return jnp.concatenate([softmax_QK[..., None], pointed_QKX], axis=-1)
