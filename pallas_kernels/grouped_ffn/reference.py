"""Every expert over every row, then the chosen ones; for tests."""

import jax
import jax.numpy as jnp


def grouped_ffn_reference(
    x_TD: jax.Array,
    weight_TA: jax.Array,
    expert_TA: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    kept_TA: jax.Array | None = None,
) -> jax.Array:
    """`sum_a weight[t, a] * down(silu(gate(x)) * up(x))` of the experts of each row, `[T, D]`.

    An assignment that is not kept counts for nothing, and the other weights stay what they are.
    """
    hidden = jax.nn.silu(jnp.einsum("TD,EDF->ETF", x_TD, gate_EDF)) * jnp.einsum("TD,EDF->ETF", x_TD, up_EDF)
    y_ETD = jnp.einsum("ETF,EFD->ETD", hidden, down_EFD)
    if kept_TA is not None:
        weight_TA = jnp.where(kept_TA, weight_TA, 0)
    chosen_TAE = jax.nn.one_hot(expert_TA, gate_EDF.shape[0], dtype=x_TD.dtype)
    return jnp.einsum("TA,TAE,ETD->TD", weight_TA, chosen_TAE, y_ETD)
