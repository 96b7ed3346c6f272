"""The loop: resuming to the bit, one compilation, early stopping, and the files of a run."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from moerec.config import DataConfig, MoEConfig, TablesConfig
from moerec.data.dataset import permute_items
from moerec.data.load import load_data
from moerec.data.splits import TEST
from moerec.errors import InputError, WorkError
from moerec.eval.evaluate_run import run_experiment
from moerec.eval.ranking import make_evaluator, make_valid_set
from moerec.train import loop
from moerec.train.checkpoint import Checkpoints, TrainProgress
from moerec.train.loop import TrainResult, fit, make_trainer
from moerec.train.metric_writer import MetricWriter
from moerec.train.run_dir import bind_catalog
from moerec.train.state import make_predictor, spread_state
from tests.tiny import make_config, share_trainers

ROOT = Path(__file__).resolve().parents[2]

LONG_RUN = {"steps": 30, "save_every": 4, "eval_every": 5}
RUN = f"""
import sys
from pathlib import Path
from tests.tiny import make_config
from moerec.eval.evaluate_run import run_experiment
run_experiment(make_config(**{LONG_RUN}), Path(sys.argv[1]))
"""


@pytest.fixture(scope="module", autouse=True)
def trainers():
    """Most tests train the same model: it is traced and compiled once for all of them."""
    with share_trainers():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_experiment(make_config(**LONG_RUN), folder)


def train(config, data, workdir: Path) -> TrainResult:
    """`fit`, validated as runs are."""
    return fit(config, data, workdir, make_evaluator(config, data))


def leaves_of(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def start_run(workdir: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", RUN, str(workdir)], cwd=ROOT, env=environment)


def wait_for_line(path: Path, step: int, process: subprocess.Popen, limit_s: float = 240.0) -> None:
    """Until the log has a line of `step` or later."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().split("\n")[:-1]):
            return
        time.sleep(0.02)
    raise AssertionError(f"no line of step {step} in {path}: the run ended with {process.poll()}")


def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path, undisturbed):
    killed = tmp_path / "killed"
    step = int(np.random.default_rng(time.time_ns()).integers(9, 28))
    print("killed at", step)
    process = start_run(killed)
    wait_for_line(killed / "metrics.jsonl", step, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "metrics.json").exists()
    saved = [path.name for path in (killed / "checkpoints" / "last").iterdir() if path.name.isdigit()]
    assert saved  # from there the last start goes on: it does not begin anew
    assert start_run(killed).wait() == 0
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (undisturbed[0], killed))
    for key in (
        "test",
        "valid",
        "baselines",
        "ceiling",
        "best_step",
        "steps",
        "slices",
        "intervals",
        "baseline_intervals",
        "paired",
    ):
        assert first[key] == second[key], key
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (undisturbed[0], killed)
    ]
    for one, other in zip(*lines, strict=True):
        assert {k: v for k, v in one.items() if k != "slots_per_s"} == {
            k: v for k, v in other.items() if k != "slots_per_s"
        }


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return load_data(make_config().data, tmp_path_factory.mktemp("data"))


def test_stopping_and_going_on_gives_the_same_parameters(tmp_path, tiny_data, monkeypatch):
    """Those of a mixture, of which one part is frozen and one has a rate of its own."""
    interrupted_at = 5

    def make_own():
        config = make_config(save_every=1)
        moe = MoEConfig(layers=(0,), n_per_group=1, d_expert=8, tile=8)
        optim = dataclasses.replace(config.optim, groups=("groups/0/attention=frozen", "head=0.5"))
        model = dataclasses.replace(config.model, n_layers=1, moe=moe)
        return dataclasses.replace(config, model=model, optim=optim)

    whole = train(make_own(), tiny_data, tmp_path / "whole")
    saved = []
    save_last = Checkpoints.save_last

    def save_and_fail(self, step, state, progress):
        save_last(self, step, state, progress)
        saved.append(step)
        if step == interrupted_at:
            self.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save_last", save_and_fail)
    with pytest.raises(KeyboardInterrupt):
        train(make_own(), tiny_data, tmp_path / "parts")
    monkeypatch.setattr(Checkpoints, "save_last", save_last)
    resumed = train(make_own(), tiny_data, tmp_path / "parts")
    assert saved[-1] == interrupted_at
    assert resumed.step == whole.step
    assert resumed.steps == whole.steps
    assert resumed.valid == whole.valid
    for one, other in zip(leaves_of(whole.predictor), leaves_of(resumed.predictor), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_finished_run_is_not_trained_again(tmp_path, tiny_data):
    first = train(make_config(), tiny_data, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text()
    second = train(make_config(), tiny_data, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    assert (first.step, first.wall_s, first.valid) == (second.step, second.wall_s, second.valid)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_nothing_is_compiled_after_the_first_step(tmp_path, tiny_data, mesh):
    config = make_config(mesh_data=mesh[0], mesh_model=mesh[1])
    trainer, evaluate = make_trainer(config, tiny_data), make_evaluator(config, tiny_data)
    state = trainer.begin(trainer.state, config)
    checkpoints = Checkpoints(tmp_path)
    with contextlib.closing(iter(trainer.stream)) as stream, contextlib.closing(checkpoints):
        for step in range(1, 6):
            state, metrics = trainer.step(state, next(stream))
            assert np.isfinite(float(metrics["loss"]))
            assert trainer.train_step._cache_size() == 1
            predictor = make_predictor(state)
            evaluate(predictor, bind_catalog(predictor, trainer.catalog))
            if step == 3:  # a resumed run goes on with the program of the first step, too
                checkpoints.save_last(step, spread_state(state), TrainProgress())
                checkpoints.wait()
                state = trainer.begin(checkpoints.restore_last(trainer.state)[0], config)


def test_no_best_step_is_named_before_it_is_on_disk(tmp_path, tiny_data, monkeypatch):
    """The best checkpoint is written slowly: the last one, which names it, must wait."""
    order = []
    save = Checkpoints._save

    def record(manager, step, state, progress):
        waited = manager is not seen["last"] or not seen["best"].is_saving_in_progress()
        order.append((manager is seen["last"], step, waited))
        save(manager, step, state, progress)

    seen = {}
    create = Checkpoints.__init__

    def remember(self, folder):
        create(self, folder)
        seen.update(last=self._last, best=self._best)

    monkeypatch.setattr(Checkpoints, "__init__", remember)
    monkeypatch.setattr(Checkpoints, "_save", staticmethod(record))
    train(make_config(save_every=4), tiny_data, tmp_path)
    assert (True, 4, True) in order
    assert all(waited for _, _, waited in order)


def test_slots_are_counted_exactly(tmp_path, tiny_data):
    config = make_config(log_every=5, eval_every=0, save_every=7)
    fitted = train(config, tiny_data, tmp_path)
    trainer = loop.make_trainer(config, tiny_data)
    with contextlib.closing(iter(trainer.stream)) as stream:
        slots = [float(next(stream).targets["next_event"].weight_BT.sum()) for _ in range(12)]
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with contextlib.closing(checkpoints):
        _, progress = checkpoints.restore_last(trainer.state)
    n_slots = sum(slots[1:])  # the first step's time is that of its compilation
    assert progress.n_slots == n_slots
    assert fitted.slots_per_s == pytest.approx(n_slots / progress.train_s)


def test_the_compilation_is_announced_and_not_in_the_rate(tmp_path, tiny_data, monkeypatch, capsys):
    """A second passes with every look at the clock, and an hour in a first step."""
    now, make = 0.0, loop.make_trainer

    def look() -> float:
        nonlocal now
        now += 1.0
        return now

    class SlowAtFirst(loop.Trainer):
        n_steps = 0

        def step(self, state, batch):
            nonlocal now
            now += 0.0 if SlowAtFirst.n_steps else 3600.0
            SlowAtFirst.n_steps += 1
            return super().step(state, batch)

    monkeypatch.setattr(loop, "make_trainer", lambda *args: SlowAtFirst(*make(*args)))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=look))
    config = make_config(steps=6, log_every=1, eval_every=3, save_every=2)
    for steps in (1, 6):  # a resumed run compiles anew
        config.train.steps, SlowAtFirst.n_steps = steps, 0
        fitted = train(config, tiny_data, tmp_path)
        assert fitted.wall_s > 3600
        assert (fitted.slots_per_s == 0) == (steps == 1)  # of one step nothing is known
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line.get("slots_per_s") for line in lines if "loss" in line}
    assert [step for step, rate in rates.items() if rate is None] == [1, 2]
    assert all(rate > 1 for rate in [rates[3], rates[6], fitted.slots_per_s])  # with the hour they were a tenth at most
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "compiles" in line] == ["tiny  compiles the training step"] * 2
    assert not any("slots/s" in line for line in told if " step 1/" in line)


def test_a_finished_training_compiles_no_step(tmp_path, tiny_data, capsys):
    train(make_config(), tiny_data, tmp_path)
    capsys.readouterr()
    train(make_config(), tiny_data, tmp_path)
    assert "compiles" not in capsys.readouterr().err


def test_validation_never_sees_a_test_event(tiny_data):
    valid = make_valid_set(make_config(), tiny_data)
    assert len(valid.histories.rows)
    assert not np.any(tiny_data.split_ids[valid.histories.rows] == TEST)


def test_training_lowers_the_loss_and_beats_chance(undisturbed):
    folder, metrics = undisturbed
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert metrics["valid"]["valid/union/recall@10"] > 1.5 * 10 / metrics["dataset"]["n_items"]


def test_the_best_step_is_kept_and_patience_stops(tmp_path, tiny_data):
    config = make_config(steps=200, eval_every=2, patience=2, save_every=50)
    config.optim.learning_rate, config.optim.ema_decay = 1.0, 0.0  # far too high: validation cannot keep rising
    config.optim.schedule = "constant"
    fitted = train(config, tiny_data, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["valid/union/ndcg@10"] for line in lines if "valid/union/ndcg@10" in line}
    assert fitted.steps < 200
    assert max(scores) == fitted.steps
    assert scores[fitted.step] == max(scores.values())
    assert fitted.steps == fitted.step + 2 * 2
    assert fitted.valid["valid/union/ndcg@10"] == scores[fitted.step]


def test_an_evaluator_of_ones_own_picks_the_step(tmp_path, tiny_data):
    """Any function of a predictor and a catalogue: what it scores best is kept, whatever it is."""
    seen = []

    def evaluate(predictor, catalog):
        seen.append(leaves_of(predictor))
        assert catalog.vector_ID is not None
        return {1: 0.1, 2: 0.9, 3: 0.2}.get(len(seen), 0.0), {"valid/mine": float(len(seen))}

    fitted = fit(make_config(), tiny_data, tmp_path, evaluate)  # evaluated at 4, 8 and 12, and the best one again
    assert (fitted.step, fitted.steps, len(seen)) == (8, 12, 4)
    assert fitted.valid == {"valid/mine": 4.0}
    for picked, returned, again in zip(seen[1], leaves_of(fitted.predictor), seen[3], strict=True):
        np.testing.assert_array_equal(picked, returned)
        np.testing.assert_array_equal(picked, again)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["valid/mine"]) for x in lines if "valid/mine" in x] == [(4, 1.0), (8, 2.0), (12, 3.0)]


@pytest.mark.parametrize(
    "train_fields",
    [
        {"log_every": 5},
        {"eval_every": 0},  # one validation, after the last step
        {"eval_every": 2, "patience": 1},  # stops early
    ],
)
def test_the_last_progress_line_shows_the_last_validation(tmp_path, tiny_data, capsys, train_fields):
    config = make_config(**train_fields)
    scores = iter([0.111, 0.222, 0.333, 0.321, 0.123])
    given = []

    def evaluate(predictor, catalog):
        given.append(next(scores))
        return given[-1], {"valid/union/ndcg@10": given[-1]}

    fitted = fit(config, tiny_data, tmp_path, evaluate)
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tiny  step")]
    last_valid = given[-2]  # after it the best parameters are measured once more
    assert shown[-1].startswith(f"tiny  step {fitted.steps}/{config.train.steps}  loss ")
    assert f"  ndcg@10 {last_valid:.3f}".replace(" 0.", " .") in shown[-1]
    assert sum(f"step {fitted.steps}/" in line for line in shown) == 1
    assert "left" not in shown[-1]


def test_what_an_evaluator_of_ones_own_measures_is_not_called_ndcg(tmp_path, tiny_data, capsys):
    fit(make_config(), tiny_data, tmp_path, lambda *_: (0.25, {"valid/mine": 3.0}))
    last = capsys.readouterr().err.splitlines()[-1]
    assert "score 0.25" in last
    assert "ndcg" not in last


def test_a_loss_that_is_not_finite_fails_with_its_step(tmp_path, tiny_data, monkeypatch):
    config = make_config()
    trainer = loop.make_trainer(config, tiny_data)
    steps_done = 0

    def step(state, *arguments):
        nonlocal steps_done
        steps_done += 1
        if steps_done == 7:
            state = state._replace(params=jax.tree.map(lambda leaf: leaf * np.float32(np.nan), state.params))
        return trainer.train_step(state, *arguments)

    monkeypatch.setattr("moerec.train.loop.make_trainer", lambda *_: trainer._replace(train_step=step))
    with pytest.raises(WorkError, match="step 8: the loss is nan"):  # logs are of every second step
        train(config, tiny_data, tmp_path)


def test_a_first_start_that_failed_leaves_the_directory_free(tmp_path):
    config = make_config()
    missing = dataclasses.replace(config.data, source="prepared", prepared=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="nothing"):
        run_experiment(dataclasses.replace(config, data=missing), tmp_path / "run")
    assert run_experiment(config, tmp_path / "run")["steps"] == 12


def test_metrics_are_read_when_the_next_step_is_under_way(tmp_path, tiny_data, monkeypatch):
    """And the state that a step was given is gone: its memory is the next one's."""
    config = make_config(log_every=1, eval_every=0, save_every=99)
    events, trainer = [], loop.make_trainer(config, tiny_data)

    def step(state, *arguments):
        after, metrics = trainer.train_step(state, *arguments)
        jax.block_until_ready(after)
        events.append(("step", int(after.step), jax.tree.leaves(state.params)[0].is_deleted()))
        return after, metrics

    write = MetricWriter.write

    def note(self, step, scalars):
        if "loss" in scalars:
            events.append(("read", step, None))
        write(self, step, scalars)

    monkeypatch.setattr("moerec.train.loop.make_trainer", lambda *_: trainer._replace(train_step=step))
    monkeypatch.setattr(MetricWriter, "write", note)
    train(config, tiny_data, tmp_path)
    order = [(kind, n) for kind, n, _ in events]
    late = [event for n in range(1, 12) for event in (("step", n + 1), ("read", n))]
    assert order == [("step", 1), *late, ("read", 12)]
    assert all(deleted for kind, _, deleted in events if kind == "step")


def test_the_sharded_reader_trains_to_the_same_parameters(tmp_path):
    def read_by(reader: str) -> list[np.ndarray]:
        config = make_config()
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, reader=reader))
        return leaves_of(train(config, load_data(config.data, tmp_path / reader), tmp_path / reader).predictor)

    for one, other in zip(read_by("memory"), read_by("shards"), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with baselines of every kind: its config, its directory and its metrics."""
    folder = tmp_path_factory.mktemp("run")
    config = make_config()
    config.baselines = ("popularity", "item_knn", "graph_text_own", "sasrec_one_negative", "sasrec_full")
    config.loss.n_negatives = 16
    return config, folder, run_experiment(config, folder)


def test_a_run_directory_holds_what_is_promised(finished):
    _, folder, _ = finished
    for name in ("config.json", "metrics.jsonl", "metrics.json", "report.html", "checkpoints", "tensorboard"):
        assert (folder / name).exists(), name
    metrics = json.loads((folder / "metrics.json").read_text())
    told = {"config", "seed", "steps", "wall_s", "tokens_per_s", "n_params", "n_active_params", "test", "baselines"}
    assert told <= metrics.keys()
    for table in (metrics["test"], metrics["ceiling"], *metrics["baselines"].values()):
        assert set(table["union"]) == {*table["in_service"], "all"}
        for row in (*table["in_service"].values(), *table["union"].values()):
            assert {"recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr", "n"} <= row.keys()
            assert 0 <= row["ndcg@5"] <= row["ndcg@10"] <= row["recall@10"] <= 1
            assert row["recall@5"] <= row["recall@10"]


def test_what_a_baseline_was_tuned_to_is_kept(finished):
    (settings,) = finished[2]["baseline_settings"].values()
    assert settings["history"] == "own"
    assert 0 < settings["valid_ndcg@10"] < 1


def test_a_run_keeps_the_contract(finished, data_dir):
    _, folder, _ = finished
    checker = data_dir.parent / "checks" / "contract.py"
    result = subprocess.run([sys.executable, checker, folder, "--city"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_row_of_the_table_is_of_the_same_targets(finished):
    config, _, metrics = finished
    assert set(metrics["baselines"]) == set(config.baselines)
    n = metrics["test"]["union"]["all"]["n"]
    assert all(table["union"]["all"]["n"] == n for table in (*metrics["baselines"].values(), metrics["ceiling"]))
    assert metrics["ceiling"]["union"]["all"]["ndcg@10"] > metrics["baselines"]["popularity"]["union"]["all"]["ndcg@10"]


def test_intervals_and_differences_are_those_of_their_own_row(finished):
    _, _, metrics = finished
    rows = {"": (metrics["test"], metrics["intervals"])}
    rows |= {name: (table, metrics["baseline_intervals"][name]) for name, table in metrics["baselines"].items()}
    for table, intervals in rows.values():
        for part in ("in_service", "union"):
            assert set(intervals[part]) == set(table[part])
            for key, found in intervals[part].items():
                for metric, (low, high) in found.items():
                    assert low <= table[part][key][metric] <= high
                    assert low < high or table[part][key][metric] == 0
    for name, result in metrics["paired"].items():
        for part, key, found in [("union", "all", result)] + [
            ("in_service", key, value) for key, value in result["in_service"].items()
        ]:
            difference = metrics["test"][part][key]["ndcg@10"] - metrics["baselines"][name][part][key]["ndcg@10"]
            assert found["difference"] == pytest.approx(difference)
            assert 0 < found["p_value"] <= 1


def test_a_directory_of_another_config_is_refused(finished):
    config, folder, _ = finished
    before = (folder / "metrics.json").read_text()
    with pytest.raises(InputError, match=r"config.model.n_layers was 2 and is 1"):
        run_experiment(dataclasses.replace(config, model=dataclasses.replace(config.model, n_layers=1)), folder)
    assert (folder / "metrics.json").read_text() == before


def test_a_directory_is_not_reused_for_other_data(finished, monkeypatch):
    config, folder, _ = finished
    before = (folder / "metrics.json").read_bytes()
    monkeypatch.setattr("moerec.data.load.permute_items", lambda dataset, seed: permute_items(dataset, seed + 1))
    with pytest.raises(InputError, match="this directory holds a run on other data"):
        run_experiment(config, folder)
    assert (folder / "metrics.json").read_bytes() == before


def test_a_run_is_not_written_among_other_things(tmp_path):
    (tmp_path / "prices.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=r"no directory of a run \(there is prices.csv\)"):
        run_experiment(make_config(steps=1, eval_every=0), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["prices.csv"]
    (tmp_path / "prices.csv").unlink()
    for name in ("data.partial-99", ".DS_Store", "job.log"):  # what a killed call, a file browser and a scheduler leave
        (tmp_path / name).touch()
    tables = DataConfig(source="tables", tables=TablesConfig(folder=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="no such file"):
        run_experiment(dataclasses.replace(make_config(steps=1, eval_every=0), data=tables), tmp_path)
