"""The model: flax.nnx modules used as immutable pytrees of `Param` under plain `jax.jit`, `grad` and `scan`."""
