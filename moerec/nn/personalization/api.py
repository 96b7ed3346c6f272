"""What a personaliser is: four pure functions for one person, and one that does a whole packed row at once.

After the grammar of optax: a variant is a function that returns a `Personalizer`; parameters and states are pytrees
that the caller holds, and everything is written for one person, to be vmapped. Letters: D model width, M memory slots,
P width of the memory, T slots, Y static profile fields.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Params = Any


class UserState(NamedTuple):
    """All that is kept of a person between events; of fixed size, whatever the length of their history.

    Attributes:
      memory_MP: float32, rows of what is kept (a row a slot, but in `low_rank_memory`); the last column counts writes.
      time: int32 seconds since 2000 of their last event with a known time, or `NO_TIME`; the memory is as of then.
      n_events: int32.
    """

    memory_MP: jax.Array
    time: jax.Array
    n_events: jax.Array


class Event(NamedTuple):
    """What the person did: the event's vector (item, service, action) `x_D`, and its time, int32."""

    x_D: jax.Array
    time: jax.Array


class Request(NamedTuple):
    """When something is wanted, int32 (may be `NO_TIME`), and the static profile fields' codes `[Y]`, 0 missing."""

    time: jax.Array
    field_Y: jax.Array


class Condition(NamedTuple):
    """What the model is conditioned on.

    Attributes:
      slot_MD: float32, the memory slots as vectors, for attention to read; a learned vector where nothing is known.
      summary_D: float32, the profile as one vector; zero where nothing is known.
    """

    slot_MD: jax.Array
    summary_D: jax.Array


class Personalizer(NamedTuple):
    """A way to keep and use a profile.

    Attributes:
      init: `(key) -> params`.
      init_user: `() -> UserState`, of somebody of whom nothing is known.
      observe: `(params, UserState, Event) -> UserState`, O(1).
      condition: `(params, UserState, Request) -> Condition`.
      unroll: `(params, Event of [T, ...], first_T) -> UserState of [T, ...]`, the states *before* each slot of a packed
        row, as `observe` would give them one after the other; `first_T` says where a new person starts.
      n_slots: M of `Condition`.
    """

    init: Callable[[jax.Array], Params]
    init_user: Callable[[], UserState]
    observe: Callable[[Params, UserState, Event], UserState]
    condition: Callable[[Params, UserState, Request], Condition]
    unroll: Callable[[Params, Event, jax.Array], UserState]
    n_slots: int
