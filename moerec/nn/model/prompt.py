"""The slots before a text, events and words, with what decoding keeps of them: each layer's keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.nn.block import LayerContext, split_layers, zero_router_bias
from moerec.nn.model.sequence import SequenceModel
from moerec.nn.moe.hypotheses import followed_services
from moerec.types import Batch, Catalog


class Prompt(NamedTuple):
    """Attributes:
    x_BTD: states of the last layer, before the final norm.
    keys: of each layer rotated keys and values, `[B, T, K, H]` each.
    context: what the layers above the trunk see.
    """

    x_BTD: jax.Array
    keys: list[tuple[jax.Array, jax.Array]]
    context: LayerContext


def read_prompt(
    model: SequenceModel, batch: Batch, catalog: Catalog, router_bias_LE: jax.Array | None = None
) -> Prompt:
    """What `SequenceModel.encode` makes of the slots without dropout, and what it would throw away."""
    config = model.config
    item_BTD, x_BTD = model._embed(batch, catalog, None)
    x_BTD = x_BTD.astype(jnp.dtype(config.compute_dtype))
    context, keys, n_mixtures = LayerContext(batch.position_BT, batch.segment_BT), [], 0
    bias_LE = zero_router_bias(config, model.n_services) if router_bias_LE is None else router_bias_LE
    for blocks, group in zip(model.groups, split_layers(config), strict=True):
        if group.first == config.n_trunk:
            of_trunk = x_BTD, item_BTD, batch, catalog, context, None, None, None
            x_BTD, context, _, _ = model._condition(*of_trunk)
            if model.hypothesis_ZD is not None:
                x_BTD, context = model._suppose(x_BTD, context, followed_services(batch, model.n_services))
        for layer in range(group.last - group.first):
            block = jax.tree.map(lambda a, layer=layer: a[layer], blocks)
            bias_E = bias_LE[n_mixtures] if group.experts and bias_LE is not None else None
            x_BTD, own = block.keep(x_BTD, context, bias_E)
            keys.append(own)
            n_mixtures += group.experts
    return Prompt(x_BTD, keys, context)
