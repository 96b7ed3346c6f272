"""Blocks of queries against blocks of keys in plain XLA: the CPU's path, in memory linear in T.

Forward with a running softmax (Milakov and Gimelshein 2018; Rabe and Staats 2021), backward from the saved log-sum-exp
with every block's weights computed anew (Dao et al. 2022, Dao 2023). Blocks without a visible pair are never visited.

The bias by group is folded into the matmul: a query gets G more columns, its biases, a key its group as a one-hot. All
arrays are float32: a CPU is no faster with bfloat16. Other backends round products as their default precision says.

Letters as in `operands`, and S keys of a block, W = H + G columns, Y = Q U queries of one key head in a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.buckets import find_bucket, list_starts, order_gap
from pallas_kernels.attention.operands import BEHIND, NEVER, Gradients, Operands, find_block_bounds, pad_slots
from pallas_kernels.varying import zeros_like_all

BLOCK = 128  # slots


class _Cut(NamedTuple):
    """The operands by blocks, which come first so that one of them is one piece of memory."""

    q_IBKQUW: jax.Array
    k_CBKSW: jax.Array
    v_CBKSH: jax.Array
    segment_IBU: jax.Array
    time_IBU: jax.Array | None


def _cut(x: jax.Array, block: int, n_heads: int | None = None) -> jax.Array:
    """`[B, T, N, …]` to `[I, B, K, Q, U, …]`, or without `n_heads` (K) `[B, T, …]` to `[I, B, U, …]`."""
    b, t, *rest = x.shape
    x = x.reshape(b, t // block, block, *rest).swapaxes(0, 1)
    if n_heads is None:
        return x
    x = x.reshape(*x.shape[:3], n_heads, rest[0] // n_heads, *rest[1:])
    return jnp.moveaxis(x, 2, 4)


def _join(x_IBKQU: jax.Array, n_slots: int) -> jax.Array:
    """`[I, B, K, Q, U, …]` to `[B, T, N, …]`."""
    i, b, heads, per_key, block, *rest = x_IBKQU.shape
    x = jnp.moveaxis(x_IBKQU, 4, 2).swapaxes(0, 1)
    return x.reshape(b, i * block, heads * per_key, *rest)[:, :n_slots]


def _prepare(operands: Operands, block: int) -> _Cut:
    q_BTNH, k_BTKH, v_BTKH, segment_BT, time_BT, _, group_BT, group_bias_BTNG = operands
    heads = k_BTKH.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKH))
    q *= q.shape[-1] ** -0.5
    if group_BT is not None and group_bias_BTNG is not None:
        group_BTG = jax.nn.one_hot(group_BT, group_bias_BTNG.shape[3], dtype=jnp.float32)
        group_BTKG = jnp.broadcast_to(group_BTG[:, :, None], (*k.shape[:3], group_BTG.shape[2]))
        q = jnp.concatenate([q, group_bias_BTNG.astype(jnp.float32)], axis=-1)
        k = jnp.concatenate([k, group_BTKG], axis=-1)
    return _Cut(
        _cut(pad_slots(q, block), block, heads),
        _cut(pad_slots(k, block), block, heads)[:, :, :, 0],
        _cut(pad_slots(v, block), block, heads)[:, :, :, 0],
        _cut(pad_slots(segment_BT, block), block),
        None if time_BT is None else _cut(pad_slots(time_BT, block), block),
    )


def _at(x: jax.Array, i) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _find_time_bias(time_IBU: jax.Array, time_bias_NJ: jax.Array, i, j) -> jax.Array:
    """float32 `[B, N, U, S]` by one choice after the other: a CPU does eight at a time so, and a gather one."""
    gap_BUS = order_gap(_at(time_IBU, j)[:, None, :], _at(time_IBU, i)[:, :, None])
    bias_JN = time_bias_NJ.astype(jnp.float32).T[..., None, None]
    bias = jnp.broadcast_to(bias_JN[0], (gap_BUS.shape[0], *bias_JN.shape[1:2], *gap_BUS.shape[1:]))
    for start, own in zip(list_starts(len(bias_JN))[1:], bias_JN[1:], strict=True):
        bias = jnp.where(gap_BUS[:, None] >= start, own, bias)
    return bias


def _pull_time_bias(time_IBU: jax.Array, d_logit_BNUS: jax.Array, n_buckets: int, i, j, batched: bool) -> jax.Array:
    """Gradient `[N, J]` of the table, from that of the logits: exactly zero where no pair is in the bucket."""
    b, n, block, _ = d_logit_BNUS.shape
    early_BS, late_BU = _at(time_IBU, j), _at(time_IBU, i)
    if batched:
        bucket_BUS = find_bucket(early_BS[:, None, :], late_BU[:, :, None], n_buckets)
        return jnp.einsum("BNUS,BUSJ->NJ", d_logit_BNUS, jax.nn.one_hot(bucket_BUS, n_buckets))
    # Row by row of a loop, or else XLA computes all buckets anew for each element that is added.
    rows = 2 - block % 2
    late = late_BU.reshape(b, rows, block // rows).swapaxes(0, 1)
    bucket = jax.lax.map(lambda t: find_bucket(early_BS[:, None, :], t[:, :, None], n_buckets), late)
    flat_bucket = bucket.swapaxes(0, 1).reshape(-1)
    empty = zeros_like_all((n_buckets, n), jnp.float32, d_logit_BNUS)
    return empty.at[flat_bucket].add(d_logit_BNUS.swapaxes(0, 1).reshape(n, -1).T).T


def _find_logits(cut: _Cut, time_bias_NJ: jax.Array | None, window: int | None, i, j):
    """Logits `[B, K, Q, U, S]` of block i of queries with block j of keys."""
    q, k = _at(cut.q_IBKQUW, i), _at(cut.k_CBKSW, j)
    b, heads, per_key, block, width = q.shape
    logit = jnp.einsum("BKYW,BKSW->BKYS", q.reshape(b, heads, per_key * block, width), k).reshape(
        b, heads, per_key, block, block
    )
    if cut.time_IBU is not None and time_bias_NJ is not None:
        logit += _find_time_bias(cut.time_IBU, time_bias_NJ, i, j).reshape(logit.shape)
    slot = jnp.arange(block, dtype=jnp.int32)
    ago_US = (i - j) * block + slot[:, None] - slot[None, :]
    visible_BUS = (_at(cut.segment_IBU, i)[:, :, None] == _at(cut.segment_IBU, j)[:, None, :]) & (ago_US >= 0)
    if window is not None:
        visible_BUS &= ago_US < window
    return jnp.where(visible_BUS[:, None, None], logit, NEVER)


def _forward(operands: Operands, window: int | None, block: int):
    cut, time_bias_NJ = _prepare(operands, block), operands.time_bias_NJ
    first_BI, _ = find_block_bounds(pad_slots(operands.segment_BT, block), block, window)
    first_I = jnp.min(first_BI, axis=0)
    n_blocks, b, heads, per_key, _, _ = cut.q_IBKQUW.shape
    h = cut.v_CBKSH.shape[-1]
    none = zeros_like_all((b, heads, per_key, block), jnp.float32, cut.q_IBKQUW)
    # Of a block of queries: greatest logit, sum of the weights, sum of the weighted values.
    empty = none + NEVER, none, zeros_like_all((b, heads, per_key * block, h), jnp.float32, cut.q_IBKQUW)

    def attend_block(i):
        def see(step, state):
            top, total, out = state
            j = i - step  # its own block first: there every slot sees itself, and `top` is a logit from then on
            logit = _find_logits(cut, time_bias_NJ, window, i, j)
            new_top = jnp.maximum(top, jnp.max(logit, axis=-1))
            weight = jnp.exp(logit - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            flat = weight.reshape(b, heads, per_key * block, block)
            out = out * shrink.reshape(b, heads, -1, 1) + jnp.einsum("BKYS,BKSH->BKYH", flat, _at(cut.v_CBKSH, j))
            return new_top, total * shrink + jnp.sum(weight, axis=-1), out

        top, total, out = jax.lax.fori_loop(0, i - first_I[i] + 1, see, empty)
        return out.reshape(b, heads, per_key, block, h) / total[..., None], top + jnp.log(total)

    out, lse = jax.lax.map(attend_block, jnp.arange(n_blocks, dtype=jnp.int32))
    n_slots = operands.q_BTNH.shape[1]
    return _join(out, n_slots).astype(operands.q_BTNH.dtype), _join(lse, n_slots)


def _backward(
    operands: Operands, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN, window: int | None, block: int, batched: bool
):
    cut, time_bias_NJ = _prepare(operands, block), operands.time_bias_NJ
    _, last_BC = find_block_bounds(pad_slots(operands.segment_BT, block), block, window)
    last_C = jnp.max(last_BC, axis=0)
    n_blocks, b, heads, per_key, _, width = cut.q_IBKQUW.shape
    n_slots, h = operands.q_BTNH.shape[1], cut.v_CBKSH.shape[-1]
    d_out_BTNH = d_out_BTNH.astype(jnp.float32)
    # Of d_logit = weight (d_weight - delta + d_lse) what does not depend on the key.
    delta_BTN = jnp.sum(d_out_BTNH * out_BTNH.astype(jnp.float32), axis=-1) - d_lse_BTN
    d_out_IBKQUH, delta_IBKQU = (_cut(pad_slots(x, block), block, heads) for x in (d_out_BTNH, delta_BTN))
    lse_IBKQU = _cut(pad_slots(lse_BTN, block, BEHIND), block, heads)

    def pull_block(carry, j):
        def see(i, state):
            dk, dv, (dq_IBKQUW, d_bias_NJ) = state
            logit = _find_logits(cut, time_bias_NJ, window, i, j)
            weight = jnp.exp(logit - _at(lse_IBKQU, i)[..., None])
            d_out = _at(d_out_IBKQUH, i).reshape(b, heads, per_key * block, h)
            d_weight = jnp.einsum("BKYH,BKSH->BKYS", d_out, _at(cut.v_CBKSH, j)).reshape(weight.shape)
            d_logit = weight * (d_weight - _at(delta_IBKQU, i)[..., None])
            weight, flat = (x.reshape(b, heads, per_key * block, block) for x in (weight, d_logit))
            q = _at(cut.q_IBKQUW, i).reshape(b, heads, per_key * block, width)
            dq = jnp.einsum("BKYS,BKSW->BKYW", flat, _at(cut.k_CBKSW, j)).reshape(b, heads, per_key, block, width)
            dq_IBKQUW = jax.lax.dynamic_update_index_in_dim(dq_IBKQUW, _at(dq_IBKQUW, i) + dq, i, 0)
            if cut.time_IBU is not None and d_bias_NJ is not None:
                d_logit_BNUS, n_buckets = d_logit.reshape(b, heads * per_key, block, block), d_bias_NJ.shape[1]
                d_bias_NJ += _pull_time_bias(cut.time_IBU, d_logit_BNUS, n_buckets, i, j, batched)
            dk += jnp.einsum("BKYS,BKYW->BKSW", flat, q)
            dv += jnp.einsum("BKYS,BKYH->BKSH", weight, d_out)
            return dk, dv, (dq_IBKQUW, d_bias_NJ)

        empty = zeros((b, heads, block, width)), zeros((b, heads, block, h)), carry
        dk, dv, carry = jax.lax.fori_loop(j, last_C[j] + 1, see, empty)
        return carry, (dk, dv)

    def zeros(shape):
        return zeros_like_all(shape, jnp.float32, cut.q_IBKQUW)

    carry = zeros(cut.q_IBKQUW.shape), None if time_bias_NJ is None else zeros(time_bias_NJ.shape)
    (dq, d_bias_NJ), (dk, dv) = jax.lax.scan(pull_block, carry, jnp.arange(n_blocks, dtype=jnp.int32))
    dq_BTNW = _join(dq, n_slots)
    return Gradients(
        dq_BTNW[..., :h] * h**-0.5,
        _join(dk[:, :, :, None], n_slots)[..., :h],
        _join(dv[:, :, :, None], n_slots),
        d_bias_NJ,
        None if operands.group_bias_BTNG is None else dq_BTNW[..., h:],
    ).cast(operands)


def _map_rows(function: Callable, operands: Operands, *others: jax.Array):
    """`function(operands, *others)` for one sequence after the other, along the first axis; results are stacked."""
    shared = operands.time_bias_NJ

    def one(row):
        own, *rest = jax.tree.map(lambda x: x[None], row)
        return jax.tree.map(lambda x: x[0], function(own._replace(time_bias_NJ=shared), *rest))

    return jax.lax.map(one, (operands._replace(time_bias_NJ=None), *others))


def forward(operands: Operands, window: int | None, block: int | None, batched: bool = False):
    """Output and log-sum-exp, as `attend`.

    Args:
      block: slots of a block.
      batched: all sequences in one loop, as an accelerator wants it; else one after the other, each with just the
        blocks that it can see.
    """
    block = min(block or BLOCK, operands.q_BTNH.shape[1])
    if batched or operands.q_BTNH.shape[0] == 1:
        return _forward(operands, window, block)
    return _map_rows(lambda own: _forward(own, window, block), operands)


def backward(
    operands: Operands, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN, window: int | None, block: int | None, batched=False
) -> Gradients:
    """Gradients of the operands from what forward gave and the cotangents of it; other arguments as of `forward`."""
    block = min(block or BLOCK, operands.q_BTNH.shape[1])
    others = out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN
    if batched or operands.q_BTNH.shape[0] == 1:
        return _backward(operands, *others, window, block, batched)

    def pull(own, out, lse, d_out, d_lse):
        gradients = _backward(own, out, lse, d_out, d_lse, window, block, batched)
        # Of the shared table each sequence has a gradient of its own.
        return gradients._replace(time_bias_NJ=jax.tree.map(lambda x: x[None], gradients.time_bias_NJ))

    gradients = _map_rows(pull, operands, *others)
    return gradients._replace(time_bias_NJ=jax.tree.map(lambda x: jnp.sum(x, axis=0), gradients.time_bias_NJ))
