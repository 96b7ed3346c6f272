"""New tables of a trained run: events since training, new users and new items, read as the run's own tables were."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.config.terminal import printable
from moerec.data.dataset import Dataset, ItemTable
from moerec.data.prepare.row_validation import DefectLog
from moerec.data.prepare.shards import META, Meta, load_dataset
from moerec.data.prepare.side_tables import read_items, read_profile_columns
from moerec.data.prepare.tables import SourceTable, open_table, read_batches
from moerec.data.prepare.tables_to_shards import describe_quarantine, prepare
from moerec.data.prepare.vocab import IdVocab, open_items, open_tables, open_users, read_columns
from moerec.errors import InputError
from moerec.train.run_dir import Run

# The built-in world has no tables of its own: this is what those that extend it look like.
CITY_SCHEMA = SchemaConfig(
    service="service", time="time", time_unit="iso", text=("text",), attributes=("attributes",), attribute_separator=" "
)


class NewTables(NamedTuple):
    """What new tables hold, in numbers of their own.

    Attributes:
      events: the events, their users and items; None without a table of interactions.
      items: of the item table, by service; None without one.
      users: ids of the user table; fields: name -> their values, empty where missing. Both empty without a table.
      notes: lines about rows that were put aside.
    """

    events: Dataset | None
    items: ItemTable | None
    users: tuple[str, ...]
    fields: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()


def find_schema(run: Run) -> tuple[SchemaConfig, TablesConfig]:
    """How the tables of a run are read: as those that it was trained on.

    Raises:
      InputError: the folder that the data were prepared in says nothing of the tables that they are from.
    """
    data = run.config.data
    if data.source == "tables":
        return data.schema, data.tables
    if data.source == "city":
        dataset = run.data.dataset
        action = "action" if len(dataset.actions) > 1 else ""
        context, profile = tuple(dataset.context), tuple(dataset.profile)
        return dataclasses.replace(CITY_SCHEMA, context=context, profile=profile, action=action), TablesConfig()
    folder = Path(data.prepared)
    source = Meta.load(folder).extra.get("source")
    if source is None:
        raise InputError(f"{folder / META}: names no tables that it was prepared from, so that new ones cannot be read")
    schema: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in source["schema"].items()}
    return dataclasses.replace(data.schema, **schema), TablesConfig(**source["tables"])


def read_new_tables(run: Run, interactions: Path | None, items: Path | None, users: Path | None) -> NewTables:
    """Reads new tables by the schema of a run; bad rows are refused or put aside as in its own.

    Columns of the context and of the profile that a table does not have are missing values, since a request may leave
    them out, too. A table with a header and no row below it adds nothing: there are days without news.

    Raises:
      InputError: a table cannot be read; one line with its file, row and column.
    """
    schema, files = find_schema(run)
    quarantine = DefectLog(files.on_bad_rows == "quarantine")
    notes: list[str] = []
    events = None
    if interactions is not None:
        events, told = _read_events(schema, files, interactions)
        notes += told
    catalogue = None
    if items is not None:
        config = _narrow(schema, files, items=items)
        catalogue = _read_items(run, config, quarantine) if _has_rows(open_items(config), schema.item_id) else None
    ids: tuple[str, ...] = ()
    fields: Mapping[str, np.ndarray] = {}
    if users is not None:
        ids, fields = _read_users(_narrow(schema, files, users=users), quarantine)
    return NewTables(events, catalogue, ids, fields, (*notes, *describe_quarantine(quarantine.counts)))


def _narrow(schema: SchemaConfig, files: TablesConfig, **paths: Path) -> DataConfig:
    """The config under which one new table is read: nothing in it speaks of other tables."""
    ((kind, path),) = paths.items()
    if not path.exists():
        raise InputError(f"--{kind}: there is no {path}")
    keep = {"interactions": schema.context, "items": schema.attributes, "users": schema.profile}[kind]
    categorical = tuple(name for name in schema.categorical if name in keep)
    schema = dataclasses.replace(schema, categorical=categorical, zone_column="", zones=(), zone="UTC")
    if kind != "items":
        schema = dataclasses.replace(schema, text=(), attributes=(), item_numbers=())
    if kind != "users":
        schema = dataclasses.replace(schema, profile=())
    if kind != "interactions":
        schema = dataclasses.replace(schema, context=(), context_edges=())
    named = {"interactions": "", "items": "", "users": "", kind: path.name}
    tables = dataclasses.replace(files, folder=str(path.absolute().parent), format="auto", **named)
    if path.suffix.removeprefix(".") == "" or files.format == "atomic":
        tables = dataclasses.replace(tables, format=files.format)
    return DataConfig(source="tables", tables=tables, schema=schema)


def _has_rows(table: SourceTable | None, column: str) -> bool:
    """Whether a table whose columns are as they should be has a row, good or bad."""
    return table is not None and any(len(x.rows) or x.ragged for x in read_batches(table, [column]))


def _read_events(schema: SchemaConfig, files: TablesConfig, path: Path) -> tuple[Dataset | None, list[str]]:
    config = _narrow(schema, files, interactions=path)
    there = _list_columns(config)
    known = tuple(name for name in config.schema.context if name in there)
    edges = tuple(entry for entry in config.schema.context_edges if entry.rpartition("=")[0] in known)
    categorical = tuple(name for name in config.schema.categorical if name in known)
    config = dataclasses.replace(
        config,
        schema=dataclasses.replace(config.schema, context=known, context_edges=edges, categorical=categorical),
    )
    if not _has_rows(open_tables(config).interactions, config.schema.user):
        return None, []
    with tempfile.TemporaryDirectory() as scratch:
        report = prepare(config, Path(scratch) / "events")
        told = [*map(printable, report.notes), *describe_quarantine(report.quarantined)]
        return load_dataset(Path(scratch) / "events"), told


def _list_columns(config: DataConfig) -> tuple[str, ...]:
    return open_table(Path(config.tables.folder), config.tables.interactions, config.tables.format).columns


def _read_items(run: Run, config: DataConfig, log: DefectLog) -> ItemTable:
    table, schema = open_items(config), config.schema
    assert table is not None
    by_quantiles = [column for column, edges in schema.item_ranges.items() if isinstance(edges, int)]
    edges = {} if run.data.folder is None else Meta.load(run.data.folder).extra.get("item_edges", {})
    for column in by_quantiles:
        if column not in edges:
            told = "was prepared before quantiles were kept; prepare and train it anew, or name edges"
            raise InputError(f"config.data.schema.item_numbers: {column}: the run {told}")
    codes, rows, _ = read_items(table, schema, log, {column: tuple(edges[column]) for column in by_quantiles})
    attributes = np.array(rows["attributes"].to_pylist(), object)
    if run.config.data.source == "city":  # whose tokens name no column
        attributes = np.array([text.replace("attributes=", "") for text in attributes], object)
    ids, text = (np.array(rows[name].to_pylist(), object) for name in ("id", "text"))
    return ItemTable(tuple(codes.services.names()), codes.offsets, ids, text, attributes)


def _read_users(config: DataConfig, log: DefectLog) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    schema = config.schema
    table = open_users(dataclasses.replace(config, schema=dataclasses.replace(schema, profile=())))
    if table is None or not _has_rows(table, schema.profile_id):
        return (), {}
    there = tuple(name for name in schema.profile if name in table.columns)
    schema = dataclasses.replace(schema, profile=there, categorical=())
    users = IdVocab()
    for ids in _read_ids(table, schema):
        users.encode(ids)
    columns, _ = read_profile_columns(table, dataclasses.replace(schema, categorical=there), users, log)
    return tuple(users.names()), {name: np.array(values.to_pylist(), object) for name, values in columns.items()}


def _read_ids(table: SourceTable, schema: SchemaConfig) -> list[pa.Array]:
    found = []
    for batch in read_batches(table, [schema.profile_id]):
        ids = read_columns(table, batch, [schema.profile_id])[schema.profile_id]
        found.append(ids.filter(pc.greater(pc.binary_length(ids), 0)))
    return found
