"""The means of one configuration's runs over their seeds, with Student's intervals."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moerec.config.stored import list_differences
from moerec.config.terminal import printable
from moerec.errors import InputError
from moerec.eval.compare.pairs import read_run, without_seeds
from moerec.eval.report.language import is_language
from moerec.eval.report.result import blamed_on
from moerec.eval.report.table import build_report_table, format_value, gap_closed
from moerec.eval.significance import Interval, student_interval
from moerec.files import read_json
from moerec.train.run_dir import METRICS

_TEXT_TITLES = {"nats_per_token": "nats a token", "perplexity": "perplexity", "bits_per_byte": "bits a byte"}
_TEXT_WIDTH, _CELL = 100, 15


class SeedColumn(NamedTuple):
    """One figure. Attributes: place: of it within a result (`("union", "all", "ndcg@10")`). group, title: its heads."""

    place: tuple[str, ...]
    group: str
    title: str


class SeedRow(NamedTuple):
    """One row. Attributes: place: of it in a result (`("baselines", "markov")`). cells: values by column."""

    place: tuple[str, ...]
    label: str
    cells: list[list[float]]


class SeedTable(NamedTuple):
    """Attributes: seeds: of the runs, in their order. gaps_closed: the runs' shares; empty without popularity or
    ceiling.
    """

    seeds: list[int]
    columns: list[SeedColumn]
    rows: list[SeedRow]
    gaps_closed: list[float]


def read_seeds(folders: Sequence[Path]) -> SeedTable:
    """The table of finished runs.

    Raises:
      InputError: a run is missing or damaged, or differs from the first in more than its seeds.
    """
    is_text = all(is_language(read_json(folder / METRICS)) for folder in folders)
    runs = [read_json(folder / METRICS) if is_text else read_run(folder) for folder in folders]
    found = []
    for folder, metrics in zip(folders, runs, strict=True):
        with blamed_on(folder / METRICS):
            config = without_seeds(metrics["config"])
            found.append(_list_text(metrics) if is_text else _list_ranking(metrics))
            for difference in list_differences(without_seeds(runs[0]["config"]), config, "config"):
                raise InputError(f"{folder}: differs from {folders[0]} in more than its seeds: {difference}")
    first = found[0]
    columns = [column for column in first.columns if all(column in table.columns for table in found)]
    rows = []
    for row in first.rows:
        own = [next((r for r in table.rows if r.place == row.place), None) for table in found]
        cells = [
            [value for r, table in zip(own, found, strict=True) if r for value in r.cells[table.columns.index(column)]]
            for column in columns
        ]
        rows.append(row._replace(cells=cells))
    gaps = [gap for table in found for gap in table.gaps_closed]
    return SeedTable([metrics["seed"] for metrics in runs], columns, rows, gaps)


def _list_ranking(metrics: dict[str, Any]) -> SeedTable:
    """The table of one run that ranks."""
    table, gap = build_report_table(metrics), gap_closed(metrics)
    columns = [SeedColumn((c.part, c.key, c.metric), c.group, c.title) for c in table.columns]
    tops = {"model": ("test",), "ceiling": ("ceiling",)}
    rows = [
        SeedRow(
            tops.get(row.kind) or ("baselines", str(row.name)),
            row.label,
            [[] if cell.value is None else [float(cell.value)] for cell in row.cells],
        )
        for row in table.rows
    ]
    return SeedTable([metrics["seed"]], columns, rows, [] if gap is None else [gap])


def _list_text(metrics: dict[str, Any]) -> SeedTable:
    """The figures of one run on text, of which the held-out documents may be none."""
    found = metrics["tasks"]["lm"]
    columns = [SeedColumn((name,), "lm", title) for name, title in _TEXT_TITLES.items()]
    cells = [[found[name] + 0.0] if name in found else [] for name in _TEXT_TITLES]
    name = str(metrics["config"]["name"])
    return SeedTable([metrics["seed"]], columns, [SeedRow(("tasks", "lm"), name, cells)], [])


def describe_seeds(table: SeedTable) -> dict[str, Any]:
    """The table as in `metrics.json`, each number in it as `{"mean", "low", "high", "values"}`."""
    nested: dict[str, Any] = {"seeds": table.seeds}
    for row in table.rows:
        for column, values in zip(table.columns, row.cells, strict=True):
            place = nested
            *above, last = (*row.place, *column.place)
            for name in above:
                place = place.setdefault(name, {})
            place[last] = _describe(values)
    return nested | ({"gap_closed": _describe(table.gaps_closed)} if table.gaps_closed else {})


def _describe(values: list[float]) -> dict[str, Any] | None:
    return {**student_interval(values)._asdict(), "values": values} if values else None


def format_seeds(table: SeedTable) -> str:
    """The table as text, at most 100 columns wide: columns that do not fit side by side follow below.

    A cell is the mean over the runs and half of its 95 % interval, which is left out where all runs give the same.
    """
    labels = [printable(row.label) for row in table.rows]
    width = min(max(map(len, labels)), 28)
    blocks: list[list[int]] = [[]]
    for group in dict.fromkeys(column.group for column in table.columns):
        members = [c for c, column in enumerate(table.columns) if column.group == group]
        if blocks[-1] and width + _CELL * (len(blocks[-1]) + len(members)) > _TEXT_WIDTH:
            blocks.append([])
        blocks[-1] += members
    lines: list[str] = []
    for block in blocks:
        columns = [table.columns[c] for c in block]
        heads = [c.group if n == 0 or columns[n - 1].group != c.group else "" for n, c in enumerate(columns)]
        lines += [""] * bool(lines) + [_format_row("", [printable(head)[: _CELL - 2] for head in heads], width)]
        lines.append(_format_row("@10" if len(table.columns[0].place) > 1 else "", [c.title for c in columns], width))
        for label, row in zip(labels, table.rows, strict=True):
            lines.append(_format_row(label[:width], [_format_cell(row.cells[c]) for c in block], width))
    n = len(table.seeds)
    lines += ["", f"means over {n} seed{'s' * (n > 1)} ({', '.join(map(str, table.seeds))})"]
    lines[-1] += "; ± half of Student's 95 % interval, not where all runs give the same" if n > 1 else ""
    if table.gaps_closed:
        closed = student_interval([100 * gap for gap in table.gaps_closed])
        spread = f" ± {closed.high - closed.mean:.1f}" if len(table.gaps_closed) > 1 else ""
        lines.append(f"{closed.mean:.1f}{spread} % of the gap from popularity to the ceiling is closed (union NDCG@10)")
    return "\n".join(lines)


def _format_row(label: str, cells: Sequence[str], width: int) -> str:
    return (label.ljust(width) + "".join("  " + cell.ljust(_CELL - 2) for cell in cells)).rstrip()


def _format_cell(values: list[float]) -> str:
    if not values:
        return format_value(None)
    interval: Interval = student_interval(values)
    half = interval.high - interval.mean
    return format_value(interval.mean) + (f" ±{format_value(half)}" if 0 < half < math.inf else "")
