"""What the report shows of parts that were forced or taken away: tables of the probes, as rows of cells."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moerec.eval.report.heat_map import draw_heat_map
from moerec.eval.report.table import config_name, format_p, format_value, row_label
from moerec.eval.significance import correct_holm


class ProbeTable(NamedTuple):
    """Attributes: a caption, the columns' titles, and (title, cells) of each row."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


MOST_COLUMNS = 4
_FORCED = {
    "both": "Loss (nats) of each service's targets under another's vector and experts",
    "experts": "Loss under another service's experts alone",
    "vector": "Loss under another service's vector alone",
}


def describe_asking(metrics: Mapping[str, Any]) -> list[ProbeTable]:
    """The tables of `probes["asking"]` and of the excess log-loss; none where nothing was asked."""
    found = (metrics.get("probes") or {}).get("asking")
    if not found:
        return []
    services = list(metrics["dataset"]["services"])
    tables = []
    if excess := metrics.get("excess_log_loss"):
        names = list(excess)
        cells = [f"{excess[name]:.3f}" for name in names]
        tables.append(ProbeTable("Log-loss above the exact posterior's (nats)", names, [("targets of", cells)]))
    for what, rows in found["forced"].items():
        named = [(name, format_cells(row)) for name, row in zip(services, rows, strict=True)]
        tables.append(ProbeTable(_FORCED[what], services, named))
        if intervals := (found.get("forced_interval") or {}).get(what):  # which runs of earlier versions have not
            above = _above_own(rows, intervals)
            tables.append(ProbeTable(f"{_FORCED[what]}, less that by its own", services, _named(services, above)))
    if removed := found["removed"]:
        named = [(name, format_cells(row, "+.3f")) for name, row in removed.items()]
        tables.append(ProbeTable("What the loss grows by without a group of experts (nats)", services, named))
    named = [(name, [f"{row['log_loss']:.3f}", f"{row['ndcg@10']:.4f}"]) for name, row in found["posteriors"].items()]
    tables.append(ProbeTable("By whose p(service) weighs the answers", ["log-loss", "union NDCG@10"], named))
    return tables


def describe_components(metrics: Mapping[str, Any]) -> list[ProbeTable]:
    """The tables of `probes["components"]`."""
    found = (metrics.get("probes") or {}).get("components") or {}
    titles = ["log-likelihood", "union NDCG", "in-service NDCG", "fell to the floor"]
    named = [(name, _lost(row["all"])) for name, row in found.items()]
    tables = [ProbeTable("Lost without a component of the answers", titles, named)] if named else []
    for key, label in (("target", "target"), ("last_event", "last event")):
        for name, row in found.items():
            buckets = [(f"{bucket} (n {cell['n']})", _lost(cell)) for bucket, cell in row[key].items()]
            tables.append(ProbeTable(f"Lost without {name}, by training events of the {label}", titles, buckets))
    return tables


def describe_routing(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
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
        "load": draw_heat_map(dict(zip(services, routing["load"], strict=True)), columns, title),
        "analyser": [(label, format_value(value)) for label, value in found if value is not None],
        "dropped": routing["dropped"],
        "n_per_group": n_per_group,
        "max_over_mean": format_value(routing["max_over_mean"]),
    }


def _has_cross(metrics: Mapping[str, Any]) -> bool:
    """Whether there is a group across services; runs before `model.moe.cross` have one."""
    model = (metrics.get("config") or {}).get("model") or {}
    return bool((model.get("moe") or {}).get("cross", True))


def get_probe(metrics: Mapping[str, Any], name: str) -> Any:
    """One entry of `probes`; empty where it was not evaluated."""
    return (metrics.get("probes") or {}).get(name) or {}


def list_interventions(metrics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What was taken away, and the union NDCG@10 then, what is lost, its p-value, and that after Holm's correction for
    all rows; of each intervention (`eval.interventions`).
    """
    found = [
        (f"{part}: {intervention}", entry)
        for part, interventions in get_probe(metrics, "interventions").items()
        for intervention, entry in interventions.items()
    ]
    corrected = correct_holm([entry["p_value"] for _, entry in found])
    return [
        (title, [format_value(e["ndcg@10"]), f"{e['difference']:+.4f}", format_p(e["p_value"]), format_p(p_holm)])
        for (title, e), p_holm in zip(found, corrected, strict=True)
    ]


def describe_first_events(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Recall@10 of the model and of popularity by service and hour; None where the split is not by user."""
    found = get_probe(metrics, "first_events")
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


def list_transfer(metrics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Of each service: targets, NDCG@10 by whose history is known, popularity's, and the gain with its p-value, and
    that after Holm's correction for all services.
    """
    parts, found = ("all", "own", "others", "popularity"), get_probe(metrics, "transfer")
    corrected = correct_holm([row["gain"]["p_value"] for row in found.values()])
    return [
        (
            service,
            [
                f"{row['n']:,}",
                *(format_value(row[part]["ndcg@10"]) for part in parts),
                f"{row['gain']['difference']:+.4f}",
                format_p(row["gain"]["p_value"]),
                format_p(p_holm),
            ],
        )
        for (service, row), p_holm in zip(found.items(), corrected, strict=True)
    ]


def draw_mixture(metrics: Mapping[str, Any]) -> str | None:
    """The mean mixture weights; None where the softmax is the only component."""
    rows = get_probe(metrics, "mixture_weights")
    if not rows:
        return None
    known = {service: row for service, row in zip(metrics["dataset"]["services"], rows, strict=True) if row is not None}
    # A run of an earlier version does not say what was mixed.
    names = get_probe(metrics, "mixture_components") or [
        f"component {n}" for n in range(len(next(iter(known.values()))))
    ]
    return draw_heat_map(known, names, "Mixture weights")


def format_forced(metrics: Mapping[str, Any]) -> str:
    """The matrix of forced experts as text: what loss other services' experts cost, with 95 % intervals.

    Nothing without experts, or of more services than stand side by side (the report has it).
    """
    found = (metrics.get("probes") or {}).get("asking") or {}
    services = list(metrics["dataset"]["services"])
    if "experts" not in found.get("forced_interval", {}) or len(services) > MOST_COLUMNS:
        return ""
    loss, interval = found["forced"]["experts"], found["forced_interval"]["experts"]
    width = max(12, *map(len, services)) + 2
    lines = ["Loss (nats) of a service's targets (columns) by another's experts (rows), less that by its own, ± 95 %:"]
    lines.append(" " * width + "".join(f"{name:>18s}" for name in services))
    for name, cells in _named(services, _above_own(loss, interval)):
        lines.append(f"{name:<{width}s}" + "".join(f"{cell:>18s}" for cell in cells))
    return "\n".join(lines)


def _named(names: Sequence[str], rows: Sequence[list[str]]) -> list[tuple[str, list[str]]]:
    return list(zip(names, rows, strict=True))


def _above_own(loss: Sequence[Sequence[float | None]], half: Sequence[Sequence[float | None]]) -> list[list[str]]:
    """Cells of what losses are above the diagonal's of their column, with 95 % intervals."""
    return [
        [
            "" if x is None or own is None or w is None else f"{round(x - own, 3) + 0.0:+.3f} ± {w:.3f}"
            for x, own, w in zip(row, [loss[z][z] for z in range(len(loss))], widths, strict=True)
        ]
        for row, widths in zip(loss, half, strict=True)
    ]


def format_shares(values: Mapping[str, float]) -> str:
    """`name .12` of each value, in a line."""
    return ", ".join(f"{name} {x:.2f}" for name, x in values.items())


def format_cells(row: Sequence[float | None], form: str = ".3f") -> list[str]:
    """Values as text; nothing where there is none."""
    return ["" if value is None else format(value, form) for value in row]


def _lost(cell: Mapping[str, float]) -> list[str]:
    """Runs of earlier versions do not tell which targets fell to the floor."""
    fell = f"{100 * cell['fell']:.0f} %" if "fell" in cell else ""
    return [f"{cell['log_p']:+.3f}", f"{cell['ndcg@10']:+.4f}", f"{cell['in_service_ndcg@10']:+.4f}", fell]
