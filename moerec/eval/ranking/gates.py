"""The gates of a mixture, fitted to targets that were held out.

Where pointers reach items that no training event is of, or have been counted on the training targets, these cannot tell
how often to rely on them. So the biases of the gates are fitted on validation (stacking: Wolpert 1992): by the targets'
likelihood, and by where they would stand among their rivals, since the likelihood alone pays for targets that no list
would show. The place in a list is made smooth as by Qin, Liu & Li (2010).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from moerec.eval.ranking.dataset import RankQueries
from moerec.nn.heads.answers import softmax_alone
from moerec.nn.heads.item import add_probability, log_softmax_items, pick_slots, spread_each
from moerec.nn.heads.query_blocks import map_blocks
from moerec.nn.model import Predictor
from moerec.nn.moe.hypotheses import ask_one
from moerec.types import Answers, Array, Batch, Catalog, PointerMixture

N_RIVALS, N_OF_EACH = 100, 20  # those that lead by the mixture, and those by each component that may come to lead
CUTOFF = 10
NDCG_WEIGHT = 20.0  # beside the log-likelihood: a twentieth of NDCG is worth as much as a nat
MOST_WEIGHT = 4.0  # of a target of a small service in the mean over services
SOFTNESS = 0.1  # of comparisons, in nats
DEVIATION = 0.1  # of a service's shift from the common one, a priori; the common one is standard normal
_NOTHING = -80.0  # of log-parts


class GateTargets(NamedTuple):
    """What the components of a mixture give to targets, and to those that stand before and behind them.

    Attributes:
      log_weight_QX: float32 log-weights of the components.
      log_part_QCX: float32 logs of what they give to each candidate, without the weights; the target is the first.
      is_rival_QC: bool, which of the candidates the target is compared with.
      is_ranked_Q: bool, whether the evaluation ranks the target: not one among the items that are no candidates.
    """

    log_weight_QX: Array
    log_part_QCX: Array
    is_rival_QC: Array
    is_ranked_Q: Array


@functools.partial(jax.jit, static_argnames=("n_rivals", "n_of_each", "most"))
def read_gates(
    predictor: Predictor,
    batch: Batch,
    queries: RankQueries,
    catalog: Catalog,
    n_rivals: int = N_RIVALS,
    n_of_each: int = N_OF_EACH,
    most: int = 0,
) -> tuple[GateTargets, jax.Array | None]:
    """Of the queries' targets, among those that lead in their services. Where services are asked: of the answers of the
    targets' own, and with the log-posterior `[Q, Z]`.

    Args: `most`, numbers that are in memory at once, see `map_blocks`.
    """
    if predictor.config.is_asked:
        target_Q, flat_Q = jnp.maximum(queries.target, 0), jnp.maximum(queries.slot, 0)
        answers = predictor.ask(batch, catalog, flat_Q, ask_one(catalog.service_I[target_Q]))
        assert answers.pointers is not None

        def of_answers(answers: Answers, queries: RankQueries) -> GateTargets:
            log_softmax_QI, pointers = softmax_alone(answers, catalog)
            assert pointers is not None
            return _read_block(log_softmax_QI, pointers, answers.item_QS, queries, catalog, n_rivals, n_of_each)

        n_each = answers.pointers.log_weight_BTX.shape[-1] * len(catalog.service_I)  # each component scores all items
        found = map_blocks(of_answers, (answers._replace(routing=None), queries), n_each, most)
        return found, answers.log_domain_QZ
    outputs = predictor.encode(batch, catalog)
    mixtures = outputs.pointers
    assert mixtures is not None

    def of_slots(queries: RankQueries) -> GateTargets:
        log_softmax_QI = log_softmax_items(outputs, batch, queries.slot, catalog)
        flat_Q, n_slots = jnp.maximum(queries.slot, 0), batch.item_BT.shape[1]
        pointers, item_QS = pick_slots(mixtures, flat_Q, n_slots), batch.item_BT[flat_Q // n_slots]
        return _read_block(log_softmax_QI, pointers, item_QS, queries, catalog, n_rivals, n_of_each)

    n_each = mixtures.log_weight_BTX.shape[-1] * len(catalog.service_I)
    return map_blocks(of_slots, (queries,), n_each, most), None


def _read_block(
    log_softmax_QI: jax.Array,
    pointers: PointerMixture,
    item_QS: jax.Array,
    queries: RankQueries,
    catalog: Catalog,
    n_rivals: int,
    n_of_each: int,
) -> GateTargets:
    log_weight_QX, target_Q = pointers.log_weight_BTX, jnp.maximum(queries.target, 0)
    given = spread_each(pointers, item_QS, catalog)
    log_p_QI = add_probability(log_softmax_QI + log_weight_QX[:, :1], functools.reduce(jnp.add, given))
    leading = [(log_p_QI, n_rivals), *((part_QI, n_of_each) for part_QI in (log_softmax_QI, *given))]
    rival_QC, is_rival_QC = _pick_rivals(leading, queries)
    candidate_QC = jnp.concatenate([target_Q[:, None], rival_QC], axis=1)
    log_part_XQC = [jnp.take_along_axis(log_softmax_QI, candidate_QC, axis=1)]
    for x, given_QI in enumerate(given):
        log_given_QC = jnp.log(jnp.take_along_axis(given_QI, candidate_QC, axis=1))
        log_part_XQC.append(log_given_QC - log_weight_QX[:, None, 1 + x])
    log_part_QCX = jnp.maximum(jnp.stack(log_part_XQC, axis=-1), _NOTHING)
    is_rival_QC = jnp.concatenate([jnp.zeros_like(is_rival_QC[:, :1]), is_rival_QC], axis=1)
    is_ranked_Q = ~jnp.any(queries.seen == target_Q[:, None], axis=1)
    return GateTargets(log_weight_QX, log_part_QCX, is_rival_QC, is_ranked_Q)


def _pick_rivals(leading: Sequence[tuple[jax.Array, int]], queries: RankQueries) -> tuple[jax.Array, jax.Array]:
    """`[Q, C]`, the first items of the target's service by each score `[Q, I]`, as many as are wanted of it; and which
    of them the target competes with, each once.
    """
    n_items = leading[0][0].shape[1]
    item_I = jnp.arange(n_items)
    own_QI = (item_I >= queries.low[:, None]) & (item_I < queries.high[:, None])
    seen_QX = jnp.where(queries.seen >= 0, queries.seen, n_items)  # padding falls off the end
    row_Q1 = jnp.arange(own_QI.shape[0])[:, None]
    open_QI = own_QI.at[row_Q1, seen_QX].set(False, mode="drop")
    found = [jax.lax.top_k(jnp.where(open_QI, score_QI, -jnp.inf), min(n, n_items)) for score_QI, n in leading]
    best_QC, rival_QC = (jnp.concatenate(columns, axis=1) for columns in zip(*found, strict=True))
    place = jnp.arange(rival_QC.shape[1])
    is_again_QC = jnp.any((rival_QC[:, :, None] == rival_QC[:, None]) & (place[:, None] > place), axis=2)
    return rival_QC, (rival_QC != queries.target[:, None]) & (best_QC > -jnp.inf) & ~is_again_QC


def smooth_ndcg(score_QC: jax.Array, is_rival_QC: jax.Array) -> jax.Array:
    """`[Q]`, NDCG at `CUTOFF` of the first column among its rivals, with a gradient."""
    above_QC = jax.nn.sigmoid((score_QC - score_QC[:, :1]) / SOFTNESS)
    rank_Q = 1 + jnp.sum(jnp.where(is_rival_QC, above_QC, 0), axis=1)
    return jax.nn.sigmoid(CUTOFF + 0.5 - rank_Q) / jnp.log2(1 + rank_Q)


def _gate_loss(
    shift_RX: jax.Array, targets: GateTargets, start_Q: jax.Array, service_Q: jax.Array, weight_Q: jax.Array
) -> jax.Array:
    """What is minimised: see `fit_gates`. Args: the common shift, and where services have their own what they add;
    and the targets' log-likelihoods without a shift, whose sum would take the digits of a small gain.
    """
    shift_QX = shift_RX[0] + (shift_RX[1:][service_Q] if len(shift_RX) > 1 else 0)
    log_gate_QX = jax.nn.log_softmax(targets.log_weight_QX + shift_QX)
    log_p_QC = jax.nn.logsumexp(log_gate_QX[:, None] + targets.log_part_QCX, axis=-1)
    ndcg_Q = smooth_ndcg(log_p_QC, targets.is_rival_QC) * targets.is_ranked_Q
    prior = 0.5 * jnp.sum(shift_RX[0] ** 2) + 0.5 * jnp.sum((shift_RX[1:] / DEVIATION) ** 2)
    return prior - jnp.sum(log_p_QC[:, 0] - start_Q) - NDCG_WEIGHT * jnp.sum(weight_Q * ndcg_Q)


_gate_loss_and_slope = jax.jit(jax.value_and_grad(_gate_loss))


def fit_gates(targets: GateTargets, service_Q: np.ndarray, n_services: int, by_service: bool) -> np.ndarray:
    """`[Z, X]` float32, what is best added to the gates' logits; `[X]` where all services have the same gates.

    The sum over the targets of their log-likelihood, and of `NDCG_WEIGHT` times NDCG in service, which is what the
    components of a service's answer decide. In the latter services count alike, though no target of a small one counts
    for more than `MOST_WEIGHT`. What a service differs by from the others is kept small a priori.

    Args:
      service_Q: of which service each target is. by_service: whether each has gates of its own.
    """
    n, n_components = targets.log_weight_QX.shape
    size_Z = np.bincount(service_Q, minlength=n_services)
    weight_Z = np.minimum(n / max((size_Z > 0).sum(), 1) / np.maximum(size_Z, 1), MOST_WEIGHT)
    known = jax.tree.map(jnp.asarray, targets)
    start_Q = jax.nn.logsumexp(known.log_weight_QX + known.log_part_QCX[:, 0], axis=-1)
    constants = known, start_Q, jnp.asarray(service_Q), jnp.asarray(weight_Z[service_Q], jnp.float32)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _gate_loss_and_slope(jnp.asarray(flat.reshape(-1, n_components), jnp.float32), *constants)
        return float(value), np.asarray(slope, np.float64).ravel()

    start = np.zeros((1 + by_service * n_services) * n_components)
    # In float32 a smaller improvement is none.
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-7})
    shift_RX = found.x.reshape(-1, n_components).astype(np.float32)
    return shift_RX[0] + shift_RX[1:] if by_service else shift_RX[0]
