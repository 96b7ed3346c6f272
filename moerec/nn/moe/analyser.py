"""The semantic analyser: which service the next event will belong to, as far as the slots so far tell."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.block import LayerContext, run_blocks, stack_blocks
from moerec.nn.layers import RMSNorm, declare, fan_in, project


class Analyser(nnx.Module):
    """Classifier of the next service over the trunk's states (the semantic analyser); where services are asked, with
    layers of its own, since its posterior then weighs their answers.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        d = config.d_model
        n_layers = config.ask.analyser_layers if config.is_asked else 0
        own = dataclasses.replace(config, d_ff=config.ask.d_analyser)
        keys = jax.random.split(jax.random.fold_in(key, 1), n_layers) if n_layers else None
        self.blocks = None if keys is None else stack_blocks(keys, own)
        self.norm = RMSNorm(d, config.norm_eps)
        self.out_DZ = declare(key, (d, n_services), ("embed", None), fan_in)
        self.bias_Z = declare(key, (n_services,), (None,), jax.nn.initializers.zeros, decay="none")
        self.remat = config.remat

    def __call__(self, x_BTD: jax.Array, context: LayerContext, key: jax.Array | None = None) -> jax.Array:
        """Log-posterior over services `[B, T, Z]`, float32; a key switches dropout on."""
        if self.blocks is not None:
            n_layers = jax.tree.leaves(self.blocks)[0].shape[0]
            keys = None if key is None else jax.random.split(key, n_layers)
            x_BTD, _ = run_blocks(self.blocks, x_BTD, context, None, keys, self.remat)
        x_BTD = self.norm(x_BTD.astype(jnp.float32))
        return jax.nn.log_softmax(project(x_BTD, self.out_DZ[...]) + self.bias_Z[...])
