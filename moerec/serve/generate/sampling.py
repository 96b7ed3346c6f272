"""The next token of each sequence: the most probable one, or one that is drawn."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.errors import InputError
from moerec.types import Array

_BLOCK = 64  # tokens of a vocabulary
_BITS = 32
GREEDY, PLAIN, FILTERED = "greedy", "plain", "filtered"  # kinds of programs


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. With `temperature` 0 none is: the most probable one is taken.

    Attributes:
      temperature: what logits are divided by. top_k: the most probable tokens that may be drawn; 0 is all.
      top_p: of those the fewest that together have this probability (nucleus; Holtzman et al. 2020); 1 is all.
        Tokens of equal probability are all in, or all out.
      seed: of the numbers drawn.

    Raises:
      InputError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k: must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: must lie in [0, 2^32), not {self.seed}")

    @property
    def kind(self) -> str:
        """What the program has to do: sampling without a filter needs no search for what is left out."""
        if self.temperature == 0:
            return GREEDY
        return FILTERED if self.top_k or self.top_p < 1 else PLAIN


class Draw(NamedTuple):
    """What tokens are drawn by, arrays of scalars but for the last.

    Attributes: as of `Sampling`; turn_B: uint32, which of several equal prompts a row is, so that their texts differ.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    seed: Array
    turn_B: Array


def choose_tokens(logit_BV: jax.Array, draw: Draw, n_B: jax.Array, kind: str) -> jax.Array:
    """`[B]` int32. Args: float32 logits; how many tokens each sequence has got so far; `Sampling.kind`.

    What is drawn depends on the row's logits, the seed, the turn and the count alone, not on other rows.
    """
    if kind == GREEDY:
        return _find_largest(logit_BV)
    logit_BV = logit_BV / draw.temperature
    if kind == FILTERED:
        logit_BV = keep_probable(logit_BV, draw.top_k, draw.top_p)

    def make_noise(turn: jax.Array, n: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(draw.seed), turn), n)
        return jax.random.gumbel(key, logit_BV.shape[1:])

    return _find_largest(logit_BV + jax.vmap(make_noise)(draw.turn_B, n_B))


def _find_largest(x_BV: jax.Array) -> jax.Array:
    """`[B]` int32, `argmax`: of the largest numbers of blocks, and then of a block.

    A reduction of pairs, which `argmax` is, takes a CPU an element at a time; one of numbers is vectorised. On a mesh,
    where the vocabulary is split, blocks would cross devices.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jnp.argmax(x_BV, axis=-1).astype(jnp.int32)
    n_rows, n_vocab = x_BV.shape
    spare = -n_vocab % _BLOCK
    x_BV = jnp.pad(x_BV, ((0, 0), (0, spare)), constant_values=-jnp.inf) if spare else x_BV
    x_BXU = x_BV.reshape(n_rows, -1, _BLOCK)
    block_B = jnp.argmax(jnp.max(x_BXU, axis=-1), axis=-1)
    own_BU = jnp.take_along_axis(x_BXU, block_B[:, None, None], axis=1)[:, 0]
    return (block_B * _BLOCK + jnp.argmax(own_BU, axis=-1)).astype(jnp.int32)


def keep_probable(logit_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits of the `top_k` most probable tokens (0: all), and of these of the nucleus of `top_p`; else -inf.

    Nothing is sorted: the least logit that stays is found bit by bit, which takes 32 sums over the vocabulary.
    """
    order_BV = _order(logit_BV)
    n_vocab = logit_BV.shape[-1]
    n_kept = jnp.where(top_k > 0, jnp.minimum(top_k, n_vocab), n_vocab).astype(jnp.float32)
    # Counts are exact in float32 to 2^24.
    at_least_B1 = _find_least(order_BV, jnp.ones_like(logit_BV), n_kept)
    logit_BV = jnp.where(order_BV >= at_least_B1, logit_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(logit_BV, axis=-1)
    share_B1 = top_p * jnp.sum(probability_BV, axis=-1, keepdims=True)
    at_least_B1 = jnp.where(top_p < 1, _find_least(order_BV, probability_BV, share_B1), 0)
    return jnp.where(order_BV >= at_least_B1, logit_BV, -jnp.inf)


def _order(x: jax.Array) -> jax.Array:
    """uint32 in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _find_least(order_BV: jax.Array, weight_BV: jax.Array, wanted: jax.Array) -> jax.Array:
    """`[B, 1]` uint32, the largest number for which what is not below it weighs `wanted` or more."""

    def refine(step: jax.Array, found_B1: jax.Array) -> jax.Array:
        tried_B1 = found_B1 | (jnp.uint32(1) << (_BITS - 1 - step).astype(jnp.uint32))
        total_B1 = jnp.sum(jnp.where(order_BV >= tried_B1, weight_BV, 0), axis=-1, keepdims=True)
        return jnp.where(total_B1 >= wanted, tried_B1, found_B1)

    return jax.lax.fori_loop(0, _BITS, refine, jnp.zeros((order_BV.shape[0], 1), jnp.uint32))
