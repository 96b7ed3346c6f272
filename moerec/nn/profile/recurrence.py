"""The recurrence under every memory, for all slots of packed sequences at once: `m_t = a_t m_(t-1) + g_t v_t`.

Letters: M memory slots, P width of what is written. The decay `a_t` and the gain `g_t` are a number a memory slot,
`v_t` a vector that all of them share. Wanted is the state *before* each slot, `m_(t-1)`, as it was after slot t - 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.types import NO_TIME

HOUR = 3600.0


class Writes(NamedTuple):
    """What a sequence of slots does to a memory.

    Attributes:
      elapsed_T: uint32 seconds, of which only differences within a sequence mean anything (they wrap round).
      rate_M: decay an hour of each memory slot, at least 0.
      log_keep_TM: log of what a slot leaves of the memory beside the decay by time, at most 0.
      gain_TM, value_TP: how much of it is written, and what.
      first_T: bool, where a sequence starts, with an empty memory.
    """

    elapsed_T: jax.Array
    rate_M: jax.Array
    log_keep_TM: jax.Array
    gain_TM: jax.Array
    value_TP: jax.Array
    first_T: jax.Array


def last_known(time_T: jax.Array, first_T: jax.Array) -> jax.Array:
    """The last known time up to and with each slot of its sequence, or `NO_TIME`."""

    def join(earlier, later):
        carried = jnp.where(later[1], NO_TIME, earlier[0])
        return jnp.where(later[0] == NO_TIME, carried, later[0]), earlier[1] | later[1]

    return jax.lax.associative_scan(join, (time_T, first_T))[0]


def elapsed_since(earlier: jax.Array, later: jax.Array) -> jax.Array:
    """Whole seconds from one time to another; 0 where one is not known or the order is wrong.

    uint32: what any two times have between them, where an int32 would wrap round after 68 years.
    """
    known = (earlier != NO_TIME) & (later != NO_TIME) & (later > earlier)
    return jnp.where(known, jnp.subtract(later, earlier).astype(jnp.uint32), jnp.uint32(0))


def accumulate_elapsed(time_T: jax.Array, first_T: jax.Array) -> jax.Array:
    """`Writes.elapsed_T` of the slots' times, of which any may be unknown: such a slot stands at the time before it."""
    before_T = jnp.where(first_T, NO_TIME, jnp.pad(last_known(time_T, first_T)[:-1], (1, 0), constant_values=NO_TIME))
    return jnp.cumsum(elapsed_since(before_T, time_T), dtype=jnp.uint32)


def is_continued(first_T: jax.Array) -> jax.Array:
    """Which slots belong to the first sequence of the row."""
    return jnp.cumsum(first_T) <= first_T[0]


def carried_before(writes: Writes, state_MP: jax.Array) -> jax.Array:
    """`[T, M, P]`, what is left before each slot of a state that the row's first sequence began with.

    The state is as of when `elapsed_T` counts from.
    """
    hours_T = jnp.pad(writes.elapsed_T[:-1], (1, 0)).astype(jnp.float32) / HOUR
    log_keep_TM = jnp.cumsum(writes.log_keep_TM, axis=0) - writes.log_keep_TM
    left_TM = jnp.exp(log_keep_TM - writes.rate_M * hours_T[:, None])
    return jnp.where(is_continued(writes.first_T)[:, None], left_TM, 0)[:, :, None] * state_MP


def exclusive_scan(writes: Writes) -> jax.Array:
    """The states `[T, M, P]` by an associative scan: log T passes over arrays of the result's size."""
    elapsed_T, rate_M, log_keep_TM, gain_TM, value_TP, first_T = writes
    step_T = jnp.diff(elapsed_T, prepend=elapsed_T[:1]).astype(jnp.float32) / HOUR
    decay_TM = jnp.where(first_T[:, None], 0, jnp.exp(log_keep_TM - rate_M * step_T[:, None]))
    written_TMP = gain_TM[:, :, None] * value_TP[:, None, :]

    def join(earlier, later):
        return earlier[0] * later[0], earlier[1] * later[0][..., None] + later[1]

    _, after_TMP = jax.lax.associative_scan(join, (decay_TM, written_TMP))
    before_TMP = jnp.pad(after_TMP[:-1], ((1, 0), (0, 0), (0, 0)))
    return jnp.where(first_T[:, None, None], 0, before_TMP)


def chunked_exclusive_scan(writes: Writes, chunk: int = 64) -> jax.Array:
    """The same by chunks: matmuls within a chunk, a scan over the states at their ends.

    What slot u wrote is found before slot t with the factor of the decays in between: the states are `[C, C] @ [C, P]`
    for each memory slot (the chunkwise form of linear attention: Hua et al. 2022, Yang et al. 2023). The factors come
    from differences of logs, never from quotients, so nothing overflows; the share of time from whole seconds, so that
    a long gap earlier in the chunk costs no digits.
    """
    t, m = writes.log_keep_TM.shape
    size = min(chunk, t)
    rate_M = writes.rate_M
    earlier_CC = jnp.tril(jnp.ones((size, size), bool), -1)

    def split(x):
        # What fills the last chunk up is nobody's: each such slot starts a sequence of its own.
        fill = ((0, -t % size), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, fill, constant_values=x.dtype == bool).reshape(-1, size, *x.shape[1:])

    def decay(elapsed, log_keep):
        return jnp.exp(log_keep - rate_M * (elapsed[..., None].astype(jnp.float32) / HOUR))

    def step(carry, part):
        state_MP, since = carry
        elapsed_C, log_keep_CM, gain_CM, value_CP, first_C = part
        before_C = jnp.concatenate([since[None], elapsed_C[:-1]])  # when the slot before was
        begun_C = jnp.cumsum(first_C)  # sequences begun in this chunk so far: the one of each slot, 0 is carried over
        sum_CM = jnp.cumsum(log_keep_CM, axis=0)
        until_CM = sum_CM - log_keep_CM
        visible_CC = earlier_CC & (begun_C[:, None] == begun_C)
        hours_CC = jnp.where(visible_CC, before_C[:, None] - elapsed_C, 0).astype(jnp.float32) / HOUR
        # Slots that wrote come last, as the product wants them, so that nothing is copied for it.
        log_CMC = jnp.where(visible_CC[:, None], until_CM[:, :, None] - sum_CM.T, -jnp.inf)
        factor_CMC = jnp.exp(log_CMC - rate_M[:, None] * hours_CC[:, None]) * gain_CM.T
        own_CMP = (factor_CMC.reshape(size * m, size) @ value_CP).reshape(size, m, -1)
        is_carried_C = begun_C == 0
        span_C = jnp.where(is_carried_C, before_C - since, 0)
        carried_CM = jnp.where(is_carried_C[:, None], decay(span_C, until_CM), 0)
        before_CMP = own_CMP + carried_CM[:, :, None] * state_MP
        last_M = decay(jnp.where(first_C[-1], 0, elapsed_C[-1] - before_C[-1]), log_keep_CM[-1])
        after_MP = last_M[:, None] * before_CMP[-1] + gain_CM[-1][:, None] * value_CP[-1]
        return (after_MP, elapsed_C[-1]), before_CMP

    parts = tuple(split(x) for name, x in writes._asdict().items() if name != "rate_M")
    zero = jnp.zeros((m, writes.value_TP.shape[1]), writes.value_TP.dtype)
    # Backward keeps the states at the chunks' ends and forms the rest anew: memory stays that of the result.
    _, before = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), (zero, writes.elapsed_T[0]), parts)
    return before.reshape(-1, m, writes.value_TP.shape[1])[:t]
