"""The experts as Pallas kernels for TPUs (Mosaic): rows come from HBM by DMA, so nothing writes `[R, D]` of them first.

Forward, over tiles and blocks of the experts' width: a tile's rows, both products, SwiGLU, the product down, weights.
Backward, three kernels in an order that keeps no more than the products and one `[R, D]` in memory:

- the gradient of the matrices down, from the products and the rows' cotangents;
- the gradients of the tiles' rows and weights, and of the products, which are written in place of those;
- the gradients of the matrices gate and up, from those and the rows.

Gradients of matrices add up in VMEM while tiles of the same expert follow each other. All sums are in float32.

Letters as in `pallas_kernels`: T rows, R row slots, L tiles, E experts, D model width, F expert width, V visits (tiles,
and one for each expert that has none).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    pad_to_lanes,
    read_rows,
    rows_spec,
    share,
    tile_of,
    to_column,
    to_row,
)

_PLAIN = (((1,), (0,)), ((), ()))  # x y
_ROWS = (((0,), (0,)), ((), ()))  # contracts the rows of both: x^T y
_LAST = (((1,), (1,)), ((), ()))  # contracts the columns of both: x y^T
_dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _swiglu(gate, up):
    """`hidden`, and the slopes of it by gate and by up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, up * (sigmoid * (1 + gate * (1 - sigmoid))), silu


def _block_of(part, i, f, n_parts, n_tiles, n_blocks):
    """Block `f` of the width while there is work, then the last one again."""
    return jnp.where(i < share(part, n_parts, n_tiles)[1], f, n_blocks - 1)


# ---- Kernels


def _forward_kernel(
    expert_ref, n_ref, first_row_ref, next_row_ref, column_ref, x_ref, gate_ref, up_ref, down_ref, *refs, n_parts
):
    del expert_ref  # the index maps have used it
    y_ref, gate_out_ref, up_out_ref, words_ref, rows_ref, total_ref, semaphore_ref = refs
    i, f, n_blocks = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    n_tiles = share(pl.program_id(0), n_parts, n_ref[0])[1]
    dtype = gate_ref.dtype

    @pl.when((i < n_tiles) & (f == 0))
    def begin():
        fetch(i, n_tiles, first_row_ref, next_row_ref, x_ref, words_ref, semaphore_ref)
        rows_ref[...] = read_rows(words_ref.at[jax.lax.rem(i, 2)], column_ref[0, 1:2], dtype)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(i < n_tiles)
    def multiply():
        x = rows_ref[...]
        gate, up = _dot(x, gate_ref[0], _PLAIN), _dot(x, up_ref[0], _PLAIN)
        gate_out_ref[...] = gate.astype(dtype)
        up_out_ref[...] = up.astype(dtype)
        hidden = _swiglu(gate, up)[0].astype(dtype)
        total_ref[...] += _dot(hidden, down_ref[0], _PLAIN)

    @pl.when((i < n_tiles) & (f == n_blocks - 1))
    def finish():
        y_ref[...] = (total_ref[...] * to_column(column_ref[0, 0:1])).astype(y_ref.dtype)


def _rows_kernel(
    expert_ref, n_ref, first_row_ref, next_row_ref, column_ref, g_ref, matrices, products, d_products, *refs, n_parts
):
    del expert_ref
    dx_ref, dweight_ref, words_ref, rows_ref, total_ref, semaphore_ref = refs
    i, f, n_blocks = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    n_tiles = share(pl.program_id(0), n_parts, n_ref[0])[1]
    dtype = rows_ref.dtype

    @pl.when((i < n_tiles) & (f == 0))
    def begin():
        fetch(i, n_tiles, first_row_ref, next_row_ref, g_ref, words_ref, semaphore_ref)
        rows_ref[...] = read_rows(words_ref.at[jax.lax.rem(i, 2)], column_ref[0, 1:2], dtype)
        total_ref[...] = jnp.zeros_like(total_ref)
        dweight_ref[...] = jnp.zeros_like(dweight_ref)

    @pl.when(i < n_tiles)
    def multiply():
        gate_ref, up_ref, down_ref = matrices
        hidden, by_gate, by_up = _swiglu(*(ref[...].astype(jnp.float32) for ref in products))
        dh = _dot(rows_ref[...], down_ref[0], _LAST)
        dweight_ref[0] += to_row(jnp.sum(hidden * dh, axis=1, keepdims=True))
        dh *= to_column(column_ref[0, 0:1])
        d_gate, d_up = (dh * by_gate).astype(dtype), (dh * by_up).astype(dtype)
        d_products[0][...], d_products[1][...] = d_gate, d_up
        total_ref[...] += _dot(d_gate, gate_ref[0], _LAST) + _dot(d_up, up_ref[0], _LAST)

    @pl.when((i < n_tiles) & (f == n_blocks - 1))
    def finish():
        dx_ref[...] = total_ref[...].astype(dx_ref.dtype)


def _matrices_kernel(
    expert_ref,
    tile_ref,
    live_ref,
    n_ref,
    first_row_ref,
    next_row_ref,
    column_ref,
    source_ref,
    a_ref,
    b_ref,
    *refs,
    down,
):
    *outs, words_ref, semaphore_ref = refs
    outs, totals = outs[: len(outs) // 2], outs[len(outs) // 2 :]
    v, n_visits = pl.program_id(1), pl.num_programs(1)
    tile, dtype = tile_ref[v], a_ref.dtype

    @pl.when((v == 0) | (expert_ref[v] != expert_ref[jnp.maximum(v - 1, 0)]))
    def clear():
        for total_ref in totals:
            total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(live_ref[v] > 0)
    def multiply():
        fetch(tile, n_ref[0], first_row_ref, next_row_ref, source_ref, words_ref, semaphore_ref)
        rows = read_rows(words_ref.at[jax.lax.rem(tile, 2)], column_ref[0, 1:2], dtype)
        if down:
            hidden = _swiglu(a_ref[...].astype(jnp.float32), b_ref[...].astype(jnp.float32))[0]
            pairs = [((hidden * to_column(column_ref[0, 0:1])).astype(dtype), rows)]
        else:
            pairs = [(rows, a_ref[...]), (rows, b_ref[...])]
        for total_ref, (a, b) in zip(totals, pairs, strict=True):
            total_ref[...] += _dot(a, b, _ROWS)

    @pl.when((v == n_visits - 1) | (expert_ref[v] != expert_ref[jnp.minimum(v + 1, n_visits - 1)]))
    def finish():
        for out_ref, total_ref in zip(outs, totals, strict=True):
            out_ref[0] = total_ref[...].astype(out_ref.dtype)


# ---- Calls


class _Sizes(NamedTuple):
    """Padded widths, the tile, bytes of a number, and the number of tiles."""

    d: int
    f: int
    tile: int
    width: int
    n_tiles: int

    @property
    def n_parts(self) -> int:
        return min(SPLIT, self.n_tiles)

    def forward_bytes(self, block: int) -> int:
        """VMEM of the forward kernel: matrices, rows and outputs twice, sums and products."""
        rows = self.tile * self.d * (2 * 4 + 3 * self.width + 3 * 4)
        return 6 * self.d * block * self.width + rows + self.tile * block * (4 * self.width + 4 * 4)

    def rows_bytes(self, block: int) -> int:
        """VMEM of the kernel of the rows' gradients: the same, products and their gradients."""
        return self.forward_bytes(block) + self.tile * block * (4 * self.width + 4 * 4)

    def down_bytes(self, block: int) -> int:
        """VMEM of the kernel of the gradient of the matrices down: sums, one product, outputs, rows and products."""
        rows = self.tile * (self.d * (2 * 4 + self.width + 2 * 4) + block * (4 * self.width + 6 * 4))
        return self.d * block * (2 * 4 + 2 * self.width) + rows

    def sides_bytes(self, block: int) -> int:
        """VMEM of the kernel of the gradients of the matrices gate and up."""
        return self.down_bytes(block) + self.d * block * (4 + 2 * self.width)


def choose_block(count_bytes: Callable[[int], int], f: int) -> int:
    """The largest divisor of `f` in whole lanes whose kernel fits, 0 if none does."""
    n = f // LANES
    blocks = (b * LANES for b in range(n, 0, -1) if n % b == 0)
    return next((block for block in blocks if count_bytes(block) <= VMEM_BUDGET), 0)


def unsupported_reason(x_TD: jax.Array, matrices, plan: DispatchPlan, interpret: Any = False) -> str:
    """Why the kernels cannot take these operands, or nothing."""
    if x_TD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows of {x_TD.dtype}; the TPU's kernels take float32 and bfloat16"
    s = _count_sizes(x_TD, matrices, plan)
    if not interpret and plan.tile % (32 // s.width):
        return f"tiles of {plan.tile}; with {x_TD.dtype} a TPU wants multiples of {32 // s.width}"
    if not all(choose_block(count, s.f) for count in (s.forward_bytes, s.down_bytes, s.rows_bytes, s.sides_bytes)):
        return f"tiles of {plan.tile} rows of {s.d} do not fit a TPU's VMEM; take smaller ones"
    return ""


def _count_sizes(x_TD: jax.Array, matrices, plan: DispatchPlan) -> _Sizes:
    d, f = (pl.cdiv(n, LANES) * LANES for n in matrices[0].shape[1:])
    return _Sizes(d, f, plan.tile, x_TD.dtype.itemsize, plan.expert_L.shape[0])


def _prepare(x_TD: jax.Array, matrices, plan: DispatchPlan, interpret) -> tuple[_Sizes, tuple[jax.Array, ...]]:
    """Sizes, and the matrices in the rows' type, padded to whole lanes."""
    reason = unsupported_reason(x_TD, matrices, plan, interpret)
    if reason:
        raise ValueError(f"grouped_ffn: {reason}")
    padded = tuple(pad_to_lanes(m.astype(x_TD.dtype), (1, 2)) for m in matrices)
    return _count_sizes(x_TD, matrices, plan), padded


def _describe_row_slots(weight_R: jax.Array, plan: DispatchPlan) -> tuple[jax.Array, jax.Array]:
    """int32 `[L, 1, tile]` rows, and float32 `[L, 2, tile]`: weights, and whether the row's number is odd."""
    n, tile = plan.expert_L.shape[0], plan.tile
    columns = jnp.stack([weight_R.astype(jnp.float32), (plan.row_R % 2).astype(jnp.float32)])
    return plan.row_R.reshape(n, 1, tile), columns.reshape(2, n, tile).swapaxes(0, 1)


def _visit(plan: DispatchPlan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Expert, tile and whether there is one, of `L + E` visits: an expert's tiles, or one visit without, for its zeros.

    A visit without a tile names the last one before, so that nothing is fetched for it; those behind the last one
    count to the last expert.
    """
    n_experts = plan.size_E.shape[0]
    tiles_E = (plan.size_E + plan.tile - 1) // plan.tile
    visits_E = jnp.maximum(tiles_E, 1)
    end_E = jnp.cumsum(visits_E)
    visit = jnp.arange(plan.expert_L.shape[0] + n_experts, dtype=jnp.int32)
    expert_V = jnp.minimum(jnp.searchsorted(end_E, visit, side="right"), n_experts - 1).astype(jnp.int32)
    within_V = visit - (end_E - visits_E)[expert_V]
    n_V = tiles_E[expert_V]
    tile_V = (jnp.cumsum(tiles_E) - tiles_E)[expert_V] + jnp.minimum(within_V, n_V - 1)
    return expert_V, jnp.maximum(tile_V, 0).astype(jnp.int32), (within_V < n_V).astype(jnp.int32)


class _TileSpecs(NamedTuple):
    """The grid over parts, their tiles and blocks of the width; and specs of what a step sees. See `tile_of`."""

    grid: tuple[int, int, int]
    inputs: list[pl.BlockSpec]  # rows of the first tile and of the next, columns, where rows are, the three matrices
    row: pl.BlockSpec  # of `[R, D]`
    product: pl.BlockSpec  # of `[R, F]`
    weight: pl.BlockSpec  # of `[L, 1, tile]`
    scratch: list[Any]  # two slots of rows as they come, the rows, sums, semaphores


def _make_tile_specs(s: _Sizes, block: int, dtype) -> _TileSpecs:
    grid = (s.n_parts, pl.cdiv(s.n_tiles, s.n_parts), s.f // block)

    def tile_at(p, i, n):
        return tile_of(p, i, s.n_parts, n[0])

    def block_at(p, i, f, n):
        return _block_of(p, i, f, s.n_parts, n[0], grid[2])

    def wide(p, i, f, expert, n):
        return expert[tile_at(p, i, n)], 0, block_at(p, i, f, n)

    def high(p, i, f, expert, n):
        return expert[tile_at(p, i, n)], block_at(p, i, f, n), 0

    return _TileSpecs(
        grid,
        [
            rows_spec(s.tile, lambda p, i, f, expert, n: (tile_at(p, 0, n), 0, 0)),
            rows_spec(s.tile, lambda p, i, f, expert, n: (tile_at(p, i + 1, n), 0, 0)),
            pl.BlockSpec((1, 2, s.tile), lambda p, i, f, expert, n: (tile_at(p, i, n), 0, 0)),
            HBM,
            pl.BlockSpec((1, s.d, block), wide),
            pl.BlockSpec((1, s.d, block), wide),
            pl.BlockSpec((1, block, s.d), high),
        ],
        pl.BlockSpec((s.tile, s.d), lambda p, i, f, expert, n: (tile_at(p, i, n), 0)),
        pl.BlockSpec((s.tile, block), lambda p, i, f, expert, n: (tile_at(p, i, n), block_at(p, i, f, n))),
        pl.BlockSpec((1, 1, s.tile), lambda p, i, f, expert, n: (tile_at(p, i, n), 0, 0)),
        [
            make_slots(s.tile, s.d, dtype),
            pltpu.VMEM((s.tile, s.d), dtype),
            pltpu.VMEM((s.tile, s.d), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )


def _count_cost(s: _Sizes, n_experts: int, n_blocks: int, n_products: int) -> tuple[int, int, int]:
    """Multiplications, transcendentals and bytes of a kernel over tiles with three matrices."""
    n_row_slots = s.n_tiles * s.tile
    # A block that is all of an expert stays for the expert's next tile.
    n_read = s.n_tiles if n_blocks > 1 else n_experts
    n_bytes = n_row_slots * (s.d * (4 + s.width) + n_products * s.f * s.width) + n_read * 3 * s.d * s.f * s.width
    return 6 * n_row_slots * s.d * s.f, n_row_slots * s.f, n_bytes


def forward(x_TD: jax.Array, weight_R: jax.Array, matrices, plan: DispatchPlan, interpret: Any = False):
    """Weighted outputs of all row slots `[R, D]`, and the gate's and up's products `[R, F]`.

    Behind the last used tile they are whatever the memory held: nothing may be computed from those row slots.

    Args:
      x_TD: float32 or bfloat16 rows; matrices are cast to that.
      interpret: as in `pl.pallas_call`.

    Raises:
      ValueError: rows of another type, tiles that a TPU cannot cut, or too large for its VMEM.
    """
    d, f = matrices[0].shape[1:]
    s, padded = _prepare(x_TD, matrices, plan, interpret)
    block, n_row_slots = choose_block(s.forward_bytes, s.f), plan.row_R.shape[0]
    specs = _make_tile_specs(s, block, x_TD.dtype)
    row_L, column_L = _describe_row_slots(weight_R, plan)
    product = jax.ShapeDtypeStruct((n_row_slots, s.f), x_TD.dtype)
    y_RD, gate_RF, up_RF = call_over_tiles(
        partial(_forward_kernel, n_parts=s.n_parts),
        "grouped_ffn_forward",
        specs.grid,
        [plan.expert_L, plan.n_tiles[None]],
        specs.inputs,
        [
            (jax.ShapeDtypeStruct((n_row_slots, s.d), x_TD.dtype), specs.row),
            (product, specs.product),
            (product, specs.product),
        ],
        specs.scratch,
        [row_L, row_L, column_L, pad_rows(x_TD), *padded],
        _count_cost(s, padded[0].shape[0], specs.grid[2], 2),
        interpret,
    )
    return y_RD[:, :d], (gate_RF[:, :f], up_RF[:, :f])


def backward(
    x_TD: jax.Array, weight_R: jax.Array, matrices, plan: DispatchPlan, saved, g_TD: jax.Array, interpret: Any = False
):
    """Gradients of each row slot's row `[R, D]` and weight `[R]` and of the matrices, from the cotangent `g_TD`.

    Behind the last used tile the first two are whatever the memory held. Raises as `forward`.
    """
    d, f = matrices[0].shape[1:]
    s, padded = _prepare(x_TD, matrices, plan, interpret)
    x_TD, g_TD = pad_rows(x_TD), pad_rows(g_TD.astype(x_TD.dtype))
    products = [pad_to_lanes(m, (1,)) for m in saved]
    row_L, column_L = _describe_row_slots(weight_R, plan)
    pull_matrices = partial(_pull_matrices, s, plan, row_L, column_L, interpret)
    (d_down,) = pull_matrices(g_TD, products, True)
    # The next kernel writes over the products, which only an order makes safe without a copy.
    *products, d_down = jax.lax.optimization_barrier((*products, d_down))
    dx_RD, dweight_R, *products = _pull_rows(s, plan, row_L, column_L, interpret, g_TD, padded, products)
    d_gate, d_up = pull_matrices(x_TD, products, False)
    d_gate, d_up, d_down = (g.astype(m.dtype) for g, m in zip((d_gate, d_up, d_down), matrices, strict=True))
    return (
        dx_RD[:, :d],
        dweight_R.astype(weight_R.dtype),
        (d_gate[:, :d, :f], d_up[:, :d, :f], d_down[:, :f, :d]),
    )


def _pull_rows(s: _Sizes, plan: DispatchPlan, row_L, column_L, interpret, g_TD, matrices, products):
    """Gradients of the rows `[R, D]`, the weights `[R]`, and of both products, which take the place of those."""
    block, n_row_slots = choose_block(s.rows_bytes, s.f), plan.row_R.shape[0]
    specs = _make_tile_specs(s, block, g_TD.dtype)
    product = jax.ShapeDtypeStruct((n_row_slots, s.f), g_TD.dtype)
    if not interpret:  # what is written in place must not lie in VMEM, from where the compiler would copy it back
        products = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in products]

    def kernel(*refs):
        head, matrix_refs, product_refs, d_refs, tail = refs[:6], refs[6:9], refs[9:11], refs[11:13], refs[13:]
        _rows_kernel(*head, matrix_refs, product_refs, d_refs, *tail, n_parts=s.n_parts)

    d_gate_RF, d_up_RF, dx_RD, dweight_L = call_over_tiles(
        kernel,
        "grouped_ffn_rows",
        specs.grid,
        [plan.expert_L, plan.n_tiles[None]],
        [*specs.inputs, specs.product, specs.product],
        [
            (product, specs.product),
            (product, specs.product),
            (jax.ShapeDtypeStruct((n_row_slots, s.d), g_TD.dtype), specs.row),
            (jax.ShapeDtypeStruct((s.n_tiles, 1, s.tile), jnp.float32), specs.weight),
        ],
        specs.scratch,
        [row_L, row_L, column_L, g_TD, *matrices, *products],
        _count_cost(s, matrices[0].shape[0], specs.grid[2], 4),
        interpret,
        aliases={9: 0, 10: 1},
    )
    return dx_RD, dweight_L.reshape(-1), d_gate_RF, d_up_RF


def _pull_matrices(s: _Sizes, plan: DispatchPlan, row_L, column_L, interpret, source_TD, products, down: bool):
    """Gradients of the matrices down from cotangents and products, or else of gate and up from rows and gradients."""
    block = choose_block(s.down_bytes if down else s.sides_bytes, s.f)
    visits = _visit(plan)
    n_experts, n_blocks, n_visits, n_matrices = plan.size_E.shape[0], s.f // block, visits[0].shape[0], 2 - down

    def next_tile(f, v, expert, tile, live, n):
        return jnp.minimum(tile[v] + 1, s.n_tiles - 1), 0, 0

    product = pl.BlockSpec((s.tile, block), lambda f, v, expert, tile, live, n: (tile[v], f))
    if down:
        shape, cut, spec = (s.f, s.d), (block, s.d), lambda f, v, expert, tile, live, n: (expert[v], f, 0)
    else:
        shape, cut, spec = (s.d, s.f), (s.d, block), lambda f, v, expert, tile, live, n: (expert[v], 0, f)
    n_row_slots, dtype = plan.row_R.shape[0], source_TD.dtype
    n_bytes = n_row_slots * (4 * s.d * n_blocks + 2 * s.f * s.width) + n_matrices * n_experts * s.d * s.f * s.width
    return call_over_tiles(
        partial(_matrices_kernel, down=down),
        "grouped_ffn_down" if down else "grouped_ffn_sides",
        (n_blocks, n_visits),
        [*visits, plan.n_tiles[None]],
        [
            rows_spec(s.tile, lambda f, v, expert, tile, live, n: (0, 0, 0)),
            rows_spec(s.tile, next_tile),
            pl.BlockSpec((1, 2, s.tile), lambda f, v, expert, tile, live, n: (tile[v], 0, 0)),
            HBM,
            product,
            product,
        ],
        [(jax.ShapeDtypeStruct((n_experts, *shape), dtype), pl.BlockSpec((1, *cut), spec))] * n_matrices,
        [pltpu.VMEM(cut, jnp.float32)] * n_matrices + [make_slots(s.tile, s.d, dtype), pltpu.SemaphoreType.DMA((2,))],
        [row_L, row_L, column_L, source_TD, *products],
        (2 * n_matrices * n_row_slots * s.d * s.f, down * n_row_slots * s.f, n_bytes),
        interpret,
    )
