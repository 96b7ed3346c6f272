"""What is fitted on validation: how far the posterior over services and the gates of the mixture can be believed.

The posterior's temperature (Guo et al. 2017), where it weighs answers; and the biases of the gates (`gates`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import ModelConfig
from moerec.eval.ranking.dataset import EvalDataset, RankQueries
from moerec.eval.ranking.gates import GateTargets, fit_gates, read_gates
from moerec.nn.heads.near_pointers import near_names
from moerec.nn.model import Calibration, Predictor
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


def calibrate(predictor: Predictor, catalog: Catalog, examples: EvalDataset) -> Calibration:
    """The calibration that fits a predictor, which has none yet, to these targets, which are validation's.

    First the gates, of which the posterior knows nothing; nothing where there is nothing to fit.
    """
    config = predictor.config
    if not needs_calibration(config):
        return Calibration()
    gates: list[GateTargets] = []
    posteriors: list[np.ndarray] = []
    truth: list[np.ndarray] = []

    def collect(which: slice, queries: RankQueries, of_gates: GateTargets | None, log_domain_QZ: jax.Array | None):
        known = np.flatnonzero(queries.slot >= 0)
        truth.append(examples.target_service[which.start + known])
        if of_gates is not None:
            gates.append(GateTargets(*(np.asarray(x)[known] for x in of_gates)))
        if log_domain_QZ is not None:
            posteriors.append(np.asarray(log_domain_QZ)[known])

    waiting = None
    with mesh_of(predictor):
        for which, batch, queries in examples.batches():
            of_gates = None
            if near_names(config):
                of_gates, log_domain_QZ = read_gates(predictor, batch, queries, catalog)
            else:  # nothing has to be asked for the posterior alone
                log_domain_QZ = _read_posterior(predictor, batch, queries.slot, catalog)
            if waiting is not None:  # what was asked before is there by now
                collect(*waiting)
            waiting = which, queries, of_gates, log_domain_QZ
    if waiting is not None:
        collect(*waiting)
    service_Q = np.concatenate([np.zeros(0, int), *truth])
    if not len(service_Q):
        return Calibration()
    temperature = fit_temperature(np.concatenate(posteriors), service_Q) if config.is_asked else 1.0
    if not gates:
        return Calibration(temperature)
    targets = GateTargets(*map(np.concatenate, zip(*gates, strict=True)))
    n_services = examples.dataset.catalogue.n_services
    return Calibration(temperature, fit_gates(targets, service_Q, n_services, by_service=config.is_asked))
