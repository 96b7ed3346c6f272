"""The sequence model: slots in, one state a slot out, and item vectors to score it against."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import segment_mask
from moerec.nn.block import run_blocks, stack_blocks
from moerec.nn.events import ItemEncoder, SlotEncoder
from moerec.nn.layers import RMSNorm, declare, dropout
from moerec.shapes import Batch, ItemTable


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the data fixes about the model's shapes."""

    n_items: int
    n_tokens: int
    n_services: int
    n_actions: int
    context_sizes: tuple[int, ...]


class SequenceModel(nnx.Module):
    """A Qwen2-shaped decoder over event slots."""

    def __init__(self, key: jax.Array, config: ModelConfig, sizes: Sizes):
        k_item, k_slot, k_blocks, k_head = jax.random.split(key, 4)
        self.item_encoder = ItemEncoder(k_item, config, sizes.n_items, sizes.n_tokens)
        self.slot_encoder = SlotEncoder(k_slot, config, sizes.n_services, sizes.n_actions, sizes.context_sizes)
        self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        self.blocks = stack_blocks(k_blocks, config)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head_encoder = None if config.tie_items else ItemEncoder(k_head, config, sizes.n_items, sizes.n_tokens)
        zeros = jax.nn.initializers.zeros
        self.item_bias_I = (
            declare(k_head, (sizes.n_items,), ("items",), zeros, decay="none") if config.item_bias else None
        )
        self.config = config

    def encode(self, batch: Batch, table: ItemTable, key: jax.Array | None = None) -> jax.Array:
        """States `[B, T, D]` float32 from which the next item is predicted; `key` switches dropout on."""
        config = self.config
        k_input, k_blocks = (None, None) if key is None else jax.random.split(key)
        x_BTD = self.item_encoder(batch.item_BT, table) + self.slot_encoder(batch, table)
        x_BTD = dropout(self.input_norm(x_BTD), config.dropout, k_input).astype(jnp.dtype(config.compute_dtype))
        mask_BTS = segment_mask(batch.segment_BT)
        x_BTD = run_blocks(self.blocks, x_BTD, batch.position_BT, mask_BTS, k_blocks, config.remat, config.n_layers)
        return self.final_norm(x_BTD.astype(jnp.float32))

    def item_vectors(self, item_X: jax.Array, table: ItemTable) -> tuple[jax.Array, jax.Array]:
        """Vectors `[..., D]` and biases `[...]` of candidates; a state's score is its dot product plus the bias."""
        encoder = self.item_encoder if self.head_encoder is None else self.head_encoder
        bias = jnp.zeros(item_X.shape, jnp.float32) if self.item_bias_I is None else self.item_bias_I[...][item_X]
        return encoder(item_X, table), bias
