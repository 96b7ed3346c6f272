"""One run, from its config to its report: what `experiments.train` calls."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from moerec.config import Config
from moerec.data.load import load_data
from moerec.data.prepare import describe_quarantine
from moerec.errors import InputError
from moerec.report import write_report
from moerec.results import make_results
from moerec.train import fit
from moerec.writer import to_plain, write_json


def run(config: Config, workdir: Path) -> dict[str, Any]:
    """Loads the data, trains (or goes on), evaluates, and writes `metrics.json` and `report.html` into `workdir`.

    Raises:
      InputError: bad data, or a `workdir` that holds a run of another config.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    _keep_config(config, workdir / "config.json")
    data = load_data(config.data, workdir)
    for line in describe_quarantine(data.quarantined):
        print(line, file=sys.stderr)
    _keep_digest(data.digest, workdir / "data.json")
    fitted = fit(config, data, workdir)
    metrics = make_results(config, data, fitted, workdir)
    write_json(workdir / "metrics.json", metrics)
    write_report(workdir)
    return metrics


def _keep_config(config: Config, path: Path) -> None:
    """Saves the resolved config; a directory is never reused for another one, whose numbers would be mixed in."""
    resolved = to_plain(dataclasses.asdict(config))
    if path.exists():
        differences = list(_differences(json.loads(path.read_text()), resolved, "config"))
        if differences:
            raise InputError(f"{path}: this directory holds another run: {'; '.join(differences[:3])}")
    write_json(path, resolved)


def _keep_digest(digest: str, path: Path) -> None:
    """Saves what data the run is of; on other data its checkpoints would have been trained on what is now held out."""
    if path.exists() and json.loads(path.read_text())["sha256"] != digest:
        raise InputError(
            f"{path}: this directory holds a run on other data; the tables or their preparation have changed"
        )
    write_json(path, {"sha256": digest})


def _differences(old: Any, new: Any, place: str):
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{place}.{name}")
    elif old != new:
        yield f"{place} was {old!r} and is {new!r}"
