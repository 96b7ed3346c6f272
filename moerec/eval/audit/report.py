"""The rows of an audit and how they are shown."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AuditRow:
    """One measured value.

    Attributes:
      name: the check.
      service: its service, or "all".
      value: the measured share.
      threshold: the largest value that passes; None where the value is only reported.
      exceeded: whether the value is above it.
      explanation: one line.
    """

    name: str
    service: str
    value: float
    threshold: float | None
    exceeded: bool
    explanation: str


def make_row(name: str, service: str, value: float, limit: float, explanation: str, margin: float = 0.0) -> AuditRow:
    """A row judged by its limit; a limit of 1 only reports. `margin` is what chance may add to the limit."""
    threshold = float(limit + margin) if limit < 1 else None
    exceeded = threshold is not None and bool(value > threshold)
    return AuditRow(name, service, float(value), threshold, exceeded, explanation)


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """All rows of one audit."""

    rows: tuple[AuditRow, ...]

    @property
    def exit_code(self) -> int:
        """1 if any threshold is exceeded, else 0."""
        return int(any(row.exceeded for row in self.rows))

    def to_dict(self) -> dict:
        """`{"exit_code": …, "rows": [{name, service, value, threshold, exceeded, explanation}]}`."""
        return {"exit_code": self.exit_code, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def to_text(self) -> str:
        """A table with one line a row, exceeded thresholds marked, and a last line that counts them."""
        cells = [("check", "service", "value", "limit", "", "")] + [
            (
                row.name,
                row.service,
                f"{row.value:.4f}",
                "-" if row.threshold is None else f"{row.threshold:.4g}",
                "FAIL" if row.exceeded else "ok" if row.threshold is not None else "",
                row.explanation,
            )
            for row in self.rows
        ]
        widths = [max(len(cell[k]) for cell in cells) for k in range(5)]
        align = (str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
        lines = [
            "  ".join([*(pad(x, width) for pad, x, width in zip(align, row, widths, strict=False)), row[5]]).rstrip()
            for row in cells
        ]
        failed = sum(row.exceeded for row in self.rows)
        return "\n".join([*lines, f"{failed} of {len(self.rows)} checks exceed their limit"])
