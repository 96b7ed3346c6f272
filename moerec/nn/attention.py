"""Grouped-query attention with rotary positions, causal within packed segments."""

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.layers import declare, fan_in, fan_in_heads


def rotate(x_BTNH: jax.Array, position_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of Qwen2, computed in float32.

    Args:
      x_BTNH: queries or keys; H is even.
      position_BT: places within the own sequence.
      theta: base of the geometric series of wavelengths.
    """
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def segment_mask(segment_BT: jax.Array) -> jax.Array:
    """`[B, T, S]`, true where slot t may attend to slot s: the same segment, and s not after t."""
    t = segment_BT.shape[1]
    same = segment_BT[:, :, None] == segment_BT[:, None, :]
    return same & jnp.tril(jnp.ones((t, t), bool))


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023) with biases on query, key and value, as in Qwen2."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        d, n, k, h = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
        kq, kk, kv, ko = jax.random.split(key, 4)
        zeros = jax.nn.initializers.zeros
        self.q_DNH = declare(kq, (d, n, h), ("embed", "heads", None), fan_in)
        self.k_DKH = declare(kk, (d, k, h), ("embed", "kv_heads", None), fan_in)
        self.v_DKH = declare(kv, (d, k, h), ("embed", "kv_heads", None), fan_in)
        self.o_NHD = declare(ko, (n, h, d), ("heads", None, "embed"), fan_in_heads)
        self.q_bias_NH = declare(kq, (n, h), ("heads", None), zeros, decay="none")
        self.k_bias_KH = declare(kk, (k, h), ("kv_heads", None), zeros, decay="none")
        self.v_bias_KH = declare(kv, (k, h), ("kv_heads", None), zeros, decay="none")
        self.rope_theta = config.rope_theta

    def __call__(self, x_BTD: jax.Array, position_BT: jax.Array, mask_BTS: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        q = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.q_DNH[...].astype(dtype)) + self.q_bias_NH[...].astype(dtype)
        k = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.k_DKH[...].astype(dtype)) + self.k_bias_KH[...].astype(dtype)
        v = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.v_DKH[...].astype(dtype)) + self.v_bias_KH[...].astype(dtype)
        q, k = rotate(q, position_BT, self.rope_theta), rotate(k, position_BT, self.rope_theta)
        b, t, n, h = q.shape
        groups = k.shape[2]
        q_grouped = q.reshape(b, t, groups, n // groups, h)
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_grouped, k).astype(jnp.float32) * h**-0.5
        # Padding attends to padding (segment 0), so that no row of the softmax is empty.
        weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits, -1e30), axis=-1).astype(dtype)
        out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(b, t, n, h)
        return jnp.einsum("BTNH,NHD->BTD", out, self.o_NHD[...].astype(dtype))
