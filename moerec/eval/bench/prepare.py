"""Time and memory of preparing a large synthetic table, in each format."""

import gzip
import multiprocessing
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.data.prepare.tables_to_shards import prepare

FORMATS = ("tsv", "tsv.gz", "parquet")


def measure_preparation(folder: Path, n_events: int) -> Iterator[dict[str, Any]]:
    """A line for each format: wall and processor seconds, and the peak memory in GiB, of preparing it."""
    for ending in FORMATS:
        path = folder / f"events.{ending}"
        _in_own_process(_generate, path, n_events)
        yield _in_own_process(_prepare, path)
        path.unlink()


def _in_own_process(function, *arguments):
    """Peak memory is a process's, and a fork would begin with ours."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _generate(path: Path, n: int) -> None:
    """n events of n/10 users and n/100 items, in the order of time, so that users are scattered over the table."""
    rng = np.random.default_rng(0)
    item = np.minimum(rng.zipf(1.2, n), n // 100)
    columns = {"user": rng.integers(0, n // 10, n), "service": np.array(["samokat", "kuper"])[item % 2], "item": item}
    columns |= {"time": 1_500_000_000 + np.arange(n), "review": np.full(n, "a text that nothing reads")}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as stream:
        stream.write(("\t".join(columns) + "\n").encode())
        options = pa_csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
        pa_csv.write_csv(pa.table(columns), stream, options)


def _prepare(path: Path) -> dict[str, Any]:
    files, schema = TablesConfig(str(path.parent), path.name), SchemaConfig(service="service", time="time")
    report = prepare(DataConfig("tables", tables=files, schema=schema), path.parent / "out")
    used = resource.getrusage(resource.RUSAGE_SELF)
    cost = {"wall_s": report.wall_s, "cpu_s": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20}
    return {"file": path.name, "events": report.n_events, "users": report.n_users, **cost}
