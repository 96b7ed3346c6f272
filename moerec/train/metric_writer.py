"""What a run writes while it works: `metrics.jsonl`, TensorBoard events and the progress line."""

import contextlib
import datetime
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moerec.config.terminal import printable
from moerec.errors import InputError, WorkError
from moerec.files import naming, read_lines, to_plain, write_text

_PLAIN_EVERY_S = 15.0  # between two progress lines where standard error is no terminal
_TTY_EVERY_S = 0.2


def format_duration(seconds: float) -> str:
    """`9s`, `1m20s` or `2h05m`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_count(value: float) -> str:
    """`940`, `38k` or `1.2M`."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            scaled = value / unit
            return f"{scaled:.0f}{suffix}" if abs(scaled) >= 9.95 else f"{scaled:.1f}".removesuffix(".0") + suffix
    return f"{value:.0f}"


def _format_scalar(name: str, value: float) -> str:
    if name.endswith("_per_s"):
        return f"{format_count(value)} {name.removesuffix('_per_s')}/s"
    short = name.rsplit("/", 1)[-1]
    if "@" in short or short == "mrr":
        return f"{short} {value:.3f}".replace(" 0.", " .")
    return f"{short} {value:.4g}"


def read_metric_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`: each has a step, and numbers or nulls.

    Raises:
      InputError: the file is damaged.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        for name, value in {"step": None, **line}.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name == "step" and not (isinstance(value, int) and 0 <= value < 2**53 and is_number):
                raise InputError(f"{path}:{number}: its step is {value!r}, and no count of steps")
            if not is_number and value is not None:
                raise InputError(f"{path}:{number}: {name} is {value!r}, and no number")
    return lines


class EventWriter:
    """Scalars in a file of TensorBoard events, written at once: the thread of tensorboardX's own writer dies on a full
    disk, and whoever gives it more then waits for ever.
    """

    def __init__(self, folder: Path, purge_step: int, suffix: str):
        from tensorboardX.event_file_writer import EventsWriter  # slow to import, and only runs need it
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._writer = EventsWriter(str(folder / "events"), suffix)
        self._add(purge_step, file_version="brain.Event:2")
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        wall_time = datetime.datetime.now().timestamp()
        self._writer.write_event(Event(wall_time=wall_time, step=step, **content))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Raises: WorkError, where the disk is full."""
        from tensorboardX.summary import scalar

        with naming(self._folder):
            for name, value in scalars.items():
                self._add(step, summary=scalar(name, value))
            self._writer.flush()

    def close(self) -> None:
        """Raises: WorkError, where the disk is full."""
        with naming(self._folder):
            self._writer.close()


class MetricWriter:
    """Writes the scalars of a run to `metrics.jsonl` and TensorBoard, and a progress line to standard error.

    `resume_step` is the step that the run goes on from (0: it starts over): what an earlier run wrote after it is
    dropped, so that the files of a resumed run read as those of an undisturbed one. `name` begins each progress line.
    """

    def __init__(self, workdir: Path | str, total_steps: int, resume_step: int = 0, name: str = ""):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metric_lines(path) if resume_step and line["step"] <= resume_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        purge_step = resume_step + 1 if resume_step else 0  # step 0 is written anew by a run that starts over
        suffix = f".{resume_step:09d}"  # else a second start within one second overwrites the first one's file
        self._events = EventWriter(workdir / "tensorboard", purge_step, suffix)
        self._total_steps = total_steps
        self._since: tuple[int, float] | None = None  # the first step shown, and when: the step's compilation is over
        self._last_line, self._width = -math.inf, 0
        self._tty = sys.stderr.isatty()
        self._label = f"{printable(name)}  " if name else ""
        if 0 < resume_step < total_steps:
            print(f"{self._label}goes on from step {resume_step}/{total_steps}", file=sys.stderr)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds one line, flushed. A scalar that is not finite is written as null, and not at all to TensorBoard."""
        plain = to_plain(scalars)
        with naming(self._file.name):
            self._file.write(json.dumps({"step": int(step), **plain}, allow_nan=False) + "\n")
            self._file.flush()
        self._events.write(int(step), {name: x for name, x in plain.items() if isinstance(x, (int, float))})

    def progress(self, step: int, scalars: Mapping[str, Any], is_last: bool = False) -> None:
        """Shows the step, the scalars (`*_per_s` as rates) and from the second time on the time left.

        Lines come at a rate that a reader can follow; the last one always comes.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = (step, now)
        first_step, started = self._since
        if now - self._last_line < (_TTY_EVERY_S if self._tty else _PLAIN_EVERY_S) and not is_last:
            return
        self._last_line = now
        parts = [f"{self._label}step {step}/{self._total_steps}"]
        parts += [_format_scalar(name, float(value)) for name, value in scalars.items()]
        if step > first_step and not is_last:
            per_step = (now - started) / (step - first_step)
            parts.append(f"{format_duration(per_step * (self._total_steps - step))} left")
        line = "  ".join(parts)
        if self._tty:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be overwritten
            sys.stderr.write("\r")
            sys.stderr.write(line.ljust(self._width) + ("\n" if is_last else ""))
            self._width = 0 if is_last else len(line)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Flushes and closes the files; a second call does nothing."""
        if self._file.closed:
            return
        if self._tty and self._width:
            sys.stderr.write("\n")
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(*[OSError, WorkError] if kind else []):  # a full disk is told once
            self.close()
