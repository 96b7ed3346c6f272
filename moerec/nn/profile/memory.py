"""Memories of aspects over time scales: `ema_memory`, `delta_memory`, `low_rank_memory`; and `null`, which has none."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config.registry import Registry
from moerec.nn.layers import RMSNorm, declare, fan_in, fan_in_second, normal, sum_rows
from moerec.nn.profile.api import Basis, Event, Personalizer, ProfileRequest, ProfileState, UserState
from moerec.nn.profile.recurrence import (
    HOUR,
    Writes,
    accumulate_elapsed,
    carried_before,
    chunked_exclusive_scan,
    elapsed_since,
    is_continued,
    last_known,
)
from moerec.types import NO_TIME

LEAST_HOURS, MOST_HOURS = 1.0, 365.25 * 24  # bounds of the half-lives
MOST_GAIN = 0.98  # of `delta_memory`: what is overwritten leaves a trace, so that its logarithm is finite


class MemorySizes(NamedTuple):
    """`d_model`; aspects and time scales, whose product is the number of written slots; width of what is written;
    how many codes each static profile field has (the first of them "missing"); and of `low_rank_memory` the rank.
    """

    d_model: int
    n_aspects: int
    n_scales: int
    d_memory: int
    field_sizes: tuple[int, ...]
    rank: int = 4

    @property
    def n_written(self) -> int:
        return self.n_aspects * self.n_scales


MEMORIES: Registry[Callable[[MemorySizes, int], Personalizer]] = Registry("memory", "model.personal.memory")
register_memory = MEMORIES.register  # a function of sizes and a chunk's length, under the name that configs give


class MemoryParams(nnx.Module):
    """Parameters of `ema_memory` and `delta_memory`.

    Slot `a * n_scales + s` holds aspect a at time scale s; one more slot, never written, speaks of the static fields.
    """

    def __init__(self, key: jax.Array, sizes: MemorySizes):
        d, a, s, p, fields, _ = sizes
        keys = jax.random.split(key, 7)
        zeros = jax.nn.initializers.zeros
        self.norm = RMSNorm(d, 1e-6)
        self.aspect_DX = declare(keys[0], (d, a), ("embed", None), fan_in)
        self.strength_D = declare(keys[1], (d,), ("embed",), zeros)
        self.value_DP = declare(keys[2], (d, p), ("embed", None), fan_in)
        self.half_life_XX = declare(keys[3], (a, s), (None, None), _spread, decay="none")
        self.read_PD = declare(keys[4], (p, d), (None, "embed"), fan_in)
        self.slot_MD = declare(keys[5], (a * s + 1, d), (None, "embed"), normal(0.02), decay="embedding")
        self.mass_MD = declare(keys[5], (a * s, d), (None, "embed"), zeros, decay="embedding")
        self.field_XD = declare(keys[6], (max(sum(fields), 1), d), (None, "embed"), normal(0.02), decay="embedding")


class LowRankParams(nnx.Module):
    """Parameters of `low_rank_memory`; slots as in `MemoryParams`, half-lives of the scales alone.

    The first of the R keys is 1 for every event.
    """

    def __init__(self, key: jax.Array, sizes: MemorySizes):
        d, a, s, p, fields, rank = sizes
        keys = jax.random.split(key, 6)
        zeros = jax.nn.initializers.zeros
        self.norm = RMSNorm(d, 1e-6)
        self.key_DX = declare(keys[0], (d, rank - 1), ("embed", None), fan_in)
        self.value_DP = declare(keys[1], (d, p), ("embed", None), fan_in)
        self.half_life_XX = declare(key, (1, s), (None, None), _spread, decay="none")
        self.mix_XX = declare(keys[2], (a, rank), (None, None), fan_in_second)
        self.read_PD = declare(keys[3], (p, d), (None, "embed"), fan_in)
        self.slot_MD = declare(keys[4], (a * s + 1, d), (None, "embed"), normal(0.02), decay="embedding")
        self.mass_MD = declare(keys[4], (a * s, d), (None, "embed"), zeros, decay="embedding")
        self.field_XD = declare(keys[5], (max(sum(fields), 1), d), (None, "embed"), normal(0.02), decay="embedding")


def _spread(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Half-lives evenly spread over the logarithm of their range, the same for every aspect."""
    place = (jnp.arange(shape[1], dtype=dtype) + 0.5) / shape[1]
    return jnp.broadcast_to(jnp.log(place) - jnp.log1p(-place), shape)


def decay_rates(params: MemoryParams | LowRankParams) -> jax.Array:
    """Decay an hour of each half-life `[aspects * scales]`: ln 2 over what is learned within the bounds."""
    place = jax.nn.sigmoid(params.half_life_XX[...].reshape(-1))
    span = math.log(MOST_HOURS / LEAST_HOURS)
    return math.log(2) / (LEAST_HOURS * jnp.exp(span * place))


def evidence(params: MemoryParams, state: UserState, time: jax.Array) -> jax.Array:
    """`[M - 1]`, how many events' worth each written slot holds, as of a time."""
    return _forget(decay_rates(params), state.time, time) * state.memory_MP[:, -1]


def _forget(rate_X: jax.Array, earlier: jax.Array, later: jax.Array) -> jax.Array:
    """The share of a memory that is left at a later time."""
    return jnp.exp(-rate_X * (elapsed_since(earlier, later).astype(jnp.float32) / HOUR))


@register_memory("null")
def null(sizes: MemorySizes, chunk: int = 64) -> Personalizer:
    """Nothing is remembered, and nothing known."""

    def init_user() -> UserState:
        return UserState(jnp.zeros((0, 0)), jnp.asarray(NO_TIME), jnp.zeros((), jnp.int32))

    def update(params: Any, state: UserState, event: Event) -> UserState:
        return state._replace(n_events=state.n_events + jnp.asarray(event.is_event, jnp.int32))

    def read_state(params: Any, state: UserState, request: ProfileRequest) -> ProfileState:
        return ProfileState(jnp.zeros((0, 0)), jnp.zeros(0), None, jnp.zeros(sizes.d_model))

    def prefix_states(params: Any, event: Event, first_T: jax.Array, start: UserState | None = None) -> UserState:
        t = first_T.shape[0]
        time_T = jnp.full(t, NO_TIME)
        return UserState(jnp.zeros((t, 0, 0)), time_T, _count_before(first_T, event.is_event, start))

    def basis(params: Any) -> Basis:
        nothing_X1D = jnp.zeros((0, 1, sizes.d_model))
        return Basis(nothing_X1D, nothing_X1D, nothing_X1D)

    return Personalizer(lambda key: (), init_user, update, read_state, prefix_states, basis, 0)


@register_memory("ema")
def ema_memory(sizes: MemorySizes, chunk: int = 64) -> Personalizer:
    """Each slot sums up what was written, forgotten at its half-life; divided by its mass it is an average."""

    def write(params: MemoryParams, x_D: jax.Array) -> MemoryWrite:
        gain_M, value_P = _read_event(params, x_D, sizes)
        return MemoryWrite(jnp.zeros_like(gain_M), gain_M, value_P)

    return _make(sizes, _of_aspects(sizes, write), chunk)


@register_memory("delta")
def delta_memory(sizes: MemorySizes, chunk: int = 64) -> Personalizer:
    """Gated overwrite: an event replaces a share of what stands in the slots of its aspects, beside the decay."""

    def write(params: MemoryParams, x_D: jax.Array) -> MemoryWrite:
        gain_M, value_P = _read_event(params, x_D, sizes)
        gain_M = MOST_GAIN * jnp.minimum(gain_M, 1)
        return MemoryWrite(jnp.log1p(-gain_M), gain_M, value_P)

    return _make(sizes, _of_aspects(sizes, write), chunk)


@register_memory("low_rank")
def low_rank_memory(sizes: MemorySizes, chunk: int = 64) -> Personalizer:
    """A low-rank adapter a user: all share the slots, and each has an own update of rank R of them.

    At each time scale the state is a matrix `[rank, P]` of fast weights, to which an event adds the outer product of
    its key and its value (Schlag et al. 2021), forgotten at the scale's half-life; the slots are `mix [aspects, rank]`
    times that matrix times `read [P, D]`. Keys have signs, so that the mass is that of the first one, which is always
    1.
    """
    rank, n_scales = sizes.rank, sizes.n_scales

    def write(params: LowRankParams, x_D: jax.Array) -> MemoryWrite:
        x_D = params.norm(x_D.astype(jnp.float32))
        key_X = jnp.concatenate([jnp.ones(1), x_D @ params.key_DX[...]])
        value_P = jnp.append(x_D @ params.value_DP[...], 1.0)
        return MemoryWrite(jnp.zeros(rank * n_scales), jnp.repeat(key_X, n_scales), value_P)

    def read(params: LowRankParams, memory_XP: jax.Array, left_X: jax.Array) -> tuple[jax.Array, jax.Array]:
        memory_XXP = (left_X[:, None] * memory_XP).reshape(rank, n_scales, -1)
        mass_X = memory_XXP[0, :, -1]
        mean_XXP = jnp.einsum("AR,RSP->ASP", params.mix_XX[...], memory_XXP[..., :-1]) / (mass_X[:, None] + 1)
        return mean_XXP.reshape(sizes.n_written, -1), jnp.tile(mass_X, sizes.n_aspects)

    def rates(params: LowRankParams) -> jax.Array:
        return jnp.tile(decay_rates(params), rank)

    return _make(sizes, _Kind(lambda key: LowRankParams(key, sizes), rank * n_scales, rates, write, read), chunk)


class MemoryWrite(NamedTuple):
    """What an event does to each row X of a memory: logarithm of what is kept, gain, and the value that is written."""

    log_keep_X: jax.Array
    gain_X: jax.Array
    value_P: jax.Array


def _unless_no_event(write: MemoryWrite, is_event: jax.Array) -> MemoryWrite:
    """What a slot that is no event writes: nothing; all that there was is kept."""
    log_keep_X, gain_X, value_P = write
    return MemoryWrite(jnp.where(is_event, log_keep_X, 0), jnp.where(is_event, gain_X, 0), value_P)


class _Kind(NamedTuple):
    """In what memories differ: parameters, rows, decay an hour of each row, writing, and reading.

    `read`, of a memory and of what is left of its rows, gives the mean `[M, P]` of what each slot holds, pulled to zero
    by one event's worth since little evidence counts for little, and its mass `[M]`.
    """

    init: Callable[[jax.Array], Any]
    n_rows: int
    rates: Callable[[Any], jax.Array]
    write: Callable[[Any, jax.Array], MemoryWrite]
    read: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def share_aspects(params: MemoryParams, x_D: jax.Array) -> jax.Array:
    """`[aspects]`, how an event is shared among the aspects; it adds up to 1."""
    return jax.nn.softmax(params.norm(x_D.astype(jnp.float32)) @ params.aspect_DX[...])


def _read_event(params: MemoryParams, x_D: jax.Array, sizes: MemorySizes) -> tuple[jax.Array, jax.Array]:
    """How much an event has to say to each slot, in (0, 1), and what; its last entry, 1, counts what was written."""
    share_X = share_aspects(params, x_D)
    x_D = params.norm(x_D.astype(jnp.float32))
    strength = 2 * jax.nn.sigmoid(jnp.sum(x_D * params.strength_D[...]))
    gain_M = jnp.repeat(strength * share_X, sizes.n_scales)
    return gain_M, jnp.append(x_D @ params.value_DP[...], 1.0)


def _of_aspects(sizes: MemorySizes, write: Callable) -> _Kind:
    """A memory whose rows are its slots."""

    def read(params: MemoryParams, memory_MP: jax.Array, left_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        mass_M = left_M * memory_MP[:, -1]
        return memory_MP[:, :-1] * (left_M / (mass_M + 1))[:, None], mass_M  # one product for each number that is held

    return _Kind(lambda key: MemoryParams(key, sizes), sizes.n_written, decay_rates, write, read)


def _make(sizes: MemorySizes, kind: _Kind, chunk: int) -> Personalizer:
    n_written = sizes.n_written
    offsets = tuple(sum(sizes.field_sizes[:f]) for f in range(len(sizes.field_sizes)))

    def init_user() -> UserState:
        memory_XP = jnp.zeros((kind.n_rows, sizes.d_memory + 1))
        return UserState(memory_XP, jnp.asarray(NO_TIME), jnp.zeros((), jnp.int32))

    def update(params: Any, state: UserState, event: Event) -> UserState:
        write = _unless_no_event(kind.write(params, event.x_D), jnp.asarray(event.is_event))
        hours = elapsed_since(state.time, event.time).astype(jnp.float32) / HOUR
        decay_X = jnp.exp(write.log_keep_X - kind.rates(params) * hours)
        memory_XP = decay_X[:, None] * state.memory_MP + write.gain_X[:, None] * write.value_P
        time = jnp.where(event.time == NO_TIME, state.time, event.time)
        return UserState(memory_XP, time, state.n_events + jnp.asarray(event.is_event, jnp.int32))

    def prefix_states(params: Any, event: Event, first_T: jax.Array, start: UserState | None = None) -> UserState:
        write_T = jax.vmap(lambda x_D: kind.write(params, x_D))(event.x_D)
        write_T = _unless_no_event(write_T, jnp.broadcast_to(event.is_event, first_T.shape)[:, None])
        # The time of the state that the row begins with, and then the events'.
        time_S = jnp.append(init_user().time if start is None else start.time, event.time)
        first_S = jnp.append(jnp.array([True, False]), first_T[1:])
        writes = Writes(accumulate_elapsed(time_S, first_S)[1:], kind.rates(params), *write_T, first_T)
        memory_TXP = chunked_exclusive_scan(writes, chunk)
        if start is not None:
            memory_TXP += carried_before(writes, start.memory_MP)
        known_T = last_known(time_S, first_S)[:-1]
        before_T = jnp.where(first_S[1:], NO_TIME, known_T)
        return UserState(memory_TXP, before_T, _count_before(first_T, event.is_event, start))

    def read_state(params: Any, state: UserState, request: ProfileRequest) -> ProfileState:
        left_X = _forget(kind.rates(params), state.time, request.time)
        mean_OP, mass_O = kind.read(params, state.memory_MP, left_X)
        field_D = None
        if offsets:
            rows_Y = request.field_Y + jnp.asarray(offsets, jnp.int32)
            field_D = sum_rows(params.field_XD[...], rows_Y, request.field_Y > 0)
        known_M = jnp.append(jnp.full(n_written, state.n_events > 0), jnp.any(request.field_Y > 0))
        held = ProfileState(mean_OP, jnp.log1p(mass_O), field_D, jnp.zeros(sizes.d_model))
        summary_D = held.slots(basis(params)).read(known_M[None] / (n_written + 1))[0]
        return held._replace(summary_D=summary_D)

    def basis(params: Any) -> Basis:
        parts = params.slot_MD, params.mass_MD, params.read_PD
        return Basis(*(x_XD[...][:, None] for x_XD in parts))

    return Personalizer(kind.init, init_user, update, read_state, prefix_states, basis, n_written + 1)


def _count_before(first_T: jax.Array, is_event: jax.Array | bool, start: UserState | None) -> jax.Array:
    """How many events of the same sequence stand before each slot, with those that `start` has seen."""
    is_event_T = jnp.broadcast_to(is_event, first_T.shape).astype(jnp.int32)
    before_T = jnp.cumsum(is_event_T) - is_event_T
    count_T = before_T - jax.lax.cummax(jnp.where(first_T, before_T, 0))
    return count_T if start is None else count_T + jnp.where(is_continued(first_T), start.n_events, 0)
