"""Time and memory of preparing a synthetic table: `python -m experiments.bench_prepare --events=10000000`.

Prints one JSON object for each format. The target: ten million events in under 4 GiB and 120 s on two cores.
"""

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.data.prepare import prepare


def generate(path: Path, n: int):
    """n events of n/10 people and n/100 items, in the order of time, so that people are scattered over the table."""
    rng = np.random.default_rng(0)
    item = np.minimum(rng.zipf(1.2, n), n // 100)
    columns = {"user": rng.integers(0, n // 10, n), "service": np.array(["samokat", "kuper"])[item % 2], "item": item}
    columns |= {"time": 1_500_000_000 + np.arange(n), "review": np.full(n, "a text that nothing reads")}
    if path.suffix == ".parquet":
        return pq.write_table(pa.table(columns), path)
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as stream:
        stream.write(("\t".join(columns) + "\n").encode())
        options = pa_csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
        pa_csv.write_csv(pa.table(columns), stream, options)


def measure(path: Path):
    """Prepares the table and prints what this process used for it."""
    files, schema = TablesConfig(str(path.parent), path.name), SchemaConfig(service="service", time="time")
    report = prepare(DataConfig(tables=files, schema=schema), path.parent / "out")
    used = resource.getrusage(resource.RUSAGE_SELF)
    cost = {"wall_s": report.wall_s, "cpu_s": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20}
    print(json.dumps({"file": path.name, "events": report.n_events, "people": report.n_people, **cost}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--stage", nargs=2, metavar=("STAGE", "FILE"), help="used by the program itself")
    flags = parser.parse_args()
    if flags.stage:
        path = Path(flags.stage[1])
        generate(path, flags.events) if flags.stage[0] == "generate" else measure(path)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for ending in ("tsv", "tsv.gz", "parquet"):
                for stage in ("generate", "prepare"):  # each in a process of its own: peak memory is per process
                    own = ["--events", str(flags.events), "--stage", stage, f"{folder}/events.{ending}"]
                    subprocess.run([sys.executable, "-m", "experiments.bench_prepare", *own], check=True)
