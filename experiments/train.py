"""Trains a model and its baselines, and prints the table.

    python -m experiments.train --config=configs/demo.py --workdir=runs/demo
    python -m experiments.train --config=configs/demo.py --workdir=runs/demo --seeds=1,2,3 [--parallel=2]

The same command again goes on where it was interrupted. With `--seeds` a run for each goes to WORKDIR_SEED, and the
table is of their means.
"""

from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError

SEEDS: list[str] = []
FLAGS = {
    "seeds": (SEEDS, "values of config.seed, separated by commas: a run in WORKDIR_SEED for each, and their means"),
    "parallel": (1, "how many runs of --seeds are trained at a time, as processes that divide the cores"),
}


def main(config, flags):
    """Runs one config and prints its table."""
    from moerec.eval.evaluate_run import run_experiment
    from moerec.eval.language import format_language
    from moerec.eval.ranking.item_texts import format_words
    from moerec.eval.report import format_forced, format_table

    if flags["seeds"].present:
        return train_all(config, flags)
    if flags["parallel"].present:
        raise InputError("--parallel: belongs to --seeds")
    metrics = run_experiment(config, Path(flags.workdir))
    if config.data.source == "text":
        print(format_language(metrics))
    else:
        print(f"seed {config.seed}: {flags.workdir}")
        print("\n".join(filter(None, (format_table(metrics), format_forced(metrics), format_words(metrics)))))
    print(f"report: {Path(flags.workdir) / 'report.html'}", flush=True)
    return metrics


def train_all(config, flags):
    """Trains with every seed and prints the means of those that are finished."""
    from moerec.eval.compare.seed_table import describe_seeds, format_seeds, read_seeds
    from moerec.eval.compare.seeds import train_seeds

    if "config.seed" in flags:
        raise InputError("--config.seed: is set by --seeds; give one of them")
    codes = train_seeds(config, Path(flags.workdir), flags.seeds, flags.parallel, cli.repeat_arguments(flags))
    result = {"folders": {str(folder): code for folder, code in codes.items()}, "exit_code": max(codes.values())}
    if finished := [folder for folder, code in codes.items() if code == 0]:
        table = read_seeds(finished)
        print(format_seeds(table), flush=True)
        result |= describe_seeds(table)
    return result


if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS)
