"""The router for GPUs: one Pallas-Triton program a block of rows. To go without, delete this file and what names it.

JAX deprecates Pallas-Triton (0.11), so nothing of it is imported before a kernel is asked for. Arrays in a program have
sizes of powers of two: experts are padded to one, the width is walked in blocks, features, domains and choices are
unrolled. Where the rows fill whole blocks and the width is a multiple of 32, no row is copied. The sums of each block
are added up by XLA in a fixed order: no atomics, so repeats are bitwise equal.
"""

import importlib.util
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.varying import varying_axes

_shape = jax.ShapeDtypeStruct
_STAGES = 3  # blocks of the width that are on their way at once
_SHARED_BYTES = 96 * 1024  # for them in a program; the smallest chip meant here has 99 KiB


@cache
def is_installed() -> bool:
    """Whether this JAX still has Pallas-Triton."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _pick_sizes(d: int, n_experts: int, itemsize: int) -> tuple[int, int, int]:
    """Rows of a block, columns of a block of the width, and experts, padded; matrix units take no side below 16."""
    e = max(pl.next_power_of_2(n_experts), 16)
    rows = min(max(8192 // e, 16), 64)  # so that a thread holds few logits
    columns = _SHARED_BYTES // (_STAGES * (rows + e) * itemsize)
    columns = 2 ** math.floor(math.log2(min(max(columns, 16), 128)))
    divisor = math.gcd(d, columns)
    return rows, divisor if divisor >= 32 else min(columns, max(pl.next_power_of_2(d), 16)), e


def _logits(sizes, x_ref, router_ref, features_ref, w_features_ref):
    """Logits `[rows, E]` of a block; those of padded experts are minus infinity."""
    n_experts, columns = sizes
    shape = x_ref.shape[0], router_ref.shape[0]
    # Float32 rows are there for accuracy; by default the matrix units would round them to ten bits.
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def add_block(k, logit):
        block = pl.ds(k * columns, columns)
        return logit + jax.lax.dot_general(
            x_ref[:, block],
            router_ref[:, block],
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    logit = jax.lax.fori_loop(0, x_ref.shape[1] // columns, add_block, jnp.zeros(shape, jnp.float32))
    for i in range(w_features_ref.shape[1]):
        logit += features_ref[:, i][:, None] * w_features_ref[:, i][None, :]
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.where(column < n_experts, logit, -jnp.inf), column


def _forward_kernel(sizes, x_ref, router_ref, features_ref, w_features_ref, bias_ref, domain_ref, *out_refs):
    expert_ref, probability_ref, lse_ref, probability_sum_ref, count_ref = out_refs
    logit, column = _logits(sizes, x_ref, router_ref, features_ref, w_features_ref)
    top = jnp.max(logit, axis=1)
    exps = jnp.exp(logit - top[:, None])
    total = jnp.sum(exps, axis=1)
    probability = exps / total[:, None]
    lse_ref[...] = top + jnp.log(total)
    left, chosen = logit + bias_ref[...][None, :], jnp.zeros_like(logit)
    for a in range(expert_ref.shape[1]):
        expert = jnp.argmax(left, axis=1).astype(jnp.int32)
        hit = column == expert[:, None]
        expert_ref[:, a] = expert
        probability_ref[:, a] = jnp.sum(jnp.where(hit, probability, 0.0), axis=1)
        chosen = jnp.where(hit, 1.0, chosen)
        left = jnp.where(hit, -jnp.inf, left)
    domain = domain_ref[...]
    for z in range(count_ref.shape[0]):
        own = (domain == z)[:, None]
        probability_sum_ref[z, :] = jnp.sum(jnp.where(own, probability, 0.0), axis=0)
        count_ref[z, :] = jnp.sum(jnp.where(own, chosen, 0.0), axis=0)


def _backward_kernel(sizes, x_ref, router_ref, features_ref, w_features_ref, domain_ref, expert_ref, lse_ref, *refs):
    d_probability_ref, d_lse_ref, d_sum_ref, d_logit_ref = refs
    logit, column = _logits(sizes, x_ref, router_ref, features_ref, w_features_ref)
    probability = jnp.exp(logit - lse_ref[...][:, None])
    domain = domain_ref[...]
    d_probability = jnp.zeros_like(probability)
    for z in range(d_sum_ref.shape[0]):
        d_probability += jnp.where((domain == z)[:, None], d_sum_ref[z, :][None, :], 0.0)
    for a in range(expert_ref.shape[1]):
        hit = column == expert_ref[:, a][:, None]
        d_probability += jnp.where(hit, d_probability_ref[:, a][:, None], 0.0)
    inner = jnp.sum(probability * d_probability, axis=1)
    d_logit_ref[...] = probability * (d_probability - inner[:, None] + d_lse_ref[...][:, None])


def _pad(array, *shape, value=0):
    if array.shape == shape:
        return array
    return jnp.pad(array, [(0, to - size) for size, to in zip(array.shape, shape, strict=True)], constant_values=value)


class _Blocks:
    """Padded sizes of one call, its operands padded to them, and its block specs."""

    def __init__(self, x_TD, n_experts: int, interpret):
        n_rows, d = x_TD.shape
        self.rows, self.columns, self.e = _pick_sizes(d, n_experts, x_TD.dtype.itemsize)
        self.n_experts, self.interpret = n_experts, interpret
        self.n = pl.cdiv(n_rows, self.rows)
        self.t, self.d = self.n * self.rows, pl.cdiv(d, self.columns) * self.columns

    def over_rows(self, *width: int) -> pl.BlockSpec:
        """Spec of an array `[T, *width]`."""
        return pl.BlockSpec((self.rows, *width), lambda i: (i,) + (0,) * len(width))

    def pad_shared(self, x_TD, router_ED, router_features_TX, w_features_EX, domain_T):
        """The operands of both kernels, and their specs."""
        n_features = w_features_EX.shape[1]
        operands = (
            _pad(x_TD, self.t, self.d),
            _pad(router_ED, self.e, self.d),
            _pad(router_features_TX, self.t, n_features),
            _pad(w_features_EX, self.e, n_features),
        )
        specs = [self.over_rows(self.d), _whole(self.e, self.d), self.over_rows(n_features), _whole(self.e, n_features)]
        return operands, specs, _pad(domain_T, self.t, value=-1)

    def call(self, kernel, name: str, operands, in_specs, results, out_specs):
        """The kernel over all blocks. Without a cost: the lowering to Triton drops it."""
        from jax.experimental.pallas import triton

        varies = jax.sharding.ManualAxisType(varying=varying_axes(*operands))
        return pl.pallas_call(
            partial(kernel, (self.n_experts, self.columns)),
            grid=(self.n,),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(r.shape, r.dtype, manual_axis_type=varies) for r in results],
            compiler_params=triton.CompilerParams(num_warps=4 if self.rows * self.e <= 4096 else 8, num_stages=_STAGES),
            interpret=self.interpret,
            name=name,
        )(*operands)


def _whole(*shape):
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape))


def forward(
    x_TD, router_ED, router_features_TX, w_features_EX, bias_E, domain_T, n_domains, n_choices, interpret=False
):
    """As `reference.forward`; `router_ED` in the type of the rows."""
    n_rows, n_experts = x_TD.shape[0], bias_E.shape[0]
    blocks = _Blocks(x_TD, n_experts, interpret)
    operands, specs, domain_T = blocks.pad_shared(x_TD, router_ED, router_features_TX, w_features_EX, domain_T)
    sums = _shape((blocks.n, n_domains, blocks.e), jnp.float32)
    sums_spec = pl.BlockSpec((None, n_domains, blocks.e), lambda i: (i, 0, 0))
    expert_TA, probability_TA, lse_T, probability_sum, count = blocks.call(
        _forward_kernel,
        "router_forward",
        (*operands, _pad(bias_E, blocks.e), domain_T),
        [*specs, _whole(blocks.e), blocks.over_rows()],
        [
            _shape((blocks.t, n_choices), jnp.int32),
            _shape((blocks.t, n_choices), jnp.float32),
            _shape((blocks.t,), jnp.float32),
            sums,
            sums,
        ],
        [blocks.over_rows(n_choices), blocks.over_rows(n_choices), blocks.over_rows(), sums_spec, sums_spec],
    )
    return (
        expert_TA[:n_rows],
        probability_TA[:n_rows],
        lse_T[:n_rows],
        jnp.sum(probability_sum, axis=0)[:, :n_experts],
        jnp.sum(count, axis=0)[:, :n_experts],
    )


def backward(
    x_TD,
    router_ED,
    router_features_TX,
    w_features_EX,
    domain_T,
    expert_TA,
    lse_T,
    d_probability_TA,
    d_lse_T,
    d_probability_ZE,
    interpret=False,
):
    """As `reference.backward`; `router_ED` in the type of the rows."""
    n_rows, (z, n_experts), a = x_TD.shape[0], d_probability_ZE.shape, expert_TA.shape[1]
    blocks = _Blocks(x_TD, n_experts, interpret)
    operands, specs, domain_T = blocks.pad_shared(x_TD, router_ED, router_features_TX, w_features_EX, domain_T)
    rows = (
        domain_T,
        _pad(expert_TA, blocks.t, a),
        _pad(lse_T, blocks.t),
        _pad(d_probability_TA, blocks.t, a),
        _pad(d_lse_T, blocks.t),
    )
    row_specs = [blocks.over_rows(*array.shape[1:]) for array in rows]
    (d_logit_TE,) = blocks.call(
        _backward_kernel,
        "router_backward",
        (*operands, *rows, _pad(d_probability_ZE, z, blocks.e)),
        [*specs, *row_specs, _whole(z, blocks.e)],
        [_shape((blocks.t, blocks.e), jnp.float32)],
        [blocks.over_rows(blocks.e)],
    )
    return d_logit_TE[:n_rows, :n_experts]
