"""What the routing of a trained mixture does on the test targets, and how good its analyser is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.eval.ranking import EvalDataset
from moerec.eval.ranking.calibrate import calibration_error, fit_temperature, scale_posterior
from moerec.nn.model import Predictor
from moerec.nn.moe.balance import describe_load
from moerec.nn.sharding import mesh_of
from moerec.tasks.base import find_domains
from moerec.tasks.next_event import NextEvent
from moerec.types import Batch, Catalog, Routing


class RoutingStats(NamedTuple):
    """Attributes:
    log_domain_QZ: float32, the analyser's log-posterior at each target that has a slot; None in a dense model.
    log_weight_QX: float32, logs of the mixture's weights there; None where the softmax is the only one.
    relevance_QM: float32, what each slot of the profile matters there; None in a model without one.
    service_Q: int, its service.
    routing: sums over all slots of the histories, each under the service of the event after it; None in a dense model.
    """

    log_domain_QZ: np.ndarray | None
    log_weight_QX: np.ndarray | None
    relevance_QM: np.ndarray | None
    service_Q: np.ndarray
    routing: Routing | None


@jax.jit
def _encode_batch(predictor: Predictor, batch: Batch, slot_Q: jax.Array, catalog: Catalog):
    """What of `RoutingStats` is the model's: the first three at each query, and the routing of the batch."""
    domain_BT = find_domains([NextEvent()], batch, catalog)
    asked = {"hypothesis_BT": domain_BT} if predictor.config.is_asked else {}
    outputs = predictor.encode(batch, catalog, domain_BT=domain_BT, **asked)

    def pick(values_BTX):
        return values_BTX.reshape(-1, values_BTX.shape[-1])[jnp.maximum(slot_Q, 0)]

    log_weight_BTX = None if outputs.pointers is None else outputs.pointers.log_weight_BTX
    return *jax.tree.map(pick, (outputs.log_domain_BTZ, log_weight_BTX, outputs.relevance_BTM)), outputs.routing


def collect_routing(predictor: Predictor, examples: EvalDataset, catalog: Catalog) -> RoutingStats:
    """Runs a model over the targets' histories."""
    picked, services, routings = [], [], []
    for which, batch, queries in examples.batches():
        with mesh_of(predictor):
            *of_targets, routing = _encode_batch(predictor, batch, queries.slot, catalog)
        known = np.flatnonzero(queries.slot >= 0)
        picked.append([None if x is None else np.asarray(x)[known] for x in of_targets])
        services.append(examples.target_service[which][known])
        routings.append(jax.tree.map(lambda x: np.asarray(x, np.float64), routing))
    log_domain_QZ, log_weight_QX, relevance_QM = jax.tree.map(lambda *parts: np.concatenate(parts), *picked)
    total = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *routings)
    return RoutingStats(log_domain_QZ, log_weight_QX, relevance_QM, np.concatenate(services), total)


def macro_f1(guess: np.ndarray, truth: np.ndarray, n_classes: int) -> float:
    """The mean over the classes that occur of `2 TP / (2 TP + FP + FN)`."""
    confusion = np.bincount(truth * n_classes + guess, minlength=n_classes**2).reshape(n_classes, n_classes)
    hits, wanted, named = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = 2 * hits / np.maximum(wanted + named, 1)
    return float(f1[wanted > 0].mean()) if len(truth) else 0.0


def summarize_routing(fitted: RoutingStats, seen: RoutingStats) -> dict[str, Any]:
    """`metrics["routing"]`: the load on the test histories; the analyser's macro-F1 and calibration at the targets.

    `ece` is that of the posterior under the temperature fitted on validation; `ece_raw` without it.

    Args:
      fitted: of a mixture on the validation targets. seen: on the test targets.
    """
    assert fitted.log_domain_QZ is not None
    assert seen.log_domain_QZ is not None
    temperature = fit_temperature(fitted.log_domain_QZ, fitted.service_Q)
    log_p_QZ, truth = seen.log_domain_QZ, seen.service_Q
    analyser = {
        "macro_f1": macro_f1(log_p_QZ.argmax(axis=1), truth, log_p_QZ.shape[1]),
        "ece": calibration_error(scale_posterior(log_p_QZ, temperature), truth),
        "ece_raw": calibration_error(log_p_QZ, truth),
        "temperature": temperature,
    }
    load = {} if seen.routing is None else describe_load(seen.routing)
    return {**load, "analyser": analyser}


def describe_mixture(seen: RoutingStats, n_services: int) -> list[list[float] | None]:
    """`probes["mixture_weights"]`: for each service, mean weights of the mixture components at its targets.

    First the softmax over the catalogue, then the pointers; None for a service without such a target.
    """
    assert seen.log_weight_QX is not None
    weight_QX = np.exp(seen.log_weight_QX)
    by_service = (weight_QX[seen.service_Q == z] for z in range(n_services))
    return [w_QX.mean(axis=0).tolist() if len(w_QX) else None for w_QX in by_service]
