"""Commands as processes, several at a time, each with a share of the processor's cores."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moerec.errors import Terminated

_LOOK_S = 0.1  # between two looks at whether a process has ended


class Job(NamedTuple):
    """One command.

    Attributes:
      name: what it is called where it is told of.
      log: the file that its output is added to; None leaves it where ours goes.
    """

    name: str
    command: Sequence[str]
    log: Path | None = None


def divide_cores(n_parts: int) -> list[set[int]]:
    """The cores that this process may use, divided; where they are fewer than the parts, parts share one.

    Empty sets where the system tells nothing of cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(n_parts)]
    cores = sorted(os.sched_getaffinity(0))
    if n_parts >= len(cores):
        return [{cores[part % len(cores)]} for part in range(n_parts)]
    return [set(cores[part * len(cores) // n_parts : (part + 1) * len(cores) // n_parts]) for part in range(n_parts)]


def run_side_by_side(jobs: Sequence[Job], n_at_once: int, ended: Callable[[Job, int], None]) -> list[int]:
    """Runs all jobs, at most `n_at_once` at a time, whatever becomes of the others; returns their exit codes in order.

    A process that a signal has ended has the code that shells give it (128 and the number). An interruption of this
    process, SIGTERM and SIGHUP are handed on; it ends when all of its processes have.

    Args: ended: is told of each job that has ended.

    Raises:
      KeyboardInterrupt, Terminated: this process was asked to end.
    """
    codes: dict[int, int] = {}
    waiting = list(range(len(jobs)))
    cores = divide_cores(n_at_once)
    running: dict[int, tuple[int, subprocess.Popen]] = {}  # by the share of the cores
    asked: set[int] = set()
    with _heeding_signals() as came:
        try:
            while waiting or running:
                for share in range(n_at_once):
                    if share not in running and waiting:
                        index = waiting.pop(0)
                        running[share] = index, _start(jobs[index], cores[share] if n_at_once > 1 else set())
                time.sleep(_LOOK_S)
                while came:  # a second one, too: processes that are saving end at once then
                    waiting.clear()
                    number = came.pop(0)
                    asked.add(number)
                    _signal_all(running, number)
                for share, (index, process) in list(running.items()):
                    code = process.poll()
                    if code is not None:
                        del running[share]
                        codes[index] = 128 - code if code < 0 else code
                        ended(jobs[index], codes[index])
        finally:
            _signal_all(running, signal.SIGTERM)
            for _, process in running.values():  # they may be saving: who started us counts on nobody being at work
                process.wait()
    if signal.SIGINT in asked:
        raise KeyboardInterrupt
    if asked:
        raise Terminated("terminated; the same command goes on")
    return [codes[index] for index in range(len(jobs))]


def _signal_all(running: dict[int, tuple[int, subprocess.Popen]], number: int) -> None:
    for _, process in running.values():
        process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _start(job: Job, cores: set[int]) -> subprocess.Popen:
    """A process in a session of its own: a Ctrl-C in the terminal comes to it once, from here."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        log = None
        if job.log is not None:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(job.log, "ab"))
        if cores:  # a process begins with the cores of the thread that starts it
            own = os.sched_getaffinity(0)
            stack.callback(os.sched_setaffinity, 0, own)
            os.sched_setaffinity(0, cores)
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log and subprocess.STDOUT, start_new_session=True
        )


@contextlib.contextmanager
def _heeding_signals() -> Iterator[list[int]]:
    """Within it signals that would end this process are only listed, in the order in which they come."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
