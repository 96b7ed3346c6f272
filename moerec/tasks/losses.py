"""Next-item losses over packed slots; every mean is taken over the weights of the global batch.

All softmax losses are one function: the positive against a set of candidates with additive corrections. The full
softmax takes the catalogue as candidates; the sampled softmax takes draws `j ~ q` with correction `-log(m q_j)`, which
makes the sum over candidates an unbiased estimate of the full one (Bengio & Senécal 2008; Yi et al. 2019).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import LossConfig, MoEConfig
from moerec.nn.model import SequenceModel
from moerec.nn.moe.balance import balance_losses, weigh_losses
from moerec.types import Batch, Catalog, PointerMixture, Routing


class Candidates(NamedTuple):
    """Items against which a positive is normalised.

    Attributes:
      item_M: int32 catalogue indices.
      correction_M: float32 added to their scores (0, or -log of the expected number of draws).
    """

    item_M: jax.Array
    correction_M: jax.Array


def sampling_cdf(count_I: np.ndarray, power: float) -> np.ndarray:
    """Where each item's share of the 2^32 random words ends, inclusive: uint32 `[I]`, shares ~ (1 + count)^power.

    Whole numbers, so that what is drawn has exactly the probability that the correction says, and none is zero.
    """
    q = (1.0 + np.asarray(count_I, np.float64)) ** power
    width = np.maximum(np.floor(q / q.sum() * 2.0**32), 1).astype(np.int64)
    width[np.argmax(width)] += 2**32 - width.sum()
    return (np.cumsum(width) - 1).astype(np.uint32)


def sample_negatives(key: jax.Array, cdf_I: jax.Array, n: int) -> Candidates:
    """n draws with replacement from `cdf_I` and their log-Q corrections."""
    item_M = jnp.searchsorted(cdf_I, jax.random.bits(key, (n,), jnp.uint32), side="left").astype(jnp.int32)
    before = jnp.where(item_M > 0, cdf_I[item_M - 1], jnp.uint32(0xFFFFFFFF))
    width = cdf_I[item_M] - before  # modulo 2^32, so the whole range, of a single item, comes out as 0
    q = jnp.where(width == 0, 1.0, width.astype(jnp.float32) * 2.0**-32)
    return Candidates(item_M, -jnp.log(n * q))


def _multiply_high(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of the product of two uint32: a random word as a whole number below b.

    (`jax.random.randint` takes a remainder, which is far from even where b is a large part of 2^32.)
    """
    (a1, a0), (b1, b0) = ((x >> 16, x & 0xFFFF) for x in (a, b))
    middle = ((a1 * b0) & 0xFFFF) + ((a0 * b1) & 0xFFFF) + ((a0 * b0) >> 16)
    return a1 * b1 + ((a1 * b0) >> 16) + ((a0 * b1) >> 16) + (middle >> 16)


def sample_in_service(key: jax.Array, cdf_I: jax.Array, service_I: jax.Array, item_S: jax.Array) -> jax.Array:
    """One item `[S]` a slot from the service of the slot's item, with the probabilities of `cdf_I` within it."""
    service_S = service_I[item_S]  # `service_I` rises: a service's items stand together
    first_S = jnp.searchsorted(service_I, service_S, side="left")
    last_S = jnp.searchsorted(service_I, service_S, side="right") - 1
    low_S = jnp.where(first_S > 0, cdf_I[first_S - 1] + 1, jnp.uint32(0))
    width_S = cdf_I[last_S] - low_S + 1  # modulo 2^32, so that of a single service is 0: any word will do
    word_S = jax.random.bits(key, item_S.shape, jnp.uint32)
    within_S = jnp.where(width_S == 0, word_S, _multiply_high(word_S, width_S))
    return jnp.searchsorted(cdf_I, low_S + within_S, side="left").astype(jnp.int32)


def all_candidates(n_items: int) -> Candidates:
    """The catalogue, uncorrected: the full softmax."""
    return Candidates(jnp.arange(n_items, dtype=jnp.int32), jnp.zeros(n_items, jnp.float32))


class Mixture(NamedTuple):
    """What else gives probability to a slot's target than the softmax; `[S]` each.

    Attributes:
      log_share_S: log of the softmax's weight. log_rest_S: log-probability of the target by all other answers together,
        their weights included; may be -inf.
    """

    log_share_S: jax.Array
    log_rest_S: jax.Array


def _chunk_terms(slots, mixture_C, vector_MD, offset_M, item_M, scope_M):
    """Sum of the weighted losses of a chunk of slots, and its gradients, without keeping the logits."""
    h_CD, positive_C, target_C, scope_C, weight_C = slots
    logits = h_CD @ vector_MD.T + offset_M
    excluded = (item_M == target_C[:, None]) | (scope_M != scope_C[:, None])
    logits = jnp.where(excluded, -jnp.inf, logits)
    top = jnp.maximum(jnp.max(logits, axis=-1), positive_C)
    exps = jnp.exp(logits - top[:, None])
    positive_exp = jnp.exp(positive_C - top)
    total = jnp.sum(exps, axis=-1) + positive_exp
    log_p = positive_C - top - jnp.log(total)
    pull_C, d_mixture = weight_C, None
    if mixture_C is not None:
        softmax_part = mixture_C.log_share_S + log_p
        log_p = jnp.logaddexp(softmax_part, mixture_C.log_rest_S)
        # The softmax answers for a slot as far as the target's probability is its own.
        pull_C = weight_C * jnp.exp(softmax_part - log_p)
        d_mixture = Mixture(-pull_C, -weight_C * jnp.exp(mixture_C.log_rest_S - log_p))
    loss = -jnp.sum(weight_C * log_p)
    scaled = exps * (pull_C / total)[:, None]
    d_positive = pull_C * (positive_exp / total - 1)
    return (loss, scaled.T @ h_CD, jnp.sum(scaled, axis=0)), (scaled @ vector_MD, d_positive, d_mixture)


@partial(jax.custom_vjp, nondiff_argnums=(9,))
def chunked_softmax_xent(
    h_SD, positive_S, vector_MD, offset_M, mixture, target_S, scope_S, item_M, scope_M_weight_S, chunk
):
    """Sum over slots of `-weight * log(share * exp(positive) / (exp(positive) + sum of exp(score)) + rest)`.

    The sum runs over the candidates. The gradient is formed in the forward pass, chunk by chunk, so that the `[S, M]`
    logits never exist in memory; it scales with the cotangent because the result is a scalar.

    Args:
      h_SD: states. positive_S: scores of the positives. vector_MD, offset_M: the candidates' vectors and what is
        added to their scores. mixture: a `Mixture`, or None, where share is 1 and rest 0.
      target_S, item_M: catalogue indices (a candidate that is the target is left out).
      scope_S: a candidate counts only where its scope equals the slot's.
      scope_M_weight_S: the pair of the candidates' scopes and the slots' weights.
      chunk: slots whose logits are formed at once.
    """
    operands = (h_SD, positive_S, vector_MD, offset_M, mixture, target_S, scope_S, item_M, scope_M_weight_S)
    return _xent_forward(*operands, chunk)[0]


def _xent_forward(h_SD, positive_S, vector_MD, offset_M, mixture, target_S, scope_S, item_M, scope_M_weight_S, chunk):
    scope_M, weight_S = scope_M_weight_S
    s = h_SD.shape[0]
    n_chunks = -(-s // chunk)

    def split(x):
        padding = [(0, n_chunks * chunk - s)] + [(0, 0)] * (x.ndim - 1)
        # Chunk c takes every n-th slot, so that each device of a batch split over `data` has a share of every chunk.
        return jnp.moveaxis(jnp.pad(x, padding).reshape(chunk, n_chunks, *x.shape[1:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:s]

    def step(sums, part):
        slots, mixture_C = part
        terms, by_slot = _chunk_terms(slots, mixture_C, vector_MD, offset_M, item_M, scope_M)
        return jax.tree.map(jnp.add, sums, terms), by_slot

    zero = (jnp.zeros((), jnp.float32), jnp.zeros_like(vector_MD), jnp.zeros_like(offset_M))
    parts = jax.tree.map(split, ((h_SD, positive_S, target_S, scope_S, weight_S), mixture))
    (loss, d_vector, d_offset), by_slot = jax.lax.scan(step, zero, parts)
    d_h, d_positive, d_mixture = jax.tree.map(join, by_slot)
    # The pull of the positive's own vector is in `positive_S`, which the caller differentiates.
    return loss, (d_h, d_positive, d_vector, d_offset, d_mixture)


def _xent_backward(chunk, gradients, g):
    return *jax.tree.map(lambda d: g * d, gradients), None, None, None, None


chunked_softmax_xent.defvjp(_xent_forward, _xent_backward)


class Sums(NamedTuple):
    """Sums over the slots of a batch; those of microbatches and devices add up to the global batch's.

    Attributes:
      item: weighted next-item losses. weight: weights.
      analyser: weighted cross-entropies of the next event's service, or None in a dense model.
      routing: of the mixture layers, or None in a dense model.
    """

    item: jax.Array
    weight: jax.Array
    analyser: jax.Array | None
    routing: Routing | None


def sum_losses(
    model: SequenceModel,
    batch: Batch,
    table: Catalog,
    candidates: Candidates,
    config: LossConfig,
    dropout_key: jax.Array | None,
) -> Sums:
    """Everything that the training loss is made of, over all slots of the batch."""
    # The full softmax needs the vectors of all items anyway: then no text is read for each slot that it stands in.
    whole = model.item_vectors(candidates.item_M, table) if config.kind == "full_softmax" else None
    output = model.encode(batch, table, dropout_key, None if whole is None else whole[0])
    target_S, weight_S = batch.target_BT.reshape(-1), batch.weight_BT.reshape(-1)
    h_SD = output.state_BTD.reshape(weight_S.shape[0], -1)
    analyser = None
    if output.log_domain_BTZ is not None:
        domain_BT = table.service_I[batch.target_BT]
        log_p_BT = jnp.take_along_axis(output.log_domain_BTZ, domain_BT[..., None], axis=-1)[..., 0]
        analyser = -jnp.sum(batch.weight_BT * log_p_BT)
    mixture = None if output.answers is None else _mix_pointers(output.answers, batch)
    item = _sum_item_losses(model, h_SD, target_S, weight_S, table, candidates, whole, config, mixture)
    return Sums(item, jnp.sum(weight_S), analyser, output.routing)


def total_loss(sums: Sums, config: LossConfig, moe: MoEConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What is minimised, from the sums of a global batch, and its parts by name (`loss` is the next item's mean).

    The first is the sum over the slots, not the mean: gradients are divided once, when all of them are added up.
    """
    weight = jnp.maximum(sums.weight, 1)
    total = sums.item
    parts = {"loss": sums.item / weight, "slots": sums.weight}
    if sums.analyser is not None:
        total += config.analyser_weight * sums.analyser
        parts["analyser"] = sums.analyser / weight
    if sums.routing is not None:
        losses = balance_losses(sums.routing, moe)
        total += jax.lax.stop_gradient(weight) * weigh_losses(losses, config)
        parts |= losses | {"dropped": jnp.sum(sums.routing.dropped_L3)}
    return total, parts


def _mix_pointers(answers: PointerMixture, batch: Batch) -> Mixture:
    """What the pointers give to each slot's target: their shares of the events that are of that item."""
    hit_BTS = batch.item_BT[:, None] == batch.target_BT[..., None]
    copied_BT = jnp.sum(jnp.where(hit_BTS, answers.copy_BTS, 0), axis=-1)
    found_BT = copied_BT >= jnp.finfo(jnp.float32).tiny  # the inverse of a smaller number may be infinite
    log_copied_BT = jnp.where(found_BT, jnp.log(jnp.where(found_BT, copied_BT, 1)), -jnp.inf)
    return Mixture(answers.log_weight_BTX[..., 0].reshape(-1), log_copied_BT.reshape(-1))


def _sum_item_losses(model, h_SD, target_S, weight_S, table, candidates, whole, config, mixture):
    if whole is None:
        vector_MD, bias_M = model.item_vectors(candidates.item_M, table)
        positive_SD, positive_bias_S = model.item_vectors(target_S, table)
    else:
        vector_MD, bias_M = whole
        positive_SD, positive_bias_S = vector_MD[target_S], bias_M[target_S]
    positive_S = jnp.sum(h_SD * positive_SD, axis=-1) + positive_bias_S
    if config.kind == "one_negative":
        return _one_negative(h_SD, positive_S, target_S, weight_S, vector_MD, bias_M, candidates.item_M)
    by_service = config.scope == "service"
    scope_S = table.service_I[target_S] if by_service else jnp.zeros_like(target_S)
    scope_M = table.service_I[candidates.item_M] if by_service else jnp.zeros_like(candidates.item_M)
    return chunked_softmax_xent(
        h_SD,
        positive_S,
        vector_MD,
        bias_M + candidates.correction_M,
        mixture,
        target_S,
        scope_S,
        candidates.item_M,
        (scope_M, weight_S),
        min(config.chunk, h_SD.shape[0]),
    )


def _one_negative(h_SD, positive_S, target_S, weight_S, vector_SD, bias_S, item_S):
    """Binary cross-entropy of the positive and of one drawn item a slot (Kang & McAuley 2018)."""
    negative_S = jnp.sum(h_SD * vector_SD, axis=-1) + bias_S
    hit_S = item_S == target_S
    loss_S = jax.nn.softplus(-positive_S) + jnp.where(hit_S, 0, jax.nn.softplus(negative_S))
    return jnp.sum(weight_S * loss_S)
