"""Cross-entropy over a large vocabulary, block by block of it, so that the logits `[S, V]` never stand in memory.

The forward pass keeps one number a slot, the log-sum-exp, which is taken block by block (Milakov & Gimelshein 2018);
the backward pass forms each block's logits anew. Going by blocks of the vocabulary, not of slots, each row's gradient
is made once: a sum of `[V, D]` parts over blocks of slots would go through memory as often as there are blocks.

Where one block is the whole vocabulary, on one device, its exponentials are kept instead: they are no larger than what
the backward pass would form, and it is a matmul less.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moerec.nn.layers import MASK_VALUE
from moerec.nn.sharding import ROW_AXES, TableLayout, find_layout
from pallas_kernels.varying import vary, varying_axes


class _Part(NamedTuple):
    """The rows of the vocabulary that this device has.

    Attributes:
      row_VD: they. first: the number of the first of them. chunk: rows of a block. axes: mesh axes over which values
        differ here.
    """

    row_VD: jax.Array
    first: jax.Array | int
    chunk: int
    axes: frozenset[str]

    @property
    def n_blocks(self) -> int:
        return -(-self.row_VD.shape[0] // self.chunk)

    def block(self, b: jax.Array, label_S: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Block b: its first row (the last block begins early, so that all are equally long), the rows, which of them
        no other block has, and `[S, rows]`, which one is each slot's label.
        """
        start = jnp.minimum(b * self.chunk, self.row_VD.shape[0] - self.chunk)
        row_JD = jax.lax.dynamic_slice_in_dim(self.row_VD, start, self.chunk)
        place_J = start + jnp.arange(self.chunk)
        is_own_J = place_J >= b * self.chunk
        is_label_SJ = (self.first + place_J == label_S[:, None]) & is_own_J
        return start, row_JD, is_own_J, is_label_SJ


def _score(h_SD: jax.Array, row_JD: jax.Array) -> jax.Array:
    return jnp.einsum("SD,JD->SJ", h_SD, row_JD.astype(h_SD.dtype), preferred_element_type=jnp.float32)


def _scan_forward(h_SD: jax.Array, label_S: jax.Array, part: _Part) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each slot: the largest logit, the sum of the exponentials below it, and the label's logit, 0 if not here."""

    def step(carry, b):
        top_S, total_S, label_logit_S = carry
        _, row_JD, is_own_J, is_label_SJ = part.block(b, label_S)
        logit_SJ = _score(h_SD, row_JD)
        label_logit_S += jnp.sum(jnp.where(is_label_SJ, logit_SJ, 0), axis=1)
        logit_SJ = jnp.where(is_own_J, logit_SJ, -jnp.inf)
        higher_S = jnp.maximum(top_S, jnp.max(logit_SJ, axis=1))
        total_S = total_S * jnp.exp(top_S - higher_S) + jnp.sum(jnp.exp(logit_SJ - higher_S[:, None]), axis=1)
        return (higher_S, total_S, label_logit_S), None

    n = h_SD.shape[0]
    start = (jnp.full(n, MASK_VALUE), jnp.zeros(n), jnp.zeros(n))
    start = jax.tree.map(lambda x: vary(x, part.axes), start)
    return jax.lax.scan(step, start, jnp.arange(part.n_blocks))[0]


def _scan_backward(
    h_SD: jax.Array, label_S: jax.Array, lse_S: jax.Array, pull_S: jax.Array, part: _Part
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the states and of the rows."""

    def step(carry, b):
        d_h_SD, d_row_VD = carry
        start, row_JD, is_own_J, is_label_SJ = part.block(b, label_S)
        probability_SJ = jnp.where(is_own_J, jnp.exp(_score(h_SD, row_JD) - lse_S[:, None]), 0)
        d_SJ = ((probability_SJ - is_label_SJ) * pull_S[:, None]).astype(h_SD.dtype)
        d_h_SD += jnp.einsum("SJ,JD->SD", d_SJ, row_JD.astype(h_SD.dtype), preferred_element_type=jnp.float32)
        d_row_JD = jnp.einsum("SJ,SD->JD", d_SJ, h_SD, preferred_element_type=jnp.float32)
        d_row_JD += jax.lax.dynamic_slice_in_dim(d_row_VD, start, part.chunk)
        return (d_h_SD, jax.lax.dynamic_update_slice_in_dim(d_row_VD, d_row_JD, start, axis=0)), None

    start = (jnp.zeros(h_SD.shape), jnp.zeros(part.row_VD.shape))
    start = jax.tree.map(lambda x: vary(x, part.axes), start)
    return jax.lax.scan(step, start, jnp.arange(part.n_blocks))[0]


def _take_part(row_VD: jax.Array, chunk: int, layout: TableLayout | None, h_SD: jax.Array) -> _Part:
    """What this device works on; of a sharded width the whole is brought together here."""
    if layout is None:
        return _Part(row_VD, 0, min(chunk, row_VD.shape[0]), frozenset())
    row_VD, first = layout.gather(row_VD.astype(h_SD.dtype))  # narrow before it travels
    return _Part(row_VD, first, min(chunk, row_VD.shape[0]), varying_axes(row_VD, h_SD))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_vocab_xent(
    h_SD: jax.Array,
    row_VD: jax.Array,
    label_S: jax.Array,
    weight_S: jax.Array,
    chunk: int,
    axes: tuple[str | None, ...] = ("vocab", "embed"),
) -> jax.Array:
    """Sum over slots of `-weight * log softmax(row_VD h)[label]`, float32.

    Under `jax.set_mesh` slots are split over `ROW_AXES`, and rows as `moerec.nn.sharding` says.

    Args:
      h_SD: states, in the type that is multiplied in. row_VD: float32, one a token. label_S: int32 tokens.
      weight_S: float32, without gradient. chunk: tokens whose logits are formed at once, for all slots of a device.
      axes: logical axes of `row_VD`.
    """
    return _forward(h_SD, row_VD, label_S, weight_S, chunk, axes)[0]


class _Whole(NamedTuple):
    """What is kept of the logits where they stand in memory: `[S, V]` exponentials below the top, and their sums."""

    exp_SV: jax.Array
    total_S: jax.Array


def _forward_whole(h_SD: jax.Array, row_VD: jax.Array, label_S: jax.Array, weight_S: jax.Array):
    logit_SV = _score(h_SD, row_VD)
    top_S = jnp.max(logit_SV, axis=1)
    exp_SV = jnp.exp(logit_SV - top_S[:, None])
    total_S = jnp.sum(exp_SV, axis=1)
    label_logit_S = jnp.take_along_axis(logit_SV, label_S[:, None], axis=1)[:, 0]
    loss = jnp.sum(weight_S * (top_S + jnp.log(total_S) - label_logit_S))
    return loss, (h_SD, row_VD, label_S, weight_S, _Whole(exp_SV, total_S))


def _backward_whole(h_SD: jax.Array, row_VD: jax.Array, label_S: jax.Array, pull_S: jax.Array, kept: _Whole):
    is_label_SV = label_S[:, None] == jnp.arange(row_VD.shape[0])
    d_SV = kept.exp_SV * (pull_S / kept.total_S)[:, None] - jnp.where(is_label_SV, pull_S[:, None], 0)
    d_SV = d_SV.astype(h_SD.dtype)
    d_h_SD = jnp.einsum("SV,VD->SD", d_SV, row_VD.astype(h_SD.dtype), preferred_element_type=jnp.float32)
    return d_h_SD, jnp.einsum("SV,SD->VD", d_SV, h_SD, preferred_element_type=jnp.float32)


def _pad(x: jax.Array, n: int) -> jax.Array:
    return jnp.pad(x, ((0, n - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def _count_padded(n: int, layout: TableLayout | None) -> int:
    return n if layout is None else -(-n // layout.n_row_parts) * layout.n_row_parts


def _forward(h_SD, row_VD, label_S, weight_S, chunk, axes):
    layout, n = find_layout(row_VD, axes), h_SD.shape[0]
    if layout is None and chunk >= row_VD.shape[0]:
        return _forward_whole(h_SD, row_VD, label_S, weight_S)

    def run(h_SD, row_VD, label_S, weight_S):
        part = _take_part(row_VD, chunk, layout, h_SD)
        top_S, total_S, label_logit_S = _scan_forward(h_SD, label_S, part)
        if layout is not None and layout.is_split:
            highest_S = jax.lax.pmax(top_S, "model")
            total_S = jax.lax.psum(total_S * jnp.exp(top_S - highest_S), "model")
            top_S, label_logit_S = highest_S, jax.lax.psum(label_logit_S, "model")
        lse_S = top_S + jnp.log(total_S)
        loss = jnp.sum(weight_S * (lse_S - label_logit_S))
        return (loss if layout is None else jax.lax.psum(loss, ROW_AXES)), lse_S

    if layout is not None:
        rows = PartitionSpec(ROW_AXES)
        specs = (rows, layout.spec, rows, rows)
        run = jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=(PartitionSpec(), rows))
    padded = _count_padded(n, layout)
    loss, lse_S = run(_pad(h_SD, padded), row_VD, _pad(label_S, padded), _pad(weight_S, padded))
    return loss, (h_SD, row_VD, label_S, weight_S, lse_S[:n])


def _backward(chunk, axes, residuals, g):
    h_SD, row_VD, label_S, weight_S, lse_S = residuals
    if isinstance(lse_S, _Whole):
        d_h_SD, d_row_VD = _backward_whole(h_SD, row_VD, label_S, g * weight_S, lse_S)
        return d_h_SD.astype(h_SD.dtype), d_row_VD.astype(row_VD.dtype), None, None
    layout, n = find_layout(row_VD, axes), h_SD.shape[0]

    def run(h_SD, row_VD, label_S, lse_S, pull_S):
        part = _take_part(row_VD, chunk, layout, h_SD)
        d_h_SD, d_row_VD = _scan_backward(h_SD, label_S, lse_S, pull_S, part)
        if layout is not None:
            d_h_SD = jax.lax.psum(d_h_SD, "model") if layout.is_split else d_h_SD
            if layout.is_sharded:
                d_row_VD = jax.lax.psum_scatter(d_row_VD, "data", scatter_dimension=1, tiled=True)
                d_row_VD = jax.lax.psum(d_row_VD, "expert")
            else:
                d_row_VD = jax.lax.psum(d_row_VD, ROW_AXES)
        return d_h_SD, d_row_VD

    if layout is not None:
        rows = PartitionSpec(ROW_AXES)
        specs = (rows, layout.spec, rows, rows, rows)
        run = jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=(rows, layout.spec))
    padded = _count_padded(n, layout)
    slots = (_pad(x, padded) for x in (label_S, lse_S, g * weight_S))
    d_h_SD, d_row_VD = run(_pad(h_SD, padded), row_VD, *slots)
    return d_h_SD[:n].astype(h_SD.dtype), d_row_VD.astype(row_VD.dtype), None, None


chunked_vocab_xent.defvjp(_forward, _backward)
