"""Measures the training step, the loader and the evaluation of a config, on an otherwise idle machine.

python -m experiments.bench --config=configs/demo.py [--json]
"""

import tempfile
from pathlib import Path

from moerec.config import cli


def main(config, flags):
    """Prints one figure a line."""
    from moerec.eval.bench.step import measure

    with tempfile.TemporaryDirectory() as folder:
        figures = measure(config, Path(flags.workdir or folder))
    for name, value in figures.items():
        print(f"{name:22s} {value:14,.3f}")
    return figures


if __name__ == "__main__":
    cli.run(main, default_config="configs/demo.py", workdir=False)
