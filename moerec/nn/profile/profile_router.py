"""The profile in the model: every user's state before each slot, and which of its aspects matter to the request."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.layers import RMSNorm, declare, fan_in, project
from moerec.nn.profile.api import Event, Personalizer, ProfileMemory, ProfileRequest, ProfileState, UserState
from moerec.nn.profile.memory import MEMORIES, MemorySizes
from moerec.types import EVENT, TOKEN, Batch

NO_PROFILE, MEAN_PROFILE = -1, -2  # in the place of a slot whose profile is given


def make_personalizer(config: ModelConfig, field_sizes: tuple[int, ...]) -> Personalizer:
    """The variant that the config names."""
    personal = config.personal
    fields = field_sizes if personal.fields else ()
    sizes = MemorySizes(config.d_model, personal.n_aspects, personal.n_scales, personal.d_memory, fields, personal.rank)
    return MEMORIES[personal.memory](sizes, personal.chunk)


def count_profile_slots(config: ModelConfig) -> int:
    """M, memory slots of a profile: those that are written, and the one of the static fields; 0 without a profile."""
    return make_personalizer(config, ()).n_slots if config.personal.layers else 0


class Reading(NamedTuple):
    """What the profile router makes of the profile.

    Attributes:
      relevance_BTM: float32, adds up to one over the memory slots. log_relevance_BTM: its logarithm.
      read_BTD: what is added to the states; zero at first.
    """

    relevance_BTM: jax.Array
    log_relevance_BTM: jax.Array
    read_BTD: jax.Array


class ProfileRouter(nnx.Module):
    """Cross-attention of each slot over the memory slots of its user's profile (the profile router)."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        d = config.d_model
        self.norm = RMSNorm(d, config.norm_eps)
        self.query_DD = declare(key, (d, d), ("embed", None), fan_in)
        zeros = jax.nn.initializers.zeros
        self.out_DD = declare(key, (d, d), (None, "embed"), zeros) if config.personal.read else None

    def __call__(self, x_BTD: jax.Array, memory: ProfileMemory) -> Reading:
        d = x_BTD.shape[-1]
        query_BTD = project(self.norm(x_BTD.astype(jnp.float32)), self.query_DD[...])
        log_BTM = jax.nn.log_softmax(memory.score(query_BTD[:, :, None])[:, :, 0] * d**-0.5)
        relevance_BTM = jnp.exp(log_BTM)
        read_BTD = jnp.zeros_like(query_BTD)
        if self.out_DD is not None:
            read_BTD = project(memory.read(relevance_BTM[:, :, None])[:, :, 0], self.out_DD[...])
        return Reading(relevance_BTM, log_BTM, read_BTD)


def read_slot_profiles(
    personalizer: Personalizer,
    params,
    batch: Batch,
    event_BTD: jax.Array,
    fields: bool,
    start_B: UserState | None = None,
) -> ProfileState:
    """The `ProfileState` of every slot, `[B, T, ...]`: the state before its event, as of its request.

    Args:
      event_BTD: vectors of the events. fields: whether the static profile fields are read.
      start_B: states `[B, ...]` before the rows' first sequences; None: of nobody.
    """
    request = batch.request
    field_BTY = request.field_BTY if fields else request.field_BTY[..., :0]
    first_BT = batch.position_BT == 0

    def of_row(event, first_T, start):
        return personalizer.prefix_states(params, event, first_T, start)

    events = Event(event_BTD, batch.time_BT, batch.kind_BT == EVENT)
    read_BT = jax.vmap(of_row)(events, first_BT, start_B), ProfileRequest(request.time_BT, field_BTY)
    # All slots along one axis, so that products with weights are of two matrices.
    shape = first_BT.shape
    read_S = jax.tree.map(lambda x: x.reshape(first_BT.size, *x.shape[2:]), read_BT)
    profile_S = jax.vmap(lambda state, request: personalizer.read(params, state, request))(*read_S)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), profile_S)


def has_profile(batch: Batch) -> jax.Array:
    """`[B, T]` bool, slots at or before which their sequence has an event or a control token; text alone has none."""
    slot_T = jnp.arange(batch.kind_BT.shape[1])
    of_user_BT = (batch.kind_BT != TOKEN) & (batch.segment_BT > 0)
    last_BT = jax.lax.cummax(jnp.where(of_user_BT, slot_T, -1), axis=1)
    return last_BT >= slot_T - batch.position_BT


def swap_profiles(
    profile: ProfileState, profile_source_BT: jax.Array, is_slot_BT: jax.Array, nobody: ProfileState
) -> ProfileState:
    """Other profiles in the place of the slots' own.

    Args:
      profile_source_BT: int32 flat slot whose profile each slot gets, or `NO_PROFILE`, or `MEAN_PROFILE`: that of all
        slots.
      is_slot_BT: which slots count for the mean. nobody: of a user of whom nothing is known.
    """

    def pick(own_BTX: jax.Array, nothing_X: jax.Array) -> jax.Array:
        def over(mask_BT):
            return mask_BT.reshape(mask_BT.shape + (1,) * nothing_X.ndim)

        given = own_BTX.reshape(profile_source_BT.size, *nothing_X.shape)[jnp.maximum(profile_source_BT, 0)]
        mean = jnp.sum(jnp.where(over(is_slot_BT), own_BTX, 0), axis=(0, 1)) / jnp.maximum(jnp.sum(is_slot_BT), 1)
        given = jnp.where(over(profile_source_BT == MEAN_PROFILE), mean, given)
        return jnp.where(over(profile_source_BT == NO_PROFILE), nothing_X, given)

    return jax.tree.map(pick, profile, nobody)
