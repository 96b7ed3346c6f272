"""`report.html`: one page that opens offline, without scripts, from what a run directory holds."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moerec.config.terminal import printable
from moerec.eval.report.charts import draw_bars, draw_curves, draw_shares
from moerec.eval.report.probes import describe_asking, describe_components, describe_example
from moerec.eval.report.result import blamed_on, read_result
from moerec.eval.report.table import (
    P_LABEL,
    build_report_table,
    config_name,
    format_value,
    gap_closed,
    metric_at,
    row_label,
    seen_rule,
)
from moerec.eval.significance import LEVEL
from moerec.files import read_json, write_text
from moerec.train.metric_writer import format_count, format_duration, read_metric_lines

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
      InputError: `metrics.json` is missing or lacks the test result; one of the files is damaged.
    """
    workdir = Path(workdir)
    metrics = read_result(workdir / "metrics.json")
    lines = read_metric_lines(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").is_file() else []
    config = read_json(workdir / "config.json") if (workdir / "config.json").is_file() else metrics.get("config")
    with blamed_on(workdir / "metrics.json"):
        page = _render(metrics, lines, config if isinstance(config, Mapping) else {})
    path = workdir / "report.html"
    write_text(path, printable(page, keep="\n\t"))
    return path


def _render(metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError  # only reports need it

    environment = Environment(
        loader=PackageLoader("moerec.eval.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["metric"] = format_value
    content = {
        "name": config_name(metrics),
        "summary": _summarise(metrics),
        "facts": _list_facts(metrics),
        "seen_rule": seen_rule(metrics),
        "share": gap_closed(metrics),
        "table": build_report_table(metrics),
        "p_label": P_LABEL,
        "level": f"{LEVEL:g}".removeprefix("0"),
        "curves": _draw_training(metrics, lines),
        "best_step": (metrics.get("valid") or {}).get("step"),
        "slices": _draw_slices(metrics.get("slices") or {}),
        "mixture": _draw_mixture(metrics),
        "components": describe_components(metrics),
        "asking": describe_asking(metrics),
        "example": describe_example(metrics),
        "routing": _describe_routing(metrics),
        "first_events": _describe_first_events(metrics),
        "interventions": _list_interventions(metrics),
        "transfer": _list_transfer(metrics),
        "aspects": _probe(metrics, "profile_aspects"),
        "slice_ranking": _slice_ranking(metrics),
        "full": _list_all_metrics(metrics),
        "config": _list_config(config),
    }
    try:
        return environment.get_template("page.html").render(content)
    except UndefinedError as error:
        raise KeyError(str(error)) from error


def _summarise(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The first sentence: the model's union NDCG@10, the best baseline's, and the p-value of the two."""
    rows = build_report_table(metrics).rows
    baselines = [row for row in rows if row.kind == "baseline" and row.cells[0].value is not None]
    best = max(baselines, key=lambda row: row.cells[0].value or 0.0, default=None)
    if best is None:
        return {"model": rows[0].cells[0], "best": None}
    p_value = ((metrics.get("paired") or {}).get(best.name) or {}).get("p_value")
    return {"model": rows[0].cells[0], "best": best.label, "best_value": best.cells[0].value, "p_value": p_value}


def _list_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of what the run was; what `metrics.json` does not tell is left out."""
    data = metrics.get("dataset") or {}
    formats = (
        ("steps", metrics.get("steps"), "{:,.0f}".format),
        ("wall time", metrics.get("wall_s"), format_duration),
        ("slots per second", metrics.get("tokens_per_s"), format_count),
        ("parameters", metrics.get("n_params"), format_count),
        ("users", data.get("n_users"), "{:,.0f}".format),
        ("events", data.get("n_events"), "{:,.0f}".format),
        ("items", data.get("n_items"), "{:,.0f}".format),
        ("best step", (metrics.get("valid") or {}).get("step"), "{:,.0f}".format),
        ("seed", metrics.get("seed"), str),
    )
    return [(label, form(value)) for label, value, form in formats if value is not None]


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
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return [(step, value) for step, value in found if math.isfinite(value)]


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


def _describe_routing(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The load as a picture, and the analyser's figures; None in a dense run."""
    routing = metrics.get("routing")
    if not routing or "load" not in routing:
        return None
    services = metrics["dataset"]["services"]
    n_experts, has_cross = len(routing["load"][0]), _has_cross(metrics)
    groups = [*services, *(["cross-domain"] if has_cross else [])]
    n_per_group = n_experts // len(groups)
    columns = [group for group in groups for _ in range(n_per_group)]
    labels = (
        ("macro-F1", "macro_f1"),
        ("macro-F1 of the exact posterior", "exact_macro_f1"),
        ("calibration error", "ece"),
        ("temperature", "temperature"),
    )
    found = [(label, routing["analyser"].get(name)) for label, name in labels]
    title = "Load by service and expert"
    return {
        "load": draw_shares(dict(zip(services, routing["load"], strict=True)), columns, title),
        "analyser": [(label, format_value(value)) for label, value in found if value is not None],
        "dropped": routing["dropped"],
        "max_over_mean": format_value(routing["max_over_mean"]),
    }


def _has_cross(metrics: Mapping[str, Any]) -> bool:
    """Whether there is a group across services; runs before `model.moe.cross` have one."""
    model = (metrics.get("config") or {}).get("model") or {}
    return bool((model.get("moe") or {}).get("cross", True))


def _probe(metrics: Mapping[str, Any], name: str) -> Any:
    """One entry of `probes`; empty where it was not evaluated."""
    return (metrics.get("probes") or {}).get(name) or {}


def _list_interventions(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what was taken away, union NDCG@10 then, what is lost, p-value) of each intervention (`eval.interventions`)."""
    return [
        (f"{part}: {intervention}", format_value(e["ndcg@10"]), f"{e['difference']:+.4f}", f"{e['p_value']:.4f}")
        for part, interventions in _probe(metrics, "interventions").items()
        for intervention, e in interventions.items()
    ]


def _describe_first_events(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Recall@10 of the model and of popularity by service and hour; None where the split is not by user."""
    found = _probe(metrics, "first_events")
    if not found:
        return None
    titles = {"model": config_name(metrics), "popularity_by_hour": row_label("popularity_by_hour")}
    services = list(found["model"]["in_service"])
    rows = []
    for name, title in titles.items():
        cells = [found[name]["union"]["all"], *(found[name]["in_service"][service] for service in services)]
        rows.append((title, [format_value(cell["recall@10"]) for cell in cells]))
    return {
        "columns": ["union", *services],
        "rows": rows,
        "difference": f"{found['difference']:+.4f}",
        "p": f"{found['p_value']:.4f}",
    }


def _list_transfer(metrics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Of each service: targets, NDCG@10 by whose history is known, popularity's, and the gain with its p-value."""
    parts = ("all", "own", "others", "popularity")
    return [
        (
            service,
            [
                f"{row['n']:,}",
                *(format_value(row[part][_SLICE_METRIC]) for part in parts),
                f"{row['gain']['difference']:+.4f}",
                f"{row['gain']['p_value']:.4f}",
            ],
        )
        for service, row in _probe(metrics, "transfer").items()
    ]


def _draw_mixture(metrics: Mapping[str, Any]) -> str | None:
    """The mean mixture weights; None where the softmax is the only component."""
    rows = _probe(metrics, "mixture_weights")
    if not rows:
        return None
    known = {service: row for service, row in zip(metrics["dataset"]["services"], rows, strict=True) if row is not None}
    # A run of an earlier version does not say what was mixed.
    names = _probe(metrics, "mixture_components") or [f"component {n}" for n in range(len(next(iter(known.values()))))]
    return draw_shares(known, names, "Mixture weights")


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
