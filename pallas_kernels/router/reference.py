"""The router in plain JAX: its values, which JAX can differentiate, and the kernels' backward pass written out."""

import functools

import jax
import jax.numpy as jnp

# GPUs and TPUs would round float32 operands to ten bits or fewer; what is narrower is multiplied as it is.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _logits(x_TD, router_ED, router_features_TX, w_features_EX):
    logit_TE = einsum("TD,ED->TE", x_TD, router_ED)
    return logit_TE + einsum("TX,EX->TE", router_features_TX, w_features_EX)


def _own_domain(domain_T, n_domains):
    return jax.nn.one_hot(domain_T, n_domains, dtype=jnp.float32)  # a negative domain is a row of zeros


def forward(x_TD, router_ED, router_features_TX, w_features_EX, bias_E, domain_T, n_domains, n_choices):
    """The fields of `Routed`, in order; arguments as in `pallas_kernels.router.route`."""
    logit_TE = _logits(x_TD, router_ED, router_features_TX, w_features_EX)
    probability_TE = jax.nn.softmax(logit_TE, axis=-1)
    _, expert_TA = jax.lax.top_k(jax.lax.stop_gradient(logit_TE) + bias_E, n_choices)
    probability_TA = jnp.take_along_axis(probability_TE, expert_TA, axis=1)
    own_TZ = _own_domain(domain_T, n_domains)
    chosen_TE = jnp.sum(jax.nn.one_hot(expert_TA, bias_E.shape[0], dtype=jnp.float32), axis=1)
    return (
        expert_TA,
        probability_TA,
        jax.nn.logsumexp(logit_TE, axis=-1),
        einsum("TZ,TE->ZE", own_TZ, probability_TE),
        einsum("TZ,TE->ZE", own_TZ, chosen_TE),
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
):
    """Gradient of the logits, float32 `[T, E]`, from what forward was given, what it chose, and its gradients."""
    probability_TE = jnp.exp(_logits(x_TD, router_ED, router_features_TX, w_features_EX) - lse_T[:, None])
    chosen_TAE = jax.nn.one_hot(expert_TA, router_ED.shape[0], dtype=jnp.float32)
    d_probability_TE = einsum("TA,TAE->TE", d_probability_TA, chosen_TAE)
    d_probability_TE += einsum("TZ,ZE->TE", _own_domain(domain_T, d_probability_ZE.shape[0]), d_probability_ZE)
    inner_T = jnp.sum(probability_TE * d_probability_TE, axis=1)
    return probability_TE * (d_probability_TE + (d_lse_T - inner_T)[:, None])
