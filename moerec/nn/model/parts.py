"""What a model is made for, and what its layers above the trunk begin with."""

import dataclasses
from typing import NamedTuple

import jax

from moerec.config import ModelConfig
from moerec.config.checks import require
from moerec.nn.block import LayerContext


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What the data fixes about the model's shapes. Without items there are no events, and the model is one of text."""

    n_items: int
    n_tokens: int
    n_services: int
    n_actions: int
    context_sizes: tuple[int, ...]  # codes of each context feature, the first "missing"; the next one is "unseen"
    field_sizes: tuple[int, ...] = ()  # codes of each static profile field, the first of them "missing"
    has_control: bool = False  # whether sequences begin with the control slot `<|recommend|>`
    service_offsets: tuple[int, ...] = ()  # where each service's items begin in the catalogue, and its end
    d_states: int = 0  # width of the states of items' texts by a language model


TEXT_SIZES = ModelSizes(0, 0, 0, 0, ())  # of a model of text alone


class Below(NamedTuple):
    """What the layers above the trunk begin with.

    Attributes:
      x_BTD: states of the trunk, with what was read of the profile. event_BTD: the slots' own vectors.
      context: what layers see. log_domain_BTZ, relevance_BTM: as in `Outputs`.
      keys: one a layer in training, else None.
    """

    x_BTD: jax.Array
    event_BTD: jax.Array
    context: LayerContext
    log_domain_BTZ: jax.Array | None
    relevance_BTM: jax.Array | None
    keys: jax.Array | None


def refuse_parts(config: ModelConfig, has_events: bool) -> None:
    """Raises: InputError, where a model of text alone is to have parts that events are read by, or nothing to read."""
    if has_events:
        return
    require(config.text.vocab_size > 0, "model.text.vocab_size", "without items and without words there is no stream")
    for name, is_on in (
        ("personal.layers", bool(config.personal.layers)),
        ("ask.from_layer", config.is_asked),
        ("pointer", config.has_pointers),
    ):
        require(not is_on, f"model.{name}", "is of events, and there are no items")
