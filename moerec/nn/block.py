"""The pre-norm decoder block, dense or with domain experts, and stacks of them as one scanned pytree."""

import itertools
from typing import NamedTuple

import jax
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import Attention, ProfileAttention, ProfileContext
from moerec.nn.layers import RMSNorm, SwiGLU, dropout
from moerec.nn.moe.experts import DomainExperts, RouterInputs
from moerec.types import Routing


class LayerGroup(NamedTuple):
    """Equal layers, `first` to one before `last`: with experts or dense, conditioned on the profile or not."""

    experts: bool
    personal: bool
    first: int
    last: int


PLAIN = LayerGroup(False, False, 0, 0)


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`; either may be of the kind that is conditioned or mixed."""

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int = 0, run: LayerGroup = PLAIN):
        k_attention, k_ffn, k_personal = jax.random.split(key, 3)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        personal = ProfileAttention(k_personal, config, n_services) if run.personal else None
        self.attention = Attention(k_attention, config, personal)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn: SwiGLU | DomainExperts = (
            DomainExperts(k_ffn, config, n_services) if run.experts else SwiGLU(k_ffn, config.d_model, config.d_ff)
        )
        self.dropout_rate = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        position_BT: jax.Array,
        segment_BT: jax.Array,
        key: jax.Array | None,
        router_inputs: RouterInputs | None = None,
        profile: ProfileContext | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """The new states, and the sums of the routing (None without experts)."""
        k_attention, k_ffn = (None, None) if key is None else jax.random.split(key)
        y = self.attention(self.attention_norm(x_BTD), position_BT, segment_BT, profile)
        x_BTD = x_BTD + dropout(y, self.dropout_rate, k_attention)
        y, routing = self.ffn_norm(x_BTD), None
        if isinstance(self.ffn, DomainExperts):
            assert router_inputs is not None
            y, routing = self.ffn(y, router_inputs, None if k_ffn is None else jax.random.fold_in(k_ffn, 1))
        else:
            y = self.ffn(y)
        return x_BTD + dropout(y, self.dropout_rate, k_ffn), routing


def split_layers(config: ModelConfig) -> list[LayerGroup]:
    """The runs of equal layers; the first is the trunk, dense and nobody's own, maybe empty."""
    kinds = [(layer in config.moe.layers, layer in config.personal.layers) for layer in range(config.n_layers)]
    runs = [PLAIN] if any(kinds[0]) else []
    first = 0
    for (experts, personal), members in itertools.groupby(kinds):
        last = first + len(list(members))
        runs.append(LayerGroup(experts, personal, first, last))
        first = last
    return runs


def stack_blocks(keys: jax.Array, config: ModelConfig, n_services: int = 0, run: LayerGroup = PLAIN) -> Block:
    """A `Block` of a run, whose weights have a leading axis of its layers; a key each."""
    return jax.vmap(lambda k: Block(k, config, n_services, run))(keys)


def run_blocks(
    blocks: Block,
    x_BTD: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    keys: jax.Array | None,
    remat: bool,
    router_inputs: RouterInputs | None = None,
    profile: ProfileContext | None = None,
) -> tuple[jax.Array, Routing | None]:
    """Scans the stacked blocks, so that compile time does not grow with depth; `remat` recomputes each backward.

    Args:
      keys: one a layer switch dropout on.
    """

    def step(x, layer):
        block, layer_key = layer
        return block(x, position_BT, segment_BT, layer_key, router_inputs, profile)

    body = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(body, x_BTD, (blocks, keys))
