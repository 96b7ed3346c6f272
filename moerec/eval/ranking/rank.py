"""Full ranking of every target over its service's catalogue and over the union, on the device."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.data.load import RunData
from moerec.errors import WorkError
from moerec.eval.metrics import MISS, RankCounts, Ranks, ScoredRanks, per_target_metrics
from moerec.eval.ranking.calibrate import calibrate, needs_calibration
from moerec.eval.ranking.dataset import EvalDataset, PackedTargets, RankQueries, make_valid_set
from moerec.nn.model import Predictor
from moerec.nn.sharding import mesh_of
from moerec.train.loop import Evaluator
from moerec.types import Array, Batch, Catalog


class BatchRanks(NamedTuple):
    """Candidates above (`greater`) and level with (`equal`, the target included) each target; int32 `[Q]`.

    `finite` is whether all scores are, `log_p` float32, the target's log-probability over the union.
    """

    greater_in_service: jax.Array
    equal_in_service: jax.Array
    greater_union: jax.Array
    equal_union: jax.Array
    finite: jax.Array
    log_p: jax.Array


@functools.partial(jax.jit, static_argnames="most")
def rank_batch(
    predictor: Predictor,
    batch: Batch,
    queries: RankQueries,
    catalog: Catalog,
    profile_source_BT: jax.Array | None = None,
    most: int = 0,
) -> BatchRanks:
    """Where a batch's targets stand.

    Args:
      catalog: bound. profile_source_BT: whose profile each slot gets, where not its own (`swap_profiles`).
      most: scores that are in memory at once, see `map_blocks`.
    """
    profile = None
    if profile_source_BT is not None:
        own = predictor.params.read_profiles(batch, catalog)
        profile = predictor.params.replace_profiles(own, profile_source_BT, batch)
    count = functools.partial(count_ranks_of_scores, has_log_probs=predictor.has_log_probs)
    return predictor.map_scores(count, batch, queries.slot, catalog, (queries,), profile, most)


def count_ranks_of_scores(score_QI: jax.Array, queries: RankQueries, has_log_probs: bool) -> BatchRanks:
    """Counts by comparison, without a sort. A target that is itself among the seen items is a miss.

    Args: whether the scores of a query are log-probabilities, whose sum is one.
    """
    score_QI = jax.lax.optimization_barrier(score_QI)  # what is compared is computed once, or its bits might differ
    target = jnp.maximum(queries.target, 0)[:, None]
    level = jnp.take_along_axis(score_QI, target, axis=1)
    item_I = jnp.arange(score_QI.shape[1])
    own_QI = (item_I >= queries.low[:, None]) & (item_I < queries.high[:, None])
    above_QI, level_QI = score_QI > level, score_QI == level
    # In one pass over the scores: of single sums XLA's CPU backend writes the terms to memory first.
    of_items = above_QI & own_QI, level_QI & own_QI, above_QI, level_QI, ~jnp.isfinite(score_QI)
    above_own, level_own, above_all, level_all, n_broken = jax.lax.reduce(
        tuple(x.astype(jnp.int32) for x in of_items),
        (np.int32(0),) * len(of_items),
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        (1,),
    )
    seen = queries.seen
    seen_score = jnp.take_along_axis(score_QI, jnp.maximum(seen, 0), axis=1)
    masked = (seen >= 0) & (seen != target)
    masked_own = masked & (seen >= queries.low[:, None]) & (seen < queries.high[:, None])

    def leave_out(n, of_seen):
        return n - jnp.sum(of_seen, axis=1)

    missed = jnp.any(seen == target, axis=1) & (queries.target >= 0)
    above, equal = seen_score > level, seen_score == level
    return BatchRanks(
        jnp.where(missed, MISS, leave_out(above_own, above & masked_own)),
        jnp.where(missed, 1, leave_out(level_own, equal & masked_own)),
        jnp.where(missed, MISS, leave_out(above_all, above & masked)),
        jnp.where(missed, 1, leave_out(level_all, equal & masked)),
        n_broken == 0,
        level[:, 0] - (0 if has_log_probs else jax.nn.logsumexp(score_QI, axis=1)),
    )


Intervention = Callable[[Batch, np.ndarray], tuple[Batch, Array | None]]


def rank_targets(
    predictor: Predictor, examples: PackedTargets, catalog: Catalog, intervention: Intervention | None = None
) -> ScoredRanks:
    """Where each target stands, and its log-probability.

    Args:
      predictor: what is evaluated. examples: the targets with their histories. catalog: bound to the predictor.
      intervention: what is done to each batch of histories first, given whose each of them is; it may name the slots'
        sources of profiles (`swap_profiles`).

    Raises:
      WorkError: a score is not finite.
    """
    parts: list[tuple[slice, BatchRanks]] = []
    ranked: list[np.ndarray] = []
    log_p: list[np.ndarray] = []

    def collect():
        which, ranks = parts.pop()
        n = which.stop - which.start
        *counts, finite, of_target = [np.asarray(x)[:n] for x in ranks]
        if not finite.all():
            row = which.start + int(np.flatnonzero(~finite)[0])
            raise WorkError(f"evaluation: target {row} got a score that is not finite")
        ranked.append(np.stack(counts).astype(np.int64))
        log_p.append(of_target.astype(np.float64))

    with mesh_of(predictor):
        for which, batch, queries in examples.batches():
            source_BT = None
            if intervention is not None:
                batch, source_BT = intervention(batch, examples.users_of(which))
            ranks = rank_batch(predictor, batch, queries, catalog, source_BT)
            if parts:  # the batch before has been computed while this one was packed
                collect()
            parts.append((which, ranks))
    if parts:
        collect()
    joined = np.concatenate(ranked, axis=1) if ranked else np.zeros((4, 0), np.int64)
    counts = RankCounts(joined[0], joined[1]), RankCounts(joined[2], joined[3])
    return ScoredRanks(Ranks(*counts), np.concatenate([np.zeros(0), *log_p]))


def evaluate_targets(
    predictor: Predictor, catalog: Catalog, examples: EvalDataset, selection: str
) -> tuple[float, dict[str, float]]:
    """The score that picks the best step (`eval.selection`), and the validation metrics; with what the predictor was
    calibrated to on these targets, where it has to be.
    """
    calibration = calibrate(predictor, catalog, examples)
    predictor = calibration.apply(predictor)
    ranks = rank_targets(predictor, examples, catalog)
    in_service, union = per_target_metrics(ranks.in_service), per_target_metrics(ranks.union)
    metrics = {f"valid/union/{name}": float(union[name].mean()) for name in ("ndcg@10", "recall@10")}
    if needs_calibration(predictor.config):
        metrics |= calibration.list_metrics()
    own = {}
    for code, service in enumerate(examples.dataset.catalogue.services):
        rows = examples.target_service == code
        if rows.any():
            own[service] = float(in_service["ndcg@10"][rows].mean())
            metrics[f"valid/in_service/{service}/ndcg@10"] = own[service]
    score = metrics["valid/union/ndcg@10"] if selection == "union" else float(np.mean(list(own.values())))
    return score, metrics


def make_evaluator(config: Config, data: RunData) -> Evaluator:
    """What training is handed to validate with."""
    examples = make_valid_set(config, data)

    def evaluate(predictor: Predictor, catalog: Catalog) -> tuple[float, dict[str, float]]:
        return evaluate_targets(predictor, catalog, examples, config.eval.selection)

    return evaluate
