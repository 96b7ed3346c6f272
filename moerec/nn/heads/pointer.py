"""Mixture of a softmax over the catalogue with pointers into the user's own history (the answer aggregator).

Users order the same things again, each of them at its own moments. A state of a few dozen numbers cannot point at
dozens of earlier items through a product with item vectors (the rank of the logits is its width, Yang et al. 2018), so
a pointer for each service, and one across all, gives a distribution over the events themselves, and these components
are mixed: pointer networks (Vinyals et al. 2015), their mixture with a softmax (Merity et al. 2017), and the repeat
mode of RepeatNet (Ren et al. 2019). A pointer's weights on pairs of slots are in memory, as many as slots squared;
those of all services are one such array, since an event is of one service.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import rotate
from moerec.nn.heads.near_pointers import (
    FIRST_SHARPNESS,
    FIRST_SLOPE,
    TEXT,
    Told,
    ask_nothing_at_first,
    near_names,
    point_near,
    read_table,
)
from moerec.nn.heads.places import Places
from moerec.nn.layers import MASK_VALUE, declare, fan_in, project
from moerec.types import EVENT, Batch, Catalog, PointerMixture

CATALOGUE_BIAS = 2.0  # what the softmax's logit has ahead of each pointer's at first


class AnswerAggregator(nnx.Module):
    """`p(item) = w_0 softmax(item) + Σ_g w_g pointer_g(item)`: the weights, and what the pointers point at.

    A service's pointer sees the events of its service, the one after them those of all, and so do the last ones, which
    give to the neighbors of events (`near_pointers`). The weights are a softmax over the components that there are: a
    pointer without any event to point at has none.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        k_query, k_key, k_weight = jax.random.split(key, 3)
        self.n_services, self.n_all_services = n_services if config.has_service_pointers else 0, n_services
        self.has_copies, self.near = config.has_copies, near_names(config)
        d, g, h = config.d_model, self.n_services + self.has_copies + len(self.near), config.d_pointer
        zeros = jax.nn.initializers.zeros
        self.query_DGH = declare(k_query, (d, g, h), ("embed", None, None), ask_nothing_at_first(len(self.near)))
        self.key_DGH = declare(k_key, (d, g, h), ("embed", None, None), fan_in)
        self.weight_DX = declare(k_weight, (d, g + 1), ("embed", None), zeros)
        self.gate_bias = declare(k_weight, (g + 1,), (None,), favour_softmax, decay="none")
        sharp, sloping = (nnx.initializers.constant(x) for x in (FIRST_SHARPNESS, FIRST_SLOPE))
        self.sharpness = declare(key, (), (), sharp, decay="none") if TEXT in self.near else None
        self.slope_X = declare(key, (len(self.near),), (None,), sloping, decay="none") if self.near else None
        self.theta = config.rope_theta

    def __call__(
        self,
        state_BTD: jax.Array,
        event_BTD: jax.Array,
        batch: Batch,
        mask_BTS: jax.Array,
        catalog: Catalog,
        places: Places | None = None,
        told: Mapping[str, Told] = {},
    ) -> PointerMixture:
        """Args: final states, which ask; the events' vectors, which are pointed at; the slots; who sees which; and,
        for pointers to neighbors, where they stand, and in training what `find_told` finds of each table.
        """
        query_BTGH, key_BTGH = (
            rotate(project(x, w[...]), batch.position_BT, self.theta)
            for x, w in ((state_BTD, self.query_DGH), (event_BTD, self.key_DGH))
        )
        query_BTGH *= query_BTGH.shape[-1] ** -0.5
        is_event_BS, n_services, copies = batch.kind_BT == EVENT, self.n_services, []
        seen_BTS = mask_BTS & is_event_BS[:, None]
        if n_services:
            # With the keys of an event's other services left out, the sum over all services is its own one's product.
            of_BSZ = jax.nn.one_hot(batch.service_BT, n_services, dtype=jnp.float32)
            key_BSZH = key_BTGH[:, :, :n_services] * of_BSZ[..., None]
            logit_BTS = jnp.einsum("BTZH,BSZH->BTS", query_BTGH[:, :, :n_services], key_BSZH)
            copies.append(weigh_events(logit_BTS, seen_BTS, of_BSZ))
        n_copies = n_services + self.has_copies
        logit_BGTS = jnp.einsum("BTGH,BSGH->BGTS", query_BTGH[:, :, n_services:], key_BTGH[:, :, n_services:])
        if self.has_copies:
            copies.append(weigh_events(logit_BGTS[:, 0], seen_BTS, jnp.ones((*batch.item_BT.shape, 1))))
        sharpness_BS = None
        if self.sharpness is not None:
            sharpness_BS = jnp.broadcast_to(self.sharpness[...], batch.item_BT.shape)
        n_all, pointed = self.n_all_services, []
        for n, name in enumerate(self.near):
            assert places is not None
            assert self.slope_X is not None
            table = read_table(name, batch.item_BT, sharpness_BS, catalog, n_all)
            slope_BT = jnp.broadcast_to(self.slope_X[n], batch.item_BT.shape)
            around = table, seen_BTS, places, told, batch.service_BT, None
            pointed.append(point_near(name, logit_BGTS[:, self.has_copies + n], slope_BT, *around))
        evidence = (x.log_evidence_BT[..., None] for x in pointed)
        can = [jnp.zeros((*state_BTD.shape[:2], 1)), *(x.log_can_BTG for x in copies), *evidence]
        logit_BTX = project(state_BTD, self.weight_DX[...]) + self.gate_bias[...]
        log_weight_BTX = jax.nn.log_softmax(jnp.maximum(logit_BTX + jnp.concatenate(can, axis=-1), MASK_VALUE))
        weight_BTX = jnp.exp(log_weight_BTX[..., 1:])
        own_BTZ, shared_BT1 = weight_BTX[..., :n_services], weight_BTX[..., n_services:n_copies]
        weights = [*([own_BTZ] if n_services else []), *([shared_BT1] if self.has_copies else [])]
        parts = [x.share(weight) for x, weight in zip(copies, weights, strict=True)]
        parts += [weight_BTX[..., n_copies + n, None] * x.share_BTS for n, x in enumerate(pointed)]
        near = {name: x.near for name, x in zip(self.near, pointed, strict=True)}
        return PointerMixture(log_weight_BTX, jnp.stack(parts, axis=1), near, batch.service_BT if n_services else None)


class EventWeights(NamedTuple):
    """Softmaxes over events, each over those of its group, before they are divided by their sums.

    Attributes:
      weight_BTS: float32, the exponentials of logits less the greatest one of the event's group; 0 of what is not seen.
      total_BTG: float32, their sums over the events of each group: at least 1, or 0 where none is seen.
      of_BSG: float32, 1 for the group of an event.
    """

    weight_BTS: jax.Array
    total_BTG: jax.Array
    of_BSG: jax.Array

    @property
    def log_can_BTG(self) -> jax.Array:
        """0, or `MASK_VALUE` for a group of which there is nothing to point at."""
        return jnp.where(self.total_BTG > 0, 0, MASK_VALUE)

    def share(self, given_BTG: jax.Array) -> jax.Array:
        """`[B, T, S]`, what each group is given shared out among its events."""
        there_BTG = self.total_BTG > 0
        factor_BTG = jnp.where(there_BTG, given_BTG / jnp.where(there_BTG, self.total_BTG, 1), 0)
        return self.weight_BTS * _match("BTG,BSG->BTS", factor_BTG, self.of_BSG)


def weigh_events(logit_BTS: jax.Array, seen_BTS: jax.Array, of_BSG: jax.Array) -> EventWeights:
    """Softmaxes over the events of each group, from one array of pairs whatever the number of groups.

    Each group has its own greatest logit taken away (which changes nothing, so that it needs no gradient): with one for
    all, the events of a group far below another's would all be nothing.

    Args: each event's logit by its own group; which events a slot sees; float32, 1 for the group of an event. What is
      of no group is not seen.
    """
    logit_BTS = jnp.where(seen_BTS, logit_BTS, MASK_VALUE)
    fixed_BTS = jax.lax.stop_gradient(logit_BTS)
    if of_BSG.shape[-1] == 1:
        top_BTS = jnp.max(fixed_BTS, axis=-1, keepdims=True)
    else:
        is_of_GBS = jnp.moveaxis(of_BSG, 2, 0) > 0
        tops = [jnp.max(jnp.where(is_of_BS[:, None], fixed_BTS, MASK_VALUE), axis=-1) for is_of_BS in is_of_GBS]
        top_BTS = _match("BTG,BSG->BTS", jnp.stack(tops, axis=-1), of_BSG)
    weight_BTS = jnp.where(seen_BTS, jnp.exp(logit_BTS - top_BTS), 0)
    return EventWeights(weight_BTS, _match("BTS,BSG->BTG", weight_BTS, of_BSG), of_BSG)


def _match(axes: str, x: jax.Array, of_BSG: jax.Array) -> jax.Array:
    """Sums over the ones of groups, in full float32."""
    return jnp.einsum(axes, x, of_BSG, precision=jax.lax.Precision.HIGHEST)


def favour_softmax(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Initialiser of gates' biases: the softmax, the first of the components, is ahead of all others."""
    return jnp.zeros(shape, dtype).at[..., 0].set(CATALOGUE_BIAS)
