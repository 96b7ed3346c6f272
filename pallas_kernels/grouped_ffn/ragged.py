"""`lax.ragged_dot` over the plan's places: a grouped kernel on TPUs; dense, every row by every expert, on a CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Plan


def _group_sizes(plan: Plan) -> jax.Array:
    """Places of each expert, padding included; what is left over behind them counts to the last one."""
    tile = plan.tile
    size_E = (plan.size_E + tile - 1) // tile * tile
    return size_E.at[-1].add(plan.row_P.shape[0] - jnp.sum(size_E)).astype(jnp.int32)


def _answers(x_PD, weight_P, matrices, sizes):
    gate_EDF, up_EDF, down_EFD = matrices
    gate = jax.lax.ragged_dot(x_PD, gate_EDF, sizes)
    up = jax.lax.ragged_dot(x_PD, up_EDF, sizes)
    return jax.lax.ragged_dot(jax.nn.silu(gate) * up, down_EFD, sizes) * weight_P[:, None]


def forward(x_TD, weight_P, matrices, plan: Plan):
    """Returns the weighted answers at all places, and their transpose for the backward pass."""
    sizes = _group_sizes(plan)
    return jax.vjp(lambda x, weight, m: _answers(x, weight, m, sizes), x_TD[plan.row_P], weight_P, matrices)


def backward(x_TD, weight_P, matrices, plan: Plan, saved, g_TD):
    """Gradients of each place's row and weight and of the matrices."""
    return saved(jnp.where(plan.used_P[:, None], g_TD[plan.row_P], 0))
