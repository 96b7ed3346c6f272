"""Measures the training step with every service asked against the same model without, on an otherwise idle machine.

python -m experiments.bench_asking --config=configs/amazon6_half.py [--json]
"""

import tempfile
from pathlib import Path

from moerec.config import cli


def main(config, flags):
    """Prints a line for each of the two."""
    from moerec.eval.bench.step import measure_asking

    with tempfile.TemporaryDirectory() as folder:
        rows = measure_asking(config, Path(flags.workdir or folder))
    for row in rows:
        name = f"asked from layer {row['asked_from']}" if row["asked_from"] else "not asked"
        active = f"{row['n_active_params']:,} active parameters"
        print(f"{name}, {active}: {row['step_ms']:10.2f} ms  {row['ratio']:7.3f} of the first")
    return {"rows": rows}


if __name__ == "__main__":
    cli.run(main, "configs/city_asked.py", workdir=False)
