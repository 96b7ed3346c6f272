"""One run, from its config to its report: trained, then ranked beside the baselines and, on the built-in world, the
ceiling, over the same targets.
"""

import dataclasses
import functools
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from moerec.config import Config
from moerec.config.stored import store_config
from moerec.config.terminal import announce
from moerec.data.load import DIGEST, RunData
from moerec.data.prepare.tables_to_shards import describe_quarantine
from moerec.data.splits import TEST, TRAIN
from moerec.errors import InputError
from moerec.eval.baselines import BASELINES, BaselineInputs, TunedRanks
from moerec.eval.baselines.ceiling import excess_log_loss, measure_attainable, rank_ceiling
from moerec.eval.language import run_language
from moerec.eval.metrics import (
    Ranks,
    ScoredRanks,
    bucket_coldness,
    bucket_history_length,
    build_table,
    per_target_metrics,
    slice_table,
)
from moerec.eval.probes.asking import Prober, evaluate_asking
from moerec.eval.probes.components import evaluate_components
from moerec.eval.probes.example import describe_example, pick_row
from moerec.eval.probes.first_events import evaluate_first_events
from moerec.eval.probes.interventions import evaluate_interventions
from moerec.eval.probes.profile_aspects import describe_aspects
from moerec.eval.probes.routing import collect_routing, describe_mixture, macro_f1, summarize_routing
from moerec.eval.probes.transfer import describe_transfer
from moerec.eval.ranking import EvalDataset, make_test_set, make_valid_set, rank_targets
from moerec.eval.ranking.calibrate import scale_posterior
from moerec.eval.ranking.item_texts import evaluate_words, make_mixed_evaluator
from moerec.eval.ranking.per_target import FILE as RANKS
from moerec.eval.ranking.per_target import write_ranks
from moerec.eval.ranking.repeats import measure_repeats, suggest_masking
from moerec.eval.report import write_report
from moerec.eval.report.result import read_result
from moerec.eval.report.table import gap_closed, list_columns, row_label
from moerec.eval.significance import compare_best_rows, table_intervals, table_tests
from moerec.files import locked, require_plain_path, to_plain, write_json
from moerec.nn.heads.service_answers import component_names
from moerec.nn.profile import count_profile_slots
from moerec.tasks import make_tasks
from moerec.train.base_model.item_states import load_all
from moerec.train.loop import TrainResult, fit
from moerec.train.run_dir import CONFIG, METRICS, REPORT, refuse_other_config, refuse_strange_folder


def run_experiment(config: Config, workdir: Path) -> dict[str, Any]:
    """Loads the data, trains (or goes on), evaluates, and writes `metrics.json` and `report.html` into `workdir`.

    A finished run is not evaluated anew: its `metrics.json` is the result.

    Raises:
      InputError: bad data, a name that is not registered; or a `workdir` that holds another config's run, is damaged,
        or is another process's place of work.
    """
    make_tasks(config)
    if config.model.personal.layers:
        count_profile_slots(config.model)
    for name in config.baselines:
        _ = BASELINES[name]
    require_plain_path(workdir)
    is_new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(workdir):
            return _run(config, workdir)
    except InputError:
        if is_new and not any(workdir.iterdir()):
            workdir.rmdir()  # a refused call leaves nothing behind
        raise


def _run(config: Config, workdir: Path) -> dict[str, Any]:
    refuse_strange_folder(workdir)
    refuse_other_config(to_plain(dataclasses.asdict(config)), workdir / CONFIG)
    if config.data.source == "text":
        metrics = run_language(config, workdir)
        if not (workdir / REPORT).exists():
            write_report(workdir)
        return metrics
    data = load_all(config, workdir)
    notes = (*data.notes, data.tokens.describe(), *suggest_masking(config, data))
    for line in (*notes, *describe_quarantine(data.quarantined)):
        print(line, file=sys.stderr)
    # Only now that the data could be read: a first call that failed must not bind the directory to its mistakes.
    store_config(workdir / CONFIG, config)
    data.keep_item_tokens(workdir)
    write_json(workdir / DIGEST, data.digests)
    finished = workdir / METRICS
    if finished.exists():
        print(f"{workdir}: is finished; delete its metrics.json to have it evaluated anew", file=sys.stderr)
        metrics = read_result(finished)
        if not (workdir / REPORT).exists():  # killed between the two
            write_report(workdir)
        return metrics
    trained = fit(config, data, workdir, make_mixed_evaluator(config, data))
    metrics = make_results(config, data, trained, workdir)
    if words := evaluate_words(config, data, trained.predictor, trained.catalog):
        metrics["tasks"] = words
    write_json(finished, metrics)
    write_report(workdir)
    return metrics


def make_results(config: Config, data: RunData, trained: TrainResult, workdir: Path) -> dict[str, Any]:
    """Everything that `metrics.json` holds; the rank of each target goes to `ranks.npz`."""
    examples, dataset = make_test_set(config, data), data.dataset
    service, services = examples.target_service, dataset.catalogue.services
    tell = functools.partial(announce, config.name)
    tell(f"ranks {len(examples.targets):,} test targets")
    ranks = rank_targets(trained.predictor, examples, trained.catalog)
    write_ranks(workdir / RANKS, dataset, examples.targets, ranks)
    metrics: dict[str, Any] = {
        **trained.describe(config),
        "dataset": {
            "n_users": dataset.log.n_users,
            "n_events": dataset.log.n_events,
            "n_items": dataset.catalogue.n_items,
            "services": list(services),
            "quarantined": data.quarantined,
            "notes": list(data.notes),
            "train_repeats": measure_repeats(data),
            "repeated_targets": examples.repeated,
            "item_tokens": data.tokens.measure(),
        },
        "valid": {"step": trained.step, **trained.valid},
        "test": build_table(ranks, service, services),
        "slices": _slices(config, examples, data, ranks),
        "probes": {},
    }
    _probe(metrics, config, data, trained, examples)
    if config.eval.interventions:
        metrics["probes"] |= _intervene(config, data, trained, examples, ranks)
    if config.data.split.by_user and config.data.first_event:
        first = evaluate_first_events(config, data, examples, trained.predictor, trained.catalog)
        metrics["probes"]["first_events"] = first
    baselines = _rank_baselines(metrics, config, data, examples, workdir)
    tell("intervals and tests")
    intervals = table_intervals({"": ranks, **baselines}, service, services, examples.user, config.eval.n_boot)
    metrics["intervals"] = intervals.pop("")
    metrics["baseline_intervals"] = intervals
    tested = ranks, baselines, service, services, examples.user
    metrics["paired"] = table_tests(*tested, config.seed, config.eval.n_boot)
    columns = [(column.part, column.key, column.metric) for column in list_columns(metrics["test"])]
    metrics["best"] = compare_best_rows(ranks, baselines, columns, service, services, examples.user, config.seed)
    if data.world is not None:
        _add_ceiling(metrics, config, data, examples, ranks)
    if config.eval.n_probed:
        _probe_parts(metrics, config, data, trained, examples)
    row = pick_row(config, examples)
    if row is not None:
        metrics["example"] = describe_example(config, data.dataset, row, trained.predictor, trained.catalog)
    metrics["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return metrics


def _rank_baselines(
    metrics: dict[str, Any], config: Config, data: RunData, examples: EvalDataset, workdir: Path
) -> dict[str, Ranks]:
    """The ranks of each baseline; their tables, sizes and settings are added to the metrics."""
    baselines: dict[str, Ranks] = {}
    metrics["baseline_sizes"] = {}
    for name in config.baselines:
        announce(config.name, f"baseline {row_label(name)}")
        began = time.monotonic()
        found = BASELINES[name](BaselineInputs(config, data, examples, workdir / "baselines" / name))
        if found is None:  # it has nothing to go by in these data, and has said so
            continue
        baselines[name] = found
        took = {"seconds": time.monotonic() - began}
        metrics["baseline_sizes"][name] = took | (found.size if isinstance(found, TunedRanks) else {})
    service, services = examples.target_service, data.dataset.catalogue.services
    metrics["baselines"] = {name: build_table(found, service, services) for name, found in baselines.items()}
    tuned = {name: found.settings for name, found in baselines.items() if isinstance(found, TunedRanks)}
    if tuned := {name: settings for name, settings in tuned.items() if settings}:
        metrics["baseline_settings"] = tuned
    return baselines


def _slices(config: Config, examples: EvalDataset, data: RunData, ranks: Ranks) -> dict[str, Any]:
    """The model's metrics by service, history and coldness, ranked as the best step was selected."""
    count = np.bincount(data.dataset.log.item[data.split_ids == TRAIN], minlength=data.dataset.catalogue.n_items)
    labels = {
        "service": np.array(data.dataset.catalogue.services)[examples.target_service],
        "history": bucket_history_length(examples.history_len),
        "coldness": bucket_coldness(count[examples.target_item]),
    }
    counts = ranks.union if config.eval.selection == "union" else ranks.in_service
    return slice_table(per_target_metrics(counts), labels)


def _probe(metrics: dict[str, Any], config: Config, data: RunData, trained: TrainResult, examples: EvalDataset) -> None:
    """Adds what experts, mixture and profile router do at the test targets, where the model has them."""
    model = config.model
    has_analyser = bool(model.moe.layers) or model.is_asked
    if not (has_analyser or model.has_pointers or count_profile_slots(model)):
        return
    announce(config.name, "probes what the model does at them")
    predictor, catalog = trained.predictor, trained.catalog
    seen = collect_routing(predictor, examples, catalog)
    if has_analyser:
        on_valid = collect_routing(predictor, make_valid_set(config, data), catalog)
        metrics["routing"] = summarize_routing(on_valid, seen)
    if model.has_pointers:
        catalogue = data.dataset.catalogue
        metrics["probes"]["mixture_weights"] = describe_mixture(seen, catalogue.n_services)
        metrics["probes"]["mixture_components"] = list(component_names(model, catalogue.services))
    if data.world is not None and seen.relevance_QM is not None:
        rows = examples.targets[examples.has_slot]
        aspects = describe_aspects(data.world, data.dataset, predictor.params, catalog, seen.relevance_QM, rows)
        metrics["probes"] |= {"profile_aspects": aspects} if aspects else {}


def _probe_parts(
    metrics: dict[str, Any], config: Config, data: RunData, trained: TrainResult, examples: EvalDataset
) -> None:
    """Adds what components and hypotheses are worth, on a fixed sample of the targets that have a slot."""
    rng = np.random.default_rng([config.data.seed, TEST])
    chosen = np.sort(rng.permutation(np.flatnonzero(examples.has_slot))[: config.eval.n_probed])
    if not (len(chosen) and (config.model.has_pointers or config.model.is_asked)):
        return
    announce(config.name, f"probes what parts of the model are worth, at {len(chosen):,} targets")
    sample = EvalDataset(data.dataset, examples.targets[chosen], config)
    predictor, catalog = trained.predictor, trained.catalog
    if config.model.has_pointers:
        count_I = np.asarray(data.catalog.count_I)
        metrics["probes"]["components"] = evaluate_components(predictor, sample, catalog, count_I)
    if config.model.is_asked:
        seen = collect_routing(predictor, sample, catalog)
        assert seen.log_domain_QZ is not None
        log_posterior = scale_posterior(seen.log_domain_QZ, float(predictor.temperature))
        exact = rank_ceiling(sample, data, config.eval.mask_seen).log_service if data.world is not None else None
        prober = Prober(predictor, sample, catalog)
        metrics["probes"]["asking"] = evaluate_asking(config, prober, log_posterior, exact)


def _intervene(
    config: Config, data: RunData, trained: TrainResult, examples: EvalDataset, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """What predictions owe to the profile, the context and other services; on the built-in world, what they could."""
    announce(config.name, "interventions: takes own profile, own context and other services away")
    own, predictor, catalog = per_target_metrics(ranks.union)["ndcg@10"], trained.predictor, trained.catalog
    found: dict[str, dict[str, Any]] = {
        "interventions": evaluate_interventions(config, predictor, examples, catalog, own),
        "transfer": describe_transfer(config, predictor, data, examples.targets, catalog),
    }
    if data.world is not None:
        found["attainable"] = measure_attainable(config, data, examples)
    return found


def _add_ceiling(
    metrics: dict[str, Any], config: Config, data: RunData, examples: EvalDataset, ranks: ScoredRanks
) -> None:
    ceiling = rank_ceiling(examples, data, config.eval.mask_seen)
    services = data.dataset.catalogue.services
    metrics["ceiling"] = build_table(ceiling.ranks, examples.target_service, services)
    metrics["excess_log_loss"] = excess_log_loss(ranks, ceiling.ranks, examples.target_service, services)
    if "routing" in metrics:
        asked = examples.has_slot  # as the analyser is
        truth = examples.target_service[asked]
        metrics["routing"]["analyser"]["exact_macro_f1"] = macro_f1(ceiling.service[asked], truth, len(services))
    closed = gap_closed(metrics)
    if closed is not None:
        metrics["gap_closed"] = closed
