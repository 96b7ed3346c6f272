"""The semantic analyser: which service the next event will belong to, as far as the slots so far tell."""

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.nn.layers import RMSNorm, declare, fan_in


class Analyser(nnx.Module):
    """Linear classifier of the next service over the trunk's states (the semantic analyser)."""

    def __init__(self, key: jax.Array, d: int, n_services: int, eps: float):
        self.norm = RMSNorm(d, eps)
        self.out_DZ = declare(key, (d, n_services), ("embed", None), fan_in)
        self.bias_Z = declare(key, (n_services,), (None,), jax.nn.initializers.zeros, decay="none")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Log-posterior over services `[B, T, Z]`, float32."""
        x_BTD = self.norm(x_BTD.astype(jnp.float32))
        return jax.nn.log_softmax(x_BTD @ self.out_DZ[...] + self.bias_Z[...])
