"""`report.html`: one page that opens offline, without scripts, from what a run directory holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moerec.config.terminal import printable
from moerec.eval.report.charts import draw_bars, draw_curves
from moerec.eval.report.example import describe_example
from moerec.eval.report.heat_map import write_heat_style
from moerec.eval.report.language import describe_language, is_finite, is_language, list_language_curves
from moerec.eval.report.picture import draw_model
from moerec.eval.report.probes import (
    describe_asking,
    describe_components,
    describe_first_events,
    describe_routing,
    draw_mixture,
    get_probe,
    list_interventions,
    list_transfer,
)
from moerec.eval.report.result import blamed_on, read_any_result
from moerec.eval.report.sizes import list_facts, list_parts, list_sizes
from moerec.eval.report.table import (
    P_LABEL,
    build_report_table,
    config_name,
    format_value,
    gap_closed,
    list_paired,
    metric_at,
    row_label,
    seen_rule,
)
from moerec.eval.significance import LEVEL
from moerec.files import read_json, write_text
from moerec.train.metric_writer import read_metric_lines

_CURVES = (  # title, then the scalars of metrics.jsonl and their labels
    ("Training loss", {"loss": "loss"}),
    ("Validation, union", {"valid/union/ndcg@10": "NDCG@10", "valid/union/recall@10": "Recall@10"}),
    ("Learning rate", {"learning_rate": "learning rate"}),
    ("Analyser's cross-entropy", {"analyser": "analyser"}),
    ("Balance of the experts", {"balance": "all slots", "domain_balance": "by domain"}),
)
_SLICES = {
    "service": "By service of the target",
    "history": "By events in the history",
    "coldness": "By the target's count in training",
}
_SLICE_METRIC = "ndcg@10"


def write_report(workdir: Path | str) -> Path:
    """Renders `report.html` from `metrics.json`, `metrics.jsonl` and `config.json` of a run, and returns its path.

    Raises:
      InputError: `metrics.json` is missing or lacks the test result (of a run on text, the task `lm`); one of the files
        is damaged.
    """
    workdir = Path(workdir)
    path = workdir / "metrics.json"
    metrics = read_any_result(path)
    lines = read_metric_lines(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").is_file() else []
    config = read_json(workdir / "config.json") if (workdir / "config.json").is_file() else metrics.get("config")
    config = config if isinstance(config, Mapping) else {}
    with blamed_on(path):
        content = _gather_common(metrics, config)
        if is_language(metrics):
            page = _render("language.html", {**content, **_gather_language(metrics, lines)})
        else:
            page = _render("page.html", {**content, **_gather(metrics, lines)})
    write_text(workdir / "report.html", printable(page, keep="\n\t"))
    return workdir / "report.html"


def _render(template: str, content: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError  # only reports need it

    loader = PackageLoader("moerec.eval.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["metric"] = format_value
    try:
        return environment.get_template(template).render(content)
    except UndefinedError as error:
        raise KeyError(str(error)) from error


def _gather_common(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What every page shows."""
    return {
        "name": config_name(metrics),
        "heat_style": write_heat_style(),
        "picture": draw_model(metrics, config),
        "parts": list_parts(metrics),
        "sizes": list_sizes(metrics),
        "best_step": (metrics.get("valid") or {}).get("step"),
        "config": _list_config(config),
    }


def _gather_language(metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curves = _draw_training(metrics, lines)
    for title, points in reversed(list_language_curves(metrics, lines)):
        curves.insert(1, (title, draw_curves(points, title, (metrics.get("valid") or {}).get("step"))))
    return {**describe_language(metrics), "curves": curves}


def _gather(metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    data, paired = metrics.get("dataset") or {}, list_paired(metrics)
    counts = [(name, data.get(f"n_{name}"), "{:,.0f}".format) for name in ("users", "events", "items")]
    return {
        "summary": _summarise(metrics),
        "facts": list_facts(metrics, *counts),
        "seen_rule": seen_rule(metrics),
        "share": gap_closed(metrics),
        "table": build_report_table(metrics),
        "paired": paired if paired[1] else None,
        "p_label": P_LABEL,
        "level": f"{LEVEL:g}".removeprefix("0"),
        "curves": _draw_training(metrics, lines),
        "slices": _draw_slices(metrics.get("slices") or {}),
        "mixture": draw_mixture(metrics),
        "components": describe_components(metrics),
        "asking": describe_asking(metrics),
        "example": describe_example(metrics),
        "routing": describe_routing(metrics),
        "first_events": describe_first_events(metrics),
        "interventions": list_interventions(metrics),
        "transfer": list_transfer(metrics),
        "aspects": get_probe(metrics, "profile_aspects"),
        "slice_ranking": _slice_ranking(metrics),
        "full": _list_all_metrics(metrics),
    }


def _summarise(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The first sentence: the model's union NDCG@10, the best baseline's, and the p-value of the two."""
    rows = build_report_table(metrics).rows
    baselines = [row for row in rows if row.kind == "baseline" and row.cells[0].value is not None]
    best = max(baselines, key=lambda row: row.cells[0].value or 0.0, default=None)
    if best is None:
        return {"model": rows[0].cells[0], "best": None}
    p_value = ((metrics.get("paired") or {}).get(best.name) or {}).get("p_value")
    return {"model": rows[0].cells[0], "best": best.label, "best_value": best.cells[0].value, "p_value": p_value}


def _draw_training(metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    best_step = (metrics.get("valid") or {}).get("step")
    drawn = []
    for title, names in _CURVES:
        curves = {label: _points(lines, name) for name, label in names.items()}
        curves = {label: points for label, points in curves.items() if points}
        if curves:
            drawn.append((title, draw_curves(curves, title, best_step if "Validation" in title else None)))
    return drawn


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the finite values; a loss that was not finite leaves a gap in the file, not in the page."""
    return [(line["step"], line[name]) for line in lines if is_finite(line.get(name))]


def _slice_ranking(metrics: Mapping[str, Any]) -> str:
    """Among which items the slices rank: those by which the best step was selected."""
    config = metrics.get("config")
    selection = (config.get("eval") or {}).get("selection") if isinstance(config, Mapping) else None
    return "among the items of the target's service" if selection == "in_service" else "over the union"


def _draw_slices(slices: Mapping[str, Any]) -> list[tuple[str, str]]:
    drawn = []
    for name, labels in slices.items():
        bars = {str(label): (m[_SLICE_METRIC], m.get("n")) for label, m in labels.items() if _SLICE_METRIC in m}
        if bars:
            title = _SLICES.get(name, f"By {name}")
            drawn.append((title, draw_bars(bars, title)))
    return drawn


def _list_all_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Every metric of every row and part, for the table at the end."""
    results = [(config_name(metrics), metrics["test"])]
    results += [(row_label(name), result) for name, result in (metrics.get("baselines") or {}).items()]
    if metrics.get("ceiling"):
        results.append(("ceiling", metrics["ceiling"]))
    parts = [
        (part, key)
        for part, keys in (("union", metrics["test"].get("union")), ("in_service", metrics["test"].get("in_service")))
        for key in sorted(keys or {}, key=lambda key: key != "all")
    ]
    names = [name for name in metrics["test"]["union"]["all"] if name != "n"]
    blocks = []
    for part, key in parts:
        where = {"union": "ranked over the union", "in_service": "ranked over the service"}[part]
        targets = "all targets" if key == "all" else f"targets of {key}"
        n = metric_at(metrics["test"], part, key, "n")
        rows = [(label, [metric_at(result, part, key, name) for name in names]) for label, result in results]
        blocks.append((f"{targets}, {where}" + ("" if n is None else f" ({n:,.0f})"), rows))
    return {"names": names, "blocks": blocks}


def _list_config(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, [(field, value)]) of the resolved configuration, nested groups as `data.city`."""
    groups: dict[str, list[tuple[str, str]]] = {"config": []}

    def visit(group: str, values: Mapping[str, Any]) -> None:
        groups.setdefault(group, [])
        for field, value in values.items():
            if isinstance(value, Mapping):
                visit(f"{group}.{field}", value)
            else:
                groups[group].append((field, json.dumps(value, ensure_ascii=False)))

    visit("config", config)
    return [(group, fields) for group, fields in groups.items() if fields]
