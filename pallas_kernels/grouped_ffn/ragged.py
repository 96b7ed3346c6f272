"""`lax.ragged_dot` over the plan's row slots: a grouped kernel on TPUs; dense, every row by every expert, on a CPU.

Or tokamax's, of the same interface, where it is installed: for comparison.
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import DispatchPlan

# `x^T y` of each group by itself: the rows of both are contracted, and they are what the groups divide.
_WITHIN_GROUPS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _group_sizes(plan: DispatchPlan) -> jax.Array:
    """Row slots of each expert, padding included; what is left over behind them counts to the last one."""
    tile = plan.tile
    size_E = (plan.size_E + tile - 1) // tile * tile
    return size_E.at[-1].add(plan.row_R.shape[0] - jnp.sum(size_E)).astype(jnp.int32)


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


def forward(x_TD, weight_R, matrices, plan: DispatchPlan, tokamax: bool = False):
    """Returns the weighted outputs of all row slots, and the gate's and up's products for the backward pass."""
    dot, _ = _find_dots(tokamax)
    gate_EDF, up_EDF, down_EFD = matrices
    sizes, x_RD = _group_sizes(plan), x_TD[plan.row_R]
    gate_RF, up_RF = dot(x_RD, gate_EDF, sizes), dot(x_RD, up_EDF, sizes)
    y_RD = dot(jax.nn.silu(gate_RF) * up_RF, down_EFD, sizes) * weight_R[:, None]
    return y_RD.astype(x_TD.dtype), (gate_RF, up_RF)


def backward(x_TD, weight_R, matrices, plan: DispatchPlan, saved, g_TD, tokamax: bool = False):
    """Gradients of each row slot's row and weight and of the matrices.

    Rows are gathered anew: kept, they would be as large as everything that is saved.
    """
    dot, dot_general = _find_dots(tokamax)
    gate_EFD, up_EFD, down_EDF = (jnp.swapaxes(m, 1, 2) for m in matrices)
    gate_RF, up_RF = saved
    sizes, weight = _group_sizes(plan), weight_R[:, None]
    x_RD = x_TD[plan.row_R]
    g_RD = jnp.where(plan.used_R[:, None], g_TD[plan.row_R], 0)
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    hidden_RF = silu_RF * up_RF
    dh_unweighted_RF = dot(g_RD, down_EDF, sizes)
    dh_RF = dh_unweighted_RF * weight
    d_gate_RF = dh_RF * up_RF * (sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF)))
    d_up_RF = dh_RF * silu_RF
    dx_RD = dot(d_gate_RF, gate_EFD, sizes) + dot(d_up_RF, up_EFD, sizes)
    dweight_R = jnp.sum(hidden_RF * dh_unweighted_RF, axis=1)
    pairs = ((x_RD, d_gate_RF), (x_RD, d_up_RF), (hidden_RF, g_RD * weight))
    return dx_RD, dweight_R, tuple(dot_general(a, b, sizes, _WITHIN_GROUPS) for a, b in pairs)
