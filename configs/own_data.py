"""A file to copy for tables of your own: the full model, in sizes that follow from how much there is in the tables.

Set what stands in capitals: "" and () are what the tables do not have. docs/own_data.md tells of each.

Command: python -m experiments.train --config=configs/own_data.py --workdir=runs/own_data
Hardware: two CPU cores; 4 minutes of one for 20,000 events in five services.
Result: that of your tables, in report.html of the run, beside the baselines.
"""

import dataclasses

from moerec import config as c
from moerec.config.sizes import size_config
from moerec.data.prepare.tables.counts import count_tables

TABLES = c.TablesConfig(
    folder="data",  # from where the command is started
    interactions="visits.csv",  # or .tsv, .csv.gz, .tsv.gz, .parquet
    items="products.csv",  # "": the items are those of the interactions
    users="",
)
COLUMNS = c.SchemaConfig(
    # Of the interactions. Only user and item are needed.
    user="customer",
    item="product",
    service="shop",
    action="",  # view, buy, …
    time="when",
    time_unit="s",  # since 1970: s, ms or day; or iso: 2026-01-31T09:00 (UTC), 2026-01-31 09:00+01:00
    zone="UTC",  # whose clock the people have: Europe/Moscow, …; times without an offset are UTC all the same
    context=(),  # what is known when a recommendation is asked for: ("weather",)
    # Of the items, if they have a table.
    item_id="product",
    item_service="shop",
    text=("title",),
    attributes=(),  # of categories: ("brand", "category")
    attribute_separator=",",  # where a value of these is split; what no value holds, such as "|": none is split
    item_numbers=(),  # cut into ranges: ("price=quantiles:8",)
    # Of the users, if they have a table.
    profile_id="customer",
    profile=(),  # ("age_group", "city")
)
MASK_SEEN = False  # True: what a user had is never recommended again; audit and training say what fits the data
BASELINES = ("popularity", "popularity_by_service", "popularity_recent", "markov", "item_knn", "graph_text")


def get_config() -> c.Config:
    """The model of these tables."""
    data = c.DataConfig(source="tables", tables=TABLES, schema=COLUMNS)
    base = size_config(data, count_tables(data), mask_seen=MASK_SEEN)
    # To have other sizes: `model=dataclasses.replace(base.model, d_model=128)`, or on the command line.
    return dataclasses.replace(base, name="own_data", baselines=BASELINES)
