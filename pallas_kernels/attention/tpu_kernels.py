"""Bodies of the TPU's attention kernels. Slots lie on the lanes: logits are `[S, U]`, a key a row, a query a column.

So what belongs to a query (log-sum-exp, greatest logit, bias of a group) is a row, which costs nothing to spread over
the keys, and heads narrower than 128 waste no lanes. What belongs to a key comes as a row too, turned once a step.

A kernel gets its arrays by name. Of a block of sequence b and key head k:

- `q`, `d_out` `[1, 1, Q, H, U]`; `k`, `v` `[1, 1, H, S]`; `lse`, `delta` `[1, 1, Q, U]`; `group_bias`
  `[1, 1, Q, G, U]`;
- `query_metadata`, `key_metadata` int32 `[1, 8, U or S]`: rows of segment, time and group;
- in SMEM: `block_bounds` `[B, I]`, the last step's block; `time_bias` `[N, J]`; `starts` `[J]` of the buckets;
  `least_time`, `most_time` `[B, I]`, of the known times of each block.

Letters as in `operands`, and U queries, S keys of a block.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.buckets import order_gap
from pallas_kernels.attention.operands import NEVER

SEGMENT, TIME, GROUP = range(3)  # rows of a slot's metadata
_PLAIN = (((1,), (0,)), ((), ()))  # x y
_ROWS = (((0,), (0,)), ((), ()))  # contracts the rows of both: x^T y
_LAST = (((1,), (1,)), ((), ()))  # contracts the columns of both: x y^T
_dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_sum_keys = partial(jnp.sum, axis=0, keepdims=True)
Refs = Mapping[str, Any]


class _Step(NamedTuple):
    """Where the grid is; to be asked for outside `pl.when` only."""

    sequence: Any
    head: Any  # of keys
    block: Any
    number: Any
    is_first: Any
    is_last: Any


def _ask_step() -> _Step:
    sequence, head, block, number = (pl.program_id(axis) for axis in range(4))
    return _Step(sequence, head, block, number, number == 0, number == pl.num_programs(3) - 1)


class _Pair:
    """A block of queries and one of keys: what all heads share.

    Attributes:
      visible: bool `[S, U]`.
      gap: int32 `[S, U]`, as of `order_gap`; None without times.
      group: int32 `[S, 1]`, each key's.
      first_bucket, last_bucket: no known gap of the pair is in a bucket before or behind.
    """

    def __init__(self, refs: Refs, step: "_Step", i, j, window: int | None):
        query, key = refs["query_metadata"][0], refs["key_metadata"][0].T
        n_queries, n_keys = query.shape[1], key.shape[0]
        shape = n_keys, n_queries
        ago = (i * n_queries - j * n_keys) + (
            jax.lax.broadcasted_iota(jnp.int32, shape, 1) - jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        )
        visible = (query[SEGMENT : SEGMENT + 1] == key[:, SEGMENT : SEGMENT + 1]) & (ago >= 0)
        self.visible = visible if window is None else visible & (ago < window)
        self.group = key[:, GROUP : GROUP + 1]
        self.refs, self.step, self.gap = refs, step, None
        if "time_bias" in refs:
            self.gap = order_gap(key[:, TIME : TIME + 1], query[TIME : TIME + 1])
            self.first_bucket, self.last_bucket = self._find_range(step.sequence, i, j)

    def _find_range(self, b, i, j):
        """Buckets of the shortest and the longest known gap that the two blocks can have."""
        least, most, starts = (self.refs[name] for name in ("least_time", "most_time", "starts"))
        shortest, longest = order_gap(most[b, j], least[b, i]), order_gap(least[b, j], most[b, i])
        numbers = range(1, starts.shape[0] - 1)  # the last bucket is for gaps that are not known
        zero = jnp.int32(0)
        return (sum(((x >= starts[bucket]).astype(jnp.int32) for bucket in numbers), zero) for x in (shortest, longest))

    def is_bucket(self, bucket):
        """bool `[S, U]`, whether the gap is in that bucket, which is known."""
        starts = self.refs["starts"]
        return (self.gap >= starts[bucket]) & (self.gap < starts[bucket + 1])

    def find_logits(self, head) -> jax.Array:
        """float32 `[S, U]` of query head `head` of the key head; `NEVER` where it is not visible."""
        refs = self.refs
        q, k = refs["q"][0, 0, head], refs["k"][0, 0]
        logit = _dot(k, q, _ROWS) * k.shape[0] ** -0.5
        if self.gap is not None:
            table, starts = refs["time_bias"], refs["starts"]
            n = self.step.head * refs["q"].shape[2] + head

            def choose(bucket, bias):
                return jnp.where(self.gap >= starts[bucket], table[n, bucket], bias)

            bias = jnp.full(logit.shape, table[n, self.first_bucket])
            bias = jax.lax.fori_loop(self.first_bucket + 1, self.last_bucket + 1, choose, bias)
            logit += choose(starts.shape[0] - 1, bias)
        if "group_bias" in refs:
            biases = refs["group_bias"][0, 0, head]
            bias = jnp.broadcast_to(biases[:1], logit.shape)
            for group in range(1, biases.shape[0]):
                bias = jnp.where(self.group == group, biases[group : group + 1], bias)
            logit += bias
        return jnp.where(self.visible, logit, NEVER)

    def pull_logits(self, head) -> tuple[jax.Array, jax.Array]:
        """Weights of query head `head` and the gradient of its logits, each float32 `[S, U]`."""
        refs, row = self.refs, pl.ds(head, 1)
        weight = jnp.exp(self.find_logits(head) - refs["lse"][0, 0, row])
        d_weight = _dot(refs["v"][0, 0], refs["d_out"][0, 0, head], _ROWS)
        return weight, weight * (d_weight - refs["delta"][0, 0, row])


def _clear(refs: Refs, names: tuple[str, ...]):
    for name in names:
        if name in refs:
            refs[name][...] = jnp.zeros_like(refs[name])


def _each_head(refs: Refs, body):
    """`body(head)` for each query head of the key head: unrolled if few, so that matmuls run beside another's sums."""
    n_heads = refs["q"].shape[2]
    jax.lax.fori_loop(0, n_heads, lambda head, _: body(head), None, unroll=n_heads <= 2)


def forward(refs: Refs, window: int | None):
    """Writes `out` `[1, 1, Q, H, U]` and `lse_out` `[1, 1, Q, U]`.

    Keeps over the steps `top` and `total` `[Q, 1, U]` and `sums` `[Q, H, U]`.
    """
    step = _ask_step()
    i, j = step.block, step.block - step.number
    top, total, sums = refs["top"], refs["total"], refs["sums"]

    @pl.when(step.is_first)
    def _():
        top[...] = jnp.full(top.shape, NEVER)
        _clear(refs, ("total", "sums"))

    @pl.when(j >= refs["block_bounds"][step.sequence, i])
    def _():
        # Its own block first: there every slot sees itself, and `top` is a logit from then on.
        pair = _Pair(refs, step, i, j, window)

        def see(head):
            logit = pair.find_logits(head)
            new_top = jnp.maximum(top[head], jnp.max(logit, axis=0, keepdims=True))
            weight, shrink = jnp.exp(logit - new_top), jnp.exp(top[head] - new_top)
            v = refs["v"][0, 0]
            total[head] = total[head] * shrink + _sum_keys(weight)
            sums[head] = sums[head] * shrink + _dot(v, weight.astype(v.dtype), _PLAIN)
            top[head] = new_top

        _each_head(refs, see)

    @pl.when(step.is_last)
    def _():
        def write(head):
            refs["out"][0, 0, head] = (sums[head] / total[head]).astype(refs["out"].dtype)
            refs["lse_out"][0, 0, pl.ds(head, 1)] = top[head] + jnp.log(total[head])

        _each_head(refs, write)


def bwd_dq(refs: Refs, window: int | None):
    """Writes `dq`, `d_group_bias` and, once a sequence and key head, `d_time_bias` `[1, 1, Q, J, 1]`.

    Keeps `dq_sum` `[Q, H, U]`, `d_group_sum` `[Q, G, U]`, and over all blocks of queries `d_time_sum` `[Q, J, U]`.
    """
    step, n_blocks = _ask_step(), pl.num_programs(2)
    i, j = step.block, step.block - step.number

    @pl.when(step.is_first)
    def _():
        _clear(refs, ("dq_sum", "d_group_sum"))

    @pl.when(step.is_first & (i == 0))
    def _():
        _clear(refs, ("d_time_sum",))

    @pl.when(j >= refs["block_bounds"][step.sequence, i])
    def _():
        pair = _Pair(refs, step, i, j, window)

        def see(head):
            _, d_logit = pair.pull_logits(head)
            k = refs["k"][0, 0]
            refs["dq_sum"][head] += _dot(k, d_logit.astype(k.dtype), _PLAIN)
            if "group_bias" in refs:
                for group in range(refs["group_bias"].shape[3]):
                    refs["d_group_sum"][head, group : group + 1] += _sum_keys(
                        jnp.where(pair.group == group, d_logit, 0.0)
                    )
            if "time_bias" in refs:
                sums, unknown = refs["d_time_sum"], refs["starts"].shape[0] - 1

                def add(bucket, _):
                    sums[head, pl.ds(bucket, 1)] += _sum_keys(jnp.where(pair.is_bucket(bucket), d_logit, 0.0))

                jax.lax.fori_loop(pair.first_bucket, pair.last_bucket + 1, add, None)
                is_unknown = pair.gap >= refs["starts"][unknown]
                sums[head, unknown : unknown + 1] += _sum_keys(jnp.where(is_unknown, d_logit, 0.0))

        _each_head(refs, see)

    @pl.when(step.is_last)
    def _():
        dq = refs["dq"]
        dq[0, 0] = (refs["dq_sum"][...] * dq.shape[3] ** -0.5).astype(dq.dtype)
        if "group_bias" in refs:
            refs["d_group_bias"][0, 0] = refs["d_group_sum"][...].astype(refs["d_group_bias"].dtype)

    if "time_bias" in refs:

        @pl.when(step.is_last & (i == n_blocks - 1))
        def _():
            refs["d_time_bias"][0, 0] = jnp.sum(refs["d_time_sum"][...], axis=2, keepdims=True)


def bwd_dkv(refs: Refs, window: int | None):
    """Writes `dk` and `dv` `[1, 1, H, S]`; keeps `dk_sum` and `dv_sum` `[H, S]` over the steps."""
    step = _ask_step()
    i, j = step.block + step.number, step.block

    @pl.when(step.is_first)
    def _():
        _clear(refs, ("dk_sum", "dv_sum"))

    @pl.when(i <= refs["block_bounds"][step.sequence, j])
    def _():
        pair = _Pair(refs, step, i, j, window)

        def see(head):
            weight, d_logit = pair.pull_logits(head)
            q, d_out = refs["q"][0, 0, head], refs["d_out"][0, 0, head]
            refs["dk_sum"][...] += _dot(q, d_logit.astype(q.dtype), _LAST)
            refs["dv_sum"][...] += _dot(d_out, weight.astype(d_out.dtype), _LAST)

        _each_head(refs, see)

    @pl.when(step.is_last)
    def _():
        dk, dv = refs["dk"], refs["dv"]
        dk[0, 0] = (refs["dk_sum"][...] * dk.shape[2] ** -0.5).astype(dk.dtype)
        dv[0, 0] = refs["dv_sum"][...].astype(dv.dtype)
