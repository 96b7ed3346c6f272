"""From the values of the tables to codes: users, items, actions and context in the order of their first appearance.

Memory: about 150 bytes for each different id, plus the texts of the item table; nothing grows with the events.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moerec.config import DataConfig, SchemaConfig
from moerec.data.prepare import row_validation as defects
from moerec.data.prepare.row_validation import DefectLog, RowCheck
from moerec.data.prepare.tables import RowBatch, SourceTable, as_binary, open_table, read_batches
from moerec.errors import InputError

MAX_CODE = np.iinfo(np.int16).max


class IdVocab(dict):
    """Value -> code; a value that is met for the first time gets the next code."""

    def __missing__(self, value: bytes) -> int:
        code = len(self)
        self[value] = code
        return code

    def encode(self, values: pa.Array) -> np.ndarray:
        """`[n]` int64 codes, new values included."""
        return self._map(values, self.__getitem__)

    def find(self, values: pa.Array) -> np.ndarray:
        """`[n]` int64 codes, -1 for values without one."""
        return self._map(values, lambda value: self.get(value, -1))

    def names(self) -> list[str]:
        return [value.decode() for value in self]

    @staticmethod
    def _map(values: pa.Array, code_of) -> np.ndarray:
        coded = values.dictionary_encode()
        unique = coded.dictionary.to_pylist()
        return np.fromiter(map(code_of, unique), np.int64, len(unique))[coded.indices.to_numpy(zero_copy_only=False)]


class ItemCodes:
    """Codes of the services, and of the items within their service."""

    def __init__(self):
        self.services = IdVocab()
        self.items: list[IdVocab] = []

    def encode(self, services: np.ndarray, ids: pa.Array, new: bool) -> np.ndarray:
        """`[n]` int64 codes within the service; of unknown items new ones, or -1 without `new`."""
        self.items += [IdVocab() for _ in range(len(self.services) - len(self.items))]
        codes = np.full(len(ids), -1, np.int64)
        for service in np.unique(services):
            at = np.flatnonzero(services == service)
            known = self.items[service]
            codes[at] = known.encode(ids.take(pa.array(at))) if new else known.find(ids.take(pa.array(at)))
        return codes

    @property
    def offsets(self) -> np.ndarray:
        """`[Z + 1]` int64, the range of each service in the catalogue."""
        return np.concatenate([[0], np.cumsum([len(codes) for codes in self.items])]).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Tables:
    interactions: SourceTable
    items: SourceTable | None
    users: SourceTable | None

    @property
    def all(self) -> list[SourceTable]:
        return [table for table in (self.items, self.users, self.interactions) if table is not None]


def open_tables(config: DataConfig) -> Tables:
    """Opens the tables of `config.tables` and checks that they have the columns of `config.schema`."""
    files, schema = config.tables, config.schema

    def open_one(name: str) -> SourceTable:
        table = open_table(Path(files.folder), name, files.format)
        return dataclasses.replace(table, one_line=files.line_breaks == "refuse")

    interactions = open_one(files.interactions)
    for field in ("user", "item", "service", "action", "time"):
        if getattr(schema, field):
            interactions.require(getattr(schema, field), f"data.schema.{field}")
    for column in schema.context:
        interactions.require(column, "data.schema.context")
    if schema.item_service and not schema.service:
        raise InputError("config.data.schema.item_service: the interactions need a service column too")
    items = open_one(files.items) if files.items else None
    if items:
        items.require(schema.item_id, "data.schema.item_id")
        if item_service(schema):
            items.require(item_service(schema), "data.schema.item_service")
        for field in ("text", "attributes"):
            for column in getattr(schema, field):
                items.require(column, f"data.schema.{field}")
    elif schema.text or schema.attributes:
        raise InputError("config.data.tables.items: text and attributes need an item table")
    users = open_one(files.users) if files.users else None
    if users:
        for column in (schema.profile_id, *schema.profile):
            users.require(column, "data.schema.profile" if column != schema.profile_id else "data.schema.profile_id")
    elif schema.profile:
        raise InputError("config.data.tables.users: profile columns need a user table")
    return Tables(interactions, items, users)


def item_service(schema: SchemaConfig) -> str:
    """The service column of the item table."""
    return schema.item_service or schema.service


def read_columns(table: SourceTable, batch: RowBatch, columns: list[str], separator: str = ",") -> dict[str, pa.Array]:
    """The columns of a batch as bytes; lists become text with the separator of their column."""
    values = {}
    for c in dict.fromkeys(columns):
        try:
            values[c] = as_binary(batch.columns[c], table.separators.get(c, separator))
        except pa.ArrowException as error:
            kind = batch.columns[c].type
            raise InputError(f"{table.label}, column {c}: values of type {kind} cannot be read") from error
    return values


def read_items(table: SourceTable, schema: SchemaConfig, log: DefectLog) -> tuple[ItemCodes, pa.Table]:
    """The item table: codes, and the catalogue's rows (service code, id, text, attributes) in catalogue order."""
    codes, parts = ItemCodes(), []
    service, column = item_service(schema), schema.item_id
    columns = list(dict.fromkeys([column, *([service] if service else []), *schema.text, *schema.attributes]))
    for batch in read_batches(table, columns):
        log.add_ragged(table, batch)
        values = read_columns(table, batch, columns, schema.attribute_separator)
        check = RowCheck(log, table, batch.rows)
        for name in columns:
            check.utf8(name, values[name])
        check.filled(column, values[column], "item")
        if service:
            check.filled(service, values[service], "service")
        at, rows = pa.array(np.flatnonzero(check.good)), batch.rows[check.good]
        values = {name: array.take(at) for name, array in values.items()}
        services = _encode_services(codes, values[service] if service else None, len(rows), schema)
        n_before = np.array([len(known) for known in codes.items] + [0] * len(codes.services), np.int64)
        items = codes.encode(services, values[column], new=True)
        repeated = np.ones(len(rows), bool)
        repeated[np.unique(services << 32 | items, return_index=True)[1]] = False
        repeated |= items < n_before[services]
        check = RowCheck(log, table, rows)
        check.first(repeated, defects.DUPLICATE_ITEM, column, values[column])
        parts.append(_catalogue_rows(table, schema, services, values).filter(pa.array(check.good)))
    log.check(table)
    if not parts or not sum(len(part) for part in parts):
        raise InputError(f"{table.label}: the item table has no good row")
    rows = pa.concat_tables(parts)
    return codes, rows.take(pa.array(np.argsort(rows["service"].to_numpy(), kind="stable")))


def _encode_services(codes: ItemCodes, values: pa.Array | None, n: int, schema: SchemaConfig) -> np.ndarray:
    if values is None:
        return np.full(n, codes.services[schema.service_name.encode()], np.int64)
    found = codes.services.encode(values)
    if len(codes.services) > MAX_CODE:
        raise InputError(f"config.data.schema.service: more than {MAX_CODE} different values cannot be services")
    return found


def _catalogue_rows(
    table: SourceTable, schema: SchemaConfig, services: np.ndarray, values: dict[str, pa.Array]
) -> pa.Table:
    n = len(services)
    texts = [values[name].cast(pa.string()) for name in schema.text]
    tokens = [
        attribute_tokens(name, values[name].cast(pa.string()), table.separators.get(name, schema.attribute_separator))
        for name in schema.attributes
    ]
    return pa.table(
        {
            "service": pa.array(services),
            "id": values[schema.item_id].cast(pa.string()),
            "text": join_filled(texts, n),
            "attributes": join_filled(tokens, n),
        }
    )


def join_filled(columns: list[pa.Array], n: int) -> pa.Array:
    """Row by row the values that are not empty, joined by a space."""
    joined = pa.array([""] * n, pa.string())
    for column in columns:
        # not null_handling="skip": arrow 26 drops rows in which everything is skipped
        space = pc.if_else(pc.or_(pc.equal(joined, ""), pc.equal(column, "")), "", " ")
        joined = pc.binary_join_element_wise(joined, space, column, "")
    return joined


def attribute_tokens(column: str, values: pa.Array, separator: str) -> pa.Array:
    """Each value, a list, as tokens `column=value` joined by a space; white space within a value becomes `_`."""
    lists = pc.split_pattern(values, separator)
    flat = pc.utf8_trim_whitespace(lists.flatten())
    filled = pc.not_equal(flat, "")
    row = pc.list_parent_indices(lists).filter(filled).to_numpy(zero_copy_only=False)
    prefix = "_".join(column.split()) + "="
    tokens = pc.binary_join_element_wise(prefix, pc.replace_substring_regex(flat.filter(filled), r"\s", "_"), "")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(values)))]).astype(np.int32)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), tokens), " ")


def read_profile_columns(
    table: SourceTable, schema: SchemaConfig, users: IdVocab, log: DefectLog
) -> dict[str, pa.Array]:
    """The profile columns of the users who have events, in their order; empty where the user table has no row."""
    columns = list(dict.fromkeys([schema.profile_id, *schema.profile]))
    codes, parts = [], []
    seen = np.zeros(len(users), bool)
    for batch in read_batches(table, columns):
        log.add_ragged(table, batch)
        values = read_columns(table, batch, columns)
        check = RowCheck(log, table, batch.rows)
        for name in columns:
            check.utf8(name, values[name])
        ids = values[schema.profile_id]
        check.filled(schema.profile_id, ids, "user")
        user = users.find(ids)
        at = np.flatnonzero(check.good & (user >= 0))
        repeated = np.zeros(len(ids), bool)
        repeated[at] = seen[user[at]]
        repeated[np.delete(at, np.unique(user[at], return_index=True)[1])] = True
        check.first(repeated, defects.DUPLICATE_USER, schema.profile_id, ids)
        at = np.flatnonzero(check.good & (user >= 0))
        seen[user[at]] = True
        codes.append(user[at])
        parts.append(pa.table({c: values[c].take(pa.array(at)).cast(pa.string()) for c in schema.profile}))
    log.check(table)
    if not schema.profile or not parts:
        return {}
    place = np.full(len(users), -1, np.int64)
    place[np.concatenate(codes)] = np.arange(sum(map(len, codes)))
    rows = pa.concat_tables(parts).take(pa.array(place, mask=place < 0))
    return {c: pc.fill_null(rows[c].combine_chunks(), "") for c in schema.profile}
