"""The request that the report shows: a user's last events, what came next, and the model's list for it."""

from collections.abc import Mapping, Sequence
from typing import Any

from moerec.eval.report.probes import ProbeTable, format_shares
from moerec.eval.report.table import format_value

_MANY = 4  # components that an item's columns show; of more the largest is named


def describe_example(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The request of `metrics["example"]`: its facts, history, list and each service's answer; None without one."""
    found = metrics.get("example")
    if not found:
        return None
    n_before = found.get("n_history")
    return {
        "request": _list_facts(found),
        "n_earlier": None if n_before is None else n_before - len(found["history"]),
        "history": [_tell(event) for event in found["history"]],
        "target": _tell(found["target"]),
        "place": _tell_place(found),
        "list": _list_items(found),
        "weights": _list_weights(found),
        "tables": [_describe_answer(*answer) for answer in (found.get("services") or {}).items()],
    }


def _list_facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of who asked and when; earlier versions tell less."""
    facts = [("user", found.get("user")), ("time (UTC)", _format_time(found.get("time")))]
    facts += (found.get("context") or {}).items()
    return [(label, str(value)) for label, value in facts if value]


def _format_time(time: str | None) -> str:
    return time.replace("T", " ")[:16] if time else ""


def _tell(event: Mapping[str, Any]) -> dict[str, str]:
    return {
        "time": _format_time(event.get("time")),
        "service": event["service"],
        "item": event["text"] or event["id"],
        "action": event.get("action") or "",
    }


def _tell_place(found: Mapping[str, Any]) -> str:
    """Where the true next item stands; empty in runs that do not tell."""
    target = found["target"]
    if "rank" not in target:
        return ""
    chance = f"p {target['p']:.5f}"
    if target["rank"] is None:
        return f"no candidate, since the user had it ({chance})"
    return f"place {target['rank']:,.0f} of {found['n_candidates']:,} candidates ({chance})"


def _list_items(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model's list: (place, service, item, whether it came next, p and what components gave) of each item."""
    items, target = found.get("items"), found["target"]
    if not items:
        return None
    names = list(items[0]["components"])
    shows_each = 1 < len(names) <= _MANY
    rows = []
    for place, item in enumerate(items, 1):
        parts = item["components"]
        cells = [format_value(item["p"])]
        if shows_each:
            cells += map(format_value, parts.values())
        elif len(names) > 1:
            largest = max(parts, key=parts.__getitem__)
            cells.append(f"{largest} {format_value(parts[largest])}")
        is_hit = (item["service"], item["id"]) == (target["service"], target["id"])
        rows.append((place, item["service"], item["text"] or item["id"], is_hit, cells))
    columns = ["p", *(names if shows_each else ["mostly by"] if len(names) > 1 else [])]
    return {"columns": columns, "rows": rows}


def _list_weights(found: Mapping[str, Any]) -> list[ProbeTable]:
    """What the list is made of: the posterior over services, and the weights of components and groups of experts."""
    named = (
        ("p(service) by the analyser", found.get("domain")),
        ("Weight of each component", found.get("weights")),
        ("Share of each group of experts", found.get("experts")),
    )
    return [_lay_out(caption, values) for caption, values in named if values]


def _lay_out(caption: str, values: Mapping[str, float]) -> ProbeTable:
    return ProbeTable(caption, list(values), [("", [f"{value:.3f}" for value in values.values()])])


def _describe_answer(service: str, answer: Mapping[str, Any]) -> ProbeTable:
    caption = f"{service}: weight {answer['weight']:.2f}; {format_shares(answer['components'])}"
    if "experts" in answer:
        caption += f"; experts {format_shares(answer['experts'])}"
    rows: list[tuple[str, Sequence[str]]] = [
        (item["text"] or item["id"], [format_value(item["p"]), *map(format_value, item["components"].values())])
        for item in answer["items"]
    ]
    return ProbeTable(caption, ["p", *answer["components"]], [(title, list(cells)) for title, cells in rows])
