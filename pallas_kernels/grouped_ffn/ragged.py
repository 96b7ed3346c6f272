"""`lax.ragged_dot` over the plan's places: a grouped kernel on TPUs; dense, every row by every expert, on a CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Plan

# `x^T y` of each group by itself: the rows of both are contracted, and they are what the groups divide.
_WITHIN_GROUPS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _group_sizes(plan: Plan) -> jax.Array:
    """Places of each expert, padding included; what is left over behind them counts to the last one."""
    tile = plan.tile
    size_E = (plan.size_E + tile - 1) // tile * tile
    return size_E.at[-1].add(plan.row_P.shape[0] - jnp.sum(size_E)).astype(jnp.int32)


def _dot_transposed(rows, matrices_E, sizes):
    return jax.lax.ragged_dot(rows, jnp.swapaxes(matrices_E, 1, 2), sizes)


def forward(x_TD, weight_P, matrices, plan: Plan):
    """Returns the weighted answers at all places, and the gate's and up's products for the backward pass."""
    gate_EDF, up_EDF, down_EFD = matrices
    sizes, x_PD = _group_sizes(plan), x_TD[plan.row_P]
    gate_PF = jax.lax.ragged_dot(x_PD, gate_EDF, sizes)
    up_PF = jax.lax.ragged_dot(x_PD, up_EDF, sizes)
    y_PD = jax.lax.ragged_dot(jax.nn.silu(gate_PF) * up_PF, down_EFD, sizes) * weight_P[:, None]
    return y_PD.astype(x_TD.dtype), (gate_PF, up_PF)


def backward(x_TD, weight_P, matrices, plan: Plan, saved, g_TD):
    """Gradients of each place's row and weight and of the matrices.

    Rows are gathered anew: kept, they would be as large as everything that is saved.
    """
    gate_EDF, up_EDF, down_EFD = matrices
    gate_PF, up_PF = saved
    sizes, weight = _group_sizes(plan), weight_P[:, None]
    x_PD = x_TD[plan.row_P]
    g_PD = jnp.where(plan.used_P[:, None], g_TD[plan.row_P], 0)
    sigmoid_PF = jax.nn.sigmoid(gate_PF)
    silu_PF = gate_PF * sigmoid_PF
    hidden_PF = silu_PF * up_PF
    dh_unweighted_PF = _dot_transposed(g_PD, down_EFD, sizes)
    dh_PF = dh_unweighted_PF * weight
    d_gate_PF = dh_PF * up_PF * (sigmoid_PF * (1 + gate_PF * (1 - sigmoid_PF)))
    d_up_PF = dh_PF * silu_PF
    dx_PD = _dot_transposed(d_gate_PF, gate_EDF, sizes) + _dot_transposed(d_up_PF, up_EDF, sizes)
    dweight_P = jnp.sum(hidden_PF * dh_unweighted_PF, axis=1)
    pairs = ((x_PD, d_gate_PF), (x_PD, d_up_PF), (hidden_PF, g_PD * weight))
    return dx_PD, dweight_P, tuple(jax.lax.ragged_dot_general(a, b, sizes, _WITHIN_GROUPS) for a, b in pairs)
