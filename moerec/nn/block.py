"""The pre-norm decoder block, and the stack of them as one scanned pytree."""

import jax
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import Attention
from moerec.nn.layers import RMSNorm, SwiGLU, dropout


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        k_attention, k_ffn = jax.random.split(key)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(k_attention, config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(k_ffn, config.d_model, config.d_ff)
        self.dropout_rate = config.dropout

    def __call__(
        self, x_BTD: jax.Array, position_BT: jax.Array, mask_BTS: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        k_attention, k_ffn = (None, None) if key is None else jax.random.split(key)
        y = self.attention(self.attention_norm(x_BTD), position_BT, mask_BTS)
        x_BTD = x_BTD + dropout(y, self.dropout_rate, k_attention)
        y = self.ffn(self.ffn_norm(x_BTD))
        return x_BTD + dropout(y, self.dropout_rate, k_ffn)


def stack_blocks(key: jax.Array, config: ModelConfig) -> Block:
    """A `Block` whose weights have a leading axis of L layers."""
    return jax.vmap(lambda k: Block(k, config))(jax.random.split(key, config.n_layers))


def run_blocks(
    blocks: Block,
    x_BTD: jax.Array,
    position_BT: jax.Array,
    mask_BTS: jax.Array,
    key: jax.Array | None,
    remat: bool,
    n_layers: int,
) -> jax.Array:
    """Scans the stacked blocks, so that compile time does not grow with depth; `remat` recomputes each backward."""

    def step(x, layer):
        block, layer_key = layer
        return block(x, position_BT, mask_BTS, layer_key), None

    keys = None if key is None else jax.random.split(key, n_layers)
    body = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(body, x_BTD, (blocks, keys))[0]
