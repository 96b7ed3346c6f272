"""`gather_rows` and `combine_rows`: JAX would differentiate them into scatter-adds of activations.

Letters: T rows, A choices of a row, P places of the plan, D width. A kept assignment stands at exactly one place, so
the transpose of a gather over places is a gather over assignments, and the other way round.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.combine import tpu
from pallas_kernels.dispatch import Plan


def _sum_by_gathers(rows_PD: jax.Array, plan: Plan) -> jax.Array:
    total = jnp.where(plan.kept_TA[:, :1], rows_PD[plan.place_TA[:, 0]], 0)
    for a in range(1, plan.place_TA.shape[1]):
        total += jnp.where(plan.kept_TA[:, a, None], rows_PD[plan.place_TA[:, a]], 0)
    return total


SUMS: dict[str, Callable[[jax.Array, Plan], jax.Array]] = {
    "xla": _sum_by_gathers,
    "pallas_tpu": tpu.sum_places,
    "pallas_interpret": partial(tpu.sum_places, interpret=True),
}


def sum_places(rows_PD: jax.Array, plan: Plan, backend: str = "xla") -> jax.Array:
    """Sum over a row's kept assignments of what stands at their places, `[T, D]`; no `[T, A, D]` in memory.

    Args:
      rows_PD: what stands at the places; where nothing does it may be anything, NaN too.
      plan: of `make_plan`.
      backend: a name in `SUMS`, or `auto`: the kernel where the program is lowered for TPUs and it takes the operands.
        Only `xla` can be differentiated.

    Raises:
      ValueError: the backend is unknown, or does not take the operands.
    """
    if backend != "auto":
        if backend not in SUMS:
            raise ValueError(f"sum_places: {backend!r} is none of {', '.join(SUMS)}, auto")
        return SUMS[backend](rows_PD, plan)
    # Every branch is traced, whatever the platform is: one that would refuse the operands must not be among them.
    if tpu.find_misfit(rows_PD, plan):
        return _sum_by_gathers(rows_PD, plan)
    return jax.lax.platform_dependent(rows_PD, plan, tpu=tpu.sum_places, default=_sum_by_gathers)


@jax.custom_vjp
def gather_rows(x_TD: jax.Array, plan: Plan) -> jax.Array:
    """The row of each place, `[P, D]`; zero where none stands. In JAX: `where(used_P, x_TD[row_P], 0)`."""
    return jnp.where(plan.used_P[:, None], x_TD[plan.row_P], 0)


gather_rows.defvjp(
    lambda x_TD, plan: (gather_rows(x_TD, plan), plan), lambda plan, g_PD: (sum_places(g_PD, plan), None)
)


@jax.custom_vjp
def combine_rows(y_PD: jax.Array, weight_TA: jax.Array, plan: Plan) -> jax.Array:
    """Each row's weighted sum of what stands at its places, `[T, D]`; dropped assignments add nothing.

    In JAX: `sum over a of where(kept_TA, weight_TA, 0) * y_PD[place_TA]`.
    """
    total = jnp.zeros((), y_PD.dtype)
    for a, weight_T in enumerate(_kept_weights(weight_TA, plan).T):
        total = total + weight_T[:, None] * y_PD[plan.place_TA[:, a]]
    return total


def _kept_weights(weight_TA: jax.Array, plan: Plan) -> jax.Array:
    return jnp.where(plan.kept_TA, weight_TA, 0)


def _combine_forward(y_PD, weight_TA, plan):
    return combine_rows(y_PD, weight_TA, plan), (y_PD, weight_TA, plan)


def _combine_backward(saved, g_TD):
    y_PD, weight_TA, plan = saved
    g_PD = g_TD[plan.row_P]
    weight_P = jnp.where(plan.used_P, weight_TA[plan.row_P, plan.choice_P], 0)
    along_P = jnp.sum(y_PD * g_PD, axis=1)
    dweight_TA = jnp.where(plan.kept_TA, along_P[plan.place_TA], 0).astype(weight_TA.dtype)
    return (weight_P[:, None] * g_PD).astype(y_PD.dtype), dweight_TA, None


combine_rows.defvjp(_combine_forward, _combine_backward)
