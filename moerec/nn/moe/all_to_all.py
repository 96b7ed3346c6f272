"""Rows to the devices that hold their experts, and outputs back: an all-to-all over one mesh axis, inside `shard_map`.

Letters: n devices of the axis, R row slots of the sender's plan (ordered by device), S rows on the receiver, D width.

Both ways are linear and each is the other's transpose, so that is how they are differentiated. What a sender may send
to one device and what a receiver takes are bounded; both bounds are applied to one matrix of sizes that all devices
know, so that both agree on what is dropped. A dropped row arrives nowhere and its output is zero.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import DispatchPlan
from pallas_kernels.varying import zeros_like_all


class TransferPlan(NamedTuple):
    """Who sends how much to whom; one device's view.

    Attributes:
      sent_n, received_n: int32 rows to and from each device.
      from_n: int32 first place of the rows for each device, in the sender's plan.
      target_n: int32 place on each device where they go. source_n: int32 place on this one of what each device sends.
      origin_n: int32 place in each sender's plan from which this device's rows come.
      sender_drops, receiver_drops: int32 rows of this device that a bound keeps from being sent, or being taken.
    """

    sent_n: jax.Array
    received_n: jax.Array
    from_n: jax.Array
    target_n: jax.Array
    source_n: jax.Array
    origin_n: jax.Array
    sender_drops: jax.Array
    receiver_drops: jax.Array


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """An all-to-all over mesh axis `axis` of `n` devices.

    Attributes:
      n_send: most rows from one device to one other. n_receive: S, most rows that a device takes.
      n_places: R. ragged: by `lax.ragged_all_to_all`, which a CPU does not have; else by a dense all-to-all of
        `n * n_send` rows, equal in values and gradients.
    """

    axis: str
    n: int
    n_send: int
    n_receive: int
    n_places: int
    ragged: bool

    def plan(self, plan: DispatchPlan) -> TransferPlan:
        """The traffic of a plan whose experts are the devices, with tiles of one place."""
        demand_n = plan.demand_E
        capped_n = jnp.minimum(demand_n, self.n_send)
        from_n = jnp.cumsum(plan.size_E) - plan.size_E
        # One small all-gather: [sender, receiver] for sizes and for where the senders hold the rows.
        capped, origin = jax.lax.all_gather(jnp.stack([capped_n, from_n]), self.axis, axis=1)
        start = jnp.cumsum(capped, axis=0) - capped
        taken = jnp.clip(self.n_receive - start, 0, capped)
        start = jnp.minimum(start, self.n_receive)
        me = jax.lax.axis_index(self.axis)
        return TransferPlan(
            sent_n=taken[me],
            received_n=taken[:, me],
            from_n=from_n,
            target_n=start[me],
            source_n=start[:, me],
            origin_n=origin[:, me],
            sender_drops=jnp.sum(demand_n - capped_n),
            receiver_drops=jnp.sum(capped_n - taken[me]),
        )

    def dispatch(self, rows_R: jax.Array, transfers: TransferPlan) -> jax.Array:
        """`[R, …]` to `[S, …]`, zero where nothing came; rows in order of sender, then of the sender's plan."""
        return _move(self, True, rows_R, transfers) if _is_float(rows_R) else _send(self, True, rows_R, transfers)

    def combine(self, rows_S: jax.Array, transfers: TransferPlan) -> jax.Array:
        """`[S, …]` to `[R, …]`, zero where nothing had been sent."""
        return _move(self, False, rows_S, transfers)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _send(transport: AllToAll, is_dispatch: bool, rows: jax.Array, transfers: TransferPlan) -> jax.Array:
    out_size = transport.n_receive if is_dispatch else transport.n_places
    sides = (
        (transfers.from_n, transfers.sent_n, transfers.target_n),
        (transfers.source_n, transfers.received_n, transfers.origin_n),
    )
    (start_n, size_n, place_n), (out_start_n, out_size_n, _) = sides if is_dispatch else sides[::-1]
    if transport.ragged:
        out = zeros_like_all((out_size, *rows.shape[1:]), rows.dtype, rows)
        return jax.lax.ragged_all_to_all(rows, out, start_n, size_n, place_n, out_size_n, axis_name=transport.axis)
    step_X = jnp.arange(transport.n_send, dtype=jnp.int32)
    blocks = _take(rows, start_n[:, None] + step_X, step_X < size_n[:, None])
    blocks = jax.lax.all_to_all(blocks, transport.axis, 0, 0, tiled=True)
    place = jnp.arange(out_size, dtype=jnp.int32)
    # The last device whose rows start at or before the place; devices of no rows share a start with the next.
    source = jnp.maximum(jnp.searchsorted(out_start_n, place, side="right") - 1, 0)
    step = place - out_start_n[source]
    flat = blocks.reshape(-1, *rows.shape[1:])
    return _take(flat, source * transport.n_send + step, step < out_size_n[source])


def _take(rows: jax.Array, index: jax.Array, is_there: jax.Array) -> jax.Array:
    found = rows[jnp.where(is_there, index, 0)]
    return jnp.where(is_there.reshape(*is_there.shape, *(1,) * (rows.ndim - 1)), found, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _move(transport: AllToAll, is_dispatch: bool, rows: jax.Array, transfers: TransferPlan) -> jax.Array:
    return _send(transport, is_dispatch, rows, transfers)


_move.defvjp(
    lambda transport, is_dispatch, rows, transfers: (_send(transport, is_dispatch, rows, transfers), transfers),
    lambda transport, is_dispatch, transfers, g: (_send(transport, not is_dispatch, g, transfers), None),
)
