"""What the profile router finds: on relevances made by hand, of which the answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import PersonalConfig
from moerec.data.city import names
from moerec.data.load import load_data
from moerec.eval.probes.profile_aspects import aspect_of_items, aspects_of_needs, describe_aspects, share_items
from moerec.train.run_dir import make_sizes
from moerec.train.state import init_state
from tests.tiny import make_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, and a model with two memory aspects at three time scales, as it is at the start."""
    config = make_config()
    personal = PersonalConfig(layers=(1,), n_aspects=2, n_scales=3, d_memory=4)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, personal=personal))
    data = load_data(config.data, tmp_path_factory.mktemp("aspects"))
    return data, init_state(config, make_sizes(config, data)).params


def test_items_and_needs_have_the_aspects_of_their_categories(trained):
    data, _ = trained
    order, categories = list(names.ASPECTS), list(names.CATEGORIES.values())
    by_id = dict(zip(data.world.catalogue.ids, data.world.category_I, strict=True))
    expected = [order.index(categories[by_id[i]].aspect) for i in data.dataset.catalogue.ids]
    assert aspect_of_items(data.world, data.dataset).tolist() == expected
    share_NW = aspects_of_needs(data.world)
    np.testing.assert_allclose(share_NW.sum(axis=1), 1)
    fit_C = np.exp(data.world.need_fit_NC[2])
    diet = sum(x for x, category in zip(fit_C, categories, strict=True) if category.aspect == "diet") / fit_C.sum()
    assert share_NW[2, order.index("diet")] == pytest.approx(diet)


def test_relevance_that_follows_the_need_is_found_and_relevance_at_random_is_chance(trained, monkeypatch):
    data, model = trained
    world, dataset = data.world, data.dataset
    diet = list(names.ASPECTS).index("diet")
    is_diet = aspect_of_items(world, dataset) == diet
    share_IX = np.stack([is_diet, ~is_diet], axis=1).astype(np.float32)  # aspect 0 is written by diet alone
    monkeypatch.setattr("moerec.eval.probes.profile_aspects.share_items", lambda *_: jnp.asarray(share_IX))
    rows = np.arange(dataset.log.n_events)
    about_diet = aspects_of_needs(world)[world.truth.need[rows], diet]
    knowing = np.zeros((len(rows), 7))
    knowing[np.arange(len(rows)), np.where(about_diet > 0.3, 1, 4)] = 1  # slots 0-2 are aspect 0, 3-5 aspect 1
    found = describe_aspects(world, dataset, model, data.catalog, knowing, rows)
    assert found["writes"][0][diet] == 1
    assert found["writes"][1][diet] == 0
    assert found["found"] > found["chance"] + 0.05
    assert found["p_value"] == pytest.approx(1 / 1001)
    assert found["best"] >= found["found"]
    by_hand = np.where(about_diet > 0.3, about_diet, (aspects_of_needs(world)[world.truth.need] @ found["writes"][1]))
    assert found["found"] == pytest.approx(by_hand[dataset.log.offsets[:-1]].mean())  # a target a user
    guess = np.zeros((len(rows), 7))
    guess[np.arange(len(rows)), np.random.default_rng(0).integers(0, 6, len(rows))] = 1
    chance = describe_aspects(world, dataset, model, data.catalog, guess, rows)
    assert abs(chance["found"] - chance["chance"]) < 0.06
    assert chance["p_value"] > 0.01


def test_items_are_shared_as_their_events_are(trained):
    data, model = trained
    share_IX = np.asarray(share_items(model, data.catalog))[:5]
    x_ID = model.event_vectors(jnp.arange(5), jnp.zeros(5, int), data.catalog)
    x_ID = np.asarray(jax.vmap(model.profile.norm)(x_ID), np.float64)
    weight = np.exp(x_ID @ np.asarray(model.profile.aspect_DX[...]))
    np.testing.assert_allclose(share_IX, weight / weight.sum(axis=1, keepdims=True), rtol=1e-4)


def test_other_memories_and_data_without_a_truth_have_none(trained):
    data, model = trained
    world = dataclasses.replace(data.world, truth=None)
    rows, relevance = np.arange(3), np.ones((3, 7)) / 7
    assert describe_aspects(world, data.dataset, model, data.catalog, relevance, rows) is None
    model.profile, kept = None, model.profile
    assert describe_aspects(data.world, data.dataset, model, data.catalog, relevance, rows) is None
    model.profile = kept
