"""Measures the training step of a language model against `transformers` (the extra hf), on an otherwise idle machine.

python -m experiments.bench_language --config=configs/language.py [--steps=150] [--seeds=1,2,3] [--workdir=DIR]
    [--experts=eager,batched_mm,grouped_mm] [--json]

Both begin with the same weights and take the same batches in turn. With `--experts` a Qwen2-MoE takes the place of the
config's dense model: 16 experts of which two are active and a shared one, by these ways of `transformers` to run them.
"""

import tempfile
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(config, flags):
    """Prints a line for each seed and way."""
    from moerec.eval.bench import language as bench

    bench.require_transformers()
    bench.require_comparable(config, bool(flags.experts))
    unknown = [name for name in flags.experts if name not in bench.EXPERTS]
    if unknown:
        raise InputError(f"--experts: {unknown[0]!r} is none of {', '.join(bench.EXPERTS)}")
    if not flags.seeds or not all(seed.isdecimal() for seed in flags.seeds):
        raise InputError(f"--seeds: {','.join(flags.seeds)!r} are not numbers, such as 1,2,3")
    if flags.steps < 3:
        raise InputError("--steps: at least 3 are needed")
    with tempfile.TemporaryDirectory() as folder:
        workdir, seeds = Path(flags.workdir or folder), [int(seed) for seed in flags.seeds]
        chosen = (bench.with_experts(config), flags.experts) if flags.experts else (config,)
        found = bench.measure_language(chosen[0], workdir, flags.steps, seeds, *chosen[1:])
    for row in found["rows"]:
        line = f"seed {row['seed']} {row['experts'] or 'dense':10s} {row['tokens_per_s']:8,.0f} tokens/s"
        line += f", transformers {row['torch_tokens_per_s']:8,.0f}, ratio {row['ratio']:5.2f}; nats a token held out"
        line += f" {row['held_out']:.4f} and {row['torch_held_out']:.4f}"
        print(f"{line}, at the last steps {row['last_loss']:.4f} and {row['torch_last_loss']:.4f}")
    print(", ".join(f"{name} {value}" for name, value in found["torch"].items()))
    return found


FLAGS = {
    "steps": (150, "training steps of each"),
    "seeds": (["1"], "of initial weights and batches"),
    "experts": ([], "ways of transformers to run experts; without one the config's dense model is measured"),
}

if __name__ == "__main__":
    cli.run(main, "configs/language.py", FLAGS, workdir=False)
