"""The rows of an audit and how they are shown."""

import dataclasses

from moerec.config.terminal import printable
from moerec.eval.audit.chance import is_too_few

_ROUNDING = 1e-9  # of a value that equals its threshold


@dataclasses.dataclass(frozen=True)
class AuditRow:
    """One measured value.

    Attributes:
      name: the check.
      service: its service, or "all".
      value: the measured share; None where there is nothing to measure it by.
      threshold: the largest value that passes; None where the value is only reported, or could not exceed it.
      exceeded: whether the value is above it.
      explanation: one line.
      too_few: whether no value could exceed the threshold, so that the check cannot tell.
    """

    name: str
    service: str
    value: float | None
    threshold: float | None
    exceeded: bool
    explanation: str
    too_few: bool = False

    @property
    def verdict(self) -> str:
        if self.too_few:
            return "too few"
        return "" if self.threshold is None else "FAIL" if self.exceeded else "ok"


def make_row(
    name: str,
    service: str,
    value: float | None,
    limit: float,
    explanation: str,
    *,
    n: int | None = None,
    chance: float = 0.0,
    most: float = 1.0,
) -> AuditRow:
    """A row judged by its limit; a limit of 1 only reports.

    Args:
      n: the events that a share is of; so few that all may have the defect without a surprise cannot tell.
      chance: what the value must exceed as well: the largest one that chance gives. most: the largest possible one.
    """
    if limit >= 1:
        return AuditRow(name, service, None if value is None else float(value), None, False, explanation)
    threshold = max(float(limit), float(chance))
    if value is None or threshold >= most - _ROUNDING or (n is not None and is_too_few(n, limit)):
        shown = None if value is None else float(value)
        return AuditRow(name, service, shown, None, False, explanation, too_few=True)
    return AuditRow(name, service, float(value), threshold, bool(value > threshold + _ROUNDING), explanation)


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """All rows of one audit."""

    rows: tuple[AuditRow, ...]

    @property
    def exit_code(self) -> int:
        """1 if any threshold is exceeded, else 0."""
        return int(any(row.exceeded for row in self.rows))

    def to_dict(self) -> dict:
        """`{"exit_code": …, "rows": [{name, service, value, threshold, exceeded, explanation, too_few}]}`."""
        return {"exit_code": self.exit_code, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def to_text(self) -> str:
        """A table with one line a row, exceeded thresholds marked, and a last line that counts them."""
        cells = [("check", "service", "value", "limit", "", "")] + [
            (
                row.name,
                printable(row.service),
                "-" if row.value is None else f"{row.value:.4f}",
                "-" if row.threshold is None else f"{row.threshold:.4g}",
                row.verdict,
                printable(row.explanation),
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
        unsure = sum(row.too_few for row in self.rows)
        told = f"; {unsure} cannot tell, with too few events" if unsure else ""
        return "\n".join([*lines, f"{failed} of {len(self.rows)} checks exceed their limit{told}"])
