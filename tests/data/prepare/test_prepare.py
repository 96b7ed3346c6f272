"""Tables become the data set that a plain reading of them gives, whatever the format, the batches and the blocks."""

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.prepare import spill
from moerec.data.prepare.shards import load_dataset
from moerec.data.prepare.tables import text
from moerec.data.prepare.tables_to_shards import describe_report, is_current, prepare
from moerec.errors import InputError, WorkError
from tests.full_disk import file_size_limit

COLUMNS = ("user", "service", "item", "action", "time", "weather", "city")
WORD = st.sampled_from(["а", "b", "c c", "dé", "1"])
ROW = st.tuples(
    WORD, WORD, WORD, WORD, st.sampled_from(["", "3", "7", "7.5"]), st.sampled_from(["", "rain", "sun"]), WORD
)
ROWS = st.lists(ROW, min_size=1, max_size=40)


def schema(**more):
    return SchemaConfig(service="service", action="action", time="time", context=("weather", "city"), **more)


def read_tables(config):
    """The data set of the tables, by way of a prepared folder."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(config, Path(folder) / "prepared")
        return load_dataset(Path(folder) / "prepared")


def config(folder, interactions, columns=None, **files):
    files = {"unknown_time": "keep", "duplicates": "keep"} | files
    return DataConfig(
        "tables", tables=TablesConfig(str(folder), interactions, **files), schema=columns or schema(), n_shards=3
    )


def write_tsv(path, rows, columns=COLUMNS):
    data = "".join("\t".join(row) + "\n" for row in [columns, *rows]).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def sequences(dataset):
    """User -> events in words, through the names of the data set."""
    catalogue, log = dataset.catalogue, dataset.log
    names = {k: ["", *list(values)] for k, values in enumerate(dataset.context.values())}
    events = [
        (
            catalogue.services[catalogue.service[i]],
            catalogue.ids[i],
            dataset.actions[a],
            int(t),
            *tuple(names[k][c] for k, c in enumerate(context)),
        )
        for i, a, t, context in zip(log.item, log.action, log.time_us, log.context, strict=True)
    ]
    spans = zip(dataset.users, log.offsets[:-1], log.offsets[1:], strict=True)
    return {str(user): events[lo:hi] for user, lo, hi in spans}


def expected_sequences(rows, drop_duplicates=False):
    users, seen = {}, set()
    for user, *place, time, weather, city in rows:
        if drop_duplicates and time and (user, *place, time) in seen:
            continue
        seen.add((user, *place, time))
        users.setdefault(user, []).append((float(time) if time else None, *place, weather, city))
    for events in users.values():
        if all(event[0] is not None for event in events):
            events.sort(key=lambda event: event[0])
    return {
        user: [(*e[1:4], int(e[0] * 10**6) if e[0] is not None else int(UNKNOWN_TIME), *e[4:]) for e in events]
        for user, events in users.items()
    }


@settings(max_examples=40)
@given(rows=ROWS, refuse=st.booleans(), block_bytes=st.sampled_from([128, 1 << 20]), users=st.integers(1, 4))
def test_events_are_those_of_a_plain_reading(tmp_path_factory, rows, refuse, block_bytes, users):
    folder = tmp_path_factory.mktemp("prepare")
    write_tsv(folder / "events.tsv", rows)
    files = {"duplicates": "refuse", "on_bad_rows": "quarantine"} if refuse else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", block_bytes)
        patch.setattr(spill, "USERS_PER_BLOCK", users)
        report = prepare(config(folder, "events.tsv", **files), folder / "out")
    dataset = load_dataset(folder / "out")
    expected = expected_sequences(rows, drop_duplicates=refuse)
    assert sequences(dataset) == expected
    assert (
        report.n_events
        == sum(map(len, expected.values()))
        == len(rows) - sum(report.quarantined.get("events.tsv", {}).values())
    )
    pairs = {(user, event[0]) for user, events in expected.items() for event in events}
    assert {name: n["users"] for name, n in report.services.items()} == Counter(service for _, service in pairs)
    events = Counter(event[0] for events in expected.values() for event in events)
    assert {name: n["events"] for name, n in report.services.items()} == events


@settings(max_examples=12)
@given(rows=ROWS)
def test_every_format_gives_the_same_data_set(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("prepare")
    write_tsv(folder / "a.tsv", rows)
    write_tsv(folder / "b.tsv.gz", rows)
    write_tsv(folder / "c.inter", rows, [f"{name}:{'float' if name == 'time' else 'token'}" for name in COLUMNS])
    (folder / "d.csv").write_text("".join(",".join(f'"{v}"' for v in row) + "\n" for row in [COLUMNS, *rows]))
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    columns["time"] = pa.array([float(time) if time else None for time in columns["time"]])
    pq.write_table(pa.table(columns), folder / "e.parquet")
    datasets = [read_tables(config(folder, name)) for name in ("a.tsv", "b.tsv.gz", "c.inter", "d.csv", "e.parquet")]
    first = datasets[0]
    for other in datasets[1:]:
        assert sequences(other) == sequences(first)
        assert (other.users.tolist(), other.actions) == (first.users.tolist(), first.actions)
        assert other.catalogue.ids.tolist() == first.catalogue.ids.tolist()
        assert other.context == first.context


@settings(max_examples=12)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_the_order_of_different_users_does_not_matter(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp("prepare")
    rng = np.random.default_rng(seed)
    queues = {}
    for row in rows:
        queues.setdefault(row[0], []).append(row)
    users = rng.permutation([row[0] for row in rows])  # each user's own order stays
    write_tsv(folder / "a.tsv", rows)
    write_tsv(folder / "b.tsv", [queues[user].pop(0) for user in users])
    a, b = (read_tables(config(folder, name)) for name in ("a.tsv", "b.tsv"))
    assert sequences(a) == sequences(b)


def test_items_and_users_carry_their_tables(tmp_path):
    rows = [("u1", "toys", "9", "a", "1", "", "x"), ("u2", "food", "9", "a", "1", "", "x")]
    write_tsv(tmp_path / "events.tsv", rows)
    items = [
        ("food", "7", "green  tea", "", "dry goods, hot drink,", "acme"),
        ("toys", "9", "", "a ball", "", "ball co"),
        ("food", "9", "bread", "rye", "bread", ""),
        ("food", "8", "", "", " , ", ""),
    ]
    write_tsv(tmp_path / "items.tsv", items, ("shop", "code", "title", "more", "the tags", "brand"))
    write_tsv(tmp_path / "users.tsv", [("u3", "1", "f"), ("u2", "", "m")], ("uid", "age", "sex"))
    columns = schema(
        item_service="shop", item_id="code", text=("title", "more"), attributes=("the tags", "brand"),
        profile=("sex", "age"), profile_id="uid",
    )  # fmt: skip
    dataset = read_tables(config(tmp_path, "events.tsv", columns, items="items.tsv", users="users.tsv"))
    catalogue = dataset.catalogue
    assert catalogue.services == ("food", "toys")
    assert catalogue.offsets.tolist() == [0, 3, 4]
    assert catalogue.ids.tolist() == ["7", "9", "8", "9"]
    assert catalogue.text.tolist() == ["green  tea", "bread rye", "", "a ball"]
    assert catalogue.attributes.tolist() == [
        "the_tags=dry_goods the_tags=hot_drink brand=acme", "the_tags=bread", "", "brand=ball_co",
    ]  # fmt: skip
    assert dataset.users.tolist() == ["u1", "u2"]
    assert dataset.log.item.tolist() == [3, 1]
    assert {name: values.tolist() for name, values in dataset.profile.items()} == {"sex": ["", "m"], "age": ["", ""]}


def test_one_service_and_no_time_keep_the_published_order(tmp_path):
    write_tsv(tmp_path / "events.tsv", [("u", "b"), ("u", "a"), ("v", "b"), ("u", "b")], ("user", "item"))
    dataset = read_tables(config(tmp_path, "events.tsv", SchemaConfig(service_name="shop"), duplicates="refuse"))
    assert dataset.catalogue.services == ("shop",)
    assert dataset.actions == ("event",)
    assert dataset.log.item.tolist() == [0, 1, 0, 0]
    assert set(dataset.log.time_us.tolist()) == {int(UNKNOWN_TIME)}


def test_numbers_of_the_context_become_ranges(tmp_path):
    numbers = ["", "-10.5", "-10", "-1e0", "0", "9.99", "+10", ".5", "1e3", "NaN"]
    write_tsv(tmp_path / "events.tsv", [("u", str(n), x) for n, x in enumerate(numbers)], ("user", "item", "heat"))
    columns = SchemaConfig(context=("heat",), context_edges=("heat=-10,0,10",))
    dataset = read_tables(config(tmp_path, "events.tsv", columns))
    assert dataset.context == {"heat": ("below -10", "-10 to 0", "0 to 10", "from 10")}
    assert dataset.log.context[:, 0].tolist() == [0, 1, 2, 2, 3, 3, 4, 3, 4, 0]
    close = ("1577836800", "1577836900", "1577837000.5")
    write_tsv(tmp_path / "events.tsv", [("u", str(n), x) for n, x in enumerate(close)], ("user", "item", "heat"))
    columns = SchemaConfig(context=("heat",), context_edges=(f"heat={','.join(close)}",))
    dataset = read_tables(config(tmp_path, "events.tsv", columns))
    assert dataset.context["heat"][1:3] == ("1577836800 to 1577836900", "1577836900 to 1577837000.5")
    assert dataset.log.context[:, 0].tolist() == [2, 3, 4]


@pytest.mark.parametrize("word", ["warm", "-nan", "inf", "1,5", "0x10", "1 0", "1e999"])
def test_what_is_no_number_is_a_defect_of_its_row(tmp_path, word):
    rows = [("u", "a", "1"), ("u", "b", word), ("u", "c", "")]
    write_tsv(tmp_path / "events.tsv", rows, ("user", "item", "heat"))
    columns = SchemaConfig(context=("heat",), context_edges=("heat=0",))
    with pytest.raises(InputError, match=r"events\.tsv, row 2, column heat: cannot read .* as a number"):
        read_tables(config(tmp_path, "events.tsv", columns))
    kept = read_tables(config(tmp_path, "events.tsv", columns, on_bad_rows="quarantine"))
    assert kept.log.context[:, 0].tolist() == [2, 0]


@pytest.mark.parametrize(
    "edges", [("heat",), ("heat=",), ("heat=a",), ("heat=1,1",), ("heat=2,1",), ("heat=0,inf",), ("heat=nan",),
              ("=1",), ("other=1",), ("heat=1", "heat=2")],
    ids=" ".join,
)  # fmt: skip
def test_edges_of_another_form_are_refused(edges):
    with pytest.raises(InputError, match=r"data\.schema\.context_edges"):
        SchemaConfig(context=("heat",), context_edges=edges)


def test_columns_that_are_not_there_are_named_before_any_work(tmp_path):
    write_tsv(tmp_path / "events.tsv", [("u", "b")], ("user", "item"))
    cases = [
        (SchemaConfig(time="when"), {}, "events.tsv, header, column when: no such column (config.data.schema.time)"),
        (
            SchemaConfig(context=("sky",)),
            {},
            "events.tsv, header, column sky: no such column (config.data.schema.context)",
        ),
        (
            SchemaConfig(text=("t",)),
            {"items": "events.tsv"},
            "events.tsv, header, column t: no such column (config.data.schema.text)",
        ),
        (SchemaConfig(text=("t",)), {}, "config.data.tables.items: "),
        (SchemaConfig(profile=("t",)), {}, "config.data.tables.users: "),
        (SchemaConfig(item_service="item"), {"items": "events.tsv"}, "config.data.schema.item_service: "),
    ]
    for columns, files, message in cases:
        with pytest.raises(InputError) as error:
            prepare(config(tmp_path, "events.tsv", columns, **files), tmp_path / "out")
        assert str(error.value).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["events.tsv"]


KILLED = """
import sys, time
from pathlib import Path
from moerec.config import DataConfig, SchemaConfig, TablesConfig
from moerec.data.prepare import shards
from moerec.data.prepare.tables_to_shards import prepare
write, spot = {target}, sys.argv[1]
def stop(*arguments):
    write(*arguments)
    print("half way", flush=True)
    time.sleep(60)
{target} = stop
config = DataConfig("tables", tables=TablesConfig(spot, "events.tsv"), schema=SchemaConfig(time="time"))
prepare(config, Path(spot) / "out")
"""


@pytest.mark.parametrize(("target", "old"), [("shards.ShardWriter.write", True), ("shards.write_meta", False)])
def test_a_killed_run_leaves_nothing_that_reads_as_whole(tmp_path, target, old):
    events = config(tmp_path, "events.tsv", SchemaConfig(time="time"))
    if old:
        write_tsv(tmp_path / "events.tsv", [("u", "a", "1")], ("user", "item", "time"))
        prepare(events, tmp_path / "out")
    write_tsv(tmp_path / "events.tsv", [("u", "a", "1"), ("v", "b", "2")], ("user", "item", "time"))
    command = [sys.executable, "-c", KILLED.format(target=target), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout.readline() == b"half way\n"
        run.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob("out.partial-*"))) == 1
    if old:
        assert load_dataset(tmp_path / "out").log.n_events == 1
    else:
        with pytest.raises(InputError, match=r"no meta\.json"):
            load_dataset(tmp_path / "out")
    prepare(events, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.tsv", "out"]
    assert load_dataset(tmp_path / "out").log.n_events == 2


@pytest.mark.parametrize(
    ("n_bytes", "files", "name"),
    [
        (20_000, {}, r"spill/block-000000\.bin"),
        (200_000, {"on_bad_rows": "quarantine", "duplicates": "refuse"}, r"quarantine\.jsonl"),
    ],
)
def test_a_full_disk_is_told_in_one_line(tmp_path, n_bytes, files, name):
    write_tsv(tmp_path / "events.tsv", [("u", "a", "1")] * 4000, ("user", "item", "time"))
    events = config(tmp_path, "events.tsv", SchemaConfig(time="time"), **files)
    message = rf"/{name}: cannot be written: File too large"
    with pytest.raises(WorkError, match=message) as error, file_size_limit(n_bytes):
        prepare(events, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["events.tsv"]


def test_a_folder_of_another_version_is_prepared_anew(tmp_path):
    write_tsv(tmp_path / "events.tsv", [("u", "a", "1")], ("user", "item", "time"))
    events = config(tmp_path, "events.tsv", SchemaConfig(time="time"))
    prepare(events, tmp_path / "out")
    assert is_current(events, tmp_path / "out")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    (tmp_path / "out/meta.json").write_text(json.dumps(meta | {"format_version": 1}))
    assert not is_current(events, tmp_path / "out")
    with pytest.raises(InputError, match=r"meta\.json: format version 1, not 2; prepare again"):
        load_dataset(tmp_path / "out")


CONFIG = """
from moerec.config import Config, DataConfig, SchemaConfig, TablesConfig
def get_config():
    tables = TablesConfig({folder!r}, "events.tsv")
    return Config(data=DataConfig("tables", tables=tables, schema=SchemaConfig(time="time")))
"""


def test_the_command_prints_counts_and_tells_bad_input(tmp_path, capsys):
    from experiments.prepare import main
    from moerec.config import cli

    write_tsv(tmp_path / "events.tsv", [("u", "a", "1"), ("v", "b", "x")], ("user", "item", "time"))
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(tmp_path)))

    def run(*flags):
        extra = {"out": ("", "folder")}
        code = cli.execute(
            main, ["prepare", f"--config={tmp_path}/config.py", *flags], extra_flags=extra, workdir=False
        )
        return code, capsys.readouterr()

    out = f"--out={tmp_path}/out"
    code, printed = run(out)
    assert code == 2
    assert "events.tsv, row 2, column time: cannot read 'x' as seconds" in printed.err
    code, printed = run(out, "--config.data.tables.on_bad_rows=quarantine", "--json")
    assert code == 0
    assert "quarantined from events.tsv: 1 row, unparsable time" in printed.out
    assert json.loads(printed.out.splitlines()[-1])["quarantined"] == {"events.tsv": {"unparsable time": 1}}
    assert run()[0] == 2


def test_parquet_of_types_that_are_no_text_is_named(tmp_path):
    def write(**columns):
        plain = {"user": ["u"], "item": ["a"], "service": ["s"], "action": ["buy"], "time": [1], "weather": [""]}
        pq.write_table(pa.table({**plain, "city": [""], **columns}), tmp_path / "events.parquet")

    write(item=pa.array([{"x": 1}]))
    with pytest.raises(InputError, match=r"events\.parquet, column item: values of type struct"):
        read_tables(config(tmp_path, "events.parquet"))
    write(time=pa.array([{"x": 1}]))
    with pytest.raises(InputError, match=r"events\.parquet.*column time"):
        read_tables(config(tmp_path, "events.parquet"))


def test_no_service_is_called_as_the_sum_of_all(tmp_path):
    write_tsv(tmp_path / "events.tsv", [("u", "all", "1", "buy", "5", "", "")])
    with pytest.raises(InputError, match=r'events\.tsv, column service: no service can be called "all"'):
        prepare(config(tmp_path, "events.tsv"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_long_text_takes_its_own_room_alone(tmp_path):
    write_tsv(tmp_path / "events.tsv", [("u", "food", "1", "buy", "5", "", "")])
    write_tsv(tmp_path / "items.tsv", [("food", "1", "x" * 100_000), ("food", "2", "y")], ("shop", "code", "title"))
    columns = schema(item_service="shop", item_id="code", text=("title",))
    catalogue = read_tables(config(tmp_path, "events.tsv", columns, items="items.tsv")).catalogue
    assert list(map(len, catalogue.text)) == [100_000, 1]
    assert catalogue.text.nbytes < 1000  # references, not two strings of the longest's length


REAL = {
    "amazon3": (
        TablesConfig(items="items.tsv.gz"),
        SchemaConfig(
            service="domain", time="day", time_unit="day", item_id="s3_item", text=("text",),
            attributes=("s3_attributes",),
        ),
        {"beauty": (22363, 12101, 198502), "sports": (35598, 18357, 296337), "toys": (19412, 11924, 167597)},
    ),
    "yelp": (
        TablesConfig(items="items.tsv.gz", unknown_time="keep"),
        SchemaConfig(time="unix_ts", text=("title",), attributes=("categories",)),
        {"items": (30431, 20033, 316354)},
    ),
    "ml100k": (
        TablesConfig(interactions="ml-100k.inter.gz", items="ml-100k.item.gz", users="ml-100k.user.gz"),
        SchemaConfig(
            user="user_id", item="item_id", time="timestamp", context=("rating",), item_id="item_id",
            text=("movie_title",), attributes=("class",), profile=("age", "gender"), profile_id="user_id",
            categorical=("rating",),
        ),
        {"items": (943, 1682, 100000)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_tables_have_the_published_counts_and_sequences(data_dir, tmp_path, name):
    files, columns, counts = REAL[name]
    files.folder = str(data_dir / name)
    report = prepare(DataConfig("tables", tables=files, schema=columns), tmp_path / "out")
    assert {z: tuple(n.values()) for z, n in report.services.items()} == counts
    assert report.quarantined == {}
    assert report.n_events == sum(n[2] for n in counts.values())
    assert "written in" in describe_report(report)
    dataset = load_dataset(tmp_path / "out")
    with gzip.open(data_dir / name / files.interactions, "rt", encoding="utf-8") as file:
        names, *rows = (line.rstrip("\n").split("\t") for line in file)
    at = {column.split(":")[0]: k for k, column in enumerate(names)}
    users = {}
    for row in rows:
        users.setdefault(row[at[columns.user]], []).append(row)
    if name == "amazon3":
        kinds = Counter(len({row[at["domain"]] for row in events}) for events in users.values())
        assert (kinds[2], kinds[3]) == (3209, 741)
    log, ids = dataset.log, dataset.catalogue.ids[dataset.log.item].tolist()
    for p in range(0, log.n_users, max(1, log.n_users // 500)):
        events = users[dataset.users[p]]
        if all(row[at[columns.time]] for row in events):
            events = sorted(events, key=lambda row: float(row[at[columns.time]]))
        assert ids[log.offsets[p] : log.offsets[p + 1]] == [row[at[columns.item]] for row in events]
