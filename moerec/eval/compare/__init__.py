"""Several runs in one table: two configurations paired by seed, or the means of one configuration over its seeds."""

from moerec.eval.compare.pairs import (
    METRIC,
    Comparison,
    Difference,
    InterventionTable,
    compare,
    compare_interventions,
    correct_rows,
    format_rows,
    read_run,
    render,
    render_interventions,
)

__all__ = [
    "METRIC",
    "Comparison",
    "Difference",
    "InterventionTable",
    "compare",
    "compare_interventions",
    "correct_rows",
    "format_rows",
    "read_run",
    "render",
    "render_interventions",
]
