"""The feed-forward layer as a mixture of domain experts: a group for each service, and one across all of them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from moerec.config import ModelConfig, MoEConfig
from moerec.errors import InputError
from moerec.nn.layers import SwiGLU, declare, fan_in, fan_in_second
from moerec.nn.moe.expert_parallel import Assignment, apply_local, apply_on_mesh
from moerec.nn.sharding import ROW_AXES, param_spec
from moerec.types import Array, Routing
from pallas_kernels.router import Routed, route

MASK_VALUE = -1e9  # logit of a group that a slot may not use; its probability is exactly zero
MATRICES = ("gate_EDF", "up_EDF", "down_EFD")


class RouterInputs(NamedTuple):
    """What the router knows of each slot beside its state.

    Attributes:
      log_domain_BTZ: the analyser's log-posterior. domain_BT: int32 domain under which the slot is counted, or -1.
      real_BT: bool, false in padding, which goes to no expert.
      relevance_BTM: how much each memory slot of the profile matters, or None.
    """

    log_domain_BTZ: jax.Array
    domain_BT: jax.Array
    real_BT: jax.Array
    relevance_BTM: jax.Array | None = None


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
    """`[S, G]`, zero for the `n_open` most probable services and for the cross group, else `MASK_VALUE`."""
    best_SA = jax.lax.top_k(log_domain_SZ, n_open)[1]
    chosen_SZ = jnp.sum(jax.nn.one_hot(best_SA, log_domain_SZ.shape[1], dtype=jnp.float32), axis=1)
    return jnp.pad(MASK_VALUE * (1 - chosen_SZ), ((0, 0), (0, 1)))


class DomainExperts(nnx.Module):
    """Routed gated feed-forward experts; expert e belongs to group `e // n_per_group`, the last group is cross-domain.

    Shazeer et al. (2017) for the mixture; softmax before top-k; the bias that steers the choice without a gradient is
    that of Wang et al. (2024), moved by `moerec.nn.moe.balance.update_bias` and never by the optimiser.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        moe, d = config.moe, config.d_model
        e, f = count_experts(moe, n_services), moe.d_expert
        k_router, k_gate, k_up, k_down, k_shared = jax.random.split(key, 5)
        zeros = jax.nn.initializers.zeros
        self.router_ED = declare(k_router, (e, d), ("experts", "embed"), fan_in_second)
        self.w_domain_EZ = declare(k_router, (e, n_services), ("experts", None), zeros, decay="none")
        n_slots = config.personal.n_slots if config.personal.route else 0
        self.w_profile_EM = declare(k_router, (e, n_slots), ("experts", None), zeros, decay="none") if n_slots else None
        self.n_services = n_services
        self.bias_E = declare(k_router, (e,), ("experts",), zeros, decay="none")
        self.gate_EDF = declare(k_gate, (e, d, f), ("experts", "embed", "mlp"), _fan_in_each)
        self.up_EDF = declare(k_up, (e, d, f), ("experts", "embed", "mlp"), _fan_in_each)
        self.down_EFD = declare(k_down, (e, f, d), ("experts", "mlp", "embed"), _fan_in_each)
        self.shared = SwiGLU(k_shared, d, moe.d_shared) if moe.d_shared else None
        self.moe = moe

    def __call__(
        self, x_BTD: jax.Array, router_inputs: RouterInputs, key: jax.Array | None
    ) -> tuple[jax.Array, Routing]:
        """The experts' weighted sum `[B, T, D]` (plus the shared expert's), and the sums of the routing of this layer.

        Under `jax.set_mesh` rows are split over `ROW_AXES` and experts over `expert`; otherwise all is on one device.

        Args:
          x_BTD: normalised states. key: of a training step; switches jitter on, and the capacity, if there is one.
        """
        moe = self.moe
        seen_BTD = x_BTD
        if key is not None and moe.jitter_rate:
            seen_BTD = x_BTD * jax.random.uniform(
                key, x_BTD.shape, x_BTD.dtype, 1 - moe.jitter_rate, 1 + moe.jitter_rate
            )
        router_features_BTX, w_features_EX = router_inputs.log_domain_BTZ, self.w_domain_EZ[...]
        if self.w_profile_EM is not None:
            # What matters of the profile is one more thing known of the slot.
            assert router_inputs.relevance_BTM is not None
            router_features_BTX = jnp.concatenate([router_features_BTX, router_inputs.relevance_BTM], axis=-1)
            w_features_EX = jnp.concatenate([w_features_EX, self.w_profile_EM[...]], axis=-1)
        rows = Rows(x_BTD, seen_BTD, router_features_BTX, router_inputs.domain_BT, router_inputs.real_BT)
        matrices = (getattr(self, name)[...] for name in MATRICES)
        weights = Weights(self.router_ED[...], w_features_EX, self.bias_E[...], *matrices)
        bounded = key is not None and bool(moe.capacity_factor)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            y_BTD, routing = _apply(rows, weights, moe, self.n_services, bounded, None)
        else:
            axes = {name: getattr(self, name).get_metadata()["axes"] for name in MATRICES}
            y_BTD, routing = _apply_on_mesh(rows, weights, moe, self.n_services, bounded, mesh, axes)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, routing


class Rows(NamedTuple):
    """What a layer is given of each slot: states, the states that the router sees, and what else is known of it.

    Attributes:
      router_features_BTX: the analyser's log-posterior over services, then the relevance of the profile's memory slots, if any.
    """

    x_BTD: jax.Array
    seen_BTD: jax.Array
    router_features_BTX: jax.Array
    domain_BT: jax.Array
    real_BT: jax.Array


class Weights(NamedTuple):
    """The arrays of `DomainExperts`, or where each is; `w_features_EX` is what the hint adds to the logits."""

    router_ED: Array
    w_features_EX: Array
    bias_E: Array
    gate_EDF: Array
    up_EDF: Array
    down_EFD: Array


def _apply_on_mesh(
    rows: Rows,
    weights: Weights,
    moe: MoEConfig,
    n_services: int,
    bounded: bool,
    mesh: AbstractMesh,
    axes: dict[str, tuple],
) -> tuple[jax.Array, Routing]:
    """One `shard_map` over the mesh; the batch is filled up with padding where the devices do not divide it."""
    (n_experts, _, f), n_batch = weights.gate_EDF.shape, rows.x_BTD.shape[0]
    if n_experts % mesh.shape["expert"]:
        raise InputError(f"config.train.mesh_expert: {mesh.shape['expert']} devices for {n_experts} experts")
    if f % mesh.shape["model"]:
        raise InputError(f"config.train.mesh_model: {mesh.shape['model']} devices for experts of width {f}")
    spare = -n_batch % math.prod(mesh.shape[name] for name in ROW_AXES)
    rows = jax.tree.map(lambda a: jnp.pad(a, ((0, spare), *((0, 0),) * (a.ndim - 1))), rows)
    rows = rows._replace(domain_BT=rows.domain_BT.at[n_batch:].set(-1))
    spec, everywhere = PartitionSpec(ROW_AXES), PartitionSpec()
    matrices = {name: param_spec(axes[name], getattr(weights, name).shape, mesh) for name in axes}

    def output(rows: Rows, weights: Weights) -> tuple[jax.Array, Routing]:
        # FSDP: the parts of the matrices come together only here; the transpose is a psum-scatter of the gradients.
        whole = {
            name: jax.lax.all_gather(getattr(weights, name), "data", axis=spec.index("data"), tiled=True)
            for name, spec in matrices.items()
            if "data" in spec
        }
        return _apply(rows, weights._replace(**whole), moe, n_services, bounded, mesh)

    y_BTD, routing = jax.shard_map(
        output,
        mesh=mesh,
        in_specs=(spec, weights._replace(**{name: matrices.get(name, everywhere) for name in Weights._fields})),
        out_specs=(spec, everywhere),
    )(rows, weights)
    return y_BTD[:n_batch], routing


def _apply(
    rows: Rows, weights: Weights, moe: MoEConfig, n_services: int, bounded: bool, mesh: AbstractMesh | None
) -> tuple[jax.Array, Routing]:
    """Routes the rows of a device and has them answered; the sums are those of all devices."""
    shape, n_experts = rows.x_BTD.shape, weights.router_ED.shape[0]
    x_SD, seen_SD = rows.x_BTD.reshape(-1, shape[-1]), rows.seen_BTD.reshape(-1, shape[-1])
    domain_S, real_S = rows.domain_BT.reshape(-1), rows.real_BT.reshape(-1)
    router_features_SX = rows.router_features_BTX.reshape(-1, rows.router_features_BTX.shape[-1])
    routed = _route(seen_SD, router_features_SX, domain_S, weights, moe, n_services)
    expert_SA = jnp.where(real_S[:, None], routed.expert_TA, n_experts)
    capacity = None
    if bounded:
        n_real = jnp.sum(real_S)  # padding is nobody's share
        if mesh is not None:
            n_real = jax.lax.psum(n_real, "expert")  # the slots that these experts serve
        even = n_real * moe.n_active / n_experts
        capacity = jnp.maximum(jnp.round(even * moe.capacity_factor), 1).astype(jnp.int32)
    chosen = Assignment(expert_SA, routed.weight_TA.astype(x_SD.dtype), capacity)
    dtype = x_SD.dtype
    matrices = (weights.gate_EDF.astype(dtype), weights.up_EDF.astype(dtype), weights.down_EFD.astype(dtype))
    counted_S = (domain_S >= 0).astype(jnp.float32)
    sums = (routed.probability_ZE, routed.count_ZE, jnp.sum(counted_S * jnp.square(routed.lse_T)))
    if mesh is None:
        output = apply_local(x_SD, chosen, matrices, moe)
    else:
        output = apply_on_mesh(x_SD, chosen, matrices, moe)
        sums = jax.lax.psum(sums, ROW_AXES)
    probability_ZE, count_ZE, square_lse = sums
    routing = Routing(
        probability_ZE[:n_services], count_ZE[:n_services], square_lse, output.dropped.astype(jnp.float32)
    )
    return output.y_SD.reshape(shape), routing


def _route(
    seen_SD: jax.Array,
    router_features_SX: jax.Array,
    domain_S: jax.Array,
    weights: Weights,
    moe: MoEConfig,
    n_services: int,
) -> Routed:
    backend = {"auto": "auto", "pallas_tpu": "pallas_tpu"}.get(moe.backend, "xla")
    prior, lift = router_features_SX, weights.w_features_EX
    if moe.n_open_groups:
        # Closing a group is one more term of the logits that is linear in what is known of the slot.
        group_E = jnp.arange(lift.shape[0]) // moe.n_per_group
        prior = jnp.concatenate([prior, open_groups(router_features_SX[:, :n_services], moe.n_open_groups)], axis=1)
        lift = jnp.concatenate([lift, jax.nn.one_hot(group_E, n_services + 1)], axis=1)
    return route(seen_SD, weights.router_ED, prior, lift, weights.bias_E, domain_S, moe.n_active, backend)


def _fan_in_each(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.vmap(lambda k: fan_in(k, shape[1:], dtype))(jax.random.split(key, shape[0]))
