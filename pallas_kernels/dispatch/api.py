"""The plan of a dispatch: one sort, groups padded to whole tiles, and the inverse.

Letters as in `pallas_kernels`: T rows, A choices of a row, E experts, L tiles, R = L * tile row slots: the positions in
the plan's row buffer, where the routed rows stand, and padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class DispatchPlan(NamedTuple):
    """Where the `T * A` assignments stand, expert after expert, each expert's group padded to whole tiles.

    Attributes:
      expert_L: int32, the expert of each tile; behind the last used tile, the last expert.
      row_R: int32, the row that stands in each row slot; 0 in padding.
      choice_R: int32, which of the row's A choices it is; 0 in padding.
      used_R: bool, whether an assignment stands there.
      row_slot_TA: int32, the row slot of each assignment; 0 where it was dropped.
      kept_TA: bool, whether the assignment has a row slot.
      size_E: int32, kept assignments of each expert.
      demand_E: int32, assignments of each expert before any is dropped.
      n_tiles: int32 scalar, tiles in use.
    """

    expert_L: jax.Array
    row_R: jax.Array
    choice_R: jax.Array
    used_R: jax.Array
    row_slot_TA: jax.Array
    kept_TA: jax.Array
    size_E: jax.Array
    demand_E: jax.Array
    n_tiles: jax.Array

    @property
    def tile(self) -> int:
        """Row slots of a tile."""
        return self.row_R.shape[0] // self.expert_L.shape[0]


def count_tiles(n_assignments: int, n_experts: int, tile: int) -> int:
    """Tiles that suffice whatever the load: each expert wastes less than one."""
    return n_assignments // tile + min(n_experts, n_assignments)


def make_plan(expert_TA: jax.Array, n_experts: int, tile: int, capacity: int | jax.Array | None = None) -> DispatchPlan:
    """Orders the assignments by expert, rows in order within an expert, by one sort of a packed 32-bit key.

    Args:
      expert_TA: int32 `[T, A]`, the experts of each row, from 0 to E - 1; E sends an assignment nowhere.
      n_experts: E.
      tile: row slots of a tile.
      capacity: most assignments of an expert, the first ones by row; None drops nothing.

    Raises:
      ValueError: there are too many assignments and experts for a 32-bit key, or nothing to plan.
    """
    n_rows, n_choices = expert_TA.shape
    n = n_rows * n_choices
    shift = max(n - 1, 1).bit_length()
    if n == 0 or (n_experts + 1) << shift > 1 << 32:
        raise ValueError(f"dispatch: {n} assignments over {n_experts} experts do not fit a 32-bit key")
    index = jnp.arange(n, dtype=jnp.uint32)
    # Every key is unique, so an unstable sort keeps the rows in order. `jax.lax.sort` and not `argsort`: under
    # `shard_map` the latter forgets that its result varies over devices, which makes gradients wrong in silence.
    key = jax.lax.sort((expert_TA.reshape(-1).astype(jnp.uint32) << shift) | index, is_stable=False)
    assignment = (key & ((1 << shift) - 1)).astype(jnp.int32)
    expert = (key >> shift).astype(jnp.int32)
    first_E = jnp.searchsorted(expert, jnp.arange(n_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    demand_E = jnp.diff(first_E)
    size_E = demand_E if capacity is None else jnp.minimum(demand_E, capacity)
    end_E = jnp.cumsum((size_E + tile - 1) // tile)
    start_E = jnp.pad(end_E[:-1], (1, 0)) * tile
    rank = jnp.arange(n, dtype=jnp.int32) - first_E[expert]
    kept = rank < jnp.pad(size_E, (0, 1))[expert]
    n_tiles = count_tiles(n, n_experts, tile)
    # What is dropped goes past the end, each to a number of its own, where a scatter leaves it out.
    row_slot = jnp.where(
        kept, start_E[jnp.minimum(expert, n_experts - 1)] + rank, n_tiles * tile + jnp.arange(n, dtype=jnp.int32)
    )

    def scatter(size, at, values, fill):
        return jnp.full(size, fill, values.dtype).at[at].set(values, unique_indices=True, mode="drop")

    source_R = scatter(n_tiles * tile, row_slot, assignment, -1)
    flat_row_slot = scatter(n, assignment, jnp.where(kept, row_slot, -1), 0)
    used_R = source_R >= 0
    source_R = jnp.maximum(source_R, 0)
    tile_end = jnp.searchsorted(end_E, jnp.arange(n_tiles, dtype=jnp.int32), side="right")
    return DispatchPlan(
        expert_L=jnp.minimum(tile_end, n_experts - 1).astype(jnp.int32),
        row_R=source_R // n_choices,
        choice_R=source_R % n_choices,
        used_R=used_R,
        row_slot_TA=jnp.maximum(flat_row_slot, 0).reshape(n_rows, n_choices),
        kept_TA=(flat_row_slot >= 0).reshape(n_rows, n_choices),
        size_E=size_E,
        demand_E=demand_E,
        n_tiles=end_E[-1].astype(jnp.int32),
    )
