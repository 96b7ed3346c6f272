"""The experts of text at decoding, where a step has a few tokens and reading the matrices is what they cost."""

import jax
import jax.numpy as jnp

from moerec.config import MoEConfig
from moerec.nn.moe.expert_parallel import Assignment, apply_local
from moerec.serve.generate.matmul import FEW_ROWS, Matrix, dequantize, product
from moerec.serve.generate.weights import DenseWeights, ExpertWeights


def feed_forward(x_BTD: jax.Array, weights: DenseWeights) -> jax.Array:
    """`down(silu(gate(x)) * up(x))`."""
    found = [product(x_BTD, matrix) for matrix in weights.gate_up]
    gate, up = found if len(found) == 2 else jnp.split(found[0], 2, axis=-1)
    return product(jax.nn.silu(gate) * up, weights.down)


def mix_experts(x_BTD: jax.Array, real_BT: jax.Array, weights: ExpertWeights, moe: MoEConfig) -> jax.Array:
    """`[B, T, D]`, the experts' weighted sum and the shared expert, as `DomainExperts` gives it to text.

    Args: normalised states; bool, false in padding.
    """
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_SD = jnp.zeros_like(x_SD)
    n_experts = weights.router_ED.shape[0]
    if n_experts:
        expert_SA, weight_SA = choose_experts(x_SD, weights, moe)
        is_sharded = not jax.sharding.get_abstract_mesh().empty
        n_chosen, is_few = expert_SA.size, x_SD.shape[0] <= FEW_ROWS
        if is_few and n_chosen < n_experts and not is_sharded:
            y_SD = _visit_chosen(x_SD, expert_SA, weight_SA, weights)
        elif is_few or is_sharded:
            y_SD = _visit_all(x_SD, expert_SA, weight_SA, weights)
        else:
            expert_SA = jnp.where(real_BT.reshape(-1, 1), expert_SA, n_experts)
            assignment = Assignment(expert_SA, weight_SA.astype(x_SD.dtype), None)
            matrices = (weights.gate, weights.up, weights.down)
            gate, up, down = (jnp.swapaxes(dequantize(matrix, x_SD.dtype), 1, 2) for matrix in matrices)
            y_SD = apply_local(x_SD, assignment, (gate, up, down), moe).y_SD
    y_BTD = y_SD.reshape(x_BTD.shape)
    if weights.shared is None:
        return y_BTD
    shared_BTD = feed_forward(x_BTD, weights.shared)
    if weights.shared_gate_D is not None:
        shared_BTD *= jax.nn.sigmoid(x_BTD @ weights.shared_gate_D.astype(x_BTD.dtype))[..., None]
    return y_BTD + shared_BTD


def choose_experts(x_SD: jax.Array, weights: ExpertWeights, moe: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """`[S, A]` int32 and float32, each token's experts and what they weigh: softmax, then the most probable ones."""
    logit_SE = jnp.einsum("SD,ED->SE", x_SD.astype(jnp.float32), weights.router_ED)
    n_active = min(moe.n_active, logit_SE.shape[1])  # those of closed groups weigh nothing
    expert_SA = jax.lax.top_k(logit_SE + weights.bias_E, n_active)[1]
    weight_SA = jnp.take_along_axis(jax.nn.softmax(logit_SE, axis=-1), expert_SA, axis=1)
    if moe.renormalise:
        weight_SA /= jnp.sum(weight_SA, axis=1, keepdims=True)
    return expert_SA, weight_SA


def _run_expert(x_SD: jax.Array, weights: ExpertWeights, expert: jax.Array) -> jax.Array:
    gate, up, down = (_pick(matrix, expert) for matrix in (weights.gate, weights.up, weights.down))
    return product(jax.nn.silu(product(x_SD, gate)) * product(x_SD, up), down)


def _pick(matrix: Matrix, expert: jax.Array) -> Matrix:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False), matrix)


def _visit_chosen(x_SD: jax.Array, expert_SA: jax.Array, weight_SA: jax.Array, weights: ExpertWeights) -> jax.Array:
    """One choice after the other: only the matrices of experts that were chosen are read."""
    n_active = expert_SA.shape[1]

    def visit(choice: jax.Array, y_SD: jax.Array) -> jax.Array:
        s, a = choice // n_active, choice % n_active
        own_1D = jax.lax.dynamic_slice_in_dim(x_SD, s, 1)
        out_1D = weight_SA[s, a].astype(x_SD.dtype) * _run_expert(own_1D, weights, expert_SA[s, a])
        return y_SD.at[s].add(out_1D[0])

    return jax.lax.fori_loop(0, expert_SA.size, visit, jnp.zeros_like(x_SD))


def _visit_all(x_SD: jax.Array, expert_SA: jax.Array, weight_SA: jax.Array, weights: ExpertWeights) -> jax.Array:
    """One expert after the other, each with all tokens: no matrix is read twice."""

    def visit(expert: jax.Array, y_SD: jax.Array) -> jax.Array:
        own_S1 = jnp.sum(jnp.where(expert_SA == expert, weight_SA, 0), axis=1, keepdims=True)
        return y_SD + own_S1.astype(x_SD.dtype) * _run_expert(x_SD, weights, expert)

    return jax.lax.fori_loop(0, weights.router_ED.shape[0], visit, jnp.zeros_like(x_SD))
