"""The directory of a run: what is damaged is named and left as it is, one process works there, a lost page is made."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import audit, train
from moerec.config import cli
from moerec.data.load import reload_data
from moerec.errors import InputError
from moerec.eval.compare import compare
from moerec.eval.evaluate_run import run_experiment
from moerec.eval.report import write_report
from moerec.files import locked, parse_json, read_json
from moerec.train.base_model.warm_start import read_parameters
from moerec.train.checkpoint import Checkpoints
from moerec.train.metric_writer import read_metric_lines
from moerec.train.run_dir import load_run
from tests.tiny import make_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """from tests.tiny import make_config

def get_config():
    return make_config(steps=2, eval_every=2)
"""


def make_own():
    return make_config(steps=2, eval_every=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_experiment(make_own(), folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGES = {
    "cut off": cut,
    "empty": lambda _: b"",
    "not UTF-8": lambda content: content.replace(b'"', b'"\xff', 1),
    "a list": lambda _: b"[]",
    "empty object": lambda _: b"{}",
    "nested": lambda _: b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "lists": lambda _: b"[" * 100_000,
    "nan": lambda content: content.replace(b"{", b'{"x": NaN, ', 1),
    "a long number": lambda content: content.replace(b"{", b'{"x": ' + b"9" * 5000 + b", ", 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "data.json", "metrics.json"])
def test_a_damaged_file_is_named_and_nothing_is_written(run, name, damage):
    path = run / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = digests(run)
    readers = {
        "config.json": [load_run, read_parameters, lambda run: run_experiment(make_own(), run)],
        "data.json": [
            lambda run: reload_data(make_own().data, run),
            lambda run: run_experiment(make_own(), run),
        ],
        "metrics.json": [
            write_report,
            lambda run: compare([run], [run]),
            lambda run: run_experiment(make_own(), run),
        ],
    }
    for read in readers[name]:
        with pytest.raises(InputError) as error:
            read(run)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
    assert digests(run) == before


@pytest.mark.parametrize(
    "line",
    [b'{"step": "word"}', b'{"step": -1}', b"{}", b'{"step": 2, "loss": "low"}', b'{"step": 1e400}', b"[]", b"\xff"],
)
def test_a_damaged_line_of_the_metrics_is_named(run, line):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b'\n{"step": 3}\n')
    before = digests(run)
    number = path.read_bytes().count(b"\n") - 1
    with pytest.raises(InputError, match=rf"metrics\.jsonl:{number}: "):
        read_metric_lines(path)
    with pytest.raises(InputError, match=rf"metrics\.jsonl:{number}: "):
        write_report(run)
    assert digests(run) == before


def test_a_run_does_not_go_on_over_a_damaged_line(run):
    (run / "metrics.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": "word"}\n')
    before = digests(run)
    with pytest.raises(InputError, match=r"metrics\.jsonl:1: its step is 'word'"):
        run_experiment(make_own(), run)
    assert digests(run) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("test"), "test.union.all.ndcg@10 is missing"),
        (lambda m: m["test"]["union"].pop("all"), "test.union.all.ndcg@10 is missing"),
        (lambda m: m["test"]["union"]["all"].update({"ndcg@10": "high"}), "test.union.all.ndcg@10 is 'high'"),
        (lambda m: m["test"].update(in_service=[1]), "test.in_service is no object"),
        (lambda m: m.update(steps="many"), "steps is 'many'"),
        (lambda m: m.update(baselines={"popularity": 3}), "baselines.popularity is no object"),
    ],
)
def test_a_result_of_other_types_is_told_by_its_field(run, change, words):
    metrics = read_json(run / "metrics.json")
    change(metrics)
    (run / "metrics.json").write_text(json.dumps(metrics))
    for read in (write_report, lambda run: compare([run], [run])):
        with pytest.raises(InputError) as error:
            read(run)
        assert str(error.value).startswith(f"{run / 'metrics.json'}: is no result of a run (")
        assert words in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["NaN", "[Infinity]", "-Infinity", "1e999", "9" * 20, '"\\ud800"', "[" * 150 + "]" * 150, "", "nul", "\ufeff1"],
)
def test_what_cannot_be_worked_with_is_no_json(text):
    with pytest.raises(ValueError):  # noqa: PT011 (any)
        parse_json(text)


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 1.5e300, "\u2028𝄞", [[[]]], {"a": None}])
def test_all_else_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_the_report_that_a_killed_run_lacks_is_made(run, capsys):
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    config = run.parent / "tiny.py"
    config.write_text(CONFIG)
    code = cli.execute(train.main, ["train", f"--config={config}", f"--workdir={run}"], None, train.FLAGS)
    assert code == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    assert (run / "report.html").read_bytes() == page


def test_a_second_process_is_told_who_is_at_work(run, capsys):
    config = run.parent / "tiny.py"
    config.write_text(CONFIG)
    with locked(run):
        before = digests(run)
        for command in (train, audit):
            arguments = ["command", f"--config={config}", f"--workdir={run}"]
            code = cli.execute(command.main, arguments, None, getattr(command, "FLAGS", None))
            told = capsys.readouterr().err
            assert code == 2
            assert told.startswith(f"error: {run}: another process is at work here (process {os.getpid()} on ")
            assert socket.gethostname() in told
            assert time.strftime("%Y-", time.gmtime()) in told
        assert digests(run) == before
        load_run(run)  # whoever only reads is not kept out
        write_report(run)
    assert not (run / ".lock").exists()
    run_experiment(make_own(), run)


def test_a_lock_whose_owner_is_gone_blocks_nobody(tmp_path):
    code = "import sys, time; from pathlib import Path; from moerec.files import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"process {process.pid} on "), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on "), locked(tmp_path):
        pass
    (tmp_path / ".lock").write_bytes(b"\xff[")  # left over, and damaged
    with locked(tmp_path):
        pass


def test_no_two_processes_hold_a_lock_at_once(tmp_path):
    """Many take it in turn; each looks whether somebody else is inside."""
    code = """
import os, sys, time
from pathlib import Path
from moerec.errors import InputError
from moerec.files import locked
folder, n = Path(sys.argv[1]), 0
while n < 200:
    try:
        with locked(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            n += 1
    except InputError:
        pass
"""
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4


@pytest.mark.parametrize("name", ["a**b", "a*", "a?b", "a[1]", "a\\b", "gs:", "a\udce4b"])
def test_a_name_that_checkpoints_cannot_be_written_under_is_refused(tmp_path, name):
    folder = tmp_path / name / "run"
    for make in (lambda: run_experiment(make_own(), folder), lambda: Checkpoints(folder)):
        with pytest.raises(InputError, match="may not be in the name of a run's directory"):
            make()
    assert not folder.parent.exists()
