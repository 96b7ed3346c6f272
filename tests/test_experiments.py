"""The commands as a user calls them, on the tiny built-in world."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """import dataclasses
from tests.tiny import make_config


def get_config():
    config = make_config(steps=2, eval_every=2)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, n_layers=1))
"""


@pytest.fixture
def call(tmp_path):
    """Runs `python -m experiments.NAME` in a process of its own, on one device as a user's."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")

    def run(name: str, *arguments: str, config: bool = True) -> subprocess.CompletedProcess:
        own = [f"--config={tmp_path / 'tiny.py'}"] if config else []
        command = [sys.executable, "-m", f"experiments.{name}", *own, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


def test_train_prints_the_table_and_the_report(call, tmp_path):
    done = call("train", f"--workdir={tmp_path / 'run'}", "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"report: {tmp_path / 'run' / 'report.html'}" in done.stdout
    assert "popularity" in done.stdout


def test_audit_ends_with_one_where_a_limit_is_passed(call, tmp_path):
    passed = call("audit", f"--workdir={tmp_path}", "--config.audit.max_id_order=1")
    assert passed.returncode == 0, passed.stdout + passed.stderr
    failed = call("audit", f"--workdir={tmp_path}", "--config.audit.max_repeats=0")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert json.loads((tmp_path / "audit.json").read_text())["exit_code"] == 1


def test_bench_prepare_measures_every_format(call):
    done = call("bench_prepare", "--events=1000", "--json", config=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["file"] for row in rows] == ["events.tsv", "events.tsv.gz", "events.parquet"]
    assert all(row["events"] == 1000 and row["wall_s"] > 0 and row["peak_gib"] > 0 for row in rows)


def test_prepare_wants_tables(call, tmp_path):
    done = call("prepare", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "config.data.source" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_named(call, tmp_path):
    (tmp_path / "file").write_text("here")
    for place in ("file", "file/below"):
        done = call("audit", f"--workdir={tmp_path / place}")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert str(tmp_path / "file") in done.stderr


def test_a_reader_who_has_enough_sees_no_traceback(tmp_path):
    program = (
        "import sys; from moerec.config import cli\ncli.run(lambda c, f: [print(i) for i in range(100_000)] and None, "
    )
    program += "config_type=None, workdir=False)"
    command = f"{sys.executable} -c {shlex.quote(program)} | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0\n"
    assert done.stderr == ""


def test_bench_measures_the_step_the_loader_and_the_evaluation(call):
    done = call("bench", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(value > 0 for value in figures.values()), figures


def test_bench_measures_profiles_where_there_are_any(call):
    done = call("bench", "--json", "--config.model.personal.layers=(0,)", "--config.model.personal.n_aspects=3")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["update_users_per_s"] > 0
    assert figures["read_users_per_s"] > 0
    assert figures["profile_bytes"] == 4 * (3 * 2 * 33 + 2)  # slots, width and count of writes; the time, the number


def test_bench_experts_measures_each_size_at_equal_active_parameters(call):
    mixture = ("--config.model.moe.layers=(0,)", "--config.model.moe.d_expert=16")
    done = call("bench_experts", "--sizes=4,8", "--json", *mixture)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (small["n_experts"], large["n_experts"]) == (4, 8)
    # The router has a row and a map of the posterior over three services for each expert; nothing else grows.
    assert large["n_active_params"] - small["n_active_params"] == 4 * (16 + 3)
    assert large["ratio"] == pytest.approx(large["step_ms"] / small["step_ms"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--sizes=4",), "config.model.moe.layers"),
        (("--sizes=6", "--config.model.moe.layers=(0,)"), "6 experts"),
        (("--sizes=four",), "--sizes"),
        (("--sizes=4,04", "--config.model.moe.layers=(0,)"), "named twice"),
    ],
    ids=("dense", "uneven", "word", "twice"),
)
def test_bench_experts_refuses_what_it_cannot_measure(call, arguments, line):
    done = call("bench_experts", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr


def test_bench_sasrec_refuses_a_loss_that_is_none(call):
    """Or says that PyTorch is missing, where it is."""
    done = call("bench_sasrec", "--losses=hinge")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "'hinge' is none of one_negative" in line or "PyTorch is not installed" in line


def test_bench_asking_measures_the_same_model_with_and_without(call):
    done = call("bench_asking", "--json", "--config.model.n_layers=2", "--config.model.ask.d_analyser=8")
    assert done.returncode == 0, done.stderr
    plain, asked = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (plain["asked_from"], asked["asked_from"]) == (0, 1)
    assert asked["n_active_params"] > plain["n_active_params"]
    assert asked["ratio"] == pytest.approx(asked["step_ms"] / plain["step_ms"])


def test_bench_ranking_measures_a_catalogue(call):
    done = call(
        "bench_ranking",
        "--items=400",
        "--models=asked",
        "--json",
        "--config.model.n_layers=2",
        "--config.model.text_pointer=True",
        "--config.data.text_neighbors=4",
        "--config.model.ask.d_analyser=8",
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (row["model"], row["n_items"]) == ("asked", 400)
    assert all(row[name] > 0 for name in ("users_per_s", "temporary_gib", "bind_gib", "peak_gib"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [(("--items=many",), "--items"), (("--items=50",), "at least 100"), (("--models=dense,sparse",), "'dense,sparse'")],
    ids=("word", "few", "no model"),
)
def test_bench_ranking_refuses_what_it_cannot_measure(call, arguments, line):
    done = call("bench_ranking", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr


def test_bench_history_measures_every_arm_at_each_length(call):
    personal = ("--config.model.personal.layers=(0,)", "--config.model.window=8")
    done = call("bench_history", "--slots=32", "--json", *personal)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows, recurrences = found["rows"], found["recurrence"]
    arms = ["all weights at once", "in blocks", "window", "window and profile"]
    assert [(row["n_slots"], row["arm"]) for row in rows] == [(32, arm) for arm in arms]
    assert all(row["step_ms"] > 0 and row["temporary_mb"] > 0 for row in rows)
    assert (rows[0]["ratio"], rows[0]["memory_ratio"]) == (1, 1)
    assert [row["arm"] for row in recurrences] == ["associative scan", "chunks of 16", "chunks of 64"]
    assert all(row["step_ms"] > 0 and row["temporary_mb"] > 0 for row in recurrences)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [(("--slots=16",), "config: a model with a profile and a window"), (("--slots=long",), "--slots: 'long'")],
    ids=("no window", "word"),
)
def test_bench_history_refuses_what_it_cannot_measure(call, arguments, line):
    done = call("bench_history", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr
