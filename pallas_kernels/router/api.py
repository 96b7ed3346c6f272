"""`route`: which experts a row goes to, with what weights, and the sums that every balance loss is made of.

Letters as in `pallas_kernels`: T rows, D model width, E experts, A choices of a row, X router features, Z domains.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.router import reference, tpu, triton
from pallas_kernels.router.reference import einsum
from pallas_kernels.varying import vary, varying_axes


class Routed(NamedTuple):
    """Attributes:
    expert_TA: int32, the chosen experts, best first; of equals the lower number, as in `lax.top_k`.
    probability_TA: float32, their share of the softmax over all experts.
    lse_T: float32, log-sum-exp of the logits.
    probability_ZE: float32, sum of the probabilities over the rows of each domain.
    count_ZE: float32, number of the assignments of each domain's rows; without gradient.
    """

    expert_TA: jax.Array
    probability_TA: jax.Array
    lse_T: jax.Array
    probability_ZE: jax.Array
    count_ZE: jax.Array

    @property
    def weight_TA(self) -> jax.Array:
        """The probabilities, renormalised over the chosen experts."""
        return self.probability_TA / jnp.sum(self.probability_TA, axis=1, keepdims=True)


def _by_platform(name: str) -> Callable:
    """The function of that name of the platform that the program is lowered for; no other one is lowered."""

    def call(*operands, **static):
        kernels = {"tpu": tpu} | ({"cuda": triton} if triton.is_installed() else {})
        branches = {platform: partial(getattr(module, name), **static) for platform, module in kernels.items()}
        return jax.lax.platform_dependent(*operands, default=partial(getattr(reference, name), **static), **branches)

    return call


# A kernel is a pair: forward gives the fields of `Routed`; backward gives the gradient of the logits.
_KERNELS: dict[str, tuple[Callable, Callable]] = {
    "auto": (_by_platform("forward"), _by_platform("backward")),
    "pallas_tpu": (tpu.forward, tpu.backward),
    "pallas_interpret": (partial(tpu.forward, interpret=True), partial(tpu.backward, interpret=True)),
    "pallas_triton": (triton.forward, triton.backward),
    "pallas_triton_interpret": (partial(triton.forward, interpret=True), partial(triton.backward, interpret=True)),
}
BACKENDS = ("xla", *_KERNELS)


def route(
    x_TD: jax.Array,
    router_ED: jax.Array,
    router_features_TX: jax.Array,
    w_features_EX: jax.Array,
    bias_E: jax.Array,
    domain_T: jax.Array,
    n_domains: int,
    n_choices: int,
    backend: str = "xla",
) -> Routed:
    """Softmax before top-k, of `logits = router x + w_features router_features`; the choice alone also sees `bias`.

    The bias steers the load without bending the weights (Wang et al. 2024, loss-free balancing), so it has no gradient.

    Args:
      x_TD: rows, float32 or bfloat16; logits are float32.
      router_ED: the router's rows, one an expert. All backends but `xla` round them to the type of the rows.
      router_features_TX: float32, the X features known of the slot beside its row: the analyser's log-posterior,
        profile relevance, closed groups and the like.
      w_features_EX: their map onto the logits, float32, one row an expert.
      bias_E: float32.
      domain_T: int32 domain under which the row's statistics are kept, below Z; negative rows (padding) count nowhere.
      n_domains: Z, the domains that are counted; it has nothing to do with X.
      n_choices: A.
      backend: `xla` runs everywhere and is differentiated by JAX; `pallas_tpu` and `pallas_triton` read the rows once;
        `auto` is the one of them that the program is lowered for, and else their arithmetic in plain JAX. The other two
        are the kernels interpreted. On a mesh all but `xla` belong inside `jax.shard_map`, the statistics then being
        those of the device's rows; the interpreted ones only with `check_vma=False`.

    Raises:
      ValueError: the backend is unknown, or shapes do not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"route: {backend!r} is none of {', '.join(BACKENDS)}")
    (n_rows, d), (n_experts, n_features) = x_TD.shape, w_features_EX.shape
    fits = router_ED.shape == (n_experts, d) and router_features_TX.shape == (n_rows, n_features)
    fits = fits and bias_E.shape == (n_experts,) and domain_T.shape == (n_rows,)
    if not fits or not 1 <= n_choices <= n_experts:
        shapes = f"rows {x_TD.shape}, router {router_ED.shape}, features {router_features_TX.shape}"
        raise ValueError(f"route: {shapes} do not fit")
    if n_domains < 1:
        raise ValueError(f"route: {n_domains} domains, not at least one")
    operands = (x_TD, router_ED, router_features_TX, w_features_EX, bias_E, domain_T)
    if backend == "xla":
        return Routed(*reference.forward(*operands, n_domains, n_choices))
    # A kernel's results vary wherever one of its operands does. With the operands made alike before, the results of
    # all platforms have one type, and so has each gradient and what it belongs to; `vary` sums it where that is due.
    axes = varying_axes(*operands)
    return Routed(*_route(backend, n_domains, n_choices, *(vary(a, axes) for a in operands)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _route(backend, n_domains, n_choices, x_TD, router_ED, router_features_TX, w_features_EX, bias_E, domain_T):
    return _forward(
        backend, n_domains, n_choices, x_TD, router_ED, router_features_TX, w_features_EX, bias_E, domain_T
    )[0]


def _forward(backend, n_domains, n_choices, x_TD, router_ED, router_features_TX, w_features_EX, bias_E, domain_T):
    narrow_ED = router_ED.astype(x_TD.dtype)
    operands = (x_TD, narrow_ED, router_features_TX, w_features_EX, bias_E, domain_T)
    routed = _KERNELS[backend][0](*operands, n_domains=n_domains, n_choices=n_choices)
    expert_TA, _, lse_T, *_ = routed
    return routed, (x_TD, router_ED, router_features_TX, w_features_EX, domain_T, expert_TA, lse_T)


def _backward(backend, n_domains, n_choices, residuals, cotangents):
    x_TD, router_ED, router_features_TX, w_features_EX, *chosen = residuals
    _, d_probability_TA, d_lse_T, d_probability_ZE, _ = cotangents
    narrow_ED = router_ED.astype(x_TD.dtype)
    d_logit_TE = _KERNELS[backend][1](
        x_TD, narrow_ED, router_features_TX, w_features_EX, *chosen, d_probability_TA, d_lse_T, d_probability_ZE
    )
    narrow_TE = d_logit_TE.astype(x_TD.dtype)
    return (
        einsum("TE,ED->TD", narrow_TE, narrow_ED).astype(x_TD.dtype),
        einsum("TE,TD->ED", narrow_TE, x_TD).astype(router_ED.dtype),
        einsum("TE,EX->TX", d_logit_TE, w_features_EX),
        einsum("TE,TX->EX", d_logit_TE, router_features_TX),
        None,
        None,
    )


_route.defvjp(_forward, _backward)
