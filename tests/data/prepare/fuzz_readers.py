"""Random and damaged tables against one property: a table is refused in one line, or each of its rows is accounted for.

    python -m tests.data.prepare.fuzz_readers [--inputs=20000] [--seed=0]

An input is a table of interactions (CSV, TSV, atomic or Parquet, plain or gzipped, whole or damaged), often with tables
of items and users. The rows and their ids are counted from the bytes by the standard library, or from the metadata of
a Parquet file, which share no code with the readers. A failing input is shrunk, and its files are left where it says.
"""

import argparse
import collections
import csv
import dataclasses
import gzip
import io
import json
import re
import shutil
import tempfile
import warnings
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.data.prepare.shards import load_dataset
from moerec.data.prepare.tables import text
from moerec.data.prepare.tables_to_shards import PrepareReport, prepare
from moerec.errors import InputError, WorkError

FORMATS = ("csv", "tsv", "atomic", "parquet")
ENDINGS = {"csv": "csv", "tsv": "tsv", "atomic": "inter", "parquet": "parquet"}
USUAL = [b"a", b"b", b"7", b"17850.0", "é".encode(), b"1e3", b"-3.5", b"x y"]
STRANGE = [
    b"", b"nan", b"\xff", b"\xc3", b"\0", b'"', b'"q"', b"'", b",", b"\t", b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf",
    b"9" * 30, b"z" * 200, b"2024-01-01T00:00", b"all", "\u2028".encode(), b"=1+1", b"-1",
]  # fmt: skip
POOLS = {  # of the cells of a column, but for few that are strange
    "user": USUAL, "item": USUAL, "time": [b"0", b"1500000000", b"1.5", b""], "mood": [b"1", b"7", b"rain", b""],
    "title": USUAL, "tags": [b"p,q", b"p q", b"p"], "price": [b"1.5", b"3", b"20"], "age": [b"30", b"40", b"young"],
}  # fmt: skip
COLUMNS = {
    "events": ("user", "item", "time", "mood"), "items": ("item", "title", "tags", "price"), "users": ("user", "age")
}  # fmt: skip
SELDOM = st.sampled_from([False] * 11 + [True])
AT_TIMES = st.sampled_from([False, False, True])
TYPES = [
    pa.string(), pa.string(), pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view(),
    pa.int64(), pa.float64(), pa.float32(), pa.bool_(), pa.null(), pa.timestamp("us"), pa.date32(), pa.duration("s"),
    pa.decimal128(38, 2), pa.list_(pa.string()), pa.struct({"x": pa.int64()}), pa.dictionary(pa.int32(), pa.string()),
]  # fmt: skip
TEXTS = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@dataclasses.dataclass(frozen=True)
class Case:
    """An input: the files by name, how they are to be read, and which of them are as they were written."""

    kind: str
    files: dict[str, bytes]
    config: TablesConfig
    schema: SchemaConfig
    block_bytes: int
    is_whole: bool


@st.composite
def cells(draw, name: str) -> list[list[bytes]]:
    """The rows of a table, usual in the main; that of items and that of users has every usual id once."""
    pools = [st.sampled_from(POOLS[column] * (200 // len(POOLS[column])) + STRANGE) for column in COLUMNS[name]]
    if name == "events":
        return draw(st.lists(st.tuples(*pools).map(list), min_size=draw(st.integers(0, 6)), max_size=16))
    rows = [[key, *draw(st.tuples(*pools[1:]))] for key in draw(st.permutations(USUAL))]
    return rows + draw(st.lists(st.tuples(*pools).map(list), max_size=1))


@st.composite
def text_tables(draw, kind: str, name: str) -> bytes:
    """A table as bytes, some of its rows with more or fewer fields than the header."""
    rows = draw(cells(name))
    for row in rows:
        if draw(SELDOM):
            row[:] = draw(st.sampled_from([[], row[:-1], [*row, b"more"]]))
    rows.insert(0, [column.encode() + (b":token" if kind == "atomic" else b"") for column in COLUMNS[name]])
    if kind != "csv":
        lines = [b"\t".join(cell.translate(None, b"\t\r\n") for cell in row) for row in rows]
    elif draw(st.booleans()):
        buffer = io.StringIO()
        csv.writer(buffer).writerows([[cell.decode("latin-1") for cell in row] for row in rows])
        return buffer.getvalue().encode("latin-1")
    else:
        lines = [b",".join(cell.translate(None, b',"\r\n') for cell in row) for row in rows]
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]))
    return draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + end.join(lines) + end * draw(st.integers(0, 3))


@st.composite
def parquet_tables(draw, name: str) -> bytes:
    """A table of texts and other types, in row groups of a few rows, of any compression."""
    columns = [list(column) for column in zip(*draw(cells(name)), strict=True)] or [[] for _ in COLUMNS[name]]
    arrays = [make_array(values, draw(st.sampled_from(TYPES if draw(SELDOM) else TEXTS))) for values in columns]
    options = {"compression": draw(st.sampled_from(["none", "snappy", "gzip", "zstd"]))}
    options |= {"row_group_size": draw(st.integers(1, 5)), "use_dictionary": draw(st.booleans())}
    options["data_page_version"] = draw(st.sampled_from(["1.0", "2.0"]))
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(zip(COLUMNS[name], arrays, strict=True))), buffer, **options)
    return buffer.getvalue()


def make_array(cells: list[bytes], kind: pa.DataType) -> pa.Array:
    """The cells as values of a type; those that have none there are null."""
    if pa.types.is_dictionary(kind):
        return make_array(cells, pa.string()).dictionary_encode()
    texts = [cell.decode("utf-8", "replace") for cell in cells]
    number = [zlib.crc32(cell) % 1000 for cell in cells]
    values: list = [None if cell == b"" else x for cell, x in zip(cells, number, strict=True)]
    if pa.types.is_floating(kind):
        special = {b"nan": float("nan"), b"-1": 1e16, b"all": float("inf"), b"-3.5": -3.5}
        values = [special.get(cell, x) for cell, x in zip(cells, values, strict=True)]
        return pa.array(values, pa.float64()).cast(kind, safe=False)
    if pa.types.is_list(kind):
        return pa.array([[x, None] if x else None for x in texts], kind)
    if pa.types.is_struct(kind):
        return pa.array([{"x": x} for x in number], kind)
    if pa.types.is_decimal(kind) or pa.types.is_boolean(kind):
        return pa.array(values, pa.int64()).cast(kind, safe=False)
    if pa.types.is_null(kind):
        return pa.nulls(len(cells))
    if kind == pa.string():  # with bytes that are no UTF-8, as other writers leave them
        sizes = np.cumsum([0, *map(len, cells)]).astype(np.int32)
        return pa.Array.from_buffers(kind, len(cells), [None, pa.py_buffer(sizes), pa.py_buffer(b"".join(cells))])
    if pa.types.is_temporal(kind) or pa.types.is_integer(kind):
        return pa.array(values, pa.int32() if pa.types.is_date(kind) else pa.int64()).cast(kind)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_binary_view(kind)
    return pa.array(cells if is_bytes else texts, kind)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """The bytes cut off, with bits flipped, or with a piece left out, doubled or moved."""
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        first = min(len(data), 0 if draw(SELDOM) else 30)  # mostly behind the header
        a, b = sorted((draw(st.integers(first, len(data))), draw(st.integers(first, len(data)))))
        how = draw(st.sampled_from(["cut", "flip", "flip", "drop", "double", "insert"]))
        if how == "cut":
            data = data[:b]
        elif how == "flip" and a < len(data):
            data = data[:a] + bytes([data[a] ^ draw(st.integers(1, 255))]) + data[a + 1 :]
        elif how == "drop":
            data = data[:a] + data[min(b, a + 40) :]
        elif how == "double":
            data = data[:b] + data[a : min(b, a + 40)] + data[b:]
        else:
            data = data[:a] + draw(st.sampled_from(STRANGE)) + data[a:]
    return data


@st.composite
def cases(draw, kind: str) -> Case:
    """Inputs whose interactions are of a format."""
    files, names, is_whole = {}, {}, True
    tables = ["events", *(name for name in ("items", "users") if draw(AT_TIMES))]
    for name in tables:
        is_text = kind != "parquet"
        data = draw(text_tables(kind, name) if is_text else parquet_tables(name))
        names[name] = f"{name}.{ENDINGS[kind]}"
        if draw(AT_TIMES):
            data, is_whole = draw(damaged(data)), False
        if is_text and draw(AT_TIMES):
            data, names[name] = gzip.compress(data, 1, mtime=0), f"{names[name]}.gz"
            if draw(SELDOM):
                data, is_whole = draw(damaged(data)), False
        files[names[name]] = data
    has_items, has_users = "items" in tables, "users" in tables
    config = TablesConfig(
        "", names.pop("events"), **names,
        on_bad_rows=draw(st.sampled_from(["quarantine", "quarantine", "error"])),
        duplicates=draw(st.sampled_from(["refuse", "keep"])), line_breaks=draw(st.sampled_from(["refuse", "keep"])),
        unknown_time=draw(st.sampled_from(["refuse", "keep", "keep"])),
    )  # fmt: skip
    has_time, has_context = draw(AT_TIMES), draw(AT_TIMES)
    schema = SchemaConfig(
        time="time" if has_time else "", time_unit=draw(st.sampled_from(["s", "ms", "day", "iso"])),
        context=("mood",) if has_context else (), categorical=("tags",) if has_items else (),
        context_edges=("mood=0,5",) if has_context and draw(AT_TIMES) else (),
        text=("title",) if has_items else (), attributes=("tags",) if has_items else (),
        item_numbers=("price=quantiles:3",) if has_items and draw(AT_TIMES) else (),
        profile=("age",) if has_users else (),
    )  # fmt: skip
    return Case(kind, files, config, schema, draw(st.sampled_from([512, 1 << 20])), is_whole)


def read_rows(case: Case, file: str, columns: tuple[str, ...]) -> list[tuple[bytes, ...] | None] | None:
    """The ids in each row of a file as a plain reading finds them, None for a row without; None if unknown."""
    data = case.files[file]
    if case.kind == "parquet":
        return [None] * pq.ParquetFile(io.BytesIO(data)).metadata.num_rows
    if file.endswith(".gz"):
        data = gzip.decompress(data)
    data = data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    if case.kind == "csv":
        if b'"' in data and not case.is_whole:
            return None  # whose quotes mean what is a matter of taste
        lines = io.StringIO(data.decode("latin-1"), newline="")
        rows = [[cell.encode("latin-1") for cell in row] for row in csv.reader(lines)]
    else:
        rows = [line.split(b"\t") for line in re.split(b"\r\n|\r|\n", data)]
    header = [field.removesuffix(b":token") for field in rows[0]]
    at = [header.index(name.encode()) for name in columns]
    return [tuple(row[k] for k in at) if len(row) == len(header) else None for row in rows[1:]]


def check(case: Case, folder: Path) -> str:
    """Raises AssertionError or whatever escapes where the property fails; says how the input ended."""
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    config = DataConfig(
        "tables", tables=dataclasses.replace(case.config, folder=str(folder)), schema=case.schema, n_shards=2
    )
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(text, "BLOCK_BYTES", case.block_bytes)
        try:
            report = prepare(config, folder / "out")
        except (InputError, WorkError) as error:
            refusal = str(error)
        else:
            refusal = ""
    if refusal:
        assert "\n" not in refusal, refusal
        assert not (folder / "out").exists()
        return "refused"
    check_rows(case, report, folder)
    return "kept all" if not report.quarantined else "quarantined some"


def check_rows(case: Case, report: PrepareReport, folder: Path):
    """Every row of the interactions is an event, every one of the items is an item, or it is in quarantine, once."""
    dataset = load_dataset(folder / "out")
    catalogue, log = dataset.catalogue, dataset.log
    assert (log.n_events, log.n_users, catalogue.n_items) == (report.n_events, report.n_users, report.n_items)
    path = folder / "out/quarantine.jsonl"
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    aside = collections.defaultdict(list)
    for line in map(json.loads, lines):
        aside[line["file"]].append(line["row"])
    assert {file: len(rows) for file, rows in aside.items()} == {
        file: sum(counts.values()) for file, counts in report.quarantined.items()
    }
    events = zip(dataset.users[log.user].tolist(), catalogue.ids[log.item].tolist(), strict=True)
    check_file(case, case.config.interactions, ("user", "item"), list(events), aside)
    if case.config.items:
        check_file(case, case.config.items, ("item",), [(name,) for name in catalogue.ids.tolist()], aside)


def check_file(case: Case, file: str, columns: tuple[str, ...], found: list[tuple], aside: dict[str, list[int]]):
    """The rows of a file are those that were found and those that were put aside."""
    rows, mine = read_rows(case, file, columns), set(aside[file])
    assert len(mine) == len(aside[file])
    if rows is None:
        return
    kept = [row for k, row in enumerate(rows, 1) if k not in mine]
    assert len(kept) == len(found), f"{file}: {len(rows)} rows, {len(found)} kept, {len(mine)} in quarantine"
    assert not mine or 1 <= min(mine) <= max(mine) <= len(rows)
    if case.kind != "parquet":
        expected = collections.Counter(tuple(x.decode() for x in row) for row in kept if row is not None)
        assert collections.Counter(found) == expected


def fuzz(kind: str, n_inputs: int, seed: int) -> collections.Counter:
    """Tries that many inputs of a format; counts how they ended. Raises at the first that fails, shrunk."""
    ended: collections.Counter = collections.Counter()
    folder = Path(tempfile.mkdtemp(prefix=f"moerec-fuzz-{kind}-"))
    print(f"{kind}: the present input is in {folder}", flush=True)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=n_inputs, deadline=None, database=None, derandomize=False, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=cases(kind))
    def run(case: Case):
        shutil.rmtree(folder)
        folder.mkdir()
        ended[check(case, folder)] += 1

    run()
    shutil.rmtree(folder)
    return ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    for kind in FORMATS:
        for how, n in sorted(fuzz(kind, -(-flags.inputs // len(FORMATS)), flags.seed).items()):
            print(f"{kind:<10}{how:<20}{n:>8,}", flush=True)
