"""`gather_rows` and `combine_rows`: JAX would differentiate them into scatter-adds of activations.

Letters as in `pallas_kernels`: T rows, A choices of a row, R row slots of the plan, D width. A kept assignment stands
in exactly one row slot, so the transpose of a gather over row slots is a gather over assignments, and the other way
round.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.combine import tpu
from pallas_kernels.dispatch import DispatchPlan


def _sum_by_gathers(rows_RD: jax.Array, plan: DispatchPlan) -> jax.Array:
    total = jnp.where(plan.kept_TA[:, :1], rows_RD[plan.row_slot_TA[:, 0]], 0)
    for a in range(1, plan.row_slot_TA.shape[1]):
        total += jnp.where(plan.kept_TA[:, a, None], rows_RD[plan.row_slot_TA[:, a]], 0)
    return total


SUMS: dict[str, Callable[[jax.Array, DispatchPlan], jax.Array]] = {
    "xla": _sum_by_gathers,
    "pallas_tpu": tpu.unpermute_sum,
    "pallas_interpret": partial(tpu.unpermute_sum, interpret=True),
}


def unpermute_sum(rows_RD: jax.Array, plan: DispatchPlan, backend: str = "xla") -> jax.Array:
    """Sum over a row's kept assignments of what stands in their row slots, `[T, D]`; no `[T, A, D]` in memory.

    Args:
      rows_RD: what stands in the row slots; where nothing does it may be anything, NaN too.
      plan: of `make_plan`.
      backend: a name in `SUMS`, or `auto`: the kernel where the program is lowered for TPUs and it takes the operands.
        Only `xla` can be differentiated.

    Raises:
      ValueError: the backend is unknown, or does not take the operands.
    """
    if backend != "auto":
        if backend not in SUMS:
            raise ValueError(f"unpermute_sum: {backend!r} is none of {', '.join(SUMS)}, auto")
        return SUMS[backend](rows_RD, plan)
    # Every branch is traced, whatever the platform is: one that would refuse the operands must not be among them.
    if tpu.unsupported_reason(rows_RD, plan):
        return _sum_by_gathers(rows_RD, plan)
    return jax.lax.platform_dependent(rows_RD, plan, tpu=tpu.unpermute_sum, default=_sum_by_gathers)


@jax.custom_vjp
def gather_rows(x_TD: jax.Array, plan: DispatchPlan) -> jax.Array:
    """The row of each row slot, `[R, D]`; zero where none stands. In JAX: `where(used_R, x_TD[row_R], 0)`."""
    return jnp.where(plan.used_R[:, None], x_TD[plan.row_R], 0)


gather_rows.defvjp(
    lambda x_TD, plan: (gather_rows(x_TD, plan), plan), lambda plan, g_RD: (unpermute_sum(g_RD, plan), None)
)


@jax.custom_vjp
def combine_rows(y_RD: jax.Array, weight_TA: jax.Array, plan: DispatchPlan) -> jax.Array:
    """Each row's weighted sum of what stands in its row slots, `[T, D]`; dropped assignments add nothing.

    In JAX: `sum over a of where(kept_TA, weight_TA, 0) * y_RD[row_slot_TA]`.
    """
    total = jnp.zeros((), y_RD.dtype)
    for a, weight_T in enumerate(_kept_weights(weight_TA, plan).T):
        total = total + weight_T[:, None] * y_RD[plan.row_slot_TA[:, a]]
    return total


def _kept_weights(weight_TA: jax.Array, plan: DispatchPlan) -> jax.Array:
    return jnp.where(plan.kept_TA, weight_TA, 0)


def _combine_forward(y_RD, weight_TA, plan):
    return combine_rows(y_RD, weight_TA, plan), (y_RD, weight_TA, plan)


def _combine_backward(saved, g_TD):
    y_RD, weight_TA, plan = saved
    g_RD = g_TD[plan.row_R]
    weight_R = jnp.where(plan.used_R, weight_TA[plan.row_R, plan.choice_R], 0)
    along_R = jnp.sum(y_RD * g_RD, axis=1)
    dweight_TA = jnp.where(plan.kept_TA, along_R[plan.row_slot_TA], 0).astype(weight_TA.dtype)
    return (weight_R[:, None] * g_RD).astype(y_RD.dtype), dweight_TA, None


combine_rows.defvjp(_combine_forward, _combine_backward)
