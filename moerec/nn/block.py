"""The pre-norm decoder block, dense or with domain experts, and groups of equal layers as one scanned pytree."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import Attention, ProfileAttention, ProfileContext
from moerec.nn.cache import AskedSlots, attend_asked
from moerec.nn.layers import RMSNorm, SwiGLU, dropout
from moerec.nn.moe.experts import DomainExperts
from moerec.nn.moe.router import RouterInputs, count_groups
from moerec.types import Routing

# Layers of a group that are unrolled: in a loop XLA fuses less, and copies weights. More of them stay a loop, so that
# compile time does not grow with depth.
UNROLLED_TO = 4


class LayerGroup(NamedTuple):
    """Equal layers, `first` to one before `last`: with experts or dense, conditioned on the profile or not."""

    experts: bool
    personal: bool
    first: int
    last: int


PLAIN = LayerGroup(False, False, 0, 0)


class LayerContext(NamedTuple):
    """What a layer sees beside the states.

    Attributes:
      position_BT, segment_BT: int32 places within the own sequence, and segments (0 is padding).
      router: what the routers of the experts know; None below the analyser.
      profile: what personal layers see; None in a model that is not personal.
    """

    position_BT: jax.Array
    segment_BT: jax.Array
    router: RouterInputs | None = None
    profile: ProfileContext | None = None


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`; either may be of the kind that is conditioned or mixed."""

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int = 0, group: LayerGroup = PLAIN):
        k_attention, k_ffn, k_personal = jax.random.split(key, 3)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        personal = ProfileAttention(k_personal, config, n_services) if group.personal else None
        self.attention = Attention(k_attention, config, personal)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn: SwiGLU | DomainExperts = (
            DomainExperts(k_ffn, config, n_services) if group.experts else SwiGLU(k_ffn, config.d_model, config.d_ff)
        )
        self.dropout_rate = config.dropout

    def __call__(
        self, x_BTD: jax.Array, context: LayerContext, bias_E: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """The new states, and the sums of the routing (None without experts); a key switches dropout on."""
        k_attention, k_ffn = (None, None) if key is None else jax.random.split(key)
        y = self.attention(self.attention_norm(x_BTD), context.position_BT, context.segment_BT, context.profile)
        x_BTD = x_BTD + dropout(y, self.dropout_rate, k_attention)
        return self._feed_forward(x_BTD, context.router, bias_E, k_ffn)

    def keep(
        self, x_BTD: jax.Array, context: LayerContext, bias_E: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The new states without dropout, and the rotated keys and the values of all slots, `[B, T, K, H]` each."""
        y, keys = self.attention.attend(
            self.attention_norm(x_BTD), context.position_BT, context.segment_BT, context.profile
        )
        return self._feed_forward(x_BTD + y, context.router, bias_E, None)[0], keys

    def ask(
        self,
        x_BTD: jax.Array,
        x_QXD: jax.Array,
        context: LayerContext,
        asked: AskedSlots,
        bias_E: jax.Array | None,
        weigh_groups: bool = False,
    ) -> tuple[jax.Array, jax.Array, tuple[Routing | None, jax.Array | None]]:
        """The new states of all slots, and of those that are asked, under each hypothesis (`moerec.nn.cache`); the
        sums of the latter's routing; and, where they are to be weighed, what the groups of experts weigh.
        """
        y = self.attention_norm(x_BTD)
        y, keys = self.attention.attend(y, context.position_BT, context.segment_BT, context.profile)
        y_QXD = attend_asked(self.attention, self.attention_norm(x_QXD), *keys, asked)
        x_BTD, _ = self._feed_forward(x_BTD + y, context.router, bias_E, None)
        x_QXD += y_QXD
        group_QXG = None
        if weigh_groups and isinstance(self.ffn, DomainExperts):
            assert asked.router is not None
            assert bias_E is not None
            group_QXG = self.ffn.weigh_groups(self.ffn_norm(x_QXD), asked.router, bias_E)
        x_QXD, routing = self._feed_forward(x_QXD, asked.router, bias_E, None)
        return x_BTD, x_QXD, (routing, group_QXG)

    def _feed_forward(
        self, x_BTD: jax.Array, router: RouterInputs | None, bias_E: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array, Routing | None]:
        y, routing = self.ffn_norm(x_BTD), None
        if isinstance(self.ffn, DomainExperts):
            assert router is not None
            assert bias_E is not None
            y, routing = self.ffn(y, router, bias_E, None if key is None else jax.random.fold_in(key, 1))
        else:
            y = self.ffn(y)
        return x_BTD + dropout(y, self.dropout_rate, key), routing


def split_layers(config: ModelConfig) -> list[LayerGroup]:
    """The groups of equal layers, from below; a new one begins where the kind changes, where the layers begin that are
    asked, and at `config.group_starts`.
    """
    starts = {*config.group_starts, config.ask.from_layer}
    kinds = [
        (layer in config.moe.layers, layer in config.personal.layers, sum(start <= layer for start in starts))
        for layer in range(config.n_layers)
    ]
    groups, first = [], 0
    for (experts, personal, _), members in itertools.groupby(kinds):
        last = first + len(list(members))
        groups.append(LayerGroup(experts, personal, first, last))
        first = last
    return groups


def stack_blocks(keys: jax.Array, config: ModelConfig, n_services: int = 0, group: LayerGroup = PLAIN) -> Block:
    """A `Block` of a group, whose weights have a leading axis of its layers; a key each."""
    return jax.vmap(lambda k: Block(k, config, n_services, group))(keys)


def run_blocks(
    blocks: Block,
    x_BTD: jax.Array,
    context: LayerContext,
    bias_LE: jax.Array | None = None,
    keys: jax.Array | None = None,
    remat: bool = False,
) -> tuple[jax.Array, Routing | None]:
    """Runs the stacked blocks, many of them in a scan; `remat` recomputes each backward.

    Args:
      bias_LE: the routers' biases of the group's layers, where they have experts.
      keys: one a layer switch dropout on.
    """

    def step(x, layer):
        block, layer_bias_E, layer_key = layer
        return block(x, context, layer_bias_E, layer_key)

    layers, n_layers = (blocks, bias_LE, keys), jax.tree.leaves(blocks)[0].shape[0]
    if n_layers == 1:  # a loop of one turn takes twice as long to trace, and keeps copies of what it goes over
        body = jax.checkpoint(step) if remat else step
        x_BTD, routing = body(x_BTD, jax.tree.map(lambda x: x[0], layers))
        return x_BTD, jax.tree.map(lambda x: x[None], routing)
    body = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(body, x_BTD, layers, unroll=n_layers <= UNROLLED_TO)


def run_asked_blocks(
    blocks: Block,
    x_BTD: jax.Array,
    x_QXD: jax.Array,
    context: LayerContext,
    asked: AskedSlots,
    bias_LE: jax.Array | None = None,
    weigh_groups: bool = False,
) -> tuple[jax.Array, jax.Array, Routing | None, jax.Array | None]:
    """`run_blocks` without dropout, over all slots and, beside them, over those that are asked; with the weights of
    their groups of experts `[L, Q, X, G]`, where these are asked for.
    """

    def step(x, layer):
        block, layer_bias_E = layer
        *x, seen = block.ask(*x, context, asked, layer_bias_E, weigh_groups)
        return tuple(x), seen

    x, (routing, group_LQXG) = jax.lax.scan(step, (x_BTD, x_QXD), (blocks, bias_LE))
    return *x, routing, group_LQXG


def zero_router_bias(config: ModelConfig, n_services: int) -> jax.Array | None:
    """`[L, E]` float32 biases of the mixture layers' routers before any step; None in a dense model."""
    n_layers = len(config.moe.layers)
    return jnp.zeros((n_layers, count_groups(config.moe, n_services) * config.moe.n_per_group)) if n_layers else None
