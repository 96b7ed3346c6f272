"""Times that are hardly meant are found whatever put them there, and real ones are left alone."""

import datetime
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerec.config import AuditConfig, DataConfig, SchemaConfig, SplitConfig, TablesConfig
from moerec.data.dataset import UNKNOWN_TIME
from moerec.data.prepare.far_times import add_counts, count_times, describe_far_times, find_far_times
from moerec.data.prepare.shards import load_dataset
from moerec.data.prepare.tables_to_shards import describe_report, prepare
from moerec.eval.audit import run_audit

NOW = datetime.datetime(2024, 6, 1, tzinfo=datetime.UTC).timestamp()


def micros(*date) -> int:
    return round(datetime.datetime(*date, tzinfo=datetime.UTC).timestamp()) * 10**6


def draw_times(n=400, days=30.0, seed=0):
    return micros(2019, 3, 1) + (np.random.default_rng(seed).random(n) * days * 86_400_000_000).astype(np.int64)


def find(time_us):
    times = count_times(np.asarray(time_us))
    far = find_far_times(times, NOW)
    return far.holds(np.asarray(time_us)), describe_far_times(times, far)


@given(
    start=st.integers(micros(1995, 1, 1), micros(2020, 1, 1)),
    days=st.sampled_from([0.01, 7.0, 300.0, 1500.0]),
    power=st.sampled_from([0.2, 1.0, 5.0]),
    n=st.integers(1, 300),
)
def test_events_that_grow_denser_or_rarer_for_years_are_not_far(start, days, power, n):
    share = np.random.default_rng(n).random(n) ** power
    is_far, line = find(start + (share * days * 86_400_000_000).astype(np.int64))
    assert not is_far.any()
    assert line == ""


SECONDS = draw_times() // 10**6
MISREAD = {
    "seconds read as milliseconds": SECONDS * 10**3,
    "dates written as numbers, such as 20150602, read as seconds": (20_190_301 + SECONDS % 28) * 10**6,
    "day numbers of a spreadsheet read as seconds": (43_525 + SECONDS % 30) * 10**6,
    "day numbers of a spreadsheet read as days": (43_525 + SECONDS % 30) * 86_400_000_000,
    "days read as seconds": (17_956 + SECONDS % 30) * 10**6,
    "years read as seconds": (2000 + SECONDS % 19) * 10**6,
}


@pytest.mark.parametrize("cause", MISREAD)
def test_another_unit_is_found_and_guessed(cause):
    is_far, line = find(MISREAD[cause])
    assert is_far.all()
    assert f"({cause}?)" in line


@pytest.mark.parametrize("n_odd", [1, 3, 200])
def test_of_mixed_units_those_that_are_misread_are_found(n_odd):
    time_us = draw_times()
    time_us[:n_odd] //= 1000
    assert find(time_us)[0].tolist() == [k < n_odd for k in range(400)]


ODD = {
    "0": (0, "a number that stands for no time"),
    "-1": (-(10**6), "a number that stands for no time"),
    "-1 ms": (-1000, "a number that stands for no time"),
    "9999": (micros(9999, 12, 31), "a date that stands for no time"),
    "2099": (micros(2099, 12, 31, 23, 59, 59), "a date that stands for no time"),
    "1900": (micros(1900, 1, 1), "the first at 1900-01-01T00:00:00"),
    "month ahead": (round(NOW + 30 * 86_400) * 10**6, "1 later than now, the last at 2024-07-01T00:00:00"),
    "2000": (micros(2000, 1, 1), "1 far from all others, as on 2000-01-01"),
    "stray": (micros(2009, 7, 7, 5), "1 far from all others, as on 2009-07-07"),
}


@pytest.mark.parametrize("name", ODD)
def test_one_odd_time_among_many_is_found(name):
    time_us = draw_times()
    time_us[7], words = ODD[name]
    is_far, line = find(time_us)
    assert np.flatnonzero(is_far).tolist() == [7]
    assert words in line
    assert line.startswith("of 400 times, 1 ")


def test_a_stand_in_is_found_however_often_and_years_and_months_are_left_alone():
    time_us = draw_times(days=1500)
    time_us[::3] = micros(2000, 1, 1)
    assert find(time_us)[0].tolist() == [k % 3 == 0 for k in range(400)]
    for dates in ([(year, 1, 1) for year in range(1995, 2020)], [(2000 + k // 12, 1 + k % 12, 1) for k in range(200)]):
        assert not find([micros(*date) for date in dates])[0].any()


def test_now_is_a_week_wide_and_unknown_times_are_no_times():
    ahead = [round(NOW + days * 86_400) * 10**6 for days in (-1, 6.9, 7.1)]
    assert find([*ahead, UNKNOWN_TIME])[0].tolist() == [False, False, True, False]


@given(st.lists(st.lists(st.integers(0, 2**51), max_size=8), max_size=5))
def test_counts_of_parts_add_up_to_those_of_all(parts):
    parts = [np.array(part, np.int64) for part in parts]
    together = count_times(np.concatenate([np.zeros(0, np.int64), *parts]))
    added = add_counts([count_times(part) for part in parts])
    for x, y in zip(together, added, strict=True):
        np.testing.assert_array_equal(x, y)
    if together.n:
        middle = np.sort(np.concatenate(parts))[(together.n - 1) // 2]
        assert together.median_us == max(middle - middle % 3_600_000_000, together.first_us)


def write(folder, seconds) -> DataConfig:
    """Three events a user."""
    rows = "".join(f"u{k // 3}\ti{k % 7}{k % 3}\t{second}\n" for k, second in enumerate(seconds))
    (folder / "events.tsv").write_text("user\titem\ttime\n" + rows)
    tables = TablesConfig(str(folder), "events.tsv", unknown_time="keep")
    return DataConfig("tables", tables=tables, schema=SchemaConfig(time="time"))


def audit(folder):
    return {row.name: row for row in run_audit(load_dataset(folder), SplitConfig(), AuditConfig()).rows}


def test_prepare_and_audit_tell_first_median_and_last_time(tmp_path):
    seconds = np.sort(SECONDS[:300])
    report = prepare(write(tmp_path, [*seconds[:150], "", *seconds[150:]]), tmp_path / "out")
    first, last = (str(np.datetime64(int(t), "s")) for t in (seconds[0], seconds[-1]))
    median = str(np.datetime64(int(seconds[149]) // 3600 * 3600, "s"))
    told = f"first {first}, median {median}, last {last}; 1 events without"
    assert report.times == told
    assert f"times: {told}" in describe_report(report).splitlines()
    assert report.notes == ()
    row = audit(tmp_path / "out")["far_times"]
    assert (row.value, row.exceeded, row.explanation) == (0, False, told)


def test_a_stand_in_that_would_be_a_test_target_fails_the_audit(tmp_path):
    seconds = np.sort(SECONDS[:300])
    seconds[5] = micros(9999, 12, 31) // 10**6
    report = prepare(write(tmp_path, seconds), tmp_path / "out")
    (note,) = report.notes
    assert note == (
        "far-off times: of 300 times, 1 later than now, the last at 9999-12-31T00:00:00 "
        "(a date that stands for no time?)"
    )
    assert note in describe_report(report).splitlines()
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["extra"]["notes"] == [note]
    rows = audit(tmp_path / "out")
    assert rows["far_times"].value == pytest.approx(1 / 300)
    assert rows["far_times_test"].value == pytest.approx(1 / 100)
    assert rows["far_times"].exceeded
    assert rows["far_times_test"].exceeded
    assert note.removeprefix("far-off times: ") in rows["far_times"].explanation


COLUMNS = {
    "amazon3": ("interactions.tsv.gz", SchemaConfig(time="day", time_unit="day")),
    "amazon6_half": ("interactions.tsv.gz", SchemaConfig(time="day", time_unit="day")),
    "yelp": ("interactions.tsv.gz", SchemaConfig(time="unix_ts")),
    "ml100k": ("ml-100k.inter.gz", SchemaConfig(user="user_id", item="item_id", time="timestamp")),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_real_tables_have_no_time_that_is_far(data_dir, tmp_path, name):
    interactions, schema = COLUMNS[name]
    tables = TablesConfig(str(data_dir / name), interactions, unknown_time="keep", duplicates="keep")
    report = prepare(DataConfig("tables", tables=tables, schema=schema), tmp_path / "out")
    assert report.notes == ()
    assert report.times.startswith("first ")
