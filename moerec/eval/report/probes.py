"""What the report shows of parts that were forced or taken away: tables of the probes, as rows of cells."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


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
        named = [(name, _cells(row)) for name, row in zip(services, rows, strict=True)]
        tables.append(ProbeTable(_FORCED[what], services, named))
        if intervals := (found.get("forced_interval") or {}).get(what):  # which runs of earlier versions have not
            above = _above_own(rows, intervals)
            tables.append(ProbeTable(f"{_FORCED[what]}, less that by its own", services, _named(services, above)))
    if removed := found["removed"]:
        named = [(name, _cells(row, "+.3f")) for name, row in removed.items()]
        tables.append(ProbeTable("What the loss grows by without a group of experts (nats)", services, named))
    named = [(name, [f"{row['log_loss']:.3f}", f"{row['ndcg@10']:.4f}"]) for name, row in found["posteriors"].items()]
    tables.append(ProbeTable("By whose p(service) weighs the answers", ["log-loss", "union NDCG@10"], named))
    return tables


def describe_components(metrics: Mapping[str, Any]) -> list[ProbeTable]:
    """The tables of `probes["components"]`."""
    found = (metrics.get("probes") or {}).get("components") or {}
    titles = ["log-likelihood lost", "union NDCG@10 lost", "in-service NDCG@10 lost"]
    named = [(name, _lost(row["all"])) for name, row in found.items()]
    tables = [ProbeTable("Without a component of the answers", titles, named)] if named else []
    for key, label in (("target", "target"), ("last_event", "last event")):
        for name, row in found.items():
            buckets = [(f"{bucket} (n {cell['n']})", _lost(cell)) for bucket, cell in row[key].items()]
            tables.append(ProbeTable(f"Without {name}, by training events of the {label}", titles, buckets))
    return tables


def describe_example(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The request of `metrics["example"]` in words, and a table of each service's answer; None without one."""
    found = metrics.get("example")
    if not found:
        return None
    tables = []
    for service, answer in found["services"].items():
        caption = f"{service}: weight {answer['weight']:.2f}; {_shares(answer['components'])}"
        if "experts" in answer:
            caption += f"; experts {_shares(answer['experts'])}"
        rows = [
            (item["text"] or item["id"], [f"{item['p']:.4f}", *_cells(list(item["components"].values()), ".4f")])
            for item in answer["items"]
        ]
        tables.append(ProbeTable(caption, ["p", *answer["components"]], rows))
    history = ", ".join(f"{x['text'] or x['id']} ({x['service']})" for x in found["history"])
    target = found["target"]
    asked = " at ".join(found[key] for key in ("user", "time") if found.get(key))  # earlier versions name none
    return {
        "request": f" (of {asked})" if asked else "",
        "history": history or "none",
        "target": f"{target['text'] or target['id']} ({target['service']})",
        "domain": _shares(found["domain"]),
        "tables": tables,
    }


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


def _shares(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {x:.2f}" for name, x in values.items())


def _cells(row: Sequence[float | None], form: str = ".3f") -> list[str]:
    return ["" if value is None else format(value, form) for value in row]


def _lost(cell: Mapping[str, float]) -> list[str]:
    return [f"{cell['log_p']:+.3f}", f"{cell['ndcg@10']:+.4f}", f"{cell['in_service_ndcg@10']:+.4f}"]
