"""Compares two configurations over several seeds: the differences of their runs, paired by seed, with Student's t.

python -m experiments.compare --first=runs/moe_1,runs/moe_2,runs/moe_3 --second=runs/dense_1,runs/dense_2,runs/dense_3
"""

from pathlib import Path

from moerec import cli
from moerec.compare import compare, render
from moerec.errors import InputError

EMPTY: list[str] = []
FLAGS = {"first": (EMPTY, "run directories of one configuration"), "second": (EMPTY, "those of the other")}


def main(config, flags):
    """Prints the table."""
    for name in FLAGS:
        if not getattr(flags, name):
            raise InputError(f"--{name} is missing: {FLAGS[name][1]}, separated by commas")
    result = compare([Path(f) for f in flags.first], [Path(f) for f in flags.second])
    print(render(result))
    return {**result._asdict(), "rows": [row._asdict() for row in result.rows]}


if __name__ == "__main__":
    cli.run(main, None, FLAGS, config_type=None, workdir=False)
