"""Compares two configurations over several seeds: the differences of their runs, paired by seed, with Student's t.

python -m experiments.compare --first=runs/moe_1,runs/moe_2,runs/moe_3 --second=runs/dense_1,runs/dense_2,runs/dense_3

One run on each side: they are paired by target. Without `--second`: what the answers of the one configuration lose by
each intervention of `eval.interventions`.
"""

from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError
from moerec.eval.compare import (
    Comparison,
    InterventionTable,
    compare,
    compare_interventions,
    render,
    render_interventions,
)
from moerec.eval.ranking.per_target import TargetComparison, compare_targets, render_target_table

EMPTY: list[str] = []
FLAGS = {
    "first": (EMPTY, "run directories of one configuration"),
    "second": (EMPTY, "those of the other; none: the interventions that the first ones measured"),
}


def main(config, flags):
    """Prints the table."""
    if not flags.first:
        raise InputError(f"--first is missing: {FLAGS['first'][1]}, separated by commas")
    first, second = ([Path(folder) for folder in folders] for folders in (flags.first, flags.second))
    result: InterventionTable | TargetComparison | Comparison
    if not second:
        result = compare_interventions(first)
        print(render_interventions(result))
    elif len(first) == len(second) == 1:
        result = compare_targets(first[0], second[0])
        print(render_target_table(result))
    else:
        result = compare(first, second)
        print(render(result))
    return {**result._asdict(), "rows": [row._asdict() for row in result.rows]}


if __name__ == "__main__":
    cli.run(main, None, FLAGS, config_type=None, workdir=False)
