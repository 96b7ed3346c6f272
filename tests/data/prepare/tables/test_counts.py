"""Counts of tables against a loop over the rows that were written, in every format."""

import collections
import dataclasses
import gzip

import pyarrow.csv
import pyarrow.parquet
import pytest

from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.data.prepare.tables import counts
from moerec.data.prepare.tables.counts import count_tables
from moerec.errors import InputError
from tests.own_tables import write_own_tables

COLUMNS = {"user": "customer", "item": "product", "service": "shop", "item_id": "product"}


def describe(folder, interactions="visits.csv", items="products.csv", **columns) -> DataConfig:
    tables = TablesConfig(str(folder), interactions, items)
    return DataConfig(source="tables", tables=tables, schema=SchemaConfig(**{**COLUMNS, **columns}))


def count_by_loop(rows) -> dict[str, int]:
    events = collections.Counter(user for user, _, _ in rows.tolist())
    lengths = sorted(events.values())
    long = next(n for n in lengths if sum(m <= n for m in lengths) >= 0.95 * len(lengths))
    n_items, n_services = (
        len({(shop, item) for _, shop, item in rows.tolist()}),
        len({shop for _, shop, _ in rows.tolist()}),
    )
    counted = (len(events), len(rows), n_items, n_services, long)
    return dict(zip(("n_users", "n_events", "n_items", "n_services", "long_history"), counted, strict=True))


@pytest.mark.parametrize("at_once", [2, 64])
@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_counts_are_those_of_a_loop(tmp_path, monkeypatch, ending, at_once):
    rows = write_own_tables(tmp_path)
    monkeypatch.setattr(counts, "BATCHES_AT_ONCE", at_once)
    if ending == "csv.gz":
        (tmp_path / "visits.csv.gz").write_bytes(gzip.compress((tmp_path / "visits.csv").read_bytes()))
    if ending == "parquet":
        (tmp_path / "visits.parquet").mkdir()
        table = pyarrow.csv.read_csv(tmp_path / "visits.csv")
        for k in range(5):  # batches of their own
            pyarrow.parquet.write_table(table.slice(50 * k, 50), tmp_path / "visits.parquet" / f"part-{k}.parquet")
    expected = count_by_loop(rows)
    assert dataclasses.asdict(count_tables(describe(tmp_path, f"visits.{ending}", items=""))) == expected
    found = count_tables(describe(tmp_path, f"visits.{ending}"))
    assert dataclasses.asdict(found) == {**expected, "n_items": 40}


def test_without_a_service_column_there_is_one_service(tmp_path):
    rows = write_own_tables(tmp_path)
    found = count_tables(describe(tmp_path, items="", service=""))
    assert (found.n_services, found.n_items) == (1, len({item for _, _, item in rows.tolist()}))


def test_what_cannot_be_counted_is_named(tmp_path):
    write_own_tables(tmp_path)
    with pytest.raises(InputError, match=r"visits\.csv, header, column client: no such column"):
        count_tables(describe(tmp_path, user="client"))
    with pytest.raises(InputError, match=r"other\.csv: no such file"):
        count_tables(describe(tmp_path, "other.csv"))
    (tmp_path / "empty.csv").write_text("customer,product,shop,when\n")
    with pytest.raises(InputError, match=r"empty\.csv: has no rows"):
        count_tables(describe(tmp_path, "empty.csv"))
    with pytest.raises(InputError, match=r"config\.data\.source"):
        count_tables(DataConfig())
