"""The first task: which item comes next, at every slot; and, for the analyser, of which service it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.data.packing import Packed
from moerec.errors import InputError
from moerec.nn.heads.item import TargetItems
from moerec.nn.model import SequenceModel
from moerec.tasks.base import Draws, TaskSums, register_task
from moerec.tasks.losses import LOSSES, DrawInputs, SamplingTable, draw_all, make_sampling_table
from moerec.types import Batch, Catalog, Outputs, Target


@register_task("next_event")
class NextEvent:
    """Next-item prediction (SASRec: Kang & McAuley 2018), the loss by `loss.kind`."""

    name = "next_event"

    def check(self, config: Config) -> None:
        check_loss(config)

    def render(self, packed: Packed) -> Target:
        is_asked_BT = (packed.batch.segment_BT > 0) & (packed.next_item_BT >= 0)
        return Target(np.maximum(packed.next_item_BT, 0), is_asked_BT.astype(np.float32))

    def constants(self, catalog: Catalog, config: Config) -> SamplingTable:
        """`make_sampling_table`."""
        return make_sampling_table(catalog.count_I, config.loss.sampling_power, config.model.untrained_rows)

    def binds_catalog(self, config: Config) -> bool:
        # The full softmax needs the vectors of all items anyway: then no text is read for each slot that it stands in.
        return LOSSES[config.loss.kind].draw is draw_all

    def domains(self, target: Target, catalog: Catalog) -> jax.Array:
        return jnp.where(target.weight_BT > 0, catalog.service_I[target.label_BT], -1)

    def draw(self, key: jax.Array, batch: Batch, catalog: Catalog, constants: Any, config: Config) -> Draws:
        loss = LOSSES[config.loss.kind]
        target_BT = batch.targets[self.name].label_BT
        candidates = loss.draw(key, DrawInputs(target_BT, catalog, constants, config.loss))
        return Draws(by_row=candidates) if loss.by_row else Draws(shared=candidates)

    def loss(
        self, model: SequenceModel, outputs: Outputs, batch: Batch, catalog: Catalog, draws: Draws, config: Config
    ) -> TaskSums:
        target, options = batch.targets[self.name], config.loss
        assert model.head is not None
        assert model.item_encoder is not None
        targets = TargetItems(
            model.head,
            model.item_encoder,
            outputs,
            batch,
            catalog,
            target.label_BT.reshape(-1),
            target.weight_BT.reshape(-1),
            options.by_service,
            options.chunk,
            config.model.is_asked,
        )
        candidates = draws.shared if draws.by_row is None else draws.by_row
        item = LOSSES[options.kind].function(targets, candidates, options)
        total, parts = item, {"loss": item}
        if outputs.log_domain_BTZ is not None:
            service_BT = catalog.service_I[target.label_BT]
            log_p_BT = jnp.take_along_axis(outputs.log_domain_BTZ, service_BT[..., None], axis=-1)[..., 0]
            parts["analyser"] = -jnp.sum(target.weight_BT * log_p_BT)
            if not config.model.is_asked:  # there it is a part of the item's log-probability
                total += options.analyser_weight * parts["analyser"]
        return TaskSums(total, jnp.sum(target.weight_BT), parts)


def check_loss(config: Config) -> None:
    """Raises: InputError, where the loss is not known, or does not go with the model's head."""
    loss = LOSSES[config.loss.kind]
    is_union = loss.is_normalised and not config.loss.by_service
    if config.model.has_pointers and not is_union:
        # A pointer adds to the probability of an item among those of all services.
        raise InputError("config.model.pointer: needs a softmax over the union (loss.kind, loss.scope)")
    if config.model.is_asked and not is_union:
        # The posterior over services is learnt as a factor of the item's probability.
        raise InputError("config.model.ask.from_layer: needs a softmax over the union (loss.kind, loss.scope)")
