"""Named arguments that the kernels' tests and benchmarks share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LOADS = ("balanced", "zipf", "one_expert", "half_empty")


class LayerSpec(NamedTuple):
    """Shapes of one mixture layer: T rows, width D, E experts of width F, A of them a row."""

    n_rows: int = 4096
    d: int = 256
    n_experts: int = 16
    f: int = 512
    n_choices: int = 2
    load: str = "balanced"


class LayerOperands(NamedTuple):
    """What `grouped_ffn` takes beside its plan, and the experts that the plan is made from."""

    x_TD: jax.Array
    weight_TA: jax.Array
    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array
    expert_TA: jax.Array


class AttentionSpec(NamedTuple):
    """Shapes of `attend`: B sequences of T slots, N query heads over K key heads of width H, J buckets, G groups.

    `segments` are as many equal ones in each sequence.
    """

    t: int = 1024
    b: int = 1
    n: int = 4
    k: int = 2
    h: int = 32
    j: int = 24
    g: int = 3
    segments: int = 1


class AttentionOperands(NamedTuple):
    """What `attend` takes, by the names of its arguments."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    segment_BT: jax.Array
    time_BT: jax.Array
    time_bias_NJ: jax.Array
    group_BT: jax.Array
    group_bias_BTNG: jax.Array


def draw_attention(spec: AttentionSpec, seed: int = 0) -> AttentionOperands:
    """Normal queries, keys, values and biases; hours between one slot and the next, some times not known."""
    rng = np.random.default_rng(seed)
    t, b, n, k, h, j, g, segments = spec

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    time = 7 * 10**8 + np.cumsum(rng.exponential(1e4, (b, t)), axis=1).astype(np.int32)
    time[rng.random((b, t)) < 0.05] = np.iinfo(np.int32).min
    return AttentionOperands(
        normal(b, t, n, h),
        normal(b, t, k, h),
        normal(b, t, k, h),
        jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32) * segments // t + 1, (b, t)),
        jnp.asarray(time, jnp.int32),
        normal(n, j),
        jnp.asarray(rng.integers(0, g, (b, t)), jnp.int32),
        normal(b, t, n, g),
    )


def draw_experts(load: str, n_rows: int, n_choices: int, n_experts: int, seed: int = 0) -> np.ndarray:
    """int32 `[T, A]` distinct experts of each row, under a load of `LOADS`."""
    rng = np.random.default_rng(seed)
    if load == "balanced":
        first = np.arange(n_rows)[:, None] + np.arange(n_choices) * max(n_experts // n_choices, 1)
        return (first % n_experts).astype(np.int32)
    score = {
        "zipf": -np.log(np.arange(1, n_experts + 1)),
        "one_expert": -100.0 * np.arange(n_experts),  # all rows to the same A experts
        "half_empty": np.where(np.arange(n_experts) % 2, 0.0, -100.0),
    }[load]
    noise = rng.gumbel(size=(n_rows, n_experts))
    return np.argsort(-(score + noise), axis=1)[:, :n_choices].astype(np.int32)


def draw_operands(spec: LayerSpec, seed: int = 0) -> LayerOperands:
    """Normal rows, matrices of variance 1 / fan-in, weights that add up to one."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    e, d, f = spec.n_experts, spec.d, spec.f
    return LayerOperands(
        normal(spec.n_rows, d),
        jax.nn.softmax(normal(spec.n_rows, spec.n_choices)),
        normal(e, d, f, scale=d**-0.5),
        normal(e, d, f, scale=d**-0.5),
        normal(e, f, d, scale=f**-0.5),
        jnp.asarray(draw_experts(spec.load, spec.n_rows, spec.n_choices, e, seed)),
    )
