"""SIGTERM: what was trained is saved within the grace period, and the run that goes on ends as an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moerec.config import cli
from moerec.data.load import load_data
from moerec.errors import TERMINATED, Terminated
from moerec.eval.ranking import make_evaluator
from moerec.train.checkpoint import Checkpoints
from moerec.train.loop import fit, make_trainer
from moerec.train.process.termination import StopRequest
from tests.tiny import make_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return load_data(make_config().data, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, fit(make_config(), tiny_data, folder, make_evaluator(make_config(), tiny_data))


def read_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "slots_per_s"} for line in lines]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def go_on_and_compare(folder, tiny_data, undisturbed):
    at, whole = undisturbed
    resumed = fit(make_config(), tiny_data, folder, make_evaluator(make_config(), tiny_data))
    assert (resumed.step, resumed.steps, resumed.valid) == (whole.step, whole.steps, whole.valid)
    for one, other in zip(*(jax.tree.leaves(x.predictor) for x in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert read_lines(folder) == read_lines(at)


def last_step(folder: Path) -> int:
    return max(int(path.name) for path in (folder / "checkpoints" / "last").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("step", [1, 8])  # before any checkpoint; where it is evaluated next
def test_a_step_is_finished_and_saved(tmp_path, tiny_data, undisturbed, step, monkeypatch):
    trainer = make_trainer(make_config(), tiny_data)
    n_steps = 0

    def train_step(*arguments):
        nonlocal n_steps
        n_steps += 1
        if n_steps == step:
            terminate()
        return trainer.train_step(*arguments)

    monkeypatch.setattr("moerec.train.loop.make_trainer", lambda *_: trainer._replace(train_step=train_step))
    with pytest.raises(Terminated, match=rf"terminated, saved at step {step}; the same command goes on from there"):
        fit(make_config(), tiny_data, tmp_path, make_evaluator(make_config(), tiny_data))
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert last_step(tmp_path) == step
    go_on_and_compare(tmp_path, tiny_data, undisturbed)


@pytest.mark.parametrize("number", [3])  # the validation after the last step
def test_a_validation_is_given_up_and_made_up_for(tmp_path, tiny_data, undisturbed, number):
    evaluate, n_calls = make_evaluator(make_config(), tiny_data), 0

    def interrupted(*arguments):
        nonlocal n_calls
        n_calls += 1
        if n_calls == number:
            terminate()
            time.sleep(60)  # a signal does not wait for the end of it
        return evaluate(*arguments)

    with pytest.raises(Terminated, match=f"saved at step {4 * number}"):
        fit(make_config(), tiny_data, tmp_path, interrupted)
    assert not any("valid" in name for line in read_lines(tmp_path) if line["step"] == 4 * number for name in line)
    go_on_and_compare(tmp_path, tiny_data, undisturbed)


def test_a_signal_while_it_saves_is_not_lost(tmp_path, tiny_data, undisturbed, monkeypatch):
    save_last = Checkpoints.save_last

    def save(self, step, *arguments):
        save_last(self, step, *arguments)
        if step == 6:
            terminate()

    monkeypatch.setattr(Checkpoints, "save_last", save)
    with pytest.raises(Terminated, match="saved at step 6"):
        fit(make_config(), tiny_data, tmp_path, make_evaluator(make_config(), tiny_data))
    monkeypatch.undo()
    go_on_and_compare(tmp_path, tiny_data, undisturbed)


def test_the_exit_code_is_that_of_the_signal(capsys):
    def main(config, flags):
        raise Terminated("runs/a: terminated, saved at step 3")

    assert cli.execute(main, ["command"], config_type=None, workdir=False) == TERMINATED == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "error: runs/a: terminated, saved at step 3\n"


def start(grace_s: float, work: str) -> subprocess.Popen:
    code = f"""
import hashlib, time
from moerec.train.process.termination import StopRequest
with StopRequest().catch({grace_s}):
    print("ready", flush=True)
    {work}
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


# The second one lets no Python run in the main thread, as a compilation does.
@pytest.mark.parametrize("work", ["time.sleep(60)", "hashlib.pbkdf2_hmac('sha512', b'', b'', 10**8)"])
@pytest.mark.parametrize(("grace_s", "n_signals", "words"), [(0.1, 1, b"grace period"), (60, 2, b"a second time")])
def test_the_period_and_a_second_signal_end_it_whatever_it_is_at(work, grace_s, n_signals, words):
    process = start(grace_s, work)
    for _ in range(n_signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    _, told = process.communicate(timeout=30)
    assert process.returncode == TERMINATED
    assert words in told
    assert told.count(b"\n") == 2  # one ends a progress line


def test_a_handler_of_the_program_is_left_alone():
    caught = []
    signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try:
        stop = StopRequest()
        with stop.catch(60):
            terminate()
        assert (caught, stop.is_made) == ([1], False)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
