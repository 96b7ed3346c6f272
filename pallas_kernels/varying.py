"""Over which axes of a mesh values differ, inside `jax.shard_map`; loops and kernels must say it of what they make."""

import jax
import jax.numpy as jnp


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes over which any of the arrays may differ; empty outside `shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary(x: jax.Array, axes: frozenset[str] | tuple[str, ...]) -> jax.Array:
    """The same value, typed as different over the axes; its gradient is then summed over those where it was not."""
    missing = tuple(sorted(set(axes) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros_like_all(shape: tuple[int, ...], dtype, *arrays: jax.Array) -> jax.Array:
    """Zeros that differ wherever one of the arrays does: what a loop over them starts from."""
    return vary(jnp.zeros(shape, dtype), varying_axes(*arrays))
