"""Interventions: whose profile a slot gets, what stays of a context, and what a run reports of both."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import PersonalConfig
from moerec.nn.personalization.profile import MEAN_PROFILE, NO_PROFILE
from moerec.proofs import permute_context, swap_profiles
from moerec.run import run
from tests.small_model import SIZES, lay, make_batch, make_model, make_sequence, make_table
from tests.small_model import make_config as make_model_config
from tests.tiny import make_config

LENGTHS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4)
TABLE = jax.tree.map(jnp.asarray, make_table())
PERSONAL = PersonalConfig(layers=(1,), n_aspects=3, n_scales=2, d_memory=4, chunk=4)


def list_people(batch):
    """The flat slots of each person, in the order of the batch."""
    rows, slots = batch.segment_BT.shape
    keys = [(b, int(s)) for b in range(rows) for s in np.unique(batch.segment_BT[b]) if s]
    return [b * slots + np.flatnonzero(batch.segment_BT[b] == s) for b, s in keys]


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 99))
def test_everybody_gets_the_profile_of_the_next_person_as_far_on(lengths, seed):
    batch = make_batch(seed, lengths, 16)
    donor, people = swap_profiles(batch).reshape(-1), list_people(batch)
    for own, other in zip(people, [*people[1:], people[0]], strict=True):
        assert donor[own].tolist() == [other[min(k, len(other) - 1)] for k in range(len(own))]


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 99))
def test_contexts_are_permuted_within_a_person(lengths, seed):
    batch = make_batch(seed, lengths, 16)
    permuted = permute_context(batch, np.random.default_rng(seed))
    before, after = (x.request_context_BTC.reshape(-1, 2) for x in (batch, permuted))
    for own in list_people(batch):
        assert sorted(map(tuple, after[own])) == sorted(map(tuple, before[own]))
    padding = batch.segment_BT.reshape(-1) == 0
    np.testing.assert_array_equal(after[padding], before[padding])
    for name in set(batch._fields) - {"request_context_BTC"}:
        np.testing.assert_array_equal(getattr(permuted, name), getattr(batch, name))


def test_permutations_are_random():
    batch = make_batch(0, [[16], [16]], 16)
    rng = np.random.default_rng(0)
    moved = [np.any(permute_context(batch, rng).request_context_BTC != batch.request_context_BTC) for _ in range(5)]
    assert all(moved)


@jax.jit
def encode(model, batch, donor):
    return model.encode(batch, TABLE, donor_BT=donor).state_BTD


@pytest.fixture(scope="module")
def model():
    return make_model(make_model_config(personal=PERSONAL, event_time=False, request_time=False))


def test_a_slot_reads_the_profile_that_it_is_given(model):
    """Its own: nothing changes. Nobody's: at a first slot without fields nothing changes either, but elsewhere."""
    rng = np.random.default_rng(1)
    people = [make_sequence(rng, n) for n in (6, 5)]
    people[0]["field_BTY"] = np.zeros_like(people[0]["field_BTY"])
    batch = lay([people], 12)
    plain = model.encode(batch, TABLE).state_BTD
    own = np.arange(12, dtype=np.int32).reshape(1, 12)
    np.testing.assert_allclose(encode(model, batch, own), plain, atol=1e-6)
    changed = np.abs(encode(model, batch, np.full_like(own, NO_PROFILE)) - plain).max(axis=-1)[0] > 1e-4
    assert changed.tolist()[:11] == [False, *[True] * 5, *[True] * 5]


def test_the_profile_alone_is_exchanged(model):
    """With the next person's profile a slot has the state that it would have had, had they lived the same past.

    Two people with one history but other fields: swapped, each has the states of the other.
    """
    one = make_sequence(np.random.default_rng(2), 6)
    other = {**one, "field_BTY": (one["field_BTY"] + 1) % np.array(SIZES.field_sizes)}
    batch = lay([[one], [other]], 6)
    plain = np.asarray(model.encode(batch, TABLE).state_BTD)
    assert np.abs(plain[0] - plain[1]).max() > 1e-3
    np.testing.assert_allclose(encode(model, batch, swap_profiles(batch)), plain[::-1], atol=1e-5)


def test_the_mean_profile_is_that_of_all_slots(model):
    """All have the same, so that two people who differ by their fields alone have the same states."""
    one = make_sequence(np.random.default_rng(3), 6)
    other = {**one, "field_BTY": (one["field_BTY"] + 1) % np.array(SIZES.field_sizes)}
    batch = lay([[one], [other]], 8)  # padding does not count
    states = np.asarray(encode(model, batch, np.full((2, 8), MEAN_PROFILE, np.int32)))
    np.testing.assert_allclose(states[0], states[1], atol=1e-6)
    short = np.asarray(encode(model, lay([[one], [other]], 6), np.full((2, 6), MEAN_PROFILE, np.int32)))
    np.testing.assert_allclose(states[:, :6], short, atol=1e-5)
    assert np.abs(states - np.asarray(jnp.asarray(model.encode(batch, TABLE).state_BTD)))[:, :6].max() > 1e-3


def test_a_run_reports_what_it_loses(tmp_path):
    config = make_config(steps=4, eval_every=4)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, personal=PERSONAL),
        eval=dataclasses.replace(config.eval, effects=True),
        baselines=(),
    )
    metrics = run(config, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["proofs"] == metrics["proofs"]
    assert {part: set(edits) for part, edits in metrics["proofs"].items()} == {
        "profile": {"swapped", "mean", "empty"},
        "context": {"permuted", "missing"},
    }
    own = metrics["test"]["union"]["all"]["ndcg@10"]
    for edits in metrics["proofs"].values():
        for effect in edits.values():
            assert effect["difference"] == pytest.approx(own - effect["ndcg@10"], abs=1e-9)
            assert 0 < effect["p_value"] <= 1
