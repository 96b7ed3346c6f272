"""Measures full ranking on made-up catalogues, on an otherwise idle machine: users a second, and memory.

python -m experiments.bench_ranking --config=configs/amazon6_half.py [--items=42382,200000,1000000]
    [--models=dense,mixture,asked] [--json]

The config gives the model's shape. The target: at most 1 GiB of temporaries at a million items.
"""

from moerec.config import cli
from moerec.errors import InputError


def main(config, flags):
    """Prints a line for each size and model."""
    from moerec.eval.bench.ranking import measure_ranking

    if not all(size.isdecimal() for size in flags.items) or not flags.items:
        raise InputError(f"--items: {','.join(flags.items)!r} are not numbers of items, such as 1000,10000")
    rows = []
    for row in measure_ranking(config, [int(size) for size in flags.items], flags.models):
        rows.append(row)
        memory = f"{row['temporary_gib']:6.3f} GiB of temporaries ({row['bind_gib']:.3f} of the items' vectors)"
        speed = f"{row['n_items']:9,} items, {row['model']:8s} {row['users_per_s']:9.1f} users/s"
        print(f"{speed} {memory} {row['peak_gib']:6.2f} GiB at the peak", flush=True)
    return {"rows": rows}


if __name__ == "__main__":
    models = (["dense", "mixture", "asked"], "a softmax alone, with the config's pointers, with every service asked")
    items = {"items": (["42382", "200000", "1000000"], "items of the catalogues"), "models": models}
    cli.run(main, "configs/amazon6_half.py", items, workdir=False)
