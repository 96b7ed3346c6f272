"""What is fitted on validation: how far the posterior over services and the gates of the mixture can be believed.

The posterior's temperature (Guo et al. 2017), where it weighs answers. And the biases of the gates, where some pointers
reach items that no training event is of: among training targets there are none, so that only targets held out can tell
how often to rely on these (stacking: Wolpert 1992).
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from moerec.config import ModelConfig
from moerec.eval.ranking.dataset import EvalDataset, RankQueries
from moerec.nn.heads.answers import softmax_alone, split_target
from moerec.nn.heads.item import log_softmax_items, pick_slots
from moerec.nn.heads.near_pointers import near_names
from moerec.nn.model import Calibration, Predictor
from moerec.nn.moe.hypotheses import ask_one
from moerec.nn.sharding import mesh_of
from moerec.types import Batch, Catalog

N_BINS = 15  # of the calibration error
_LOG_TEMPERATURES = np.array(sorted(np.linspace(-2, 2, 161), key=abs))  # of equals the nearest to none


def calibration_error(log_p_QZ: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error of the most probable class, over bins of equal width."""
    confidence = np.exp(log_p_QZ.max(axis=1))
    hit = log_p_QZ.argmax(axis=1) == truth
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    gap = np.bincount(bins, weights=hit - confidence, minlength=N_BINS)
    return float(np.abs(gap).sum() / max(len(truth), 1))


def scale_posterior(log_p_QZ: np.ndarray, temperature: float) -> np.ndarray:
    """`[Q, Z]` float64 log-posterior under a temperature."""
    scaled = log_p_QZ.astype(np.float64) / temperature
    return scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)


def fit_temperature(log_p_QZ: np.ndarray, truth: np.ndarray) -> float:
    """The temperature of least cross-entropy, to 2.5 %; 1 where it makes no difference."""
    rows = np.arange(len(truth))
    losses = [-np.sum(scale_posterior(log_p_QZ, np.exp(t))[rows, truth]) for t in _LOG_TEMPERATURES]
    return float(np.exp(_LOG_TEMPERATURES[int(np.argmin(losses))]))


def needs_calibration(config: ModelConfig) -> bool:
    """Whether there is anything to fit."""
    return config.is_asked or bool(near_names(config))


@jax.jit
def _read_posterior(predictor: Predictor, batch: Batch, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
    log_domain_BTZ = predictor.params.read(batch, catalog).log_domain_BTZ
    assert log_domain_BTZ is not None
    return log_domain_BTZ.reshape(-1, log_domain_BTZ.shape[-1])[jnp.maximum(slot_Q, 0)]


@jax.jit
def _read_gates(
    predictor: Predictor, batch: Batch, queries: RankQueries, catalog: Catalog
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`[Q, X]` twice: log-weights of the components, and the logs of what they give to the targets, without them. Where
    services are asked, of the answers of the targets' own, and with the log-posterior `[Q, Z]`.
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
    log_softmax_Q1 = jnp.take_along_axis(log_softmax_QI, target_Q[:, None], axis=1)
    log_given_QX = jnp.log(split_target(pointers, item_QS, catalog, target_Q)) - log_weight_QX[:, 1:]
    return log_weight_QX, jnp.concatenate([log_softmax_Q1, log_given_QX], axis=1), log_domain_QZ


def fit_gates(log_weight_QX: np.ndarray, log_part_QX: np.ndarray, group_Q: np.ndarray, n_groups: int) -> np.ndarray:
    """`[groups, X]` float32, what added to the gates' logits gives the targets the greatest likelihood.

    With a standard normal prior on each, so that few targets move little.

    Args:
      log_weight_QX: log-weights of the components at each target.
      log_part_QX: logs of what each gives to the target; -inf for nothing.
      group_Q: of which group each target is.
    """
    shape = n_groups, log_weight_QX.shape[1]
    log_weight_QX = log_weight_QX.astype(np.float64)
    log_part_QX = np.maximum(log_part_QX.astype(np.float64), -100.0)
    of_group_GQ = (group_Q == np.arange(n_groups)[:, None]).astype(np.float64)

    def negative(flat: np.ndarray) -> tuple[float, np.ndarray]:
        shift_GX = flat.reshape(shape)
        logit_QX = log_weight_QX + shift_GX[group_Q]
        log_gate_QX = logit_QX - np.logaddexp.reduce(logit_QX, axis=1, keepdims=True)
        joint_QX = log_gate_QX + log_part_QX
        log_p_Q1 = np.logaddexp.reduce(joint_QX, axis=1, keepdims=True)
        slope_QX = np.exp(log_gate_QX) - np.exp(joint_QX - log_p_Q1)
        loss = -log_p_Q1.sum() + 0.5 * (shift_GX**2).sum()
        return float(loss), (of_group_GQ @ slope_QX + shift_GX).ravel()

    found = scipy.optimize.minimize(negative, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B")
    return found.x.reshape(shape).astype(np.float32)


def calibrate(predictor: Predictor, catalog: Catalog, examples: EvalDataset) -> Calibration:
    """The calibration that fits a predictor, which has none yet, to these targets, which are validation's.

    First the gates, of which the posterior knows nothing; nothing where there is nothing to fit.
    """
    config, gates, posteriors, found = predictor.config, [], [], []
    if not needs_calibration(config):
        return Calibration()
    with mesh_of(predictor):
        for which, batch, queries in examples.batches():
            known = np.flatnonzero(queries.slot >= 0)
            found.append(which.start + known)
            if near_names(config):
                *of_gates, log_domain_QZ = _read_gates(predictor, batch, queries, catalog)
                gates.append([np.asarray(x)[known] for x in of_gates])
            else:  # nothing has to be asked for the posterior alone
                log_domain_QZ = _read_posterior(predictor, batch, queries.slot, catalog)
            if log_domain_QZ is not None:
                posteriors.append(np.asarray(log_domain_QZ)[known])
    truth = examples.target_service[np.concatenate(found)] if found else np.zeros(0, int)
    if not len(truth):
        return Calibration()
    temperature = fit_temperature(np.concatenate(posteriors), truth) if config.is_asked else 1.0
    if not gates:
        return Calibration(temperature)
    log_weight_QX, log_part_QX = map(np.concatenate, zip(*gates, strict=True))
    aggregator = predictor.params.head.aggregator
    assert aggregator is not None
    shape = aggregator.gate_bias.shape
    group = truth if len(shape) == 2 else np.zeros(len(truth), int)
    shift = fit_gates(log_weight_QX, log_part_QX, group, shape[0] if len(shape) == 2 else 1)
    return Calibration(temperature, shift.reshape(shape))
