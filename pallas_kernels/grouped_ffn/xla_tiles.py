"""A loop over tiles in plain XLA: the CPU's training path, where `lax.ragged_dot` lets every expert see every row.

An expert's tiles are taken several at once as long as there are enough, then fewer at a time for the rest: wide matmuls
where the load is, little padding where it is not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import DispatchPlan
from pallas_kernels.varying import zeros_like_all

WIDTHS = (8, 2, 1)  # tiles of a block


class Blocks(NamedTuple):
    """Blocks of one size: the first `n` of `expert` and `start` (a row slot) are in use. `size` row slots each."""

    size: int
    expert: jax.Array
    start: jax.Array
    n: jax.Array


def make_blocks(plan: DispatchPlan) -> list[Blocks]:
    """Blocks of each width; together they cover each used tile once."""
    tile, n_tiles = plan.tile, plan.expert_L.shape[0]
    left_E = (plan.size_E + tile - 1) // tile
    at_E = jnp.cumsum(left_E) - left_E
    n_experts, blocks = left_E.shape[0], []
    for width, wider in zip(WIDTHS, (None, *WIDTHS), strict=False):
        if width > n_tiles:
            continue
        # Of all widths but the widest an expert has few blocks, since the wider ones took the rest.
        n_most = min(n_tiles // width, n_experts * (wider // width)) if wider else n_tiles // width
        count_E = left_E // width
        end_E = jnp.cumsum(count_E)
        block = jnp.arange(n_most, dtype=jnp.int32)
        expert = jnp.minimum(jnp.searchsorted(end_E, block, side="right"), n_experts - 1).astype(jnp.int32)
        start = (at_E[expert] + (block - (end_E - count_E)[expert]) * width) * tile
        blocks.append(Blocks(tile * width, expert, start.astype(jnp.int32), end_E[-1].astype(jnp.int32)))
        at_E, left_E = at_E + count_E * width, left_E - count_E * width
    return blocks


def _loop(plan: DispatchPlan, body: Callable, carry):
    """`carry = body(carry, expert, start, size)` over all blocks."""
    for blocks in make_blocks(plan):

        def step(i, carry, blocks=blocks):
            return body(carry, blocks.expert[i], blocks.start[i], blocks.size)

        carry = jax.lax.fori_loop(0, blocks.n, step, carry)
    return carry


def _read(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _write(x: jax.Array, start: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, 0)


def _sum_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x^T y` in float32."""
    return jnp.matmul(x.T, y, preferred_element_type=jnp.float32)


def forward(x_TD, weight_R, matrices, plan: DispatchPlan):
    """Returns the weighted outputs of all row slots, and the gate's and up's products for the backward pass."""
    gate_EDF, up_EDF, down_EFD = matrices
    n_row_slots, f = plan.row_R.shape[0], gate_EDF.shape[2]

    def body(carry, expert, start, size):
        y_RD, gate_RF, up_RF = carry
        x = x_TD[_read(plan.row_R, start, size)]
        gate, up = x @ gate_EDF[expert], x @ up_EDF[expert]
        y = (jax.nn.silu(gate) * up) @ down_EFD[expert] * _read(weight_R, start, size)[:, None]
        return _write(y_RD, start, y), _write(gate_RF, start, gate), _write(up_RF, start, up)

    dtype, operands = x_TD.dtype, (x_TD, weight_R, *matrices)
    empty = tuple(zeros_like_all((n_row_slots, width), dtype, *operands) for width in (x_TD.shape[1], f, f))
    y_RD, gate_RF, up_RF = _loop(plan, body, empty)
    return y_RD, (gate_RF, up_RF)


def backward(x_TD, weight_R, matrices, plan: DispatchPlan, saved, g_TD):
    """Gradients of each row slot's row and weight and of the matrices, over the same blocks."""
    gate_EDF, up_EDF, down_EFD = matrices
    gate_RF, up_RF = saved

    def body(carry, expert, start, size):
        dx_RD, dweight_R, d_gate, d_up, d_down = carry
        rows, weight = _read(plan.row_R, start, size), _read(weight_R, start, size)[:, None]
        x, g = x_TD[rows], g_TD[rows]
        gate, up = _read(gate_RF, start, size), _read(up_RF, start, size)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        dh_unweighted = g @ down_EFD[expert].T
        dh = dh_unweighted * weight
        d_gate_rows = dh * up * (sigmoid * (1 + gate * (1 - sigmoid)))
        d_up_rows = dh * silu
        dx = d_gate_rows @ gate_EDF[expert].T + d_up_rows @ up_EDF[expert].T
        return (
            _write(dx_RD, start, dx),
            _write(dweight_R, start, jnp.sum(hidden * dh_unweighted, axis=1)),
            d_gate.at[expert].add(_sum_rows(x, d_gate_rows)),
            d_up.at[expert].add(_sum_rows(x, d_up_rows)),
            d_down.at[expert].add(_sum_rows(hidden, g * weight)),
        )

    operands = (x_TD, weight_R, g_TD, *matrices)
    dtype, exact = x_TD.dtype, jnp.float32  # an expert's blocks add up in float32, however short the rows' numbers are
    shapes = ((plan.row_R.shape[0], x_TD.shape[1]), weight_R.shape, *(m.shape for m in matrices))
    dtypes = (dtype, dtype, exact, exact, exact)
    empty = tuple(zeros_like_all(s, t, *operands) for s, t in zip(shapes, dtypes, strict=True))
    dx_RD, dweight_R, *d_matrices = _loop(plan, body, empty)
    return dx_RD, dweight_R, tuple(d.astype(m.dtype) for d, m in zip(d_matrices, matrices, strict=True))
