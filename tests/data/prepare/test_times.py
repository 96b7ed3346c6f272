"""Columns of times against the standard library: every unit and type, to the microsecond, and with their own clocks."""

import datetime
import decimal
import json
import zoneinfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.config import DataConfig, SchemaConfig, SplitConfig, TablesConfig
from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.load import load_data
from moerec.data.prepare.shards import load_dataset
from moerec.data.prepare.tables_to_shards import prepare
from moerec.data.prepare.times import castable, parse_times
from moerec.data.splits import gather_histories, shuffle_ties
from moerec.errors import InputError
from moerec.eval.audit import prepare_subject

STAMPS = st.datetimes(datetime.datetime(1, 1, 2), datetime.datetime(9999, 12, 30))
EPOCH = datetime.datetime(1970, 1, 1)


@given(stamps=st.lists(STAMPS, min_size=1, max_size=20), hours=st.integers(-11, 11))
def test_times_are_those_of_the_standard_library(stamps, hours):
    micros = [(stamp - EPOCH) // datetime.timedelta(microseconds=1) for stamp in stamps]
    zone = datetime.timezone(datetime.timedelta(hours=hours))
    shift = hours * 3_600_000_000
    days = [t - t % 86_400_000_000 for t in micros]
    cases = [
        (pa.array([stamp.isoformat().encode() for stamp in stamps]), "iso", micros),
        (pa.array([stamp.isoformat(" ").encode() for stamp in stamps]), "iso", micros),
        (pa.array([stamp.replace(tzinfo=zone).isoformat() for stamp in stamps]), "iso", [t - shift for t in micros]),
        (pa.array([stamp.isoformat(timespec="microseconds") + "789" for stamp in stamps]), "iso", micros),
        (pa.array([str(stamp.date()).encode() for stamp in stamps]), "iso", days),
        (pa.array(stamps, pa.timestamp("us")), "s", micros),
        (pa.array([str(t // 10**6).encode() for t in micros]), "s", [t - t % 10**6 for t in micros]),
        (pa.array([t // 10**3 for t in micros]), "ms", [t - t % 10**3 for t in micros]),
        (pa.array([stamp.date() for stamp in stamps], pa.date32()), "s", days),
        (pa.array([stamp.date() for stamp in stamps], pa.date64()), "s", days),
        (pa.array([t // 10**6 for t in micros], pa.timestamp("s")), "ms", [t - t % 10**6 for t in micros]),
        (pa.array([decimal.Decimal(t).scaleb(-6) for t in micros], pa.decimal128(20, 6)), "s", micros),
    ]
    for values, unit, expected in cases:
        found = parse_times(values, unit)
        if pa.types.is_decimal(values.type):  # by way of floats, which are whole microseconds around our time alone
            assert np.abs(found.time_us - expected).max() <= 32
        else:
            assert found.time_us.tolist() == expected, (values.type, unit)
        assert not found.is_bad.any(), (values.type, unit)


@pytest.mark.parametrize(
    ("unit", "bad", "good"),
    [
        (
            "s",
            ["12x", " 1", "0x10", "1e400", "--1", "nan", "999999999999", "1.2.3", "1e9", "1.43E+09", "1.5e+9"],
            ["-5", "1.5", "1.430000000e9", "007", "1.43294000012E+09", "15e0"],
        ),
        ("ms", ["999999999999999999", "1.43E+12"], ["1500000000000"]),
        ("day", ["2019-01-01", "99999999"], ["15265", "-1"]),
        (
            "iso",
            [
                "2019-02-30", "2019-13-01", "15265", "2019-01-01T25:00", "19-01-01", "2019-01-01T10:00+25:00",
                "2019-01-01T10:00-18:01", "2019-01-01+03", "2019-01-01T10:00+3",
            ],
            ["2020-02-29T23:59Z", "2019-01-01 10:00:00.123456789+0300", "2019-01-01T10:00-18:00"],
        ),
    ],
)  # fmt: skip
def test_a_time_is_good_or_bad_whatever_stands_beside_it(unit, bad, good):
    for value in bad + good:
        for beside in ([], ["1"], ["2019-01-01"], [""]):
            found = parse_times(pa.array([value, *beside]), unit)
            assert found.is_bad[0] == (found.time_us[0] == UNKNOWN_TIME) == (value in bad), value


@given(st.lists(st.binary(max_size=4), max_size=30))
def test_utf8_is_judged_value_by_value(values):
    def reads(value):
        try:
            return bool(value.decode()) or True
        except UnicodeDecodeError:
            return False

    assert castable(pa.array(values, pa.binary()), pa.string()).tolist() == [reads(value) for value in values]


@pytest.mark.parametrize(
    ("kind", "unit", "scale"),
    [
        (pa.float64(), "s", 10**6), (pa.float32(), "day", 86_400 * 10**6), (pa.int32(), "s", 10**6),
        (pa.uint64(), "ms", 10**3), (pa.int64(), "ms", 10**3), (pa.decimal128(30, 2), "s", 10**6),
        (pa.dictionary(pa.int8(), pa.int64()), "s", 10**6), (pa.large_string(), "s", 10**6),
    ],
)  # fmt: skip
def test_numbers_of_every_type_are_read_exactly_and_null_is_unknown(kind, unit, scale):
    number = 17_897 if unit == "day" else 1_546_300_801
    plain = pa.array([number, None, number + 1])
    values = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    found = parse_times(values, unit)
    assert found.time_us.tolist() == [number * scale, UNKNOWN_TIME, (number + 1) * scale]
    assert not found.is_bad.any()


def test_fractions_of_floats_are_kept_to_the_microsecond():
    found = parse_times(pa.array([1_546_300_800.123456, np.nan, np.inf, -1e300]), "s")
    assert found.time_us.tolist() == [1_546_300_800_123_456, *[UNKNOWN_TIME] * 3]
    assert found.is_bad.tolist() == [False, False, True, True]
    assert parse_times(pa.array([2**63 + 5, 3], pa.uint64()), "s").is_bad.tolist() == [True, False]
    far = parse_times(pa.array([10**15, 3], pa.int64()).cast(pa.timestamp("s")), "s")  # would wrap in microseconds
    assert far.is_bad.tolist() == [True, False]
    assert parse_times(pa.array([2**31 - 1, 3], pa.int32()).cast(pa.date32()), "s").is_bad.tolist() == [True, False]


ROUNDED = "its type {} cannot hold such times, which it rounds to {} seconds; write float64 or int64"
NAMED = [
    (pa.array(np.array([1_546_300_801, 1_546_300_802], np.float32)), ROUNDED.format("float32", 128)),
    (pa.array(np.array([15_000, 20_000], np.float16)), ROUNDED.format("float16", 16)),
    (pa.array([datetime.time(9), datetime.time(10)]), "time64[us] is no type of a time"),
    (pa.array([True, False]), "bool is no type of a time"),
    (
        pa.array([[1], [2]], pa.list_(pa.int64(), 1)),
        "values of type fixed_size_list<element: int64>[1], where config.data.schema.time needs one value a row",
    ),
    (pa.array([1, 2], pa.duration("s")), "duration[s] is no type of a time"),
    (
        pa.array([1, 2], pa.timestamp("us", "Europe/X")),
        "timestamp[us, tz=Europe/X] is of no time zone that is known here",
    ),
]


def write_parquet(folder, times) -> DataConfig:
    n = len(times)
    columns = {"user": ["u"] * n, "item": [str(k) for k in range(n)], "time": times}
    pq.write_table(pa.table(columns), folder / "events.parquet")
    return DataConfig("tables", tables=TablesConfig(str(folder), "events.parquet"), schema=SchemaConfig(time="time"))


@pytest.mark.parametrize(("times", "message"), NAMED, ids=[str(times.type) for times, _ in NAMED])
def test_a_type_that_holds_no_times_is_named_in_one_line(tmp_path, times, message):
    with pytest.raises(InputError) as error:
        prepare(write_parquet(tmp_path, times), tmp_path / "out")
    assert str(error.value) == f"events.parquet, column time: {message}"


def test_float32_days_are_read_and_those_with_a_clock_are_refused():
    assert parse_times(pa.array([17_897, 17_898], pa.float32()), "day").time_us[0] == 17_897 * 86_400 * 10**6
    with pytest.raises(ValueError, match="float32 cannot hold such times, which it rounds to 169 seconds"):
        parse_times(pa.array([17_897.33, 17_898], pa.float32()), "day")


FIRST_US = 1_546_300_800_000_000  # 2019-01-01
PLACES = np.random.default_rng(3).permutation(60)  # of sixty events within a second, in the order of the file
OF_ONE_SECOND = {
    "milliseconds": ([str((FIRST_US + 1000 * k) // 1000) for k in PLACES.tolist()], "ms"),
    "decimals": ([f"1546300800.{k:03d}" for k in PLACES.tolist()], "s"),
    "ISO": ([f"2019-01-01T00:00:00.{k:03d}Z" for k in PLACES.tolist()], "iso"),
    **{
        f"timestamp {unit}": (pa.array((FIRST_US + 1000 * PLACES) * 1000 // size).cast(pa.timestamp(unit)), "s")
        for unit, size in (("ms", 10**6), ("us", 1000), ("ns", 1))
    },
}  # fmt: skip


@pytest.mark.parametrize("form", OF_ONE_SECOND)
def test_events_of_one_second_keep_their_order_to_the_end(tmp_path, form):
    """Through the prepared folder to ties, histories and split: two services in turn, ten events a user."""
    times, unit = OF_ONE_SECOND[form]
    user = [f"u{k % 6}" for k in PLACES]
    columns = {"user": user, "item": [f"{k:02d}" for k in PLACES], "service": [f"s{k % 2}" for k in PLACES // 6]}
    pq.write_table(pa.table({**columns, "time": times}), tmp_path / "events.parquet")
    tables = TablesConfig(str(tmp_path), "events.parquet")
    config = DataConfig("tables", tables=tables, schema=SchemaConfig(service="service", time="time", time_unit=unit))
    prepare(config, tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    place = dataset.catalogue.ids[dataset.log.item].astype(int)
    assert dataset.log.time_us.tolist() == (FIRST_US + 1000 * place).tolist()
    for lo, hi in zip(dataset.log.offsets[:-1], dataset.log.offsets[1:], strict=True):
        assert np.all(np.diff(place[lo:hi]) == 6)
    np.testing.assert_array_equal(shuffle_ties(dataset, 0).log.item, dataset.log.item)
    assert not prepare_subject(dataset, SplitConfig(), 0).tied.any()
    targets = np.arange(dataset.log.n_events)
    apart, together = (gather_histories(dataset, targets, per_service) for per_service in (True, False))
    np.testing.assert_array_equal(apart.rows, together.rows)  # all that is before is strictly before
    split = SplitConfig(kind="time", valid_from="2019-01-01T00:00:00.020", test_from="2019-01-01T00:00:00.0405Z")
    subject = prepare_subject(dataset, split, 0)
    assert subject.split_ids.tolist() == [0 if k < 20 else 1 if k < 41 else 2 for k in place]


CLOCKS = ["2019-01-01T09:00:00+03:00", "2019-01-01T09:00:00.25-05:30", "2019-01-02T09:00Z", "2019-01-02 09:00:01+1245"]


def write_tsv(folder, times, **schema) -> DataConfig:
    rows = "".join(f"u\t{k}\t{time}\tomsk\n" for k, time in enumerate(times))
    (folder / "events.tsv").write_text("user\titem\ttime\tcity\n" + rows)
    columns = SchemaConfig(time="time", time_unit="iso", context=("city",), **schema)
    return DataConfig("tables", tables=TablesConfig(str(folder), "events.tsv"), schema=columns)


@pytest.mark.parametrize("reader", ["memory", "shards"])
@pytest.mark.parametrize("schema", [{}, {"zone": "Asia/Tokyo"}, {"zone_column": "city", "zones": ("omsk=Asia/Omsk",)}])
def test_an_offset_is_the_clock_of_its_event_whatever_zones_say(tmp_path, reader, schema):
    config = write_tsv(tmp_path, CLOCKS, **schema)
    config.reader = reader
    log = load_data(config, tmp_path / "run").dataset.log
    moments = sorted(datetime.datetime.fromisoformat(text) for text in CLOCKS)
    assert log.time_us.tolist() == [round(moment.timestamp() * 10**6) for moment in moments]
    assert log.utc_offset.tolist() == [moment.utcoffset().total_seconds() for moment in moments]


def test_times_of_utc_have_the_clock_of_their_zone(tmp_path):
    """An offset of zero everywhere says which moment is meant, and nothing of the place."""
    for k, texts in enumerate((["2019-01-01T09:00Z"], ["2019-01-01T09:00+00:00"], ["2019-01-01T09:00"])):
        config = write_tsv(tmp_path, texts, zone="Asia/Tokyo")
        assert load_data(config, tmp_path / f"run{k}").dataset.log.utc_offset.tolist() == [9 * 3600]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "+02:00", "-09:30", "UTC"])
def test_the_zone_of_a_column_is_that_of_the_clocks(tmp_path, zone):
    stamps = [datetime.datetime(2019, month, 3, 4, 5, 6, 789, datetime.UTC) for month in (1, 7)]
    dataset = load_data(write_parquet(tmp_path, pa.array(stamps, pa.timestamp("us", zone))), tmp_path / "run").dataset
    hours = {"UTC": 0, "+02:00": 2, "-09:30": -9.5}
    expected = [
        hours[zone] * 3600 if zone in hours else stamp.astimezone(zoneinfo.ZoneInfo(zone)).utcoffset().total_seconds()
        for stamp in stamps
    ]
    assert dataset.log.utc_offset.tolist() == expected
    assert dataset.log.time_us.tolist() == [round(stamp.timestamp() * 10**6) for stamp in stamps]


@pytest.mark.parametrize(("of_most", "of_one"), [("+03:00", ""), ("", "+03:00"), ("Z", ""), ("", "Z")])
def test_a_clock_of_no_place_among_those_of_one_is_a_defect_and_the_reverse(tmp_path, of_most, of_one):
    texts = [f"2019-01-0{k + 1}T09:00:00{of_one if k == 2 else of_most}" for k in range(5)]
    config = write_tsv(tmp_path, texts)
    has = "no offset from UTC; others have one" if of_most else "an offset from UTC; others have none"
    with pytest.raises(InputError) as error:
        prepare(config, tmp_path / "out")
    assert str(error.value) == f"events.tsv, row 3, column time: {texts[2]!r} has {has}"
    config.tables.on_bad_rows = "quarantine"
    report = prepare(config, tmp_path / "out")
    reason = "time with a UTC offset where others have none, or without one where others have it"
    assert (report.n_events, report.quarantined) == (4, {"events.tsv": {reason: 1}})


def test_earlier_folders_are_made_anew_or_refused(tmp_path):
    """A run's own folder of another version is no obstacle to go on with the run."""
    config = write_tsv(tmp_path, CLOCKS)
    first = load_data(config, tmp_path / "run")
    meta = tmp_path / "run" / "data" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format_version": 1}))
    with pytest.raises(InputError, match=r"meta\.json: format version 1, not \d+; prepare again$"):
        load_dataset(meta.parent)
    assert load_data(config, tmp_path / "run").digest == first.digest
