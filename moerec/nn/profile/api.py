"""What a personaliser is: pure functions for one user, and one that does a whole packed row at once.

After the grammar of optax: a variant is a function that returns a `Personalizer`; parameters and states are pytrees
that the caller holds, and everything is written for one user, to be vmapped. Letters as in `moerec.types`; O of the
M memory slots are written to, and X are aspects, time scales, ranks and places.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Params = Any


class UserState(NamedTuple):
    """All that is kept of a user between events; of fixed size, whatever the length of their history.

    Attributes:
      memory_MP: float32, rows of what is kept (a row a slot, but in `low_rank_memory`); the last column counts writes.
      time: int32 seconds since 2000 of their last event with a known time, or `NO_TIME`; the memory is as of then.
      n_events: int32.
    """

    memory_MP: jax.Array
    time: jax.Array
    n_events: jax.Array


class Event(NamedTuple):
    """What the user did: the event's vector (item, service, action) `x_D`, and its time, int32.

    `is_event` is false for a slot that is none: it writes nothing and is not counted.
    """

    x_D: jax.Array
    time: jax.Array
    is_event: jax.Array | bool = True


class ProfileRequest(NamedTuple):
    """When something is wanted, int32 (may be `NO_TIME`), and the static profile fields' codes `[Y]`, 0 missing."""

    time: jax.Array
    field_Y: jax.Array


class Basis(NamedTuple):
    """What the memory slots of all users have in common: see `ProfileMemory`. A personaliser's own has N 1 and H D."""

    base_MNH: jax.Array
    mass_ONH: jax.Array
    read_PNH: jax.Array


class ProfileState(NamedTuple):
    """What the model is conditioned on, float32; O = M - 1 slots are written to, the last one is that of the fields.

    Attributes:
      mean_OP: what each slot holds. evidence_O: logarithm of one more than the events' worth that it holds.
      field_D: what the static fields say; None where the schema has none.
      summary_D: the profile as one vector; zero where nothing is known.
    """

    mean_OP: jax.Array
    evidence_O: jax.Array
    field_D: jax.Array | None
    summary_D: jax.Array

    def slots(self, basis: Basis) -> "ProfileMemory":
        """The memory slots; works on conditions of many places, too."""
        field_1D = None if self.field_D is None else self.field_D[..., None, :]
        return ProfileMemory(basis, self.mean_OP, self.evidence_O, field_1D)


class ProfileMemory(NamedTuple):
    """The memory slots of many places X as vectors, `base + mean @ read + evidence * mass`, the last `base + field`.

    Each head has vectors of its own, or all have one (N is 1). They are attended to by their parts: `[X, M, N, H]`
    would be most of what a training pass over a profile holds, and P is smaller than N H (what DeepSeek-AI 2024 does
    with low-rank keys).
    """

    basis: Basis
    mean_XOP: jax.Array
    evidence_XO: jax.Array
    field_XNH: jax.Array | None

    def project(self, w_DNH: jax.Array, dtype: DTypeLike) -> "ProfileMemory":
        """The slots as keys or values of heads. Of what is a user's own, only the static fields are multiplied."""
        basis = Basis(*(jnp.einsum("XD,DNH->XNH", part.squeeze(1), w_DNH) for part in self.basis))
        if self.field_XNH is None:
            return self._replace(basis=basis)
        field_XNH = jnp.einsum("...D,DNH->...NH", self.field_XNH.squeeze(-2).astype(dtype), w_DNH.astype(dtype))
        return self._replace(basis=basis, field_XNH=field_XNH)

    def score(self, query_XNH: jax.Array) -> jax.Array:
        """float32 `[X, N, M]`, the dot products of queries with the slots of their place."""
        dtype, (n_slots, n_written, _) = query_XNH.dtype, map(len, self.basis)
        found_XNB = _einsum("...nh,bnh->...nb", query_XNH, jnp.concatenate(self.basis).astype(dtype))
        shared_XNM, counted_XNO, read_XNP = jnp.split(found_XNB, [n_slots, n_slots + n_written], axis=-1)
        written_XNO = _einsum("...np,...wp->...nw", read_XNP.astype(dtype), self.mean_XOP.astype(dtype))
        written_XNO += self.evidence_XO[..., None, :] * counted_XNO
        field_XN1 = jnp.zeros_like(written_XNO[..., :1])
        if self.field_XNH is not None:
            field_XN1 = _einsum("...nh,...nh->...n", query_XNH, self.field_XNH.astype(dtype))[..., None]
        return shared_XNM + jnp.concatenate([written_XNO, field_XN1], axis=-1)

    def read(self, weight_XNM: jax.Array) -> jax.Array:
        """float32 `[X, N, H]`, sums of the slots with these float32 weights."""
        weight_XNO = weight_XNM[..., :-1]
        counted_XNO = weight_XNO * self.evidence_XO[..., None, :]
        held_XNP = _einsum("...nw,...wp->...np", weight_XNO, self.mean_XOP)
        weight_XNB = jnp.concatenate([weight_XNM, counted_XNO, held_XNP], axis=-1)
        read_XNH = _einsum("...nb,bnh->...nh", weight_XNB, jnp.concatenate(self.basis))
        return read_XNH if self.field_XNH is None else weight_XNM[..., -1:] * self.field_XNH + read_XNH


def _einsum(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


class Personalizer(NamedTuple):
    """A way to keep and use a profile.

    Attributes:
      init: `(key) -> params`.
      init_user: `() -> UserState`, of somebody of whom nothing is known.
      update: `(params, UserState, Event) -> UserState`, O(1).
      read: `(params, UserState, ProfileRequest) -> ProfileState`.
      prefix_states: `(params, Event of [T, ...], first_T, start=None) -> UserState of [T, ...]`, the states *before*
        each slot of a packed row, as `update` would give them one after the other; `first_T` says where a new user
        starts. The first of the row has the state `start` before their first slot, or is nobody yet.
      basis: `(params) -> Basis`.
      n_slots: M of `ProfileMemory`.
    """

    init: Callable[[jax.Array], Params]
    init_user: Callable[[], UserState]
    update: Callable[[Params, UserState, Event], UserState]
    read: Callable[[Params, UserState, ProfileRequest], ProfileState]
    prefix_states: Callable[..., UserState]
    basis: Callable[[Params], Basis]
    n_slots: int
