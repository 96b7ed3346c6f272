"""The language model that ours is timed against: at equal weights and batches it has our losses, step by step."""

import dataclasses
import json
import sys

import pytest

from configs import language_city
from experiments import bench_language
from moerec.config import CityConfig, ModelConfig, TextConfig, cli
from moerec.errors import InputError
from moerec.eval.bench.language import EXPERTS, MIXTURE, measure_language, require_transformers, with_experts


def make_config(**model):
    """Documents of about a row, so that rows have several segments."""
    base = language_city.get_config()
    corpus = dataclasses.replace(base.data.corpus, city_documents=60, vocab_size=300, valid_fraction=0.2)
    data = dataclasses.replace(base.data, city=CityConfig(items_per_service=20, n_users=20), corpus=corpus)
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_ff": 64, "dropout": 0.0}
    return dataclasses.replace(
        base,
        data=dataclasses.replace(data, seq_len=64, history_len=64, reader="memory"),
        model=ModelConfig(**shape | model, text=TextConfig(vocab_size=300, tie_head=True)),
        optim=dataclasses.replace(base.optim, learning_rate=2e-2, warmup_steps=2),
        train=dataclasses.replace(base.train, batch_size=3, n_valid=10_000),
    )


def check_rows(rows, tolerance):
    """Losses fall, and those of both are the same throughout: of the first step, the last ones, and held out."""
    for row in rows:
        assert row["last_loss"] < row["first_loss"] - 0.5
        for name in ("first_loss", "last_loss", "held_out"):
            assert row[f"torch_{name}"] == pytest.approx(row[name], rel=tolerance)
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["torch_tokens_per_s"])


def test_a_dense_model_learns_the_same(tmp_path):
    """Clipping, decay and schedule among it: after twelve large steps a difference in any would be seen."""
    found = measure_language(make_config(), tmp_path, 12, (1, 2))
    check_rows(found["rows"], 1e-4)
    assert [(row["seed"], row["experts"]) for row in found["rows"]] == [(1, None), (2, None)]
    assert found["rows"][0]["first_loss"] != found["rows"][1]["first_loss"]
    assert found["torch"]["threads"] >= 1


def test_a_mixture_learns_the_same_by_each_way_to_run_its_experts(tmp_path):
    config = with_experts(make_config(d_ff=128))
    assert config.model.moe.n_per_group == MIXTURE["n_per_group"] == 16
    found = measure_language(config, tmp_path, 5, (1,), EXPERTS)
    check_rows(found["rows"], 1e-3)  # a rounding may choose another expert
    assert [row["experts"] for row in found["rows"]] == list(EXPERTS)
    model = make_config(d_ff=128).model
    (dense,) = measure_language(make_config(d_ff=128), tmp_path, 3, (1,))["rows"]
    beside = model.n_layers * 17 * model.d_model  # routers, and the gates of the shared experts
    assert found["rows"][0]["n_active_params"] == dense["n_active_params"] + beside
    assert found["rows"][0]["n_params"] > 2 * dense["n_params"] - model.text.vocab_size * model.d_model


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--experts=loop",), "--experts: 'loop'"),
        (("--seeds=one",), "--seeds: 'one'"),
        (("--steps=2",), "--steps: at least 3"),
        (("--config.data.source=city", "--config.tasks=('next_event',)"), "config.data.source: 'city'"),
        (("--config.model.dropout=.1",), "config.model.dropout: 0.1; the comparison needs 0.0"),
        (("--config.optim.ema_decay=.9",), "config.optim.ema_decay"),
        (("--config.model.moe.layers=(1,)",), "config.model.moe.layers: (1,)"),
        (("--config.data.corpus.valid_fraction=0",), "config.data.corpus.valid_fraction: no document is held out"),
    ],
)
def test_bad_flags_are_one_line(flags, line, capsys):
    command = ["bench_language", "--config=configs/language_city.py", *flags]
    assert cli.execute(bench_language.main, command, None, bench_language.FLAGS, workdir=False) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told


def test_the_command_tells_of_each_seed(capsys, tmp_path):
    command = ["bench_language", f"--config={language_city.__file__}", f"--workdir={tmp_path}", "--seeds=3,4", "--json"]
    small = {"data.seq_len": 64, "data.history_len": 64, "train.batch_size": 2, "data.corpus.city_documents": 60}
    flags = [f"--config.{name}={value}" for name, value in small.items()]
    assert cli.execute(bench_language.main, [*command, "--steps=3", *flags], None, bench_language.FLAGS) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [["seed", "3", "dense"], ["seed", "4", "dense"]]
    assert [row["seed"] for row in json.loads(last)["rows"]] == [3, 4]


def test_it_needs_transformers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else sys)
    with pytest.raises(InputError, match="transformers: not installed"):
        require_transformers()
