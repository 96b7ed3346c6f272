"""Tables to a prepared folder, streaming: batch by batch into codes, the codes onto disk by blocks of users, block by
block into shards.

Peak memory: one batch of the columns in use, about 150 bytes for each different user and item, the texts of the item
table, the profiles, and one block of `spill.USERS_PER_BLOCK` users' events while it is sorted.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from moerec.config import DataConfig
from moerec.config.terminal import printable
from moerec.data.dataset import TOTAL, UNKNOWN_TIME
from moerec.data.prepare import row_validation as defects
from moerec.data.prepare import shards, spill
from moerec.data.prepare.binning import AmountScan, find_ranges, is_flag, name_ranges
from moerec.data.prepare.far_times import (
    TimeCounts,
    add_counts,
    count_times,
    describe_far_times,
    describe_times,
    find_far_times,
)
from moerec.data.prepare.row_validation import DefectLog, RowCheck
from moerec.data.prepare.side_tables import (
    Strangers,
    describe_coverage,
    read_items,
    read_profile_columns,
    refuse_disjoint,
)
from moerec.data.prepare.tables import RowBatch, SourceTable, read_batches
from moerec.data.prepare.times import TimeColumn
from moerec.data.prepare.vocab import (
    CONTEXT_REMEDY,
    MAX_CODE,
    IdVocab,
    ItemCodes,
    Tables,
    item_service,
    open_tables,
    read_columns,
    refuse_amounts,
)
from moerec.errors import InputError

QUARANTINE = "quarantine.jsonl"
SPILL = "spill"


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """Counts of what was written, and whether it replaced another prepared folder.

    `quarantined` maps file and reason to a number of rows; `coverage` maps the file of the users or items to their
    number and how many of them have a row, or an event; `times` and `notes` are lines of text.
    """

    folder: str
    n_users: int
    n_items: int
    n_events: int
    services: dict[str, dict[str, int]]  # name -> users, items, events
    quarantined: dict[str, dict[str, int]]
    coverage: dict[str, dict[str, int]]
    wall_s: float
    replaced: bool
    times: str = ""
    notes: tuple[str, ...] = ()


class InteractionCoder:
    """Checks the interaction rows and turns the good ones into coded events (`spill.event_dtype`)."""

    def __init__(self, table: SourceTable, config: DataConfig, items: ItemCodes | None, log: DefectLog):
        self.table, self.schema, self.files, self.log = table, config.schema, config.tables, log
        schema = self.schema
        self.closed = items is not None
        self.items = items or ItemCodes()
        self.users = IdVocab()
        self.actions = IdVocab()
        self.time = TimeColumn(schema.time, schema.time_unit)
        self.edges = schema.edges
        self.context = {column: _open_codes(self.edges.get(column)) for column in schema.context}
        self.dtype = spill.event_dtype(len(schema.context))
        text = (schema.user, schema.item, schema.service, schema.action, *schema.context)
        self.text_columns = [column for column in dict.fromkeys(text) if column]
        self.strangers = {column: Strangers() for column in (schema.service, schema.item)}
        self.columns = list(dict.fromkeys([*self.text_columns, *([schema.time] if schema.time else [])]))

    def encode(self, batch: RowBatch) -> np.ndarray:
        """`[good rows]` coded events, in the order of the rows."""
        schema = self.schema
        self.log.add_ragged(self.table, batch)
        values = read_columns(self.table, batch, self.text_columns)
        check = RowCheck(self.log, self.table, batch.rows)
        for column in self.text_columns:
            check.utf8(column, values[column])
        for what in ("user", "item", "service", "action"):
            if column := getattr(schema, what):
                check.exact(column, batch.columns[column], what)
                check.filled(column, values[column], what)
        time_us, utc_offset = np.full(len(batch.rows), UNKNOWN_TIME), np.zeros(len(batch.rows), np.int32)
        if schema.time:
            keep = self.files.unknown_time == "keep"
            time_us, utc_offset = check.times(self.time, batch.columns[schema.time], keep)
        ranges = {column: self._find_ranges(check, column, values[column]) for column in self.edges}
        values = {column: array.filter(pa.array(check.good)) for column, array in values.items()}
        check2, service, item = self._encode_items(values, batch.rows[check.good])
        events = np.empty(int(check2.good.sum()), self.dtype)
        events["row"], events["time_us"] = check2.rows[check2.good], time_us[check.good][check2.good]
        events["utc_offset"] = utc_offset[check.good][check2.good]
        events["service"], events["item"] = service[check2.good], item[check2.good]
        values = {column: array.filter(pa.array(check2.good)) for column, array in values.items()}
        events["user"] = self.users.encode(values[schema.user])
        events["action"] = self._encode_narrow(self.actions, values, schema.action) if schema.action else 0
        for k, (column, codes) in enumerate(self.context.items()):
            is_numeric = column in ranges
            events["context"][:, k] = (
                ranges[column][check.good][check2.good] if is_numeric else self._encode_narrow(codes, values, column)
            )
        return events

    def _find_ranges(self, check: RowCheck, column: str, values: pa.Array) -> np.ndarray:
        """`[rows]` code of each number's range, 0 where there is none."""
        return find_ranges(check.numbers(column, values), self.edges[column])

    def _encode_items(self, values: dict[str, pa.Array], rows: np.ndarray) -> tuple[RowCheck, np.ndarray, np.ndarray]:
        schema, services = self.schema, self.items.services
        check = RowCheck(self.log, self.table, rows)
        if not schema.service:
            service = np.full(len(rows), services[schema.service_name.encode()])
        elif self.closed:
            service = services.find(values[schema.service])
            names = values[schema.service]
            self.strangers[schema.service].add(names, service >= 0, check.good)
            check.refuse(
                service < 0, defects.UNKNOWN_SERVICE, schema.service,
                lambda k: f"the item table has no service {defects.printed(names[k].as_py())}",
            )  # fmt: skip
        else:
            service = self._encode_narrow(services, values, schema.service)
        ids = values[schema.item]
        if not self.closed:
            return check, service, self.items.encode(service, ids, new=True)
        item = self.items.encode(np.where(check.good, service, 0), ids, new=False)
        self.strangers[schema.item].add(ids, item >= 0, check.good)
        check.refuse(
            item < 0, defects.UNKNOWN_ITEM, schema.item,
            lambda k: f"the item table has no item {defects.printed(ids[k].as_py())} of this service",
        )  # fmt: skip
        return check, service, item

    def refuse_amounts(self):
        """Raises InputError where a context column without edges holds amounts."""
        for column, codes in self.context.items():
            if column not in self.edges:
                scan = AmountScan(is_flag)
                scan.add(pa.array(codes.names(), pa.string()))
                refuse_amounts(self.table, column, self.schema, scan.example, CONTEXT_REMEDY)

    def _encode_narrow(self, codes: IdVocab, values: dict[str, pa.Array], column: str) -> np.ndarray:
        found = codes.encode(values[column])
        if len(codes) > MAX_CODE:
            self.refuse_amounts()
            raise InputError(f"{self.table.label}, column {column}: more than {MAX_CODE} different values")
        return found


def _open_codes(edges: tuple[float, ...] | None) -> IdVocab:
    """Codes of a context column: of "missing" alone, or, with edges, of all ranges too."""
    if edges is None:
        return IdVocab({b"": 0})
    return IdVocab({b"": 0} | {name.encode(): k for k, name in enumerate(name_ranges(edges), 1)})


def describe_report(report: PrepareReport) -> str:
    """The report as lines of text."""
    lines = [f"{'service':<16}{'users':>12}{'items':>12}{'events':>14}"]
    rows = [(printable(name), counts) for name, counts in report.services.items()]
    rows.append(("all", {"users": report.n_users, "items": report.n_items, "events": report.n_events}))
    lines += [f"{name:<16}{n['users']:>12,}{n['items']:>12,}{n['events']:>14,}" for name, n in rows]
    lines += [f"times: {report.times}", *map(printable, report.notes), *describe_quarantine(report.quarantined)]
    done = "replaced what was prepared there," if report.replaced else "written"
    return "\n".join([*lines, f"{report.folder}: {done} in {report.wall_s:.1f} s"])


def describe_quarantine(quarantined: dict[str, dict[str, int]]) -> list[str]:
    """A line for each file and reason of the rows that were put aside."""
    return [
        f"quarantined from {printable(file)}: {n:,} {'row' if n == 1 else 'rows'}, {reason}"
        for file, counts in quarantined.items()
        for reason, n in sorted(counts.items())
    ]


def prepare(config: DataConfig, out: Path, accept: Callable[[Path], None] | None = None) -> PrepareReport:
    """Writes the tables of `config` as a prepared folder. Raises InputError at bad input, as `config.tables` says.

    `accept` sees the new folder before it takes the place of an old one, and refuses it by an exception.
    """
    start = time.monotonic()
    if config.source != "tables":
        raise InputError(f'config.data.source: is "{config.source}", but only "tables" can be prepared')
    tables = open_tables(config)
    log = DefectLog(config.tables.on_bad_rows == "quarantine")
    replaced = (Path(out) / shards.META).is_file()
    with shards.replace_folder(out) as folder:
        items, catalogue, edges = read_items(tables.items, config.schema, log) if tables.items else (None, None, {})
        coder, events = _encode_interactions(tables, config, items, log, folder / SPILL)
        with shards.ShardWriter(folder, len(coder.users), config.n_shards) as writer:
            lengths, counts, times = _write_events(events, coder, writer)
        log.check(tables.interactions)
        profile: dict[str, pa.Array] = {}
        coverage = {}
        if tables.users:
            profile, n_with_row = read_profile_columns(tables.users, config.schema, coder.users, log)
            coverage[tables.users.label] = {"users": len(coder.users), "with_row": n_with_row}
        if tables.items:
            coverage[tables.items.label] = {"items": len(counts.has_event), "with_event": int(counts.has_event.sum())}
        (folder / SPILL).rmdir()
        log.write_quarantine(tables.all, folder / QUARANTINE)
        _write_tables(folder, coder, catalogue, lengths, profile)
        far = describe_far_times(times, find_far_times(times))
        notes = (*([f"far-off times: {far}"] if far else []), *describe_coverage(coverage))
        meta = _describe(
            config, coder, int(lengths.sum()), writer.shards, tuple(profile),
            {"quarantined": log.counts, "coverage": coverage, "notes": notes, "item_edges": edges},
        )  # fmt: skip
        shards.write_meta(folder, meta)
        if accept is not None:
            accept(folder)
    sizes = np.diff(coder.items.offsets).tolist()
    return PrepareReport(
        folder=str(out),
        n_users=meta.n_users,
        n_items=meta.n_items,
        n_events=meta.n_events,
        services={
            name: {"users": int(counts.users[z]), "items": sizes[z], "events": int(counts.events[z])}
            for z, name in enumerate(meta.services)
        },
        quarantined=log.counts,
        coverage=coverage,
        wall_s=round(time.monotonic() - start, 2),
        replaced=replaced,
        times=describe_times(times),
        notes=notes,
    )


def _encode_interactions(
    tables: Tables, config: DataConfig, items: ItemCodes | None, log: DefectLog, folder: Path
) -> tuple[InteractionCoder, spill.Spill]:
    """Reads the interactions into coded events in `folder`. Raises InputError where they do not fit the item table."""
    coder = InteractionCoder(tables.interactions, config, items, log)
    events = spill.Spill(folder, len(config.schema.context))
    for batch in read_batches(tables.interactions, coder.columns):
        events.append(coder.encode(batch))
    if tables.items:
        refuse_disjoint(tables, config.schema, coder.items, coder.strangers)
    coder.refuse_amounts()
    if TOTAL in coder.items.services.names():
        table, column = tables.interactions, config.schema.service
        if tables.items:
            table, column = tables.items, item_service(config.schema)
        raise InputError(f'{table.label}, column {column}: no service can be called "{TOTAL}"')
    if not coder.users:
        log.check(tables.interactions)
        raise InputError(f"{tables.interactions.label}: no good row is left")
    return coder, events


def describe_source(config: DataConfig) -> dict:
    """What a prepared folder is made from: the config that matters, and each input file's size and time of change."""
    files: dict[str, list | dict] = {}
    for name in (config.tables.interactions, config.tables.items, config.tables.users):
        path = Path(config.tables.folder) / name
        if name and path.is_file():
            files[name] = [path.stat().st_size, path.stat().st_mtime_ns]
        elif name and path.is_dir():  # the parts of a Parquet table
            stats = {part.name: part.stat() for part in sorted(path.iterdir())}
            files[name] = {part: [stat.st_size, stat.st_mtime_ns] for part, stat in stats.items()}
    schema = {name: value for name, value in dataclasses.asdict(config.schema).items() if not name.startswith("zone")}
    used = {"tables": dataclasses.asdict(config.tables), "schema": schema, "files": files}
    return json.loads(json.dumps(used))  # as it will be read back


def is_current(config: DataConfig, folder: Path) -> bool:
    """Whether the folder was prepared whole, by this version, from these files, with this config.

    Raises:
      InputError: its description is damaged.
    """
    if not (folder / shards.META).exists():
        return False
    try:
        return shards.Meta.load(folder).extra.get("source") == describe_source(config)
    except shards.OtherVersion:
        return False


def _write_events(
    events: spill.Spill, coder: InteractionCoder, writer: shards.ShardWriter
) -> tuple[np.ndarray, spill.ServiceCounts, TimeCounts]:
    """Sorts and writes block by block; returns `[users]` numbers of events, and the events by service and time."""
    offsets = coder.items.offsets
    counts = spill.ServiceCounts(len(offsets) - 1, int(offsets[-1]))
    lengths, times = [], []
    for first in range(0, len(coder.users), spill.USERS_PER_BLOCK):
        block = events.read(first // spill.USERS_PER_BLOCK)
        block = block[spill.order_by_user(block)]
        if coder.files.duplicates == "refuse":
            block = _drop_duplicates(block, coder)
        if coder.log.failed:
            continue  # nothing will be kept, but the lowest bad row is still to be found
        n = min(spill.USERS_PER_BLOCK, len(coder.users) - first)
        lengths.append(np.bincount(block["user"] - first, minlength=n))
        records = np.empty(len(block), shards.record_dtype(len(coder.context)))
        records["item"] = offsets[block["service"]] + block["item"]
        for name in ("action", "time_us", "utc_offset", "context"):
            records[name] = block[name]
        writer.write(records, lengths[-1])
        counts.add(block)
        counts.has_event[records["item"]] = True
        times.append(count_times(block["time_us"]))
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int64), counts, add_counts(times)


def _drop_duplicates(block: np.ndarray, coder: InteractionCoder) -> np.ndarray:
    again, first = spill.find_duplicates(block)
    schema = coder.schema
    columns = ", ".join(filter(None, (schema.user, schema.service, schema.item, schema.action, schema.time)))
    row = block["row"]
    coder.log.add(
        coder.table, defects.DUPLICATE_EVENT, columns, row[again], lambda k: f"the same event as row {row[first[k]]}"
    )
    return np.delete(block, again) if len(again) else block


def _write_tables(
    folder: Path,
    coder: InteractionCoder,
    catalogue: pa.Table | None,
    lengths: np.ndarray,
    profile: dict[str, pa.Array],
):
    if catalogue is None:
        ids = pa.array([name for codes in coder.items.items for name in codes.names()], pa.string())
        empty = pa.array([""] * len(ids), pa.string())
        columns = {"id": ids, "text": empty, "attributes": empty}
    else:
        columns = {name: catalogue[name] for name in ("id", "text", "attributes")}
    shards.write_items(folder, coder.items.services.names(), coder.items.offsets, columns)
    shards.write_users(folder, pa.array(coder.users, pa.binary()).cast(pa.string()), lengths, profile)


def _describe(
    config: DataConfig,
    coder: InteractionCoder,
    n_events: int,
    files: tuple[dict, ...],
    profile: tuple,
    extra: dict,
) -> shards.Meta:
    return shards.Meta(
        services=tuple(coder.items.services.names()),
        actions=tuple(coder.actions.names()) or ("event",),
        context={column: tuple(codes.names()[1:]) for column, codes in coder.context.items()},
        profile=profile,
        n_users=len(coder.users),
        n_events=n_events,
        n_items=int(coder.items.offsets[-1]),
        shards=files,
        extra={"source": describe_source(config), **extra},
    )
