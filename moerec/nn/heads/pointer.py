"""Mixture of a softmax over the catalogue with pointers into the user's own history (the answer aggregator).

Users order the same things again, each of them at its own moments. A state of a few dozen numbers cannot point at
dozens of earlier items through a product with item vectors (the rank of the logits is its width, Yang et al. 2018), so
a pointer for each service, and one across all, gives a distribution over the events themselves, and these components
are mixed: pointer networks (Vinyals et al. 2015), their mixture with a softmax (Merity et al. 2017), and the repeat
mode of RepeatNet (Ren et al. 2019). A pointer's weights on pairs of slots are in memory, as many as slots squared.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import rotate
from moerec.nn.heads.text_pointer import FIRST_SHARPNESS, has_neighbors, share_neighbors
from moerec.nn.layers import MASK_VALUE, declare, fan_in
from moerec.types import EVENT, Batch, Catalog, PointerMixture

CATALOGUE_BIAS = 2.0  # what the softmax's logit has ahead of each pointer's at first


class AnswerAggregator(nnx.Module):
    """`p(item) = w_0 softmax(item) + Σ_g w_g pointer_g(item)`: the weights, and what the pointers point at.

    A service's pointer sees the events of its service, the one after them those of all, and the text pointer, the last
    where there is one, those whose items have text neighbours. The weights are a softmax over the components that there
    are: a pointer without any event to point at has none.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        k_query, k_key, k_weight = jax.random.split(key, 3)
        self.n_services = n_services if config.has_service_pointers else 0
        self.has_copies, self.has_text = config.has_copies, config.text_pointer
        d, g, h = config.d_model, self.n_services + self.has_copies + self.has_text, config.d_pointer
        zeros = jax.nn.initializers.zeros
        self.query_DGH = declare(k_query, (d, g, h), ("embed", None, None), fan_in)
        self.key_DGH = declare(k_key, (d, g, h), ("embed", None, None), fan_in)
        self.weight_DX = declare(k_weight, (d, g + 1), ("embed", None), zeros)
        self.bias_X = declare(k_weight, (g + 1,), (None,), _favour_catalogue, decay="none")
        self.sharpness = declare(key, (), (), _first_sharpness, decay="none") if self.has_text else None
        self.theta = config.rope_theta

    def __call__(
        self, state_BTD: jax.Array, event_BTD: jax.Array, batch: Batch, mask_BTS: jax.Array, catalog: Catalog
    ) -> PointerMixture:
        """Args: final states, which ask; the events' vectors, which are pointed at; the slots; who sees which."""
        query_BTGH, key_BTGH = (
            rotate(jnp.einsum("BTD,DGH->BTGH", x, w[...]), batch.position_BT, self.theta)
            for x, w in ((state_BTD, self.query_DGH), (event_BTD, self.key_DGH))
        )
        logit_BGTS = jnp.einsum("BTGH,BSGH->BGTS", query_BTGH, key_BTGH) * query_BTGH.shape[-1] ** -0.5
        own_BGS = batch.service_BT[:, None] == jnp.arange(self.n_services)[:, None]
        is_event_BS = batch.kind_BT == EVENT
        if self.has_copies:
            own_BGS = jnp.concatenate([own_BGS, is_event_BS[:, None]], axis=1)
        if self.has_text:
            has_BS = is_event_BS & has_neighbors(batch.item_BT, catalog)
            own_BGS = jnp.concatenate([own_BGS, has_BS[:, None]], axis=1)
        open_BGTS = mask_BTS[:, None] & own_BGS[:, :, None]
        pointer_BGTS = jax.nn.softmax(jnp.where(open_BGTS, logit_BGTS, MASK_VALUE))
        logit_BTX = state_BTD @ self.weight_DX[...] + self.bias_X[...]
        # A pointer with nothing to point at would be spread over what it must not see.
        can_BTG = jnp.moveaxis(jnp.any(open_BGTS, axis=-1), 1, 2)
        can_BTX = jnp.pad(can_BTG, ((0, 0), (0, 0), (1, 0)), constant_values=True)
        log_weight_BTX = jax.nn.log_softmax(jnp.where(can_BTX, logit_BTX, MASK_VALUE))
        weight_BTG, n_copy = jnp.exp(log_weight_BTX[..., 1:]), self.n_services + self.has_copies
        copy_BTS = jnp.einsum("BTG,BGTS->BTS", weight_BTG[..., :n_copy], pointer_BGTS[:, :n_copy])
        if not self.has_text:
            return PointerMixture(log_weight_BTX, copy_BTS)
        assert self.sharpness is not None
        sharpness_BS = jnp.broadcast_to(self.sharpness[...], batch.item_BT.shape)
        share_BSX = share_neighbors(batch.item_BT, sharpness_BS, catalog)
        return PointerMixture(log_weight_BTX, copy_BTS, weight_BTG[..., -1:] * pointer_BGTS[:, -1], share_BSX)


def _first_sharpness(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.full(shape, FIRST_SHARPNESS, dtype)


def _favour_catalogue(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.zeros(shape, dtype).at[0].set(CATALOGUE_BIAS)
