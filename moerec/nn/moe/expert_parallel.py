"""The experts' outputs on a mesh: two ways to bring rows and experts together, inside `shard_map`.

`all_gather`: every device of the expert axis gathers the rows of all, applies its own experts, and their outputs are
summed back to where the rows came from. Nothing is dropped for want of buffers; the traffic is that of all rows.
`all_to_all`: only the rows that an expert was chosen for travel to it. Traffic and memory follow the load; buffers
have a static size, so a bound on them may drop assignments, which is counted.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.config import MoEConfig
from moerec.nn.moe.all_to_all import AllToAll
from moerec.nn.sharding import MESH_AXES, ROW_AXES
from pallas_kernels.combine import combine_rows, gather_rows
from pallas_kernels.dispatch import make_plan
from pallas_kernels.grouped_ffn import grouped_ffn
from pallas_kernels.varying import vary


class Assignment(NamedTuple):
    """What the router chose for the rows of one device.

    Attributes:
      expert_SA: int32, from 0 to E - 1 over all devices; E is nowhere. weight_SA: float. capacity: int32 scalar, most
        rows of an expert, or None.
    """

    expert_SA: jax.Array
    weight_SA: jax.Array
    capacity: jax.Array | None


class ExpertOutput(NamedTuple):
    """Attributes:
    y_SD: weighted sums of the experts' outputs. dropped: int32, assignments of this device, or of its experts, that
      found no place: for want of an expert's capacity, of the sender's and of the receiver's buffer.
    """

    y_SD: jax.Array
    dropped: jax.Array


Matrices = tuple[jax.Array, jax.Array, jax.Array]


def apply_local(x_SD: jax.Array, assignment: Assignment, matrices: Matrices, config: MoEConfig) -> ExpertOutput:
    """All experts are on this device."""
    plan = make_plan(assignment.expert_SA, matrices[0].shape[0], config.tile, assignment.capacity)
    y_SD = grouped_ffn(x_SD, assignment.weight_SA, *matrices, plan, config.backend)
    dropped = jnp.sum(plan.demand_E - plan.size_E)
    return ExpertOutput(y_SD, jnp.stack([dropped, jnp.zeros_like(dropped), jnp.zeros_like(dropped)]))


def apply_all_gather(
    x_SD: jax.Array, assignment: Assignment, matrices: Matrices, config: MoEConfig, axis: str
) -> ExpertOutput:
    """All-gather of the rows, own experts, and a psum-scatter of what they put out."""
    n_local = matrices[0].shape[0]

    def gather(x):
        return jax.lax.all_gather(x, axis, tiled=True)

    own = gather(assignment.expert_SA) - jax.lax.axis_index(axis) * n_local
    here = (own >= 0) & (own < n_local)
    all_rows = Assignment(jnp.where(here, own, n_local), gather(assignment.weight_SA), assignment.capacity)
    output = apply_local(gather(x_SD), all_rows, matrices, config)
    return ExpertOutput(jax.lax.psum_scatter(output.y_SD, axis, tiled=True), output.dropped)


def size_buffers(n_rows: int, n_choices: int, n_local: int, n: int, config: MoEConfig) -> tuple[int, int]:
    """Most rows from one device to one other, and most that a device takes; without factors none can be lost."""
    most = n_rows * min(n_choices, n_local)

    def bound(factor: float, even: float, most: int) -> int:
        return max(min(math.ceil(factor * even), most), 1) if factor else most

    send = bound(config.send_factor, n_rows * n_choices / n, most)
    return send, bound(config.receive_factor, n_rows * n_choices, n * send)


def apply_all_to_all(
    x_SD: jax.Array, assignment: Assignment, matrices: Matrices, config: MoEConfig, axis: str, ragged: bool
) -> ExpertOutput:
    """Rows to their experts' devices and outputs back; weights never travel."""
    n_local, n = matrices[0].shape[0], jax.lax.axis_size(axis)
    n_rows, n_choices = assignment.expert_SA.shape
    plan = make_plan(assignment.expert_SA // n_local, n, tile=1)
    n_send, n_receive = size_buffers(n_rows, n_choices, n_local, n, config)
    transport = AllToAll(axis, n, n_send, n_receive, plan.row_R.shape[0], ragged)
    transfers = transport.plan(plan)
    rows_SD = transport.dispatch(gather_rows(x_SD, plan), transfers)
    # Numbers from 1, because 0 arrives where nothing does.
    own_R = assignment.expert_SA[plan.row_R, plan.choice_R] % n_local + 1
    own_S = transport.dispatch(jnp.where(plan.used_R, own_R, 0), transfers)
    expert_S1 = jnp.where(own_S > 0, own_S - 1, n_local)[:, None]
    ones_S1 = vary(jnp.ones_like(expert_S1, rows_SD.dtype), MESH_AXES)
    output = apply_local(rows_SD, Assignment(expert_S1, ones_S1, assignment.capacity), matrices, config)
    y_SD = combine_rows(transport.combine(output.y_SD, transfers), assignment.weight_SA, plan)
    drops = jnp.stack([jnp.zeros_like(transfers.sender_drops), transfers.sender_drops, transfers.receiver_drops])
    return ExpertOutput(y_SD, output.dropped + drops)


STRATEGIES: dict[str, Callable[..., ExpertOutput]] = {
    "all_gather": apply_all_gather,
    "all_to_all": partial(apply_all_to_all, ragged=False),
    "ragged_all_to_all": partial(apply_all_to_all, ragged=True),
}


def apply_on_mesh(x_SD: jax.Array, assignment: Assignment, matrices: Matrices, config: MoEConfig) -> ExpertOutput:
    """The outputs for this device's rows under the config's strategy; call inside `shard_map` over `MESH_AXES`.

    Args:
      matrices: this device's experts, and of their width its part; the parts' outputs are summed over `model`.
    """
    # Typed as different on every device, so that gradients are summed over those that hold the same value.
    gate, up, down = (vary(m, MESH_AXES) for m in matrices)
    own = (gate, up, down)
    x_SD, assignment = vary(x_SD, MESH_AXES), assignment._replace(weight_SA=vary(assignment.weight_SA, MESH_AXES))
    output = STRATEGIES[config.strategy](x_SD, assignment, own, config, "expert")
    return ExpertOutput(jax.lax.psum(output.y_SD, "model"), jax.lax.psum(output.dropped, ROW_AXES))
