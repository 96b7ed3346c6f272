"""Memories of aspects over time scales: `ema_memory` and `delta_memory`; and `null`, which remembers nothing."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.nn.layers import RMSNorm, declare, fan_in, normal
from moerec.nn.personalization.api import Condition, Event, Personalizer, Request, UserState
from moerec.nn.personalization.recurrence import (
    HOUR,
    Writes,
    accumulate_elapsed,
    chunked_before,
    elapsed_since,
    last_known,
)
from moerec.shapes import NO_TIME

LEAST_HOURS, MOST_HOURS = 1.0, 365.25 * 24  # bounds of the half-lives
MOST_GAIN = 0.98  # of `delta_memory`: what is overwritten leaves a trace, so that its logarithm is finite


class Sizes(NamedTuple):
    """`d_model`; aspects and time scales, whose product is the number of written slots; width of what is written; and
    how many codes each static profile field has (the first of them "missing").
    """

    d_model: int
    n_aspects: int
    n_scales: int
    d_memory: int
    field_sizes: tuple[int, ...]


class MemoryParams(nnx.Module):
    """Parameters of both memories.

    Slot `a * n_scales + s` holds aspect a at time scale s; one more slot, never written, speaks of the static fields.
    """

    def __init__(self, key: jax.Array, sizes: Sizes):
        d, a, s, p, fields = sizes
        keys = jax.random.split(key, 7)
        zeros = jax.nn.initializers.zeros
        self.norm = RMSNorm(d, 1e-6)
        self.aspect_DA = declare(keys[0], (d, a), ("embed", None), fan_in)
        self.strength_D = declare(keys[1], (d,), ("embed",), zeros)
        self.value_DP = declare(keys[2], (d, p), ("embed", None), fan_in)
        self.half_life_AS = declare(keys[3], (a, s), (None, None), _spread, decay="none")
        self.read_PD = declare(keys[4], (p, d), (None, "embed"), fan_in)
        self.slot_MD = declare(keys[5], (a * s + 1, d), (None, "embed"), normal(0.02), decay="embedding")
        self.mass_MD = declare(keys[5], (a * s, d), (None, "embed"), zeros, decay="embedding")
        self.field_XD = declare(keys[6], (max(sum(fields), 1), d), (None, "embed"), normal(0.02), decay="embedding")


def _spread(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Half-lives evenly spread over the logarithm of their range, the same for every aspect."""
    place = (jnp.arange(shape[1], dtype=dtype) + 0.5) / shape[1]
    return jnp.broadcast_to(jnp.log(place) - jnp.log1p(-place), shape)


def decay_rates(params: MemoryParams) -> jax.Array:
    """Decay an hour of each written slot `[M]`: ln 2 over a half-life that is learned within the bounds."""
    place = jax.nn.sigmoid(params.half_life_AS[...].reshape(-1))
    span = math.log(MOST_HOURS / LEAST_HOURS)
    return math.log(2) / (LEAST_HOURS * jnp.exp(span * place))


def null(sizes: Sizes, chunk: int = 64) -> Personalizer:
    """Nothing is remembered, and nothing known."""

    def init_user() -> UserState:
        return UserState(jnp.zeros((0, 0)), jnp.asarray(NO_TIME), jnp.zeros((), jnp.int32))

    def observe(params: Any, state: UserState, event: Event) -> UserState:
        return state._replace(n_events=state.n_events + 1)

    def condition(params: Any, state: UserState, request: Request) -> Condition:
        return Condition(jnp.zeros((0, sizes.d_model)), jnp.zeros(sizes.d_model))

    def unroll(params: Any, event: Event, first_T: jax.Array) -> UserState:
        t = first_T.shape[0]
        time_T = jnp.full(t, NO_TIME)
        return UserState(jnp.zeros((t, 0, 0)), time_T, _count_before(first_T))

    return Personalizer(lambda key: (), init_user, observe, condition, unroll, 0)


def ema_memory(sizes: Sizes, chunk: int = 64) -> Personalizer:
    """Each slot sums up what was written, forgotten at its half-life; divided by its mass it is an average."""

    def write(params: MemoryParams, x_D: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        gain_M, value_P = _read_event(params, x_D, sizes)
        return jnp.zeros_like(gain_M), gain_M, value_P

    return _make(sizes, write, chunk)


def delta_memory(sizes: Sizes, chunk: int = 64) -> Personalizer:
    """Gated overwrite: an event replaces a share of what stands in the slots of its aspects, beside the decay."""

    def write(params: MemoryParams, x_D: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        gain_M, value_P = _read_event(params, x_D, sizes)
        gain_M = MOST_GAIN * jnp.minimum(gain_M, 1)
        return jnp.log1p(-gain_M), gain_M, value_P

    return _make(sizes, write, chunk)


def _read_event(params: MemoryParams, x_D: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """How much an event has to say to each slot, in (0, 1), and what; its last entry, 1, counts what was written."""
    x_D = params.norm(x_D.astype(jnp.float32))
    share_A = jax.nn.softmax(x_D @ params.aspect_DA[...])
    strength = 2 * jax.nn.sigmoid(jnp.sum(x_D * params.strength_D[...]))
    gain_M = jnp.repeat(strength * share_A, sizes.n_scales)
    return gain_M, jnp.append(x_D @ params.value_DP[...], 1.0)


def _make(sizes: Sizes, write: Callable, chunk: int) -> Personalizer:
    n_written = sizes.n_aspects * sizes.n_scales
    offsets = tuple(sum(sizes.field_sizes[:f]) for f in range(len(sizes.field_sizes)))

    def init_user() -> UserState:
        memory_MP = jnp.zeros((n_written, sizes.d_memory + 1))
        return UserState(memory_MP, jnp.asarray(NO_TIME), jnp.zeros((), jnp.int32))

    def observe(params: MemoryParams, state: UserState, event: Event) -> UserState:
        log_keep_M, gain_M, value_P = write(params, event.x_D)
        hours = elapsed_since(state.time, event.time).astype(jnp.float32) / HOUR
        decay_M = jnp.exp(log_keep_M - decay_rates(params) * hours)
        memory_MP = decay_M[:, None] * state.memory_MP + gain_M[:, None] * value_P
        time = jnp.where(event.time == NO_TIME, state.time, event.time)
        return UserState(memory_MP, time, state.n_events + 1)

    def unroll(params: MemoryParams, event: Event, first_T: jax.Array) -> UserState:
        log_keep_TM, gain_TM, value_TP = jax.vmap(lambda x_D: write(params, x_D))(event.x_D)
        elapsed_T = accumulate_elapsed(event.time, first_T)
        memory_TMP = chunked_before(
            Writes(elapsed_T, decay_rates(params), log_keep_TM, gain_TM, value_TP, first_T), chunk
        )
        known_T = last_known(event.time, first_T)
        before_T = jnp.where(first_T, NO_TIME, jnp.pad(known_T[:-1], (1, 0), constant_values=NO_TIME))
        return UserState(memory_TMP, before_T, _count_before(first_T))

    def condition(params: MemoryParams, state: UserState, request: Request) -> Condition:
        hours = elapsed_since(state.time, request.time).astype(jnp.float32) / HOUR
        memory_MP = jnp.exp(-decay_rates(params) * hours)[:, None] * state.memory_MP
        mass_M = memory_MP[:, -1]
        # Little evidence counts for little: the mean is pulled to zero by one event's worth.
        mean_MP = memory_MP[:, :-1] / (mass_M[:, None] + 1)
        written_MD = mean_MP @ params.read_PD[...] + jnp.log1p(mass_M)[:, None] * params.mass_MD[...]
        rows_Y = request.field_Y + jnp.asarray(offsets, jnp.int32)
        field_D = jnp.sum(jnp.where(request.field_Y[:, None] > 0, params.field_XD[...][rows_Y], 0), axis=0)
        slot_MD = params.slot_MD[...] + jnp.concatenate([written_MD, field_D[None]])
        known_M = jnp.append(jnp.full(n_written, state.n_events > 0), jnp.any(request.field_Y > 0))
        summary_D = jnp.sum(jnp.where(known_M[:, None], slot_MD, 0), axis=0) / (n_written + 1)
        return Condition(slot_MD, summary_D)

    return Personalizer(lambda key: MemoryParams(key, sizes), init_user, observe, condition, unroll, n_written + 1)


def _count_before(first_T: jax.Array) -> jax.Array:
    """How many slots of the same sequence stand before each."""
    place_T = jnp.arange(first_T.shape[0], dtype=jnp.int32)
    return place_T - jax.lax.cummax(jnp.where(first_T, place_T, 0))
