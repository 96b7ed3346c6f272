"""Attention as Pallas kernels for TPUs (Mosaic), after FlashAttention-2 (Dao 2023): forward, and backward in two.

The backward pass computes weights from the saved log-sum-exp, once for the gradients of queries and biases, which add
up over blocks of keys, and once for those of keys and values, which add up over blocks of queries: nothing is written
before it is a whole sum. Slots lie on the lanes, see `tpu_kernels`. A grid is (sequence, key head, block, step); steps
without a visible pair fetch and compute nothing. All sums are in float32.

Letters as in `operands`, and P slots padded to whole blocks.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_kernels
from pallas_kernels.attention.buckets import NO_TIME, list_starts
from pallas_kernels.attention.operands import (
    BEHIND,
    Gradients,
    Operands,
    count_most_blocks,
    find_block_bounds,
    pad_slots,
)
from pallas_kernels.cost import count_moved_bytes
from pallas_kernels.varying import vary, varying_axes

LANES = 128
BLOCKS = (256, 128)  # slots of a block, the first that fits; with 512 compiling takes three times as long
VMEM_LIMIT = 56 << 20  # bytes; a core of v5p and v7x has 64 MiB, of v5e and v6e 128
VMEM_BUDGET = 42 << 20  # of them what we count ourselves; the compiler's own temporaries take the rest
N_METADATA = 8  # rows of a slot's metadata: a tile is 8 high
_SMEM = pl.BlockSpec(memory_space=pltpu.SMEM)


def _count_vmem(q_shape: tuple[int, ...], n_heads: int, width: int, block: int) -> int:
    """Bytes of a backward step's blocks, twice each, of its sums and of about ten arrays of pairs."""
    _, _, n, h = q_shape
    per_key = n // n_heads
    return block * (per_key * h * (6 * width + 4) + h * (8 * width + 8) + per_key * 4 * 96) + 10 * 4 * block**2


def choose_block(operands: Operands) -> int:
    """The largest block whose kernels fit, no larger than the slots ask for; 0 if none does."""
    q_BTNH = operands.q_BTNH
    most = pl.cdiv(q_BTNH.shape[1], LANES) * LANES
    count = partial(_count_vmem, q_BTNH.shape, operands.k_BTKH.shape[2], q_BTNH.dtype.itemsize)
    return next((min(block, most) for block in BLOCKS if count(min(block, most)) <= VMEM_BUDGET), 0)


def unsupported_reason(operands: Operands, block: int | None, interpret: Any = False) -> str:
    """Why the kernels cannot take these operands, or nothing."""
    dtype, h = operands.q_BTNH.dtype, operands.q_BTNH.shape[-1]
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries of {dtype}; the TPU's kernels take float32 and bfloat16"
    if not interpret and h % (32 // dtype.itemsize):
        return f"heads of {h}; with {dtype} a TPU wants multiples of {32 // dtype.itemsize}"
    if not interpret and block is not None and block % LANES:
        return f"blocks of {block} slots; a TPU wants multiples of {LANES}"
    fits = choose_block(operands)
    if not fits or (block or 0) > max(fits, LANES):
        return f"blocks of {block or LANES} slots do not fit a TPU's VMEM"
    return ""


class _Layout(NamedTuple):
    """The grid, and how many sequences, key heads, query heads of one, widths, slots there are."""

    b: int
    n_heads: int
    per_key: int
    h: int
    block: int
    n_blocks: int
    n_steps: int
    n_slots: int

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return self.b, self.n_heads, self.n_blocks, self.n_steps

    def split(self, x_BTN: jax.Array, fill: float = 0) -> jax.Array:
        """`[B, T, N, …]` to `[B, K, Q, …, P]`, or `[B, T, K, …]` to that with Q = 1."""
        x = jnp.moveaxis(pad_slots(x_BTN, self.block, fill), 1, -1)
        return x.reshape(self.b, self.n_heads, -1, *x.shape[2:])

    def join(self, x_BKQP: jax.Array) -> jax.Array:
        """The way back."""
        x = x_BKQP.reshape(self.b, -1, *x_BKQP.shape[3:])
        return jnp.moveaxis(x, -1, 1)[:, : self.n_slots]


def _lay_out(operands: Operands, window: int | None, block: int | None, interpret) -> _Layout:
    reason = unsupported_reason(operands, block, interpret)
    if reason:
        raise ValueError(f"attend: {reason}")
    (b, t, n, h), n_heads = operands.q_BTNH.shape, operands.k_BTKH.shape[2]
    block = block or choose_block(operands)
    n_blocks = pl.cdiv(t, block)
    return _Layout(b, n_heads, n // n_heads, h, block, n_blocks, count_most_blocks(n_blocks, block, window), t)


# An index map here takes the grid's step and `block_bounds`, and says which block of slots a step wants. The estimate
# of cost asks with numpy's arrays and must have no device do it: under a mesh of TPUs that are not here none could.
def _module_of(i):
    return np if isinstance(i, np.ndarray) else jnp


def _own(b, k, i, s, block_bounds):
    return i


def _back(b, k, i, s, block_bounds):
    """Of keys, for queries i: from their own block back to the first that they see, and then that again."""
    return _module_of(i).maximum(i - s, block_bounds[b, i])


def _ahead(b, k, j, s, block_bounds):
    """Of queries, for keys j: from their own block ahead to the last that sees them, and then that again."""
    return _module_of(j).minimum(j + s, block_bounds[b, j])


def _over_slots(shape: tuple[int, ...], block: int, find_block: Callable, by_head: bool = True) -> pl.BlockSpec:
    """Spec of an array `[B, K, …, P]` (or `[B, …, P]`): the step's sequence and head, and a block of slots."""
    n_own = 2 if by_head else 1
    rest = len(shape) - n_own - 1

    def index(b, k, i, s, block_bounds, *others):
        return *(b, k)[:n_own], *[0] * rest, find_block(b, k, i, s, block_bounds)

    return pl.BlockSpec((*[1] * n_own, *shape[n_own:-1], block), index)


Named = Mapping[str, tuple[Any, pl.BlockSpec]]


def _call(
    kernel: Callable,
    name: str,
    layout: _Layout,
    scalars: Mapping[str, jax.Array],
    inputs: Named,
    outputs: Named,
    scratch: Mapping[str, tuple[int, ...]],
    n_products: int,
    n_parallel: int,
    interpret: Any,
) -> list[jax.Array]:
    """A `pallas_call` of a kernel that gets its arrays by name.

    Args:
      scalars: what is prefetched, `block_bounds` first.
      inputs, outputs: name -> array (or shape of the result) and spec.
      scratch: name -> shape, of float32.
      n_products: matmuls of a pair of blocks.
      n_parallel: how many axes of the grid may run in any order.
    """
    names = (*scalars, *inputs, *outputs, *scratch)
    operands = (*scalars.values(), *(x for x, _ in inputs.values()))
    axes = varying_axes(*operands)
    varies = jax.sharding.ManualAxisType(varying=axes)
    return pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=layout.grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varies) for x, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[pltpu.PARALLEL] * n_parallel + [pltpu.ARBITRARY] * (4 - n_parallel),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=_estimate(layout, inputs, outputs, n_products, "bwd_dkv" in name),
        interpret=interpret,
        name=name,
    )(*(vary(x, axes) for x in operands))


def _estimate(layout: _Layout, inputs: Named, outputs: Named, n_products: int, ahead: bool) -> pl.CostEstimate:
    """Cost if a sequence were one segment: what packing leaves out is known only when the program runs."""
    n = layout.n_blocks
    block_bounds = np.full((1, n), n - 1 if ahead else 0)
    arrays, specs = zip(*inputs.values(), *outputs.values(), strict=True)

    def at_bounds(spec):
        if spec.block_shape is None:
            return spec
        return pl.BlockSpec(spec.block_shape, lambda *step: spec.index_map(*step, block_bounds))

    # Every sequence and key head moves the same: counted for one. Tables in SMEM are moved once, and small.
    n_bytes = count_moved_bytes((1, 1, *layout.grid[2:]), [at_bounds(spec) for spec in specs], arrays)
    n_pairs = sum(min(i + 1, layout.n_steps) for i in range(n)) * layout.block**2
    n_rows = layout.b * layout.n_heads
    return pl.CostEstimate(
        flops=2 * n_products * n_pairs * layout.h * layout.per_key * n_rows,
        transcendentals=n_pairs * layout.per_key * n_rows,
        bytes_accessed=n_bytes * n_rows,
    )


def _find_times(time_BT: jax.Array, block: int) -> dict[str, jax.Array]:
    """int32 `[B, I]` least and most known time of each block; 0 where none is."""
    time_BIU = pad_slots(time_BT, block, NO_TIME).reshape(time_BT.shape[0], -1, block)
    info, known = jnp.iinfo(jnp.int32), time_BIU != NO_TIME
    least = jnp.min(jnp.where(known, time_BIU, info.max), axis=2)
    most = jnp.max(time_BIU, axis=2)
    any_BI = jnp.any(known, axis=2)
    return {"least_time": jnp.where(any_BI, least, 0), "most_time": jnp.where(any_BI, most, 0)}


def _prepare(operands: Operands, layout: _Layout, of_queries: Callable, of_keys: Callable, block_bounds_BI: jax.Array):
    """Scalars and inputs that every kernel gets, and a function that adds more of them."""
    q_BTNH, k_BTKH, v_BTKH, segment_BT, time_BT, time_bias_NJ, group_BT, group_bias_BTNG = operands
    zeros_BT = jnp.zeros_like(segment_BT)
    slot_metadata = (segment_BT, zeros_BT if time_BT is None else time_BT, zeros_BT if group_BT is None else group_BT)
    slot_metadata_BFT = jnp.stack([*slot_metadata, *[zeros_BT] * (N_METADATA - len(slot_metadata))], axis=1)
    slot_metadata_BFP = pad_slots(slot_metadata_BFT.swapaxes(1, 2), layout.block).swapaxes(1, 2)

    def spread(x, find_block, by_head=True):
        return x, _over_slots(x.shape, layout.block, find_block, by_head)

    scalars = {"block_bounds": block_bounds_BI}
    inputs = {
        "q": spread(layout.split(q_BTNH), of_queries),
        "k": spread(layout.split(k_BTKH)[:, :, 0], of_keys),
        "v": spread(layout.split(v_BTKH)[:, :, 0], of_keys),
        "query_metadata": spread(slot_metadata_BFP, of_queries, False),
        "key_metadata": spread(slot_metadata_BFP, of_keys, False),
    }
    if group_bias_BTNG is not None:
        inputs["group_bias"] = spread(layout.split(group_bias_BTNG.astype(jnp.float32)), of_queries)
    if time_BT is not None and time_bias_NJ is not None:
        starts = jnp.array(list_starts(time_bias_NJ.shape[1]), jnp.int32)
        scalars |= {"starts": starts, **_find_times(time_BT, layout.block)}
        inputs["time_bias"] = time_bias_NJ.astype(jnp.float32), _SMEM
    return scalars, inputs, spread


def forward(operands: Operands, window: int | None, block: int | None, interpret: Any = False):
    """Output and log-sum-exp, as `attend`.

    Args:
      block: slots of a block, a multiple of 128.
      interpret: as in `pl.pallas_call`.

    Raises:
      ValueError: types, heads or blocks that a TPU cannot take.
    """
    layout = _lay_out(operands, window, block, interpret)
    per_key, h, u = layout.per_key, layout.h, layout.block
    block_bounds_BI, _ = find_block_bounds(pad_slots(operands.segment_BT, u), u, window)
    scalars, inputs, spread = _prepare(operands, layout, _own, _back, block_bounds_BI)
    q = inputs["q"][0]
    out, lse = _call(
        partial(tpu_kernels.forward, window=window),
        "attention_forward",
        layout,
        scalars,
        inputs,
        {
            "out": spread(jax.ShapeDtypeStruct(q.shape, q.dtype), _own),
            "lse_out": spread(jax.ShapeDtypeStruct((*q.shape[:3], q.shape[4]), jnp.float32), _own),
        },
        {"top": (per_key, 1, u), "total": (per_key, 1, u), "sums": (per_key, h, u)},
        n_products=2,
        n_parallel=3,
        interpret=interpret,
    )
    return layout.join(out), layout.join(lse)


def backward(
    operands: Operands,
    out_BTNH,
    lse_BTN,
    d_out_BTNH,
    d_lse_BTN,
    window: int | None,
    block: int | None,
    interpret: Any = False,
) -> Gradients:
    """Gradients of the operands from what forward gave and the cotangents of it; other arguments as of `forward`."""
    layout = _lay_out(operands, window, block, interpret)
    per_key, h, u = layout.per_key, layout.h, layout.block
    # Of d_logit = weight (d_weight - delta + d_lse) what does not depend on the key.
    delta_BTN = jnp.sum(d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1) - d_lse_BTN
    saved = {
        "d_out": layout.split(d_out_BTNH.astype(operands.q_BTNH.dtype)),
        "lse": layout.split(lse_BTN, BEHIND),
        "delta": layout.split(delta_BTN),
    }
    first_BI, last_BC = find_block_bounds(pad_slots(operands.segment_BT, u), u, window)

    scalars, inputs, spread = _prepare(operands, layout, _own, _back, first_BI)
    inputs |= {name: spread(x, _own) for name, x in saved.items()}
    q, k = inputs["q"][0], inputs["k"][0]
    outputs = {"dq": spread(jax.ShapeDtypeStruct(q.shape, q.dtype), _own)}
    scratch: dict[str, tuple[int, ...]] = {"dq_sum": (per_key, h, u)}
    if "group_bias" in inputs:
        group_bias = inputs["group_bias"][0]
        outputs["d_group_bias"] = spread(jax.ShapeDtypeStruct(group_bias.shape, jnp.float32), _own)
        scratch["d_group_sum"] = (per_key, group_bias.shape[3], u)
    if "time_bias" in inputs:
        n_buckets = inputs["time_bias"][0].shape[1]
        shape = jax.ShapeDtypeStruct((layout.b, layout.n_heads, per_key, n_buckets, 1), jnp.float32)
        outputs["d_time_bias"] = (
            shape,
            pl.BlockSpec((1, 1, per_key, n_buckets, 1), lambda b, k, i, s, *_: (b, k, 0, 0, 0)),
        )
        scratch["d_time_sum"] = (per_key, n_buckets, u)
    results = _call(
        partial(tpu_kernels.bwd_dq, window=window),
        "attention_bwd_dq",
        layout,
        scalars,
        inputs,
        outputs,
        scratch,
        n_products=3,
        n_parallel=2,
        interpret=interpret,
    )
    pulled = dict(zip(outputs, results, strict=True))

    scalars, inputs, spread = _prepare(operands, layout, _ahead, _own, last_BC)
    inputs |= {name: spread(x, _ahead) for name, x in saved.items()}
    shape = jax.ShapeDtypeStruct(k.shape, k.dtype)
    dk, dv = _call(
        partial(tpu_kernels.bwd_dkv, window=window),
        "attention_bwd_dkv",
        layout,
        scalars,
        inputs,
        {"dk": spread(shape, _own), "dv": spread(shape, _own)},
        {"dk_sum": (h, u), "dv_sum": (h, u)},
        n_products=4,
        n_parallel=3,
        interpret=interpret,
    )
    d_group, d_time = pulled.get("d_group_bias"), pulled.get("d_time_bias")
    return Gradients(
        layout.join(pulled["dq"]),
        layout.join(dk[:, :, None]),
        layout.join(dv[:, :, None]),
        None if d_time is None else jnp.sum(d_time, axis=0).reshape(math.prod(d_time.shape[1:3]), -1),
        None if d_group is None else layout.join(d_group),
    ).cast(operands)
