"""What decides where a slot goes: the router's logits from the state and from what else is known of the slot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.config import MoEConfig
from moerec.nn.layers import MASK_VALUE
from pallas_kernels.router import Routed, route


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


def open_groups(log_domain_SZ: jax.Array, n_open: int) -> jax.Array:
    """`[S, G]`, zero for the `n_open` most probable services and for the cross group, else `MASK_VALUE`."""
    best_SA = jax.lax.top_k(log_domain_SZ, n_open)[1]
    chosen_SZ = jnp.sum(jax.nn.one_hot(best_SA, log_domain_SZ.shape[1], dtype=jnp.float32), axis=1)
    return jnp.pad(MASK_VALUE * (1 - chosen_SZ), ((0, 0), (0, 1)))


def route_slots(
    seen_SD: jax.Array,
    log_domain_SZ: jax.Array,
    relevance_SM: jax.Array | None,
    domain_S: jax.Array,
    router_ED: jax.Array,
    w_domain_EZ: jax.Array,
    w_profile_EM: jax.Array | None,
    bias_E: jax.Array,
    config: MoEConfig,
) -> Routed:
    """The experts of each slot, and the statistics of Z domains.

    Here alone the router's logits are made; `pallas_kernels.router` takes the softmax and the top k. The logits are
    linear in the state, in the log-posterior over domains, in the profile's relevance and, where only some groups are
    open, in which ones are. `bias_E` steers the choice alone (Wang et al. 2024).
    """
    features, weights = [log_domain_SZ], [w_domain_EZ]
    if w_profile_EM is not None:
        assert relevance_SM is not None
        features.append(relevance_SM)
        weights.append(w_profile_EM)
    if config.n_open_groups:
        group_E = jnp.arange(w_domain_EZ.shape[0]) // config.n_per_group
        features.append(open_groups(log_domain_SZ, config.n_open_groups))
        weights.append(jax.nn.one_hot(group_E, log_domain_SZ.shape[1] + 1))
    backend = {"auto": "auto", "pallas_tpu": "pallas_tpu"}.get(config.backend, "xla")
    return route(
        seen_SD,
        router_ED,
        jnp.concatenate(features, axis=1),
        jnp.concatenate(weights, axis=1),
        bias_E,
        domain_S,
        log_domain_SZ.shape[1],
        config.n_active,
        backend,
    )
