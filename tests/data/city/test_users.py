"""The simulation against the world's tables: needs, services, items, types, profiles and the knobs."""

import dataclasses
import itertools

import numpy as np
import pytest

from moerec.config import CityConfig
from moerec.data.city import generate, make_world, names
from moerec.data.city.timeline import read_openings


@pytest.fixture(scope="module")
def plain():
    """Nothing but the chain of needs and the tastes: every empirical frequency has one closed form."""
    return generate(CityConfig(n_users=800, events_per_user=40, kappa=0, habit=0, items_per_service=100), 5)


def chi_square(observed: np.ndarray, probability: np.ndarray) -> tuple[float, int]:
    """The statistic and its degrees of freedom over the cells that expect at least five."""
    expected = observed.sum(axis=-1, keepdims=True) * probability
    use = expected >= 5
    return float((((observed - expected) ** 2)[use] / expected[use]).sum()), int(use.sum())


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def test_needs_follow_the_transition_table(plain):
    dataset, world = plain
    log, need = dataset.log, world.truth.need.astype(int)
    follows = np.flatnonzero(log.user[1:] == log.user[:-1]) + 1
    days = (log.time_us[follows] - log.time_us[follows - 1]) / 86_400e6
    n = len(world.needs)
    expected, variance, observed = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n))
    logits = world.need_base_N + (1 / (1 + days / 4))[:, None] * world.need_after_NN[need[follows - 1]]
    np.add.at(expected, need[follows - 1], softmax(logits))
    np.add.at(variance, need[follows - 1], softmax(logits) * (1 - softmax(logits)))
    np.add.at(observed, (need[follows - 1], need[follows]), 1)
    z = (observed - expected) / np.sqrt(variance)
    assert np.abs(z).max() < 4.5
    assert (z**2).mean() == pytest.approx(1, abs=0.5)
    first = np.bincount(need[log.offsets[:-1]], minlength=n)
    statistic, cells = chi_square(first, softmax(world.need_base_N))
    assert statistic < cells + 4 * np.sqrt(2 * cells)


def test_services_follow_the_needs(plain):
    dataset, world = plain
    observed = np.zeros((len(world.needs), 3))
    np.add.at(observed, (world.truth.need, dataset.event_service), 1)
    probability = np.array([names.NEEDS[need].services for need in world.needs])
    statistic, cells = chi_square(observed, probability / probability.sum(axis=1, keepdims=True))
    assert statistic < cells + 4 * np.sqrt(2 * cells)


def test_items_follow_need_and_type(plain):
    dataset, world = plain
    aspect = [names.CATEGORIES[name].aspect for name in names.CATEGORIES]
    total, cells = 0.0, 0
    for z in range(3):
        items = np.arange(100 * z, 100 * z + 100)
        event = np.flatnonzero(dataset.event_service == z)
        kind = world.truth.type_PZ[dataset.log.user[event], z]
        for n in range(len(world.needs)):
            for k in range(world.n_types):
                rows = event[(kind == k) & (world.truth.need[event] == n)]
                utility = [
                    world.need_fit_NC[n, world.category_I[i]]
                    + 2.8 * (world.aspect_K[aspect[world.category_I[i]]][k] == world.variety_I[i])
                    - 1.5 * abs(int(world.aspect_K["budget"][k]) - int(world.price_I[i]))
                    + world.brand_taste_KR[k, world.brand_I[i]]
                    + world.popularity_I[i]
                    for i in items
                ]
                observed = np.bincount(dataset.log.item[rows] - items[0], minlength=100)
                statistic, used = chi_square(observed, softmax(np.array(utility)))
                total, cells = total + statistic, cells + used
    assert cells > 300
    assert total < cells + 4 * np.sqrt(2 * cells)


def test_types_are_shared_with_probability_rho():
    for rho in (0.0, 0.4, 1.0):
        _, world = generate(CityConfig(n_users=6000, events_per_user=3, items_per_service=20, rho=rho), 0)
        truth, prior = world.truth, world.type_prior_K
        same = (truth.type_PZ == truth.type_P[:, None]).mean(axis=0)
        assert same == pytest.approx(rho + (1 - rho) * (prior**2).sum(), abs=0.025)
        for z in range(3):
            shares = np.bincount(truth.type_PZ[:, z], minlength=len(prior)) / 6000
            assert shares == pytest.approx(prior, abs=0.025)


def test_profiles_are_missing_and_wrong_at_the_configured_rates():
    config = CityConfig(n_users=6000, events_per_user=3, items_per_service=20)
    dataset, world = generate(config, 1)
    assert dataset.profile.keys() == names.ASPECTS.keys()
    for field, values in names.ASPECTS.items():
        column = dataset.profile[field]
        assert set(column) == {"", *values}
        assert (column == "").mean() == pytest.approx(0.3, abs=0.03)
        truth = np.array(values)[world.aspect_K[field][world.truth.type_P]]
        right = (column == truth)[column != ""].mean()
        assert right == pytest.approx(1 - 0.15 * (1 - 1 / len(values)), abs=0.02)


def test_habits_repeat_staples_and_spare_durables():
    """The very same item again in its category, with the habit on and off."""
    share = {}
    for habit in (0.0, 1.0):
        config = CityConfig(n_users=600, events_per_user=40, habit=habit, items_per_service=60)
        dataset, world = generate(config, 2)
        log, item = dataset.log, dataset.log.item
        key = log.user * 10_000 + dataset.event_service * 1000 + world.category_I[item]
        order = np.argsort(key, kind="stable")
        again = key[order][1:] == key[order][:-1]
        same = item[order][1:] == item[order][:-1]
        staple = world.repeat_C[world.category_I[item[order][1:]]] > 0.7
        durable = world.repeat_C[world.category_I[item[order][1:]]] <= -1
        share[habit] = same[again & staple].mean(), same[again & durable].mean()
    assert share[1.0][0] > share[0.0][0] + 0.05
    assert share[1.0][1] < share[0.0][1] - 0.02


def test_identical_users_have_one_type_and_profiles_that_tell_nothing():
    dataset, world = generate(CityConfig(n_users=50, events_per_user=5, identical_users=True), 0)
    assert world.n_types == 1
    assert not world.truth.type_PZ.any()
    assert not world.truth.type_P.any()
    assert set(dataset.profile["diet"]) > {""}


def test_identical_services_differ_by_label_only():
    world = make_world(CityConfig(identical_services=True), 0)
    for name in ("category_I", "brand_I", "price_I", "variety_I", "product_I", "popularity_I"):
        samokat, megamarket, kuper = getattr(world, name).reshape(3, 600)
        assert np.array_equal(samokat, megamarket)
        assert np.array_equal(samokat, kuper)
    text = world.catalogue.text.reshape(3, 600)
    assert np.array_equal(text[0], text[1])
    assert np.array_equal(text[0], text[2])
    assert np.ptp(world.service_fit_NZ) == pytest.approx(0)
    assert not world.service_when_DZ.any()


def test_users_come_back_to_each_service_after_it_was_closed_to_them():
    config = CityConfig(n_users=50, events_per_user=80, items_per_service=40, n_closed=15, rho=0.0)
    dataset, _ = generate(config, 3)
    offsets, service = dataset.log.offsets, dataset.event_service
    last = set()
    for lo, hi in itertools.pairwise(offsets):
        own = service[lo:hi]
        returns = np.arange(hi - lo - 1, 14, -15)  # those before which there are fifteen events
        last.add(int(own[-1]))
        for at in returns:
            assert own[at] not in own[at - 15 : at]  # nothing nearer tells what is liked there
            assert len(set(own[at - 15 : at])) == 2
        assert all(a != b for a, b in itertools.pairwise(own[returns]))
    assert last == {0, 1, 2}
    opened = read_openings(dataset.context, dataset.log.context, 3)
    assert np.all(opened[np.arange(len(service)), service])
    assert {n: int((opened.sum(axis=1) == n).sum()) for n in (0, 3)} == {0: 0, 3: 0}
    told = [dataset.context["open"][code - 1] for code in dataset.log.context[offsets[1:] - 1, 3]]
    assert told == [f"only {names.SERVICES[z]}" for z in service[offsets[1:] - 1]]
    plain, _ = generate(dataclasses.replace(config, n_closed=0), 3)
    np.testing.assert_array_equal(plain.log.time_us, dataset.log.time_us)
