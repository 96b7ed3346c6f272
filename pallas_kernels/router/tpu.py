"""The router as one Pallas pass over the rows, and its backward pass. Rows lie on the lanes, experts on the sublanes.

A block of rows is read once; what leaves is `[few, T]`, or sums of a block, which XLA adds up in a fixed order. Rows
behind the last are never copied in: the last block sticks out, and what stands there counts nowhere.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.cost import count_moved_bytes
from pallas_kernels.varying import varying_axes

BLOCK = 256  # rows of a block
_shape = jax.ShapeDtypeStruct
_CONTRACT_LAST = (((1,), (1,)), ((), ()))


def _logits(x_ref, router_ref, features_ref, w_features_ref):
    logit_ET = jax.lax.dot_general(router_ref[...], x_ref[...], _CONTRACT_LAST, preferred_element_type=jnp.float32)
    for i in range(w_features_ref.shape[1]):  # few features: cheaper on the vector unit than as a matmul
        logit_ET += w_features_ref[:, i : i + 1] * features_ref[i : i + 1, :]
    return logit_ET


def _forward_kernel(n_rows, x_ref, router_ref, features_ref, w_features_ref, bias_ref, domain_ref, *out_refs):
    expert_ref, probability_ref, lse_ref, probability_sum_ref, count_ref = out_refs
    is_row = pl.program_id(0) * BLOCK + jax.lax.broadcasted_iota(jnp.int32, domain_ref.shape, 1) < n_rows
    # Behind the last row stands anything, also NaN, which a sum would spread: not a number times zero is none either.
    logit = jnp.where(is_row, _logits(x_ref, router_ref, features_ref, w_features_ref), 0.0)
    top = jnp.max(logit, axis=0, keepdims=True)
    exps = jnp.exp(logit - top)
    total = jnp.sum(exps, axis=0, keepdims=True)
    probability = exps / total
    lse_ref[...] = top + jnp.log(total)
    row = jax.lax.broadcasted_iota(jnp.int32, logit.shape, 0)
    left, chosen = logit + bias_ref[...], jnp.zeros_like(logit)
    for a in range(expert_ref.shape[0]):
        # Not the place where `left` equals its maximum: a compiler that forms `left` twice may round it in two ways.
        expert = jnp.argmax(left, axis=0, keepdims=True).astype(jnp.int32)
        hit = row == expert
        expert_ref[a : a + 1, :] = expert
        probability_ref[a : a + 1, :] = jnp.sum(jnp.where(hit, probability, 0.0), axis=0, keepdims=True)
        chosen = jnp.where(hit, 1.0, chosen)
        left = jnp.where(hit, -jnp.inf, left)
    domain = jax.lax.broadcasted_iota(jnp.int32, (count_ref.shape[1], BLOCK), 0)
    own = (is_row & (domain == domain_ref[...])).astype(jnp.float32)
    sums = partial(jax.lax.dot_general, own, dimension_numbers=_CONTRACT_LAST, precision=jax.lax.Precision.HIGHEST)
    probability_sum_ref[...] = sums(probability, preferred_element_type=jnp.float32)[None]
    count_ref[...] = sums(chosen, preferred_element_type=jnp.float32)[None]


def _backward_kernel(x_ref, router_ref, features_ref, w_features_ref, domain_ref, expert_ref, lse_ref, *refs):
    d_probability_ref, d_lse_ref, d_sum_ref, d_logit_ref = refs
    probability = jnp.exp(_logits(x_ref, router_ref, features_ref, w_features_ref) - lse_ref[...])
    row = jax.lax.broadcasted_iota(jnp.int32, probability.shape, 0)
    domain, d_sum = domain_ref[...], d_sum_ref[...]
    d_probability = jnp.zeros_like(probability)
    for z in range(d_sum.shape[1]):
        d_probability += jnp.where(domain == z, d_sum[:, z : z + 1], 0.0)
    for a in range(expert_ref.shape[0]):
        d_probability += jnp.where(row == expert_ref[a : a + 1, :], d_probability_ref[a : a + 1, :], 0.0)
    inner = jnp.sum(probability * d_probability, axis=0, keepdims=True)
    d_logit_ref[...] = probability * (d_probability - inner + d_lse_ref[...])


def _over_rows(n):
    """Spec of an array `[n, T]`."""
    return pl.BlockSpec((n, BLOCK), lambda i: (0, i))


def _whole(*shape):
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape))


def _call(kernel: Callable, name: str, inputs: Sequence, outputs: Sequence, interpret):
    """`inputs` are pairs of an operand and its spec, the rows and the router first; `outputs` of a result and its."""
    operands, in_specs = zip(*inputs, strict=True)
    results, out_specs = zip(*outputs, strict=True)
    varies = jax.sharding.ManualAxisType(varying=varying_axes(*operands))
    (n_rows, d), n_experts = operands[0].shape, operands[1].shape[0]
    grid = (pl.cdiv(n_rows, BLOCK),)
    cost = pl.CostEstimate(
        flops=2 * n_rows * d * n_experts,
        bytes_accessed=count_moved_bytes(grid, in_specs + out_specs, operands + results),
        transcendentals=n_rows * n_experts,
    )
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(r.shape, r.dtype, manual_axis_type=varies) for r in results],
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*operands)


def _shared_inputs(x_TD, router_ED, router_features_TX, w_features_EX):
    d, (e, n_features) = x_TD.shape[1], w_features_EX.shape
    rows = pl.BlockSpec((BLOCK, d), lambda i: (i, 0))
    return [
        (x_TD, rows),
        (router_ED, _whole(e, d)),
        (router_features_TX.T, _over_rows(n_features)),
        (w_features_EX, _whole(e, n_features)),
    ]


def forward(
    x_TD, router_ED, router_features_TX, w_features_EX, bias_E, domain_T, n_domains, n_choices, interpret=False
):
    """As `reference.forward`; `router_ED` in the type of the rows."""
    n_rows, e = x_TD.shape[0], bias_E.shape[0]
    shape = (pl.cdiv(n_rows, BLOCK), n_domains, e)
    sums = _shape(shape, jnp.float32), pl.BlockSpec((1, n_domains, e), lambda i: (i, 0, 0))
    expert_AT, probability_AT, lse, probability_sum, count = _call(
        partial(_forward_kernel, n_rows),
        "router_forward",
        [
            *_shared_inputs(x_TD, router_ED, router_features_TX, w_features_EX),
            (bias_E[:, None], _whole(e, 1)),
            (domain_T[None], _over_rows(1)),
        ],
        [
            (_shape((n_choices, n_rows), jnp.int32), _over_rows(n_choices)),
            (_shape((n_choices, n_rows), jnp.float32), _over_rows(n_choices)),
            (_shape((1, n_rows), jnp.float32), _over_rows(1)),
            sums,
            sums,
        ],
        interpret,
    )
    return expert_AT.T, probability_AT.T, lse[0], jnp.sum(probability_sum, axis=0), jnp.sum(count, axis=0)


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
    n_rows, (z, e), a = x_TD.shape[0], d_probability_ZE.shape, expert_TA.shape[1]
    (d_logit_ET,) = _call(
        _backward_kernel,
        "router_backward",
        [
            *_shared_inputs(x_TD, router_ED, router_features_TX, w_features_EX),
            (domain_T[None], _over_rows(1)),
            (expert_TA.T, _over_rows(a)),
            (lse_T[None], _over_rows(1)),
            (d_probability_TA.T, _over_rows(a)),
            (d_lse_T[None], _over_rows(1)),
            (d_probability_ZE.T, _whole(e, z)),
        ],
        [(_shape((e, n_rows), jnp.float32), _over_rows(e))],
        interpret,
    )
    return d_logit_ET.T
