"""The router as one Pallas pass over the rows, and its backward pass. Rows lie on the lanes, experts on the sublanes.

A block of rows is read once; what leaves is `[few, T]`, or sums of a block, which XLA adds up in a fixed order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

BLOCK = 256  # rows of a block
_CONTRACT_LAST = (((1,), (1,)), ((), ()))


def _logits(x_ref, router_ref, prior_ref, lift_ref):
    logit_ET = jax.lax.dot_general(router_ref[...], x_ref[...], _CONTRACT_LAST, preferred_element_type=jnp.float32)
    for z in range(lift_ref.shape[1]):  # few domains: cheaper on the vector unit than as a matmul
        logit_ET += lift_ref[:, z : z + 1] * prior_ref[z : z + 1, :]
    return logit_ET


def _own_domain(domain_ref, n_domains):
    row = jax.lax.broadcasted_iota(jnp.int32, (n_domains, domain_ref.shape[1]), 0)
    return (row == domain_ref[...]).astype(jnp.float32)


def _forward_kernel(x_ref, router_ref, prior_ref, lift_ref, bias_ref, domain_ref, *out_refs):
    expert_ref, probability_ref, lse_ref, probability_sum_ref, count_ref = out_refs
    logit = _logits(x_ref, router_ref, prior_ref, lift_ref)
    top = jnp.max(logit, axis=0, keepdims=True)
    exps = jnp.exp(logit - top)
    total = jnp.sum(exps, axis=0, keepdims=True)
    probability = exps / total
    lse_ref[...] = top + jnp.log(total)
    row = jax.lax.broadcasted_iota(jnp.int32, logit.shape, 0)
    left, chosen = logit + bias_ref[...], jnp.zeros_like(logit)
    for a in range(expert_ref.shape[0]):
        best = jnp.max(left, axis=0, keepdims=True)
        expert = jnp.min(jnp.where(left == best, row, logit.shape[0]), axis=0, keepdims=True)
        hit = row == expert
        expert_ref[a : a + 1, :] = expert
        probability_ref[a : a + 1, :] = jnp.sum(jnp.where(hit, probability, 0.0), axis=0, keepdims=True)
        chosen = jnp.where(hit, 1.0, chosen)
        left = jnp.where(hit, -jnp.inf, left)
    own = _own_domain(domain_ref, count_ref.shape[1])
    sums = partial(jax.lax.dot_general, own, dimension_numbers=_CONTRACT_LAST, precision=jax.lax.Precision.HIGHEST)
    probability_sum_ref[...] = sums(probability, preferred_element_type=jnp.float32)[None]
    count_ref[...] = sums(chosen, preferred_element_type=jnp.float32)[None]


def _backward_kernel(x_ref, router_ref, prior_ref, lift_ref, domain_ref, expert_ref, lse_ref, *refs):
    d_probability_ref, d_lse_ref, d_sum_ref, d_logit_ref = refs
    probability = jnp.exp(_logits(x_ref, router_ref, prior_ref, lift_ref) - lse_ref[...])
    row = jax.lax.broadcasted_iota(jnp.int32, probability.shape, 0)
    domain, d_sum = domain_ref[...], d_sum_ref[...]
    d_probability = jnp.zeros_like(probability)
    for z in range(d_sum.shape[1]):
        d_probability += jnp.where(domain == z, d_sum[:, z : z + 1], 0.0)
    for a in range(expert_ref.shape[0]):
        d_probability += jnp.where(row == expert_ref[a : a + 1, :], d_probability_ref[a : a + 1, :], 0.0)
    inner = jnp.sum(probability * d_probability, axis=0, keepdims=True)
    d_logit_ref[...] = probability * (d_probability - inner + d_lse_ref[...])


def _block_specs(n_rows_each, d):
    """Specs of the rows, and of arrays `[n, T]`."""
    return pl.BlockSpec((BLOCK, d), lambda i: (i, 0)), [pl.BlockSpec((n, BLOCK), lambda i: (0, i)) for n in n_rows_each]


def _whole(*shape):
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape))


def _cost(operands, results):
    """Every operand is read once and every result written once."""
    (n_rows, d), n_experts = operands[0].shape, operands[1].shape[0]
    return pl.CostEstimate(
        flops=2 * n_rows * d * n_experts,
        bytes_accessed=sum(x.size * jnp.dtype(x.dtype).itemsize for x in (*operands, *results)),
        transcendentals=n_rows * n_experts,
    )


def _forward_call(x_TD, router_ED, prior_ZT, lift_EZ, bias_E, domain_T, n_choices, interpret):
    (n_rows, d), (e, z) = x_TD.shape, lift_EZ.shape
    n_blocks = n_rows // BLOCK
    x_spec, (prior, domain, choice, probability, lse) = _block_specs((z, 1, n_choices, n_choices, 1), d)
    sums = pl.BlockSpec((1, z, e), lambda i: (i, 0, 0))
    shape = jax.ShapeDtypeStruct
    operands = (x_TD, router_ED, prior_ZT, lift_EZ, bias_E[:, None], domain_T[None])
    results = [
        shape((n_choices, n_rows), jnp.int32),
        shape((n_choices, n_rows), jnp.float32),
        shape((1, n_rows), jnp.float32),
        shape((n_blocks, z, e), jnp.float32),
        shape((n_blocks, z, e), jnp.float32),
    ]
    return pl.pallas_call(
        _forward_kernel,
        grid=(n_blocks,),
        in_specs=[x_spec, _whole(e, d), prior, _whole(e, z), _whole(e, 1), domain],
        out_specs=[choice, probability, lse, sums, sums],
        out_shape=results,
        cost_estimate=_cost(operands, results),
        interpret=interpret,
        name="router_forward",
    )(*operands)


def _backward_call(saved, expert_AT, lse_T, d_probability_AT, d_lse_T, d_sum_ZE, interpret):
    x_TD, router_ED, prior_ZT, lift_EZ, domain_T = saved
    (n_rows, d), (e, z), a = x_TD.shape, lift_EZ.shape, expert_AT.shape[0]
    x_spec, (prior, domain, choice, lse, d_probability, d_lse, out) = _block_specs((z, 1, a, 1, a, 1, e), d)
    rows = (domain_T[None], expert_AT, lse_T[None], d_probability_AT, d_lse_T[None])
    operands = (x_TD, router_ED, prior_ZT, lift_EZ, *rows, d_sum_ZE.T)
    result = jax.ShapeDtypeStruct((e, n_rows), jnp.float32)
    return pl.pallas_call(
        _backward_kernel,
        grid=(n_rows // BLOCK,),
        in_specs=[
            x_spec,
            _whole(e, d),
            prior,
            _whole(e, z),
            domain,
            choice,
            lse,
            d_probability,
            d_lse,
            _whole(e, z),
        ],
        out_specs=out,
        out_shape=result,
        cost_estimate=_cost(operands, [result]),
        interpret=interpret,
        name="router_backward",
    )(*operands)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _route(x_TD, router_ED, prior_ZT, lift_EZ, bias_E, domain_T, n_choices, interpret):
    return _forward(x_TD, router_ED, prior_ZT, lift_EZ, bias_E, domain_T, n_choices, interpret)[0]


def _forward(x_TD, router_ED, prior_ZT, lift_EZ, bias_E, domain_T, n_choices, interpret):
    expert_AT, probability_AT, lse, probability_sum, count = _forward_call(
        x_TD, router_ED, prior_ZT, lift_EZ, bias_E, domain_T, n_choices, interpret
    )
    routed = (expert_AT, probability_AT, lse[0], jnp.sum(probability_sum, axis=0), jnp.sum(count, axis=0))
    return routed, (x_TD, router_ED, prior_ZT, lift_EZ, domain_T, expert_AT, lse[0])


def _backward(n_choices, interpret, residuals, cotangents):
    *saved, expert_AT, lse_T = residuals
    x_TD, router_ED, prior_ZT, lift_EZ, _ = saved
    _, d_probability_AT, d_lse_T, d_sum_ZE, _ = cotangents
    d_logit_ET = _backward_call(saved, expert_AT, lse_T, d_probability_AT, d_lse_T, d_sum_ZE, interpret)
    narrow_ET = d_logit_ET.astype(x_TD.dtype)
    return (
        jnp.einsum("ET,ED->TD", narrow_ET, router_ED, preferred_element_type=jnp.float32).astype(x_TD.dtype),
        jnp.einsum("ET,TD->ED", narrow_ET, x_TD, preferred_element_type=jnp.float32).astype(router_ED.dtype),
        jnp.einsum("ET,EZ->ZT", d_logit_ET, lift_EZ),
        jnp.einsum("ET,ZT->EZ", d_logit_ET, prior_ZT),
        jnp.zeros(router_ED.shape[0], jnp.float32),
        None,
    )


_route.defvjp(_forward, _backward)


def route(x_TD, router_ED, prior_TZ, lift_EZ, bias_E, domain_T, n_choices, interpret):
    """The fields of `Routed`, in order; arguments as in `pallas_kernels.router.route`, rows padded to whole blocks."""
    n_rows = x_TD.shape[0]
    spare = -n_rows % BLOCK
    if spare:
        x_TD, prior_TZ = (jnp.pad(a, ((0, spare), (0, 0))) for a in (x_TD, prior_TZ))
        domain_T = jnp.pad(domain_T, (0, spare), constant_values=-1)
    router_ED = router_ED.astype(x_TD.dtype)
    expert, probability, lse, *sums = _route(
        x_TD, router_ED, prior_TZ.T, lift_EZ, bias_E, domain_T, n_choices, interpret
    )
    return (expert.T[:n_rows], probability.T[:n_rows], lse[:n_rows], *sums)
