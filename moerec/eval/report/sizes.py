"""How large the model and its rivals are, what they were set to, and how the model's parameters are shared out."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moerec.eval.report.table import config_name, row_label
from moerec.train.metric_writer import format_count, format_duration

_PARTS = {
    "item_encoder": "items as inputs (rows, texts)",
    "slot_encoder": "services, actions, times, context",
    "token_encoder": "words as inputs",
    "groups": "decoder layers",
    "analyser": "analyser",
    "hypothesis_ZD": "vectors of the services asked",
    "profile": "profile memory",
    "profile_router": "profile router",
    "head": "item head (biases, pointers, gates)",
    "text_head": "text head",
}
_NORMS = ("input_norm", "final_norm")


Fact = tuple[str, Any, Callable[[Any], str]]


def list_facts(metrics: Mapping[str, Any], *facts: Fact) -> list[tuple[str, str]]:
    """(label, value) of what the run was, with these facts of its data; what is not known is left out."""
    valid = metrics.get("valid") or {}
    formats: tuple[Fact, ...] = (
        ("steps", metrics.get("steps"), "{:,.0f}".format),
        ("wall time", metrics.get("wall_s"), format_duration),
        ("slots per second", metrics.get("tokens_per_s") or None, format_count),
        ("parameters", metrics.get("n_params"), format_count),
        *facts,
        ("best step", valid.get("step"), "{:,.0f}".format),
        ("seed", metrics.get("seed"), str),
    )
    return [(label, form(value)) for label, value, form in formats if value is not None]


class SizeRow(NamedTuple):
    """Attributes: cells of text, empty where a run does not tell."""

    name: str
    params: str
    stored: str
    steps: str
    time: str
    settings: str


def list_sizes(metrics: Mapping[str, Any]) -> list[SizeRow]:
    """The model first, then each baseline."""
    active, total = metrics.get("n_active_params"), metrics.get("n_params")
    params = _count(total) + (f" ({_count(active)} active)" if active is not None and active != total else "")
    rows = [SizeRow(config_name(metrics), params, "", _count(metrics.get("steps")), _time(metrics.get("wall_s")), "")]
    sizes, settings = metrics.get("baseline_sizes") or {}, metrics.get("baseline_settings") or {}
    for name in metrics.get("baselines") or {}:
        size = sizes.get(name) or {}
        stored = size.get("n_stored")
        params = _count(size.get("n_params")) or ("none" if stored is not None else "")
        told = ", ".join(f"{field} {_tell(value)}" for field, value in (settings.get(name) or {}).items())
        rows.append(
            SizeRow(
                row_label(name), params, _count(stored), _count(size.get("steps")), _time(size.get("seconds")), told
            )
        )
    return rows


def list_parts(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(part of the model, its parameters, its share), the largest first."""
    parts = dict(metrics.get("n_params_by_part") or {})
    norms = sum(parts.pop(name, 0) for name in _NORMS)
    named = {_PARTS.get(name, name.replace("_", " ")): n for name, n in parts.items()}
    named |= {"norms": norms} if norms else {}
    total = sum(named.values()) or 1
    return [(name, f"{n:,}", f"{100 * n / total:.1f} %") for name, n in sorted(named.items(), key=lambda x: -x[1])]


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 0.1:
        return "< 0.1s"
    return f"{seconds:.1f}s" if seconds < 10 else format_duration(seconds)


def _tell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
