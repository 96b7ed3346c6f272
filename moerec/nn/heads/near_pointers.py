"""What a pointer at an event gives to the items that are near that event's item.

Near by their texts: an item that nobody has chosen yet has no row, and no pointer into the history finds it; its text's
neighbors are known. And near in the histories of others, within a service and across services: the graphs of
transitions, of which a small model would have to learn every pair by heart. The tables (`moerec.data.neighbors`) are
data: they may be extended without training.

A training target is itself in the tables of transitions, through its own user: what that user has given is taken out
again (`places.find_own`), else the table would tell the answer. An event of whose item little is known speaks softly:
of the weight W that its row of the table has, W / (W + `DISCOUNT`) counts, as in the smoothing of Witten & Bell (1991).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.config import ModelConfig
from moerec.nn.embeddings import has_row
from moerec.nn.heads.places import KeptPairs, Own, Places, find_own
from moerec.nn.layers import MASK_VALUE, Initializer, fan_in
from moerec.types import Batch, Catalog, NearPointer, OwnShare

CROSSINGS, TEXT, TRANSITIONS = "crossings", "text", "transitions"
FIRST_SHARPNESS = 8.0  # of similarities, which are cosines: the nearest have most of an event's weight
FIRST_SLOPE = math.log(0.7)  # of a pointer's logit by an event's place, counted from the last
DISCOUNT = 4.0
_LEAST = 1e-3  # less is a rounding of nothing: the smallest weight of a pair is `TRANSITION_DECAY` to the ninth, .13


def near_names(config: ModelConfig) -> tuple[str, ...]:
    """The tables that there are pointers to, by their names; they are the last of the components, in this order."""
    pointers = (
        (CROSSINGS, config.crossing_pointer),
        (TEXT, config.text_pointer),
        (TRANSITIONS, config.transition_pointer),
    )
    return tuple(name for name, is_there in pointers if is_there)


def told_names(config: ModelConfig) -> tuple[str, ...]:
    """Those of them that have been counted on the training targets."""
    return tuple(name for name in near_names(config) if name != TEXT)


def ask_nothing_at_first(n_near: int) -> Initializer:
    """Of the queries `[D, G, H]` of pointers, the last of which are those to neighbors: these begin with their slopes
    alone. What is drawn at random has to be unlearned first, and where few events compete training does not do it.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        return fan_in(key, shape, dtype).at[:, shape[1] - n_near :].set(0)

    return init


class NearTable(NamedTuple):
    """A table as the events of a batch see it.

    Attributes:
      share_BSX: float32 shares of the neighbors.
      total_BS: float32, what stands behind them; infinite where that is no matter of counts, 0 where there are none.
      part_BSZ: float32, what the shares of each service's items add up to; None where all are of the event's service.
    """

    share_BSX: jax.Array
    total_BS: jax.Array
    part_BSZ: jax.Array | None = None


def read_table(
    name: str, item_BS: jax.Array, sharpness_BS: jax.Array | None, catalog: Catalog, n_services: int
) -> NearTable:
    """The table of events' items. Shares of texts are a softmax of sharpness times similarity, others are in proportion
    to weights; items that are without their rows for a step are so there, too.
    """
    neighbor_BSX, weight_BSX = (column[item_BS] for column in catalog.near[name])
    is_there = neighbor_BSX >= 0
    if name == TEXT:
        assert sharpness_BS is not None
        share_BSX = jax.nn.softmax(jnp.where(is_there, sharpness_BS[..., None] * weight_BSX, MASK_VALUE))
        return NearTable(jnp.where(is_there, share_BSX, 0), jnp.where(is_there[..., 0], jnp.inf, 0))
    neighbor_BSX = jnp.maximum(neighbor_BSX, 0)
    is_known = is_there & has_row(neighbor_BSX, catalog) & has_row(item_BS, catalog)[..., None]
    weight_BSX = jnp.where(is_known, weight_BSX, 0)
    total_BS = jnp.sum(weight_BSX, axis=-1)
    share_BSX = weight_BSX / jnp.maximum(total_BS, _LEAST)[..., None]
    if name == TRANSITIONS:
        return NearTable(share_BSX, total_BS)
    of_BSXZ = jax.nn.one_hot(catalog.service_I[neighbor_BSX], n_services)
    return NearTable(share_BSX, total_BS, jnp.einsum("BSX,BSXZ->BSZ", share_BSX, of_BSXZ))


class Told(NamedTuple):
    """What a table that has been counted on the training targets has of the items that follow slots.

    Attributes:
      next_BTS: float32, the shares that these have in the rows of events s. own: what is to be taken out.
    """

    next_BTS: jax.Array
    own: Own


def find_told(
    config: ModelConfig, batch: Batch, catalog: Catalog, next_item_BT: jax.Array, places: Places, n_services: int
) -> dict[str, Told]:
    """Of each table that has been counted on the training targets, what it has of them."""
    found = {}
    for name in told_names(config):
        share_BSX = read_table(name, batch.item_BT, None, catalog, n_services).share_BSX
        neighbor_BSX = catalog.near[name].item_IX[batch.item_BT]
        next_BTS, item_BTS = (_find_shares(share_BSX, neighbor_BSX, x) for x in (next_item_BT, batch.item_BT))
        known = batch, catalog, next_item_BT, places, KeptPairs(next_BTS > 0, item_BTS > 0)
        found[name] = Told(next_BTS, find_own(*known, name == CROSSINGS, config.is_asked))
    return found


class Pointed(NamedTuple):
    """Where a pointer points before it has a weight.

    Attributes:
      share_BTS: float32, adding up to one.
      log_evidence_BT: float32, how much of its attention to all events stands behind what it points at; to be added to
        its weight's logarithm.
      near: what becomes of what events are given.
    """

    share_BTS: jax.Array
    log_evidence_BT: jax.Array
    near: NearPointer


def point_near(
    name: str,
    logit_BTS: jax.Array,
    slope_BT: jax.Array,
    table: NearTable,
    mask_BTS: jax.Array,
    places: Places,
    told: Mapping[str, Told],
    service_BS: jax.Array,
    service_BT: jax.Array | None,
) -> Pointed:
    """The pointer to one table.

    Args:
      slope_BT: of the logits, for each further place of an event from the last one.
      mask_BTS: which events a slot sees. told: of `find_told`, in training.
      service_BS: the events' services. service_BT: those asked, or None.
    """
    gap_BTS = places.joint_gap() if name == CROSSINGS else places.gap(service_BS)
    logit_BTS += slope_BT[..., None] * (gap_BTS - 1)
    open_BTS, part_BTS = mask_BTS, None
    total_BTS = jnp.broadcast_to(table.total_BS[:, None], logit_BTS.shape)
    if service_BT is not None:
        is_own_BTS = service_BS[:, None] == service_BT[..., None]
        open_BTS = mask_BTS & (~is_own_BTS if name == CROSSINGS else is_own_BTS)
        if table.part_BSZ is not None:
            of_BTZ = jax.nn.one_hot(service_BT, table.part_BSZ.shape[-1])
            part_BTS = jnp.einsum("BTZ,BSZ->BTS", of_BTZ, table.part_BSZ, precision=jax.lax.Precision.HIGHEST)
    asked_BTS = total_BTS if part_BTS is None else total_BTS * part_BTS
    known = told.get(name)
    left_BTS = asked_BTS if known is None else asked_BTS - known.own.all_BTS
    is_known = open_BTS & (left_BTS > _LEAST)
    # Both branches finite, or the gradient is not: an infinite total has nothing to discount.
    counted_BTS = jnp.where(is_known & jnp.isfinite(left_BTS), left_BTS, 1)
    log_part_BTS = jnp.where(jnp.isfinite(left_BTS), jnp.log(counted_BTS / (counted_BTS + DISCOUNT)), 0)
    weighed_BTS = jnp.where(is_known, logit_BTS + log_part_BTS, MASK_VALUE)
    # Of the events of all services, so that what there are few of speaks softly, where services are asked, too.
    log_all_BT = jax.nn.logsumexp(jnp.where(mask_BTS, logit_BTS, MASK_VALUE), axis=-1)
    log_evidence_BT = jax.nn.logsumexp(weighed_BTS, axis=-1) - log_all_BT
    # Where it has nothing to point at it has no weight.
    log_evidence_BT = jnp.where(jnp.any(is_known, axis=-1), log_evidence_BT, MASK_VALUE)
    share_BTS = jnp.where(is_known, jax.nn.softmax(weighed_BTS), 0)
    if part_BTS is not None:
        part_BTS = jnp.where(is_known, part_BTS, 1)
    near = NearPointer(table.share_BSX, part_BTS)
    if known is not None:
        whole_BTS = jnp.maximum(total_BTS, _LEAST)
        own = OwnShare(known.next_BTS, known.own.pair_BTS / whole_BTS, counted_BTS / whole_BTS)
        near = near._replace(own=own)
    return Pointed(share_BTS, log_evidence_BT, near)


def share_targets(near: NearPointer, neighbor_IX: jax.Array, item_BS: jax.Array, target_BT: jax.Array) -> jax.Array:
    """`[B, T, S]`, the share of the target of slot t of what the neighbors of the event of slot s are given."""
    if near.own is not None:  # then the targets are the items that follow
        others_BTS = near.own.next - near.own.own
        # As a part of what is left; a share of which the own user has it all is rounded to nothing.
        return jnp.where(others_BTS > 1e-5 * near.own.next, others_BTS / near.own.left, 0)
    share_BTS = _find_shares(near.share_BSX, neighbor_IX[item_BS], target_BT)
    return share_BTS if near.part_BTS is None else share_BTS / near.part_BTS


def _find_shares(share_BSX: jax.Array, neighbor_BSX: jax.Array, target_BT: jax.Array) -> jax.Array:
    """`[B, T, S]`, the share that the target of slot t has among the neighbors of the event of slot s."""
    share_BTS = jnp.zeros((*target_BT.shape, share_BSX.shape[1]), share_BSX.dtype)
    # Neighbor by neighbor, in one fused loop over pairs of slots: where shares have no gradient, as those of counts,
    # `[B, T, S, X]` never stands in memory, and it is several times faster on CPU than a sum over the last axis.
    for x in range(share_BSX.shape[-1]):
        is_hit_BTS = neighbor_BSX[:, None, :, x] == target_BT[:, :, None]
        share_BTS += jnp.where(is_hit_BTS, share_BSX[:, None, :, x], 0)
    return share_BTS


def spread_near(near: NearPointer, given: jax.Array, neighbor_QSX: jax.Array, service_I: jax.Array) -> jax.Array:
    """`[Q, S, X]`, what the neighbors of events are given: those of the service asked, others' values mean nothing.

    Args:
      given: `[Q, S]`; or of all services' answers, where it and `part_BTS` are `[Q, Z, S]`: then each neighbor is
        given what its own service's answer gives it.
    """
    given = given if near.part_BTS is None else given / near.part_BTS
    if given.ndim == 2:
        return given[..., None] * near.share_BSX
    if near.part_BTS is None:  # of which only its own service's answer gives anything to an event
        return jnp.sum(given, axis=1)[..., None] * near.share_BSX
    given_QSZ = jnp.moveaxis(given, 1, 2)
    service_QSX = service_I[jnp.maximum(neighbor_QSX, 0)]
    return jnp.take_along_axis(given_QSZ, service_QSX, axis=-1) * near.share_BSX
