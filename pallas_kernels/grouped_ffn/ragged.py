"""`lax.ragged_dot` over the plan's places: a grouped kernel on TPUs; dense, every row by every expert, on a CPU.

Or tokamax's, of the same interface, where it is installed: for comparison.
"""

import importlib.util
from collections.abc import Callable

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


def has_tokamax() -> bool:
    """Whether the extra `tokamax` is installed."""
    return importlib.util.find_spec("tokamax") is not None


def _find_dots(tokamax: bool) -> tuple[Callable, Callable]:
    """`ragged_dot` and `ragged_dot_general`."""
    if not tokamax:
        return jax.lax.ragged_dot, jax.lax.ragged_dot_general
    import tokamax as library  # an extra, and slow to import
    from absl import flags

    if not flags.FLAGS.is_parsed():  # it would parse the command line itself, and stumble over flags of others
        flags.FLAGS.mark_as_parsed()
    return library.ragged_dot, library.ragged_dot_general


def forward(x_TD, weight_P, matrices, plan: Plan, tokamax: bool = False):
    """Returns the weighted answers at all places, and the gate's and up's products for the backward pass."""
    dot, _ = _find_dots(tokamax)
    gate_EDF, up_EDF, down_EFD = matrices
    sizes, x_PD = _group_sizes(plan), x_TD[plan.row_P]
    gate_PF, up_PF = dot(x_PD, gate_EDF, sizes), dot(x_PD, up_EDF, sizes)
    y_PD = dot(jax.nn.silu(gate_PF) * up_PF, down_EFD, sizes) * weight_P[:, None]
    return y_PD.astype(x_TD.dtype), (gate_PF, up_PF)


def backward(x_TD, weight_P, matrices, plan: Plan, saved, g_TD, tokamax: bool = False):
    """Gradients of each place's row and weight and of the matrices.

    Rows are gathered anew: kept, they would be as large as everything that is saved.
    """
    dot, dot_general = _find_dots(tokamax)
    gate_EFD, up_EFD, down_EDF = (jnp.swapaxes(m, 1, 2) for m in matrices)
    gate_PF, up_PF = saved
    sizes, weight = _group_sizes(plan), weight_P[:, None]
    x_PD = x_TD[plan.row_P]
    g_PD = jnp.where(plan.used_P[:, None], g_TD[plan.row_P], 0)
    sigmoid_PF = jax.nn.sigmoid(gate_PF)
    silu_PF = gate_PF * sigmoid_PF
    hidden_PF = silu_PF * up_PF
    dh_unweighted_PF = dot(g_PD, down_EDF, sizes)
    dh_PF = dh_unweighted_PF * weight
    d_gate_PF = dh_PF * up_PF * (sigmoid_PF * (1 + gate_PF * (1 - sigmoid_PF)))
    d_up_PF = dh_PF * silu_PF
    dx_PD = dot(d_gate_PF, gate_EFD, sizes) + dot(d_up_PF, up_EFD, sizes)
    dweight_P = jnp.sum(hidden_PF * dh_unweighted_PF, axis=1)
    pairs = ((x_PD, d_gate_PF), (x_PD, d_up_PF), (hidden_PF, g_PD * weight))
    return dx_PD, dweight_P, tuple(dot_general(a, b, sizes, _WITHIN_GROUPS) for a, b in pairs)
