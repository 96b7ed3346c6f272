"""p(item): a softmax over the catalogue, mixed with pointers into the history; in `score_items` of all items, in
`TargetItems` of the targets alone, chunk by chunk. It is computed nowhere else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.embeddings import ItemEncoder, has_row
from moerec.nn.heads.near_pointers import share_targets, spread_near
from moerec.nn.heads.pointer import AnswerAggregator
from moerec.nn.heads.query_blocks import map_blocks
from moerec.nn.heads.service_answers import ServiceAnswers
from moerec.nn.heads.xent import (
    Mixture,
    XentCandidates,
    XentSlots,
    chunked_log_prob,
    chunked_softmax_xent,
    mark_items,
)
from moerec.nn.layers import declare
from moerec.types import Batch, Catalog, NearPointer, Outputs, PointerMixture

MOST_BOUND = 1 << 26  # numbers that are in memory while the vectors of all items are computed


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

    def __init__(
        self, key: jax.Array, config: ModelConfig, n_items: int, n_tokens: int, n_services: int, d_states: int = 0
    ):
        k_pointer, k_untied = (jax.random.fold_in(key, n) for n in (4, 5))
        self.encoder = None if config.tie_items else ItemEncoder(k_untied, config, n_items, n_tokens, d_states)
        mixture = ServiceAnswers if config.is_asked else AnswerAggregator
        self.aggregator = mixture(k_pointer, config, n_services) if config.has_pointers else None
        zeros = jax.nn.initializers.zeros
        self.bias_I = declare(key, (n_items,), ("items",), zeros, decay="none") if config.item_bias else None
        self.untrained_rows, self.d_text = config.untrained_rows, config.d_text
        self.repeat_Z = declare(key, (n_services,), (None,), zeros, decay="none") if config.repeat_bias else None
        has_other = config.item_bias and not config.untrained_rows
        self.no_row_bias_Z = declare(key, (n_services,), (None,), zeros, decay="none") if has_other else None

    def vectors(self, item_X: jax.Array, catalog: Catalog, tied: ItemEncoder) -> tuple[jax.Array, jax.Array]:
        """Vectors `[..., D]` and biases `[...]` of candidates; a state's score is its dot product plus the bias."""
        if catalog.vector_ID is not None:
            assert catalog.bias_I is not None
            return catalog.vector_ID[item_X], catalog.bias_I[item_X]
        encoder = tied if self.encoder is None else self.encoder
        bias = jnp.zeros(item_X.shape, jnp.float32) if self.bias_I is None else self.bias_I[...][item_X]
        if self.no_row_bias_Z is not None:
            other = self.no_row_bias_Z[...][catalog.service_I[item_X]]
            bias = jnp.where(has_row(item_X, catalog), bias, other)
        return encoder(item_X, catalog), bias

    def bind(self, catalog: Catalog, tied: ItemEncoder, most: int = MOST_BOUND) -> Catalog:
        """The catalogue with the vectors and biases of all its items.

        Those of a large one are computed block by block: all tokens' vectors would be as many times as large as the
        items' texts are long. Args: numbers in memory at once.
        """
        free = catalog._replace(vector_ID=None, bias_I=None)
        n_each = max(catalog.token_IW.shape[1] * self.d_text, 0 if free.state_IX is None else free.state_IX.shape[1])
        item_I = jnp.arange(catalog.service_I.shape[0])
        vector_ID, bias_I = map_blocks(lambda item_X: self.vectors(item_X, free, tied), (item_I,), n_each, most)
        return catalog._replace(vector_ID=vector_ID, bias_I=bias_I, repeat_I=self.repeats(catalog))

    def repeats(self, catalog: Catalog) -> jax.Array | None:
        """`[I]`, what is added to an item's score where the history has it; None where that is no matter."""
        return None if self.repeat_Z is None else self.repeat_Z[...][catalog.service_I]


def score_items(outputs: Outputs, batch: Batch, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
    """Scores `[Q, I]` of all items of a bound catalogue at flat slots; the softmax of a row is p(item).

    Where pointers are mixed in, they are log-probabilities already. At slot -1, where there is no history and no
    control slot, the biases speak alone.
    """
    known_Q1, at_Q = slot_Q[:, None] >= 0, jnp.maximum(slot_Q, 0)
    score_QI = _score_softmax(outputs, batch, slot_Q, catalog)
    if outputs.pointers is None:
        return score_QI
    n_slots = batch.item_BT.shape[1]
    pointers = pick_slots(outputs.pointers, at_Q, n_slots)
    item_QS = batch.item_BT[at_Q // n_slots]
    log_share_Q1 = jnp.where(known_Q1, pointers.log_weight_BTX[..., :1], 0)
    pointed_QI = jnp.where(known_Q1, spread_pointers(pointers, item_QS, catalog), 0)
    return add_probability(jax.nn.log_softmax(score_QI) + log_share_Q1, pointed_QI)


def add_probability(log_p: jax.Array, more: jax.Array) -> jax.Array:
    """`log(exp(log_p) + more)`: of most items pointers give nothing, and these keep what they have."""
    is_more = more >= jnp.finfo(jnp.float32).tiny  # a smaller number may count as zero
    return jnp.where(is_more, jnp.log(jnp.exp(log_p) + jnp.where(is_more, more, 1)), log_p)


def _score_softmax(outputs: Outputs, batch: Batch, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
    vector_ID, bias_I = catalog.vector_ID, catalog.bias_I
    assert vector_ID is not None
    assert bias_I is not None
    h_QD = outputs.state_BTD.reshape(-1, vector_ID.shape[1])[jnp.maximum(slot_Q, 0)]
    score_QI = jnp.where(slot_Q[:, None] >= 0, h_QD, 0) @ vector_ID.T + bias_I
    if outputs.had_BTS is None:
        return score_QI
    assert catalog.repeat_I is not None
    at_Q, n_slots = jnp.maximum(slot_Q, 0), batch.item_BT.shape[1]
    had_QS = outputs.had_BTS.reshape(-1, n_slots)[at_Q] & (slot_Q >= 0)[:, None]
    had_QI = mark_items(jnp.where(had_QS, batch.item_BT[at_Q // n_slots], -1), bias_I.shape[0])
    return score_QI + jnp.where(had_QI, catalog.repeat_I, 0)


def log_softmax_items(outputs: Outputs, batch: Batch, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
    """`[Q, I]`, log p(item) at flat slots by the softmax alone, without the pointers."""
    return jax.nn.log_softmax(_score_softmax(outputs, batch, slot_Q, catalog))


def pick_slots(pointers: PointerMixture, flat_Q: jax.Array, n_slots: int) -> PointerMixture:
    """The mixtures at flat slots, with a leading axis Q in the place of B and T."""
    row_Q = flat_Q // n_slots
    log_weight_QX = pointers.log_weight_BTX.reshape(-1, pointers.log_weight_BTX.shape[-1])[flat_Q]
    assert all(pointer.part_BTS is None for pointer in pointers.near.values())  # no service was asked
    near = {name: NearPointer(pointer.share_BSX[row_Q]) for name, pointer in pointers.near.items()}
    owner_QS = None if pointers.owner_BS is None else pointers.owner_BS[row_Q]
    return PointerMixture(log_weight_QX, pointers.part_BXTS[row_Q, :, flat_Q % n_slots], near, owner_QS)


def spread_pointers(pointers: PointerMixture, item_QS: jax.Array, catalog: Catalog) -> jax.Array:
    """`[Q, I]`, the probability that the pointers of each slot give to each item: of the service asked, if one was; or
    of all, where pointers to neighbors are of all services' answers (`spread_near`).
    """
    none_QI, copy_QS = jnp.zeros((item_QS.shape[0], catalog.service_I.shape[0])), pointers.copy_BTS
    if copy_QS.ndim == 3:  # a service points at events of its own: all answers are spread at once
        copy_QS = jnp.sum(copy_QS, axis=1)
    out_QI = _put_copies(none_QI, copy_QS, item_QS)
    for name in pointers.near:
        out_QI = _put_near(out_QI, name, pointers, item_QS, catalog)
    return out_QI


def spread_each(pointers: PointerMixture, item_QS: jax.Array, catalog: Catalog) -> list[jax.Array]:
    """`[Q, I]` of each pointer of one mixture a query, in the order of their weights: `spread_pointers` in parts."""
    none_QI = jnp.zeros((item_QS.shape[0], catalog.service_I.shape[0]))
    parts = [pointers.part_BXTS[:, x] for x in range(pointers.n_copies)]
    if pointers.owner_BS is not None:
        owners = range(pointers.n_owners)
        parts = [*(jnp.where(pointers.owner_BS == z, parts[0], 0) for z in owners), *parts[1:]]
    copies = [_put_copies(none_QI, part_QS, item_QS) for part_QS in parts]
    return copies + [_put_near(none_QI, name, pointers, item_QS, catalog) for name in sorted(pointers.near)]


def _put_copies(out_QI: jax.Array, copy_QS: jax.Array, item_QS: jax.Array) -> jax.Array:
    return out_QI.at[jnp.arange(item_QS.shape[0])[:, None], item_QS].add(copy_QS)


def _put_near(
    out_QI: jax.Array, name: str, pointers: PointerMixture, item_QS: jax.Array, catalog: Catalog
) -> jax.Array:
    neighbor_QSX = catalog.near[name].item_IX[item_QS]
    # What is no neighbor has no share: it may stand anywhere.
    given_QSX = spread_near(pointers.near[name], pointers.given_BTS(name), neighbor_QSX, catalog.service_I)
    return out_QI.at[jnp.arange(item_QS.shape[0])[:, None, None], jnp.maximum(neighbor_QSX, 0)].add(given_QSX)


def log_prob_items(outputs: Outputs, batch: Batch, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
    """`[Q, I]`, log p(item) of all items of a bound catalogue at flat slots."""
    return jax.nn.log_softmax(score_items(outputs, batch, slot_Q, catalog))


def _mix_targets(pointers: PointerMixture, batch: Batch, target_BT: jax.Array, catalog: Catalog) -> Mixture:
    """What the pointers give to each slot's target: their shares of the events that are of that item."""
    hit_BTS = batch.item_BT[:, None] == target_BT[..., None]
    copied_BT = jnp.sum(jnp.where(hit_BTS, pointers.copy_BTS, 0), axis=-1)
    for name, pointer in pointers.near.items():
        share_BTS = share_targets(pointer, catalog.near[name].item_IX, batch.item_BT, target_BT)
        copied_BT += jnp.sum(pointers.given_BTS(name) * share_BTS, axis=-1)
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
      is_asked: whether services are asked, so that a target's probability is that of its service times that of the item
        by its service's answer.
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
    is_asked: bool = False

    @property
    def state_SD(self) -> jax.Array:
        return self.outputs.state_BTD.reshape(self.target_S.shape[0], -1)

    @property
    def had_SX(self) -> jax.Array | None:
        """`[S, T]` int32, items of the events that each slot knows of, -1 for none; None where that is no matter."""
        had_BTS = self.outputs.had_BTS
        if had_BTS is None:
            return None
        return jnp.where(had_BTS, self.batch.item_BT[:, None], -1).reshape(self.target_S.shape[0], -1)

    @property
    def repeat_I(self) -> jax.Array | None:
        """`[I]`, what is added to the scores of these items."""
        return None if self.outputs.had_BTS is None else self.head.repeats(self.catalog)

    def score(self, item_S: jax.Array) -> jax.Array:
        """`[S]`, the score of one item a slot, without the pointers and without normalisation."""
        vector_SD, bias_S = self.head.vectors(item_S, self.catalog, self.tied)
        score_S, repeat_I = jnp.sum(self.state_SD * vector_SD, axis=-1) + bias_S, self.repeat_I
        if self.had_SX is None or repeat_I is None:
            return score_S
        return score_S + jnp.where(jnp.any(self.had_SX == item_S[:, None], axis=1), repeat_I[item_S], 0)

    def _operands(self, candidates: Candidates | None) -> tuple[XentSlots, XentCandidates]:
        service_I, target_S = self.catalog.service_I, self.target_S
        if candidates is None:
            # Of items without a training event nothing is to be learnt, not even that nobody chose them.
            correction_I = jnp.zeros(service_I.shape[0])
            if not self.head.untrained_rows:
                correction_I = jnp.where(self.catalog.count_I > 0, correction_I, -jnp.inf)
            candidates = Candidates(jnp.arange(service_I.shape[0]), correction_I)
            vector_JD, bias_J = self.catalog.vector_ID, self.catalog.bias_I
            assert vector_JD is not None
            assert bias_J is not None
        else:
            vector_JD, bias_J = self.head.vectors(candidates.item_J, self.catalog, self.tied)
        by_service = self.by_service or self.is_asked
        scope_S = service_I[target_S] if by_service else jnp.zeros_like(target_S)
        scope_J = service_I[candidates.item_J] if by_service else jnp.zeros_like(candidates.item_J)
        mixture = None
        if self.outputs.pointers is not None:
            target_BT = target_S.reshape(self.batch.item_BT.shape)
            mixture = _mix_targets(self.outputs.pointers, self.batch, target_BT, self.catalog)
        slots = XentSlots(self.state_SD, self.score(target_S), target_S, scope_S, mixture, self.had_SX)
        offset_J = bias_J + candidates.correction_J
        return slots, XentCandidates(vector_JD, offset_J, candidates.item_J, scope_J, self.repeat_I)

    def sum_nll(self, candidates: Candidates | None) -> jax.Array:
        """The weighted sum of the targets' negative log-probabilities, normalised against the candidates.

        Args: None for all items of the catalogue, which is then bound.
        """
        slots, others = self._operands(candidates)
        total = chunked_softmax_xent(slots, self.weight_S, others, min(self.chunk, self.target_S.shape[0]))
        return total - jnp.sum(self.weight_S * self.log_service()) if self.is_asked else total

    def log_prob(self, candidates: Candidates | None) -> jax.Array:
        """`[S]`, the targets' log-probabilities, for losses that are no weighted sum of them; dearer than `sum_nll`."""
        log_p_S = chunked_log_prob(*self._operands(candidates), min(self.chunk, self.target_S.shape[0]))
        return log_p_S + self.log_service() if self.is_asked else log_p_S

    def log_service(self) -> jax.Array:
        """`[S]`, log-probabilities of the targets' services by the analyser."""
        log_domain_BTZ = self.outputs.log_domain_BTZ
        assert log_domain_BTZ is not None
        log_domain_SZ = log_domain_BTZ.reshape(self.target_S.shape[0], -1)
        return jnp.take_along_axis(log_domain_SZ, self.catalog.service_I[self.target_S][:, None], axis=1)[:, 0]
