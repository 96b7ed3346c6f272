"""What a pointer at an event gives to the items that are near that event's item.

Near by their texts: an item that nobody has chosen yet has no row, and no pointer into the history finds it; its text's
neighbours are known. And near in the histories of others: the graph of transitions, without which a small model would
have to learn every pair by heart. The tables (`moerec.data.neighbors`) are data: they may be extended without training.

A training target is itself in the table of transitions, through its own user: what that user has given is taken out
again, else the table would tell the answer. An event of whose item little is known speaks softly: of the weight W that
its row of the table has, W / (W + `DISCOUNT`) counts, as in the smoothing of Witten & Bell (1991).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.config import ModelConfig
from moerec.nn.embeddings import has_row
from moerec.nn.layers import MASK_VALUE
from moerec.types import TRANSITION_DECAY, TRANSITION_GAP, Batch, Catalog, NearPointer

TEXT, TRANSITIONS = "text", "transitions"
FIRST_SHARPNESS = 8.0  # of similarities, which are cosines: the nearest have most of an event's weight
FIRST_SLOPE = math.log(0.7)  # of a pointer's logit by an event's place in its service, counted from the last
DISCOUNT = 4.0
_LEAST = 1e-3  # less is a rounding of nothing: the smallest weight of a pair is `TRANSITION_DECAY` to the ninth, .13


def near_names(config: ModelConfig) -> tuple[str, ...]:
    """The tables that there are pointers to; they are the last of the components, in this order."""
    wanted = ((TEXT, config.text_pointer), (TRANSITIONS, config.transition_pointer))
    return tuple(name for name, is_there in wanted if is_there)


class Places(NamedTuple):
    """Where slots stand among the events of each service.

    Attributes:
      rank_BS: float32, events of its own service in the sequence, up to and with a slot; 0 where it is no event.
      count_BTZ: float32, events of each service up to and with a slot, and a column of zeros for no service.
    """

    rank_BS: jax.Array
    count_BTZ: jax.Array

    def gap(self, service_BS: jax.Array) -> jax.Array:
        """`[B, T, S]`, how many places of its service an event stands before the next one of it after a slot."""
        of_BSZ = jax.nn.one_hot(service_BS, self.count_BTZ.shape[-1])
        return jnp.einsum("BTZ,BSZ->BTS", self.count_BTZ, of_BSZ) + 1 - self.rank_BS[:, None]


def find_places(batch: Batch, n_services: int) -> Places:
    """The places of a batch's slots."""
    event_BSZ = jax.nn.one_hot(batch.service_BT, n_services + 1) * (batch.service_BT < n_services)[..., None]
    count_BTZ = jnp.einsum("BTS,BSZ->BTZ", _is_past(batch.segment_BT).astype(jnp.float32), event_BSZ)
    return Places(jnp.sum(count_BTZ * event_BSZ, axis=-1), count_BTZ)


def _is_past(segment_BT: jax.Array) -> jax.Array:
    """`[B, T, S]` bool, whether slot s is of the sequence of slot t, and not after it."""
    place = jnp.arange(segment_BT.shape[1])
    same_BTS = (segment_BT[:, :, None] == segment_BT[:, None]) & (segment_BT[:, :, None] > 0)
    return same_BTS & (place <= place[:, None])


class Own(NamedTuple):
    """What the table of transitions would not have, had a sequence ended at slot t. Attributes: float32, of the weight
    of the pair of event s and the target of t; and of that of all pairs of event s.
    """

    pair_BTS: jax.Array
    all_BTS: jax.Array


def find_own(batch: Batch, catalog: Catalog, next_item_BT: jax.Array, places: Places) -> Own:
    """What is to be taken out in training, where the table was counted on the very sequences of the batch.

    A pair of events is counted for both of its items; items may come again, so that event s has pairs of its item's
    other events, too.

    Args: the item that follows each slot in training, -1 for none; places of the same slots.
    """
    item_BS, n_none = batch.item_BT, places.count_BTZ.shape[-1] - 1
    next_service_BT = jnp.where(next_item_BT >= 0, catalog.service_I[jnp.maximum(next_item_BT, 0)], -1)
    is_event_BS, is_past_BTS = batch.service_BT < n_none, _is_past(batch.segment_BT)
    same_BTS = is_past_BTS | jnp.swapaxes(is_past_BTS, 1, 2)
    # Pairs of the event of slot p and that which follows slot q.
    gap_BQP = places.gap(batch.service_BT)
    is_pair_BQP = is_past_BTS & (next_service_BT[..., None] == batch.service_BT[:, None]) & (gap_BQP <= TRANSITION_GAP)
    is_pair_BQP &= next_item_BT[..., None] != item_BS[:, None]
    pair_BQP = jnp.where(is_pair_BQP, TRANSITION_DECAY ** (gap_BQP - 1), 0)
    is_left_BTQ = jnp.swapaxes(is_past_BTS, 1, 2).astype(jnp.float32)  # what follows a slot q from t on
    both_BSP = is_event_BS[:, :, None] & is_event_BS[:, None]
    again_BSP = (same_BTS & both_BSP & (item_BS[..., None] == item_BS[:, None])).astype(jnp.float32)
    later_BSQ = (same_BTS & (item_BS[..., None] == next_item_BT[:, None])).astype(jnp.float32) * is_event_BS[..., None]
    # Of an earlier event of the item of s, and of a later one.
    before_BSQ = jnp.einsum("BSP,BQP->BSQ", again_BSP, pair_BQP)
    after_BSQ = later_BSQ * jnp.sum(pair_BQP, axis=-1)[:, None]
    all_BTS = jnp.einsum("BTQ,BSQ->BTS", is_left_BTQ, before_BSQ + after_BSQ)
    same_target_BTQ = is_left_BTQ * (next_item_BT[..., None] == next_item_BT[:, None])
    is_target_BTP = (next_item_BT[..., None] == item_BS[:, None]).astype(jnp.float32)
    with_target_BTQ = is_left_BTQ * jnp.einsum("BTP,BQP->BTQ", is_target_BTP, pair_BQP)
    of_earlier_BTS = jnp.einsum("BTQ,BSQ->BTS", same_target_BTQ, before_BSQ)
    return Own(of_earlier_BTS + jnp.einsum("BTQ,BSQ->BTS", with_target_BTQ, later_BSQ), all_BTS)


class NearTable(NamedTuple):
    """A table as the events of a batch see it.

    Attributes:
      share_BSX: float32 shares of the neighbours. total_BS: float32, what stands behind them; infinite where that is no
        matter of counts, 0 where there are none.
    """

    share_BSX: jax.Array
    total_BS: jax.Array


def read_text(item_BS: jax.Array, sharpness_BS: jax.Array, catalog: Catalog) -> NearTable:
    """Shares are a softmax of sharpness times similarity."""
    neighbor_BSX, similarity_BSX = (table[item_BS] for table in catalog.near[TEXT])
    is_there = neighbor_BSX >= 0
    share_BSX = jax.nn.softmax(jnp.where(is_there, sharpness_BS[..., None] * similarity_BSX, MASK_VALUE))
    return NearTable(jnp.where(is_there, share_BSX, 0), jnp.where(is_there[..., 0], jnp.inf, 0))


def read_transitions(item_BS: jax.Array, catalog: Catalog) -> NearTable:
    """Shares are in proportion to weights. Items that are without their rows for a step are so here, too."""
    neighbor_BSX, weight_BSX = (table[item_BS] for table in catalog.near[TRANSITIONS])
    is_known = (
        (neighbor_BSX >= 0) & has_row(jnp.maximum(neighbor_BSX, 0), catalog) & has_row(item_BS, catalog)[..., None]
    )
    weight_BSX = jnp.where(is_known, weight_BSX, 0)
    total_BS = jnp.sum(weight_BSX, axis=-1)
    return NearTable(weight_BSX / jnp.maximum(total_BS, _LEAST)[..., None], total_BS)


class Pointed(NamedTuple):
    """Where a pointer points before it has a weight. Attributes: float32 `[B, T, S]`, adding up to one; what is to be
    added to its weight's logarithm, which is how much stands behind what it points at; and, in training, as in
    `NearPointer`, of events that still stand for something.
    """

    share_BTS: jax.Array
    log_evidence_BT: jax.Array
    own_BTS: jax.Array | None = None
    left_BTS: jax.Array | None = None


def point_near(logit_BTS: jax.Array, open_BTS: jax.Array, table: NearTable, own: Own | None) -> Pointed:
    """Args: logits; which events may be pointed at; the table that they have; and what it owes to the target's user."""
    total_BTS = jnp.broadcast_to(table.total_BS[:, None], logit_BTS.shape)
    left_BTS = total_BTS if own is None else total_BTS - own.all_BTS
    is_known = open_BTS & (left_BTS > _LEAST)
    # Both branches finite, or the gradient is not: an infinite total has nothing to discount.
    counted_BTS = jnp.where(is_known & jnp.isfinite(left_BTS), left_BTS, 1)
    log_part_BTS = jnp.where(jnp.isfinite(left_BTS), jnp.log(counted_BTS / (counted_BTS + DISCOUNT)), 0)
    weighed_BTS = jnp.where(is_known, logit_BTS + log_part_BTS, MASK_VALUE)
    log_all_BT = jax.nn.logsumexp(jnp.where(open_BTS, logit_BTS, MASK_VALUE), axis=-1)
    log_evidence_BT = jax.nn.logsumexp(weighed_BTS, axis=-1) - log_all_BT
    share_BTS = jnp.where(is_known, jax.nn.softmax(weighed_BTS), 0)
    # Where it has nothing to point at it has no weight.
    log_evidence_BT = jnp.where(jnp.any(is_known, axis=-1), log_evidence_BT, MASK_VALUE)
    if own is None:
        return Pointed(share_BTS, log_evidence_BT)
    counted_total_BTS = jnp.maximum(jnp.where(jnp.isfinite(total_BTS), total_BTS, 1), _LEAST)
    of_own_BTS, of_left_BTS = (x / counted_total_BTS for x in (own.pair_BTS, counted_BTS))
    return Pointed(share_BTS, log_evidence_BT, of_own_BTS, of_left_BTS)


def share_targets(near: NearPointer, neighbor_IX: jax.Array, item_BS: jax.Array, target_BT: jax.Array) -> jax.Array:
    """`[B, T]`, what the target of slot t is given, as a neighbour of the events that the slot sees."""
    neighbor_BSX = neighbor_IX[item_BS]
    # One fused sum: `[B, T, S, X]` never stands in memory.
    hit_BTSX = neighbor_BSX[:, None] == target_BT[:, :, None, None]
    share_BTS = jnp.sum(jnp.where(hit_BTSX, near.share_BSX[:, None], 0), axis=-1)
    if near.own_BTS is not None:
        assert near.left_BTS is not None
        others_BTS = share_BTS - near.own_BTS
        # As a part of what is left; a share of which the own user has it all is rounded to nothing.
        share_BTS = jnp.where(others_BTS > 1e-5, others_BTS / near.left_BTS, 0)
    return jnp.sum(near.given_BTS * share_BTS, axis=-1)
