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


def project(x: jax.Array, w: jax.Array, n_summed: int = 1) -> jax.Array:
    """`[..., *out]`, a product with weights `[*in, *out]` in the type of `x [..., *in]`, as one of two matrices.

    A CPU takes half as long so, forward and backward: of a product with several leading axes XLA transposes copies.

    Args:
      n_summed: how many axes `in` has.
    """
    rows, summed, out = x.shape[: x.ndim - n_summed], w.shape[:n_summed], w.shape[n_summed:]
    flat = x.reshape(math.prod(rows), math.prod(summed)) @ w.astype(x.dtype).reshape(math.prod(summed), math.prod(out))
    return flat.reshape(*rows, *out)


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
        gate, up = project(x_BTD, self.gate_DF[...]), project(x_BTD, self.up_DF[...])
        return project(jax.nn.silu(gate) * up, self.down_FD[...])


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


def sum_rows(table_VD: jax.Array, row_XW: jax.Array, is_there_XW: jax.Array) -> jax.Array:
    """`[..., D]`, sums of rows of a table.

    Row by row, so that `[..., W, D]` never exists: of a catalogue's texts a sixteenth of the time on a CPU, forward and
    backward, and a sixteenth of the memory. What is not there lies behind the table: nothing is read there, nor added
    in the backward pass.

    Args: int32 `[..., W]` rows; bool, which of them count.
    """
    row_WX = jnp.moveaxis(jnp.where(is_there_XW, row_XW, table_VD.shape[0]), -1, 0)

    def add(total_XD: jax.Array, row_X: jax.Array) -> tuple[jax.Array, None]:
        return total_XD + table_VD.at[row_X].get(mode="fill", fill_value=0), None

    zeros_XD = jnp.zeros((*row_XW.shape[:-1], table_VD.shape[1]), table_VD.dtype)
    return jax.lax.scan(add, zeros_XD, row_WX)[0]
