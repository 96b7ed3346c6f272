"""The gates of a mixture, fitted to targets that were held out.

Where pointers reach items that no training event is of, or have been counted on the training targets, these cannot tell
how often to rely on them. So the biases of the gates are fitted on validation (stacking: Wolpert 1992): by the targets'
likelihood, and by where they would stand among their rivals, since the likelihood alone pays for targets that no list
would show. The place in a list is made smooth as by Qin, Liu & Li (2010).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from moerec.eval.ranking.dataset import RankQueries
from moerec.nn.heads.answers import softmax_alone
from moerec.nn.heads.item import log_softmax_items, pick_slots, spread_each
from moerec.nn.model import Predictor
from moerec.nn.moe.hypotheses import ask_one
from moerec.types import Array, Batch, Catalog

N_RIVALS = 100  # as good as all: those below the first hundred do not enter a list of ten by a shift of gates
CUTOFF = 10
RANKING = 20.0  # what NDCG counts beside the log-likelihood: a twentieth of it as much as a nat
SOFTNESS = 0.1  # of comparisons, in nats
DEVIATION = 0.1  # of a group's shift from the common one, a priori; the common one is standard normal
_LEAST = -80.0  # of log-parts: nothing


class GateTargets(NamedTuple):
    """What the components of a mixture give to targets, and to those that stand before and behind them.

    Attributes:
      log_weight_QX: float32 log-weights of the components.
      log_part_QCX: float32 logs of what they give to each candidate, without the weights; the target is the first.
      is_rival_QC: bool, which of the candidates the target is compared with.
    """

    log_weight_QX: Array
    log_part_QCX: Array
    is_rival_QC: Array


@functools.partial(jax.jit, static_argnames="n_rivals")
def read_gates(
    predictor: Predictor, batch: Batch, queries: RankQueries, catalog: Catalog, n_rivals: int = N_RIVALS
) -> tuple[GateTargets, jax.Array | None]:
    """Of the queries' targets, among those that lead in their services. Where services are asked: of the answers of the
    targets' own, and with the log-posterior `[Q, Z]`.
    """
    log_domain_QZ = None
    flat_Q, target_Q = jnp.maximum(queries.slot, 0), jnp.maximum(queries.target, 0)
    if predictor.config.is_asked:
        answers = predictor.ask(batch, catalog, flat_Q, ask_one(catalog.service_I[target_Q]))
        log_softmax_QI, pointers = softmax_alone(answers, catalog)
        item_QS, log_domain_QZ = answers.item_QS, answers.log_domain_QZ
    else:
        outputs = predictor.encode(batch, catalog)
        log_softmax_QI = log_softmax_items(outputs, queries.slot, catalog)
        n_slots = batch.item_BT.shape[1]
        assert outputs.pointers is not None
        pointers, item_QS = pick_slots(outputs.pointers, flat_Q, n_slots), batch.item_BT[flat_Q // n_slots]
    assert pointers is not None
    log_weight_QX = pointers.log_weight_BTX
    given = spread_each(pointers, item_QS, catalog)
    log_p_QI = jnp.logaddexp(log_softmax_QI + log_weight_QX[:, :1], jnp.log(sum(given)))
    rival_QC, is_rival_QC = _pick_rivals(log_p_QI, queries, n_rivals)
    candidate_QC = jnp.concatenate([target_Q[:, None], rival_QC], axis=1)
    log_part_XQC = [jnp.take_along_axis(log_softmax_QI, candidate_QC, axis=1)]
    for x, given_QI in enumerate(given):
        log_given_QC = jnp.log(jnp.take_along_axis(given_QI, candidate_QC, axis=1))
        log_part_XQC.append(log_given_QC - log_weight_QX[:, None, 1 + x])
    log_part_QCX = jnp.maximum(jnp.stack(log_part_XQC, axis=-1), _LEAST)
    is_rival_QC = jnp.concatenate([jnp.zeros_like(is_rival_QC[:, :1]), is_rival_QC], axis=1)
    return GateTargets(log_weight_QX, log_part_QCX, is_rival_QC), log_domain_QZ


def _pick_rivals(log_p_QI: jax.Array, queries: RankQueries, n: int) -> tuple[jax.Array, jax.Array]:
    """`[Q, n]`, the likeliest items of the target's service, n at most; and which of them the target competes with."""
    item_I = jnp.arange(log_p_QI.shape[1])
    own_QI = (item_I >= queries.low[:, None]) & (item_I < queries.high[:, None])
    seen_QX = jnp.where(queries.seen >= 0, queries.seen, log_p_QI.shape[1])  # padding falls off the end
    row_Q1 = jnp.arange(log_p_QI.shape[0])[:, None]
    open_QI = jnp.where(own_QI, log_p_QI, -jnp.inf).at[row_Q1, seen_QX].set(-jnp.inf, mode="drop")
    best_QC, rival_QC = jax.lax.top_k(open_QI, min(n, log_p_QI.shape[1]))
    return rival_QC, (rival_QC != queries.target[:, None]) & (best_QC > -jnp.inf)


def smooth_ndcg(score_QC: jax.Array, is_rival_QC: jax.Array) -> jax.Array:
    """`[Q]`, NDCG at `CUTOFF` of the first column among its rivals, with a gradient."""
    above_QC = jax.nn.sigmoid((score_QC - score_QC[:, :1]) / SOFTNESS)
    rank_Q = 1 + jnp.sum(jnp.where(is_rival_QC, above_QC, 0), axis=1)
    return jax.nn.sigmoid(CUTOFF + 0.5 - rank_Q) / jnp.log2(1 + rank_Q)


@jax.jit
def _gate_loss(
    common_and_own: jax.Array, targets: GateTargets, group_Q: jax.Array, weight_Q: jax.Array, is_known_Q: jax.Array
) -> jax.Array:
    common_X, own_GX = common_and_own[0], common_and_own[1:]
    shift_QX = (common_X + own_GX)[group_Q]
    log_gate_QX = jax.nn.log_softmax(targets.log_weight_QX + shift_QX)
    log_p_QC = jax.nn.logsumexp(log_gate_QX[:, None] + targets.log_part_QCX, axis=-1)
    likelihood = jnp.sum(log_p_QC[:, 0] * is_known_Q)
    ndcg = jnp.sum(weight_Q * smooth_ndcg(log_p_QC, targets.is_rival_QC))
    prior = 0.5 * jnp.sum(common_X**2) + 0.5 * jnp.sum((own_GX / DEVIATION) ** 2)
    return prior - likelihood - RANKING * ndcg


_gate_loss_and_slope = jax.jit(jax.value_and_grad(_gate_loss))


def fit_gates(targets: GateTargets, service_Q: np.ndarray, n_services: int, by_service: bool) -> np.ndarray:
    """`[Z, X]` float32, what is best added to the gates' logits; `[X]` where all services have the same gates.

    The sum over the targets of their log-likelihood, and of `RANKING` times the mean of the services' NDCG. What a
    service differs by from the others is kept small a priori, so that few targets move little.

    Args:
      service_Q: of which service each target is. by_service: whether each has gates of its own.
    """
    n, n_components = targets.log_weight_QX.shape
    size_Z = np.bincount(service_Q, minlength=n_services)
    weight_Q = (n / max((size_Z > 0).sum(), 1) / np.maximum(size_Z, 1))[service_Q]
    group_Q, n_groups = (service_Q, n_services) if by_service else (np.zeros(n, int), 1)
    # One shape for all validations of a run: what is padded has no weight.
    width = 1 << max(n - 1, 1).bit_length()
    columns = (*map(np.asarray, targets), group_Q, weight_Q, np.ones(n))
    padded = [np.pad(x, [(0, width - n), *[(0, 0)] * (x.ndim - 1)]) for x in columns]
    known = jax.device_put((GateTargets(*padded[:3]), *padded[3:]))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _gate_loss_and_slope(jnp.asarray(flat.reshape(-1, n_components), jnp.float32), *known)
        return float(value), np.asarray(slope, np.float64).ravel()

    start = np.zeros((n_groups + 1) * n_components)
    # In float32 a smaller improvement is none.
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-7})
    common_and_own = found.x.reshape(-1, n_components)
    shift_GX = (common_and_own[0] + common_and_own[1:]).astype(np.float32)
    return shift_GX if by_service else shift_GX[0]
