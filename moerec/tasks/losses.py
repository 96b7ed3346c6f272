"""Next-item losses over packed slots: functions of the targets of a microbatch and of what was drawn for the step.

A loss of one's own is one function with a decorator, `register_loss`: it is given the targets' log-probabilities by the
head (`TargetItems.log_prob` or `sum_nll`), pointers included, so that it works with microbatches and with every head.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import LossConfig
from moerec.config.registry import Registry
from moerec.nn.heads.item import Candidates, TargetItems
from moerec.types import Array, Catalog


class SamplingTable(NamedTuple):
    """What may be drawn: `item_J` int32, in the catalogue's order; and `cdf_J` of `sampling_cdf`. J is I: behind those
    that may be drawn the last of them stands again, without a share, so that shapes do not depend on counts.
    """

    item_J: Array
    cdf_J: Array


class DrawInputs(NamedTuple):
    """What candidates are drawn from, once a step and for the global batch.

    Attributes:
      target_BT: int32 items. catalog: what is known of the items. table: of `make_sampling_table`.
      config: the loss's.
    """

    target_BT: jax.Array
    catalog: Catalog
    table: SamplingTable
    config: LossConfig


Draw = Callable[[jax.Array, DrawInputs], Candidates | None]
SumLoss = Callable[[TargetItems, Candidates | None, LossConfig], jax.Array]


class ItemLoss(NamedTuple):
    """Attributes:
    function: the weighted sum of the losses of a microbatch's slots. draw: the candidates of a step, given a key.
    by_row: whether candidates `[B, T]` belong to a slot each; else `[J]` are shared by all.
    is_normalised: whether it is a function of p(item), as mixtures with pointers need.
    """

    function: SumLoss
    draw: Draw
    by_row: bool
    is_normalised: bool


LOSSES: Registry[ItemLoss] = Registry("loss", "loss.kind")


def draw_all(key: jax.Array, inputs: DrawInputs) -> None:
    """No draw: the whole catalogue, uncorrected, is what targets are normalised against."""


def register_loss(
    name: str, *, draw: Draw = draw_all, by_row: bool = False, is_normalised: bool = True
) -> Callable[[SumLoss], SumLoss]:
    """Decorates `f(targets, candidates, config) -> scalar`, the weighted sum of the losses of a microbatch's slots.

    Args:
      name: what `loss.kind` says. draw, by_row, is_normalised: as `ItemLoss`.

    Raises:
      InputError: the name is taken.
    """

    def add(function: SumLoss) -> SumLoss:
        LOSSES.register(name)(ItemLoss(function, draw, by_row, is_normalised))
        return function

    return add


def sampling_cdf(count_I: np.ndarray, power: float) -> np.ndarray:
    """Where each item's share of the 2^32 random words ends, inclusive: uint32 `[I]`, shares ~ (1 + count)^power.

    Whole numbers, so that what is drawn has exactly the probability that the correction says, and none is zero.
    """
    q = (1.0 + np.asarray(count_I, np.float64)) ** power
    width = np.maximum(np.floor(q / q.sum() * 2.0**32), 1).astype(np.int64)
    width[np.argmax(width)] += 2**32 - width.sum()
    return (np.cumsum(width) - 1).astype(np.uint32)


def make_sampling_table(count_I: np.ndarray, power: float, untrained: bool) -> SamplingTable:
    """Of all items that were trained; of every item, where none was, or `untrained` ones are drawn, too."""
    count_I = np.asarray(count_I)
    is_drawn_I = np.full(len(count_I), untrained or not (count_I > 0).any()) | (count_I > 0)
    item_J = np.flatnonzero(is_drawn_I).astype(np.int32)
    spare = (0, len(count_I) - len(item_J))
    return SamplingTable(*(np.pad(x, spare, "edge") for x in (item_J, sampling_cdf(count_I[item_J], power))))


def sample_negatives(key: jax.Array, table: SamplingTable, shape: tuple[int, ...]) -> Candidates:
    """Draws with replacement and their log-Q corrections."""
    cdf_J = table.cdf_J
    place_X = jnp.searchsorted(cdf_J, jax.random.bits(key, shape, jnp.uint32), side="left").astype(jnp.int32)
    before = jnp.where(place_X > 0, cdf_J[place_X - 1], jnp.uint32(0xFFFFFFFF))
    width = cdf_J[place_X] - before  # modulo 2^32, so the whole range, of a single item, comes out as 0
    q = jnp.where(width == 0, 1.0, width.astype(jnp.float32) * 2.0**-32)
    return Candidates(jnp.asarray(table.item_J)[place_X], -jnp.log(np.prod(shape) * q))


def _multiply_high(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of the product of two uint32: a random word as a whole number below b.

    (`jax.random.randint` takes a remainder, which is far from even where b is a large part of 2^32.)
    """
    (a1, a0), (b1, b0) = ((x >> 16, x & 0xFFFF) for x in (a, b))
    middle = ((a1 * b0) & 0xFFFF) + ((a0 * b1) & 0xFFFF) + ((a0 * b0) >> 16)
    return a1 * b1 + ((a1 * b0) >> 16) + ((a0 * b1) >> 16) + (middle >> 16)


def sample_in_service(key: jax.Array, table: SamplingTable, service_I: jax.Array, item_X: jax.Array) -> jax.Array:
    """One item a slot from the service of the slot's item, with the probabilities of the table within it."""
    cdf_J, service_J = table.cdf_J, service_I[table.item_J]
    service_X = service_I[item_X]  # `service_I` rises: a service's items stand together
    first_X = jnp.searchsorted(service_J, service_X, side="left")
    last_X = jnp.searchsorted(service_J, service_X, side="right") - 1
    low_X = jnp.where(first_X > 0, cdf_J[first_X - 1] + 1, jnp.uint32(0))
    width_X = cdf_J[last_X] - low_X + 1  # modulo 2^32, so that of a single service is 0: any word will do
    word_X = jax.random.bits(key, item_X.shape, jnp.uint32)
    within_X = jnp.where(width_X == 0, word_X, _multiply_high(word_X, width_X))
    return jnp.asarray(table.item_J)[jnp.searchsorted(cdf_J, low_X + within_X, side="left")]


def draw_shared(key: jax.Array, inputs: DrawInputs) -> Candidates:
    """`n_negatives` items for all slots together."""
    return sample_negatives(key, inputs.table, (inputs.config.n_negatives,))


def draw_one_each(key: jax.Array, inputs: DrawInputs) -> Candidates:
    """An item for each slot, of its target's service if the loss's scope is that."""
    if not inputs.config.by_service:
        return sample_negatives(key, inputs.table, inputs.target_BT.shape)
    item_BT = sample_in_service(key, inputs.table, inputs.catalog.service_I, inputs.target_BT)
    return Candidates(item_BT, jnp.zeros(item_BT.shape))  # cross-entropy of pairs has no correction


@register_loss("full_softmax")
def full_softmax(targets: TargetItems, candidates: Candidates | None, config: LossConfig) -> jax.Array:
    """Cross-entropy of the target among all items."""
    return targets.sum_nll(candidates)


@register_loss("sampled_softmax", draw=draw_shared)
def sampled_softmax(targets: TargetItems, candidates: Candidates | None, config: LossConfig) -> jax.Array:
    """Cross-entropy of the target among drawn items, with log-Q correction."""
    return targets.sum_nll(candidates)


@register_loss("one_negative", draw=draw_one_each, by_row=True, is_normalised=False)
def one_negative(targets: TargetItems, candidates: Candidates | None, config: LossConfig) -> jax.Array:
    """Binary cross-entropy of the positive and of one drawn item a slot (Kang & McAuley 2018)."""
    assert candidates is not None
    item_S = candidates.item_J.reshape(-1)
    hit_S = item_S == targets.target_S
    negative_S = jnp.where(hit_S, 0, jax.nn.softplus(targets.score(item_S)))
    return jnp.sum(targets.weight_S * (jax.nn.softplus(-targets.score(targets.target_S)) + negative_S))
