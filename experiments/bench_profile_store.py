"""Measures a profile store with states of 4 KiB: batched updates, random reads, opening. On an otherwise idle machine.

python -m experiments.bench_profile_store [--users=100000] [--json] [--workdir=DIR]

The target: 10,000 random users of 100,000 read in under a second on two cores.
"""

import tempfile
from pathlib import Path

from moerec.config import cli
from moerec.serve.profile_store.bench import measure_store


def main(_, flags):
    """Prints a line for each figure."""
    with tempfile.TemporaryDirectory(dir=flags.workdir or None) as folder:
        figures = measure_store(Path(folder) / "store", flags.users)
    print(f"{figures['users']:12,} users with states of {figures['state_bytes']:,} bytes")
    print(f"{figures['added_per_s']:12,.0f} new users a second, in batches of 10,000")
    print(f"{figures['updated_per_s']:12,.0f} users a second updated, in batches of 1,000 random ones")
    print(f"{figures['read_s']:12.3f} s to read 10,000 random users, {1000 * figures['read_one_s']:.1f} ms to read one")
    print(f"{figures['open_s']:12.3f} s to open; {figures['memory_bytes']:,.0f} bytes of memory a user")
    return figures


if __name__ == "__main__":
    cli.run(main, extra_flags={"users": (100_000, "users in the store")}, config_type=None, workdir=False)
