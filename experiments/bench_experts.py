"""Measures the training step by the number of experts at equal active parameters, on an otherwise idle machine.

python -m experiments.bench_experts --config=configs/city_moe.py [--sizes=8,16,32,64] [--json]
"""

import tempfile
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(config, flags):
    """Prints a line for each size."""
    from moerec.eval.bench.step import measure_experts

    if not all(size.isdecimal() for size in flags.sizes) or not flags.sizes:
        raise InputError(f"--sizes: {','.join(flags.sizes)!r} are not numbers of experts, such as 8,16")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_experts(config, Path(flags.workdir or folder), [int(size) for size in flags.sizes])
    for row in rows:
        active = f"{row['n_active_params']:,} active parameters"
        print(f"{row['n_experts']:4d} experts, {active}: {row['step_ms']:10.2f} ms  {row['ratio']:7.3f} of the first")
    return {"rows": rows}


if __name__ == "__main__":
    sizes = {"sizes": (["8", "16", "32", "64"], "experts of a layer, multiples of the number of groups")}
    cli.run(main, "configs/city_moe.py", sizes, workdir=False)
