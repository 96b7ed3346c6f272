"""The load of the experts against the load that the domains of a batch ask for: losses, the bias, and telemetry.

Everything is computed from the sums of `Routing`, so over the global batch and not over a device's or a sequence's
part, which would inhibit specialisation (Qiu et al. 2025, "Demons in the Detail").
"""

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import LossConfig, MoEConfig
from moerec.nn.moe.router import count_groups
from moerec.types import Routing


def target_load(config: MoEConfig, n_services: int, is_asked: bool = False) -> np.ndarray:
    """`[Z, E]`, rows adding up to one: of the assignments of a domain's slots, the share that each expert should get.

    The own group gets `own_group_fraction`, the cross group `cross_group_fraction`, the other groups what is left;
    under a hypothesis, which closes them, nothing.
    """
    share_ZG = np.zeros((n_services, count_groups(config, n_services)))
    if config.services:
        others = 0 if is_asked else 1 - config.own_group_fraction - config.cross_group_fraction
        share_ZG[:, :n_services] = others / max(n_services - 1, 1)
        share_ZG[np.arange(n_services), np.arange(n_services)] = config.own_group_fraction
    share_ZG[:, n_services * int(config.services) :] = config.cross_group_fraction
    share_ZG /= share_ZG.sum(axis=1, keepdims=True)  # with a single service there are no others
    return np.repeat(share_ZG / config.n_per_group, config.n_per_group, axis=1).astype(np.float32)


def _divergence(count: jax.Array, probability: jax.Array, asked: jax.Array) -> jax.Array:
    """`sum of f p / q` over the experts (last axis), 1 where load and probability are as asked (Fedus et al. 2022).

    Zero where nothing is asked at all, for want of slots.
    """
    f = count / jnp.maximum(jnp.sum(count, axis=-1, keepdims=True), 1)
    p = probability / jnp.maximum(jnp.sum(probability, axis=-1, keepdims=True), 1e-9)
    return jnp.sum(jnp.where(asked > 0, f * p / jnp.where(asked > 0, asked, 1), 0), axis=-1)


def balance_losses(routing: Routing, config: MoEConfig, is_asked: bool = False) -> dict[str, jax.Array]:
    """Means over the mixture layers.

    `balance`: the load of all slots against what their domains ask for together, so a batch that is all food is to load
    the food group. `domain_balance`: the same within each domain, weighted by its slots. `router_z`: the mean
    square of the log-sum-exp (Zoph et al. 2022).
    """
    count_LZE, probability_LZE = routing.count_LZE, routing.probability_LZE
    asked_ZE = jnp.asarray(target_load(config, count_LZE.shape[1], is_asked))
    slots_LZ = jnp.sum(probability_LZE, axis=-1)  # the probabilities of a slot add up to one
    slots_LZ = jax.lax.stop_gradient(slots_LZ)
    n_L = jnp.maximum(jnp.sum(slots_LZ, axis=-1), 1)
    share_LZ = slots_LZ / n_L[:, None]
    asked_LE = share_LZ @ asked_ZE
    by_domain_LZ = _divergence(count_LZE, probability_LZE, asked_ZE)
    return {
        "balance": jnp.mean(_divergence(jnp.sum(count_LZE, axis=1), jnp.sum(probability_LZE, axis=1), asked_LE)),
        "domain_balance": jnp.mean(jnp.sum(share_LZ * by_domain_LZ, axis=-1)),
        "router_z": jnp.mean(routing.square_lse_L / n_L),
    }


def weigh_losses(losses: dict[str, jax.Array], config: LossConfig) -> jax.Array:
    """The sum of `balance_losses` under their weights."""
    return (
        config.balance_weight * losses["balance"]
        + config.domain_balance_weight * losses["domain_balance"]
        + config.router_z_weight * losses["router_z"]
    )


def update_bias(bias_LE: jax.Array, routing: Routing, config: MoEConfig, is_asked: bool = False) -> jax.Array:
    """The routers' biases one step towards the load that is asked for: up where it is short, down where it is over.

    Wang et al. (2024), with the domains' asked load in place of the even one. A function of global sums alone, so it is
    the same on every device.
    """
    count_LZE = routing.count_LZE
    asked_LE = jnp.sum(count_LZE, axis=-1) @ jnp.asarray(target_load(config, count_LZE.shape[1], is_asked))
    return bias_LE + config.bias_rate * jnp.sign(asked_LE - jnp.sum(count_LZE, axis=1))


def describe_load(routing: Routing) -> dict[str, object]:
    """What `metrics.json` says of the routing.

    `load` `[Z, E]`: each service's share of assignments by expert, averaged over layers. `max_over_mean`: the fullest
    expert's load over all services, in the worst layer. `dropped`: assignments that found no place; `dropped_by`: for
    want of what.
    """
    count_LZE = np.asarray(routing.count_LZE, np.float64)
    load_LE = count_LZE.sum(axis=1)
    # A service without a slot has no load of its own: it is shown that of all.
    shown_LZE = np.where(count_LZE.sum(axis=-1, keepdims=True) > 0, count_LZE, load_LE[:, None])
    dropped = np.asarray(routing.dropped_L3, np.int64).sum(axis=0).tolist()
    share_LZE = shown_LZE / np.maximum(shown_LZE.sum(axis=-1, keepdims=True), 1)
    return {
        "load": share_LZE.mean(axis=0).tolist(),
        "max_over_mean": float(np.max(load_LE.max(axis=-1) / np.maximum(load_LE.mean(axis=-1), 1e-9))),
        "dropped": sum(dropped),
        "dropped_by": dict(zip(("capacity", "sender", "receiver"), dropped, strict=True)),
    }
