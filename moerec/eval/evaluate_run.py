"""The final table of a run: the model, the baselines and, on the city world, the ceiling, over the same targets."""

import dataclasses
import resource
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moerec.config import Config, MoEConfig, PersonalConfig
from moerec.data.city.oracle import predict_targets
from moerec.data.dataset import keep_last_events
from moerec.data.load import RunData
from moerec.data.splits import TEST, TRAIN, select_targets
from moerec.errors import InputError
from moerec.eval.baselines import BASELINES as COUNT_BASELINES
from moerec.eval.baselines import rank_by_scores
from moerec.eval.baselines.ranking import Ranked, slice_histories
from moerec.eval.metrics import (
    RankCounts,
    bucket_coldness,
    bucket_history_length,
    build_table,
    count_ranks,
    per_target_metrics,
    slice_table,
)
from moerec.eval.per_target import FILE as RANKS
from moerec.eval.per_target import write_ranks
from moerec.eval.probes.interventions import evaluate_interventions
from moerec.eval.probes.profile_aspects import describe_aspects
from moerec.eval.probes.routing import collect_routing, describe_mixture, macro_f1, summarize_routing
from moerec.eval.probes.transfer import describe_transfer
from moerec.eval.ranking import EvalDataset, rank_targets
from moerec.eval.report.table import gap_closed
from moerec.eval.significance import bootstrap_intervals, paired_test
from moerec.nn.model import count_active_params
from moerec.train.loop import TrainResult, fit

INTERVAL_METRICS = ("ndcg@10", "recall@10")


def sasrec_config(config: Config, kind: str) -> Config:
    """SASRec (Kang & McAuley 2018) as a configuration of the same trainer: item rows alone, and its objective.

    Data, split, width, depth, dropout, scope of the loss, optimiser and number of steps are the run's own, so the
    budget is equal; none of them is tuned for it. The block is the decoder's, and a drawn negative may be an item of
    the user's history.
    """
    items_alone = dataclasses.replace(
        config.model,
        item_row=True,
        item_text=False,
        service=False,
        action=False,
        event_time=False,
        request_time=False,
        request_context=False,
        item_bias=False,
        tie_items=True,
        pointer="none",
        window=0,
        moe=MoEConfig(),
        personal=PersonalConfig(),
    )
    return dataclasses.replace(
        config,
        name=f"{config.name}_{kind}",
        model=items_alone,
        loss=dataclasses.replace(
            config.loss, kind="one_negative" if kind == "sasrec_one_negative" else "sampled_softmax"
        ),
        baselines=(),
    )


class TestSet(NamedTuple):
    """The targets of the table, and what every row of it needs of them."""

    examples: EvalDataset
    user: np.ndarray

    def table(self, ranked: Ranked) -> dict[str, Any]:
        services = self.examples.dataset.catalogue.services
        return build_table(ranked.in_service, ranked.union, self.examples.target_service, services)


def make_test_set(config: Config, data: RunData) -> TestSet:
    """All test targets, or a fixed sample of `eval.n_test`."""
    targets = select_targets(data.dataset, data.split_ids, TEST)
    if not len(targets):
        raise InputError("data: the split leaves no test target")
    if config.eval.n_test:
        targets = np.sort(np.random.default_rng([config.data.seed, TEST]).permutation(targets)[: config.eval.n_test])
    return TestSet(EvalDataset(data.dataset, targets, config), data.dataset.log.user[targets])


class Ceiling(NamedTuple):
    """The exact Bayes posterior predictive of the city world: ranked like any model, and its guess of the service."""

    ranked: Ranked
    service: np.ndarray


def rank_ceiling(test: TestSet, data: RunData, mask_seen: bool, **knowledge: bool) -> Ceiling:
    """The best that can be known of the test targets. `knowledge` as in `predict_targets`."""
    assert data.world is not None
    examples, n = test.examples, len(test.user)
    counts, guess = np.zeros((4, n), np.int64), np.zeros(n, np.int64)
    starts = examples.dataset.catalogue.offsets[:-1]
    for positions, scores in predict_targets(data.world, examples.dataset, examples.targets, **knowledge):
        item, service = examples.target_item[positions], examples.target_service[positions]
        low, high = examples.dataset.catalogue.offsets[service], examples.dataset.catalogue.offsets[service + 1]
        seen = None
        if mask_seen:
            pieces = [slice_histories((examples.offsets, examples.rows), p, p + 1)[1] for p in positions]
            edges = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
            seen = (edges, examples.dataset.log.item[np.concatenate(pieces)])
        own = count_ranks(scores, item, seen, (low, high))
        union = count_ranks(scores, item, seen)
        counts[:, positions] = own.greater, own.equal, union.greater, union.equal
        guess[positions] = np.add.reduceat(np.exp(scores), starts, axis=1).argmax(axis=1)
    return Ceiling(Ranked(RankCounts(counts[0], counts[1]), RankCounts(counts[2], counts[3])), guess)


def _measure_attainable(config: Config, data: RunData, test: TestSet) -> dict[str, float]:
    """Union NDCG@10 of the exact posterior by what it knows: `all` that is observed, profile fields too; `no context`,
    in the mean over the contexts of the month's days; and, where attention has a window, `window`: a filter that begins
    with the first event that attention reaches, as if nothing had been before, without the fields.
    """

    def measure(known: TestSet, **knowledge: bool) -> float:
        ranked = rank_ceiling(known, data, config.eval.mask_seen, **knowledge).ranked
        return float(per_target_metrics(ranked.union)["ndcg@10"].mean())

    found = {"all": measure(test, use_profile=True), "no context": measure(test, use_profile=True, use_context=False)}
    if config.model.window and not config.eval.mask_seen:  # fewer events would mask fewer items
        reach = config.model.n_layers * (config.model.window - 1) + 1
        dataset, targets = keep_last_events(data.dataset, test.examples.targets, reach)
        found["window"] = measure(TestSet(EvalDataset(dataset, targets, config), np.arange(len(targets))))
    return found


def _rank_baseline(name: str, config: Config, data: RunData, test: TestSet, workdir: Path) -> Ranked:
    if not name.startswith("sasrec"):
        scorer = COUNT_BASELINES[name](data.dataset, data.split_ids)
        histories = (test.examples.offsets, test.examples.rows)
        return rank_by_scores(scorer, data.dataset, test.examples.targets, histories, config.eval.mask_seen)
    own = sasrec_config(config, name)
    trained = fit(own, data, workdir / "baselines" / name)
    return Ranked(*rank_targets(trained.model, test.examples, trained.table))


def _intervals(config: Config, test: TestSet, rows: dict[str, Ranked]) -> dict[str, dict[str, Any]]:
    """95 % bootstrap intervals over users of the main metrics, of every row of the table."""
    services = test.examples.dataset.catalogue.services
    parts = [(name, part) for name in rows for part in ("in_service", "union")]
    values = {(name, part): per_target_metrics(getattr(rows[name], part)) for name, part in parts}
    subsets = {name: test.examples.target_service == code for code, name in enumerate(services)}
    subsets["all"] = np.ones(len(test.user), bool)
    out: dict[str, dict[str, Any]] = {name: {"in_service": {}, "union": {}} for name in rows}
    for subset, chosen in subsets.items():
        if not chosen.any():
            continue
        columns = np.stack([values[key][metric][chosen] for key in parts for metric in INTERVAL_METRICS], axis=1)
        intervals = iter(bootstrap_intervals(columns, 0, test.user[chosen], config.eval.n_boot))
        for name, part in parts:
            out[name][part][subset] = {metric: list(next(intervals)[1:]) for metric in INTERVAL_METRICS}
    for table in out.values():
        table["in_service"].pop("all", None)  # a mean over catalogues of different sizes
    return out


def _slices(config: Config, test: TestSet, data: RunData, ranked: Ranked) -> dict[str, Any]:
    """The model's metrics by service, history and coldness, ranked as the best step was selected."""
    count = np.bincount(data.dataset.log.item[data.split_ids == TRAIN], minlength=data.dataset.catalogue.n_items)
    labels = {
        "service": np.array(data.dataset.catalogue.services)[test.examples.target_service],
        "history": bucket_history_length(test.examples.history_len),
        "coldness": bucket_coldness(count[test.examples.target_item]),
    }
    counts = ranked.union if config.eval.selection == "union" else ranked.in_service
    return slice_table(per_target_metrics(counts), labels)


def _paired(config: Config, test: TestSet, model: Ranked, baselines: dict[str, Ranked]) -> dict[str, Any]:
    """The model against each baseline over the same targets: difference of NDCG@10, and its p-value."""
    services = test.examples.dataset.catalogue.services
    subsets = {name: test.examples.target_service == code for code, name in enumerate(services)}

    def ndcg(counts: RankCounts) -> np.ndarray:
        return per_target_metrics(counts)["ndcg@10"]

    def compare(own: np.ndarray, other: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        result = paired_test(own[rows], other[rows], config.seed, test.user[rows])
        return {"difference": result.difference, "p_value": result.p_value}

    own_union, own_service = ndcg(model.union), ndcg(model.in_service)
    out: dict[str, Any] = {}
    for name, ranked in baselines.items():
        other = ndcg(ranked.in_service)
        in_service = {z: compare(own_service, other, rows) for z, rows in subsets.items() if rows.any()}
        everything = np.ones(len(test.user), bool)
        out[name] = {**compare(own_union, ndcg(ranked.union), everything), "in_service": in_service}
    return out


def _probe(config: Config, data: RunData, trained: TrainResult, test: TestSet) -> dict[str, Any]:
    """What experts, answers and the profile router do at the test targets, where the model has them."""
    found: dict[str, Any] = {"probes": {}}
    if not (config.model.moe.layers or config.model.pointer != "none" or config.model.personal.n_slots):
        return found
    seen = collect_routing(trained.model, test.examples, trained.table)
    if config.model.moe.layers:
        found["routing"] = summarize_routing(collect_routing(trained.model, trained.examples, trained.table), seen)
    if config.model.pointer != "none":
        found["probes"]["mixture_weights"] = describe_mixture(seen, data.dataset.catalogue.n_services)
    if data.world is not None and seen.relevance_QM is not None:
        asked = test.examples.targets[test.examples.history_len > 0]
        aspects = describe_aspects(data.world, data.dataset, trained.model, trained.table, seen.relevance_QM, asked)
        found["probes"] |= {"profile_aspects": aspects} if aspects else {}
    return found


def _intervene(
    config: Config, data: RunData, trained: TrainResult, test: TestSet, ranked: Ranked
) -> dict[str, dict[str, Any]]:
    """What answers owe to the profile, the context and other services; on the built-in world, what they could."""
    own = per_target_metrics(ranked.union)["ndcg@10"]
    found: dict[str, dict[str, Any]] = {
        "interventions": evaluate_interventions(config, trained.model, test.examples, trained.table, own),
        "transfer": describe_transfer(
            config, trained.model, data.dataset, data.split_ids, test.examples.targets, trained.table
        ),
    }
    if data.world is not None:
        found["attainable"] = _measure_attainable(config, data, test)
    return found


def make_results(config: Config, data: RunData, trained: TrainResult, workdir: Path) -> dict[str, Any]:
    """Everything that `metrics.json` holds; the rank of each target goes to `ranks.npz`."""
    test = make_test_set(config, data)
    ranked = Ranked(*rank_targets(trained.model, test.examples, trained.table))
    write_ranks(workdir / RANKS, data.dataset, test.examples.targets, ranked)
    metrics: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "steps": trained.steps,
        "best_step": trained.step,
        "wall_s": trained.wall_s,
        "tokens_per_s": trained.slots_per_s,
        "n_params": sum(leaf.size for leaf in jax.tree.leaves(trained.model)),
        "n_active_params": count_active_params(trained.model),
        "dataset": {
            "n_users": data.dataset.log.n_users,
            "n_events": data.dataset.log.n_events,
            "n_items": data.dataset.catalogue.n_items,
            "services": list(data.dataset.catalogue.services),
            "quarantined": data.quarantined,
            "repeated_targets": test.examples.repeated,
        },
        "valid": {"step": trained.step, **trained.valid},
        "test": test.table(ranked),
        "slices": _slices(config, test, data, ranked),
    }
    metrics |= _probe(config, data, trained, test)
    if config.eval.interventions:
        metrics["probes"] |= _intervene(config, data, trained, test, ranked)
    baselines = {name: _rank_baseline(name, config, data, test, workdir) for name in config.baselines}
    metrics["baselines"] = {name: test.table(ranks) for name, ranks in baselines.items()}
    intervals = _intervals(config, test, {"": ranked, **baselines})
    metrics["intervals"] = intervals.pop("")
    metrics["baseline_intervals"] = intervals
    metrics["paired"] = _paired(config, test, ranked, baselines)
    if data.world is not None:
        ceiling = rank_ceiling(test, data, config.eval.mask_seen)
        metrics["ceiling"] = test.table(ceiling.ranked)
        if "routing" in metrics:
            asked = test.examples.history_len > 0  # as the analyser is
            truth, n_services = test.examples.target_service[asked], data.dataset.catalogue.n_services
            metrics["routing"]["analyser"]["exact_macro_f1"] = macro_f1(ceiling.service[asked], truth, n_services)
        closed = gap_closed(metrics)
        if closed is not None:
            metrics["gap_closed"] = closed
    metrics["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return metrics
