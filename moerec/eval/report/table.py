"""The result table: the model, the baselines and the ceiling by service and over the union."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moerec.config.terminal import printable
from moerec.errors import InputError
from moerec.eval.significance import LEVEL, correct_holm

UNION_METRICS = ("ndcg@10", "recall@10", "mrr@10")
SERVICE_METRICS = ("ndcg@10", "recall@10")
_TITLES = {"ndcg@10": "NDCG", "recall@10": "Recall", "mrr@10": "MRR", "mrr": "MRR"}
_LABELS = {
    "item_knn_cross": "item kNN (all services)",
    "popularity_by_service": "popularity by service",
    "popularity_recent": "popularity (recent)",
    "popularity_by_hour": "popularity by service and hour",
    "markov": "Markov",
    "item_knn": "item kNN",
    "graph_text": "item graph + texts",
    "graph_text_no_text": "item graph",
    "graph_text_no_graph": "item texts",
    "graph_text_own": "item graph + texts (own)",
    "sasrec_one_negative": "SASRec (one negative)",
    "sasrec_sampled": "SASRec (sampled softmax)",
    "sasrec_full": "SASRec (texts, pointers)",
}
_TEXT_WIDTH = 100
_CELL = 8


P_LABEL = "p, best to next"


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
    best: bool = False  # above the next row, the ceiling aside, by more than chance gives


class Row(NamedTuple):
    label: str
    kind: str  # model, baseline or ceiling
    cells: list[Cell]
    name: str | None = None  # of a baseline


class ReportTable(NamedTuple):
    """Attributes:
    p_values: of each column, of the paired test of its best row against the next best, corrected for all columns; None
      where it was not tested.
    """

    columns: list[Column]
    rows: list[Row]
    p_values: list[float | None]

    @property
    def n_tested(self) -> int:
        """The number of columns that were tested, for which the p-values are corrected."""
        return sum(p_value is not None for p_value in self.p_values)

    @property
    def is_untested(self) -> bool:
        """Whether rows could be compared, but the run is older than the tests."""
        return self.n_tested == 0 and any(row.kind == "baseline" for row in self.rows)


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


def list_lost(metrics: Mapping[str, Any]) -> list[str]:
    """The services of whose targets the model has none among the first ten items of the union, with their numbers."""
    test = metrics.get("test") or {}
    lost = [name for name in test.get("in_service") or {} if metric_at(test, "union", name, "recall@10") == 0]
    return [f"{printable(name)} ({metric_at(test, 'union', name, 'n') or 0:,.0f})" for name in lost]


def row_label(baseline: str) -> str:
    """How a baseline is called in a table."""
    return _LABELS.get(baseline, baseline.replace("_", " "))


def metric_at(result: Mapping[str, Any], part: str, key: str, metric: str) -> float | None:
    """`result[part][key][metric]`, or None where it is missing."""
    value = ((result.get(part) or {}).get(key) or {}).get(metric)
    return value if isinstance(value, (int, float)) else None


def list_columns(test: Mapping[str, Any]) -> list[Column]:
    """Those of the table of a test result: the union first, then each service among its own items.

    MRR is that of the whole ranking in results that are older than `mrr@10`.
    """
    known = (test.get("union") or {}).get("all") or {}
    union = [metric if metric in known or metric != "mrr@10" else "mrr" for metric in UNION_METRICS]
    columns = [Column("union", "union", "all", metric) for metric in union]
    for service in test.get("in_service") or {}:
        columns += [Column(service, "in_service", service, metric) for metric in SERVICE_METRICS]
    return columns


def build_report_table(metrics: Mapping[str, Any]) -> ReportTable:
    """The table of `metrics.json`.

    Raises:
      InputError: the metrics have no test result of the union.
    """
    test = metrics.get("test") or {}
    if metric_at(test, "union", "all", "ndcg@10") is None:
        raise InputError("metrics.json: test.union.all.ndcg@10 is missing")
    columns = list_columns(test)
    baselines = metrics.get("baselines") or {}
    ranges = metrics.get("baseline_intervals") or {}
    results = [(config_name(metrics), "model", None, test, metrics.get("intervals") or {})]
    for name, row in baselines.items():
        results.append((row_label(name), "baseline", name, row, ranges.get(name) or {}))
    if metrics.get("ceiling"):
        results.append(("ceiling", "ceiling", None, metrics["ceiling"], {}))
    tests = [_test_of(metrics, column) for column in columns]
    rows = []
    for label, kind, name, row, intervals in results:
        cells = []
        for column, tested in zip(columns, tests, strict=True):
            low, high = _interval(intervals, column)
            is_best = kind != "ceiling" and bool(tested) and tested["row"] == name and tested["p_holm"] < LEVEL
            cells.append(Cell(metric_at(row, column.part, column.key, column.metric), low, high, is_best))
        rows.append(Row(label, kind, cells, name))
    return ReportTable(columns, rows, [float(tested["p_holm"]) if tested else None for tested in tests])


def _test_of(metrics: Mapping[str, Any], column: Column) -> Mapping[str, Any]:
    """That of the best row of a column; empty where there is none."""
    of_part = (metrics.get("best") or {}).get(column.part) or {}
    return (of_part.get(column.key) or {}).get(column.metric) or {}


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


def format_p(p_value: float) -> str:
    """`.0321`, or `< .0001`."""
    return format_value(p_value) if p_value >= 0.00005 else "< .0001"


class PairedCell(NamedTuple):
    """The model less a baseline in NDCG@10, as text: the difference, its interval, and its p-value by Holm's method;
    empty where a run does not tell.
    """

    difference: str
    interval: str
    p: str


def list_paired(metrics: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[PairedCell]]]]:
    """The parts (the union, then each service), and (baseline, a cell for each part); p-values corrected for all."""
    services = list((metrics.get("test") or {}).get("in_service") or {})
    rows = []
    for name, found in (metrics.get("paired") or {}).items():
        by_service = found.get("in_service") or {}
        rows.append((row_label(name), [found, *(by_service.get(service) or {} for service in services)]))
    entries = [entry for _, cells in rows for entry in cells]
    tested = [entry["p_value"] for entry in entries if "p_value" in entry]
    corrected = iter(correct_holm(tested))
    table = []
    for label, cells in rows:
        table.append((label, [_tell_paired(cell, next(corrected) if "p_value" in cell else None) for cell in cells]))
    return ["union", *services], table


def _tell_paired(found: Mapping[str, Any], p_holm: float | None) -> PairedCell:
    difference, interval = found.get("difference"), found.get("interval")
    return PairedCell(
        "–" if difference is None else _sign(difference),
        f"{_sign(interval[0])} to {_sign(interval[1])}" if interval else "",
        "" if p_holm is None else format_p(p_holm),
    )


def _sign(value: float) -> str:
    """`+.0123`, with a proper minus."""
    return f"{value:+.4f}".replace("0.", ".", 1).replace("-", "−")


def format_table(metrics: Mapping[str, Any]) -> str:
    """The table as text, at most 100 columns wide: services that do not fit side by side follow below.

    Metrics are at 10 over full rankings; a service's columns rank its own items only. `*` marks the best row of a
    column (the ceiling aside) where it is better than the next best by more than chance gives. The first row is the
    model, and the last one the p-value of each column.
    """
    table = build_report_table(metrics)
    labels = [printable(label) for label in (P_LABEL, *(row.label for row in table.rows))]
    label_width = min(max(map(len, labels)), 28)
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
    lines += _caption(metrics, table)
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
        cells = [(row.cells[c].value, row.cells[c].best) for c in block]
        lines.append(_format_row(row.label, cells, label_width))
    if table.n_tested:
        lines.append(_format_row(P_LABEL, [(table.p_values[c], False) for c in block], label_width))
    return lines


def _format_row(label: str, cells: Sequence[tuple[float | None, bool]], label_width: int) -> str:
    text = "".join(format_value(value).rjust(_CELL - 1) + (" ", "*")[is_best] for value, is_best in cells)
    return (_shorten(label, label_width).ljust(label_width) + text).rstrip()


def _caption(metrics: Mapping[str, Any], table: ReportTable) -> list[str]:
    n = metric_at(metrics["test"], "union", "all", "n")
    parts = [] if n is None else [f"{n:,.0f} targets"]
    parts += [seen_rule(metrics)] if seen_rule(metrics) else []
    parts += ["MRR is not cut off"] if table.columns[2].metric == "mrr" else []
    lines = ["; ".join(parts)] if parts else []
    if lost := list_lost(metrics):
        lines.append(f"among all services' items no target of {', '.join(lost)} is among the first ten")
    if table.n_tested:
        level = f"{LEVEL:g}".removeprefix("0")
        best = "best row except the oracle" if metrics.get("ceiling") else "best row"
        lines.append(f"p: {best} against the next best, paired over targets only (one seed); * p < {level}")
        lines += [f"   after Holm's correction for {table.n_tested} columns"] if table.n_tested > 1 else []
    elif table.is_untested:
        lines.append("no row is marked: this run is older than the tests of the best row")
    share = gap_closed(metrics)
    if share is not None:
        lines.append(f"{100 * share:.0f} % of the gap from popularity to the ceiling is closed (union NDCG@10)")
    return lines


def _shorten(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"
