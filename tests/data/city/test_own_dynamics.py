"""Services with laws of their own: nothing changes without them, each has its effect, and the oracle stays exact."""

import dataclasses
import hashlib

import numpy as np
import pytest

from moerec.config import CityConfig
from moerec.data.city import generate, make_world, simulate
from moerec.data.city.oracle import posterior_predictive
from moerec.data.dataset import EventLog, permute_items
from moerec.errors import InputError
from tests.data.city.enumeration import Enumeration

SMALL = {"n_users": 60, "events_per_user": 14, "items_per_service": 40, "n_types": 4, "n_needs": 8}
TINY = {"n_users": 12, "events_per_user": 8, "items_per_service": 4, "n_types": 2, "n_needs": 3}
DAY_US = 86_400_000_000


def digest(dataset, world) -> str:
    log, truth, found = dataset.log, world.truth, hashlib.sha256()
    for column in (log.offsets, log.item, log.time_us, log.context, truth.type_P, truth.type_PZ, truth.need):
        found.update(np.ascontiguousarray(column, "<i8").tobytes())
    catalogue = dataset.catalogue
    for column in (*dataset.profile.values(), catalogue.ids, catalogue.text, catalogue.attributes):
        found.update("\n".join(column.tolist()).encode())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("fields", "sha256", "score", "first_service", "entropy"),
    [
        (
            {},
            "dd58aa87386df1b6335111e9e5b70d686a2a91ca980c2d3cd12e2447d9de5209",
            -3.0124583919126025,
            0.3016931591081716,
            3.0480853902573704,
        ),
        (
            {"n_closed": 5, "rho": 0.0},
            "75c9f6a3c1c0a28282a55e402361b6ad8de48e2284ade1e1acc01d689aa3e1c5",
            -2.850406318105003,
            0.32090250809393317,
            2.741517070094414,
        ),
        (
            {"identical_services": True},
            "ae7d4b3832d3dfc4791014715d8a659c0248b5044c316116abfae6f72e909ea3",
            -3.6244129990254623,
            0.33333333358255113,
            3.631248493986002,
        ),
    ],
)
def test_without_own_dynamics_the_city_is_what_it_was(fields, sha256, score, first_service, entropy):
    """Data to the bit, and means of the oracle's scores, whose last bits belong to the machine."""
    dataset, world = generate(CityConfig(**SMALL, **fields), 0)
    assert digest(dataset, world) == sha256
    log_p = posterior_predictive(world, dataset).astype(float)
    p = np.exp(log_p)
    found = log_p[np.arange(len(p)), dataset.log.item].mean(), p[:, :40].sum(axis=1).mean(), -(p * log_p).sum() / len(p)
    assert found == pytest.approx((score, first_service, entropy), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "use_profile"),
    [
        ({}, False),
        ({"own_dynamics": 0.5, "rho": 0.0}, False),
        ({"n_types": 3, "habit": 0.0}, True),
        ({"n_services": 6, "items_per_service": 3}, True),
    ],
)
def test_equals_the_enumeration_of_all_latent_paths(fields, use_profile):
    dataset, world = generate(CityConfig(**(TINY | {"own_dynamics": 1.0} | fields)), 0)
    world = dataclasses.replace(world, category_I=world.category_I % 3 + 7, variety_I=world.variety_I % 3)
    offsets = np.concatenate([[0], np.cumsum([4] * 9 + [3] * 3)])
    n, log, rng = int(offsets[-1]), dataset.log, np.random.default_rng(4)
    days = np.cumsum(rng.choice([0.05, 0.6, 1, 1, 7, 13.6], size=n))
    # few services and items for a user, so that things are ordered again
    service = np.repeat(np.arange(12), np.diff(offsets)) + rng.choice([0, 0, 0, 0, 1, 3], size=n)
    items = service * world.config.items_per_service + rng.integers(2, size=n)
    log = EventLog(
        offsets,
        (items % len(world.category_I)).astype(np.int32),
        log.action[:n],
        log.time_us[0] + (days * DAY_US).astype(np.int64) // 10**6 * 10**6,
        log.context[:n],
    )
    dataset = dataclasses.replace(dataset, log=log)
    predicted = np.exp(posterior_predictive(world, dataset, use_profile=use_profile).astype(float))
    expected = Enumeration(world, dataset, use_profile)
    for user in range(12):
        for t in range(int(np.diff(offsets)[user])):
            exact = expected.predict(user, t)
            np.testing.assert_allclose(predicted[offsets[user] + t], exact, rtol=2e-5, atol=1e-9)
    assert expected.met == {"streak", "routine", "owned", "follow", "thrift", "early", "refill", "late"}


@pytest.mark.parametrize("fields", [{}, {"n_services": 6, "n_closed": 6}])
def test_the_oracle_is_calibrated(fields):
    config = {"n_users": 500, "events_per_user": 30, "items_per_service": 60, "n_types": 4, "own_dynamics": 1.0}
    dataset, world = generate(CityConfig(**config, **fields), 3)
    targets = np.sort(np.concatenate([dataset.log.offsets[1:] - back for back in (1, 2, 3)]))
    log_p = posterior_predictive(world, dataset, targets).astype(float)
    rows, item = np.arange(len(targets)), dataset.log.item[targets]
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(axis=1)
    variance = (p * log_p**2).sum(axis=1) - entropy**2
    surprise = -log_p[rows, item] - entropy  # of mean zero under the exact predictive
    assert abs(surprise.sum()) < 4 * np.sqrt(variance.sum())
    share = np.add.reduceat(p, dataset.catalogue.offsets[:-1], axis=1)
    observed = np.bincount(dataset.event_service[targets], minlength=share.shape[1])
    assert np.all(np.abs(observed - share.sum(axis=0)) < 4 * np.sqrt((share * (1 - share)).sum(axis=0)))
    without = dataclasses.replace(world, config=dataclasses.replace(world.config, own_dynamics=0.0))
    assert posterior_predictive(without, dataset, targets)[rows, item].mean() < log_p[rows, item].mean() - 0.2


@pytest.fixture(scope="module")
def cities():
    """Without and with own dynamics, from the same random numbers."""
    config = CityConfig(n_users=500, events_per_user=60, items_per_service=80)
    return [generate(dataclasses.replace(config, own_dynamics=a), 1) for a in (0.0, 1.0)]


def orders_of(dataset, z):
    """Of the orders in a service, in the log's order: row, whether the user ordered there before, and so on.

    Returns row, its user's last row in the service, that of the very item (-1 without one), and days since either.
    """
    log, last, last_same = dataset.log, {}, {}
    found = []
    for e in np.flatnonzero(dataset.event_service == z):
        user, item = int(log.user[e]), int(log.item[e])
        found.append((e, last.get(user, -1), last_same.get((user, item), -1)))
        last[user] = last_same[user, item] = e
    row, before, same = np.array(found).T
    days = [np.where(then < 0, np.inf, (log.time_us[row] - log.time_us[then]) / DAY_US) for then in (before, same)]
    return row, before, same, *days


def test_food_is_a_streak_and_a_routine(cities):
    streak, routine = [], []
    for dataset, _ in cities:
        log, (row, _, _, _, days) = dataset.log, orders_of(dataset, 0)
        streak.append((days < 2).mean())
        second = log.time_us // 10**6
        hour, is_weekend = second // 3600 % 24, (second // 86_400 + 3) % 7 >= 5
        slot = 2 * np.searchsorted([6, 11, 17], hour, side="right") + is_weekend
        usual, hits = {}, []
        for e in row:
            key = int(log.user[e]), int(slot[e])
            if key in usual and log.time_us[e] - log.time_us[usual[key]] > 6 * DAY_US:  # by when streaks are over
                hits.append(log.item[e] == log.item[usual[key]])
            usual[key] = e
        routine.append(np.mean(hits))
    assert streak[1] > 1.5 * streak[0]
    assert routine[1] > 1.5 * routine[0]


def test_the_marketplace_sells_things_once_what_goes_with_them_and_after_a_dear_one_cheap_ones(cities):
    again, follows, dearer = [], [], []
    for dataset, world in cities:
        item, (row, before, same, days, _) = dataset.log.item, orders_of(dataset, 1)
        again.append((same >= 0).mean())
        recent = days < 7
        last, this = item[before[recent]], item[row[recent]]
        place = world.tables.follow_ZCC[1][world.category_I[last], world.category_I[this]]
        follows.append((place == world.place_I[this]).mean())
        is_dear = world.price_I[item[before]] == 2
        price = world.price_I[item[row]]
        dearer.append(price[(before >= 0) & is_dear].mean() - price[(before >= 0) & ~is_dear].mean())
    assert again[0] > 0.2
    assert again[1] < 0.25 * again[0]
    assert follows[1] > follows[0] + 0.2
    assert dearer[1] < dearer[0] - 0.15


def test_health_is_refilled_when_it_is_used_up_and_follows_the_season(cities):
    due, early, season = [], [], []
    for dataset, world in cities:
        item, (row, _, same, _, days) = dataset.log.item, orders_of(dataset, 2)
        c, v = world.category_I[item[row]], world.variety_I[item[row]]
        lasts = world.tables.refill_ZC[2][c]
        due.append((np.abs(days - lasts) < 0.15 * lasts).sum() / (same >= 0).sum())
        early.append((days < lasts / 2).sum() / (same >= 0).sum())
        month = dataset.log.time_us[row].astype("datetime64[us]").astype("datetime64[M]").astype(int) % 12 + 1
        season.append(world.tables.season_ZSCV[2][month % 12 // 3, c, v].mean())
    assert due[1] > 2 * due[0]
    assert early[1] < 0.5 * early[0]
    assert season[1] > season[0] + 0.2


def test_needs_and_services_do_not_depend_on_own_dynamics(cities):
    (plain, world), (own, other) = cities
    np.testing.assert_array_equal(plain.event_service, own.event_service)
    for column in ("need", "type_P", "type_PZ"):
        np.testing.assert_array_equal(getattr(world.truth, column), getattr(other.truth, column))
    np.testing.assert_array_equal(plain.log.time_us, own.log.time_us)
    assert not np.array_equal(plain.log.item, own.log.item)


def test_users_are_drawn_the_same_however_many_at_a_time(monkeypatch):
    config = CityConfig(**SMALL, own_dynamics=1.0)
    item = generate(config, 0)[0].log.item
    monkeypatch.setattr(simulate, "_PAST_BYTES", 7 * 4 * 120)  # of seven users
    np.testing.assert_array_equal(generate(config, 0)[0].log.item, item)


def test_follows_a_renumbering_of_the_items():
    dataset, world = generate(CityConfig(**SMALL, own_dynamics=1.0, n_services=6), 0)
    permuted, number = permute_items(dataset, 3)
    targets = dataset.log.offsets[1:] - 1
    a, b = (posterior_predictive(world, data, targets) for data in (dataset, permuted))
    np.testing.assert_allclose(b[:, number], a, atol=1e-5)


def test_services_of_a_kind_share_a_type_and_the_weight_of_the_kind():
    config = CityConfig(**SMALL, n_services=12)
    dataset, world = generate(config, 0)
    services = dataset.catalogue.services
    assert services[:4] == ("samokat0", "megamarket0", "kuper0", "samokat1")
    assert len(set(services)) == 12
    assert dataset.catalogue.ids[40 * 11] == "kuper3-00000"
    type_PMJ = world.truth.type_PZ.reshape(60, 4, 3)
    assert np.all(type_PMJ == type_PMJ[:, :1])
    assert len({tuple(column) for column in type_PMJ[:, 0].T}) == 3
    weight_NMJ = np.exp(world.service_fit_NZ).reshape(-1, 4, 3)
    three = make_world(dataclasses.replace(config, n_services=3), 0)
    np.testing.assert_allclose(weight_NMJ.sum(axis=1), np.exp(three.service_fit_NZ))
    assert weight_NMJ.std(axis=1).min() > 0
    assert set(np.unique(dataset.event_service)) == set(range(12))
    for name in ("follow_ZCC", "refill_ZC", "season_ZSCV"):
        tables = getattr(world.tables, name)
        np.testing.assert_array_equal(tables[:3], getattr(three.tables, name))
        assert not np.array_equal(tables[0], tables[3])
    assert set(np.unique(world.tables.refill_ZC)) == {7, 14, 21, 28}
    assert set(np.unique(world.tables.season_ZSCV)) == {-1, 0, 1}


def test_a_brand_has_one_place_in_its_category():
    world = make_world(CityConfig(own_dynamics=1.0), 0)
    brands = {}
    for c, place, brand in zip(world.category_I, world.place_I, world.brand_I, strict=True):
        assert brands.setdefault((c, place), brand) == brand
    assert len({(c, brand) for (c, _), brand in brands.items()}) == len(brands)
    assert world.place_I.max() == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_services", 0),
        ("n_services", -3),
        ("n_services", 4),
        ("own_dynamics", -0.1),
        ("own_dynamics", 1.1),
        ("own_dynamics", float("nan")),
    ],
)
def test_bad_values_are_refused(field, value):
    with pytest.raises(InputError, match=rf"^config\.data\.city\.{field}: must .*$"):
        CityConfig(**{field: value})


def test_identical_services_have_no_dynamics_of_their_own():
    with pytest.raises(InputError, match=r"data\.city\.own_dynamics: must be 0 with identical_services"):
        CityConfig(identical_services=True, own_dynamics=0.5)
