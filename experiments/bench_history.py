"""Measures the training step by what it sees of long histories: all of them, a window, or a window and the profile;
and the recurrence that keeps the profile, alone, as an associative scan and in chunks.

python -m experiments.bench_history --config=configs/city_long.py [--slots=512,1024,2048,4096] [--json]

On an otherwise idle machine; the arms of a length take turns.
"""

import tempfile
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(config, flags):
    """Prints a line for each length and arm."""
    from moerec.eval.bench.step import measure_histories, measure_recurrences

    if not all(length.isdecimal() and int(length) > 1 for length in flags.slots) or not flags.slots:
        raise InputError(f"--slots: {','.join(flags.slots)!r} are not lengths of rows, such as 512,1024")
    with tempfile.TemporaryDirectory() as folder:
        lengths = [int(length) for length in flags.slots]
        tables = {
            "rows": measure_histories(config, Path(flags.workdir or folder), lengths),
            "recurrence": measure_recurrences(config, lengths),
        }
    for name, rows in tables.items():
        print("the recurrence alone" if name == "recurrence" else "the training step")
        for row in rows:
            told = f"{row['n_slots']:6d}  {row['arm']:20s} {row['step_ms']:9.1f} ms {row['temporary_mb']:9.1f} MB"
            ratios = f"{row['ratio']:6.3f} of the time, {row['memory_ratio']:6.3f} of the memory of the first"
            print(f"{told}  {ratios}")
    return tables


if __name__ == "__main__":
    slots = {"slots": (["512", "1024", "2048", "4096"], "lengths of a row")}
    cli.run(main, "configs/city_long.py", slots, workdir=False)
