"""The oracle of the built-in world among the rows of the table: the exact Bayes posterior predictive, ranked."""

import dataclasses
from typing import NamedTuple

import numpy as np

from moerec.config import Config
from moerec.data.city.oracle import predict_targets
from moerec.data.dataset import keep_last_events
from moerec.data.load import RunData
from moerec.eval.metrics import RankCounts, Ranks, ScoredRanks, count_ranks, per_target_metrics
from moerec.eval.ranking.dataset import EvalDataset


class Ceiling(NamedTuple):
    """Where the oracle puts each target, its guess of the service, and its log-posterior over services `[n, Z]`."""

    ranks: ScoredRanks
    service: np.ndarray
    log_service: np.ndarray


def rank_ceiling(examples: EvalDataset, data: RunData, mask_seen: bool, **knowledge: bool) -> Ceiling:
    """The best that can be known of the targets. `knowledge` as in `predict_targets`."""
    assert data.world is not None
    n = len(examples.targets)
    counts, log_p = np.zeros((4, n), np.int64), np.zeros(n)
    share = np.zeros((n, examples.dataset.catalogue.n_services))
    catalogue, item_of = examples.dataset.catalogue, examples.dataset.log.item
    for positions, scores in predict_targets(data.world, examples.dataset, examples.targets, **knowledge):
        item, service = examples.target_item[positions], examples.target_service[positions]
        low, high = catalogue.offsets[service], catalogue.offsets[service + 1]
        seen = None
        if mask_seen:
            pieces = [examples.histories.slice(p, p + 1).rows for p in positions]
            edges = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
            seen = (edges, item_of[np.concatenate(pieces)])
        own = count_ranks(scores, item, seen, (low, high))
        union = count_ranks(scores, item, seen)
        counts[:, positions] = own.greater, own.equal, union.greater, union.equal
        log_p[positions] = scores[np.arange(len(item)), item]
        share[positions] = np.add.reduceat(np.exp(scores.astype(np.float64)), catalogue.offsets[:-1], axis=1)
    ranks = ScoredRanks(Ranks(RankCounts(counts[0], counts[1]), RankCounts(counts[2], counts[3])), log_p)
    return Ceiling(ranks, share.argmax(axis=1), np.log(share))


def excess_log_loss(
    ranks: ScoredRanks, exact: ScoredRanks, service: np.ndarray, services: tuple[str, ...]
) -> dict[str, float]:
    """`{"all" and services: nats}`, how much less log-probability a model gives to the targets than the exact posterior
    does, in the mean; what is left to be learnt. A service without a target is not there.

    Args: of the same targets; their services.
    """
    excess = exact.log_p - ranks.log_p
    rows = {"all": np.ones(len(service), bool), **{name: service == z for z, name in enumerate(services)}}
    return {name: float(excess[own].mean()) for name, own in rows.items() if own.any()}


def measure_attainable(config: Config, data: RunData, examples: EvalDataset) -> dict[str, float]:
    """Union NDCG@10 of the exact posterior by what it knows: `all` that is observed, profile fields too; `no context`,
    in the mean over the contexts of the month's days; and, where attention has a window, `window`: a filter that begins
    with the first event that attention reaches, as if nothing had been before, without the fields.
    """

    def measure(known: EvalDataset, known_data: RunData, **knowledge: bool) -> float:
        ranks = rank_ceiling(known, known_data, config.eval.mask_seen, **knowledge).ranks
        return float(per_target_metrics(ranks.union)["ndcg@10"].mean())

    found = {
        "all": measure(examples, data, use_profile=True),
        "no context": measure(examples, data, use_profile=True, use_context=False),
    }
    if config.model.window and not config.eval.mask_seen:  # fewer events would mask fewer items
        n_reached = config.model.n_layers * (config.model.window - 1) + 1
        dataset, targets = keep_last_events(data.dataset, examples.targets, n_reached)
        shorter = dataclasses.replace(data, dataset=dataset)
        found["window"] = measure(EvalDataset(dataset, targets, config), shorter)
    return found
