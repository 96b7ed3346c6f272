"""What the report shows of parts that were forced or taken away: tables of the probes, as rows of cells."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class ProbeTable(NamedTuple):
    """Attributes: a caption, the columns' titles, and (title, cells) of each row."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


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


def _cells(row: Sequence[float | None], form: str = ".3f") -> list[str]:
    return ["" if value is None else format(value, form) for value in row]


def _lost(cell: Mapping[str, float]) -> list[str]:
    return [f"{cell['log_p']:+.3f}", f"{cell['ndcg@10']:+.4f}", f"{cell['in_service_ndcg@10']:+.4f}"]
