"""Mixture of a softmax over the catalogue with pointers into the user's own history (the answer aggregator).

Users order the same things again, each of them at its own moments. A state of a few dozen numbers cannot point at
dozens of earlier items through a product with item vectors (the rank of the logits is its width, Yang et al. 2018), so
a pointer for each service, and one across all, gives a distribution over the events themselves, and these components
are mixed: pointer networks (Vinyals et al. 2015), their mixture with a softmax (Merity et al. 2017), and the repeat
mode of RepeatNet (Ren et al. 2019). A pointer's weights on pairs of slots are in memory, as many as slots squared.
"""

from collections.abc import Mapping

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
from moerec.nn.layers import MASK_VALUE, declare, fan_in
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
            rotate(jnp.einsum("BTD,DGH->BTGH", x, w[...]), batch.position_BT, self.theta)
            for x, w in ((state_BTD, self.query_DGH), (event_BTD, self.key_DGH))
        )
        logit_BGTS = jnp.einsum("BTGH,BSGH->BGTS", query_BTGH, key_BTGH) * query_BTGH.shape[-1] ** -0.5
        own_BGS = batch.service_BT[:, None] == jnp.arange(self.n_services)[:, None]
        is_event_BS = batch.kind_BT == EVENT
        if self.has_copies:
            own_BGS = jnp.concatenate([own_BGS, is_event_BS[:, None]], axis=1)
        n_copies = own_BGS.shape[1]
        open_BGTS = mask_BTS[:, None] & own_BGS[:, :, None]
        pointer_BGTS = jax.nn.softmax(jnp.where(open_BGTS, logit_BGTS[:, :n_copies], MASK_VALUE))
        # A pointer with nothing to point at would be spread over what it must not see.
        log_can_BTG = jnp.where(jnp.moveaxis(jnp.any(open_BGTS, axis=-1), 1, 2), 0, MASK_VALUE)
        sharpness_BS = None
        if self.sharpness is not None:
            sharpness_BS = jnp.broadcast_to(self.sharpness[...], batch.item_BT.shape)
        n_all, pointed = self.n_all_services, []
        for n, name in enumerate(self.near):
            assert places is not None
            assert self.slope_X is not None
            table = read_table(name, batch.item_BT, sharpness_BS, catalog, n_all)
            slope_BT = jnp.broadcast_to(self.slope_X[n], batch.item_BT.shape)
            seen_BTS = mask_BTS & is_event_BS[:, None]
            around = table, seen_BTS, places, told, batch.service_BT, None
            pointed.append(point_near(name, logit_BGTS[:, n_copies + n], slope_BT, *around))
        evidence = (x.log_evidence_BT[..., None] for x in pointed)
        log_can_BTX = jnp.concatenate([jnp.zeros((*state_BTD.shape[:2], 1)), log_can_BTG, *evidence], axis=-1)
        logit_BTX = state_BTD @ self.weight_DX[...] + self.gate_bias[...]
        log_weight_BTX = jax.nn.log_softmax(jnp.maximum(logit_BTX + log_can_BTX, MASK_VALUE))
        weight_BGT1 = jnp.moveaxis(jnp.exp(log_weight_BTX[..., 1:]), 2, 1)[..., None]
        part_BGTS = weight_BGT1 * jnp.concatenate([pointer_BGTS, *(x.share_BTS[:, None] for x in pointed)], axis=1)
        near = {name: x.near for name, x in zip(self.near, pointed, strict=True)}
        return PointerMixture(log_weight_BTX, part_BGTS, near)


def favour_softmax(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Initialiser of gates' biases: the softmax, the first of the components, is ahead of all others."""
    return jnp.zeros(shape, dtype).at[..., 0].set(CATALOGUE_BIAS)
