"""The tables beside the interactions: items with their texts and attributes, users with their profile fields.

Memory: the texts of the item table, and the profile fields of the users who have events.
"""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moerec.config import SchemaConfig
from moerec.data.prepare import row_validation as defects
from moerec.data.prepare.binning import AmountScan, find_quantiles, find_ranges, is_whole, name_ranges
from moerec.data.prepare.row_validation import DefectLog, RowCheck, printed
from moerec.data.prepare.tables import SourceTable, as_lists, read_batches
from moerec.data.prepare.vocab import (
    ATTRIBUTE_REMEDY,
    PROFILE_REMEDY,
    IdVocab,
    ItemCodes,
    Tables,
    encode_services,
    item_service,
    read_columns,
    refuse_amounts,
)
from moerec.errors import InputError

CATALOGUE = ("service", "id", "text", "attributes")  # columns of the catalogue's rows


Edges = dict[str, tuple[float, ...]]


def read_items(
    table: SourceTable, schema: SchemaConfig, log: DefectLog, quantiles: Mapping[str, tuple[float, ...]] = {}
) -> tuple[ItemCodes, pa.Table, Edges]:
    """The item table: codes, the catalogue's rows (service code, id, text, attributes) in catalogue order, and where
    the ranges of its numbers meet.

    Args: `quantiles` are the edges of numbers that the schema has cut by quantiles, where they are known already: an
    item that is new belongs to the ranges of those before it.
    """
    codes, parts = ItemCodes(), []
    scans = {name: AmountScan(is_whole) for name in schema.attributes}
    service, column = item_service(schema), schema.item_id
    keys = list(dict.fromkeys([column, *([service] if service else [])]))
    columns = list(dict.fromkeys([*keys, *schema.text, *schema.attributes, *schema.item_ranges]))
    for batch in read_batches(table, columns):
        log.add_ragged(table, batch)
        values = read_columns(table, batch, columns, schema.attribute_separator)
        check = RowCheck(log, table, batch.rows)
        for name in columns:
            check.utf8(name, values[name])
        for name in keys:
            what = "item" if name == column else "service"
            check.exact(name, batch.columns[name], what)
            check.filled(name, values[name], what)
        numbers = {name: check.numbers(name, values[name]) for name in schema.item_ranges}
        lists = {name: _split(table, schema, name, batch.columns[name], values[name]) for name in schema.attributes}
        at, rows = pa.array(np.flatnonzero(check.good)), batch.rows[check.good]
        values = {name: array.take(at) for name, array in values.items()}
        services = encode_services(codes, values[service] if service else None, len(rows), schema)
        n_before = np.array([len(known) for known in codes.items] + [0] * len(codes.services), np.int64)
        items = codes.encode(services, values[column], new=True)
        repeated = np.ones(len(rows), bool)
        repeated[np.unique(services << 32 | items, return_index=True)[1]] = False
        repeated |= items < n_before[services]
        check2 = RowCheck(log, table, rows)
        check2.first(repeated, defects.DUPLICATE_ITEM, column, values[column])
        tokens = {}
        for name, array in lists.items():
            array = _trim(array.take(at))
            scans[name].add(array)
            tokens[name] = attribute_tokens(name, array)
        part = _catalogue_rows(schema, services, values, tokens)
        for name, column_numbers in numbers.items():
            part = part.append_column(f"number.{name}", pa.array(column_numbers[check.good]))
        parts.append(part.filter(pa.array(check2.good)))
    log.check(table)
    if not parts or not sum(len(part) for part in parts):
        raise InputError(f"{table.label}: the item table has no good row")
    for name, scan in scans.items():
        refuse_amounts(table, name, schema, scan.example, ATTRIBUTE_REMEDY)
    rows, edges = _bin_numbers(table, schema, pa.concat_tables(parts), quantiles)
    return codes, rows.take(pa.array(np.argsort(rows["service"].to_numpy(), kind="stable"))), edges


def _split(table: SourceTable, schema: SchemaConfig, name: str, array: pa.Array, printed: pa.Array) -> pa.Array:
    """Each value as a list of bytes: the elements of a list, the parts of a text between separators."""
    if name in table.lists and name not in table.separators:
        return as_lists(array)
    separator = table.separators.get(name, schema.attribute_separator)
    return pc.split_pattern(printed, separator)


def _trim(lists: pa.Array) -> pa.Array:
    """Lists of bytes, which are good UTF-8, as lists of strings without white space around them."""
    values = pc.utf8_trim_whitespace(lists.flatten().cast(pa.string()))
    return pa.ListArray.from_arrays(_offsets(pc.list_value_length(lists)), values)


def _offsets(n_values: pa.Array) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(n_values.to_numpy(zero_copy_only=False))]).astype(np.int32))


def _catalogue_rows(
    schema: SchemaConfig, services: np.ndarray, values: dict[str, pa.Array], tokens: dict[str, pa.Array]
) -> pa.Table:
    n = len(services)
    text = join_filled([values[name].cast(pa.string()) for name in schema.text], n)
    attributes = join_filled(list(tokens.values()), n)
    ids = values[schema.item_id].cast(pa.string())
    return pa.table(dict(zip(CATALOGUE, (pa.array(services), ids, text, attributes), strict=True)))


def _bin_numbers(
    table: SourceTable, schema: SchemaConfig, rows: pa.Table, quantiles: Mapping[str, tuple[float, ...]]
) -> tuple[pa.Table, Edges]:
    """The rows with a token of its range behind the attributes for every number, and without the numbers; and the
    edges.
    """
    attributes, found = rows["attributes"].combine_chunks(), {}
    for name, edges in schema.item_ranges.items():
        numbers = rows[f"number.{name}"].to_numpy()
        if isinstance(edges, int):
            edges = quantiles.get(name) or find_quantiles(numbers, edges)
            if not edges:
                raise InputError(f"{table.label}, column {name}: no two different numbers to take quantiles of")
        found[name] = tuple(edges)
        tokens = ["", *("_".join(f"{name}={words}".split()) for words in name_ranges(edges))]
        ranges = pa.array(tokens, pa.string()).take(pa.array(find_ranges(numbers, edges)))
        attributes = join_filled([attributes, ranges], len(rows))
    return rows.select(CATALOGUE).set_column(CATALOGUE.index("attributes"), "attributes", attributes), found


def join_filled(columns: list[pa.Array], n: int) -> pa.Array:
    """Row by row the values that are not empty, joined by a space."""
    joined = pa.array([""] * n, pa.string())
    for column in columns:
        # not null_handling="skip": arrow 26 drops rows in which everything is skipped
        space = pc.if_else(pc.or_(pc.equal(joined, ""), pc.equal(column, "")), "", " ")
        joined = pc.binary_join_element_wise(joined, space, column, "")
    return joined


def attribute_tokens(column: str, lists: pa.Array) -> pa.Array:
    """Each list of strings as tokens `column=value` joined by a space; white space within a value becomes `_`."""
    flat = lists.flatten()
    filled = pc.not_equal(flat, "")
    row = pc.list_parent_indices(lists).filter(filled).to_numpy(zero_copy_only=False)
    prefix = "_".join(column.split()) + "="
    tokens = pc.binary_join_element_wise(prefix, pc.replace_substring_regex(flat.filter(filled), r"\s", "_"), "")
    lengths = pa.array(np.bincount(row, minlength=len(lists)))
    return pc.binary_join(pa.ListArray.from_arrays(_offsets(lengths), tokens), " ")


def read_profile_columns(
    table: SourceTable, schema: SchemaConfig, users: IdVocab, log: DefectLog
) -> tuple[dict[str, pa.Array], int]:
    """The profile columns of the users who have events, in their order, empty where the user table has no row; and how
    many of the users have one. Raises InputError where none has.
    """
    columns = list(dict.fromkeys([schema.profile_id, *schema.profile]))
    codes, parts, strangers = [], [], Strangers()
    seen = np.zeros(len(users), bool)
    for batch in read_batches(table, columns):
        log.add_ragged(table, batch)
        values = read_columns(table, batch, columns)
        check = RowCheck(log, table, batch.rows)
        for name in columns:
            check.utf8(name, values[name])
        ids = values[schema.profile_id]
        check.exact(schema.profile_id, batch.columns[schema.profile_id], "user")
        check.filled(schema.profile_id, ids, "user")
        user = users.find(ids)
        strangers.add(ids, user >= 0, check.good)
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
    if not seen.any():
        if not strangers.examples:
            raise InputError(f"{table.label}: the user table has no good row")
        where = f"{table.label}, column {schema.profile_id}: none of its users has an event"
        raise InputError(f"{where}: {describe_sides(strangers.examples, 'there', users, 'in the interactions')}")
    if not schema.profile:
        return {}, int(seen.sum())
    place = np.full(len(users), -1, np.int64)
    place[np.concatenate(codes)] = np.arange(sum(map(len, codes)))
    rows = pa.concat_tables(parts).take(pa.array(place, mask=place < 0))
    profile = {c: pc.fill_null(rows[c].combine_chunks(), "") for c in schema.profile}
    for name, fields in profile.items():
        scan = AmountScan(is_whole)
        scan.add(fields.unique())
        refuse_amounts(table, name, schema, scan.example, PROFILE_REMEDY)
    return profile, int(seen.sum())


class Strangers:
    """Two values of one side of a join that the other side has not; none once a value is met that both have.

    Attributes:
      examples: those values.
    """

    def __init__(self):
        self._has_match, self._examples = False, []

    @property
    def examples(self) -> list[bytes]:
        return [] if self._has_match else self._examples

    def add(self, values: pa.Array, is_known: np.ndarray, is_asked: np.ndarray):
        """Looks at those of `[n]` values that are asked for; `is_known` says which the other side has."""
        self._has_match |= bool(np.any(is_known & is_asked))
        if len(self.examples) < 2 and not self._has_match:
            found = self._examples + values.filter(pa.array(is_asked)).unique()[:3].to_pylist()
            self._examples = list(dict.fromkeys(found))[:2]


def refuse_disjoint(tables: Tables, schema: SchemaConfig, items: ItemCodes, strangers: dict[str, Strangers]) -> None:
    """Raises InputError where the item table has none of the interactions' services, or none of their items.

    Args:
      strangers: of the interactions' columns of services and items.
    """
    for column, other, there in (
        (schema.service, item_service(schema), items.services),
        (schema.item, schema.item_id, itertools.chain.from_iterable(items.items)),
    ):
        if examples := strangers[column].examples:
            sides = describe_sides(examples, "here", there, "there")
            where, table = f"{tables.interactions.label}, column {column}", tables.items
            raise InputError(f"{where}: none of its values is in {table and table.label}, column {other}: {sides}")


def describe_sides(here: Iterable[bytes], where_here: str, there: Iterable[bytes], where_there: str) -> str:
    """Two examples of each side of a join that matches nothing."""
    sides = [(list(dict.fromkeys(values))[:2], where) for values, where in ((here, where_here), (there, where_there))]
    return ", ".join(f"{' and '.join(map(printed, values))} {where}" for values, where in sides)


def describe_coverage(coverage: dict[str, dict[str, int]]) -> list[str]:
    """A line for each table of users or items that has no row for some of the users, or no event for some items."""
    lines = []
    for file, counts in coverage.items():
        (what, n), (_, found) = counts.items()
        if found < n:
            lines.append(
                f"{file}: {found:,} of {n:,} {what} ({found / n:.1%}) have {'a row' if what == 'users' else 'an event'}"
            )
    return lines
