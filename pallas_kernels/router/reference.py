"""The router in plain JAX, differentiated by JAX."""

import jax
import jax.numpy as jnp


def route(x_TD, router_ED, prior_TZ, lift_EZ, bias_E, domain_T, n_choices):
    """The fields of `Routed`, in order; arguments as in `pallas_kernels.router.route`."""
    logit_TE = jnp.einsum("TD,ED->TE", x_TD, router_ED, preferred_element_type=jnp.float32)
    logit_TE += jnp.einsum("TZ,EZ->TE", prior_TZ, lift_EZ, preferred_element_type=jnp.float32)
    probability_TE = jax.nn.softmax(logit_TE, axis=-1)
    _, expert_TA = jax.lax.top_k(jax.lax.stop_gradient(logit_TE) + bias_E, n_choices)
    probability_TA = jnp.take_along_axis(probability_TE, expert_TA, axis=1)
    own_TZ = jax.nn.one_hot(domain_T, lift_EZ.shape[1], dtype=jnp.float32)  # a negative domain is a row of zeros
    chosen_TE = jnp.sum(jax.nn.one_hot(expert_TA, bias_E.shape[0], dtype=jnp.float32), axis=1)
    return (
        expert_TA,
        probability_TA,
        jax.nn.logsumexp(logit_TE, axis=-1),
        jnp.einsum("TZ,TE->ZE", own_TZ, probability_TE),
        jnp.einsum("TZ,TE->ZE", own_TZ, chosen_TE),
    )
