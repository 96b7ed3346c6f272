"""Mixture-of-experts feed-forward layer (domain experts): a group for each service, and one across all of them."""

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
from moerec.nn.moe.router import RouterInputs, count_groups, route_slots
from moerec.nn.profile import count_profile_slots
from moerec.nn.sharding import ROW_AXES, param_spec
from moerec.types import Array, Routing

MATRICES = ("gate_EDF", "up_EDF", "down_EFD")


def count_experts(config: MoEConfig, n_services: int) -> int:
    """Experts of a layer: the groups of the services, then the cross group.

    Raises:
      InputError: a slot could not find `n_active` experts.
    """
    if config.services and not n_services:
        raise InputError("config.model.moe.services: there are no services, so none has a group; set it to false")
    n_open = config.n_open_groups or n_services * int(config.services)
    if n_open > n_services:
        raise InputError(f"config.model.moe.n_open_groups: {n_open} of {n_services} services")
    n_at_hand = n_open + int(config.cross)
    if config.n_active > n_at_hand * config.n_per_group:
        at_hand = f"a slot has {n_at_hand} groups of {config.n_per_group}"
        raise InputError(f"config.model.moe.n_active: {config.n_active} experts, but {at_hand}")
    return count_groups(config, n_services) * config.n_per_group


class DomainExperts(nnx.Module):
    """Routed gated feed-forward experts; expert e belongs to group `e // n_per_group`, the last group is cross-domain
    (but with `moe.cross` off).

    Shazeer et al. (2017) for the mixture; softmax before top-k, renormalised or not; beside it an expert that sees
    every slot, weighed by a gate or not. Qwen2-MoE (Yang et al. 2024) is one cross group, not renormalised, with the
    gate. The bias that steers the choice without a gradient is no parameter: it is part of the training state
    (`moerec.nn.moe.balance.update_bias`).
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        moe, d = config.moe, config.d_model
        e, f = count_experts(moe, n_services), moe.d_expert
        k_router, k_gate, k_up, k_down, k_shared = jax.random.split(key, 5)
        zeros = jax.nn.initializers.zeros
        self.router_ED = declare(k_router, (e, d), ("experts", "embed"), fan_in_second)
        # Under a hypothesis the domain is known.
        reads_domain = moe.reads_domain and not config.is_asked and n_services > 0
        self.w_domain_EZ = (
            declare(k_router, (e, n_services), ("experts", None), zeros, decay="none") if reads_domain else None
        )
        m = count_profile_slots(config) if config.personal.route else 0
        self.w_profile_EM = declare(k_router, (e, m), ("experts", None), zeros, decay="none") if m else None
        self.gate_EDF = declare(k_gate, (e, d, f), ("experts", "embed", "mlp"), _fan_in_each)
        self.up_EDF = declare(k_up, (e, d, f), ("experts", "embed", "mlp"), _fan_in_each)
        self.down_EFD = declare(k_down, (e, f, d), ("experts", "mlp", "embed"), _fan_in_each)
        self.shared = SwiGLU(k_shared, d, moe.d_shared) if moe.d_shared else None
        self.shared_gate_D = declare(k_shared, (d,), ("embed",), fan_in) if moe.shared_gate else None
        self.moe, self.n_services = moe, n_services

    def __call__(
        self, x_BTD: jax.Array, inputs: RouterInputs, bias_E: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Routing]:
        """The experts' weighted sum `[B, T, D]` (plus the shared expert's), and the sums of the routing of this layer.

        Under `jax.set_mesh` rows are split over `ROW_AXES` and experts over `expert`; otherwise all is on one device.

        Args:
          x_BTD: normalised states. bias_E: what steers the choice.
          key: of a training step; switches jitter on, and the capacity, if there is one.
        """
        moe = self.moe
        seen_BTD = x_BTD
        if key is not None and moe.jitter_rate:
            seen_BTD = x_BTD * jax.random.uniform(
                key, x_BTD.shape, x_BTD.dtype, 1 - moe.jitter_rate, 1 + moe.jitter_rate
            )
        relevance_BTM = None if self.w_profile_EM is None else inputs.relevance_BTM
        rows = Rows(x_BTD, seen_BTD, inputs._replace(relevance_BTM=relevance_BTM))
        matrices = (getattr(self, name)[...] for name in MATRICES)
        w_domain, w_profile = (None if w is None else w[...] for w in (self.w_domain_EZ, self.w_profile_EM))
        weights = Weights(self.router_ED[...], w_domain, w_profile, bias_E, *matrices)
        bounded = key is not None and bool(moe.capacity_factor)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            y_BTD, routing = _apply(rows, weights, moe, self.n_services, bounded, None)
        else:
            axes = {name: getattr(self, name).get_metadata()["axes"] for name in MATRICES}
            y_BTD, routing = _apply_on_mesh(rows, weights, moe, self.n_services, bounded, mesh, axes)
        if self.shared is not None:
            shared_BTD = self.shared(x_BTD)
            if self.shared_gate_D is not None:
                shared_BTD *= jax.nn.sigmoid(x_BTD @ self.shared_gate_D[...].astype(x_BTD.dtype))[..., None]
            y_BTD = y_BTD + shared_BTD
        return y_BTD, routing

    def weigh_groups(self, x_XD: jax.Array, inputs: RouterInputs, bias_E: jax.Array) -> jax.Array:
        """`[..., G]`, what the chosen experts of each group weigh at each slot; they add up to one. On one device.

        Args: as `__call__`, with any axes in the place of B and T.
        """
        expert_XA, weight_XA = self.choose(x_XD, inputs, bias_E)
        of_group = jax.nn.one_hot(expert_XA // self.moe.n_per_group, count_groups(self.moe, self.n_services))
        return jnp.sum(of_group * (weight_XA / jnp.sum(weight_XA, axis=-1, keepdims=True))[..., None], axis=-2)

    def choose(self, x_XD: jax.Array, inputs: RouterInputs, bias_E: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[..., A]` int32, the experts of each slot, best first, and their weights. On one device.

        Args: as `weigh_groups`.
        """
        shape = x_XD.shape[:-1]
        inputs = inputs._replace(relevance_BTM=None if self.w_profile_EM is None else inputs.relevance_BTM)
        x_SD, known = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), (x_XD, inputs))
        w_domain, w_profile = (None if w is None else w[...] for w in (self.w_domain_EZ, self.w_profile_EM))
        weights = self.router_ED[...], w_domain, w_profile, bias_E
        routed = route_slots(x_SD, known, *weights, self.moe, self.n_services)
        weight_SA = routed.weight_TA if self.moe.renormalise else routed.probability_TA
        return routed.expert_TA.reshape(*shape, -1), weight_SA.reshape(*shape, -1)


class Rows(NamedTuple):
    """What a layer is given of each slot: states, the states that the router sees, and what else is known of it."""

    x_BTD: jax.Array
    seen_BTD: jax.Array
    known: RouterInputs


class Weights(NamedTuple):
    """The arrays of `DomainExperts` and the router's bias, or where each is."""

    router_ED: Array
    w_domain_EZ: Array | None
    w_profile_EM: Array | None
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
    rows = rows._replace(known=rows.known._replace(domain_BT=rows.known.domain_BT.at[n_batch:].set(-1)))
    spec, everywhere = PartitionSpec(ROW_AXES), PartitionSpec()
    matrices = {name: param_spec(axes[name], getattr(weights, name).shape, mesh) for name in axes}

    def apply(rows: Rows, weights: Weights) -> tuple[jax.Array, Routing]:
        # FSDP: the parts of the matrices come together only here; the transpose is a psum-scatter of the gradients.
        whole = {
            name: jax.lax.all_gather(getattr(weights, name), "data", axis=spec.index("data"), tiled=True)
            for name, spec in matrices.items()
            if "data" in spec
        }
        return _apply(rows, weights._replace(**whole), moe, n_services, bounded, mesh)

    y_BTD, routing = jax.shard_map(
        apply,
        mesh=mesh,
        in_specs=(spec, Weights(**{name: matrices.get(name, everywhere) for name in Weights._fields})),
        out_specs=(spec, everywhere),
    )(rows, weights)
    return y_BTD[:n_batch], routing


def _apply(
    rows: Rows, weights: Weights, moe: MoEConfig, n_services: int, bounded: bool, mesh: AbstractMesh | None
) -> tuple[jax.Array, Routing]:
    """Routes the rows of a device and applies their experts; the sums are those of all devices."""
    shape, n_experts = rows.x_BTD.shape, weights.router_ED.shape[0]
    flat = jax.tree.map(lambda x: x.reshape(shape[0] * shape[1], *x.shape[2:]), rows)
    x_SD, seen_SD, known = flat
    domain_S, real_S = known.domain_BT, known.real_BT
    routing_weights = weights.router_ED, weights.w_domain_EZ, weights.w_profile_EM, weights.bias_E
    routed = route_slots(seen_SD, known, *routing_weights, moe, n_services)
    weight_SA = routed.weight_TA if moe.renormalise else routed.probability_TA
    expert_SA = jnp.where(real_S[:, None], routed.expert_TA, n_experts)
    capacity = None
    if bounded:
        n_real = jnp.sum(real_S)  # padding is nobody's share
        if mesh is not None:
            n_real = jax.lax.psum(n_real, "expert")  # the slots that these experts serve
        even = n_real * moe.n_active / n_experts
        capacity = jnp.maximum(jnp.round(even * moe.capacity_factor), 1).astype(jnp.int32)
    assignment = Assignment(expert_SA, weight_SA.astype(x_SD.dtype), capacity)
    dtype = x_SD.dtype
    matrices = (weights.gate_EDF.astype(dtype), weights.up_EDF.astype(dtype), weights.down_EFD.astype(dtype))
    counted_S = (domain_S >= 0).astype(jnp.float32)
    sums = (routed.probability_ZE, routed.count_ZE, jnp.sum(counted_S * jnp.square(routed.lse_T)))
    if mesh is None:
        output = apply_local(x_SD, assignment, matrices, moe)
    else:
        output = apply_on_mesh(x_SD, assignment, matrices, moe)
        sums = jax.lax.psum(sums, ROW_AXES)
    return output.y_SD.reshape(shape), Routing(*sums, output.dropped.astype(jnp.float32))


def _fan_in_each(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.vmap(lambda k: fan_in(k, shape[1:], dtype))(jax.random.split(key, shape[0]))
