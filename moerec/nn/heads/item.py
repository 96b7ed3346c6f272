"""p(item): a softmax over the catalogue, mixed with pointers into the history; in `score_items` of all items, in
`TargetItems` of the targets alone, chunk by chunk. It is computed nowhere else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.embeddings import ItemEncoder
from moerec.nn.heads.pointer import AnswerAggregator
from moerec.nn.heads.xent import Mixture, XentCandidates, XentSlots, chunked_log_prob, chunked_softmax_xent
from moerec.nn.layers import declare
from moerec.types import Batch, Catalog, Outputs, PointerMixture


class Candidates(NamedTuple):
    """Items against which a target is normalised.

    Attributes:
      item_J: int32 catalogue indices.
      correction_J: float32 added to their scores (0, or -log of the expected number of draws).
    """

    item_J: jax.Array
    correction_J: jax.Array


class ItemHead(nnx.Module):
    """Scores of items against a state, and the mixture of their softmax with the pointers."""

    def __init__(self, key: jax.Array, config: ModelConfig, n_items: int, n_tokens: int, n_services: int):
        k_pointer, k_untied = (jax.random.fold_in(key, n) for n in (4, 5))
        self.encoder = None if config.tie_items else ItemEncoder(k_untied, config, n_items, n_tokens)
        self.aggregator = AnswerAggregator(k_pointer, config, n_services) if config.has_pointers else None
        zeros = jax.nn.initializers.zeros
        self.bias_I = declare(key, (n_items,), ("items",), zeros, decay="none") if config.item_bias else None

    def vectors(self, item_X: jax.Array, catalog: Catalog, tied: ItemEncoder) -> tuple[jax.Array, jax.Array]:
        """Vectors `[..., D]` and biases `[...]` of candidates; a state's score is its dot product plus the bias."""
        if catalog.vector_ID is not None:
            assert catalog.bias_I is not None
            return catalog.vector_ID[item_X], catalog.bias_I[item_X]
        encoder = tied if self.encoder is None else self.encoder
        bias = jnp.zeros(item_X.shape, jnp.float32) if self.bias_I is None else self.bias_I[...][item_X]
        return encoder(item_X, catalog), bias


def score_items(outputs: Outputs, batch: Batch, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
    """Scores `[Q, I]` of all items of a bound catalogue at flat slots; the softmax of a row is p(item).

    Where pointers are mixed in, they are log-probabilities. At slot -1, where there is no history and no control slot,
    the biases speak alone.
    """
    vector_ID, bias_I = catalog.vector_ID, catalog.bias_I
    assert vector_ID is not None
    known_Q1, at_Q = slot_Q[:, None] >= 0, jnp.maximum(slot_Q, 0)
    h_QD = jnp.where(known_Q1, outputs.state_BTD.reshape(-1, vector_ID.shape[1])[at_Q], 0)
    score_QI = h_QD @ vector_ID.T + bias_I
    if outputs.pointers is None:
        return score_QI
    log_weight_BTX, copy_BTS = outputs.pointers
    n_slots = copy_BTS.shape[-1]
    item_QS = batch.item_BT[at_Q // n_slots]
    copy_QS = jnp.where(known_Q1, copy_BTS.reshape(-1, n_slots)[at_Q], 0)
    log_share_Q1 = jnp.where(known_Q1, log_weight_BTX.reshape(-1, log_weight_BTX.shape[-1])[at_Q, :1], 0)
    copied_QI = jnp.zeros_like(score_QI).at[jnp.arange(len(at_Q))[:, None], item_QS].add(copy_QS)
    return jnp.logaddexp(jax.nn.log_softmax(score_QI) + log_share_Q1, jnp.log(copied_QI))


def log_prob_items(outputs: Outputs, batch: Batch, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
    """`[Q, I]`, log p(item) of all items of a bound catalogue at flat slots."""
    return jax.nn.log_softmax(score_items(outputs, batch, slot_Q, catalog))


def _mix_targets(pointers: PointerMixture, batch: Batch, target_BT: jax.Array) -> Mixture:
    """What the pointers give to each slot's target: their shares of the events that are of that item."""
    hit_BTS = batch.item_BT[:, None] == target_BT[..., None]
    copied_BT = jnp.sum(jnp.where(hit_BTS, pointers.copy_BTS, 0), axis=-1)
    found_BT = copied_BT >= jnp.finfo(jnp.float32).tiny  # the inverse of a smaller number may be infinite
    log_copied_BT = jnp.where(found_BT, jnp.log(jnp.where(found_BT, copied_BT, 1)), -jnp.inf)
    return Mixture(pointers.log_weight_BTX[..., 0].reshape(-1), log_copied_BT.reshape(-1))


class TargetItems(NamedTuple):
    """The targets of a batch's slots, as losses see them; S = B T slots.

    Attributes:
      head, tied: the head, and the encoder whose vectors it shares. outputs, batch, catalog: of the same parameters.
      target_S: int32 items. weight_S: float32 weights of the slots' losses.
      by_service: whether the competitors of a target are the items of its own service alone.
      chunk: slots whose logits are in memory at once.
    """

    head: ItemHead
    tied: ItemEncoder
    outputs: Outputs
    batch: Batch
    catalog: Catalog
    target_S: jax.Array
    weight_S: jax.Array
    by_service: bool
    chunk: int

    @property
    def state_SD(self) -> jax.Array:
        return self.outputs.state_BTD.reshape(self.target_S.shape[0], -1)

    def score(self, item_S: jax.Array) -> jax.Array:
        """`[S]`, the score of one item a slot, without the pointers and without normalisation."""
        vector_SD, bias_S = self.head.vectors(item_S, self.catalog, self.tied)
        return jnp.sum(self.state_SD * vector_SD, axis=-1) + bias_S

    def _operands(self, candidates: Candidates | None) -> tuple[XentSlots, XentCandidates]:
        service_I, target_S = self.catalog.service_I, self.target_S
        if candidates is None:
            candidates = Candidates(jnp.arange(service_I.shape[0]), jnp.zeros(service_I.shape[0]))
            vector_JD, bias_J = self.catalog.vector_ID, self.catalog.bias_I
            assert vector_JD is not None
            assert bias_J is not None
        else:
            vector_JD, bias_J = self.head.vectors(candidates.item_J, self.catalog, self.tied)
        scope_S = service_I[target_S] if self.by_service else jnp.zeros_like(target_S)
        scope_J = service_I[candidates.item_J] if self.by_service else jnp.zeros_like(candidates.item_J)
        mixture = None
        if self.outputs.pointers is not None:
            mixture = _mix_targets(self.outputs.pointers, self.batch, target_S.reshape(self.batch.item_BT.shape))
        slots = XentSlots(self.state_SD, self.score(target_S), target_S, scope_S, mixture)
        return slots, XentCandidates(vector_JD, bias_J + candidates.correction_J, candidates.item_J, scope_J)

    def sum_nll(self, candidates: Candidates | None) -> jax.Array:
        """The weighted sum of the targets' negative log-probabilities, normalised against the candidates.

        Args: None for all items of the catalogue, which is then bound.
        """
        slots, others = self._operands(candidates)
        return chunked_softmax_xent(slots, self.weight_S, others, min(self.chunk, self.target_S.shape[0]))

    def log_prob(self, candidates: Candidates | None) -> jax.Array:
        """`[S]`, the targets' log-probabilities, for losses that are no weighted sum of them; dearer than `sum_nll`."""
        return chunked_log_prob(*self._operands(candidates), min(self.chunk, self.target_S.shape[0]))
