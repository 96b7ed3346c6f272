"""A trained model that answers, and how many of its parameters an answer depends on."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from moerec.config import ModelConfig
from moerec.nn.heads.answers import drop_component, log_prob_all
from moerec.nn.heads.item import score_items
from moerec.nn.heads.query_blocks import map_blocks
from moerec.nn.model.parts import Below
from moerec.nn.model.sequence import SequenceModel
from moerec.nn.moe.experts import DomainExperts
from moerec.nn.moe.hypotheses import Hypotheses, ask_all, temper
from moerec.nn.profile import ProfileState
from moerec.types import Answers, Batch, Catalog, Outputs, PointerMixture

T = TypeVar("T")


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
        everything = slot_Q.shape[0] * catalog.service_I.shape[0]
        return self.map_scores(lambda score_QI: score_QI, batch, slot_Q, catalog, (), profile, everything)

    def map_scores(
        self,
        use: Callable[..., T],
        batch: Batch,
        slot_Q: jax.Array,
        catalog: Catalog,
        operands: Any = (),
        profile: ProfileState | None = None,
        most: int = 0,
    ) -> T:
        """`use(score_QI, *operands)` of the scores of all items, which stand in memory for a block of queries at a time.

        Args:
          use: what is made of the scores `[Q, I]` of a block; its results have a leading axis Q.
          operands: a tuple of trees of arrays with a leading axis Q. most: scores of a block, see `map_blocks`.
        """
        if self.config.is_asked:
            flat_Q = jnp.maximum(slot_Q, 0)
            below = self.params.read(batch, catalog, profile)
            answers = self.ask(batch, catalog, flat_Q, ask_all(self.weigh_services(below, flat_Q)), below=below)
            answers = answers._replace(pointers=self._drop(answers.pointers))
            return self.map_answers(use, answers, slot_Q, catalog, operands, most)
        outputs = self.encode(batch, catalog, profile=profile)
        outputs = outputs._replace(pointers=self._drop(outputs.pointers))

        def use_block(slot_Q: jax.Array, operands: Any) -> T:
            return use(score_items(outputs, batch, slot_Q, catalog), *operands)

        return map_blocks(use_block, (slot_Q, operands), catalog.service_I.shape[0], most)

    def map_answers(
        self,
        use: Callable[..., T],
        answers: Answers,
        slot_Q: jax.Array,
        catalog: Catalog,
        operands: Any = (),
        most: int = 0,
    ) -> T:
        """The same of the answers of all services, which are there already."""

        def use_block(answers: Answers, slot_Q: jax.Array, operands: Any) -> T:
            return use(self.weigh_answers(answers, slot_Q, catalog), *operands)

        answers = answers._replace(routing=None)  # the sums over all queries
        return map_blocks(use_block, (answers, slot_Q, operands), catalog.service_I.shape[0], most)

    def _drop(self, pointers: PointerMixture | None) -> PointerMixture | None:
        return pointers if pointers is None or self.without is None else drop_component(pointers, self.without)

    def weigh_answers(self, answers: Answers, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
        """`[Q, I]`, log p(item) by the answers of all services; at slot -1 by biases alone."""
        assert self.params.analyser is not None
        log_bias_Z = temper(jax.nn.log_softmax(self.params.analyser.bias_Z[...]), self.temperature)
        is_known_Q = slot_Q >= 0

        def pick(x_QX: jax.Array, empty: Any = 0) -> jax.Array:
            return jnp.where(is_known_Q.reshape(-1, *[1] * (x_QX.ndim - 1)), x_QX, empty)

        pointers, had_QS = answers.pointers, answers.had_QS
        if pointers is not None:  # the softmax is all, and nothing is pointed at
            weight, part = pick(pointers.log_weight_BTX), pick(pointers.part_BXTS)
            pointers = pointers._replace(log_weight_BTX=weight, part_BXTS=part)
        answers = answers._replace(
            log_service_QX=pick(answers.log_service_QX, log_bias_Z),
            state_QXD=pick(answers.state_QXD),
            pointers=pointers,
            had_QS=None if had_QS is None else pick(had_QS, False),
        )
        return log_prob_all(answers, catalog, self.params.service_offsets)

    @property
    def has_log_probs(self) -> bool:
        """Whether scores are log-probabilities already, and need no softmax."""
        return self.config.is_asked or self.config.has_pointers

    @property
    def config(self) -> ModelConfig:
        return self.params.config


def count_active_params(model: SequenceModel) -> int:
    """Parameters that a slot's prediction depends on: all but those of the experts that it does not go to."""
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    moe = model.config.moe
    for blocks in model.groups:
        if isinstance(blocks.ffn, DomainExperts):
            matrices = (blocks.ffn.gate_EDF, blocks.ffn.up_EDF, blocks.ffn.down_EFD)
            n_experts = blocks.ffn.router_ED.shape[1]
            total -= sum(m.size // n_experts * (n_experts - moe.n_active) for m in matrices)
    return total
