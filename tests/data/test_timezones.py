"""Clocks of time zones against the standard library, event by event, and where their names come from."""

import dataclasses
import datetime
import types
import zoneinfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import prepare
from moerec.config import Config, DataConfig, SchemaConfig, TablesConfig
from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.load import load_data, make_reader
from moerec.data.timezones import find_utc_offsets_in, find_zones
from moerec.errors import InputError

ZONES = ("UTC", "Europe/Moscow", "Asia/Yekaterinburg", "Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe")
TIMES = st.integers(-1_200_000_000, 2**31 - 1)  # from 1931, about as far back as the model's times reach


def shift_by_hand(zone: str, time: int) -> int:
    moment = datetime.datetime.fromtimestamp(time, zoneinfo.ZoneInfo(zone))
    return int(moment.utcoffset().total_seconds())


@given(st.sampled_from(ZONES), st.lists(TIMES, max_size=20))
def test_shifts_are_those_of_the_standard_library(zone, times):
    found = find_utc_offsets_in(zone, np.array(times, np.int64))
    assert found.tolist() == [shift_by_hand(zone, time) for time in times]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Australia/Lord_Howe", "Europe/Moscow"])
def test_a_day_on_which_clocks_change_is_cut_where_they_do(zone):
    day = {"Europe/Berlin": (2024, 3, 31), "Australia/Lord_Howe": (2024, 4, 6), "Europe/Moscow": (2014, 10, 25)}[zone]
    start = int(datetime.datetime(*day, tzinfo=datetime.UTC).timestamp())
    times = start + 60 * np.arange(2 * 1440)
    utc_offsets = find_utc_offsets_in(zone, times)
    assert utc_offsets.tolist() == [shift_by_hand(zone, int(time)) for time in times]
    assert len(set(utc_offsets.tolist())) == 2


ROWS = """\
user\titem\ttime\tcity
u\ta\t1711846799\tberlin
u\tb\t1711850400\tmoscow
u\ta\t1711854000\t
u\tb\t1711857600\tnowhere
v\tb\t1711846799\tmoscow
v\ta\t\tberlin
v\ta\t253402214400\tberlin
"""


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "events.tsv").write_text(ROWS)
    (tmp_path / "users.tsv").write_text("user\thome\nu\tmoscow\nv\tberlin\n")
    return DataConfig(
        source="tables",
        tables=TablesConfig(str(tmp_path), "events.tsv", users="users.tsv", unknown_time="keep", duplicates="keep"),
        schema=SchemaConfig(time="time", context=("city",), profile=("home",)),
    )


def load(config: DataConfig, folder, **schema):
    return load_data(dataclasses.replace(config, schema=dataclasses.replace(config.schema, **schema)), folder / "run")


def test_zones_go_by_the_city_of_the_event_or_of_the_user_or_are_everybodys(config, tmp_path):
    zones = ("berlin=Europe/Berlin", "moscow=Europe/Moscow")
    by_event = load(config, tmp_path, zone_column="city", zones=zones).dataset.log
    # The first is a second before clocks in Berlin change; missing and other cities have the common zone, and times
    # that are not known, or in the year 9999, none.
    assert by_event.utc_offset.tolist() == [3600, 10800, 0, 0, 10800, 0, 0]
    assert by_event.time_us[-2] == UNKNOWN_TIME
    by_user = load(config, tmp_path, zone_column="home", zones=zones).dataset.log
    assert by_user.utc_offset.tolist() == [10800] * 4 + [3600, 0, 0]
    everybody = load(config, tmp_path, zone="Asia/Kathmandu").dataset.log
    assert everybody.utc_offset.tolist() == [20700] * 5 + [0] * 2
    assert load(config, tmp_path).dataset.log.utc_offset.tolist() == [0] * 7


def test_iso_times_that_are_read_as_utc_are_told_where_clocks_are_not(tmp_path):
    """With a space or a T; those that name an offset are told of otherwise."""
    told = "column time: its times, which name no offset, are read as UTC; clocks are those of Asia/Tokyo"
    base = DataConfig(source="tables", tables=TablesConfig(str(tmp_path), "events.tsv"))
    for offset, expected in (("", told), ("Z", told), ("+09:00", "no zones are used")):
        rows = [f"u\t{i}\t2024-05-0{k}{between}09:00{offset}" for i, k, between in (("a", 1, " "), ("b", 2, "T"))]
        (tmp_path / "events.tsv").write_text("\n".join(["user\titem\ttime", *rows]) + "\n")
        config = dataclasses.replace(base, schema=SchemaConfig(time="time", time_unit="iso"))
        data = load(config, tmp_path / f"run{offset}", zone="Asia/Tokyo")
        assert expected in data.notes[-1]
        assert not load(config, tmp_path / f"utc{offset}").notes
    seconds = ["u\ta\t1711846799", "u\tb\t1711850400"]
    (tmp_path / "events.tsv").write_text("\n".join(["user\titem\ttime", *seconds]) + "\n")
    config = dataclasses.replace(base, schema=SchemaConfig(time="time"))
    assert not load(config, tmp_path / "seconds", zone="Asia/Tokyo").notes


def test_events_without_an_entry_are_counted_and_named(config, tmp_path):
    """By the city of the event or of the user; another common zone than UTC is meant for them."""
    line = "config.data.schema.zones: {} of 7 events have UTC, as there is no entry for {}"
    for column, zones, told in (
        ("city", ("berlin=Europe/Berlin", "moscow=Europe/Moscow"), line.format(2, "city 'nowhere', no value")),
        ("city", ("nowhere=Europe/Berlin",), line.format(6, "city 'berlin', 'moscow', no value")),
        ("home", ("berlin=Europe/Berlin",), line.format(4, "home 'moscow'")),
        ("home", ("berlin=Europe/Berlin", "moscow=Europe/Moscow"), None),
    ):
        data = load(config, tmp_path, zone_column=column, zones=zones)
        far = data.notes[:1]  # the year 9999
        assert "far-off times" in far[0]
        assert data.notes == (far if told is None else (*far, told))
        assert load(config, tmp_path, zone="Asia/Tokyo", zone_column=column, zones=zones).notes == far


def test_prepare_names_the_places_without_a_zone(config, tmp_path, capsys):
    zones = ("berlin=Europe/Berlin", "moscow=Europe/Moscow")
    schema = dataclasses.replace(config.schema, zone_column="city", zones=zones)
    flags = types.SimpleNamespace(out=str(tmp_path / "out"))
    report = prepare.main(Config(data=dataclasses.replace(config, schema=schema)), flags)
    line = "config.data.schema.zones: 2 of 7 events have UTC, as there is no entry for city 'nowhere', no value"
    assert report["notes"][-1] == line
    assert line in capsys.readouterr().out.splitlines()


def test_zones_give_way_to_the_offsets_that_times_name_and_a_line_says_so(config, tmp_path):
    rows = [
        f"u\ta\t2024-05-0{day}T09:00{offset}\tberlin" for day, offset in ((1, "+03:00"), (2, "+00:00"), (3, "-05:00"))
    ]
    (tmp_path / "events.tsv").write_text("\n".join(["user\titem\ttime\tcity", *rows, ""]))
    plain = load(config, tmp_path, time_unit="iso")
    data = load(config, tmp_path, time_unit="iso", zone_column="city", zones=("berlin=Europe/Berlin",))
    assert data.dataset.log.utc_offset.tolist() == plain.dataset.log.utc_offset.tolist() == [10800, 0, -18000]
    assert data.zones is None
    assert plain.notes == ()
    assert data.notes == ("config.data.schema: no zones are used, as the times name the offsets of their own clocks",)


def test_the_clock_of_a_new_user_is_that_of_their_fields_and_nobody_elses(config, tmp_path):
    zones = ("berlin=Europe/Berlin", "moscow=Europe/Moscow")
    schema = dataclasses.replace(config.schema, zone_column="home", zones=zones)
    found = find_zones(load(config, tmp_path, zone_column="home", zones=zones).dataset, schema)
    winter, somebody, no_context = np.array([1704067200]) * 10**6, np.zeros(1, int), np.zeros((1, 1), int)
    for fields, hours in (({}, 0), ({"home": "berlin"}, 1), ({"home": "moscow"}, 3), ({"home": "oslo"}, 0)):
        own = found.of_somebody(schema, fields)
        assert own.find_utc_offsets(somebody, winter, no_context).tolist() == [3600 * hours]


@pytest.mark.parametrize("column", ["city", "home"])
def test_shards_and_memory_have_the_same_clocks(config, tmp_path, column):
    zones = ("berlin=Europe/Berlin", "moscow=Europe/Moscow")
    data = load(config, tmp_path, zone_column=column, zones=zones)
    schema = dataclasses.replace(config.schema, zone_column=column, zones=zones)
    utc_offsets = []
    for reader in ("memory", "shards"):
        own = dataclasses.replace(config, schema=schema, reader=reader)
        log, start = make_reader(own, data).fetch(np.array([1, 0]))
        utc_offsets.append([log.utc_offset[lo : lo + n].tolist() for lo, n in zip(start, (1, 2), strict=True)])
    assert (
        utc_offsets[0] == utc_offsets[1] == ([[10800], [3600, 10800]] if column == "city" else [[3600], [10800, 10800]])
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"zone": "Moscow"}, "zone"),
        ({"zone": "../etc/passwd"}, "zone"),
        ({"zone_column": "city", "zones": ("berlin=Berlin",)}, "zones"),
        ({"zone_column": "city", "zones": ("berlin",)}, "zones"),
        ({"zone_column": "city", "zones": ("berlin=Europe/Paris", "berlin=Europe/Rome")}, "zones"),
        ({"zone_column": "city"}, "zones"),
        ({"zones": ("berlin=Europe/Berlin",)}, "zones"),
    ],
)
def test_what_is_no_zone_is_refused(fields, field):
    with pytest.raises(InputError, match=rf"data\.schema\.{field}: "):
        SchemaConfig(**fields)


def test_a_column_or_value_that_nobody_has_is_refused(config, tmp_path):
    for source in ("tables", "prepared"):
        folder = {"prepared": str(tmp_path / "run" / "data")} if source == "prepared" else {}
        own = dataclasses.replace(config, source=source, **folder)
        with pytest.raises(InputError, match=r"data\.schema\.zone_column: 'town' is no column"):
            load(own, tmp_path, zone_column="town", zones=("berlin=Europe/Berlin",))
        assert (tmp_path / "run" / "data").exists() == (source == "prepared")
        load(config, tmp_path)
    for column in ("city", "home"):
        with pytest.raises(InputError, match=rf"data\.schema\.zones: {column} is never 'paris'"):
            load(config, tmp_path, zone_column=column, zones=("paris=Europe/Paris",))


def test_zones_are_no_reason_to_prepare_tables_anew(config, tmp_path):
    load(config, tmp_path)
    kept = (tmp_path / "run" / "data" / "meta.json").stat().st_mtime_ns
    load(config, tmp_path, zone="Asia/Kathmandu")
    assert (tmp_path / "run" / "data" / "meta.json").stat().st_mtime_ns == kept
