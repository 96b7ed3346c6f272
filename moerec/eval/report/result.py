"""`metrics.json` of a run, read again: what tables are made of must be what it is taken for."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moerec.errors import InputError
from moerec.eval.report.language import is_language
from moerec.eval.report.table import build_report_table, gap_closed, seen_rule
from moerec.files import read_json

_GROUPS = ("dataset", "valid", "slices", "probes", "routing", "intervals", "baseline_intervals", "paired")
_NUMBERS = ("seed", "steps", "best_step", "wall_s", "tokens_per_s", "n_params", "n_active_params", "gap_closed")


def read_result(path: Path) -> dict[str, Any]:
    """The result of a run, its tables checked.

    Raises:
      InputError: there is none; it is damaged; a field of it is of another type than those that runs write.
    """
    metrics = read_json(path, "no such file; is the run finished?")
    with blamed_on(path):
        _check(metrics)
        _ = build_report_table(metrics), gap_closed(metrics), seen_rule(metrics)
    return metrics


def read_any_result(path: Path) -> dict[str, Any]:
    """As `read_result`, or the result of a run on text alone.

    Raises:
      InputError: as `read_result`.
    """
    metrics = read_json(path, "no such file; is the run finished?")
    if not is_language(metrics):
        return read_result(path)
    with blamed_on(path):
        for name in _NUMBERS:
            _require_number(metrics.get(name), name)
        for name in ("valid", "n_params_by_part", "tasks"):
            _require_group(metrics.get(name), name)
        for name, value in _require_group(metrics["tasks"]["lm"], "tasks.lm").items():
            if name != "by_corpus":
                _require_number(value, f"tasks.lm.{name}")
    return metrics


@contextlib.contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Around what is computed from the content of one file alone: where that fails, the file is no result of a run.

    Raises:
      InputError: with the file and what was stumbled over.
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        own = "" if isinstance(error, _Misfit) else f"{type(error).__name__}: "
        reason = f"{own}{error}".split("\n")[0][:200]
        raise InputError(f"{path}: is no result of a run ({reason})") from error


class _Misfit(ValueError):
    """A field that is missing, or of another type."""


def _check(metrics: dict[str, Any]) -> None:
    for name in _NUMBERS:
        _require_number(metrics.get(name), name)
    for name in _GROUPS:
        _require_group(metrics.get(name), name)
    for name in ("test", "ceiling"):
        _check_table(metrics.get(name), name)
    for name, table in _require_group(metrics.get("baselines"), "baselines").items():
        _check_table(table, f"baselines.{name}")
    union = (metrics.get("test") or {}).get("union") or {}
    if (union.get("all") or {}).get("ndcg@10") is None:
        raise _Misfit("test.union.all.ndcg@10 is missing")


def _check_table(table: Any, place: str) -> None:
    for part in ("in_service", "union"):
        for key, row in _require_group(_require_group(table, place).get(part), f"{place}.{part}").items():
            for metric, value in _require_group(row, f"{place}.{part}.{key}").items():
                _require_number(value, f"{place}.{part}.{key}.{metric}")


def _require_group(value: Any, place: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _Misfit(f"{place} is no object")
    return value


def _require_number(value: Any, place: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise _Misfit(f"{place} is {value!r}, and no number")
