"""Renders the report of a run anew.

python -m experiments.report --workdir=runs/demo
"""

from pathlib import Path

from moerec.config import cli
from moerec.eval.report import write_report


def main(config, flags):
    """Writes `report.html` in `--workdir` and prints its path."""
    path = write_report(Path(flags.workdir))
    print(path)
    return {"report": str(path)}


if __name__ == "__main__":
    cli.run(main, config_type=None)
