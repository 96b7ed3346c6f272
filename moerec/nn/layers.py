"""Declarations of weights, and the small layers of the Qwen2 family."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]
MASK_VALUE = -1e9  # logit of what cannot be chosen; its probability is exactly zero beside any other


def declare(
    key: jax.Array,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    decay: str = "matrix",
    dtype: DTypeLike = jnp.float32,
) -> nnx.Param:
    """One declaration gives a weight's shape, dtype, logical axes (`moerec.nn.sharding`), initialiser and decay class.

    Args:
      decay: `matrix`, `embedding` or `none`; `moerec.train.optim` decides from it what weight decay touches.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    return nnx.Param(init(key, shape, dtype), axes=axes, decay=decay)


def fan_in(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Normal with variance 1 / fan-in, for kernels `[in, ...]` whose first axis alone is summed over."""
    return shape[0] ** -0.5 * jax.random.normal(key, shape, dtype)


def fan_in_heads(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """`fan_in` for kernels `[heads, width, out]`, whose first two axes are summed over."""
    return (shape[0] * shape[1]) ** -0.5 * jax.random.normal(key, shape, dtype)


def fan_in_second(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """`fan_in` for kernels `[many, in, ...]`, whose second axis is summed over."""
    return shape[1] ** -0.5 * jax.random.normal(key, shape, dtype)


def normal(stddev: float) -> Initializer:
    """Normal with the given standard deviation, for embeddings."""
    return jax.nn.initializers.normal(stddev)


def multiply(x: jax.Array, w: jax.Array, n_summed: int = 1) -> jax.Array:
    """`x [..., in] @ w [in, out...]`, as one product of two matrices; `in` is `n_summed` axes.

    Left with two leading axes, the gradient of the weights sums over both at once, which XLA's CPU backend computes
    with loops and strided copies: the gated feed-forward layer, forward and backward, takes 2.6 times as long.
    """
    lead, summed, out = x.shape[: x.ndim - n_summed], w.shape[:n_summed], w.shape[n_summed:]
    n_in = math.prod(summed)
    return (x.reshape(-1, n_in) @ w.reshape(n_in, -1)).reshape(*lead, *out)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, d: int, eps: float):
        self.scale = declare(jax.random.key(0), (d,), (None,), jax.nn.initializers.ones, decay="none")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """Gated feed-forward (Shazeer 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, key: jax.Array, d: int, f: int):
        k_gate, k_up, k_down = jax.random.split(key, 3)
        self.gate_DF = declare(k_gate, (d, f), ("embed", "mlp"), fan_in)
        self.up_DF = declare(k_up, (d, f), ("embed", "mlp"), fan_in)
        self.down_FD = declare(k_down, (f, d), ("mlp", "embed"), fan_in)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate = multiply(x_BTD, self.gate_DF[...].astype(dtype))
        up = multiply(x_BTD, self.up_DF[...].astype(dtype))
        return multiply(jax.nn.silu(gate) * up, self.down_FD[...].astype(dtype))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; without a key the identity. The rate is kept to 1 / 65,536: sixteen random bits per element."""
    if key is None or rate == 0:
        return x
    threshold = round(rate * 65_536)
    # Threefry costs as much for sixteen bits as for thirty-two, so a word serves two elements.
    word = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(word, jnp.uint16).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    keep = bits >= jnp.uint16(threshold)
    return jnp.where(keep, x * jnp.asarray(65_536 / (65_536 - threshold), x.dtype), 0)
