"""Keys and values of the slots so far, and which of them a slot sees.

All sequences of a batch end at one place, padded on the left. Of a model with a window the cache is a ring: place p is
in slot `p % S`, and what has left the window is written over. A loop over tokens only reads the cache and writes what
is recent into a small one beside it, which goes into the cache behind the loop: XLA would copy what a loop writes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Attributes: k, v: of each layer keys after rotation, `[B, K, H, S]`, and values, `[B, K, S, H]`; recent ones have
    X for S. about: where attention knows of them, int32 times and services of the slots' events, `[B, 1, S, 1]`; else
    (). Slots of keys are the last axis: a CPU finds the logits of one query in half of the time so.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    about: tuple[jax.Array, ...] = ()

    @property
    def n_slots(self) -> int:
        return self.v[0].shape[2]


class _Axes(NamedTuple):
    """Which axis of the arrays of a cache are slots."""

    k: int = 3
    v: int = 2
    about: int = 2


SLOT_AXIS = _Axes()


def round_up(n: int, least: int = 1) -> int:
    """The least power of two that is not below `n` and `least`."""
    return max(1 << (max(n, 1) - 1).bit_length(), least)


def size_cache(n_places: int, window: int) -> int:
    """S for places below `n_places`: a power of two, and of a model with a window no more than that needs."""
    return min(round_up(n_places), round_up(window)) if window else round_up(n_places)


def keep_prompt(x_BTKH: jax.Array, n_slots: int, axis: int) -> jax.Array:
    """The keys or the values of a prompt as a cache of S slots, which are that axis; T and S are powers of two."""
    n_places = x_BTKH.shape[1]
    if n_places >= n_slots:  # a multiple of it, so that each place is in its slot
        x_BTKH = x_BTKH[:, n_places - n_slots :]
    else:
        x_BTKH = jnp.pad(x_BTKH, ((0, 0), (0, n_slots - n_places), (0, 0), (0, 0)))
    return jnp.moveaxis(x_BTKH, 1, axis)


def write(cached: jax.Array, new_BTKH: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    """Keys or values, whose slots are that axis, with one slot a sequence, `[B, 1, K, H]`, written."""
    new = jnp.moveaxis(new_BTKH, 1, axis).astype(cached.dtype)
    if cached.dtype != jnp.bfloat16:
        return jax.lax.dynamic_update_slice_in_dim(cached, new, slot, axis)
    # As bits: XLA's CPU would write into a copy in float32.
    old_bits, new_bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (cached, new))
    is_slot = jax.lax.broadcasted_iota(jnp.int32, cached.shape, axis) == slot
    return jax.lax.bitcast_convert_type(jnp.where(is_slot, new_bits, old_bits), jnp.bfloat16)


def last_places(n_slots: int, end: jax.Array) -> jax.Array:
    """`[S]` int32, the last place before `end` that is in each slot; negative where none is."""
    return end - 1 - (end - 1 - jnp.arange(n_slots, dtype=jnp.int32)) % n_slots


def merge_recent(cache: KVCache, recent: KVCache, start: jax.Array, end: jax.Array) -> KVCache:
    """The cache with what came from place `start` on, up to one before `end`."""
    own_S = last_places(cache.n_slots, end)

    def merge(axis: int, old: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        is_new_S = jnp.expand_dims(own_S >= start, tuple(range(1, 4 - axis)))
        return tuple(
            jnp.where(is_new_S, jnp.take(y, own_S - start, axis=axis, mode="clip"), x)
            for x, y in zip(old, new, strict=True)
        )

    return KVCache(*map(merge, SLOT_AXIS, cache, recent))


def find_seen(
    n_slots: int, n_recent: int, start: jax.Array, place: jax.Array, n_padded_B: jax.Array, window: int
) -> jax.Array:
    """`[B, S + X]` bool, which slots of the cache and which recent ones the one at a place sees, itself among them.

    Args: how many there are; the place of the first recent one; the own place; places of each sequence's padding; how
      many a slot sees at most (0 is all).
    """
    recent_X = start + jnp.arange(n_recent, dtype=jnp.int32)
    own_S = jnp.concatenate([last_places(n_slots, start), recent_X])
    seen_BS = (own_S >= n_padded_B[:, None]) & (own_S <= place)
    return seen_BS & (own_S > place - window) if window else seen_BS


def attend_cached(
    q_BTNH: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, jax.Array],
    seen_BS: jax.Array,
    bias_BTNS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`[B, 1, N, H]`, attention of one slot a sequence, and `[B, 1, N]`, the logs of the sums of the exponentials.

    Weights are computed in float32.

    Args: keys and values of the cache and of what is recent; what is seen of both, and what is added to logits.
    """
    b, _, n, h = q_BTNH.shape
    n_keys, n_slots = values[0].shape[1:3]
    q_BKXH = (q_BTNH * jnp.asarray(h**-0.5, q_BTNH.dtype)).reshape(b, n_keys, n // n_keys, h)
    logits = [jnp.einsum("BKXH,BKHS->BKXS", q_BKXH, k, preferred_element_type=jnp.float32) for k in keys]
    logit = jnp.concatenate(logits, axis=-1)
    if bias_BTNS is not None:
        logit += jnp.broadcast_to(bias_BTNS[:, 0], (b, n, logit.shape[-1])).reshape(logit.shape)
    logit = jnp.where(seen_BS[:, None, None], logit, -jnp.inf)
    most = jnp.max(logit, axis=-1, keepdims=True)
    weight = jnp.exp(logit - most)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    parts = jnp.split(weight.astype(values[0].dtype), [n_slots], axis=-1)
    outs = [
        jnp.einsum("BKXS,BKSH->BKXH", part, v, preferred_element_type=jnp.float32)
        for part, v in zip(parts, values, strict=True)
    ]
    out_BTNH = ((outs[0] + outs[1]) / total).reshape(b, 1, n, h).astype(q_BTNH.dtype)
    return out_BTNH, (most + jnp.log(total)).reshape(b, 1, n)
