"""One configuration trained with several seeds: in turn, or side by side as processes."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moerec.config import Config, checked
from moerec.errors import InputError
from moerec.files import require_plain_path, to_plain
from moerec.train.process.side_by_side import Job, run_side_by_side
from moerec.train.run_dir import CONFIG, METRICS, refuse_other_config

LOG = "train.log"


class SeedRun(NamedTuple):
    """One of the runs. Attributes: config: with its seed."""

    seed: int
    folder: Path
    config: Config


def plan_seeds(config: Config, workdir: Path, seeds: Sequence[str]) -> list[SeedRun]:
    """The runs that differ in `config.seed` alone, each in `WORKDIR_SEED`.

    Raises:
      InputError: a seed is no number, is out of range, or is there twice; or a folder holds another run.
    """
    runs: list[SeedRun] = []
    for text in seeds:
        if not (text.isascii() and text.isdecimal() and len(text) <= 10):
            raise InputError(f"--seeds: {text!r} is no whole number in [0, 2^32)")
        seed = int(text)
        if any(seed == run.seed for run in runs):
            raise InputError(f"--seeds: {seed} is there twice")
        runs.append(SeedRun(seed, Path(f"{workdir}_{seed}"), checked(dataclasses.replace(config, seed=seed))))
    if not runs:
        raise InputError("--seeds: is empty; write --seeds=1,2,3")
    for run in runs:  # before hours of work
        require_plain_path(run.folder)
        refuse_other_config(to_plain(dataclasses.asdict(run.config)), run.folder / CONFIG)
    return runs


def train_seeds(
    config: Config, workdir: Path, seeds: Sequence[str], n_at_once: int, arguments: Mapping[str, str]
) -> dict[Path, int]:
    """Trains the runs of `plan_seeds` that are not finished, each as a process, and tells how it has ended.

    Processes side by side share the cores out, and each adds its output to `LOG` in the folder of its run.

    Args: arguments: of `experiments.train`, by the field that they set.

    Returns:
      The exit codes by folder; 0 for a run that was finished before.

    Raises:
      InputError: as `plan_seeds`, or where `n_at_once` is none. KeyboardInterrupt, Terminated: as `run_side_by_side`.
    """
    if n_at_once < 1:
        raise InputError("--parallel: must be at least 1")
    runs = plan_seeds(config, workdir, seeds)
    todo = [run for run in runs if not (run.folder / METRICS).exists()]
    n_at_once = min(n_at_once, max(len(todo), 1))
    jobs = []
    for run in runs:
        log = run.folder / LOG if n_at_once > 1 else None
        if run in todo:
            own = {**arguments, "config.seed": f"--config.seed={run.seed}", "workdir": f"--workdir={run.folder}"}
            command = (sys.executable, "-m", "experiments.train", *own.values())
            jobs.append(Job(f"seed {run.seed}: {run.folder}", command, log))
        state = f"output in {log}" if log else "waits for its turn"
        _tell(f"seed {run.seed}: {run.folder}: {state if run in todo else 'is finished'}")
    found = run_side_by_side(jobs, n_at_once, _tell_end)
    return {run.folder: 0 for run in runs} | {run.folder: code for run, code in zip(todo, found, strict=True)}


def _tell_end(job: Job, code: int) -> None:
    """In a line; why it has failed is the last one of its log, or has just gone by."""
    reason = ""
    if code and job.log is not None and job.log.is_file():
        lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n")
        reason = next((f" ({line.strip().removeprefix('error: ')})" for line in reversed(lines) if line.strip()), "")
    _tell(f"{job.name}: {f'ended with exit code {code}{reason}' if code else 'is finished'}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
