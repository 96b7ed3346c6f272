"""The sequence model: slots in, one state a slot out, and item vectors to score it against."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.analyser import Analyser
from moerec.nn.attention import segment_mask
from moerec.nn.block import run_blocks, split_layers, stack_blocks
from moerec.nn.events import ItemEncoder, SlotEncoder
from moerec.nn.experts import DomainExperts, Request
from moerec.nn.layers import RMSNorm, declare, dropout
from moerec.shapes import Batch, ItemTable, Output, Routing


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the data fixes about the model's shapes."""

    n_items: int
    n_tokens: int
    n_services: int
    n_actions: int
    context_sizes: tuple[int, ...]


class SequenceModel(nnx.Module):
    """A Qwen2-shaped decoder over event slots.

    The leading dense layers are the trunk; behind it stands the analyser, whose posterior the routers of all
    mixture layers above read.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, sizes: Sizes):
        k_item, k_slot, k_blocks, k_head = jax.random.split(key, 4)
        self.item_encoder = ItemEncoder(k_item, config, sizes.n_items, sizes.n_tokens)
        self.slot_encoder = SlotEncoder(k_slot, config, sizes.n_services, sizes.n_actions, sizes.context_sizes)
        self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        k_layers = jax.random.split(k_blocks, config.n_layers)
        (_, _, n_trunk), *upper = split_layers(config)
        self.blocks = stack_blocks(k_layers[:n_trunk], config) if n_trunk else None
        k_analyser = jax.random.fold_in(k_head, 1)
        self.analyser = Analyser(k_analyser, config.d_model, sizes.n_services, config.norm_eps) if upper else None
        self.upper = nnx.List(
            [
                stack_blocks(k_layers[first:last], config, sizes.n_services if experts else None)
                for experts, first, last in upper
            ]
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head_encoder = None if config.tie_items else ItemEncoder(k_head, config, sizes.n_items, sizes.n_tokens)
        zeros = jax.nn.initializers.zeros
        self.item_bias_I = (
            declare(k_head, (sizes.n_items,), ("items",), zeros, decay="none") if config.item_bias else None
        )
        self.config = config

    def encode(self, batch: Batch, table: ItemTable, key: jax.Array | None = None) -> Output:
        """States from which the next item is predicted; `key` switches dropout and jitter on.

        The answers (`batch.target_BT`, where the weight is not 0) decide only under which domain a slot is counted.
        """
        config = self.config
        k_input, k_blocks = (None, None) if key is None else jax.random.split(key)
        x_BTD = self.item_encoder(batch.item_BT, table) + self.slot_encoder(batch, table)
        x_BTD = dropout(self.input_norm(x_BTD), config.dropout, k_input).astype(jnp.dtype(config.compute_dtype))
        mask_BTS = segment_mask(batch.segment_BT)
        keys = None if k_blocks is None else jax.random.split(k_blocks, config.n_layers)

        def run(blocks, x_BTD, first, last, request=None):
            own = None if keys is None else keys[first:last]
            return run_blocks(blocks, x_BTD, batch.position_BT, mask_BTS, own, config.remat, request)

        (_, _, n_trunk), *upper = split_layers(config)
        if self.blocks is not None:
            x_BTD, _ = run(self.blocks, x_BTD, 0, n_trunk)
        log_domain_BTZ, routings = None, []
        if self.analyser is not None:
            log_domain_BTZ = self.analyser(x_BTD)
            domain_BT = jnp.where(batch.weight_BT > 0, table.service_I[batch.target_BT], -1)
            # The posterior stays one: the routers read it, but do not bend it to their ends.
            request = Request(jax.lax.stop_gradient(log_domain_BTZ), domain_BT, batch.segment_BT > 0)
            for blocks, (experts, first, last) in zip(self.upper, upper, strict=True):
                x_BTD, routing = run(blocks, x_BTD, first, last, request)
                routings += [routing] if experts else []
        routing = Routing(*map(jnp.concatenate, zip(*routings, strict=True))) if routings else None
        return Output(self.final_norm(x_BTD.astype(jnp.float32)), log_domain_BTZ, routing)

    def item_vectors(self, item_X: jax.Array, table: ItemTable) -> tuple[jax.Array, jax.Array]:
        """Vectors `[..., D]` and biases `[...]` of candidates; a state's score is its dot product plus the bias."""
        encoder = self.item_encoder if self.head_encoder is None else self.head_encoder
        bias = jnp.zeros(item_X.shape, jnp.float32) if self.item_bias_I is None else self.item_bias_I[...][item_X]
        return encoder(item_X, table), bias

    def with_router_biases(self, move) -> "SequenceModel":
        """The model with other biases of its routers: `move(bias_LE, first)`, `first` counting mixture layers."""
        model = jax.tree.map(lambda leaf: leaf, self)
        done = 0
        for blocks in model.upper:
            if isinstance(blocks.ffn, DomainExperts):
                bias = blocks.ffn.bias_E
                bias[...] = move(bias[...], done)
                done += bias.shape[0]
        return model


def count_active_params(model: SequenceModel) -> int:
    """Parameters that a slot's answer depends on: all but those of the experts that it does not go to."""
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    moe = model.config.moe
    for blocks in model.upper:
        if isinstance(blocks.ffn, DomainExperts):
            matrices = (blocks.ffn.gate_EDF, blocks.ffn.up_EDF, blocks.ffn.down_EFD)
            n_experts = blocks.ffn.router_ED.shape[1]
            total -= sum(m.size // n_experts * (n_experts - moe.n_active) for m in matrices)
    return total
