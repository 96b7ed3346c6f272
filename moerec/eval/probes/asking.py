"""What experts, hypotheses and the posterior of an asked model are worth, on a sample of the targets.

Nothing is trained: parts of a trained model are forced, taken away or replaced, and what changes is the log-loss of the
targets and their place in the union. A forced matrix whose diagonal is best proves that services differ, not that their
experts are of use; `experiments.compare` of a run without them does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.eval.metrics import RankCounts, per_target_metrics
from moerec.eval.probes.answers import choose_services
from moerec.eval.ranking import EvalDataset, RankQueries
from moerec.eval.ranking.rank import BatchRanks, count_ranks_of_scores
from moerec.nn.heads.answers import log_prob_target
from moerec.nn.heads.query_blocks import map_blocks
from moerec.nn.layers import MASK_VALUE
from moerec.nn.model import Predictor
from moerec.nn.moe.hypotheses import Hypotheses, ask_all, ask_one
from moerec.nn.moe.router import count_groups
from moerec.nn.sharding import mesh_of
from moerec.types import Batch, Catalog

MASS = 0.99
FORCED = {"both": (True, True), "experts": (True, False), "vector": (False, True)}


class Asked(NamedTuple):
    """Of the targets that were probed. Attributes: `[n]` log-probabilities of the targets over the union, and their
    NDCG@10 there.
    """

    log_p: np.ndarray
    ndcg: np.ndarray


@jax.jit
def _answer_targets(
    predictor: Predictor,
    batch: Batch,
    queries: RankQueries,
    catalog: Catalog,
    hypotheses: Hypotheses,
    closed_G: jax.Array | None,
) -> jax.Array:
    """`[Q, X]`, log p(target | the service that answers) under each hypothesis."""
    flat_Q = jnp.maximum(queries.slot, 0)
    answers = predictor.ask(batch, catalog, flat_Q, hypotheses, closed_G=closed_G)
    operands = answers._replace(routing=None), jnp.maximum(queries.target, 0)
    return map_blocks(lambda own, target_Q: log_prob_target(own, catalog, target_Q), operands, len(catalog.service_I))


@jax.jit
def _rank_weighed(
    predictor: Predictor, batch: Batch, queries: RankQueries, catalog: Catalog, log_weight_QZ: jax.Array
) -> BatchRanks:
    """Ranks where the answers have these weights."""
    flat_Q = jnp.maximum(queries.slot, 0)
    answers = predictor.ask(batch, catalog, flat_Q, ask_all(log_weight_QZ))
    count = functools.partial(count_ranks_of_scores, has_log_probs=True)
    return predictor.map_answers(count, answers, queries.slot, catalog, (queries,))


class Prober:
    """Runs probes over targets that have a slot to ask at."""

    def __init__(self, predictor: Predictor, examples: EvalDataset, catalog: Catalog):
        self.predictor, self.examples, self.catalog = predictor, examples, catalog
        self.n_services = examples.dataset.catalogue.n_services

    def answers(self, vector: int | None, group: int | None, closed: int | None = None) -> np.ndarray:
        """`[n]`, log p(target | its service), under another service's vector and experts, or without a group."""
        parts, n_groups = [], count_groups(self.predictor.config.moe, self.n_services)
        closed_G = None if closed is None else jnp.where(jnp.arange(n_groups) == closed, MASK_VALUE, 0.0)
        with mesh_of(self.predictor):
            for which, batch, queries in self.examples.batches():
                own_Q1 = np.zeros((len(queries.slot), 1), np.int32)
                own_Q1[: which.stop - which.start, 0] = self.examples.target_service[which]
                vector_Q1, group_Q1 = (own_Q1 if z is None else np.full_like(own_Q1, z) for z in (vector, group))
                own_Q, vector_Q, group_Q = (jnp.asarray(x[:, 0]) for x in (own_Q1, vector_Q1, group_Q1))
                asked = ask_one(own_Q, vector_Q, group_Q)
                found = _answer_targets(self.predictor, batch, queries, self.catalog, asked, closed_G)
                parts.append(np.asarray(found, np.float64)[: which.stop - which.start, 0])
        return np.concatenate(parts)

    def ranks(self, log_weight: np.ndarray) -> Asked:
        """The targets' log-probabilities and places, where the answers of services have these weights `[n, Z]`."""
        log_p, greater, equal = [], [], []
        with mesh_of(self.predictor):
            for which, batch, queries in self.examples.batches():
                n = which.stop - which.start
                weight_QZ = np.zeros((len(queries.slot), self.n_services), np.float32)
                weight_QZ[:n] = log_weight[which]
                found = _rank_weighed(self.predictor, batch, queries, self.catalog, weight_QZ)
                log_p.append(np.asarray(found.log_p, np.float64)[:n])
                greater.append(np.asarray(found.greater_union, np.int64)[:n])
                equal.append(np.asarray(found.equal_union, np.int64)[:n])
        counts = RankCounts(np.concatenate(greater), np.concatenate(equal))
        return Asked(np.concatenate(log_p), per_target_metrics(counts)["ndcg@10"])


def evaluate_asking(
    config: Config, prober: Prober, log_posterior: np.ndarray, exact: np.ndarray | None
) -> dict[str, Any]:
    """`probes["asking"]`: `forced`, `forced_interval`, `removed` and `posteriors`.

    `forced[what][a][z]` is the mean loss (nats) of the targets of service z, which answers, under the vector and the
    experts of a (`both`), or one of the two; `forced_interval`, half the width of the 95 % interval of what it is above
    the diagonal, by the normal distribution over targets. `removed[group][z]` is what the loss of z's targets grows by
    without a group of experts; nothing would be left of them without a cross group. `posteriors` are log-loss and union
    NDCG@10 by whose p(service) weighs the answers: the model's own, that of its most probable services alone (mass .99;
    a target of another one is given a uniform guess), uniform, another user's (`random`), the exact one (built-in
    world).

    Args:
      log_posterior: `[n, Z]`, the model's own p(service). exact: that of the oracle, or None.
    """
    examples, services = prober.examples, prober.examples.dataset.catalogue.services
    service = examples.target_service
    has_experts = bool(config.model.moe.layers)
    own_answer = prober.answers(None, None)

    def by_service(values: np.ndarray, measure: Callable[[np.ndarray], float] = np.mean, least: int = 1) -> list:
        of_service = [values[service == z] for z in range(len(services))]
        return [float(measure(x)) if len(x) >= least else None for x in of_service]

    found: dict[str, Any] = {"n": len(service), "forced": {}, "forced_interval": {}, "removed": {}}
    for what, (is_expert, is_vector) in FORCED.items():
        if has_experts or not is_expert:
            forced = [prober.answers(z if is_vector else None, z if is_expert else None) for z in range(len(services))]
            found["forced"][what] = [by_service(-x) for x in forced]
            found["forced_interval"][what] = [by_service(own_answer - x, _half_width, 2) for x in forced]
    if has_experts and config.model.moe.cross:
        for g, name in enumerate((*services, "cross")):
            found["removed"][name] = by_service(own_answer - prober.answers(None, None, closed=g))
    weights = {
        "own": log_posterior,
        "most_probable": _keep_most_probable(log_posterior),
        "uniform": np.full_like(log_posterior, -np.log(len(services))),
        # Targets stand by user, so that half of them on it is (all but) always another one.
        "random": np.roll(log_posterior, len(log_posterior) // 2, axis=0),
    }
    if exact is not None:
        weights["exact"] = exact
    ranks = {name: prober.ranks(weight) for name, weight in weights.items()}
    least = -np.log(examples.dataset.catalogue.n_items)
    is_left_out = ranks["most_probable"].log_p < MASK_VALUE / 2
    ranks["most_probable"].log_p[is_left_out] = least
    found["posteriors"] = {
        name: {"log_loss": float(-x.log_p.mean()), "ndcg@10": float(x.ndcg.mean())} for name, x in ranks.items()
    }
    return found


def _half_width(values: np.ndarray) -> float:
    return 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5


def _keep_most_probable(log_posterior: np.ndarray) -> np.ndarray:
    """As requests ask (`choose_services`): the others have no weight."""
    kept = np.full_like(log_posterior, MASK_VALUE)
    for row, log_p in zip(kept, log_posterior, strict=True):  # over a sample
        chosen, log_weight = choose_services(log_p, MASS, None)
        row[chosen] = log_weight
    return kept
