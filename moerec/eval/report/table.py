"""The result table: the model, the baselines and the ceiling by service and over the union."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moerec.errors import InputError
from moerec.terminal import printable

UNION_METRICS = ("ndcg@10", "recall@10", "mrr")
SERVICE_METRICS = ("ndcg@10", "recall@10")
_TITLES = {"ndcg@10": "NDCG", "recall@10": "Recall", "mrr": "MRR"}
_LABELS = {
    "item_knn_cross": "item kNN (all services)",
    "popularity_by_service": "popularity by service",
    "popularity_recent": "popularity (recent)",
    "popularity_by_hour": "popularity by service and hour",
    "markov": "Markov",
    "item_knn": "item kNN",
    "sasrec_one_negative": "SASRec (one negative)",
    "sasrec_sampled": "SASRec (sampled softmax)",
}
_TEXT_WIDTH = 100
_CELL = 8


class Column(NamedTuple):
    """One metric of one part: `part` is union or in_service, `key` a service or "all"."""

    group: str
    part: str
    key: str
    metric: str

    @property
    def title(self) -> str:
        return _TITLES[self.metric]


class Cell(NamedTuple):
    value: float | None
    low: float | None = None  # 95 % bootstrap interval, where the metric has one
    high: float | None = None
    best: bool = False  # of two rows or more, the ceiling's aside


class Row(NamedTuple):
    label: str
    kind: str  # model, baseline or ceiling
    cells: list[Cell]


class ReportTable(NamedTuple):
    columns: list[Column]
    rows: list[Row]

    @property
    def has_best(self) -> bool:
        """Whether any cell is marked."""
        return any(cell.best for row in self.rows for cell in row.cells)


def config_name(metrics: Mapping[str, Any]) -> str:
    """The name of the run's configuration; `metrics["config"]` is the configuration or its name."""
    config = metrics.get("config")
    name = config.get("name") if isinstance(config, Mapping) else config
    return str(name) if name else "model"


def seen_rule(metrics: Mapping[str, Any]) -> str:
    """What the ranking did with the items of a user's history; empty where the metrics do not tell."""
    config = metrics.get("config")
    masked = (config.get("eval") or {}).get("mask_seen") if isinstance(config, Mapping) else None
    if masked is None:
        return ""
    repeated = (metrics.get("dataset") or {}).get("repeated_targets") or 0
    missed = f" ({100 * repeated:.2g} % of the targets repeat one and count as misses)" if repeated else ""
    return f"seen items are no candidates{missed}" if masked else "seen items stay candidates"


def row_label(baseline: str) -> str:
    """How a baseline is called in a table."""
    return _LABELS.get(baseline, baseline.replace("_", " "))


def metric_at(result: Mapping[str, Any], part: str, key: str, metric: str) -> float | None:
    """`result[part][key][metric]`, or None where it is missing."""
    value = ((result.get(part) or {}).get(key) or {}).get(metric)
    return value if isinstance(value, (int, float)) else None


def build_report_table(metrics: Mapping[str, Any]) -> ReportTable:
    """The table of `metrics.json`: the union first, then each service among its own items.

    Raises:
      InputError: the metrics have no test result of the union.
    """
    test = metrics.get("test") or {}
    if metric_at(test, "union", "all", "ndcg@10") is None:
        raise InputError("metrics.json: test.union.all.ndcg@10 is missing")
    columns = [Column("union", "union", "all", metric) for metric in UNION_METRICS]
    for service in test.get("in_service") or {}:
        columns += [Column(service, "in_service", service, metric) for metric in SERVICE_METRICS]
    ranges = metrics.get("baseline_intervals") or {}
    results = [(config_name(metrics), "model", test, metrics.get("intervals") or {})]
    for name, row in (metrics.get("baselines") or {}).items():
        results.append((row_label(name), "baseline", row, ranges.get(name) or {}))
    if metrics.get("ceiling"):
        results.append(("ceiling", "ceiling", metrics["ceiling"], {}))
    values = [
        [metric_at(row, column.part, column.key, column.metric) for column in columns] for _, _, row, _ in results
    ]
    attained = [row for row, (_, kind, _, _) in zip(values, results, strict=True) if kind != "ceiling"]
    best: list[float | None] = []
    for c in range(len(columns)):
        known = [value for row in attained if (value := row[c]) is not None]
        best.append(max(known) if len(known) > 1 else None)
    rows = []
    for (label, kind, _, intervals), row in zip(results, values, strict=True):
        cells = []
        for column, value, top in zip(columns, row, best, strict=True):
            low, high = _interval(intervals, column)
            cells.append(Cell(value, low, high, kind != "ceiling" and value is not None and value == top))
        rows.append(Row(label, kind, cells))
    return ReportTable(columns, rows)


def _interval(intervals: Mapping[str, Any], column: Column) -> Sequence[float | None]:
    found = ((intervals.get(column.part) or {}).get(column.key) or {}).get(column.metric)
    return found if found and len(found) == 2 else (None, None)


def gap_closed(metrics: Mapping[str, Any]) -> float | None:
    """Share of the way from popularity to the ceiling in union NDCG@10, or None where that has no meaning."""
    if metrics.get("gap_closed") is not None:
        return float(metrics["gap_closed"])
    low = metric_at((metrics.get("baselines") or {}).get("popularity") or {}, "union", "all", "ndcg@10")
    high = metric_at(metrics.get("ceiling") or {}, "union", "all", "ndcg@10")
    reached = metric_at(metrics.get("test") or {}, "union", "all", "ndcg@10")
    if low is None or high is None or reached is None or high <= low:
        return None
    return (reached - low) / (high - low)


def format_value(value: float | None) -> str:
    """`.0531`, `1.000` or a dash."""
    if value is None:
        return "–"
    return f"{value:.4f}".removeprefix("0") if value < 0.99995 else f"{value:.3f}"


def format_table(metrics: Mapping[str, Any]) -> str:
    """The table as text, at most 100 columns wide: services that do not fit side by side follow below.

    Metrics are at 10 over full rankings; a service's columns rank its own items only. `*` marks the best row in each
    column (the ceiling aside, and where there is another), and the first row is the model.
    """
    table = build_report_table(metrics)
    label_width = min(max(len(printable(row.label)) for row in table.rows), 28)
    blocks: list[list[int]] = [[]]
    for group in dict.fromkeys(column.group for column in table.columns):
        members = [c for c, column in enumerate(table.columns) if column.group == group]
        if blocks[-1] and label_width + _CELL * (len(blocks[-1]) + len(members)) > _TEXT_WIDTH:
            blocks.append([])
        blocks[-1] += members
    lines: list[str] = []
    for block in blocks:
        lines += [""] * bool(lines) + _format_block(table, block, label_width)
    lines.append("")
    lines.append(_caption(metrics, table.has_best))
    return "\n".join(lines)


def _format_block(table: ReportTable, block: Sequence[int], label_width: int) -> list[str]:
    columns = [table.columns[c] for c in block]
    heads = " " * label_width
    for group in dict.fromkeys(column.group for column in columns):
        width = _CELL * sum(column.group == group for column in columns)
        heads += "  " + _shorten(group, width - 3).ljust(width - 2)
    titles = "@10".ljust(label_width) + "".join(column.title.rjust(_CELL - 1) + " " for column in columns)
    lines = [heads.rstrip(), titles.rstrip()]
    for row in table.rows:
        cells = (row.cells[c] for c in block)
        text = "".join(format_value(cell.value).rjust(_CELL - 1) + (" ", "*")[cell.best] for cell in cells)
        lines.append((_shorten(row.label, label_width).ljust(label_width) + text).rstrip())
    return lines


def _caption(metrics: Mapping[str, Any], has_best: bool) -> str:
    n = metric_at(metrics["test"], "union", "all", "n")
    parts = [] if n is None else [f"{n:,.0f} targets"]
    parts += [seen_rule(metrics)] if seen_rule(metrics) else []
    if has_best:
        parts.append("* best except the oracle" if metrics.get("ceiling") else "* best")
    text = "; ".join(parts)
    share = gap_closed(metrics)
    if share is not None:
        text += f"\n{100 * share:.0f} % of the gap from popularity to the ceiling is closed (union NDCG@10)"
    return text


def _shorten(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"
