"""Sums over row slots as a Pallas kernel for TPUs (Mosaic): rows come from HBM by DMA and are added in VMEM.

XLA gives its gathers to a chip's SparseCores where there are some (v5p, v6e): each then leaves an array as large as the
sum in memory.

Letters as in `pallas_kernels`: T rows, A choices of a row, R row slots of the plan, D width, L tiles of the rows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import DispatchPlan
from pallas_kernels.row_dma import (
    HBM,
    LANES,
    SPLIT,
    VMEM_BUDGET,
    call_over_tiles,
    fetch,
    make_slots,
    pad_rows,
    read_rows,
    rows_spec,
    share,
    tile_of,
    to_column,
)

TILES = (128, 64, 32, 16)  # rows of a tile, whole sublanes of both types


def choose_tile(n_rows: int, n_choices: int, d: int, width: int) -> int:
    """Rows of a tile: the most that fit, but no more than there are rows for; 0 if none fits.

    Args:
      n_rows: T. n_choices: A. d: D. width: bytes of a number.
    """
    # What stands in the row slots twice, as words; sums twice; and the sum and a summand in float32.
    row_bytes = pl.cdiv(d, LANES) * LANES * (2 * 4 * n_choices + 2 * width + 3 * 4)
    fitting = [tile for tile in TILES if tile * row_bytes <= VMEM_BUDGET]
    return next((tile for tile in fitting if tile // 2 < n_rows), min(fitting, default=0))


def unsupported_reason(rows_RD: jax.Array, plan: DispatchPlan) -> str:
    """Why the kernel cannot take these operands, or nothing."""
    if rows_RD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows of {rows_RD.dtype}; the TPU's kernel takes float32 and bfloat16"
    n_rows, n_choices = plan.row_slot_TA.shape
    if not choose_tile(n_rows, n_choices, rows_RD.shape[1], rows_RD.dtype.itemsize):
        return f"{n_choices} choices of rows of {rows_RD.shape[1]} do not fit a TPU's VMEM"
    return ""


def _sum_kernel(
    first_row_slot_ref, next_row_slot_ref, column_ref, rows_ref, y_ref, words_ref, semaphore_ref, *, n_parts, n_tiles
):
    i, tile = pl.program_id(1), y_ref.shape[0]
    n = share(pl.program_id(0), n_parts, n_tiles)[1]

    @pl.when(i < n)
    def sum_tile():
        fetch(i, n, first_row_slot_ref, next_row_slot_ref, rows_ref, words_ref, semaphore_ref)
        total = jnp.zeros(y_ref.shape, jnp.float32)
        for a in range(words_ref.shape[1] // tile):
            words_of_choice = words_ref.at[jax.lax.rem(i, 2), pl.ds(a * tile, tile)]
            rows = read_rows(words_of_choice, column_ref[0, 2 * a + 1 : 2 * a + 2], jnp.float32)
            # A row slot where nothing stands may hold NaN, which a product with zero would keep.
            total += jnp.where(to_column(column_ref[0, 2 * a : 2 * a + 1]) > 0, rows, 0.0)
        y_ref[...] = total.astype(y_ref.dtype)


def _describe_rows(plan: DispatchPlan, tile: int) -> tuple[jax.Array, jax.Array]:
    """int32 `[L, 1, A * tile]` row slots of a tile's first choices, then of its second; float32 `[L, 2 * A, tile]`.

    The latter says of each choice in turn whether it is kept, and whether its row slot is odd. Rows behind the last one
    are as those of which nothing is kept.
    """
    n_rows, n_choices = plan.row_slot_TA.shape
    n_tiles = pl.cdiv(n_rows, tile)

    def cut(values_TA):
        # Rows along the lanes first: a TPU would pad the few choices to all of them.
        padded = jnp.pad(values_TA.T, ((0, 0), (0, -n_rows % tile)))
        return padded.reshape(n_choices, n_tiles, tile).swapaxes(0, 1)

    columns = jnp.stack([cut(plan.kept_TA), cut(plan.row_slot_TA % 2 > 0)], axis=2)
    return (
        cut(plan.row_slot_TA).reshape(n_tiles, 1, n_choices * tile),
        columns.reshape(n_tiles, 2 * n_choices, tile).astype(jnp.float32),
    )


def unpermute_sum(rows_RD: jax.Array, plan: DispatchPlan, interpret: Any = False) -> jax.Array:
    """Sum over a row's kept assignments of what stands in their row slots, `[T, D]`, added up in float32.

    Args:
      rows_RD: float32 or bfloat16; where nothing stands they may be anything, NaN too.
      plan: of `make_plan`.
      interpret: as in `pl.pallas_call`.

    Raises:
      ValueError: rows of another type, or too many choices of too wide rows for a TPU's VMEM.
    """
    reason = unsupported_reason(rows_RD, plan)
    if reason:
        raise ValueError(f"unpermute_sum: {reason}")
    (n_rows, n_choices), d, dtype = plan.row_slot_TA.shape, rows_RD.shape[1], rows_RD.dtype
    tile = choose_tile(n_rows, n_choices, d, dtype.itemsize)
    rows_RD = pad_rows(rows_RD)
    padded_d, n_tiles = rows_RD.shape[1], pl.cdiv(n_rows, tile)
    n_parts = min(SPLIT, n_tiles)
    tile_at = partial(tile_of, n_parts=n_parts, n_tiles=n_tiles)
    row_slot_L, column_L = _describe_rows(plan, tile)
    n_read = n_tiles * tile * n_choices
    (y_TD,) = call_over_tiles(
        partial(_sum_kernel, n_parts=n_parts, n_tiles=n_tiles),
        "unpermute_sum",
        (n_parts, pl.cdiv(n_tiles, n_parts)),
        [],
        [
            rows_spec(n_choices * tile, lambda p, i: (tile_at(p, 0), 0, 0)),
            rows_spec(n_choices * tile, lambda p, i: (tile_at(p, i + 1), 0, 0)),
            pl.BlockSpec((1, 2 * n_choices, tile), lambda p, i: (tile_at(p, i), 0, 0)),
            HBM,
        ],
        [
            (
                jax.ShapeDtypeStruct((n_rows, padded_d), dtype),
                pl.BlockSpec((tile, padded_d), lambda p, i: (tile_at(p, i), 0)),
            )
        ],
        [make_slots(n_choices * tile, padded_d, dtype), pltpu.SemaphoreType.DMA((2,))],
        [row_slot_L, row_slot_L, column_L, rows_RD],
        (n_read * padded_d, 0, n_read * padded_d * 4 + n_rows * padded_d * dtype.itemsize),
        interpret,
    )
    return y_TD[:, :d]
