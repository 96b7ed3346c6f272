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
from moerec.nn.layers import MASK_VALUE, declare, fan_in
from moerec.types import EVENT, Batch, PointerMixture

CATALOGUE_BIAS = 2.0  # what the softmax's logit has ahead of each pointer's at first


class AnswerAggregator(nnx.Module):
    """`p(item) = w_0 softmax(item) + Σ_g w_g pointer_g(item)`: the weights, and what the pointers point at.

    A service's pointer sees the events of its service, the last one those of all. The weights are a softmax over the
    components that there are: a pointer without any event to point at has none.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        k_query, k_key, k_weight = jax.random.split(key, 3)
        self.n_services = n_services if config.has_service_pointers else 0
        d, g, h = config.d_model, self.n_services + 1, config.d_pointer
        zeros = jax.nn.initializers.zeros
        self.query_DGH = declare(k_query, (d, g, h), ("embed", None, None), fan_in)
        self.key_DGH = declare(k_key, (d, g, h), ("embed", None, None), fan_in)
        self.weight_DX = declare(k_weight, (d, g + 1), ("embed", None), zeros)
        self.bias_X = declare(k_weight, (g + 1,), (None,), _favour_catalogue, decay="none")
        self.theta = config.rope_theta

    def __call__(self, state_BTD: jax.Array, event_BTD: jax.Array, batch: Batch, mask_BTS: jax.Array) -> PointerMixture:
        """Args: final states, which ask; the events' vectors, which are pointed at; the slots; who sees which."""
        query_BTGH, key_BTGH = (
            rotate(jnp.einsum("BTD,DGH->BTGH", x, w[...]), batch.position_BT, self.theta)
            for x, w in ((state_BTD, self.query_DGH), (event_BTD, self.key_DGH))
        )
        logit_BGTS = jnp.einsum("BTGH,BSGH->BGTS", query_BTGH, key_BTGH) * query_BTGH.shape[-1] ** -0.5
        own_BGS = batch.service_BT[:, None] == jnp.arange(self.n_services)[:, None]
        own_BGS = jnp.concatenate([own_BGS, (batch.kind_BT == EVENT)[:, None]], axis=1)
        open_BGTS = mask_BTS[:, None] & own_BGS[:, :, None]
        pointer_BGTS = jax.nn.softmax(jnp.where(open_BGTS, logit_BGTS, MASK_VALUE))
        logit_BTX = state_BTD @ self.weight_DX[...] + self.bias_X[...]
        # A pointer with nothing to point at would be spread over what it must not see.
        can_BTG = jnp.moveaxis(jnp.any(open_BGTS, axis=-1), 1, 2)
        can_BTX = jnp.pad(can_BTG, ((0, 0), (0, 0), (1, 0)), constant_values=True)
        log_weight_BTX = jax.nn.log_softmax(jnp.where(can_BTX, logit_BTX, MASK_VALUE))
        copy_BTS = jnp.einsum("BTG,BGTS->BTS", jnp.exp(log_weight_BTX[..., 1:]), pointer_BGTS)
        return PointerMixture(log_weight_BTX, copy_BTS)


def _favour_catalogue(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.zeros(shape, dtype).at[0].set(CATALOGUE_BIAS)
