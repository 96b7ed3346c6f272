"""Vectors of items and of slots: sums of parts, each with its switch."""

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.layers import RMSNorm, declare, fan_in, normal
from moerec.nn.temporal import TimeEmbedding
from moerec.shapes import Batch, ItemTable

STDDEV = 0.02


class TextEncoder(nnx.Module):
    """An item's text as the mean of its token embeddings, plus a one-layer gate over it, projected to the model width.

    Order is ignored: titles and attribute lists are short, and a bag needs no attention.
    """

    def __init__(self, key: jax.Array, n_tokens: int, d_text: int, d_model: int, eps: float):
        k_table, k_up, k_out = jax.random.split(key, 3)
        self.table_VD = declare(k_table, (n_tokens, d_text), ("vocab", None), normal(1.0), decay="embedding")
        self.norm = RMSNorm(d_text, eps)
        self.gate_DD = declare(k_up, (d_text, d_text), (None, None), fan_in)
        self.out_DD = declare(k_out, (d_text, d_model), (None, "embed"), normal(STDDEV * d_text**-0.5))

    def __call__(self, token_XW: jax.Array) -> jax.Array:
        """Args: token ids `[..., W]`, 0 is padding. Returns `[..., D]`; items without any token get a constant."""
        present = (token_XW > 0).astype(jnp.float32)[..., None]
        total = jnp.sum(self.table_VD[...][token_XW] * present, axis=-2)
        mean = self.norm(total / jnp.maximum(jnp.sqrt(jnp.sum(present, axis=-2)), 1))
        return (mean + jax.nn.silu(mean @ self.gate_DD[...])) @ self.out_DD[...]


class ItemEncoder(nnx.Module):
    """An item's vector: its own row, plus its text. A new item without a trained row still has its text."""

    def __init__(self, key: jax.Array, config: ModelConfig, n_items: int, n_tokens: int):
        k_row, k_text = jax.random.split(key)
        self.row_ID = (
            declare(k_row, (n_items, config.d_model), ("items", "embed"), normal(STDDEV), decay="embedding")
            if config.item_row
            else None
        )
        self.text = (
            TextEncoder(k_text, n_tokens, config.d_text, config.d_model, config.norm_eps) if config.item_text else None
        )

    def __call__(self, item_X: jax.Array, table: ItemTable) -> jax.Array:
        """Args: catalogue indices of any shape `[...]`. Returns `[..., D]` float32."""
        parts = []
        if self.row_ID is not None:
            parts.append(self.row_ID[...][item_X])
        if self.text is not None:
            parts.append(self.text(table.token_IW[item_X]))
        return sum(parts[1:], parts[0])


class SlotEncoder(nnx.Module):
    """What a slot adds to its item's vector: service, action, its time, and the next request's time and context."""

    def __init__(
        self, key: jax.Array, config: ModelConfig, n_services: int, n_actions: int, context_sizes: tuple[int, ...]
    ):
        keys = jax.random.split(key, 5)
        d = config.d_model

        def table(k, n):
            return declare(k, (n, d), (None, "embed"), normal(STDDEV), decay="embedding")

        self.service = table(keys[0], n_services) if config.service else None
        self.action = table(keys[1], n_actions) if config.action else None
        self.event_time = TimeEmbedding(keys[2], d, STDDEV) if config.event_time else None
        self.request_time = TimeEmbedding(keys[3], d, STDDEV) if config.request_time else None
        # One table for all features: feature c owns rows offset_c .. offset_c + size_c, the first of them "missing".
        self.context = table(keys[4], sum(context_sizes)) if config.request_context and context_sizes else None
        self.context_offsets = tuple(sum(context_sizes[:c]) for c in range(len(context_sizes)))

    def of_event(self, item: jax.Array, action: jax.Array, table: ItemTable) -> jax.Array:
        """What service and action add, `[..., D]`: all of an event that does not depend on what comes next."""
        parts = []
        if self.service is not None:
            parts.append(self.service[...][table.service_I[item]])
        if self.action is not None:
            parts.append(self.action[...][action])
        return sum(parts, jnp.zeros((), jnp.float32))

    def __call__(self, batch: Batch, table: ItemTable) -> jax.Array:
        parts = [self.of_event(batch.item_BT, batch.action_BT, table)]
        if self.event_time is not None:
            previous = jnp.pad(batch.time_BT[:, :-1], ((0, 0), (1, 0)))
            first = batch.position_BT == 0
            parts.append(self.event_time(batch.time_BT, jnp.where(first, batch.time_BT, previous)))
        if self.request_time is not None:
            parts.append(self.request_time(batch.request_time_BT, batch.time_BT))
        if self.context is not None:
            rows = batch.request_context_BTC + jnp.asarray(self.context_offsets, jnp.int32)
            parts.append(jnp.sum(self.context[...][rows], axis=-2))
        return sum(parts, jnp.zeros((), jnp.float32))
