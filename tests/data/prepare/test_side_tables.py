"""The tables of items and users join the interactions as a plain reading does, or it is said why they do not."""

import dataclasses
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.data.load import load_data
from moerec.data.prepare.binning import AmountScan, find_quantiles, is_whole
from moerec.data.prepare.shards import load_dataset
from moerec.data.prepare.tables_to_shards import describe_report, is_current, prepare
from moerec.errors import InputError

EVENTS = b"user,item\n17850.0,a\n17851.0,b\n17850.0,b\n"


def write(folder, **files):
    """Tables of the names `events`, `items` and `users`: bytes as CSV, tables as Parquet. Returns their config."""
    names = {}
    for name, content in files.items():
        is_text = isinstance(content, bytes)
        names[name] = f"{name}.csv" if is_text else f"{name}.parquet"
        if is_text:
            (folder / names[name]).write_bytes(content)
        else:
            pq.write_table(content, folder / names[name])
    return TablesConfig(str(folder), names.pop("events"), **names)


def run(folder, tables, schema=None, **changes):
    """The report and the data set."""
    tables = dataclasses.replace(tables, **changes)
    config = DataConfig("tables", tables=tables, schema=schema or SchemaConfig(), n_shards=1)
    report = prepare(config, folder / "out")
    return report, load_dataset(folder / "out")


UNMATCHED = [  # ids of the user table, as `17850.0` and `17851.0` are not
    (b"user,age\n17850,3\n17851,4\n", "'17850' and '17851' there"),
    (b"user,age\n017850.0,3\n", "'017850.0' there"),
    (b"user,age\n17850.0 ,3\n 17851.0,4\n", "'17850.0 ' and ' 17851.0' there"),
]


@pytest.mark.parametrize(("users", "sides"), UNMATCHED)
@pytest.mark.parametrize("profile", [("age",), ()])
def test_a_user_table_that_matches_nobody_is_refused(tmp_path, users, sides, profile):
    tables = write(tmp_path, events=EVENTS, users=users)
    with pytest.raises(InputError) as error:
        run(tmp_path, tables, SchemaConfig(profile=profile))
    assert str(error.value) == (
        f"users.csv, column user: none of its users has an event: {sides}, '17850.0' and '17851.0' in the interactions"
    )
    assert not (tmp_path / "out").exists()


def test_a_user_table_without_a_row_is_refused(tmp_path):
    tables = write(tmp_path, events=EVENTS, users=b"user,age\n")
    with pytest.raises(InputError, match=r"^users\.csv: the user table has no good row$"):
        run(tmp_path, tables, SchemaConfig(profile=("age",)))


@pytest.mark.parametrize("on_bad_rows", ["error", "quarantine"])
def test_an_item_table_that_matches_nothing_is_refused(tmp_path, on_bad_rows):
    tables = write(tmp_path, events=b"user,item\nu,A-1\nu,A-2\nv,A-2\n", items=b"item\na-1\na-2\na-3\n")
    with pytest.raises(InputError) as error:
        run(tmp_path, tables, on_bad_rows=on_bad_rows)
    assert str(error.value) == (
        "events.csv, column item: none of its values is in items.csv, column item: "
        "'A-1' and 'A-2' here, 'a-1' and 'a-2' there"
    )
    schema = SchemaConfig(service="shop")
    tables = write(tmp_path, events=b"user,shop,item\nu,Food,1\nu,Food,2\n", items=b"shop,item\nfood,1\nfood,2\n")
    with pytest.raises(InputError) as error:
        run(tmp_path, tables, schema, on_bad_rows=on_bad_rows)
    assert str(error.value) == (
        "events.csv, column shop: none of its values is in items.csv, column shop: 'Food' here, 'food' there"
    )


def test_one_match_is_enough_and_coverage_is_told(tmp_path):
    users, items = b"user,age\n17850.0,3\n99,4\n98,4\n", b"item\na\nb\nc\n"
    report, dataset = run(
        tmp_path, write(tmp_path, events=EVENTS, users=users, items=items), SchemaConfig(profile=("age",))
    )
    assert dataset.profile["age"].tolist() == ["3", ""]
    assert report.coverage == {"users.csv": {"users": 2, "with_row": 1}, "items.csv": {"items": 3, "with_event": 2}}
    assert json.loads((tmp_path / "out/meta.json").read_text("utf-8"))["extra"]["coverage"] == report.coverage
    lines = describe_report(report).splitlines()
    assert "users.csv: 1 of 2 users (50.0%) have a row" in lines
    assert "items.csv: 2 of 3 items (66.7%) have an event" in lines
    users, items = b"user,age\n17850.0,3\n17851.0,4\n", b"item\na\nb\n"
    report, _ = run(tmp_path, write(tmp_path, events=EVENTS, users=users, items=items), SchemaConfig(profile=("age",)))
    assert not [line for line in describe_report(report).splitlines() if line.startswith(("users.csv", "items.csv"))]


def test_lists_of_parquet_are_attributes_element_by_element(tmp_path):
    tags = [["a", None, "b c"], ["rock, paper", "d"], None, []]
    items = pa.table({"item": list("wxyz"), "tags": pa.array(tags, pa.list_(pa.string()))})
    tables = write(tmp_path, events=b"user,item\nu,w\n", items=items)
    _, dataset = run(tmp_path, tables, SchemaConfig(attributes=("tags",), text=("tags",)))
    assert dataset.catalogue.attributes.tolist() == ["tags=a tags=b_c", "tags=rock,_paper tags=d", "", ""]
    assert dataset.catalogue.text.tolist() == ["a,b c", "rock, paper,d", "", ""]


SINGLE = [  # fields of the schema that need one value a row, and the table that each belongs to
    ({"user": "x"}, "events"), ({"item": "x"}, "events"), ({"service": "x", "item_service": "item"}, "events"),
    ({"action": "x"}, "events"), ({"time": "x"}, "events"), ({"context": ("x",)}, "events"),
    ({"item_id": "x"}, "items"), ({"service": "item", "item_service": "x"}, "items"),
    ({"item_numbers": ("x=1",)}, "items"), ({"profile_id": "x"}, "users"), ({"profile": ("x",)}, "users"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "file"), SINGLE, ids=lambda x: str(x))
def test_a_list_where_one_value_is_needed_is_refused(tmp_path, fields, file):
    lists = {
        "list<": pa.array([["a", "b"]]),
        "fixed_size_list<": pa.array([["a", "b"]], pa.list_(pa.string(), 2)),
        "map<": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    }
    for kind, values in lists.items():
        files = {name: pa.table({"user": ["a"], "item": ["a"], "x": values}) for name in ("events", "items", "users")}
        with pytest.raises(InputError) as error:
            run(tmp_path, write(tmp_path, **files), SchemaConfig(**fields))
        start, end = str(error.value).split(", where config.data.schema.")
        assert start.startswith(f"{file}.parquet, column x: values of type {kind}")
        assert end.endswith("needs one value a row")
    for kind in ("token_seq", "float_seq"):
        for ending in ("inter", "item", "user"):
            (tmp_path / f"a.{ending}").write_text(f"user:token\titem:token\tx:{kind}\na\ta\t1 2\n")
        tables = TablesConfig(str(tmp_path), "a.inter", items="a.item", users="a.user")
        with pytest.raises(InputError, match=rf"^a\.\w+, column x: values of type {kind}, where config\.data\.schema"):
            run(tmp_path, tables, SchemaConfig(**fields))


def test_float_ids_are_whole_and_exact_or_defects(tmp_path):
    values = [17850.0, float("nan"), None, 2.0**53 + 2, 1.5, 1e15]
    events = pa.table({"user": pa.array(values, pa.float64()), "item": list("abcdef")})
    tables = write(tmp_path, events=events)
    with pytest.raises(InputError, match=r"^events\.parquet, row 2, column user: the user is empty"):
        run(tmp_path, tables)
    report, dataset = run(tmp_path, tables, on_bad_rows="quarantine")
    assert report.quarantined == {"events.parquet": {"empty user": 2, "number that is no exact identifier": 2}}
    assert dataset.users.tolist() == ["17850", "1000000000000000"]
    rows = [json.loads(row) for row in (tmp_path / "out/quarantine.jsonl").read_text("utf-8").splitlines()]
    raw = {row["row"]: row["raw"]["user"] for row in rows}
    assert (raw[2], raw[3], float(raw[4]), raw[5], len(raw)) == ("", "", 2.0**53 + 2, "1.5", 4)
    tables = write(tmp_path, events=events.slice(4, 1))
    with pytest.raises(InputError, match=r"row 1, column user: the user 1\.5 of type double is no exact whole number$"):
        run(tmp_path, tables)


def test_missing_floats_are_missing_everywhere(tmp_path):
    nan = float("nan")
    events = pa.table({"user": ["u", "v"], "item": ["a", "b"], "wet": pa.array([1.0, nan])})
    items = pa.table({"item": ["a", "b"], "size": pa.array([nan, 7.0]), "year": pa.array([1999.0, nan])})
    users = pa.table({"user": ["u", "v"], "age": pa.array([nan, 40.0])})
    schema = SchemaConfig(context=("wet",), text=("year",), attributes=("size",), profile=("age",))
    _, dataset = run(tmp_path, write(tmp_path, events=events, items=items, users=users), schema)
    assert (dataset.context, dataset.log.context[:, 0].tolist()) == ({"wet": ("1",)}, [1, 0])
    assert dataset.catalogue.attributes.tolist() == ["", "size=7"]
    assert dataset.catalogue.text.tolist() == ["1999", ""]
    assert dataset.profile["age"].tolist() == ["", "40"]


AMOUNTS = [  # a column of each kind, its values, whether they are amounts
    ("context", ["1.5", "-3.25"], True), ("context", ["10", "20"], True), ("context", ["-1", ""], True),
    ("context", ["1", "0"], False), ("context", ["1", "rain"], False), ("context", ["", "nan"], False),
    ("attributes", ["119.88", "3"], True), ("attributes", ["1995", "1996"], False), ("attributes", ["5.0", "6"], False),
    ("attributes", ["1.5", "large"], False), ("profile", ["1.5", "3"], True), ("profile", ["34", "35"], False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "are_amounts"), AMOUNTS)
def test_amounts_are_no_categories_unless_it_is_said(tmp_path, kind, values, are_amounts):
    file = {"context": "events", "attributes": "items", "profile": "users"}[kind]
    header = {"events": b"user,item,x\n", "items": b"item,x\n", "users": b"user,x\n"}
    keys = {"events": (b"u,a", b"v,b"), "items": (b"a", b"b"), "users": (b"u", b"v")}
    files = {}
    for name, first in header.items():
        rows = [key + b"," + value.encode() + b"\n" for key, value in zip(keys[name], values, strict=True)]
        files[name] = first + b"".join(rows)
    tables, schema = write(tmp_path, **files), SchemaConfig(**{kind: ("x",)})
    if are_amounts:
        with pytest.raises(InputError, match=rf"^{file}\.csv, column x: numbers, such as {values[0]}, would be "):
            run(tmp_path, tables, schema)
        schema = dataclasses.replace(schema, categorical=("x",))
    _, dataset = run(tmp_path, tables, schema)
    found = {
        "context": list(dataset.context.get("x", ())),
        "attributes": [token.removeprefix("x=") for token in dataset.catalogue.attributes],
        "profile": dataset.profile.get("x", np.zeros(0)).tolist(),
    }[kind]
    assert found == [value for value in values if value or kind != "context"]


def test_very_many_whole_numbers_are_amounts_too(tmp_path, monkeypatch):
    monkeypatch.setattr("moerec.data.prepare.binning.MOST_CODES", 3)
    events, schema = b"user,item\nu,a\n", SchemaConfig(attributes=("price",))
    codes = [b"119", b"3", b'"7,119"', b"4"]  # no amounts, as an item has two
    for prices, is_refused in ((codes, False), ([b"119", b"3", b"7", b"3"], False), ([b"119", b"3", b"7", b"4"], True)):
        items = b"item,price\n" + b"".join(b"%c,%s\n" % (97 + k, price) for k, price in enumerate(prices))
        tables = write(tmp_path, events=events, items=items)
        if is_refused:
            with pytest.raises(InputError, match=r"^items\.csv, column price: numbers, such as 4, would be"):
                run(tmp_path, tables, schema)
            schema = dataclasses.replace(schema, categorical=("price",))
        run(tmp_path, tables, schema)


@pytest.mark.parametrize("batches", [(["1", "2", "3", "4"], ["7,8"]), (["7,8"], ["1", "2", "3", "4"])])
def test_codes_are_codes_in_whatever_order_they_come(monkeypatch, batches):
    monkeypatch.setattr("moerec.data.prepare.binning.MOST_CODES", 3)
    scan, single = AmountScan(is_whole), AmountScan(is_whole)
    for batch in batches:
        scan.add(pa.array([value.split(",") for value in batch]))
        single.add(pa.array([[value] for row in batch for value in row.split(",")]))
    assert scan.example == ""
    assert single.example == "4"


def test_the_hints_for_amounts_name_the_field_that_takes_them(tmp_path):
    tables = write(tmp_path, events=b"user,item,heat\nu,a,1.5\n", items=b"item,price\na,9.99\n")
    with pytest.raises(InputError, match=r"with config\.data\.schema\.context_edges"):
        run(tmp_path, tables, SchemaConfig(context=("heat",)))
    with pytest.raises(InputError, match=r"name it in config\.data\.schema\.item_numbers, not in attributes"):
        run(tmp_path, tables, SchemaConfig(attributes=("price",)))
    many = b"".join(b"u,a,%d\n" % k for k in range(40_000))
    tables = write(tmp_path, events=b"user,item,heat\n" + many, items=b"item,price\na,9.99\n")
    with pytest.raises(InputError, match=r"with config\.data\.schema\.context_edges"):
        run(tmp_path, tables, SchemaConfig(context=("heat",)), duplicates="keep")


def test_numbers_of_items_become_tokens_of_their_ranges(tmp_path):
    prices = ["9.99", "10", "", "19.5", "20", "1e3", "nan"]
    rows = b"".join(b"%d,x,%s\n" % (k, price.encode()) for k, price in enumerate(prices))
    tables = write(tmp_path, events=b"user,item\nu,0\n", items=b"item,kind,unit price\n" + rows)
    schema = SchemaConfig(attributes=("kind",), item_numbers=("unit price=10,20",))
    _, dataset = run(tmp_path, tables, schema)
    ranges = ["below_10", "10_to_20", "", "10_to_20", "from_20", "from_20", ""]
    assert dataset.catalogue.attributes.tolist() == [f"kind=x unit_price={x}" if x else "kind=x" for x in ranges]
    (tmp_path / "items.csv").write_bytes(b"item,kind,unit price\n0,x,cheap\n")
    with pytest.raises(InputError, match=r"^items\.csv, row 1, column unit price: cannot read 'cheap' as a number$"):
        run(tmp_path, tables, schema)


@settings(max_examples=30)
@given(numbers=st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=1, max_size=30), n=st.integers(2, 5))
def test_quantiles_cut_items_into_ranges_of_like_size(tmp_path_factory, numbers, n):
    """None is empty, and none holds more than its share and the items that are equal to its lowest edge."""
    folder = tmp_path_factory.mktemp("quantiles")
    rows = "".join(f"{k},{'' if x is None else x / 4}\n" for k, x in enumerate(numbers))
    tables = write(folder, events=b"user,item\nu,0\n", items=b"item,price\n" + rows.encode())
    schema, known = SchemaConfig(item_numbers=(f"price=quantiles:{n}",)), [x for x in numbers if x is not None]
    if len(set(known)) < 2:
        with pytest.raises(InputError, match=r"^items\.csv, column price: no two different numbers to take quantiles"):
            run(folder, tables, schema)
        return
    tokens = run(folder, tables, schema)[1].catalogue.attributes.tolist()
    ranges = {}
    for number, token in zip(numbers, tokens, strict=True):
        assert (token == "") == (number is None)
        ranges.setdefault(token, []).append(number)
    ranges.pop("", None)
    assert 2 <= len(ranges) <= n
    in_order = sorted(ranges.values(), key=min)
    for low, high in itertools.pairwise(in_order):
        assert max(low) < min(high)
    for values in in_order:
        assert len(values) <= -(-len(known) // n) + values.count(min(values))


def test_quantiles_of_different_numbers_are_equal_shares():
    numbers = np.random.default_rng(0).permutation(np.arange(100.0))
    assert find_quantiles(numbers, 4) == (25.0, 50.0, 75.0)
    assert find_quantiles(np.append(numbers, np.nan), 2) == (50.0,)
    assert find_quantiles(np.full(5, 3.0), 4) == find_quantiles(np.full(2, np.nan), 4) == ()


@pytest.mark.parametrize(
    "entries", [("p",), ("p=",), ("p=2,1",), ("p=quantiles:1",), ("p=quantiles:x",), ("=quantiles:4",),
                ("p=quantiles:99999",), ("p=1", "p=quantiles:4"), ("p=quantiles:4", "p=quantiles:3")],
    ids=" ".join,
)  # fmt: skip
def test_ranges_of_items_of_another_form_are_refused(entries):
    with pytest.raises(InputError, match=r"data\.schema\.item_numbers"):
        SchemaConfig(item_numbers=entries)


def test_fields_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.schema\.item_numbers: 'price' is in attributes, too"):
        SchemaConfig(attributes=("price",), item_numbers=("price=1",))
    with pytest.raises(InputError, match=r"data\.schema\.categorical: 'x' is no column of"):
        SchemaConfig(categorical=("x",))
    with pytest.raises(InputError, match=r"data\.schema\.categorical: 'x' is no column of"):
        SchemaConfig(context=("x",), context_edges=("x=1",), categorical=("x",))
    for name in ("a\udcff", "a\0"):
        with pytest.raises(InputError, match=r"data\.schema\.service_name: is no valid UTF-8"):
            SchemaConfig(service_name=name)
    with pytest.raises(InputError, match=r"data\.schema\.attribute_separator: must not be empty"):
        SchemaConfig(attribute_separator="")
    with pytest.raises(InputError, match=r"data\.tables\.items: .*item_numbers need an item table"):
        run(tmp_path, write(tmp_path, events=EVENTS), SchemaConfig(item_numbers=("price=1",)))


def test_a_folder_of_parts_is_prepared_anew_when_a_part_changes(tmp_path):
    folder = tmp_path / "events.parquet"
    folder.mkdir()
    pq.write_table(pa.table({"user": ["u"], "item": ["a"]}), folder / "0.parquet")
    config = DataConfig("tables", tables=TablesConfig(str(tmp_path), "events.parquet/"), n_shards=1)
    prepare(config, tmp_path / "out")
    assert is_current(config, tmp_path / "out")
    pq.write_table(pa.table({"user": ["v", "v"], "item": ["a", "b"]}), folder / "1.parquet")
    assert not is_current(config, tmp_path / "out")
    assert prepare(config, tmp_path / "out").n_events == 3


def test_one_long_id_or_field_takes_its_own_room_alone(tmp_path):
    long = "x" * 12_000
    n = 300
    events = "".join(f"{long if k == 7 else k},{long if k == 9 else k}\n" for k in range(n))
    users = "".join(f"{long if k == 7 else k},{long if k == 11 else k}\n" for k in range(n))
    tables = write(tmp_path, events=b"user,item\n" + events.encode(), users=b"user,city\n" + users.encode())
    report, dataset = run(tmp_path, tables, SchemaConfig(profile=("city",)))
    columns = (dataset.users, dataset.catalogue.ids, dataset.profile["city"])
    assert report.n_users == report.n_items == n
    for column in columns:
        assert sorted(map(len, column))[-2:] == [3, 12_000]
        assert column.nbytes < 100 * n  # references, not n strings of the longest's length
    codes, sizes = dataset.profile_codes
    known = sorted(set(dataset.profile["city"].tolist()))
    assert (codes[:, 0] - 1).tolist() == [known.index(value) for value in dataset.profile["city"]]
    assert sizes == (n + 1,)
    config = DataConfig("tables", tables=tables, schema=SchemaConfig(profile=("city",)), n_shards=1)
    (tmp_path / "run").mkdir()
    data = load_data(config, tmp_path / "run")
    assert max(map(len, data.dataset.catalogue.ids)) == 12_000
    assert len(data.digest) == len(data.items_digest) == 64


def test_columns_of_any_type_are_printed_in_the_quarantine(tmp_path):
    """Those that nobody asked for too; two of one name are no reason to fail."""
    others = {
        "view": pa.array(["p", "q"], pa.string_view()), "bytes": pa.array([b"p", b"\xff"], pa.binary_view()),
        "pair": pa.array([{"x": 1}, {"x": 2}]), "list": pa.array([[1], [2, None]]),
        "nan": pa.array([1.0, float("nan")]),
    }  # fmt: skip
    names = ["user", "item", *others, "nan"]
    table = pa.Table.from_arrays([pa.array(["u", ""]), pa.array(["a", "b"]), *others.values(), pa.array([5, 6])], names)
    report, dataset = run(tmp_path, write(tmp_path, events=table), on_bad_rows="quarantine")
    assert (dataset.users.tolist(), report.quarantined) == (["u"], {"events.parquet": {"empty user": 1}})
    (row,) = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text("utf-8").splitlines()]
    assert row["raw"] == {
        "user": "", "item": "b", "view": "q", "bytes": "\\xff", "pair": "{'x': 2}", "list": "2", "nan": "",
    }  # fmt: skip
