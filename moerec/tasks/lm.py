"""Language modelling: which token comes next, at every word of a document."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.data.packing import Packed
from moerec.errors import InputError
from moerec.nn.model import SequenceModel
from moerec.tasks.base import Draws, TaskSums, register_task
from moerec.types import Batch, Catalog, Outputs, Target


@register_task("lm")
class LanguageModel:
    """Cross-entropy of the next token of the same document; a document's last token predicts nothing."""

    name = "lm"

    def check(self, config: Config) -> None:
        if not config.model.text.vocab_size:
            raise InputError("config.model.text.vocab_size: the task lm needs words")

    def render(self, packed: Packed) -> Target:
        if packed.next_token_BT is None:
            raise InputError("config.tasks: the task lm needs words, and this stream (data.source) has none")
        weight_BT = (packed.next_token_BT >= 0).astype(np.float32)
        return Target(np.maximum(packed.next_token_BT, 0), weight_BT)

    def constants(self, catalog: Catalog, config: Config) -> None:
        return None

    def binds_catalog(self, config: Config) -> bool:
        return False

    def domains(self, target: Target, catalog: Catalog) -> jax.Array | None:
        # Words have no service: beside events their routing is not counted, and alone it is all of one domain.
        if catalog.service_I.shape[0]:
            return None
        return jnp.where(target.weight_BT > 0, 0, -1)

    def draw(self, key: jax.Array, batch: Batch, catalog: Catalog, constants: Any, config: Config) -> Draws:
        return Draws()

    def loss(
        self, model: SequenceModel, outputs: Outputs, batch: Batch, catalog: Catalog, draws: Draws, config: Config
    ) -> TaskSums:
        target = batch.targets[self.name]
        nll = sum_token_nll(model, outputs, target, config.loss.vocab_chunk)
        return TaskSums(nll, jnp.sum(target.weight_BT), {"loss": nll})


def sum_token_nll(model: SequenceModel, outputs: Outputs, target: Target, chunk: int) -> jax.Array:
    """The weighted sum of the targets' negative log-probabilities. Args: chunk: `loss.vocab_chunk`."""
    assert model.text_head is not None
    assert model.token_encoder is not None
    state_SD = outputs.state_BTD.reshape(-1, outputs.state_BTD.shape[-1])
    slots = state_SD, target.label_BT.reshape(-1), target.weight_BT.reshape(-1)
    return model.text_head.sum_nll(*slots, model.token_encoder, chunk)
