"""How far a posterior over services can be believed, and the temperature that makes it so (Guo et al. 2017)."""

import jax
import jax.numpy as jnp
import numpy as np

from moerec.eval.ranking.dataset import EvalDataset
from moerec.nn.model import Predictor
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


@jax.jit
def _read_posterior(predictor: Predictor, batch: Batch, slot_Q: jax.Array, catalog: Catalog) -> jax.Array:
    log_domain_BTZ = predictor.params.read(batch, catalog).log_domain_BTZ
    assert log_domain_BTZ is not None
    return log_domain_BTZ.reshape(-1, log_domain_BTZ.shape[-1])[jnp.maximum(slot_Q, 0)]


def calibrate(predictor: Predictor, catalog: Catalog, examples: EvalDataset) -> Predictor:
    """The predictor with the temperature that fits the analyser's posterior to these targets, which are validation's.

    Only where services are asked does the posterior weigh anything.
    """
    if not predictor.config.is_asked:
        return predictor
    found, truth = [], []
    with mesh_of(predictor):
        for which, batch, queries in examples.batches():
            known = np.flatnonzero(queries.slot >= 0)
            found.append(np.asarray(_read_posterior(predictor, batch, queries.slot, catalog))[known])
            truth.append(examples.target_service[which][known])
    temperature = fit_temperature(np.concatenate(found), np.concatenate(truth)) if sum(map(len, truth)) else 1.0
    return predictor._replace(temperature=temperature)
