"""One run, from its config to its report: what `experiments.train` calls."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from moerec.config import Config
from moerec.config.stored import list_differences
from moerec.data.load import DIGEST, load_data
from moerec.data.prepare.tables_to_shards import describe_quarantine
from moerec.errors import InputError
from moerec.eval.evaluate_run import make_results
from moerec.eval.report import write_report
from moerec.files import to_plain, write_json
from moerec.train.loop import fit


def run(config: Config, workdir: Path) -> dict[str, Any]:
    """Loads the data, trains (or goes on), evaluates, and writes `metrics.json` and `report.html` into `workdir`.

    A finished run is not evaluated anew: its `metrics.json` is the result.

    Raises:
      InputError: bad data, or a `workdir` that holds a run of another config.
    """
    is_new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        return _run(config, workdir)
    except InputError:
        if is_new and not any(workdir.iterdir()):
            workdir.rmdir()  # a refused call leaves nothing behind
        raise


def _run(config: Config, workdir: Path) -> dict[str, Any]:
    _refuse_strange_folder(workdir)
    resolved = to_plain(dataclasses.asdict(config))
    _compare_config(resolved, workdir / "config.json")
    data = load_data(config.data, workdir)
    for line in describe_quarantine(data.quarantined):
        print(line, file=sys.stderr)
    # Only now that the data could be read: a first call that failed must not bind the directory to its mistakes.
    write_json(workdir / "config.json", resolved)
    write_json(workdir / DIGEST, {"sha256": data.digest})
    finished = workdir / "metrics.json"
    if finished.exists():
        print(f"{workdir}: is finished; delete its metrics.json to have it evaluated anew", file=sys.stderr)
        return json.loads(finished.read_text())
    fitted = fit(config, data, workdir)
    metrics = make_results(config, data, fitted, workdir)
    write_json(workdir / "metrics.json", metrics)
    write_report(workdir)
    return metrics


def _refuse_strange_folder(workdir: Path) -> None:
    """A run is not written among other things; tables that were prepared, or audited, there before are its own."""
    if not (workdir / "config.json").exists():
        own = re.compile(
            r"data(\..*)?|audit\.json|\..*|.*\.log|lost\+found"
        )  # `data.partial-…`: an interruption left it
        strange = sorted(path.name for path in workdir.iterdir() if not own.fullmatch(path.name))
        if strange:
            raise InputError(f"{workdir}: is not empty and no directory of a run (there is {strange[0]})")


def _compare_config(resolved: Any, path: Path) -> None:
    """A directory is never reused for another config, whose numbers would be mixed in."""
    if path.exists():
        differences = list(list_differences(json.loads(path.read_text()), resolved, "config"))
        if differences:
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            told = "; ".join(differences[:3]) + more
            raise InputError(f"{path}: this directory holds another run: {told}. Another --workdir is needed")
