"""From the values of the tables to codes: users, items, actions and context in the order of their first appearance.

Memory: about 150 bytes for each different id; nothing grows with the events.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from moerec.config import DataConfig, SchemaConfig
from moerec.data.prepare.tables import RowBatch, SourceTable, as_binary, open_table
from moerec.errors import InputError

MAX_CODE = np.iinfo(np.int16).max
# What to do with a column of amounts.
CONTEXT_REMEDY = "cut it into ranges with config.data.schema.context_edges"
ATTRIBUTE_REMEDY = "name it in config.data.schema.item_numbers, not in attributes"
PROFILE_REMEDY = "cut it into ranges before it is read"


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
    schema, interactions = config.schema, _open(config, config.tables.interactions)
    for field in ("user", "item", "service", "action", "time"):
        if getattr(schema, field):
            interactions.require(getattr(schema, field), f"data.schema.{field}", single=True)
    for column in schema.context:
        interactions.require(column, "data.schema.context", single=True)
    if schema.item_service and not schema.service:
        raise InputError("config.data.schema.item_service: the interactions need a service column too")
    items, users = open_items(config), open_users(config)
    if items is None and (schema.text or schema.attributes or schema.item_numbers):
        raise InputError("config.data.tables.items: text, attributes and item_numbers need an item table")
    if users is None and schema.profile:
        raise InputError("config.data.tables.users: profile columns need a user table")
    return Tables(interactions, items, users)


def open_items(config: DataConfig) -> SourceTable | None:
    """The item table, whose columns are checked as in `open_tables`; None where there is none."""
    if not config.tables.items:
        return None
    items = _open(config, config.tables.items)
    _require_item_columns(items, config.schema)
    return items


def open_users(config: DataConfig) -> SourceTable | None:
    """The user table, whose columns are checked as in `open_tables`; None where there is none."""
    if not config.tables.users:
        return None
    users = _open(config, config.tables.users)
    users.require(config.schema.profile_id, "data.schema.profile_id", single=True)
    for column in config.schema.profile:
        users.require(column, "data.schema.profile", single=True)
    return users


def _open(config: DataConfig, name: str) -> SourceTable:
    table = open_table(Path(config.tables.folder), name, config.tables.format)
    return dataclasses.replace(table, one_line=config.tables.line_breaks == "refuse")


def _require_item_columns(items: SourceTable, schema: SchemaConfig):
    items.require(schema.item_id, "data.schema.item_id", single=True)
    if item_service(schema):
        items.require(item_service(schema), "data.schema.item_service", single=True)
    for column in schema.text:
        items.require(column, "data.schema.text")
    for column in schema.attributes:
        items.require(column, "data.schema.attributes")
    for column in schema.item_ranges:
        items.require(column, "data.schema.item_numbers", single=True)


def refuse_amounts(table: SourceTable, column: str, schema: SchemaConfig, example: str, remedy: str) -> None:
    """Raises InputError where a column of categories holds amounts: `example` is one of them, or empty."""
    if example and column not in schema.categorical:
        raise InputError(
            f"{table.label}, column {column}: numbers, such as {example}, would be a category each; {remedy};"
            " if they are codes, name it in config.data.schema.categorical"
        )


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


def encode_services(codes: ItemCodes, values: pa.Array | None, n: int, schema: SchemaConfig) -> np.ndarray:
    """`[n]` int64 codes of the services, or of the one that the schema names where there is no column of them."""
    if values is None:
        return np.full(n, codes.services[schema.service_name.encode()], np.int64)
    found = codes.services.encode(values)
    if len(codes.services) > MAX_CODE:
        raise InputError(f"config.data.schema.service: more than {MAX_CODE} different values cannot be services")
    return found
