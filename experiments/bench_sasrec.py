"""Measures the training step of SASRec against one in PyTorch (the extra hf), on an otherwise idle machine.

python -m experiments.bench_sasrec --config=configs/demo.py [--losses=one_negative,full_softmax] [--compile] [--json]

Data, width, depth, batches and optimiser are the config's. The ratio is ours to theirs, in targets a second.
"""

import tempfile
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(config, flags):
    """Prints a line for each loss."""
    from moerec.eval.bench.sasrec import LOSSES, measure_sasrec, require_torch

    require_torch()
    unknown = [name for name in flags.losses if name not in LOSSES]
    if unknown:
        raise InputError(f"--losses: {unknown[0]!r} is none of {', '.join(LOSSES)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_sasrec(config, Path(flags.workdir or folder), tuple(flags.losses), is_compiled=flags.compile)
    for row in rows:
        speeds = f"{row['targets_per_s']:10,.0f} targets/s, torch {row['torch_targets_per_s']:10,.0f}"
        work = f"{row['step_cpu_ms']:8.1f} ms of processor, torch {row['torch_step_cpu_ms']:8.1f}"
        alone = f"matmuls alone {row['matmuls_cpu_ms']:7.1f}, torch {row['torch_matmuls_cpu_ms']:7.1f}"
        print(f"{row['loss']:16s} {speeds}, ratio {row['ratio']:5.2f}; {work} ({row['cpu_ratio']:.2f}); {alone}")
    return {"rows": rows}


FLAGS = {
    "losses": (["one_negative", "sampled_softmax", "full_softmax"], "the losses to measure"),
    "compile": (False, "PyTorch compiles its model, too"),
}

if __name__ == "__main__":
    cli.run(main, "configs/demo.py", FLAGS, workdir=False)
