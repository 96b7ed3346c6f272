"""What TPU kernels share that take rows from HBM by DMA, tile after tile, while they compute the tile before.

Letters as in `pallas_kernels`: T rows, D width of a row, L tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.varying import vary, varying_axes

LANES = 128  # widths are whole multiples
VMEM_LIMIT = 56 << 20  # bytes; a core of v5p and v7x has 64 MiB, of v5e and v6e 128
VMEM_BUDGET = 42 << 20  # of them what kernels count themselves; the compiler's own temporaries take the rest
SPLIT = 2  # parts of the tiles, one for each of the two cores that v5p joins to one device
HBM = pl.BlockSpec(memory_space=pl.ANY)


# ---- Rows by DMA


def _start_rows(row_ref, source_ref, buffer_ref, semaphore):
    """Starts a copy for each row of a tile. `row_ref` `[1, 1, tile]` in SMEM names the rows of `source_ref`."""

    def start(j, _):
        row = row_ref[0, 0, j]
        if source_ref.dtype.itemsize == 2:  # a DMA cannot take one of two rows that share their 32-bit words
            row, words_ref = jax.lax.shift_right_logical(row, 1), source_ref.bitcast(jnp.int32)
        else:
            words_ref = source_ref
        pltpu.make_async_copy(words_ref.at[pl.ds(row, 1)], buffer_ref.at[pl.ds(j, 1)], semaphore).start()
        return _

    jax.lax.fori_loop(0, buffer_ref.shape[0], start, None)


def fetch(i, n_tiles, first_row_ref, next_row_ref, source_ref, words_ref, semaphore_ref):
    """The rows of tile `i` into slot `i % 2` of two; those of the next one start for the other, and go on meanwhile."""
    slot = jax.lax.rem(i, 2)

    @pl.when(i == 0)
    def _():
        _start_rows(first_row_ref, source_ref, words_ref.at[0], semaphore_ref.at[0])

    @pl.when(i + 1 < n_tiles)
    def _():
        _start_rows(next_row_ref, source_ref, words_ref.at[1 - slot], semaphore_ref.at[1 - slot])

    # One wait for as many bytes as the whole slot has, which is what its rows' copies signal together.
    buffer_ref = words_ref.at[slot]
    pltpu.make_async_copy(buffer_ref, buffer_ref, semaphore_ref.at[slot]).wait()


def read_rows(buffer_ref, odd_row, dtype):
    """The rows in a buffer `[tile, D]`: of a pair of bfloat16 rows in 32-bit words, the one that was asked for.

    `odd_row` `[1, tile]` says which rows have odd numbers. `dtype` is what float32 or bfloat16 rows come as.
    """
    words = buffer_ref[...]
    if words.dtype != jnp.int32:
        return words.astype(dtype)
    # The odd row has the upper halves; a bfloat16 in the upper half of a float32 is that number.
    words = jnp.where(to_column(odd_row) > 0, words & -65536, words << 16)
    return jax.lax.bitcast_convert_type(words, jnp.float32).astype(dtype)


def _diagonal(n):
    shape = (n, n)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) == jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def to_column(row):
    """`[1, n]` to `[n, 1]`, exactly: one term of each sum is not zero."""
    return jnp.sum(jnp.where(_diagonal(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def to_row(column):
    """`[n, 1]` to `[1, n]`."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)


# ---- Which tile a step of the grid is about


def share(part, n_parts, n_tiles):
    """First tile of a part, and how many it has: parts are equal but for the last."""
    most = jnp.maximum(jax.lax.div(n_tiles + n_parts - 1, n_parts), 1)
    return part * most, jnp.clip(n_tiles - part * most, 0, most)


def tile_of(part, i, n_parts, n_tiles):
    """Step `i` of a part; behind its last one that again, so that nothing is fetched and nothing written twice.

    A part without tiles stays on an unused one: no two parts may write to the same place.
    """
    first, n = share(part, n_parts, n_tiles)
    return first + jnp.clip(i, 0, jnp.maximum(n - 1, 0))


# ---- Operands and calls


def pad_to_lanes(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Zeros behind, along the axes, up to whole lanes."""
    pads = [(0, -n % LANES if axis in axes else 0) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, pads) if any(spare for _, spare in pads) else x


def pad_rows(rows_TD: jax.Array) -> jax.Array:
    """Whole lanes, and an even number of rows: bfloat16 ones are read in pairs."""
    rows_TD = pad_to_lanes(rows_TD, (1,))
    return jnp.pad(rows_TD, ((0, 1), (0, 0))) if rows_TD.shape[0] % 2 and rows_TD.dtype.itemsize == 2 else rows_TD


def make_slots(n_rows: int, d: int, dtype) -> Any:
    """VMEM for two tiles of rows as they come: bfloat16 ones as words of pairs."""
    return pltpu.VMEM((2, n_rows, d), jnp.int32 if jnp.dtype(dtype).itemsize == 2 else dtype)


def call_over_tiles(kernel, name, grid, scalars, in_specs, results, scratch, operands, cost, interpret, aliases=None):
    """A `pallas_call` that says over which axes of a mesh its results vary.

    Args:
      scalars: what is prefetched for the index maps.
      results: pairs of shape and spec.
      cost: multiplications and additions, transcendentals, bytes.
      aliases: number of the operand (scalars counted) -> of the result that is written in its place.
    """
    axes = varying_axes(*scalars, *operands)
    varies = jax.sharding.ManualAxisType(varying=axes)
    flops, transcendentals, n_bytes = cost
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=in_specs,
            out_specs=[spec for _, spec in results],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=varies) for s, _ in results],
        input_output_aliases=aliases or {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[pltpu.PARALLEL, *[pltpu.ARBITRARY] * (len(grid) - 1)], vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=n_bytes),
        interpret=interpret,
        name=name,
    )(*(vary(x, axes) for x in (*scalars, *operands)))


def rows_spec(tile, index) -> pl.BlockSpec:
    """Of int32 `[L, 1, tile]`: the numbers of a tile's rows, in SMEM."""
    return pl.BlockSpec((1, 1, tile), index, memory_space=pltpu.SMEM)
