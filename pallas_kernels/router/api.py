"""`route`: which experts a row goes to, with what weights, and the sums that every balance loss is made of.

Letters: T rows, D model width, E experts, A experts of a row, Z domains.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.router import reference, tpu


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


BACKENDS = ("xla", "pallas_tpu", "pallas_interpret")


def route(
    x_TD: jax.Array,
    router_ED: jax.Array,
    prior_TZ: jax.Array,
    lift_EZ: jax.Array,
    bias_E: jax.Array,
    domain_T: jax.Array,
    n_choices: int,
    backend: str = "xla",
) -> Routed:
    """Softmax before top-k, of `logits = router x + lift prior`; the choice alone also sees `bias`.

    The bias steers the load without bending the weights (Wang et al. 2024, loss-free balancing), so it has no gradient.

    Args:
      x_TD: rows, float32 or bfloat16; logits are float32.
      router_ED: the router's rows, one an expert.
      prior_TZ: float32 log-posterior of the row's domain. lift_EZ: its map onto the logits.
      bias_E: float32.
      domain_T: int32 domain under which the row's statistics are kept; negative rows (padding) count nowhere.
      n_choices: A.
      backend: `xla` runs everywhere; `pallas_tpu` reads the rows once; `pallas_interpret` is that kernel, interpreted.

    Raises:
      ValueError: the backend is unknown, or shapes do not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"route: {backend!r} is none of {', '.join(BACKENDS)}")
    (n_rows, d), (n_experts, n_domains) = x_TD.shape, lift_EZ.shape
    fits = router_ED.shape == (n_experts, d) and prior_TZ.shape == (n_rows, n_domains) and bias_E.shape == (n_experts,)
    if not fits or domain_T.shape != (n_rows,) or not 1 <= n_choices <= n_experts:
        raise ValueError(f"route: rows {x_TD.shape}, router {router_ED.shape}, prior {prior_TZ.shape} do not fit")
    if backend == "xla":
        return Routed(*reference.route(x_TD, router_ED, prior_TZ, lift_EZ, bias_E, domain_T, n_choices))
    interpret = backend == "pallas_interpret"
    return Routed(*tpu.route(x_TD, router_ED, prior_TZ, lift_EZ, bias_E, domain_T, n_choices, interpret))
