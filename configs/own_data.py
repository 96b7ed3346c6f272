"""A file to copy for tables of your own: the full model, in sizes that follow from how much there is in the tables.

Set what stands in capitals (an empty name: the tables have no such column). docs/own_data.md tells of each.

Command: python -m experiments.train --config=configs/own_data.py --workdir=runs/own_data
"""

import dataclasses

from moerec import config as c
from moerec.config.sizes import size_config
from moerec.data.prepare.tables.counts import count_tables

FOLDER = "data"  # of the tables, from where the command is started; .csv, .tsv, .parquet, the first two also .gz
INTERACTIONS, ITEMS, USERS = "visits.csv", "products.csv", ""  # the last two may be ""

EVENTS = {"user": "customer", "item": "product", "service": "shop", "time": "when", "action": ""}
TIME_UNIT = "s"  # since 1970: s, ms or day; or iso: 2026-01-31T09:00
ZONE = "UTC"  # whose clock the people have: Europe/Moscow, …
CONTEXT = ()  # columns of the interactions that are known when a recommendation is asked for: ("weather",)

ITEM_COLUMNS = {"item_id": "product", "item_service": "shop", "text": ("title",), "attributes": (), "item_numbers": ()}
USER_COLUMNS = {"profile_id": "customer", "profile": ()}

MASK_SEEN = False  # True: what a user had is never recommended again. Audit and training say what the data suggest
BASELINES = ("popularity", "popularity_by_service", "popularity_recent", "markov", "item_knn", "graph_text")


def get_config() -> c.Config:
    """The model of these tables."""
    tables = c.TablesConfig(folder=FOLDER, interactions=INTERACTIONS, items=ITEMS, users=USERS)
    columns = {**EVENTS, **(ITEM_COLUMNS if ITEMS else {}), **(USER_COLUMNS if USERS else {})}
    schema = c.SchemaConfig(**columns, time_unit=TIME_UNIT, zone=ZONE, context=CONTEXT)
    data = c.DataConfig(source="tables", tables=tables, schema=schema)
    base = size_config(data, count_tables(data), mask_seen=MASK_SEEN)
    # To have other sizes: `model=dataclasses.replace(base.model, d_model=128)`, or on the command line.
    return dataclasses.replace(base, name="own_data", baselines=BASELINES)
