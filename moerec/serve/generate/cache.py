"""Keys and values of the slots so far, and which of them a slot sees.

All sequences of a batch end at one place, padded on the left: a step writes one slot of the cache, the same of each. Of
a model with a window the cache is a ring: place p is in slot `p % S`, and what has left the window is written over.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Attributes: k, v: of each layer keys after rotation and values, `[B, K, S, H]`."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def round_up(n: int, least: int = 1) -> int:
    """The least power of two that is not below `n` and `least`."""
    return max(1 << (max(n, 1) - 1).bit_length(), least)


def size_cache(n_places: int, window: int) -> int:
    """S for places below `n_places`: a power of two, and of a model with a window no more than that needs."""
    return min(round_up(n_places), round_up(window)) if window else round_up(n_places)


def keep_prompt(x_BTKH: jax.Array, n_slots: int) -> jax.Array:
    """`[B, K, S, H]`, the keys or the values of a prompt as a cache of S slots; T and S are powers of two."""
    x_BKTH = jnp.moveaxis(x_BTKH, 1, 2)
    n_places = x_BKTH.shape[2]
    if n_places >= n_slots:  # a multiple of it, so that each place is in its slot
        return x_BKTH[:, :, n_places - n_slots :]
    return jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, n_slots - n_places), (0, 0)))


def write(x_BKSH: jax.Array, new_BTKH: jax.Array, place: jax.Array) -> jax.Array:
    """The cache with one slot a sequence, `[B, 1, K, H]`, at a place."""
    new_BKTH = jnp.moveaxis(new_BTKH, 1, 2).astype(x_BKSH.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BKSH, new_BKTH, place % x_BKSH.shape[2], axis=2)


def find_seen(n_slots: int, place: jax.Array, n_padded_B: jax.Array, window: int) -> jax.Array:
    """`[B, S]` bool, the slots that the one at a place sees, itself among them.

    Args: where it is; places of each sequence's padding; slots that are seen at most (0 is all).
    """
    own_S = place - (place - jnp.arange(n_slots, dtype=jnp.int32)) % n_slots  # the last place that went into each slot
    seen_BS = own_S >= n_padded_B[:, None]
    return seen_BS & (own_S > place - window) if window else seen_BS


def attend_cached(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen_BS: jax.Array) -> jax.Array:
    """`[B, 1, N, H]`, attention of one slot a sequence; weights are computed in float32."""
    b, _, n, h = q_BTNH.shape
    n_keys = k_BKSH.shape[1]
    q_BKXH = (q_BTNH * jnp.asarray(h**-0.5, q_BTNH.dtype)).reshape(b, n_keys, n // n_keys, h)
    logit = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(jnp.where(seen_BS[:, None, None], logit, -jnp.inf), axis=-1).astype(v_BKSH.dtype)
    out = jnp.einsum("BKXS,BKSH->BKXH", weight, v_BKSH, preferred_element_type=jnp.float32)
    return out.reshape(b, 1, n, h).astype(q_BTNH.dtype)
