"""Counts of tables from one pass over the few columns that tell them, without a look at anything else.

Nothing is validated: whoever prepares the tables names their defects. Memory is one batch of the columns, and a row for
each different user and item of each batch.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from moerec.config import DataConfig
from moerec.config.sizes import TableCounts
from moerec.data.prepare.tables.reading import open_table, read_batches
from moerec.data.prepare.tables.source import SourceTable
from moerec.data.prepare.tables.values import as_binary
from moerec.errors import InputError

NUMBER = "\0rows"  # a column that no table can have
BATCHES_AT_ONCE = 64  # of which the counts are added up, so that they grow with the ids and not with the rows


def count_tables(data: DataConfig) -> TableCounts:
    """The users, events, items and services of the tables.

    Raises:
      InputError: a table or one of its columns is not there or cannot be read, or the interactions have no row.
    """
    if data.source != "tables":
        raise InputError(f'config.data.source: is "{data.source}", but only "tables" can be counted')
    schema, folder, kind = data.schema, Path(data.tables.folder), data.tables.format
    interactions = open_table(folder, data.tables.interactions, kind)
    for field in ("user", "item", "service"):
        if getattr(schema, field):
            interactions.require(getattr(schema, field), f"data.schema.{field}", single=True)
    users, items = _count_values(interactions, [[schema.user], [*filter(None, (schema.service, schema.item))]])
    n_events = users[NUMBER].to_numpy()
    if not len(n_events):
        raise InputError(f"{interactions.label}: has no rows")
    n_items = items.num_rows
    if data.tables.items:
        catalogue = open_table(folder, data.tables.items, kind)
        catalogue.require(schema.item_id, "data.schema.item_id", single=True)
        n_items = sum(len(batch.rows) for batch in read_batches(catalogue, [schema.item_id])) or n_items
    return TableCounts(
        n_users=len(n_events),
        n_events=int(n_events.sum()),
        n_items=n_items,
        n_services=len(items[schema.service].unique()) if schema.service else 1,
        long_history=int(np.quantile(n_events, 0.95, method="inverted_cdf")),
    )


def _count_values(table: SourceTable, groups: list[list[str]]) -> list[pa.Table]:
    """Of each group of columns the different values, each once, and in the column `NUMBER` how many rows have them."""
    columns = list(dict.fromkeys(column for group in groups for column in group))
    found = [[_with_ones(group, {column: pa.array([], pa.binary()) for column in columns}, 0)] for group in groups]
    for batch in read_batches(table, columns):
        values = {column: as_binary(batch.columns[column]) for column in columns}
        for group, parts in zip(groups, found, strict=True):
            parts.append(_add_up(_with_ones(group, values, len(batch.rows))))
            if len(parts) == BATCHES_AT_ONCE:
                parts[:] = [_add_up(pa.concat_tables(parts))]
    return [_add_up(pa.concat_tables(parts)) for parts in found]


def _with_ones(group: list[str], values: dict[str, pa.Array], n: int) -> pa.Table:
    return pa.table([*(values[column] for column in group), pa.array(np.ones(n, np.int64))], names=[*group, NUMBER])


def _add_up(rows: pa.Table) -> pa.Table:
    """Every different row once, with the sum of its numbers."""
    keys = rows.column_names[:-1]
    summed = rows.group_by(keys, use_threads=False).aggregate([(NUMBER, "sum")])
    return summed.select([*keys, f"{NUMBER}_sum"]).rename_columns([*keys, NUMBER])
