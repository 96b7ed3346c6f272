"""Everybody's list in a file: computed in parts, so that what was done stays when the rest was not."""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moerec.config import SchemaConfig
from moerec.errors import InputError
from moerec.files import naming, read_json, replacing, write_json
from moerec.serve.recommender.batched import Contexts, ItemKey, Recommender
from moerec.serve.recommender.packed_requests import Moment

PART = 1024  # users of a part
FORMATS = (".parquet", ".csv")


class ListOptions(NamedTuple):
    """What the lists are to be. Attributes: as the arguments of `Recommender.recommend`, for all users alike."""

    k: int = 10
    time: Moment = None
    context: Contexts = None
    services: tuple[str, ...] | None = None
    exclude: tuple[ItemKey, ...] = ()


class AllLists(NamedTuple):
    """What was written. Attributes: users, and rows of the file; users whose lists were there already, and seconds and
    users a second of the others; users that were left out, since nothing is known of them.
    """

    n_users: int
    n_rows: int
    n_resumed: int
    wall_s: float
    users_per_s: float
    n_left_out: int

    def describe(self) -> str:
        """A line of text."""
        resumed = f", {self.n_resumed:,} of them done before" if self.n_resumed else ""
        left = f"; {self.n_left_out:,} without events left out" if self.n_left_out else ""
        return f"{self.n_rows:,} rows of {self.n_users:,} users{resumed}{left}; {self.users_per_s:,.0f} users/s"


def recommend_all(
    recommender: Recommender, users: Sequence[str], out: Path, options: ListOptions, label: Any = None
) -> AllLists:
    """Writes the lists of users, one row an item (`Recommendations.to_table`), in the order of the users.

    Parts are kept in `OUT.partial/` until all are there; the same call goes on from them, and one of another run, of
    other users or options begins anew. A call that is refused leaves them alone. The file is there only when it is
    whole.

    Args:
      out: a .parquet or .csv file. label: what else tells calls apart (the tables that were added), as JSON has it.

    Raises:
      InputError: another ending of `out`, or a folder there; nobody is left to answer; a part is damaged; as
        `Recommender.recommend`.
    """
    if out.suffix not in FORMATS:
        raise InputError(f"--out: {out} ends neither in {' nor in '.join(FORMATS)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out: {out} is a folder, or its folder is not there")
    known, n_left_out = _drop_unknown(recommender, users, options)
    if not known:
        raise InputError("users: nobody has an event before the request, and the run has data.first_event=false")
    recommender.check(known, **options._asdict())
    folder = out.with_name(f"{out.name}.partial")
    _open_parts(folder, _describe_call(recommender, known, options, label))
    parts = [known[lo : lo + PART] for lo in range(0, len(known), PART)]
    paths = [folder / f"part-{number:06d}.parquet" for number in range(len(parts))]
    n_resumed, n_done, started = (
        sum(len(own) for own, path in zip(parts, paths, strict=True) if path.is_file()),
        0,
        time.monotonic(),
    )
    for own, path in zip(parts, paths, strict=True):
        if path.is_file():
            continue
        _write_part(path, recommender.recommend(own, **options._asdict()).to_table())
        n_done += len(own)
        _show(n_resumed + n_done, len(known), n_done / (time.monotonic() - started))
    wall_s = time.monotonic() - started
    n_rows = _join(paths, out)
    _remove_parts(folder)
    return AllLists(len(known), n_rows, n_resumed, wall_s, n_done / wall_s if n_done else 0.0, n_left_out)


def _drop_unknown(recommender: Recommender, users: Sequence[str], options: ListOptions) -> tuple[list[str], int]:
    """The users that can be answered: all, or those with an event before the request where a model needs one."""
    if recommender.run.config.data.first_event:
        return list(users), 0
    kept = recommender.list_answerable(users, options.time)
    return kept, len(users) - len(kept)


def _describe_call(recommender: Recommender, users: list[str], options: ListOptions, label: Any) -> dict[str, Any]:
    run = recommender.run
    config = json.loads((run.folder / "config.json").read_text())
    described = {"run": config, "best_step": run.metrics.get("best_step"), "data": run.data.digest, "label": label}
    return json.loads(json.dumps({**described, "users": users, "options": options._asdict()}, default=str))


def _open_parts(folder: Path, call: dict[str, Any]) -> None:
    """The folder of this call's parts; parts of another call are removed."""
    path = folder / "call.json"
    if path.is_file() and read_json(path) == call:
        return
    if folder.exists():
        _remove_parts(folder)
    folder.mkdir()
    write_json(path, call)


def _remove_parts(folder: Path) -> None:
    """Removes a folder of parts, and nothing else; one that was removed in part is still known by what it holds."""
    strange = [path for path in folder.iterdir() if path.name != "call.json" and not path.name.startswith("part-")]
    if strange or not folder.is_dir():
        raise InputError(f"{folder}: is in the way, and holds no parts of lists")
    shutil.rmtree(folder)


def _write_part(path: Path, table: pa.Table) -> None:
    with replacing(path) as file:
        pq.write_table(table, file)


def _join(paths: list[Path], out: Path) -> int:
    """All parts in one file, a part at a time in memory; returns its rows."""
    tables: Iterator[pa.Table] = map(_read_part, paths)
    first = next(tables)
    n_rows = len(first)
    with naming(out), replacing(out) as file:
        writer: pq.ParquetWriter | pyarrow.csv.CSVWriter
        writer = (
            pq.ParquetWriter(file, first.schema)
            if out.suffix == ".parquet"
            else pyarrow.csv.CSVWriter(file, first.schema)
        )
        with writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
                n_rows += len(table)
    return n_rows


def _read_part(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        told = str(error).splitlines()[0]
        raise InputError(f"{path}: is damaged ({told}); without it the same call computes it again") from None


def _show(n_done: int, n_users: int, users_per_s: float) -> None:
    """The progress on standard error: one line that is written over where that is a terminal."""
    width, share = 24, n_done / n_users
    bar = "#" * round(width * share)
    left = (n_users - n_done) / max(users_per_s, 1e-9)
    line = f"[{bar:<{width}s}] {n_done:,}/{n_users:,} users  {users_per_s:,.0f} users/s  {left:,.0f}s left"
    is_terminal = sys.stderr.isatty()
    print(
        ("\r" if is_terminal else "") + line,
        end="" if is_terminal and n_done < n_users else "\n",
        file=sys.stderr,
        flush=True,
    )


def read_users(path: Path) -> list[str]:
    """Names of users, one a line. Raises: InputError, where the file is not there, empty, or names somebody twice."""
    if not path.is_file():
        raise InputError(f"--users: there is no file {path}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"--users: {path} is no UTF-8 text") from None
    names = [line for line in lines if line]
    if not names:
        raise InputError(f"--users: {path} names nobody")
    seen: set[str] = set()
    for number, name in enumerate(lines, 1):
        if name and name in seen:
            raise InputError(f"--users: {path}, row {number}: {name!r} is there twice")
        seen.add(name)
    return names


def read_exclusions(path: Path, services: Sequence[str], schema: SchemaConfig) -> tuple[ItemKey, ...]:
    """Items that are not to be listed: a CSV file with the columns service and item, of one service with item alone.
    They may be called as in the run's tables, too.

    Raises:
      InputError: the file is not there, or lacks a column.
    """
    if not path.is_file():
        raise InputError(f"--exclude: there is no file {path}")
    known = {"service": ("service", schema.item_service, schema.service), "item": ("item", schema.item_id, schema.item)}
    names = dict.fromkeys([name for own in known.values() for name in own if name], pa.string())
    strings = pyarrow.csv.ConvertOptions(column_types=names)
    try:
        table = pyarrow.csv.read_csv(path, convert_options=strings)
    except pa.ArrowInvalid as error:
        raise InputError(f"--exclude: {path}: {str(error).splitlines()[0]}") from None
    there = table.column_names
    found = {what: next((name for name in own if name in there), None) for what, own in known.items()}
    for what in ("item",) if len(services) == 1 else ("service", "item"):
        if found[what] is None:
            called = " or ".join(dict.fromkeys(name for name in known[what] if name))
            raise InputError(
                f"--exclude: {path}, header, column {called}: no such column; there are {', '.join(there)}"
            )
    items = table[found["item"]].to_pylist()
    own = table[found["service"]].to_pylist() if found["service"] else [services[0]] * len(items)
    return tuple(zip(own, items, strict=True))
