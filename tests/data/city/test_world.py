"""The city's parameters, catalogue, users and events."""

import dataclasses
import re

import numpy as np
import pytest

from moerec.config import CityConfig
from moerec.data.city import generate, make_world, names, timeline
from moerec.data.city.oracle import predict_targets
from moerec.errors import InputError


def small(**fields) -> CityConfig:
    return CityConfig(**({"n_users": 150, "events_per_user": 20, "items_per_service": 60} | fields))


def same_logs(a, b) -> bool:
    fields = ("offsets", "item", "action", "time_us", "context")
    return all(np.array_equal(getattr(a.log, f), getattr(b.log, f)) for f in fields)


@pytest.fixture(scope="module")
def default():
    return generate(CityConfig(), 0)


def test_default_size(default):
    dataset, world = default
    assert dataset.catalogue.services == ("samokat", "megamarket", "kuper")
    assert np.diff(dataset.catalogue.offsets).tolist() == [600, 600, 600]
    assert dataset.log.n_users == len(dataset.users) == len(set(dataset.users)) == 2000
    assert dataset.log.n_events / 2000 == pytest.approx(80, abs=3)
    assert np.diff(dataset.log.offsets).min() >= 3
    assert np.all(np.bincount(dataset.event_service) > 0.2 * dataset.log.n_events)
    assert len(world.truth.need) == dataset.log.n_events


def test_same_seed_same_city_and_other_seed_another():
    one, again, other = (generate(small(), seed)[0] for seed in (3, 3, 4))
    assert same_logs(one, again)
    for part in ("ids", "text", "attributes"):
        assert np.array_equal(getattr(one.catalogue, part), getattr(again.catalogue, part))
    assert all(np.array_equal(one.profile[f], again.profile[f]) for f in one.profile)
    assert not same_logs(one, other)
    assert not np.array_equal(one.catalogue.text, other.catalogue.text)


def test_the_knobs_of_users_leave_the_parameters_as_they_are():
    world = make_world(small(), 1)
    turned = make_world(small(rho=0, kappa=0, tau=0, habit=0, n_users=7, events_per_user=5), 1)
    for field in dataclasses.fields(world):
        value, other = getattr(world, field.name), getattr(turned, field.name)
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, other), field.name


def test_titles_are_russian_and_english_and_agree_with_the_attributes(default):
    dataset, world = default
    assert len(np.unique(dataset.catalogue.ids)) == dataset.catalogue.n_items
    values = {field: set() for field in ("category", "brand", "price", "variety")}
    for i, (text, attributes) in enumerate(zip(dataset.catalogue.text, dataset.catalogue.attributes, strict=True)):
        russian, english = text.split(" / ")
        assert re.search("[а-яё]", russian)
        assert not re.search("[A-Za-z]", russian)
        assert re.search("[a-z]", english)
        assert not re.search("[А-Яа-яё]", english)
        parsed = dict(token.split("=") for token in attributes.split(" "))
        assert parsed.keys() == values.keys()
        for field, value in parsed.items():
            values[field].add(value)
        assert parsed["category"] == list(names.CATEGORIES)[world.category_I[i]]
        assert names.BRANDS[world.brand_I[i]][1] in english
    assert values["category"] == set(names.CATEGORIES)
    assert values["price"] == {"1", "2", "3"}


def test_item_numbers_carry_no_information(default):
    dataset, world = default
    count = np.bincount(dataset.log.item, minlength=1800).reshape(3, 600)
    number = np.arange(600)
    for z in range(3):
        # 4 standard errors of a correlation of 600 independent pairs
        for value in (np.log1p(count[z]), world.category_I.reshape(3, 600)[z], world.price_I.reshape(3, 600)[z]):
            assert abs(np.corrcoef(number, value)[0, 1]) < 4 / np.sqrt(600)


def test_times_rise_and_follow_the_day_and_the_context_is_the_days(default):
    log, context = default[0].log, default[0].context
    same_user = log.user[1:] == log.user[:-1]
    assert np.all(np.diff(log.time_us)[same_user] > 0)
    year = log.time_us.astype("datetime64[us]").astype("datetime64[Y]")
    assert np.all(year == np.datetime64("2024"))
    assert log.context.min() >= 1
    assert all(log.context[:, c].max() == len(v) for c, v in enumerate(context.values()))
    day = log.time_us // 86_400_000_000
    for d in np.unique(day)[::30]:
        assert len(np.unique(log.context[day == d], axis=0)) == 1
    hour = np.bincount(log.time_us // 3_600_000_000 % 24, minlength=24)
    assert hour[19] > 4 * hour[3]


def test_clock_agrees_with_the_calendar():
    at = ("2024-02-29T05:59", "2024-03-02T06:00", "2024-07-07T10:59", "2024-08-31T11:00", "2024-09-01T16:59")
    time = np.array([*at, "2024-11-29T17:00", "2024-12-30T23:59"], "datetime64[s]")
    daypart, weekend, season = timeline.clock_of(time.astype(np.int64))
    assert [timeline.DAYPARTS[k] for k in daypart] == [
        "night",
        "morning",
        "morning",
        "day",
        "day",
        "evening",
        "evening",
    ]
    assert weekend.tolist() == [0, 1, 1, 1, 1, 0, 0]
    seasons = ["winter", "spring", "summer", "summer", "autumn", "autumn", "winter"]
    assert [timeline.SEASONS[k] for k in season] == seasons


def test_more_needs_than_the_city_knows_are_refused():
    with pytest.raises(InputError, match="n_needs"):
        make_world(small(n_needs=99), 0)


@pytest.mark.parametrize("knob", ["kappa", "tau", "habit"])
def test_the_strongest_effects_leave_every_probability_finite(knob):
    dataset, world = generate(small(**{knob: 10.0}), 0)
    targets = np.arange(dataset.log.n_events)[-200:]
    for _, scores in predict_targets(world, dataset, targets):
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-3)
    with pytest.raises(InputError, match=f"data.city.{knob}"):
        small(**{knob: 10.1})


@pytest.mark.parametrize("fields", [{"n_needs": 1}, {"n_types": 1}, {"items_per_service": 2}, {"n_users": 1}])
def test_the_smallest_cities_work(fields):
    dataset, world = generate(small(**fields), 0)
    assert dataset.log.n_events == len(world.truth.need)
