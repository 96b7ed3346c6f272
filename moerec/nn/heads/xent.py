"""Log-probabilities of targets among candidates, chunk by chunk, so that the logits `[S, J]` never stand in memory.

All softmax losses are one function: the positive against a set of candidates with additive corrections. The full
softmax takes the catalogue as candidates; the sampled softmax takes draws `j ~ q` with correction `-log(m q_j)`, which
makes the sum over candidates an unbiased estimate of the full one (Bengio & Senécal 2008; Yi et al. 2019).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixture(NamedTuple):
    """What else gives probability to a slot's target than the softmax; `[S]` each.

    Attributes:
      log_share_S: log of the softmax's weight. log_rest_S: log-probability of the target by all other components
        together, their weights included; may be -inf.
    """

    log_share_S: jax.Array
    log_rest_S: jax.Array


class XentSlots(NamedTuple):
    """The slots whose targets are asked for; all have a leading axis S.

    Attributes:
      h_SD: states. positive_S: scores of the targets. target_S: their catalogue indices.
      scope_S: a candidate counts only where its scope equals the slot's.
      mixture: or None, where the softmax is all.
      had_SX: int32 catalogue indices of the items in a slot's history, -1 is padding; None where that is no matter.
    """

    h_SD: jax.Array
    positive_S: jax.Array
    target_S: jax.Array
    scope_S: jax.Array
    mixture: Mixture | None
    had_SX: jax.Array | None = None


class XentCandidates(NamedTuple):
    """What the targets are normalised against; all have a leading axis J.

    Attributes:
      vector_JD, offset_J: vectors, and what is added to their scores (bias and correction).
      item_J: catalogue indices; a candidate that is the target is left out. scope_J: as `XentSlots.scope_S`.
      repeat_I: `[I]` of the catalogue, added to the scores of items that a slot's history has; with `XentSlots.had_SX`.
    """

    vector_JD: jax.Array
    offset_J: jax.Array
    item_J: jax.Array
    scope_J: jax.Array
    repeat_I: jax.Array | None = None


def mark_items(item_QX: jax.Array, n_items: int) -> jax.Array:
    """`[Q, I]` bool, which items each query names; -1 names none."""
    place_QX = jnp.where(item_QX < 0, n_items, item_QX)  # which is no place
    rows_Q1 = jnp.arange(item_QX.shape[0])[:, None]
    return jnp.zeros((item_QX.shape[0], n_items), bool).at[rows_Q1, place_QX].set(True, mode="drop")


def _find_repeats(slots: XentSlots, candidates: XentCandidates) -> jax.Array | None:
    """`[S, J]` bool, the candidates that a slot's history has; None where that is no matter."""
    if slots.had_SX is None or candidates.repeat_I is None:
        return None
    return mark_items(slots.had_SX, candidates.repeat_I.shape[0])[:, candidates.item_J]


def _log_probs(slots: XentSlots, candidates: XentCandidates, had_SJ: jax.Array | None):
    """Of a chunk: log-probabilities of the targets, the softmax's own part, its exponentials and their sum."""
    logits = slots.h_SD @ candidates.vector_JD.T + candidates.offset_J
    if had_SJ is not None:
        assert candidates.repeat_I is not None
        logits += jnp.where(had_SJ, candidates.repeat_I[candidates.item_J], 0)
    excluded = (candidates.item_J == slots.target_S[:, None]) | (candidates.scope_J != slots.scope_S[:, None])
    logits = jnp.where(excluded, -jnp.inf, logits)
    top = jnp.maximum(jnp.max(logits, axis=-1), slots.positive_S)
    exps = jnp.exp(logits - top[:, None])
    positive_exp = jnp.exp(slots.positive_S - top)
    total = jnp.sum(exps, axis=-1) + positive_exp
    softmax_part = slots.positive_S - top - jnp.log(total)
    if slots.mixture is None:
        return softmax_part, softmax_part, exps, positive_exp, total
    softmax_part = slots.mixture.log_share_S + softmax_part
    return jnp.logaddexp(softmax_part, slots.mixture.log_rest_S), softmax_part, exps, positive_exp, total


def _chunk_terms(slots: XentSlots, weight_S: jax.Array, candidates: XentCandidates):
    """Sum of the weighted losses of a chunk of slots, and its gradients, without keeping the logits.

    What scales the exponentials of a slot scales its state instead. The gradient of the vectors is `[D, J]`: for
    `[J, D]` XLA's CPU backend reads the exponentials by columns, four times as long where J is a power of two.
    """
    had_SJ, d_repeat_J = _find_repeats(slots, candidates), None
    log_p, softmax_part, exps, positive_exp, total = _log_probs(slots, candidates, had_SJ)
    pull_S, d_mixture = weight_S, None
    if slots.mixture is not None:
        # The softmax answers for a slot as far as the target's probability is its own.
        pull_S = weight_S * jnp.exp(softmax_part - log_p)
        d_mixture = Mixture(-pull_S, -weight_S * jnp.exp(slots.mixture.log_rest_S - log_p))
    loss = -jnp.sum(weight_S * log_p)
    scale_S = pull_S / total
    d_positive = pull_S * (positive_exp / total - 1)
    if had_SJ is not None:
        d_repeat_J = scale_S @ jnp.where(had_SJ, exps, 0)
    sums = (loss, (slots.h_SD * scale_S[:, None]).T @ exps, scale_S @ exps, d_repeat_J)
    return sums, ((exps @ candidates.vector_JD) * scale_S[:, None], d_positive, d_mixture)


def _split(x: jax.Array, chunk: int) -> jax.Array:
    s = x.shape[0]
    n_chunks = -(-s // chunk)
    padding = [(0, n_chunks * chunk - s)] + [(0, 0)] * (x.ndim - 1)
    # Chunk c takes every n-th slot, so that each device of a batch split over `data` has a share of every chunk.
    return jnp.moveaxis(jnp.pad(x, padding).reshape(chunk, n_chunks, *x.shape[1:]), 1, 0)


def _join(x: jax.Array, s: int) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:s]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_softmax_xent(slots: XentSlots, weight_S: jax.Array, candidates: XentCandidates, chunk: int) -> jax.Array:
    """Sum over slots of `-weight * log(share * exp(positive) / (exp(positive) + sum of exp(score)) + rest)`.

    The sum runs over the candidates. The gradient is formed in the forward pass, chunk by chunk, so that the `[S, J]`
    logits never exist in memory; it scales with the cotangent because the result is a scalar.

    Args:
      weight_S: without gradient. chunk: slots whose logits are formed at once.
    """
    return _xent_forward(slots, weight_S, candidates, chunk)[0]


def _xent_forward(slots: XentSlots, weight_S: jax.Array, candidates: XentCandidates, chunk: int):
    def step(sums, part):
        own, weight = part
        terms, by_slot = _chunk_terms(own, weight, candidates)
        return jax.tree.map(jnp.add, sums, terms), by_slot

    d_repeat_I = None if slots.had_SX is None else candidates.repeat_I
    d_repeat_J = None if d_repeat_I is None else jnp.zeros_like(candidates.offset_J)
    zero_DJ, zero_J = jnp.zeros_like(candidates.vector_JD.T), jnp.zeros_like(candidates.offset_J)
    zero = (jnp.zeros((), jnp.float32), zero_DJ, zero_J, d_repeat_J)
    parts = jax.tree.map(lambda x: _split(x, chunk), (slots, weight_S))
    (loss, d_vector_DJ, d_offset, d_repeat_J), by_slot = jax.lax.scan(step, zero, parts)
    if d_repeat_I is not None:
        d_repeat_I = jnp.zeros_like(d_repeat_I).at[candidates.item_J].add(d_repeat_J)
    d_h, d_positive, d_mixture = jax.tree.map(lambda x: _join(x, weight_S.shape[0]), by_slot)
    # The pull of the positive's own vector is in `positive_S`, which the caller differentiates.
    d_slots = XentSlots(d_h, d_positive, None, None, d_mixture)  # type: ignore[arg-type]
    return loss, (d_slots, XentCandidates(d_vector_DJ.T, d_offset, None, None, d_repeat_I))  # type: ignore[arg-type]


def _xent_backward(chunk: int, gradients, g):
    d_slots, d_candidates = jax.tree.map(lambda d: g * d, gradients)
    return d_slots, None, d_candidates


chunked_softmax_xent.defvjp(_xent_forward, _xent_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def chunked_log_prob(slots: XentSlots, candidates: XentCandidates, chunk: int) -> jax.Array:
    """`[S]`, log-probabilities of the targets: what `chunked_softmax_xent` sums, for losses that are no weighted sum.

    The backward pass forms the logits anew, chunk by chunk.
    """
    parts = jax.tree.map(lambda x: _split(x, chunk), slots)

    def step(_, part):
        return None, _log_probs(part, candidates, _find_repeats(part, candidates))[0]

    _, log_p = jax.lax.scan(step, None, parts)
    return _join(log_p, slots.target_S.shape[0])


def _log_prob_forward(slots: XentSlots, candidates: XentCandidates, chunk: int):
    return chunked_log_prob(slots, candidates, chunk), (slots, candidates)


def _log_prob_backward(chunk: int, operands, g_S):
    # The loss is minus the weighted log-probabilities, and linear in the weights.
    _, (d_slots, d_candidates) = _xent_forward(operands[0], -g_S, operands[1], chunk)
    return d_slots, d_candidates


chunked_log_prob.defvjp(_log_prob_forward, _log_prob_backward)
