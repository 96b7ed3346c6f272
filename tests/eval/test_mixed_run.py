"""A run on events and words: what it tells of each task, against one item at a time; and a run that goes on."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from moerec.config import MixConfig
from moerec.data.load import load_data
from moerec.data.pipeline.mixture import FOLDER, add_words
from moerec.errors import InputError
from moerec.eval.evaluate_run import run_experiment
from moerec.eval.ranking.item_texts import format_words
from moerec.train.loop import fit
from moerec.train.metric_writer import read_metric_lines
from moerec.train.run_dir import Run, bind_catalog
from moerec.types import EVENT, NO_TIME, RECOMMEND, TOKEN, Batch, Request
from tests import tiny
from tests.mixed import TASKS, make_mixed_config


def make_config(**train):
    base = make_mixed_config(**{"steps": 6, "eval_every": 3, "log_every": 1, **train})
    mix = MixConfig(events=2, documents=1, item_texts=1, held_out=0.3, max_tokens=11)
    model = dataclasses.replace(base.model, n_layers=1)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, mix=mix),
        model=model,
        eval=dataclasses.replace(base.eval, n_test=30, n_probed=0),
        baselines=(),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run_experiment(make_config(), folder)


def lay(kind, item, service, token, widths: tuple[int, int]) -> Batch:
    """One sequence, in a row of twelve slots."""

    def row(values, empty):
        return np.array([[*values, *[empty] * (12 - len(values))]], np.int32)

    n = len(kind)
    time, zero = row([], NO_TIME), row([], 0)
    request = Request(time, zero, *(np.zeros((1, 12, n), np.int32) for n in widths))
    return Batch(
        row(kind, 0), row(item, 0), row(service, 3), zero, time, zero, row(range(n), 0), row([1] * n, 0), request, {},
        row(token, 0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_hand(finished) -> dict[str, dict[bool, list[tuple]]]:
    """Of each item with a text, whether it is held out: where it stands when asked for by its text; and its nats."""
    folder, _ = finished
    config = make_config()
    run = Run(folder)
    data = add_words(config, load_data(config.data, folder), folder)
    catalog, texts, items = bind_catalog(run.predictor, data.catalog), data.item_texts, data.dataset.catalogue
    widths = data.dataset.log.context.shape[1], data.dataset.profile_codes[0].shape[1]
    rows_VD = run.predictor.params.text_head.row_VD
    rows_VD = np.asarray(run.predictor.params.token_encoder.row_VD[...] if rows_VD is None else rows_VD[...])
    encode = jax.jit(lambda batch: run.predictor.encode(batch, catalog).state_BTD)
    vector_ID, bias_I = np.asarray(catalog.vector_ID, np.float64), np.asarray(catalog.bias_I, np.float64)
    found: dict[str, dict[bool, list[Any]]] = {"ranks": {True: [], False: []}, "nats": {True: [], False: []}}
    for i, text in enumerate(items.text.tolist()):
        ids = data.corpus.tokenizer.encode(text).tolist()
        cut, n = ids[:11], min(len(ids), 11)
        service = int(items.service[i])
        asked = lay([*[TOKEN] * n, RECOMMEND], [], [3] * (n + 1), cut, widths)
        score_I = vector_ID @ np.asarray(encode(asked), np.float64)[0, n] + bias_I
        above, own = score_I > score_I[i] + 1e-6, items.service == service
        is_held = bool(texts.is_held_out[i])
        found["ranks"][is_held].append((above.sum(), (above & own).sum()))
        told = lay([EVENT, *[TOKEN] * n], [i], [service, *[3] * n], [0, *cut], widths)
        state_TD = np.asarray(encode(told), np.float64)[0]
        targets = cut if len(ids) > 11 else [*ids, data.corpus.end]
        logits = [rows_VD @ state_TD[t] for t in range(len(targets))]
        nats = [np.log(np.exp(x).sum()) - x[target] for x, target in zip(logits, targets, strict=True)]
        spelled = data.corpus.tokenizer.decode(cut).rstrip("\ufffd")
        found["nats"][is_held].append((sum(nats), len(nats), len(spelled.encode())))
    return found


@pytest.mark.parametrize("group", ["held_out", "trained"])
def test_ranks_by_texts_are_those_of_one_text_at_a_time(finished, by_hand, group):
    found = finished[1]["tasks"]["text_to_item"][group]
    ranks = np.array(by_hand["ranks"][group == "held_out"])
    assert found["union"]["all"]["n"] == len(ranks) > 5
    for part, column in (("union", 0), ("in_service", 1)):
        assert found[part]["all"]["recall@10"] == pytest.approx(np.mean(ranks[:, column] < 10), abs=1.5 / len(ranks))
        assert found[part]["all"]["mrr"] == pytest.approx(np.mean(1 / (1 + ranks[:, column])), rel=0.02)


@pytest.mark.parametrize("group", ["held_out", "trained"])
def test_nats_of_texts_are_those_of_one_text_at_a_time(finished, by_hand, group):
    found = finished[1]["tasks"]["item_to_text"][group]
    nats, n_tokens, n_bytes = np.sum(by_hand["nats"][group == "held_out"], axis=0)
    assert (found["n_tokens"], found["n_bytes"]) == (n_tokens, n_bytes)
    assert found["nats_per_token"] == pytest.approx(nats / n_tokens, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)


def test_figures_without_a_group_are_those_of_held_out_items(finished):
    tasks = finished[1]["tasks"]
    assert sorted(tasks) == ["item_to_text", "lm", "text_to_item"]
    held = tasks["text_to_item"]["held_out"]
    assert tasks["text_to_item"]["recall@10"] == held["union"]["all"]["recall@10"]
    assert tasks["text_to_item"]["recall@10_in_service"] == held["in_service"]["all"]["recall@10"]
    assert tasks["item_to_text"]["bits_per_byte"] == tasks["item_to_text"]["held_out"]["bits_per_byte"]
    assert tasks["lm"]["bits_per_byte"] > 0
    assert set(finished[1]["test"]) == {"in_service", "union"}
    assert len(format_words(finished[1]).splitlines()) == 5


def test_metrics_of_steps_tell_each_tasks_loss_and_share(finished):
    lines = [line for line in read_metric_lines(finished[0] / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 6
    for line in lines:
        assert {"share", "slots"} < line.keys()
        for task in TASKS[1:]:
            assert {f"{task}/loss", f"{task}/share", f"{task}/slots"} < line.keys()
        assert line["share"] + line["lm/share"] + line["item_to_text/share"] == pytest.approx(1, abs=0.02)
    valid = [line for line in read_metric_lines(finished[0] / "metrics.jsonl") if "valid/union/ndcg@10" in line]
    assert len(valid) == 2
    for name in ("lm/bits_per_byte", "text_to_item/recall@10", "item_to_text/bits_per_byte"):
        assert all(f"valid/{name}" in line for line in valid)


def test_a_finished_run_is_its_result_and_other_documents_are_refused(finished):
    folder, metrics = finished
    assert run_experiment(make_config(), folder)["tasks"] == metrics["tasks"]
    assert (folder / FOLDER / "meta.json").exists()
    config = make_config()
    corpus = dataclasses.replace(config.data.corpus, city_documents=61)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=corpus))
    with pytest.raises(InputError, match=r"other documents"):
        add_words(other, load_data(config.data, folder), folder)


def test_a_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path):
    config = make_config(eval_every=2, save_every=3)
    data = add_words(config, load_data(config.data, tmp_path / "data"), tmp_path / "data")
    calls = []

    def evaluate(predictor, catalog):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return float(len(calls)), {}

    with tiny.share_trainers():
        with pytest.raises(KeyboardInterrupt):
            fit(config, data, tmp_path / "b", evaluate)
        resumed = fit(config, data, tmp_path / "b", evaluate)
        whole = fit(config, data, tmp_path / "a", lambda predictor, catalog: (float(calls.append(1) or len(calls)), {}))
    assert resumed.steps == whole.steps == 6
    for a, b in zip(jax.tree.leaves(whole.predictor), jax.tree.leaves(resumed.predictor), strict=True):
        np.testing.assert_array_equal(a, b)
