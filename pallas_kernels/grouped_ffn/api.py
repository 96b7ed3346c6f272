"""`grouped_ffn`: gather, gate and up matmuls, SwiGLU, down matmul, weights and combination over the tiles of a plan.

Letters as in `pallas_kernels`: T rows, A choices of a row, E experts, D model width, F expert width, R row slots.
In JAX (`grouped_ffn_reference`): `sum_a weight_TA * down(silu(gate(x)) * up(x))`, each with the expert's matrices.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.combine import SUMS, unpermute_sum
from pallas_kernels.dispatch import DispatchPlan
from pallas_kernels.grouped_ffn import ragged, tpu, xla_tiles
from pallas_kernels.varying import vary, varying_axes

Matrices = tuple[jax.Array, jax.Array, jax.Array]

# A backend is a pair: forward gives the weighted outputs of every row slot, and the gate's and up's products `[R, F]`
# for backward; that gives, from the cotangent of the combined rows, the gradients of each row slot's row, of its
# weight, and of the matrices. All save the same, so that one may do the one and another the other; row slots that are
# not used may hold anything, NaN too.
BACKENDS: dict[str, tuple[Callable, Callable]] = {
    "xla_tiles": (xla_tiles.forward, xla_tiles.backward),
    "ragged_dot": (ragged.forward, ragged.backward),
    "pallas_tpu": (tpu.forward, tpu.backward),
    "tokamax": (partial(ragged.forward, tokamax=True), partial(ragged.backward, tokamax=True)),
    "pallas_interpret": (partial(tpu.forward, interpret=True), partial(tpu.backward, interpret=True)),
}


def grouped_ffn(
    x_TD: jax.Array,
    weight_TA: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: DispatchPlan,
    backend: str = "xla_tiles",
) -> jax.Array:
    """Each row's weighted sum of its experts' outputs, `[T, D]`; dropped assignments add nothing.

    Nothing is scattered, forward or backward: rows are gathered into tiles and outputs gathered back and summed.

    Args:
      x_TD: rows. weight_TA: weights of the assignments. gate_EDF, up_EDF, down_EFD: the experts' matrices.
      plan: of `make_plan`.
      backend: a name in `BACKENDS` (`tokamax` needs that extra), or `auto`: by the platform that the program
        is lowered for, the kernels on TPUs (or `ragged_dot`, where types or tiles do not suit them), `ragged_dot` on
        GPUs, the loop over tiles elsewhere.

    Raises:
      ValueError: the backend is unknown, or shapes do not fit.
    """
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(f"grouped_ffn: {backend!r} is none of {', '.join(BACKENDS)}, auto")
    n_experts, d, f = gate_EDF.shape
    if up_EDF.shape != (n_experts, d, f) or down_EFD.shape != (n_experts, f, d) or x_TD.shape[1] != d:
        raise ValueError(f"grouped_ffn: {x_TD.shape}, {gate_EDF.shape}, {up_EDF.shape}, {down_EFD.shape} do not fit")
    if weight_TA.shape != plan.row_slot_TA.shape or weight_TA.shape[0] != x_TD.shape[0]:
        raise ValueError(f"grouped_ffn: weights {weight_TA.shape} for the plan's {plan.row_slot_TA.shape}")
    operands = (x_TD, weight_TA, (gate_EDF, up_EDF, down_EFD), plan)
    # Inside `shard_map`, what is equal on all devices is typed as different here: JAX then sums its gradient over them,
    # which our own backward pass does not.
    axes = varying_axes(*jax.tree.leaves(operands))
    return _grouped_ffn(backend, *jax.tree.map(lambda a: vary(a, axes), operands))


def _run(backend: str, step: int, *operands):
    """Forward (step 0) or backward (1) of a backend."""
    if backend != "auto":
        return BACKENDS[backend][step](*operands)
    # Every branch is traced, whatever the platform is: one that would refuse the operands must not be among them.
    x_TD, _, matrices, plan, *_ = operands
    on_tpu = "ragged_dot" if tpu.unsupported_reason(x_TD, matrices, plan) else "pallas_tpu"
    platforms = {"tpu": on_tpu, "cuda": "ragged_dot", "rocm": "ragged_dot"}
    steps = {platform: BACKENDS[name][step] for platform, name in platforms.items()}
    return jax.lax.platform_dependent(*operands, default=BACKENDS["xla_tiles"][step], **steps)


def _sum(backend: str, rows_RD: jax.Array, plan: DispatchPlan) -> jax.Array:
    """`[T, D]`, by a kernel where the tiles go through kernels."""
    return unpermute_sum(rows_RD, plan, backend if backend == "auto" or backend in SUMS else "xla")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_ffn(
    backend: str, x_TD: jax.Array, weight_TA: jax.Array, matrices: Matrices, plan: DispatchPlan
) -> jax.Array:
    return _forward(backend, x_TD, weight_TA, matrices, plan)[0]


def _forward(backend: str, x_TD: jax.Array, weight_TA: jax.Array, matrices: Matrices, plan: DispatchPlan):
    weight_R = jnp.where(plan.used_R, weight_TA[plan.row_R, plan.choice_R], 0)
    y_RD, saved = _run(backend, 0, x_TD, weight_R, matrices, plan)
    return _sum(backend, y_RD, plan), (x_TD, weight_R, matrices, plan, saved)


def _backward(backend: str, residuals, g_TD: jax.Array):
    x_TD, weight_R, matrices, plan, saved = residuals
    dx_RD, dweight_R, d_matrices = _run(backend, 1, x_TD, weight_R, matrices, plan, saved, g_TD)
    dweight_TA = jnp.where(plan.kept_TA, dweight_R[plan.row_slot_TA], 0)
    return _sum(backend, dx_RD, plan), dweight_TA, d_matrices, None


_grouped_ffn.defvjp(_forward, _backward)
