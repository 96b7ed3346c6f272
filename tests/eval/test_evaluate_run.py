"""A run from its config to `metrics.json`: every table is made of ranks, and what is dear is made once."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest

from moerec.config import SplitConfig
from moerec.data import load
from moerec.errors import InputError
from moerec.eval import evaluate_run
from moerec.eval.baselines import BASELINES, rank_by_scores, register_scorer
from moerec.eval.baselines.ceiling import rank_ceiling
from moerec.eval.metrics import RankCounts, Ranks, build_table
from moerec.eval.ranking import make_test_set
from moerec.eval.ranking.per_target import read_ranks
from moerec.train.run_dir import load_run
from tests.tiny import make_config


class ByNumber:
    """The items in the order of their numbers."""

    def score(self, dataset, targets, histories):
        return np.tile(np.arange(dataset.catalogue.n_items, dtype=np.float32), (len(targets), 1))


def fit_by_number(dataset, split_ids):
    return ByNumber()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a split by user with a baseline of its own; how often its dear parts were made; its ranks and tables."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    config = make_config(steps=2)
    split = SplitConfig(kind="user", user_fraction=0.2)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, split=split), baselines=("popularity_by_hour", "by_number")
    )
    made, tables = {"digest": 0, "catalog": 0}, []

    class CountingHashlib:
        @staticmethod
        def sha256():
            made["digest"] += 1
            return hashlib.sha256()

    def count_catalog(*args):
        made["catalog"] += 1
        return catalog(*args)

    def note_table(ranks, *args):
        tables.append((ranks, build_table(ranks, *args)))
        return tables[-1][1]

    hashlib, catalog = load.hashlib, load.Catalog
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BASELINES, "_found", dict(BASELINES._found))
        register_scorer("by_number")(fit_by_number)
        patch.setattr(load, "hashlib", CountingHashlib)
        patch.setattr(load, "Catalog", count_catalog)
        patch.setattr(evaluate_run, "build_table", note_table)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            metrics = evaluate_run.run_experiment(config, folder)
        (folder.parent / "said").write_text(said.getvalue())
        yield folder, config, metrics, made, tables


def test_digest_and_catalogue_are_made_once(finished):
    assert finished[3] == {"digest": 2, "catalog": 1}  # of the items, and of all data


def test_what_takes_time_is_announced(finished):
    said = (finished[0].parent / "said").read_text().splitlines()
    announced = [
        "compiles the training step",
        "ranks 12 test targets",
        "baseline popularity by service and hour",
        "baseline by number",
        "intervals and tests",
    ]
    places = [said.index(f"tiny  {line}") for line in announced]
    assert places == sorted(places)
    assert not any("probes" in line for line in said)  # this model has no part that is looked into


def test_every_table_is_that_of_ranks(finished):
    _, _, metrics, _, tables = finished
    assert all(isinstance(ranks, Ranks) for ranks, _ in tables)
    made = [table for _, table in tables]
    for table in (metrics["test"], *metrics["baselines"].values(), metrics["ceiling"]):
        assert any(table is other for other in made)
    assert len(made) == 4


def test_tables_are_those_of_the_ranks_of_the_targets(finished):
    folder, config, metrics, _, _ = finished
    found = load_run(folder)
    examples, services = make_test_set(config, found.data), found.data.dataset.catalogue.services
    assert len(examples.targets) == 12

    def table_of(ranks):
        return build_table(ranks, examples.target_service, services)

    by_number = rank_by_scores(ByNumber(), found.data.dataset, examples.targets, examples.histories, False)
    assert metrics["baselines"]["by_number"] == table_of(by_number)
    assert metrics["ceiling"] == table_of(rank_ceiling(examples, found.data, False).ranks)
    stored = read_ranks(folder)
    ranks = Ranks(RankCounts(*stored.in_service.T), RankCounts(*stored.union.T))
    codes = np.array([services.index(name) for name in stored.service])
    assert np.all(stored.log_p < 0)
    for part, rows in build_table(ranks, codes, services).items():
        for name, row in rows.items():
            assert metrics["test"][part][name] == pytest.approx(row)


def test_each_column_of_the_table_has_the_test_of_its_best_row(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    rows, best = {None: metrics["test"], **metrics["baselines"]}, metrics["best"]
    columns = [("union", "all", metric) for metric in ("ndcg@10", "recall@10", "mrr@10")]
    columns += [("in_service", z, m) for z in metrics["test"]["in_service"] for m in ("ndcg@10", "recall@10")]
    assert [
        (part, key, m) for part in ("union", "in_service") for key in best[part] for m in best[part][key]
    ] == columns
    for part, key, metric in columns:
        values = {name: row[part][key][metric] for name, row in rows.items()}
        test = best[part][key][metric]
        assert values[test["row"]] == max(values.values())
        assert test["difference"] == pytest.approx(values[test["row"]] - values[test["next"]])
        others = [value for name, value in values.items() if name != test["row"]]
        assert values[test["next"]] == pytest.approx(max(others))
        assert 0 < test["p_value"] <= test["p_holm"] <= 1
    for row in (*metrics["test"]["union"].values(), *metrics["test"]["in_service"].values()):
        assert 0 <= row["mrr@10"] <= row["mrr"] <= row["mrr@10"] + 1 / 11


def test_a_split_by_user_reports_first_events(finished):
    folder, _, metrics, _, _ = finished
    first = metrics["probes"]["first_events"]
    assert set(first) == {"model", "popularity_by_hour", "difference", "p_value"}
    assert first["model"]["union"]["all"]["n"] == metrics["test"]["union"]["all"]["n"] == 12
    assert json.loads((folder / "metrics.json").read_text())["probes"]["first_events"] == first


def test_a_finished_run_is_opened_piece_by_piece_and_each_once(finished):
    found = load_run(finished[0])
    for name in ("config", "metrics", "data", "predictor", "catalog"):
        assert getattr(found, name) is getattr(found, name), name
    assert found.catalog.vector_ID is not None, "not bound"


def test_a_finished_run_is_not_evaluated_anew(finished, monkeypatch):
    folder, config, metrics, _, _ = finished

    def refuse(*_):
        raise AssertionError("evaluated anew")

    monkeypatch.setattr(evaluate_run, "fit", refuse)
    monkeypatch.setattr(evaluate_run, "make_results", refuse)
    again = evaluate_run.run_experiment(config, folder)
    assert again["test"] == metrics["test"]
    assert again["baselines"] == metrics["baselines"]


def test_an_unknown_baseline_is_refused_before_anything_is_made(tmp_path):
    config = dataclasses.replace(make_config(), baselines=("popularity", "popularty"))
    with pytest.raises(InputError, match=r"^config\.baselines: 'popularty' is none of .*--plugin=MODULE.*$"):
        evaluate_run.run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
