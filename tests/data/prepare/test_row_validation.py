"""Every defect is named with file, row and column; in quarantine the same rows go aside, and the others go on."""

import dataclasses
import json

import numpy as np
import pytest

from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.prepare.shards import load_dataset
from moerec.data.prepare.tables_to_shards import prepare
from moerec.errors import InputError

ITEMS = b"service\titem\ttext\nfood\t1\tbread\nfood\t2\ttea\ntoys\t1\tball\n"
USERS = b"user\tage\nanna\t30\nboris\t40\n"
DAY_US = 86_400_000_000
GOOD = b"anna\tfood\t1\tbuy\t3"


def config(folder, **tables):
    columns = {"service": "service", "action": "action", "time": "day", "time_unit": "day"}
    schema = SchemaConfig(text=("text",), profile=("age",), **columns)
    files = TablesConfig(str(folder), "events.tsv", items="items.tsv", users="users.tsv", **tables)
    return DataConfig(source="tables", tables=files, schema=schema, n_shards=2)


def write(folder, lines, items=ITEMS, users=USERS):
    (folder / "events.tsv").write_bytes(b"\n".join([b"user\tservice\titem\taction\tday", *lines, b""]))
    (folder / "items.tsv").write_bytes(items)
    (folder / "users.tsv").write_bytes(users)
    return config(folder)


DEFECTS = [  # a bad row of the interactions, the message after "row 3, ", and the reason
    (b"anna\tfood\t1\tbuy\t12x", "column day: cannot read '12x' as days (data.schema.time_unit)", "unparsable time"),
    (
        b"anna\tfood\t1\tbuy\t1500000000000",
        "column day: cannot read '1500000000000' as days (data.schema.time_unit)",
        "unparsable time",
    ),
    (b"anna\tfood\t1\tbuy\t", "column day: the time is empty", "empty time"),
    (b"anna\tfood\t9\tbuy\t5", "column item: the item table has no item '9' of this service", "unknown item"),
    (b"anna\ttoys\t2\tbuy\t5", "column item: the item table has no item '2' of this service", "unknown item"),
    (b"anna\tbooks\t1\tbuy\t5", "column service: the item table has no service 'books'", "unknown service"),
    (b"anna\t\t1\tbuy\t5", "column service: the service is empty", "empty service"),
    (b"\tfood\t1\tbuy\t5", "column user: the user is empty", "empty user"),
    (b"anna\tfood\t\tbuy\t5", "column item: the item is empty", "empty item"),
    (b"anna\tfood\t1\0\tbuy\t5", "column item: the item '1\\x00' holds a NUL character", "NUL character"),
    (b"anna\tfood\t1\t\t5", "column action: the action is empty", "empty action"),
    (b"an\xffna\tfood\t1\tbuy\t5", "column user: bad UTF-8 in 'an\\\\xffna'", "bad UTF-8"),
    (b"anna\tfood\t1\tbuy", "4 fields, the header has 5", "wrong number of fields"),
    (b"anna\tfood\t\xff\tbuy\t5\t6", "6 fields, the header has 5", "wrong number of fields"),
    (GOOD, "column user, service, item, action, day: the same event as row 1", "duplicate event"),
]


@pytest.mark.parametrize(("line", "message", "reason"), DEFECTS)
def test_a_bad_row_is_an_error_or_goes_to_quarantine(tmp_path, line, message, reason):
    lines = [GOOD, b"boris\ttoys\t1\tbuy\t4", line, b"boris\tfood\t2\tbuy\t5"]
    events = write(tmp_path, lines)
    with pytest.raises(InputError) as error:
        prepare(events, tmp_path / "out")
    assert str(error.value) == f"events.tsv, row 3, {message}"
    assert not (tmp_path / "out").exists()

    report = prepare(config(tmp_path, on_bad_rows="quarantine"), tmp_path / "out")
    assert report.quarantined == {"events.tsv": {reason: 1}}
    (aside,) = [json.loads(row) for row in (tmp_path / "out/quarantine.jsonl").read_text("utf-8").splitlines()]
    assert (aside["file"], aside["row"], aside["reason"]) == ("events.tsv", 3, reason)
    raw = aside["raw"] if isinstance(aside["raw"], str) else "\t".join(aside["raw"].values())
    assert raw == line.decode("utf-8", "backslashreplace")
    write(tmp_path, [*lines[:2], *lines[3:]])
    prepare(config(tmp_path), tmp_path / "clean")
    with_bad, clean = load_dataset(tmp_path / "out"), load_dataset(tmp_path / "clean")
    for name in ("offsets", "item", "action", "time_us"):
        np.testing.assert_array_equal(getattr(with_bad.log, name), getattr(clean.log, name))
    assert with_bad.users.tolist() == clean.users.tolist()
    assert with_bad.actions == clean.actions


TABLE_DEFECTS = [  # file, its contents, the message, the reason
    ("items.tsv", ITEMS + b"food\t2\tagain\n", "row 4, column item: '2' has an earlier row", "duplicate item"),
    ("items.tsv", ITEMS + b"\t3\tx\n", "row 4, column service: the service is empty", "empty service"),
    ("items.tsv", ITEMS + b"food\t\tx\n", "row 4, column item: the item is empty", "empty item"),
    ("items.tsv", ITEMS + b"food\t3\t\xc3\n", "row 4, column text: bad UTF-8 in '\\\\xc3'", "bad UTF-8"),
    ("items.tsv", ITEMS + b"food\t3\n", "row 4, 2 fields, the header has 3", "wrong number of fields"),
    ("users.tsv", USERS + b"anna\t31\n", "row 3, column user: 'anna' has an earlier row", "duplicate user"),
    ("users.tsv", USERS + b"\t31\n", "row 3, column user: the user is empty", "empty user"),
    ("users.tsv", USERS + b"c\t\xff\n", "row 3, column age: bad UTF-8 in '\\\\xff'", "bad UTF-8"),
]


@pytest.mark.parametrize(("file", "data", "message", "reason"), TABLE_DEFECTS)
def test_bad_rows_of_the_other_tables(tmp_path, file, data, message, reason):
    write(tmp_path, [GOOD], **{file.removesuffix(".tsv"): data})
    with pytest.raises(InputError) as error:
        prepare(config(tmp_path), tmp_path / "out")
    assert str(error.value) == f"{file}, {message}"
    report = prepare(config(tmp_path, on_bad_rows="quarantine"), tmp_path / "out")
    assert report.quarantined == {file: {reason: 1}}
    assert report.n_items == 3
    assert load_dataset(tmp_path / "out").catalogue.text.tolist() == ["bread", "tea", "ball"]
    assert load_dataset(tmp_path / "out").profile["age"].tolist() == ["30"]


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        (b'food,3,x,"\xd0\xb4\xd0\xb0 open\n', "note"),
        (b'food,3,x,"open\nfood,4,y,z\n', "note"),
        (b'food,3,"open,x\nfood,4,y",z\n', "text"),
    ],
)
def test_an_open_quote_does_not_swallow_rows(tmp_path, rows, column):
    """Whichever column it is in, read or not; texts that do have lines may be kept."""
    (tmp_path / "events.csv").write_bytes(b"user,service,item\nanna,food,1\nanna,food,2\nboris,food,1\n")
    (tmp_path / "items.csv").write_bytes(b"service,item,text,note\nfood,1,a,b\nfood,2,c,d\n" + rows)
    files = TablesConfig(str(tmp_path), "events.csv", items="items.csv")
    config = DataConfig(
        source="tables", tables=files, schema=SchemaConfig(service="service", text=("text",)), n_shards=1
    )
    with pytest.raises(
        InputError, match=rf"^items\.csv, row 3, column {column}: '(да )?open.*is a quote not closed\?$"
    ):
        prepare(config, tmp_path / "out")
    aside = dataclasses.replace(config, tables=dataclasses.replace(files, on_bad_rows="quarantine"))
    assert prepare(aside, tmp_path / "aside").quarantined == {"items.csv": {"value of several lines": 1}}
    (tmp_path / "items.csv").write_bytes(b'service,item,text,note\nfood,1,"a\nb",b\nfood,2,c,d\n')
    kept = dataclasses.replace(config, tables=dataclasses.replace(files, line_breaks="keep"))
    prepare(kept, tmp_path / "kept")
    assert load_dataset(tmp_path / "kept").catalogue.text.tolist() == ["a\nb", "c"]


def test_the_lowest_row_is_named_whatever_its_defect_and_the_others_are_counted(tmp_path):
    lines = [GOOD, GOOD, b"anna\tfood\t1\tbuy\tx", b"short", b"boris\tfood\t1\tbuy\tx", GOOD]
    with pytest.raises(InputError) as error:
        prepare(write(tmp_path, lines), tmp_path / "out")
    assert str(error.value) == (
        "events.tsv, row 2, column user, service, item, action, day: the same event as row 1 "
        "(bad rows in all: 5: 2 duplicate event, 2 unparsable time, 1 wrong number of fields)"
    )


def test_every_bad_row_of_every_kind_goes_aside_in_order(tmp_path):
    lines = [GOOD, *(line for line, _, _ in DEFECTS)]
    write(tmp_path, lines)
    report = prepare(config(tmp_path, on_bad_rows="quarantine"), tmp_path / "out")
    assert (report.n_events, sum(report.quarantined["events.tsv"].values())) == (1, len(DEFECTS))
    rows = [json.loads(row) for row in (tmp_path / "out/quarantine.jsonl").read_text("utf-8").splitlines()]
    assert {row["row"]: row["reason"] for row in rows} == {k: d[2] for k, d in enumerate(DEFECTS, 2)}
    meta = json.loads((tmp_path / "out/meta.json").read_text("utf-8"))
    assert meta["extra"]["quarantined"] == report.quarantined


def test_nothing_left_is_an_error_in_quarantine_too(tmp_path):
    write(tmp_path, [b"short", b""])
    with pytest.raises(InputError, match=r"^events\.tsv: no good row is left"):
        prepare(config(tmp_path, on_bad_rows="quarantine"), tmp_path / "out")


def test_duplicates_and_unknown_times_may_be_kept(tmp_path):
    lines = [GOOD, b"anna\tfood\t2\tbuy\t", b"anna\tfood\t2\tbuy\t", GOOD, b"anna\ttoys\t1\tbuy\t1"]
    write(tmp_path, lines)
    prepare(config(tmp_path, duplicates="keep", unknown_time="keep"), tmp_path / "out")
    log = load_dataset(tmp_path / "out").log
    assert log.item.tolist() == [0, 1, 1, 0, 2]  # published order, since two times are unknown
    assert log.time_us.tolist() == [3 * DAY_US, UNKNOWN_TIME, UNKNOWN_TIME, 3 * DAY_US, DAY_US]
    with pytest.raises(InputError, match=r"row 4, .*the same event as row 1$"):  # unknown times are never the same
        prepare(config(tmp_path, unknown_time="keep"), tmp_path / "out")
