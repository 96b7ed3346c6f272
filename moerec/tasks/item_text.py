"""Items and their texts: which item a text is of, and which text an item has (rows of `data.mix.item_texts`)."""

import jax

from moerec.config import Config
from moerec.data.packing import Packed
from moerec.errors import InputError
from moerec.tasks.base import register_task
from moerec.tasks.lm import LanguageModel
from moerec.tasks.next_event import NextEvent
from moerec.types import Catalog, Target


@register_task("text_to_item")
class TextToItem(NextEvent):
    """The item, at the control token behind its text; by the item head and the loss of `next_event`."""

    name = "text_to_item"

    def check(self, config: Config) -> None:
        super().check(config)
        _require_words(self.name, config)
        if not config.data.first_event:
            raise InputError(f"config.data.first_event: the task {self.name} needs the control token")


@register_task("item_to_text")
class ItemToText(LanguageModel):
    """The first token of an item's text at the item's event, and each token at the one before."""

    name = "item_to_text"

    def check(self, config: Config) -> None:
        _require_words(self.name, config)

    def domains(self, target: Target, catalog: Catalog) -> jax.Array | None:
        return None

    def render(self, packed: Packed) -> Target:
        assert packed.next_token_BT is not None
        return super().render(packed)


def _require_words(name: str, config: Config) -> None:
    if not config.model.text.vocab_size:
        raise InputError(f"config.model.text.vocab_size: the task {name} needs words")
