"""Two configurations over several seeds: differences of their runs, paired by seed, and how sure they are."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from moerec.config.stored import list_differences
from moerec.config.terminal import printable
from moerec.errors import InputError
from moerec.eval.report.result import blamed_on, read_result
from moerec.eval.report.table import config_name
from moerec.eval.significance import LEVEL, correct_holm, student_interval

METRIC = "ndcg@10"


class Difference(NamedTuple):
    """Of one part of the table, such as `union all` or `kuper` (ranked among its own items).

    Attributes:
      first, second: means over the pairs. difference: mean of first - second, with its 95 % interval `low` to `high`
        and two-sided p-value: of Student's t over pairs of runs, or over pairs of targets (`ranking.per_target`).
      n_better: pairs in which the first is better.
      p_holm: the p-value, corrected for the number of rows of its table.
    """

    part: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    n_better: int
    p_holm: float = 1.0


def correct_rows(rows: Sequence[Difference]) -> list[Difference]:
    """The rows of one table with p-values that are corrected for their number."""
    corrected = correct_holm([row.p_value for row in rows])
    return [row._replace(p_holm=p_holm) for row, p_holm in zip(rows, corrected, strict=True)]


class Comparison(NamedTuple):
    """Attributes:
    names: of the two configurations. seeds: `(seed, data.seed)` of each pair. rows: the union first.
    n_active_params, steps: most of each. wall_s: mean seconds of training and validation of each.
    """

    names: tuple[str, str]
    seeds: list[tuple[int, int]]
    rows: list[Difference]
    n_active_params: tuple[int, int]
    steps: tuple[int, int]
    wall_s: tuple[float, float]


def read_run(folder: Path) -> dict[str, Any]:
    """`metrics.json` of a finished run, as far as it is compared. Raises InputError where there is none, or damaged."""
    path = folder / "metrics.json"
    metrics = read_result(path)
    with blamed_on(path):
        seeds = metrics["seed"], metrics["config"]["data"]["seed"]
        if not all(isinstance(seed, int) for seed in seeds):
            raise TypeError(f"the seeds are {seeds}")
        _ = metrics["dataset"]
    return metrics


def _require_compared(folder: Path, metrics: dict[str, Any]) -> None:
    """Raises: InputError, where a part of what a table of two configurations is made of is missing."""
    with blamed_on(folder / "metrics.json"):
        _ = [metrics[name] + 0 for name in ("n_active_params", "steps", "wall_s")]
        _ = [row[METRIC] + 0 for row in metrics["test"]["in_service"].values()], metrics["test"]["union"]["all"]["n"]


def compare(first: Sequence[Path], second: Sequence[Path]) -> Comparison:
    """Pairs the runs by their seeds of training and of data.

    Raises:
      InputError: a run is missing or has no partner, two have the same seeds, runs of a side differ in their
        configuration, pairs were tested on other data, or there are fewer than two pairs.
    """
    sides = [_by_seed(folders) for folders in (first, second)]
    for own, other in (sides, sides[::-1]):
        for (seed, data_seed), (folder, _) in own.items():
            if (seed, data_seed) not in other:
                raise InputError(f"{folder}: no run with seed {seed} and data.seed {data_seed} on the other side")
    seeds = sorted(sides[0])
    if len(seeds) < 2:
        raise InputError(f"{next(iter(sides[0].values()))[0]}: a comparison needs at least two seeds")
    pairs = [(sides[0][s][1], sides[1][s][1]) for s in seeds]
    for s, (a, b) in zip(seeds, pairs, strict=True):
        for side, metrics in zip(sides, (a, b), strict=True):
            _require_compared(side[s][0], metrics)
        n_a, n_b = (run["test"]["union"]["all"]["n"] for run in (a, b))
        is_same = n_a == n_b and a["dataset"] == b["dataset"]
        if not is_same or a["test"]["in_service"].keys() != b["test"]["in_service"].keys():
            raise InputError(f"{sides[0][s][0]}: another data set than {sides[1][s][0]}")
    rows = [_compare_part("union all", pairs, "union", "all")]
    services = pairs[0][0]["test"]["in_service"]  # under another data.seed one may have no targets
    shared = [service for service in services if all(service in a["test"]["in_service"] for a, _ in pairs)]
    rows += [_compare_part(service, pairs, "in_service", service) for service in shared]

    def most(name: str) -> tuple[int, int]:
        return max(a[name] for a, _ in pairs), max(b[name] for _, b in pairs)

    names = (config_name(pairs[0][0]), config_name(pairs[0][1]))
    wall_s = tuple(float(np.mean([pair[side]["wall_s"] for pair in pairs])) for side in (0, 1))
    return Comparison(names, seeds, correct_rows(rows), most("n_active_params"), most("steps"), (wall_s[0], wall_s[1]))


def _by_seed(folders: Sequence[Path]) -> dict[tuple[int, int], tuple[Path, dict[str, Any]]]:
    found: dict[tuple[int, int], tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        metrics = read_run(folder)
        seeds = metrics["seed"], metrics["config"]["data"]["seed"]
        if seeds in found:
            raise InputError(f"{folder}: the same seeds as {found[seeds][0]}")
        found[seeds] = folder, metrics
    first, *others = [(folder, without_seeds(metrics["config"])) for folder, metrics in found.values()]
    for folder, config in others:
        for difference in list_differences(first[1], config, "config"):
            raise InputError(f"{folder}: differs from {first[0]} in more than its seeds: {difference}")
    return found


def without_seeds(config: dict[str, Any]) -> dict[str, Any]:
    """A plain configuration, its seeds set to nothing."""
    return {**config, "seed": None, "data": {**config["data"], "seed": None}}


def _compare_part(title: str, pairs: list[tuple[dict, dict]], part: str, key: str) -> Difference:
    return _test(title, np.array([[side["test"][part][key][METRIC] for side in pair] for pair in pairs]))


def _test(title: str, values: np.ndarray) -> Difference:
    """Args: `[pairs, 2]`."""
    gap = values[:, 0] - values[:, 1]
    n, error = len(gap), float(gap.std(ddof=1)) / math.sqrt(len(gap))
    mean, low, high = student_interval(gap)
    # Where all differences are the same, the statistic is 0 / 0 or infinite.
    p_value = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    first, second = map(float, values.mean(axis=0))
    return Difference(title, first, second, mean, low, high, p_value, int(np.sum(gap > 0)))


class InterventionTable(NamedTuple):
    """What the predictions of one configuration lose without the own profile and context, over several seeds.

    Attributes:
      rows: the runs as they are against the same with an intervention (`profile swapped`), in union NDCG@10.
      attainable: on the built-in world, union NDCG@10 of the exact posterior by what it knows (means over the seeds).
    """

    name: str
    seeds: list[tuple[int, int]]
    rows: list[Difference]
    attainable: dict[str, float]


def compare_interventions(folders: Sequence[Path]) -> InterventionTable:
    """Raises: InputError, as `compare`, or where a run was made without `eval.interventions`."""
    found = _by_seed(folders)
    if len(found) < 2:
        raise InputError(f"{folders[0]}: a comparison needs at least two seeds")
    runs = [found[seeds] for seeds in sorted(found)]
    changed = [_read_interventions(*run) for run in runs]
    for (folder, _), values in zip(runs, changed, strict=True):
        if values.keys() != changed[0].keys():
            raise InputError(f"{folder}: measured other interventions than {runs[0][0]}")
    own = [metrics["test"]["union"]["all"][METRIC] for _, metrics in runs]
    rows = [_test(title, np.stack([own, [x[title] for x in changed]], axis=1)) for title in changed[0]]
    known = [_read_attainable(*run) for run in runs]
    attainable = {name: float(np.mean([k[name] for k in known])) for name in known[0] if all(name in k for k in known)}
    return InterventionTable(config_name(runs[0][1]), sorted(found), correct_rows(rows), attainable)


def _read_interventions(folder: Path, metrics: dict[str, Any]) -> dict[str, float]:
    """`METRIC` with each intervention, by its title (`profile swapped`)."""
    probes = metrics.get("probes") or {}
    if not probes.get("interventions"):
        raise InputError(f"{folder}: measured no interventions; train it with --config.eval.interventions=true")
    with blamed_on(folder / "metrics.json"):
        parts = probes["interventions"].items()
        return {f"{part} {name}": row[METRIC] + 0.0 for part, measured in parts for name, row in measured.items()}


def _read_attainable(folder: Path, metrics: dict[str, Any]) -> dict[str, float]:
    with blamed_on(folder / "metrics.json"):
        return {name: value + 0.0 for name, value in (metrics["probes"].get("attainable") or {}).items()}


def format_rows(rows: Sequence[Difference], names: tuple[str, str], counts: Sequence[int], last: str) -> list[str]:
    """Lines of a table: a head, a line a row, and what marks a row's better side; `counts` of pairs, of which `last`
    says what is counted.
    """
    parts = [printable(row.part) for row in rows]
    width = max(16, *map(len, parts))
    first, second = map(printable, names)
    heads = f"{'':{width}}  {first:>12}   {second:>12}   difference      95 % interval       p  p, Holm  {last}"
    lines = [heads]
    for part, row, n in zip(parts, rows, counts, strict=True):
        interval = f"{row.low:+.4f} to {row.high:+.4f}"
        is_sure = row.p_holm < LEVEL
        marks = ["*" if is_sure and better else " " for better in (row.difference > 0, row.difference < 0)]
        lines.append(
            f"{part:{width}}  {row.first:12.4f}{marks[0]}  {row.second:12.4f}{marks[1]}  {row.difference:+10.4f}"
            f"  {interval:>18}  {row.p_value:6.4f}   {row.p_holm:6.4f}  {row.n_better} of {n}"
        )
    return [*lines, f"* p < {LEVEL:g} after Holm's correction for the number of rows, {len(rows)}"]


def render_interventions(interventions: InterventionTable) -> str:
    """The table for a terminal."""
    n = len(interventions.seeds)
    lines = [
        f"{printable(interventions.name)}, union {METRIC}, means of {n} seeds"
        f" (seed/data.seed {', '.join(f'{a}/{b}' for a, b in interventions.seeds)})",
        *format_rows(interventions.rows, ("own", "changed"), [n] * len(interventions.rows), "less"),
    ]
    if interventions.attainable:
        told = ", ".join(f"{printable(name)} {value:.4f}" for name, value in interventions.attainable.items())
        lines.append(f"the exact posterior, by what it knows: {told}")
    return "\n".join(lines)


def render(comparison: Comparison) -> str:
    """The table for a terminal."""
    n = len(comparison.seeds)
    lines = [
        f"{METRIC}, means of {n} seeds (seed/data.seed {', '.join(f'{a}/{b}' for a, b in comparison.seeds)})",
        *format_rows(comparison.rows, comparison.names, [n] * len(comparison.rows), "better"),
    ]
    width = max(16, *(len(printable(row.part)) for row in comparison.rows))
    budgets = (comparison.n_active_params, comparison.steps, comparison.wall_s)
    for title, (a, b) in zip(("active params", "steps", "seconds"), budgets, strict=True):
        a, b = round(a), round(b)
        lines.append(f"{title:{width}}  {a:12,}   {b:12,}")
    return "\n".join(lines)
