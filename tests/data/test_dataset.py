"""Item numbers carry nothing: a permutation within each service under which every event keeps its item."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import CityConfig
from moerec.data.city import generate
from moerec.data.dataset import EventLog, ItemTable, keep_last_events, mark_unseen, permute_items, shuffle_services
from moerec.errors import InputError
from tests.random_dataset import make_dataset


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), st.integers(0, 1000), st.integers(0, 1000))
def test_permutation_keeps_every_item_and_every_event(sizes, seed, data_seed):
    before = make_dataset([5, 0, 8], tuple(sizes), seed=data_seed)
    after, number = permute_items(before, seed)
    old, new = before.catalogue, after.catalogue
    assert new.services == old.services
    np.testing.assert_array_equal(new.offsets, old.offsets)
    for lo, hi in zip(old.offsets[:-1], old.offsets[1:], strict=True):
        rows = [sorted(zip(x.ids[lo:hi], x.text[lo:hi], x.attributes[lo:hi], strict=True)) for x in (old, new)]
        assert rows[0] == rows[1], "not a bijection within the service, or texts torn from their ids"
    assert old.ids[before.log.item].tolist() == new.ids[after.log.item].tolist()
    np.testing.assert_array_equal(before.event_service, after.event_service)
    assert after.log.item.dtype == number.dtype == before.log.item.dtype
    assert sorted(number.tolist()) == list(range(sum(sizes)))
    assert new.ids[number].tolist() == old.ids.tolist(), "not the new number of each item"
    for name in ("offsets", "action", "time_us", "context"):
        np.testing.assert_array_equal(getattr(after.log, name), getattr(before.log, name))


def test_services_at_random_keep_their_sizes_and_every_event_its_item():
    before = make_dataset([40, 60], (20, 5, 15), seed=1)
    before = dataclasses.replace(
        before, catalogue=dataclasses.replace(before.catalogue, ids=np.array([f"i{k}" for k in range(40)]))
    )
    after = shuffle_services(before, 3)
    old, new = before.catalogue, after.catalogue
    np.testing.assert_array_equal(new.offsets, old.offsets)
    assert old.ids[before.log.item].tolist() == new.ids[after.log.item].tolist()
    named = [dict(zip(x.ids, zip(x.text, x.attributes, strict=True), strict=True)) for x in (old, new)]
    assert named[0] == named[1], "texts torn from their ids"
    service = [dict(zip(x.ids, x.service.tolist(), strict=True)) for x in (old, new)]
    assert 0.2 < np.mean([service[0][i] != service[1][i] for i in service[0]]) < 0.95
    np.testing.assert_array_equal(shuffle_services(before, 3).log.item, after.log.item)


def test_permutation_is_random_and_a_function_of_the_seed():
    dataset = make_dataset([3], (40, 60))
    once, again, other = (permute_items(dataset, seed)[0].catalogue.ids for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert (once != other).mean() > 0.8
    assert (once != dataset.catalogue.ids).mean() > 0.8


def test_every_place_is_equally_likely():
    dataset = make_dataset([1], (4, 3))
    places = {name: [] for name in dataset.catalogue.ids.tolist()}
    for seed in range(600):
        for place, name in enumerate(permute_items(dataset, seed)[0].catalogue.ids.tolist()):
            places[name].append(place)
    for name, found in places.items():
        size = 4 if name in dataset.catalogue.ids[:4].tolist() else 3
        share = np.bincount(found, minlength=7) / 600
        # five standard errors of a share of 1 / size in 600 draws
        assert np.all(np.abs(share[share > 0] - 1 / size) < 5 * np.sqrt(0.25 / 600)), name
        assert (share > 0).sum() == size


def test_services_and_users_of_events():
    dataset = make_dataset([2, 0, 3], (2, 0, 3))
    assert dataset.catalogue.service.tolist() == [0, 0, 2, 2, 2]
    assert dataset.log.user.tolist() == [0, 0, 2, 2, 2]
    assert dataset.event_service.tolist() == [0 if item < 2 else 2 for item in dataset.log.item]


def test_torn_columns_are_refused():
    dataset = make_dataset([2, 3])
    with pytest.raises(InputError, match="every column"):
        dataclasses.replace(dataset.log, time_us=dataset.log.time_us[:-1])
    with pytest.raises(InputError, match="offsets"):
        EventLog(np.array([0, 3, 2, 5]), *(getattr(dataset.log, x) for x in ("item", "action", "time_us", "context")))
    with pytest.raises(InputError, match="one entry per item"):
        dataclasses.replace(dataset.catalogue, text=dataset.catalogue.text[:-1])
    names = dataset.catalogue.ids
    with pytest.raises(InputError, match="offsets"):
        ItemTable(("one",), np.array([0, 5]), names, names, names)


def test_profile_codes_keep_zero_for_missing():
    data = make_dataset([2, 1, 3])
    fields = {"age": np.array(["", "young", "old"]), "city": np.array(["b", "a", "b"]), "none": np.array(["", "", ""])}
    codes, sizes = dataclasses.replace(data, profile=fields).profile_codes
    assert codes.tolist() == [[0, 2, 0], [2, 1, 0], [1, 2, 0]]
    assert sizes == (3, 3, 1)
    codes, sizes = dataclasses.replace(data, profile={}).profile_codes
    assert (codes.shape, sizes) == ((3, 0), ())


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_values_without_a_known_event_are_unseen(seed):
    rng = np.random.default_rng(seed)
    before = make_dataset([5, 0, 8], (4,), seed=seed)
    n, context = before.log.n_events, {"sky": ("sun", "rain"), "city": ("a", "b", "c", "d")}
    codes = np.stack([rng.integers(0, len(values) + 1, n) for values in context.values()], axis=1).astype(np.int16)
    before = dataclasses.replace(before, context=context, log=dataclasses.replace(before.log, context=codes))
    is_known = rng.random(n) < 0.4
    after = mark_unseen(before, is_known).log.context
    assert after.dtype == codes.dtype
    for event, c in np.ndindex(codes.shape):
        known = codes[event, c] == 0 or codes[event, c] in codes[is_known, c]
        assert after[event, c] == (codes[event, c] if known else len(list(context.values())[c]) + 1)
    np.testing.assert_array_equal(before.log.context, codes)


def test_each_target_keeps_its_last_events_and_its_user():
    dataset, _ = generate(CityConfig(n_users=8, events_per_user=9, items_per_service=10), 0)
    log = dataset.log
    targets = np.array([log.offsets[1] - 1, log.offsets[1], log.offsets[3] + 4])
    kept, rows = keep_last_events(dataset, targets, 3)
    for k, target in enumerate(targets):
        user = log.user[target]
        expected = range(max(int(log.offsets[user]), int(target) - 3), int(target) + 1)
        own = slice(*kept.log.offsets[k : k + 2])
        assert kept.log.item[own].tolist() == log.item[list(expected)].tolist()
        assert kept.log.time_us[own].tolist() == log.time_us[list(expected)].tolist()
        assert rows[k] == kept.log.offsets[k + 1] - 1
        assert kept.users[k] == dataset.users[user]
        assert all(kept.profile[name][k] == values[user] for name, values in dataset.profile.items())
