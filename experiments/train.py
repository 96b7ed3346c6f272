"""Trains a model and its baselines, and prints the table.

    python -m experiments.train --config=configs/demo.py --workdir=runs/demo

The same command again goes on where it was interrupted.
"""

from pathlib import Path

from moerec.config import cli


def main(config, flags):
    """Runs one config and prints its table."""
    from moerec.eval.evaluate_run import run_experiment
    from moerec.eval.language import format_language
    from moerec.eval.report import format_forced, format_table

    metrics = run_experiment(config, Path(flags.workdir))
    if config.data.source == "text":
        print(format_language(metrics))
    else:
        print(format_table(metrics))
        if matrix := format_forced(metrics):
            print(matrix)
    print(f"report: {Path(flags.workdir) / 'report.html'}", flush=True)
    return metrics


if __name__ == "__main__":
    cli.run(main)
