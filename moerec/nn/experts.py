"""The feed-forward layer as a mixture of domain experts: a group for each service, and one across all of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig, MoEConfig
from moerec.errors import InputError
from moerec.nn.layers import SwiGLU, declare, fan_in
from moerec.shapes import Routing
from pallas_kernels.dispatch import make_plan
from pallas_kernels.grouped_ffn import grouped_ffn
from pallas_kernels.router import Routed, route

CLOSED = -1e9  # logit of a group that a slot may not use; its probability is exactly zero


class Request(NamedTuple):
    """What the router knows of each slot beside its state.

    Attributes:
      log_domain_BTZ: the analyser's log-posterior. domain_BT: int32 domain under which the slot is counted, or -1.
      real_BT: bool, false in padding, which goes to no expert.
    """

    log_domain_BTZ: jax.Array
    domain_BT: jax.Array
    real_BT: jax.Array


def count_experts(config: MoEConfig, n_services: int) -> int:
    """Experts of a layer: the groups of the services, then the cross group.

    Raises:
      InputError: a slot could not find `n_active` experts.
    """
    n_open = n_services if config.n_open_groups == 0 else config.n_open_groups
    if n_open > n_services:
        raise InputError(f"config.model.moe.n_open_groups: {n_open} of {n_services} services")
    if config.n_active > (n_open + 1) * config.n_per_group:
        at_hand = f"a slot has {n_open + 1} groups of {config.n_per_group}"
        raise InputError(f"config.model.moe.n_active: {config.n_active} experts, but {at_hand}")
    return (n_services + 1) * config.n_per_group


def open_groups(log_domain_SZ: jax.Array, n_open: int) -> jax.Array:
    """`[S, G]`, zero for the `n_open` most probable services and for the cross group, else `CLOSED`."""
    best_SA = jax.lax.top_k(log_domain_SZ, n_open)[1]
    chosen_SZ = jnp.sum(jax.nn.one_hot(best_SA, log_domain_SZ.shape[1], dtype=jnp.float32), axis=1)
    return jnp.pad(CLOSED * (1 - chosen_SZ), ((0, 0), (0, 1)))


class DomainExperts(nnx.Module):
    """Routed gated feed-forward experts; expert e belongs to group `e // n_per_group`, the last group is cross-domain.

    Shazeer et al. (2017) for the mixture; softmax before top-k; the bias that steers the choice without a gradient is
    that of Wang et al. (2024), moved by `moerec.balance.update_bias` and never by the optimiser.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        moe, d = config.moe, config.d_model
        e, f = count_experts(moe, n_services), moe.d_expert
        k_router, k_gate, k_up, k_down, k_shared = jax.random.split(key, 5)
        zeros = jax.nn.initializers.zeros
        self.router_ED = declare(k_router, (e, d), ("experts", "embed"), _transposed_fan_in)
        self.lift_EZ = declare(k_router, (e, n_services), ("experts", None), zeros, decay="none")
        self.bias_E = declare(k_router, (e,), ("experts",), zeros, decay="none")
        self.gate_EDF = declare(k_gate, (e, d, f), ("experts", "embed", "mlp"), _fan_in_each)
        self.up_EDF = declare(k_up, (e, d, f), ("experts", "embed", "mlp"), _fan_in_each)
        self.down_EFD = declare(k_down, (e, f, d), ("experts", "mlp", "embed"), _fan_in_each)
        self.shared = SwiGLU(k_shared, d, moe.d_shared) if moe.d_shared else None
        self.moe = moe

    def __call__(self, x_BTD: jax.Array, request: Request, key: jax.Array | None) -> tuple[jax.Array, Routing]:
        """The experts' weighted sum `[B, T, D]` (plus the shared expert's), and the sums of the routing of this layer.

        Args:
          x_BTD: normalised states. key: of a training step; switches jitter on, and the capacity, if there is one.
        """
        shape, n_experts = x_BTD.shape, self.router_ED.shape[0]
        x_SD = x_BTD.reshape(-1, shape[-1])
        domain_S, real_S = request.domain_BT.reshape(-1), request.real_BT.reshape(-1)
        routed = self._route(x_SD, request.log_domain_BTZ.reshape(x_SD.shape[0], -1), domain_S, key)
        expert_SA = jnp.where(real_S[:, None], routed.expert_TA, n_experts)
        capacity = None
        if key is not None and self.moe.capacity_factor:
            even = jnp.sum(real_S) * self.moe.n_active / n_experts  # padding is nobody's share
            capacity = jnp.maximum(jnp.round(even * self.moe.capacity_factor), 1).astype(jnp.int32)
        plan = make_plan(expert_SA, n_experts, self.moe.tile, capacity)
        gate, up, down = (m[...].astype(x_SD.dtype) for m in (self.gate_EDF, self.up_EDF, self.down_EFD))
        y_SD = grouped_ffn(x_SD, routed.weight_TA.astype(x_SD.dtype), gate, up, down, plan)
        if self.shared is not None:
            y_SD = y_SD + self.shared(x_SD)
        counted_S = (domain_S >= 0).astype(jnp.float32)
        z = request.log_domain_BTZ.shape[-1]
        routing = Routing(
            routed.probability_ZE[:z],
            routed.count_ZE[:z],
            jnp.sum(counted_S * jnp.square(routed.lse_T)),
            jnp.sum(plan.demand_E - plan.size_E).astype(jnp.float32),
        )
        return y_SD.reshape(shape), routing

    def _route(self, x_SD: jax.Array, log_domain_SZ: jax.Array, domain_S: jax.Array, key: jax.Array | None) -> Routed:
        moe = self.moe
        if key is not None and moe.jitter_rate:
            noise = jax.random.uniform(key, x_SD.shape, x_SD.dtype, 1 - moe.jitter_rate, 1 + moe.jitter_rate)
            x_SD = x_SD * noise
        prior, lift = log_domain_SZ, self.lift_EZ[...]
        if moe.n_open_groups:
            # Closing a group is one more term of the logits that is linear in what is known of the slot.
            group_E = jnp.arange(lift.shape[0]) // moe.n_per_group
            prior = jnp.concatenate([prior, open_groups(log_domain_SZ, moe.n_open_groups)], axis=1)
            lift = jnp.concatenate([lift, jax.nn.one_hot(group_E, log_domain_SZ.shape[1] + 1)], axis=1)
        return route(x_SD, self.router_ED[...], prior, lift, self.bias_E[...], domain_S, moe.n_active)


def _transposed_fan_in(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return shape[1] ** -0.5 * jax.random.normal(key, shape, dtype)


def _fan_in_each(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.vmap(lambda k: fan_in(k, shape[1:], dtype))(jax.random.split(key, shape[0]))
