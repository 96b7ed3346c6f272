"""What the report shows of a run on text alone: how well held-out documents are predicted, by where they come from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moerec.eval.report.sizes import list_facts

_BITS, _MOST_CURVES = "valid/lm/bits_per_byte", 6
_COLUMNS = ("documents", "tokens", "bytes", "nats a token", "perplexity", "bits per byte")


def is_language(metrics: Mapping[str, Any]) -> bool:
    """Whether the result is of a run on text alone."""
    tasks = metrics.get("tasks")
    return "test" not in metrics and isinstance(tasks, Mapping) and "lm" in tasks


def describe_language(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the page that runs with recommendations do not have.

    Raises:
      LookupError, TypeError: the result is none that runs write.
    """
    found, data = metrics["tasks"]["lm"], metrics.get("dataset") or {}
    by_corpus = found.get("by_corpus") or {}
    rows = [(name, _tell(row)) for name, row in by_corpus.items()] if len(by_corpus) > 1 else []
    return {
        "found": found if found["n_tokens"] else None,
        "facts": list_facts(
            metrics,
            ("training documents", data.get("n_train_documents"), "{:,.0f}".format),
            ("training tokens", data.get("n_train_tokens"), "{:,.0f}".format),
        ),
        "columns": _COLUMNS,
        "rows": [*rows, ("all held-out documents", _tell(found))],
    }


def list_language_curves(
    metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """(title, {label: (step, value)}) of what the training wrote: bits per byte, of each corpus too, and nats."""

    def trace(name: str) -> list[tuple[int, float]]:
        return [(line["step"], line[name]) for line in lines if is_finite(line.get(name))]

    names = metrics["tasks"]["lm"].get("by_corpus") or {}
    traces = [("Validation, bits per byte", "bits", trace(_BITS))]
    if 1 < len(names) <= _MOST_CURVES:
        traces += [(f"Bits per byte of {name}", "bits", trace(f"{_BITS}/{name}")) for name in names]
    traces.append(("Validation, nats a token", "nats", trace("valid/lm/nats")))
    return [(title, {label: points}) for title, label, points in traces if points]


def is_finite(value: Any) -> bool:
    """Whether it is a number that a curve can show."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _tell(row: Mapping[str, Any]) -> list[str]:
    n_bytes = row.get("n_bytes")
    sizes = [f"{row['n_documents']:,}", f"{row['n_tokens']:,}", "–" if n_bytes is None else f"{n_bytes:,}"]
    if not row["n_tokens"]:
        return [*sizes, "–", "–", "–"]
    return [*sizes, f"{row['nats_per_token']:.4f}", f"{row['perplexity']:,.2f}", f"{row['bits_per_byte']:.4f}"]
