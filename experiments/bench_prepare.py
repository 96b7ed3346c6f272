"""Measures the preparation of a synthetic table in each format, on an otherwise idle machine.

python -m experiments.bench_prepare [--events=10000000] [--json]

The target: ten million events in under 4 GiB and 120 s on two cores.
"""

import tempfile
from pathlib import Path

from moerec.config import cli
from moerec.eval.bench.prepare import measure_preparation


def main(_, flags):
    """Prints a line for each format."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure_preparation(Path(flags.workdir or folder), flags.events):
            rows.append(row)
            cost = f"{row['wall_s']:8.1f} s {row['cpu_s']:8.1f} s of CPU {row['peak_gib']:6.2f} GiB"
            print(f"{row['file']:16s} {row['events']:12,} events {cost}", flush=True)
    return {"rows": rows}


if __name__ == "__main__":
    cli.run(main, extra_flags={"events": (10_000_000, "events of the table")}, config_type=None, workdir=False)
