"""What a run writes: lines that survive a kill, resumed files, atomic JSON."""

import json
import math
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest

from moerec.errors import InputError, WorkError
from moerec.files import read_lines, replacing, to_plain, write_json
from moerec.train import metric_writer as writer
from moerec.train.metric_writer import MetricWriter, format_count, format_duration


def run(workdir, steps, resume_step=0, total_steps=100):
    with MetricWriter(workdir, total_steps, resume_step) as out:
        for step in steps:
            out.write(step, {"loss": 1 / (step + 1), "valid/union/ndcg@10": 0.1})


def steps_of(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events_of(workdir):
    """(step, tag, value, purge) of all event files, read by the record format alone."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                found.append((event.step, "purge", 0.0))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_each_line_is_whole_at_once(tmp_path):
    with MetricWriter(tmp_path, 10) as out:
        out.write(1, {"loss": np.float32(0.5), "n": np.int64(3)})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "n": 3}
    out.close()  # a second time


def test_a_resumed_run_leaves_the_file_of_an_undisturbed_one(tmp_path):
    run(tmp_path / "whole", range(0, 60, 10))
    run(tmp_path / "parts", range(0, 50, 10))
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 50, "lo')
    run(tmp_path / "parts", range(30, 60, 10), resume_step=20)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_run_from_the_start_drops_the_old_lines(tmp_path):
    run(tmp_path, range(0, 50, 10))
    run(tmp_path, range(0, 20, 10))
    assert steps_of(tmp_path) == [0, 10]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.npz"
    path.write_text("old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"new", None])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.npz", "old")]
    with replacing(path) as file:
        file.write(b"new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.npz", "new")]


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: is no JSON object"):
        MetricWriter(tmp_path, 10, 3)


def test_nonfinite_scalars_are_null_in_the_lines_and_absent_from_tensorboard(tmp_path):
    with MetricWriter(tmp_path, 10) as out:
        out.write(1, {"a": math.nan, "b": np.float32(np.inf), "c": 1.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 1.0}]
    assert [(tag, value) for _, tag, value in events_of(tmp_path) if tag != "purge"] == [("c", 1.0)]


def test_tensorboard_purges_what_the_resumed_run_writes_again(tmp_path):
    run(tmp_path, [10, 20, 30])
    run(tmp_path, [30, 40], resume_step=20)
    events = events_of(tmp_path)
    purges = [step for step, tag, _ in events if tag == "purge"]
    assert purges == [0, 21]
    assert [step for step, tag, _ in events if tag == "loss"] == [10, 20, 30, 30, 40]


def test_progress_line(tmp_path, capsys, monkeypatch):
    clock = iter([10.0, 11.0, 40.0, 41.0])
    monkeypatch.setattr(writer, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with MetricWriter(tmp_path, 500, resume_step=100) as out:
        for step in (200, 210, 400, 500):
            scalars = {"loss": 5.3123, "valid/union/ndcg@10": 0.0421, "slots_per_s": 38_123.0}
            out.progress(step, scalars, is_last=step == 500)
    lines = capsys.readouterr().err.splitlines()
    assert lines.pop(0) == "goes on from step 100/500"
    assert lines[0] == "step 200/500  loss 5.312  ndcg@10 .042  38k slots/s"  # what it compiled for says nothing
    assert lines[1] == "step 400/500  loss 5.312  ndcg@10 .042  38k slots/s  15s left"
    assert [line.split()[1] for line in lines] == ["200/500", "400/500", "500/500"]  # 210 came too soon
    assert lines[2] == "step 500/500  loss 5.312  ndcg@10 .042  38k slots/s"  # the last one always comes


def test_progress_on_a_terminal_overwrites_its_line(tmp_path, capsys, monkeypatch):
    with MetricWriter(tmp_path, 20) as out, monkeypatch.context() as patched:  # pytest asks for the size, too
        patched.setattr(out, "_tty", True)
        patched.setattr(writer, "_TTY_EVERY_S", 0)
        patched.setattr(writer.shutil, "get_terminal_size", lambda: os.terminal_size((40, 20)))
        out.progress(1, {"loss": 1e-9, "a_long_name_of_a_metric": 3.0})
        out.progress(2, {})
        out.progress(20, {"loss": 1.0}, is_last=True)
    frames = capsys.readouterr().err.split("\r")[1:]
    assert max(map(len, frames[:2])) <= 39
    assert len(frames[1]) == len(frames[0])  # nothing of the longer line stays visible
    assert frames[2].endswith("\n")


def test_write_json_refuses_nonfinite_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": {"b": [1, 2.5]}, "c": np.arange(3), "d": (True, None, "é")})
    assert json.loads(path.read_text()) == {"a": {"b": [1, 2.5]}, "c": [0, 1, 2], "d": [True, None, "é"]}
    before = path.read_bytes()
    for value in (math.nan, -math.inf, np.float32(np.nan)):
        with pytest.raises(WorkError, match=re.escape("test.union[1]")):
            write_json(path, {"test": {"union": [0.0, value]}})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"seed": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WorkError, match=r"config\.json: cannot be written: No space"):
        write_json(path, {"seed": 2})
    assert json.loads(path.read_text()) == {"seed": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_what_has_no_json_form_is_a_defect_with_its_place():
    with pytest.raises(TypeError, match=r"a\.b: object has no JSON form"):
        to_plain({"a": {"b": object()}})
    assert to_plain({3: Path("x")}) == {"3": "x"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (80, "1m20s"), (3599.9, "1h00m"), (7500, "2h05m"), (-3, "0s")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (940, "940"),
        (999.6, "1k"),
        (1000, "1k"),
        (1234, "1.2k"),
        (9960, "10k"),
        (38123, "38k"),
        (999600, "1M"),
    ],
)
def test_counts(value, text):
    assert format_count(value) == text
