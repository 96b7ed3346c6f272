"""Commands side by side: their cores, their ends, and what a signal to the parent does to them."""

import os
import signal
import sys
import threading
import time

import pytest

from moerec.errors import Terminated
from moerec.train.process.side_by_side import Job, divide_cores, run_side_by_side


def job(name, code, tmp_path):
    return Job(name, (sys.executable, "-c", f"import os, signal, sys, time\n{code}"), tmp_path / f"{name}.log")


def test_each_has_its_exit_code_and_the_others_go_on(tmp_path):
    codes = {"ok": "print('fine')", "bad": "sys.exit(3)", "killed": "os.kill(os.getpid(), signal.SIGKILL)"}
    jobs = [job(name, code, tmp_path) for name, code in (*codes.items(), ("last", "print('fine')"))]
    ended = []
    found = run_side_by_side(jobs, 2, lambda job, code: ended.append((job.name, code)))
    assert found == [0, 3, 128 + signal.SIGKILL, 0]
    assert sorted(ended) == [("bad", 3), ("killed", 137), ("last", 0), ("ok", 0)]
    assert (tmp_path / "last.log").read_text() == "fine\n"
    run_side_by_side(jobs[:1], 1, lambda *_: None)
    assert (tmp_path / "ok.log").read_text() == "fine\nfine\n"  # it is added to


def test_as_many_as_are_asked_for_run_at_a_time(tmp_path):
    """Each of two waits for the other; of one at a time, each finds the one before it gone."""
    meet = f"""
os.chdir({str(tmp_path)!r}); name, other = NAMES
open(name, "w").close()
while not os.path.exists(other): time.sleep(.01)
"""
    pairs = (("a", "b"), ("b", "a"))
    jobs = [job(pair[0], meet.replace("NAMES", repr(pair)), tmp_path) for pair in pairs]
    assert run_side_by_side(jobs, 2, lambda *_: None) == [0, 0]
    alone = f"os.chdir({str(tmp_path)!r}); os.mkdir('at_work'); time.sleep(.05); os.rmdir('at_work')"
    assert run_side_by_side([job(name, alone, tmp_path) for name in "cde"], 1, lambda *_: None) == [0, 0, 0]


def test_cores_are_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 4, 5, 7})
    assert divide_cores(2) == [{1, 2}, {4, 5, 7}]
    assert divide_cores(5) == [{1}, {2}, {4}, {5}, {7}]
    assert divide_cores(7)[5:] == [{1}, {2}]
    monkeypatch.undo()
    own, parts = os.sched_getaffinity(0), divide_cores(2)
    jobs = [job(name, "print(sorted(os.sched_getaffinity(0)))", tmp_path) for name in "ab"]
    run_side_by_side(jobs, 2, lambda *_: None)
    assert [(tmp_path / f"{name}.log").read_text() for name in "ab"] == [f"{sorted(part)}\n" for part in parts]
    assert os.sched_getaffinity(0) == own


def test_processes_are_waited_for_where_something_of_ours_fails(tmp_path):
    """They are ended, and are gone when the error comes out."""
    code = f"""
def save(number, frame):
    time.sleep(.3); open({str(tmp_path / "saved")!r}, "w").close(); os._exit(0)
signal.signal(signal.SIGTERM, save)
open({str(tmp_path / "ready")!r}, "w").close()
time.sleep(60)
"""
    wait = f"while not os.path.exists({str(tmp_path / 'ready')!r}): time.sleep(.01)"

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_side_by_side([job("slow", code, tmp_path), job("quick", wait, tmp_path)], 2, fail)
    assert (tmp_path / "saved").exists()


@pytest.fixture
def plain_signals():
    """As a command finds them: whoever started the tests, or a library, may have these signals ignored or handled."""
    plain = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in plain.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@pytest.mark.usefixtures("plain_signals")
@pytest.mark.parametrize(
    ("sent", "raised", "word"),
    [
        (signal.SIGINT, KeyboardInterrupt, "SIGINT"),
        (signal.SIGTERM, Terminated, "SIGTERM"),
        (signal.SIGHUP, Terminated, "SIGTERM"),
    ],
)
def test_a_signal_is_handed_on_and_waited_for(sent, raised, word, tmp_path):
    """Nothing further is started, and a process that takes its time to save is given it."""
    code = f"""
def save(number, frame):
    time.sleep(.3); print(signal.Signals(number).name, flush=True); os._exit(0)
signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)
open({str(tmp_path / "ready")!r}, "w").close()
time.sleep(60)
"""
    jobs = [job("first", code, tmp_path), job("second", "print('started')", tmp_path)]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(raised):
        run_side_by_side(jobs, 1, lambda *_: None)
    sender.join()
    assert (tmp_path / "first.log").read_text() == f"{word}\n"
    assert not (tmp_path / "second.log").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
