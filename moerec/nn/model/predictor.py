"""A trained model that answers, and how many of its parameters an answer depends on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moerec.config import ModelConfig
from moerec.nn.heads.answers import drop_component, log_prob_all
from moerec.nn.heads.item import score_items
from moerec.nn.model.parts import Below
from moerec.nn.model.sequence import SequenceModel
from moerec.nn.moe.experts import DomainExperts
from moerec.nn.moe.hypotheses import Hypotheses, ask_all, temper
from moerec.nn.profile import ProfileState
from moerec.types import Answers, Batch, Catalog, Outputs, PointerMixture


class Predictor(NamedTuple):
    """All that a trained model needs to answer: its parameters, and what is none of them.

    Attributes:
      params: the module. router_bias_LE: biases of its routers; None in a dense model.
      temperature: of the posterior by which the services' answers are weighed, fitted on validation.
      without: the place of a component that no score is mixed of, for a probe; the others share its weight.
    """

    params: SequenceModel
    router_bias_LE: jax.Array | None
    temperature: jax.Array | float = 1.0
    without: jax.Array | None = None

    def encode(self, batch: Batch, catalog: Catalog, **options: Any) -> Outputs:
        """`SequenceModel.encode` under the routers' biases."""
        return self.params.encode(batch, catalog, router_bias_LE=self.router_bias_LE, **options)

    def ask(self, batch: Batch, catalog: Catalog, flat_Q: jax.Array, hypotheses: Hypotheses, **options: Any) -> Answers:
        """`SequenceModel.ask` under the routers' biases."""
        options["router_bias_LE"] = self.router_bias_LE
        return self.params.ask(batch, catalog, flat_Q, hypotheses, **options)

    def weigh_services(self, below: Below, flat_Q: jax.Array) -> jax.Array:
        """`[Q, Z]`, log p(service) at flat slots, as it weighs the answers."""
        assert below.log_domain_BTZ is not None
        return temper(below.log_domain_BTZ.reshape(-1, below.log_domain_BTZ.shape[-1])[flat_Q], self.temperature)

    def score(
        self, batch: Batch, slot_Q: jax.Array, catalog: Catalog, profile: ProfileState | None = None
    ) -> jax.Array:
        """`[Q, I]` scores of all items of a bound catalogue at flat slots, whose softmax over the items is p(item).

        Where services are asked (all of them) they are its logarithm. At slot -1, where there is no history and no
        control slot, the biases speak alone.
        """
        if not self.config.is_asked:
            outputs = self.encode(batch, catalog, profile=profile)
            return score_items(outputs._replace(pointers=self._drop(outputs.pointers)), batch, slot_Q, catalog)
        flat_Q = jnp.maximum(slot_Q, 0)
        below = self.params.read(batch, catalog, profile)
        answers = self.ask(batch, catalog, flat_Q, ask_all(self.weigh_services(below, flat_Q)), below=below)
        answers = answers._replace(pointers=self._drop(answers.pointers))
        return self.weigh_answers(answers, slot_Q, catalog)

    def _drop(self, pointers: PointerMixture | None) -> PointerMixture | None:
        return pointers if pointers is None or self.without is None else drop_component(pointers, self.without)

    def weigh_answers(self, answers: Answers, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
        """`[Q, I]`, log p(item) by the answers of all services; at slot -1 by biases alone."""
        log_p_QI = log_prob_all(answers, catalog, self.params.service_offsets)
        assert self.params.analyser is not None
        log_bias_Z = temper(jax.nn.log_softmax(self.params.analyser.bias_Z[...]), self.temperature)
        nothing = Answers(
            jnp.broadcast_to(log_bias_Z, answers.log_service_QX.shape),
            answers.service_QX,
            jnp.zeros_like(answers.state_QXD),
            *(None, answers.item_QS, answers.log_domain_QZ, None, None),
        )
        log_prior_QI = log_prob_all(jax.tree.map(lambda x: x[:1], nothing), catalog, self.params.service_offsets)
        return jnp.where(slot_Q[:, None] >= 0, log_p_QI, log_prior_QI)

    @property
    def config(self) -> ModelConfig:
        return self.params.config


def count_params(model: SequenceModel) -> int:
    """All parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def count_params_by_part(model: SequenceModel) -> dict[str, int]:
    """Parameters of each part of the model, by the names of its attributes; of parts that have some."""
    found: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = str(getattr(path[0], "key", getattr(path[0], "name", path[0])))
        found[name] = found.get(name, 0) + leaf.size
    return found


def count_active_params(model: SequenceModel) -> int:
    """Parameters that a slot's prediction depends on: all but those of the experts that it does not go to."""
    total = count_params(model)
    moe = model.config.moe
    for blocks in model.groups:
        if isinstance(blocks.ffn, DomainExperts):
            matrices = (blocks.ffn.gate_EDF, blocks.ffn.up_EDF, blocks.ffn.down_EFD)
            n_experts = blocks.ffn.router_ED.shape[1]
            total -= sum(m.size // n_experts * (n_experts - moe.n_active) for m in matrices)
    return total
