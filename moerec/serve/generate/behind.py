"""Text behind events: a prefix of events and words goes through the whole model, and what text sees of it is kept.

Behind its last event a user's profile stays what it is, so that of its memory one state a sequence is needed. Memory
slots are extra keys and values of the personal layers, and attention knows times and services of the events.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from moerec.errors import InputError
from moerec.nn.attention import ProfileAttention, ProfileContext
from moerec.nn.block import split_layers
from moerec.nn.cache import AskedSlots, bias_asked
from moerec.nn.model import SequenceModel
from moerec.nn.model.prompt import read_prompt
from moerec.nn.profile.profile_router import ProfileRouter
from moerec.serve.generate.cache import SLOT_AXIS, KVCache, keep_prompt
from moerec.types import TOKEN, Batch, Catalog


class Behind(NamedTuple):
    """Attributes:
    context: the profile at each sequence's last slot, `[B, 1, ...]`. personal: of each layer what the profile adds to
    attention, or None. router: the profile router, or None.
    """

    context: ProfileContext
    personal: tuple[ProfileAttention | None, ...]
    router: ProfileRouter | None

    def route(self, x_BTD: jax.Array) -> tuple[jax.Array, "Behind"]:
        """The trunk's states with what is read of the profile, and how much each memory slot matters to them."""
        if self.router is None:
            return x_BTD, self
        reading = self.router(x_BTD, self.context.slots)
        context = self.context._replace(log_relevance_BTM=reading.log_relevance_BTM)
        return x_BTD + reading.read_BTD.astype(x_BTD.dtype), self._replace(context=context)

    def bias(self, personal: ProfileAttention, about: tuple[jax.Array, ...]) -> jax.Array:
        """`[B, 1, N or 1, S or 1]`, what a layer adds to logits. Args: times and services of the slots."""
        time_BS, service_BS = (x[:, 0, :, 0] for x in about)
        nothing: Any = None
        asked = AskedSlots(*(nothing,) * 5, self.context.time_BT, time_BS, service_BS, self.context)
        return bias_asked(personal, asked)[0]


def read_behind(
    model: SequenceModel, router_bias_LE: jax.Array | None, batch: Batch, catalog: Catalog, n_slots: int
) -> tuple[KVCache, Behind | None, jax.Array]:
    """The cache of S slots, what text behind is given, and the states `[B, T, D]` of the last layer.

    Args: rows of one sequence each, padded on the left, whose last slot is a word.
    """
    prompt = read_prompt(model, batch, catalog, router_bias_LE)
    keys, values = zip(*prompt.keys, strict=True)
    k = tuple(keep_prompt(x, n_slots, SLOT_AXIS.k) for x in keys)
    v = tuple(keep_prompt(x, n_slots, SLOT_AXIS.v) for x in values)
    profile = prompt.context.profile
    if profile is None:
        return KVCache(k, v), None, prompt.x_BTD
    about = tuple(
        keep_prompt(x[..., None, None], n_slots, SLOT_AXIS.about) for x in (profile.time_BT, profile.service_BT)
    )
    slots = profile.slots
    field = None if slots.field_XNH is None else slots.field_XNH[:, -1:]
    slots = slots._replace(mean_XOP=slots.mean_XOP[:, -1:], evidence_XO=slots.evidence_XO[:, -1:], field_XNH=field)
    rest = profile._replace(slots=None)  # type: ignore[arg-type]
    context = jax.tree.map(lambda x: x[:, -1:], rest)._replace(slots=slots)
    personal: list[ProfileAttention | None] = []
    for blocks, group in zip(model.groups, split_layers(model.config), strict=True):
        for layer in range(group.last - group.first):
            own = blocks.attention.personal
            personal.append(None if own is None else jax.tree.map(lambda a, layer=layer: a[layer], own))
    return KVCache(k, v, about), Behind(context, tuple(personal), model.profile_router), prompt.x_BTD


def pad_left(batch: Batch, n_rows: int, n_places: int, first: int = 0) -> tuple[Batch, np.ndarray]:
    """The batch with its sequences at the right ends of rows, and how many slots each has.

    Args: rows and slots of what is returned; the number of the first prompt, to name others by.

    Raises:
      InputError: a row holds no sequence, several, or one whose last slot is no word.
    """
    segment_BT, kind_BT = np.asarray(batch.segment_BT), np.asarray(batch.kind_BT)
    length_B = np.zeros(n_rows, np.int32)
    rows = []
    for row, segment_T in enumerate(segment_BT):
        (place,) = np.nonzero(segment_T)
        if len(np.unique(segment_T[place])) != 1 or len(place) != place[-1] - place[0] + 1:
            raise InputError(f"prompt {first + row + 1}: one sequence is needed in a row")
        if kind_BT[row, place[-1]] != TOKEN:
            raise InputError(f"prompt {first + row + 1}: its last slot has to be a word, which text goes on from")
        rows.append(slice(place[0], place[-1] + 1))
        length_B[row] = len(place)

    def move(x_BTX: np.ndarray) -> np.ndarray:
        moved = np.zeros((n_rows, n_places, *np.shape(x_BTX)[2:]), np.asarray(x_BTX).dtype)
        for row, own in enumerate(rows):
            moved[row, n_places - length_B[row] :] = np.asarray(x_BTX)[row, own]
        return moved

    return jax.tree.map(move, batch._replace(targets={})), length_B
