"""What decides where a slot goes: the router's logits from the state and from what else is known of the slot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.config import MoEConfig
from moerec.nn.layers import MASK_VALUE
from moerec.types import TOKEN, Batch
from pallas_kernels.router import Routed, route


class RouterInputs(NamedTuple):
    """What the router knows of each slot beside its state.

    Attributes:
      log_domain_BTZ: the analyser's log-posterior; None where there are no services.
      domain_BT: int32 domain under which the slot is counted, or -1.
      real_BT: bool, false where a slot goes to no expert: in padding, and of text where there is no cross group.
      relevance_BTM: how much each memory slot of the profile matters, or None.
      closed_BTG: of each group 0, or `MASK_VALUE` where it is closed: by a hypothesis, or to text, which carries none.
        None where there are neither.
    """

    log_domain_BTZ: jax.Array | None
    domain_BT: jax.Array
    real_BT: jax.Array
    relevance_BTM: jax.Array | None = None
    closed_BTG: jax.Array | None = None


def count_groups(config: MoEConfig, n_services: int) -> int:
    """G, the groups of experts: one of each service, if services have some, and the cross group, if there is one."""
    return n_services * int(config.services) + int(config.cross)


def open_groups(log_domain_SZ: jax.Array, n_open: int, n_groups: int) -> jax.Array:
    """`[S, G]`, zero for the `n_open` most probable services and for the cross group, else `MASK_VALUE`."""
    best_SA = jax.lax.top_k(log_domain_SZ, n_open)[1]
    n_services = log_domain_SZ.shape[1]
    chosen_SZ = jnp.sum(jax.nn.one_hot(best_SA, n_services, dtype=jnp.float32), axis=1)
    return jnp.pad(MASK_VALUE * (1 - chosen_SZ), ((0, 0), (0, n_groups - n_services)))


def close_to_text(inputs: RouterInputs, batch: Batch, n_services: int, config: MoEConfig) -> RouterInputs:
    """What routers know of text: its state alone, as in Qwen2-MoE; and of the experts only the cross group is open."""
    if batch.token_BT is None:
        return inputs
    is_text_BT = batch.kind_BT == TOKEN
    is_text_BT1 = is_text_BT[..., None]
    if inputs.log_domain_BTZ is not None:
        inputs = inputs._replace(log_domain_BTZ=jnp.where(is_text_BT1, 0, inputs.log_domain_BTZ))
    if inputs.relevance_BTM is not None:
        inputs = inputs._replace(relevance_BTM=jnp.where(is_text_BT1, 0, inputs.relevance_BTM))
    if not config.cross:
        inputs = inputs._replace(real_BT=inputs.real_BT & ~is_text_BT)
    if not config.services:
        return inputs
    closed_BTZ = jnp.repeat(jnp.where(is_text_BT1, MASK_VALUE, 0.0), n_services, axis=-1)
    return inputs._replace(closed_BTG=jnp.pad(closed_BTZ, ((0, 0), (0, 0), (0, int(config.cross)))))


def route_slots(
    seen_SD: jax.Array,
    inputs: RouterInputs,
    router_ED: jax.Array,
    w_domain_EZ: jax.Array | None,
    w_profile_EM: jax.Array | None,
    bias_E: jax.Array,
    config: MoEConfig,
    n_services: int,
) -> Routed:
    """The experts of each slot, and the statistics of Z domains; of one where there are no services.

    Here alone the router's logits are made; `pallas_kernels.router` takes the softmax and the top k. The logits are
    linear in the state, in the log-posterior over domains (not under a hypothesis, which is a domain known), in the
    profile's relevance and, where only some groups are open, in which ones are. `bias_E` steers the choice alone (Wang
    et al. 2024).

    Args:
      inputs: with a leading axis S in the place of B and T.
    """
    log_domain_SZ, n_experts = inputs.log_domain_BTZ, router_ED.shape[0]
    features, weights = [], []
    if w_domain_EZ is not None:
        assert log_domain_SZ is not None
        features.append(log_domain_SZ)
        weights.append(w_domain_EZ)
    if w_profile_EM is not None:
        assert inputs.relevance_BTM is not None
        features.append(inputs.relevance_BTM)
        weights.append(w_profile_EM)
    n_groups = count_groups(config, n_services)
    closed_SG = inputs.closed_BTG
    if config.n_open_groups:
        assert log_domain_SZ is not None
        less_SG = open_groups(log_domain_SZ, config.n_open_groups, n_groups)
        closed_SG = less_SG if closed_SG is None else jnp.minimum(less_SG, closed_SG)
    if closed_SG is not None:
        group_E = jnp.arange(n_experts) // config.n_per_group
        features.append(closed_SG)
        weights.append(jax.nn.one_hot(group_E, n_groups))
    if not features:  # kernels want at least one
        features, weights = [jnp.zeros((seen_SD.shape[0], 1))], [jnp.zeros((n_experts, 1))]
    backend = {"auto": "auto", "pallas_tpu": "pallas_tpu"}.get(config.backend, "xla")
    return route(
        seen_SD,
        router_ED,
        jnp.concatenate(features, axis=1),
        jnp.concatenate(weights, axis=1),
        bias_E,
        inputs.domain_BT,
        max(n_services, 1),
        config.n_active,
        backend,
    )
