"""Products with weights that nothing trains: read once for a token, in float32, bfloat16 or as whole numbers of a byte.

On CPUs a few rows times a float32 matrix are fastest with its inputs first, `[D, X]`: up to twice as fast for two rows
to sixteen; of other types, and of a single row, with its outputs first, `[X, D]`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

FEW_ROWS = 32  # up to which reading the matrix is what a product costs
_MOST = 127  # of a whole number of a byte


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w_XD", "scale_X"], meta_fields=["inputs_first"])
@dataclasses.dataclass(frozen=True)
class Matrix:
    """Attributes:
    w_XD: weights `[X, D]`, of experts `[E, X, D]`; with `inputs_first` the last two axes are D and X. Float32, bfloat16
      or int8.
    scale_X: float32, what whole numbers are multiplied by, one an output; None where they are none.
    """

    w_XD: jax.Array
    scale_X: jax.Array | None = None
    inputs_first: bool = False


def quantize(matrix: Matrix) -> Matrix:
    """The nearest whole numbers from -127 to 127, with the largest weight of each output as 127."""
    w_XD = matrix.w_XD.astype(jnp.float32)
    scale_X = jnp.max(jnp.abs(w_XD), axis=-1) / _MOST
    scale_X = jnp.where(scale_X > 0, scale_X, 1)
    return Matrix(jnp.round(w_XD / scale_X[..., None]).astype(jnp.int8), scale_X)


def dequantize(matrix: Matrix, dtype) -> jax.Array:
    """`[..., X, D]`, the weights as numbers of a type."""
    if matrix.scale_X is None:
        w_XD = jnp.swapaxes(matrix.w_XD, -1, -2) if matrix.inputs_first else matrix.w_XD
        return w_XD.astype(dtype)
    return (matrix.w_XD.astype(jnp.float32) * matrix.scale_X[..., None]).astype(dtype)


def pick_rows(matrix: Matrix, index: jax.Array, dtype) -> jax.Array:
    """`[..., D]`, some of a matrix's rows, as an embedding's."""
    return dequantize(jax.tree.map(lambda a: a[index], matrix), dtype)


def product(x_BTD: jax.Array, matrix: Matrix, dtype=None) -> jax.Array:
    """`[..., X]`, the product, summed in float32; of the type of `x`, or of `dtype`."""
    x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
    few = x_RD.shape[0] <= FEW_ROWS
    if matrix.scale_X is not None:
        on_cpu = _multiply_split if few else _multiply_dequantized
        operands = x_RD, matrix.w_XD, matrix.scale_X
        y_RX = jax.lax.platform_dependent(*operands, cpu=on_cpu, default=_multiply_dequantized)
    elif matrix.inputs_first:
        y_RX = jnp.matmul(x_RD, matrix.w_XD, preferred_element_type=jnp.float32)
    elif few:
        y_RX = jax.lax.platform_dependent(x_RD, matrix.w_XD, cpu=_multiply_few, default=_multiply)
    else:
        y_RX = _multiply(x_RD, matrix.w_XD)
    return y_RX.astype(dtype or x_BTD.dtype).reshape(*x_BTD.shape[:-1], y_RX.shape[-1])


def _multiply(x_RD: jax.Array, w_XD: jax.Array) -> jax.Array:
    return jnp.einsum("RD,XD->RX", x_RD, w_XD, preferred_element_type=jnp.float32)


def _multiply_few(x_RD: jax.Array, w_XD: jax.Array) -> jax.Array:
    """On a CPU, which converts all of a bfloat16 matrix for one row, but not for two."""
    n_rows = x_RD.shape[0]
    if w_XD.dtype == jnp.float32:
        return jnp.einsum("XD,RD->XR", w_XD, x_RD, preferred_element_type=jnp.float32).T
    if n_rows == 1:
        x_RD = jnp.concatenate([x_RD, jnp.zeros_like(x_RD)])
    return _multiply(x_RD, w_XD)[:n_rows]


def _multiply_dequantized(x_RD: jax.Array, w_XD: jax.Array, scale_X: jax.Array) -> jax.Array:
    return _multiply(x_RD, w_XD.astype(x_RD.dtype)) * scale_X


def _multiply_split(x_RD: jax.Array, w_XD: jax.Array, scale_X: jax.Array) -> jax.Array:
    """On a CPU, whose products of bytes are exact and read a matrix once, where one of bytes and floats makes a float
    matrix of it: a row is the sum of two rows of bytes, to 1 / 64,000 of its largest number.
    """
    x_RD, n_rows = x_RD.astype(jnp.float32), x_RD.shape[0]
    unit_R1 = jnp.max(jnp.abs(x_RD), axis=-1, keepdims=True) / _MOST
    unit_R1 = jnp.where(unit_R1 > 0, unit_R1, 1)
    high_RD = jnp.round(x_RD / unit_R1)
    low_RD = jnp.round((x_RD / unit_R1 - high_RD) * (2 * _MOST))
    both = jnp.concatenate([high_RD, low_RD]).astype(jnp.int8)
    y = jnp.einsum("RD,XD->RX", both, w_XD, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (y[:n_rows] + y[n_rows:] / (2 * _MOST)) * unit_R1 * scale_X


def count_bytes(tree) -> int:
    """Bytes that the arrays of a tree take, on all devices together where none is there twice."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
