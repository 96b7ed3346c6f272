"""Where slots stand in their histories, and what tables of transitions owe to the histories of a training batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.types import TRANSITION_DECAY, TRANSITION_GAP, Batch, Catalog


class Places(NamedTuple):
    """Where slots t stand, and the events s before them.

    Attributes:
      rank_BS: float32, events of its own service in the sequence, up to and with a slot; 0 where it is no event.
      count_BTZ: float32, events of each service up to and with a slot, and a column of zeros for no service.
      position_BS, position_BT: int32 places in the sequence.
    """

    rank_BS: jax.Array
    count_BTZ: jax.Array
    position_BS: jax.Array
    position_BT: jax.Array

    def gap(self, service_BS: jax.Array) -> jax.Array:
        """`[B, T, S]`, how many places of its service an event stands before the next one of it after a slot."""
        of_BSZ = jax.nn.one_hot(service_BS, self.count_BTZ.shape[-1])
        return _sum("BTZ,BSZ->BTS", self.count_BTZ, of_BSZ) + 1 - self.rank_BS[:, None]

    def joint_gap(self) -> jax.Array:
        """`[B, T, S]`, the same over events of all services."""
        return (self.position_BT[:, :, None] + 1 - self.position_BS[:, None]).astype(jnp.float32)

    def of_asked(self, row_Q: jax.Array, flat_Q: jax.Array, position_QX: jax.Array) -> "Places":
        """Of X hypotheses at flat slots: where they stand, and the events of their rows."""
        count_Q1Z = self.count_BTZ.reshape(-1, self.count_BTZ.shape[-1])[flat_Q][:, None]
        count_QXZ = jnp.broadcast_to(count_Q1Z, (*position_QX.shape, count_Q1Z.shape[-1]))
        return Places(self.rank_BS[row_Q], count_QXZ, self.position_BS[row_Q], position_QX)


def find_places(batch: Batch, n_services: int) -> Places:
    """The places of a batch's slots, among themselves."""
    event_BSZ = jax.nn.one_hot(batch.service_BT, n_services + 1) * (batch.service_BT < n_services)[..., None]
    count_BTZ = _sum("BTS,BSZ->BTZ", _is_past(batch.segment_BT), event_BSZ)
    return Places(jnp.sum(count_BTZ * event_BSZ, axis=-1), count_BTZ, batch.position_BT, batch.position_BT)


def _is_past(segment_BT: jax.Array) -> jax.Array:
    """`[B, T, S]` bool, whether slot s is of the sequence of slot t, and not after it."""
    place = jnp.arange(segment_BT.shape[1])
    same_BTS = (segment_BT[:, :, None] == segment_BT[:, None]) & (segment_BT[:, :, None] > 0)
    return same_BTS & (place <= place[:, None])


class Own(NamedTuple):
    """What a table of transitions would not have, had a sequence ended at slot t. Attributes: float32, of the weight
    of the pair of event s and the target of t; and of that of all pairs that stand in the row of event s, or where
    services are asked of those with items of the target's service.
    """

    pair_BTS: jax.Array
    all_BTS: jax.Array


class KeptPairs(NamedTuple):
    """Whose pairs the row of the item of an event s has kept. Attributes: bool, of the items that follow slots t, and
    of those of events t.
    """

    has_next_BTS: jax.Array
    has_item_BTS: jax.Array


def find_own(
    batch: Batch,
    catalog: Catalog,
    next_item_BT: jax.Array,
    places: Places,
    kept: KeptPairs,
    crosses: bool,
    by_service: bool,
) -> Own:
    """What is to be taken out in training, where the table was counted on the very sequences of the batch.

    A pair of events is counted for both of its items; items may come again, so that event s has pairs of its item's
    other events, too.

    Args:
      next_item_BT: the item that follows each slot in training, -1 for none.
      places: of these slots.
      kept: what the table has of these items; a pair that it has not kept is not to be taken out of its sums.
      crosses: whether the table has the pairs of two services, or those of one.
      by_service: whether services are asked, each of the items of its own.
    """
    item_BS, service_BS, n_services = batch.item_BT, batch.service_BT, places.count_BTZ.shape[-1] - 1
    next_service_BT = jnp.where(next_item_BT >= 0, catalog.service_I[jnp.maximum(next_item_BT, 0)], -1)
    is_event_BS, is_past_BTS = service_BS < n_services, _is_past(batch.segment_BT)
    # Pairs of the event of slot p and that which follows slot q.
    gap_BQP = places.joint_gap() if crosses else places.gap(service_BS)
    is_one_BQP = next_service_BT[..., None] == service_BS[:, None]
    is_pair_BQP = is_past_BTS & (gap_BQP <= TRANSITION_GAP) & is_event_BS[:, None]
    is_pair_BQP &= (~is_one_BQP if crosses else is_one_BQP) & (next_item_BT >= 0)[..., None]
    is_pair_BQP &= next_item_BT[..., None] != item_BS[:, None]
    pair_BQP = jnp.where(is_pair_BQP, TRANSITION_DECAY ** (gap_BQP - 1), 0)
    is_left_BTQ = jnp.swapaxes(is_past_BTS, 1, 2)  # what follows a slot q from t on
    same_BSP = (is_past_BTS | is_left_BTQ) & is_event_BS[..., None]
    again_BSP = (same_BSP & is_event_BS[:, None] & (item_BS[..., None] == item_BS[:, None])).astype(jnp.float32)
    later_BSQ = (same_BSP & (item_BS[..., None] == next_item_BT[:, None])).astype(jnp.float32)
    # Of an earlier event of the item of s, and of a later one.
    before_BSQ = _sum("BSP,BQP->BSQ", again_BSP, pair_BQP) * jnp.swapaxes(kept.has_next_BTS, 1, 2)
    has_item_BSP = jnp.swapaxes(kept.has_item_BTS, 1, 2).astype(jnp.float32)
    is_asked_BTQ, is_asked_BTP = is_left_BTQ, None
    if by_service:
        is_asked_BTQ = is_left_BTQ & (next_service_BT[..., None] == next_service_BT[:, None])
        is_asked_BTP = next_service_BT[..., None] == service_BS[:, None]
    all_BTS = _sum("BTQ,BSQ->BTS", is_asked_BTQ, before_BSQ)
    if is_asked_BTP is None or not crosses:  # then the pairs of an event that is pointed at are of one service
        all_BTS += _sum("BTQ,BSQ->BTS", is_left_BTQ, later_BSQ * _sum("BSP,BQP->BSQ", has_item_BSP, pair_BQP))
    else:
        for z in range(n_services):  # over the few services, or an array would have as many axes as there are slots
            pair_of_z_BQP = pair_BQP * (service_BS == z)[:, None]
            after_BSQ = later_BSQ * _sum("BSP,BQP->BSQ", has_item_BSP, pair_of_z_BQP)
            all_BTS += (next_service_BT == z)[..., None] * _sum("BTQ,BSQ->BTS", is_left_BTQ, after_BSQ)
    is_target_BTP = next_item_BT[..., None] == item_BS[:, None]
    with_target_BTQ = is_left_BTQ * _sum("BTP,BQP->BTQ", is_target_BTP, pair_BQP)
    same_target_BTQ = is_left_BTQ & (next_item_BT[..., None] == next_item_BT[:, None])
    pair_BTS = _sum("BTQ,BSQ->BTS", same_target_BTQ, before_BSQ)
    pair_BTS += _sum("BTQ,BSQ->BTS", with_target_BTQ, later_BSQ) * kept.has_next_BTS
    return Own(pair_BTS, all_BTS)


def _sum(axes: str, *terms: jax.Array) -> jax.Array:
    """Sums of products in full float32: what is left of a weight is a difference of two."""
    return jnp.einsum(axes, *(x.astype(jnp.float32) for x in terms), precision=jax.lax.Precision.HIGHEST)
