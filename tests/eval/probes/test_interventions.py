"""Interventions: whose profile a slot gets, and what stays of a context. A run reports them: `test_recommend`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.config import PersonalConfig
from moerec.eval.probes.interventions import choose_sources, permute_context
from moerec.nn.profile.profile_router import MEAN_PROFILE, NO_PROFILE
from tests.small_model import SIZES, lay, make_batch, make_model, make_sequence, make_table, with_request
from tests.small_model import make_config as make_model_config

LENGTHS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4)
TABLE = jax.tree.map(jnp.asarray, make_table())
PERSONAL = PersonalConfig(layers=(1,), n_aspects=3, n_scales=2, d_memory=4, chunk=4)


def list_users(batch):
    """The flat slots of each user, in the order of the batch."""
    rows, slots = batch.segment_BT.shape
    keys = [(b, int(s)) for b in range(rows) for s in np.unique(batch.segment_BT[b]) if s]
    return [b * slots + np.flatnonzero(batch.segment_BT[b] == s) for b, s in keys]


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 99))
def test_everybody_gets_the_profile_of_the_next_user_as_far_on(lengths, seed):
    batch = make_batch(seed, lengths, 16, control=seed % 2 == 0)
    donor, users = choose_sources(batch, np.arange(sum(map(len, lengths)))).reshape(-1), list_users(batch)
    for own, other in zip(users, [*users[1:], users[0]], strict=True):
        assert donor[own].tolist() == [other[min(k, len(other) - 1)] for k in range(len(own))]


@settings(max_examples=40)
@given(LENGTHS, st.data())
def test_nobody_gets_an_own_profile_by_another_of_their_sequences(lengths, data):
    batch = make_batch(0, lengths, 16)
    sequences = list_users(batch)
    user = np.sort(data.draw(st.lists(st.integers(0, 3), min_size=len(sequences), max_size=len(sequences))))
    owner = np.full(batch.segment_BT.size, -1)
    for own, name in zip(sequences, user, strict=True):
        owner[own] = name
    donor = choose_sources(batch, user).reshape(-1)
    names = sorted(set(user.tolist()))
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    used = owner >= 0
    assert owner[donor[used]].tolist() == [following[name] for name in owner[used]]
    np.testing.assert_array_equal(donor[~used], np.flatnonzero(~used))


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 99))
def test_contexts_are_permuted_within_a_user(lengths, seed):
    batch = make_batch(seed, lengths, 16, control=seed % 2 == 0)
    permuted = permute_context(batch, np.random.default_rng(seed))
    before, after = (x.request.context_BTC.reshape(-1, 2) for x in (batch, permuted))
    for own in list_users(batch):
        assert sorted(map(tuple, after[own])) == sorted(map(tuple, before[own]))
    padding = batch.segment_BT.reshape(-1) == 0
    np.testing.assert_array_equal(after[padding], before[padding])
    jax.tree.map(np.testing.assert_array_equal, with_request(permuted, context_BTC=batch.request.context_BTC), batch)


def test_permutations_are_random():
    batch = make_batch(0, [[16], [16]], 16)
    rng = np.random.default_rng(0)
    before = batch.request.context_BTC
    moved = [np.any(permute_context(batch, rng).request.context_BTC != before) for _ in range(5)]
    assert all(moved)


@pytest.fixture(scope="module")
def encode():
    """Compiled once: states of two rows of eight slots under other profiles, or (no donors) their own."""
    model = make_model(make_model_config(personal=PERSONAL, event_time=False, request_time=False))

    @jax.jit
    def compiled(batch, donor):
        profile = model.replace_profiles(model.read_profiles(batch, TABLE), donor, batch)
        return model.encode(batch, TABLE, profile=profile).state_BTD

    own = np.arange(16, dtype=np.int32).reshape(2, 8)
    return lambda batch, donor=own: np.asarray(compiled(batch, np.broadcast_to(donor, own.shape).astype(np.int32)))


def make_twins(seed: int, n: int = 6):
    """Two users with one history, but other fields."""
    one = make_sequence(np.random.default_rng(seed), n)
    other = {**one, "request.field": (one["request.field"] + 1) % np.array(SIZES.field_sizes)}
    return lay([[one], [other]], 8)


def test_with_its_own_profile_a_slot_is_as_it_was(encode):
    batch = make_twins(1)
    model = make_model(make_model_config(personal=PERSONAL, event_time=False, request_time=False))
    np.testing.assert_allclose(encode(batch), model.encode(batch, TABLE).state_BTD, atol=1e-5)


def test_nobodys_profile_is_that_of_a_first_slot_without_fields(encode):
    rng = np.random.default_rng(1)
    users = [make_sequence(rng, n) for n in (6, 7)]
    users[0]["request.field"] = np.zeros_like(users[0]["request.field"])
    batch = lay([[user] for user in users], 8)
    changed = np.abs(encode(batch, NO_PROFILE) - encode(batch)).max(axis=-1) > 1e-4
    assert changed[0, :6].tolist() == [False, *[True] * 5]
    assert changed[1, :7].all()


def test_twins_with_each_others_profile_have_each_others_states(encode):
    batch = make_twins(2)
    plain = encode(batch)
    assert np.abs(plain[0] - plain[1]).max() > 1e-3
    np.testing.assert_allclose(encode(batch, choose_sources(batch, np.arange(2))), plain[::-1], atol=1e-5)


def test_with_the_mean_profile_twins_have_one_state(encode):
    """The mean is that of the slots alone: what stands in the padding changes nothing."""
    batch = make_twins(3)
    states = encode(batch, MEAN_PROFILE)
    np.testing.assert_allclose(states[0], states[1], atol=1e-6)
    assert np.abs(states - encode(batch))[:, :6].max() > 1e-3
    item_BT = np.where(batch.segment_BT > 0, batch.item_BT, 3)
    np.testing.assert_allclose(encode(batch._replace(item_BT=item_BT), MEAN_PROFILE)[:, :6], states[:, :6], atol=1e-6)
