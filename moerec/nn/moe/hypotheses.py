"""Whom slots ask: the hypothesis that a request is for a service, and what it opens.

In training a slot's hypothesis is its target's service. When it is known, which is from the next event on, it is what
the past's slots carry; at the request's slot every service is asked in turn, so that no answer knows the target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.nn.layers import MASK_VALUE
from moerec.types import Batch


class Hypotheses(NamedTuple):
    """X hypotheses at each of Q slots.

    Attributes:
      log_weight_QX: float32 log-probabilities of the services, as they weigh the answers; they add up to one over X.
      answer_QX: int32, the services that answer: with their catalogues, biases, pointers and gates.
      vector_QX, group_QX: int32, the services whose vectors are added, and whose groups of experts are open; the same
        but in probes.
    """

    log_weight_QX: jax.Array
    answer_QX: jax.Array
    vector_QX: jax.Array
    group_QX: jax.Array


def temper(log_domain_QZ: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """The log-posterior under a temperature (Guo et al. 2017)."""
    return jax.nn.log_softmax(log_domain_QZ / temperature)


def ask_all(log_weight_QZ: jax.Array) -> Hypotheses:
    """Every service is asked, in the order of the catalogue."""
    service_QZ = jnp.broadcast_to(jnp.arange(log_weight_QZ.shape[1], dtype=jnp.int32), log_weight_QZ.shape)
    return Hypotheses(log_weight_QZ, service_QZ, service_QZ, service_QZ)


def ask_one(answer_Q: jax.Array, vector_Q: jax.Array | None = None, group_Q: jax.Array | None = None) -> Hypotheses:
    """One service answers at each slot; under its own vector and experts, or (a probe's) under another's."""
    answer_Q1 = answer_Q[:, None]
    vector_Q1 = answer_Q1 if vector_Q is None else vector_Q[:, None]
    group_Q1 = answer_Q1 if group_Q is None else group_Q[:, None]
    return Hypotheses(jnp.zeros(answer_Q1.shape), answer_Q1, vector_Q1, group_Q1)


def followed_services(batch: Batch, n_services: int) -> jax.Array:
    """`[B, T]` int32, the service of the event after each slot; -1 at a sequence's last slot, where it is not known."""
    pad = ((0, 0), (0, 1))
    next_service_BT = jnp.pad(batch.service_BT[:, 1:], pad, constant_values=n_services)
    next_segment_BT = jnp.pad(batch.segment_BT[:, 1:], pad)
    is_followed_BT = (next_segment_BT == batch.segment_BT) & (next_service_BT < n_services)
    return jnp.where(is_followed_BT, next_service_BT, -1)


def suppose_vector(service: jax.Array, hypothesis_ZD: jax.Array) -> jax.Array:
    """`[..., D]`, the vectors of hypotheses; zero where nobody is asked (-1)."""
    vector = hypothesis_ZD[jnp.maximum(service, 0)]
    return jnp.where((service >= 0)[..., None], vector, 0)


def close_groups(service: jax.Array, n_services: int, n_groups: int) -> jax.Array:
    """`[..., G]`, 0 for the group of the service asked and for the cross group, else `MASK_VALUE`.

    Args: int32 services `[...]`, -1 where none is asked, which opens the cross group alone.
    """
    if n_groups <= 1:  # no service has one
        return jnp.zeros((*service.shape, n_groups))
    own = jax.nn.one_hot(service, n_services, dtype=jnp.float32)
    cross = jnp.ones((*service.shape, n_groups - n_services))
    return MASK_VALUE * (1 - jnp.concatenate([own, cross], axis=-1))
