"""The oracle against enumeration of every latent path, and the properties an exact posterior must have."""

import dataclasses

import numpy as np
import pytest

from moerec.config import CityConfig
from moerec.data.city import generate
from moerec.data.city.oracle import posterior_predictive, predict_targets
from moerec.data.city.timeline import read_openings
from moerec.data.dataset import EventLog, permute_items
from moerec.errors import InputError
from tests.data.city.enumeration import Enumeration

TINY = {"n_users": 6, "events_per_user": 3, "items_per_service": 4, "n_types": 2, "n_needs": 3}
SMALL = {"n_users": 60, "events_per_user": 14, "items_per_service": 40, "n_types": 4, "n_needs": 8}


@pytest.mark.parametrize(
    ("fields", "use_profile", "seed"),
    [
        ({}, False, 0),
        ({}, True, 1),
        ({"rho": 0.0, "habit": 2.0}, False, 2),
        ({"rho": 1.0, "tau": 3.0}, True, 3),
        ({"identical_services": True, "kappa": 2.0}, False, 4),
        ({"identical_users": True}, False, 5),
        ({"n_needs": 1, "n_types": 3}, True, 6),
        ({"rho": 0.0, "n_closed": 2}, False, 7),
        ({"n_services": 6, "n_closed": 2}, True, 8),
    ],
)
def test_equals_the_enumeration_of_all_latent_paths(fields, use_profile, seed):
    dataset, world = generate(CityConfig(**(TINY | fields)), seed)
    # categories drawn from a few, so that habits come into play on four items
    world = dataclasses.replace(world, category_I=world.category_I % 3 + 7)
    world = dataclasses.replace(world, variety_I=world.variety_I % 3)
    longer = np.concatenate([[0], np.cumsum([4, 4, 3, 2, 2, 3])])  # more than three events need other users'
    log = dataset.log
    dataset = dataclasses.replace(
        dataset,
        log=EventLog(
            longer, *(x[: longer[-1]].copy() for x in (log.item, log.action, np.sort(log.time_us), log.context))
        ),
    )
    if "n_closed" in fields:  # as drawn, but never the event's own service
        opened = read_openings(dataset.context, dataset.log.context, dataset.catalogue.n_services)
        is_closed = ~opened[np.arange(len(opened)), dataset.event_service]
        assert not opened[~is_closed].all()
        dataset.log.context[is_closed, 3] = 0
    predicted = posterior_predictive(world, dataset, use_profile=use_profile)
    expected = Enumeration(world, dataset, use_profile)
    for user in range(6):
        for t in range(int(np.diff(longer)[user])):
            exact = expected.predict(user, t)
            got = np.exp(predicted[longer[user] + t].astype(float))
            np.testing.assert_allclose(got, exact, rtol=2e-5, atol=1e-9)


def test_another_feature_of_the_context_says_nothing_of_what_is_open():
    dataset, world = generate(CityConfig(**TINY), 5)
    device = np.arange(dataset.log.n_events, dtype=np.int16)[:, None] % 2 + 1
    log = dataclasses.replace(dataset.log, context=np.hstack([dataset.log.context, device]))
    more = dataclasses.replace(dataset, log=log, context={**dataset.context, "device": ("phone", "watch")})
    np.testing.assert_array_equal(posterior_predictive(world, more), posterior_predictive(world, dataset))


def test_without_the_context_it_is_the_mean_over_the_days_of_the_month():
    dataset, world = generate(CityConfig(**TINY), 8)
    target = dataset.log.offsets[1:4] - 1
    predicted = np.exp(posterior_predictive(world, dataset, target, use_context=False).astype(float))
    for k, row in enumerate(target):
        first = dataset.log.time_us[row].astype("datetime64[us]").astype("datetime64[M]")
        day = (first.astype("datetime64[D]") - np.datetime64("2024-01-01")).astype(int)
        n_days = ((first + np.timedelta64(1, "M")).astype("datetime64[D]") - first.astype("datetime64[D]")).astype(int)
        contexts, count = np.unique(world.days[day : day + n_days], axis=0, return_counts=True)
        total = 0
        for context, n in zip(contexts, count, strict=True):
            changed = dataset.log.context.copy()
            changed[row] = context
            other = dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, context=changed))
            exact = posterior_predictive(world, other, np.array([row]))[0]  # held against enumeration above
            total = total + n / n_days * np.exp(exact.astype(float))
        np.testing.assert_allclose(predicted[k], total, rtol=2e-5, atol=1e-9)
        assert len(contexts) > 2


@pytest.fixture(scope="module")
def small():
    return generate(CityConfig(**SMALL), 0)


def with_log(dataset, **columns):
    return dataclasses.replace(dataset, log=dataclasses.replace(dataset.log, **columns))


def last_events(dataset):
    return dataset.log.offsets[1:] - 1


def test_probabilities_sum_to_one(small):
    dataset, world = small
    total = np.exp(posterior_predictive(world, dataset).astype(float)).sum(axis=1)
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_targets_may_come_in_any_order_more_than_once_and_in_any_chunks(small):
    dataset, world = small
    every = posterior_predictive(world, dataset)
    targets = np.random.default_rng(0).integers(dataset.log.n_events, size=300)
    got, seen = np.empty((300, dataset.catalogue.n_items), np.float32), np.zeros(300, int)
    for positions, scores in predict_targets(world, dataset, targets, users_per_chunk=7, rows_per_chunk=16):
        assert scores.dtype == np.float32
        assert len(positions) < 16 + 7 * 2  # a step of a chunk adds at most its users, and a target seldom repeats
        got[positions] = scores
        seen[positions] += 1
    assert np.all(seen == 1)
    np.testing.assert_allclose(got, every[targets], atol=1e-4)
    assert list(predict_targets(world, dataset, np.zeros(0, np.int64))) == []


def test_sees_the_past_only(small):
    dataset, world = small
    target = dataset.log.offsets[:-1] + 2
    item = dataset.log.item.copy()
    position = np.arange(len(item)) - dataset.log.offsets[:-1][dataset.log.user]
    item[position >= 2] = (item[position >= 2] + 17) % dataset.catalogue.n_items
    np.testing.assert_array_equal(
        posterior_predictive(world, dataset, target), posterior_predictive(world, with_log(dataset, item=item), target)
    )


def test_follows_a_renumbering_of_the_items(small):
    dataset, world = small
    permuted, _ = permute_items(dataset, 3)
    targets = last_events(dataset)
    a, b = posterior_predictive(world, dataset, targets), posterior_predictive(world, permuted, targets)
    new = {name: k for k, name in enumerate(permuted.catalogue.ids)}
    np.testing.assert_allclose(b[:, [new[name] for name in dataset.catalogue.ids]], a, atol=1e-5)


def test_is_calibrated_and_scores_better_than_perturbed_predictors():
    dataset, world = generate(CityConfig(n_users=400, events_per_user=30, items_per_service=60, n_types=4), 3)
    log = dataset.log
    targets = np.concatenate([last_events(dataset), last_events(dataset) - 2])
    score = posterior_predictive(world, dataset, targets).astype(float)
    rows, truth = np.arange(len(targets)), log.item[targets]
    own = score[rows, truth].mean()
    probability = np.exp(score)
    hit = np.zeros_like(probability)
    hit[rows, truth] = 1
    for lo, hi in ((0.0, 0.005), (0.005, 0.02), (0.02, 0.08), (0.08, 0.3), (0.3, 1.0)):
        cell = (probability >= lo) & (probability < hi)
        error = hit[cell].sum() - probability[cell].sum()
        assert abs(error) < 4.5 * np.sqrt((probability * (1 - probability))[cell].sum())
    # the truth's expected probability under the forecast is what it gets
    expected = (probability**2).sum(axis=1)
    assert abs((probability[rows, truth] - expected).mean()) < 4.5 * probability[rows, truth].std() / np.sqrt(len(rows))
    for power in (0.7, 1.4):
        sharpened = power * score - np.log(np.exp(power * score).sum(axis=1, keepdims=True))
        assert sharpened[rows, truth].mean() < own
    for fields in ({"tau": 0.0}, {"kappa": 0.0}, {"habit": 0.0}, {"rho": 0.0}, {"rho": 1.0}):
        wrong = dataclasses.replace(world, config=dataclasses.replace(world.config, **fields))
        other = posterior_predictive(wrong, dataset, targets)[rows, truth].mean()
        assert other < own, fields
    popularity = np.bincount(log.item, minlength=dataset.catalogue.n_items) + 1.0
    assert np.log(popularity / popularity.sum())[truth].mean() < own - 0.5


def test_profiles_help_where_there_is_no_past_and_only_if_types_are_shared():
    config = CityConfig(n_users=1500, events_per_user=3, items_per_service=60, profile_missing_rate=0.1)
    for rho in (1.0, 0.0):
        dataset, world = generate(dataclasses.replace(config, rho=rho), 0)
        first = dataset.log.offsets[:-1]
        rows, truth = np.arange(len(first)), dataset.log.item[first]
        without, used = (posterior_predictive(world, dataset, first, use_profile=flag) for flag in (False, True))
        if rho:
            assert used[rows, truth].mean() > without[rows, truth].mean() + 0.1
        else:
            np.testing.assert_allclose(used, without, atol=1e-4)


def test_profile_of_identical_users_tells_nothing():
    dataset, world = generate(CityConfig(**(SMALL | {"identical_users": True})), 0)
    a, b = (posterior_predictive(world, dataset, use_profile=flag) for flag in (False, True))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_without_kappa_time_of_day_and_context_do_not_matter():
    dataset, world = generate(CityConfig(**(SMALL | {"kappa": 0.0})), 0)
    before = posterior_predictive(world, dataset, last_events(dataset))
    rng = np.random.default_rng(0)
    shuffled = dataset.log.context[rng.permutation(dataset.log.n_events)]
    moved = with_log(dataset, context=shuffled, time_us=dataset.log.time_us + (86400 * 100 + 3600 * 7) * 10**6)
    np.testing.assert_allclose(posterior_predictive(world, moved, last_events(dataset)), before, atol=1e-5)
    kappa = generate(CityConfig(**SMALL), 0)[1]
    assert np.abs(posterior_predictive(kappa, moved, last_events(dataset)) - before).max() > 0.1


def swap_first_two(dataset):
    item = dataset.log.item.copy()
    first = dataset.log.offsets[:-1]
    item[first], item[first + 1] = dataset.log.item[first + 1], dataset.log.item[first]
    return with_log(dataset, item=item)


def test_without_tau_habit_and_kappa_the_order_of_the_past_does_not_matter():
    off = {"tau": 0.0, "habit": 0.0, "kappa": 0.0}
    dataset, world = generate(CityConfig(**(SMALL | off)), 0)
    target = dataset.log.offsets[:-1] + 2
    before = posterior_predictive(world, dataset, target)
    np.testing.assert_allclose(posterior_predictive(world, swap_first_two(dataset), target), before, atol=1e-5)
    for name in ("tau", "habit"):
        on = dataclasses.replace(world, config=dataclasses.replace(world.config, **{name: 1.0}))
        moved = posterior_predictive(on, swap_first_two(dataset), target) - posterior_predictive(on, dataset, target)
        assert np.abs(moved).max() > 0.05


def test_identical_users_without_tau_and_habit_have_no_use_for_the_past():
    fields = {"identical_users": True, "tau": 0.0, "habit": 0.0}
    dataset, world = generate(CityConfig(**(SMALL | fields)), 0)
    other = np.random.default_rng(0).integers(dataset.catalogue.n_items, size=dataset.log.n_events).astype(np.int32)
    np.testing.assert_allclose(
        posterior_predictive(world, with_log(dataset, item=other), last_events(dataset)),
        posterior_predictive(world, dataset, last_events(dataset)),
        atol=1e-5,
    )


@pytest.mark.parametrize("fields", [{"rho": 0.0, "tau": 0.0}, {"rho": 0.7, "tau": 0.0}, {"rho": 0.0, "tau": 1.0}])
def test_other_services_tell_nothing_of_a_service_exactly_when_rho_and_tau_are_zero(fields):
    dataset, world = generate(CityConfig(**(SMALL | fields)), 0)
    item = dataset.log.item.copy()
    foreign = dataset.event_service != 0
    item[foreign] = (item[foreign] - 40 + 13) % 80 + 40  # other items, none of the first service
    one, other = (posterior_predictive(world, data)[:, :40] for data in (dataset, with_log(dataset, item=item)))
    assert (np.abs(one - other).max() < 1e-4) == (fields["rho"] == fields["tau"] == 0)


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 0, 2, 4, 3, 5), (3, 1, 2, 0, 4, 5)])
def test_identical_services_are_exchangeable(order):
    """Exchanging two kinds, or two services of a kind, everywhere in the past exchanges them in the prediction."""
    fields = {"identical_services": True, "n_services": len(order)}
    dataset, world = generate(CityConfig(**(SMALL | fields)), 0)
    n = world.config.items_per_service
    exchange = np.concatenate([np.arange(n) + z * n for z in order])
    swapped = with_log(dataset, item=exchange[dataset.log.item].astype(np.int32))
    a, b = (posterior_predictive(world, data, last_events(dataset)) for data in (dataset, swapped))
    np.testing.assert_allclose(b[:, exchange], a, atol=1e-4)


def test_refuses_what_is_not_of_this_world(small):
    dataset, world = small
    with pytest.raises(InputError, match="targets"):
        posterior_predictive(world, dataset, np.array([dataset.log.n_events]))
    other = generate(CityConfig(**(SMALL | {"items_per_service": 41})), 0)[0]
    with pytest.raises(InputError, match="catalogue"):
        posterior_predictive(world, other)
    ids = np.char.add("x", dataset.catalogue.ids)
    renamed = dataclasses.replace(dataset, catalogue=dataclasses.replace(dataset.catalogue, ids=ids))
    with pytest.raises(InputError, match="not of this world"):
        posterior_predictive(world, renamed)
