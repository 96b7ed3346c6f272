"""The whole model against its NumPy twin; packing, causality, number formats and dropout as properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import LossConfig, MoEConfig, PersonalConfig
from moerec.tasks.losses import all_candidates, sum_losses
from tests.nn import numpy_model as oracle
from tests.small_model import (
    SIZES,
    assert_packed_is_alone,
    lay,
    make_batch,
    make_config,
    make_model,
    make_sequence,
    make_table,
    worst_gap,
)

TABLE = make_table()
ON = {"tie_items": False, "pointer": "services", "d_pointer": 6}
BARE = {
    "item_text": False,
    "service": False,
    "action": False,
    "event_time": False,
    "request_time": False,
    "request_context": False,
    "item_bias": False,
}
LENGTHS = [[5, 3, 2], [10, 1], [4, 4]]


@jax.jit
def encode(model, batch, table, key=None):
    return model.encode(batch, table, key).state_BTD


@jax.jit
def encode_all(model, batch, table):
    """States and answers, side by side."""
    output = model.encode(batch, table)
    return jnp.concatenate([output.state_BTD, *output.answers], axis=-1)


@jax.jit
def loss_and_gradients(model, batch, table):
    def total(model):
        sums = sum_losses(model, batch, table, all_candidates(SIZES.n_items), LossConfig(chunk=5), None)
        return sums.item, sums.weight

    return jax.value_and_grad(total, has_aux=True)(model)


@functools.cache
def make_sequences() -> list[list[dict]]:
    rng = np.random.default_rng(2)
    return [[make_sequence(rng, n) for n in row] for row in LENGTHS]


def make_packed():
    """The sequences in three rows, and rows of padding: as many as there are sequences, so that shapes are the same."""
    rows = make_sequences()
    return lay([*rows, *([[]] * (sum(map(len, rows)) - len(rows)))], 12)


@pytest.mark.parametrize("switches", [ON, BARE], ids=["all parts", "item rows alone"])
def test_states_and_gradients_are_those_of_the_numpy_model(switches):
    config = make_config(**switches)
    model = make_model(config)
    batch = make_batch(4, [[4, 2]], 7)
    cotangent = np.random.default_rng(5).standard_normal((1, 7, 8))

    def weighted(model):
        out = model.encode(batch, TABLE).state_BTD
        return jnp.sum(out * cotangent), out

    gradients, states = jax.jit(jax.grad(weighted, has_aux=True))(model)
    weights = oracle.read_weights(model)

    def expected(weights):
        return oracle.encode(weights, batch, TABLE, config, SIZES.context_sizes)

    np.testing.assert_allclose(states, expected(weights), atol=5e-5)
    oracle.assert_slopes(lambda w: np.sum(expected(w) * cotangent), weights, oracle.read_weights(gradients), 1e-4)


def test_packed_sequences_have_the_states_loss_and_gradients_of_each_alone():
    model = make_model(make_config(**ON))
    rows = make_sequences()
    packed, alone = make_packed(), lay([[sequence] for row in rows for sequence in row], 12)
    states, alone_states = encode(model, packed, TABLE), encode(model, alone, TABLE)
    assert_packed_is_alone(states, alone_states, rows, atol=1e-5)
    (loss, weight), gradients = loss_and_gradients(model, packed, TABLE)
    (alone_loss, alone_weight), alone_gradients = loss_and_gradients(model, alone, TABLE)
    assert weight == alone_weight == np.sum(packed.weight_BT)
    assert loss == pytest.approx(float(alone_loss), rel=1e-5)
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    assert worst_gap(gradients, alone_gradients) < 1e-5 * size


def test_a_slot_reaches_only_later_states_of_its_sequence():
    model = make_model(make_config(**ON))
    batch = make_packed()
    before = np.asarray(encode_all(model, batch, TABLE))
    b, t = 0, 2
    reached = np.zeros(batch.item_BT.shape, bool)
    reached[b, t:5] = True
    changes = {
        "item_BT": (batch.item_BT[b, t] + 1) % SIZES.n_items,
        "action_BT": (batch.action_BT[b, t] + 1) % SIZES.n_actions,
        "time_BT": 123_456_789,
        "request_time_BT": 223_456_789,
        "request_context_BTC": (batch.request_context_BTC[b, t] + 1) % np.array(SIZES.context_sizes),
    }
    for name, value in changes.items():
        column = getattr(batch, name).copy()
        column[b, t] = value
        after = np.asarray(encode_all(model, batch._replace(**{name: column}), TABLE))
        np.testing.assert_array_equal(after[~reached], before[~reached], err_msg=name)
        assert np.all(np.abs(after - before)[..., :8][reached].max(axis=-1) > 1e-6), name


def test_the_answer_is_no_input():
    model = make_model(make_config(**ON))
    batch = make_packed()
    other = batch._replace(target_BT=(batch.target_BT + 1) % SIZES.n_items, weight_BT=1 - batch.weight_BT)
    np.testing.assert_array_equal(encode_all(model, other, TABLE), encode_all(model, batch, TABLE))


# A slot goes to all experts: which of several it goes to may hang on a rounding.
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"moe": MoEConfig(layers=(1,), n_per_group=1, n_active=4, d_expert=8, tile=8)},
        {"personal": PersonalConfig(layers=(1,), n_aspects=3, d_memory=4)},
    ],
)
def test_bfloat16_is_close_and_weights_and_gradients_stay_float32(parts):
    config = make_config(compute_dtype="bfloat16", **parts, **ON)
    batch = make_packed()
    full, half = make_model(make_config(**parts, **ON)), make_model(config)
    states = encode(half, batch, TABLE)
    assert states.dtype == jnp.float32
    gap = np.asarray(states - encode(full, batch, TABLE))
    assert 0 < np.sqrt(np.mean(gap**2)) < 0.03  # states have a mean square of about 1
    (loss, _), gradients = loss_and_gradients(half, batch, TABLE)
    (exact, _), exact_gradients = loss_and_gradients(full, batch, TABLE)
    assert loss == pytest.approx(float(exact), rel=0.02)
    assert {x.dtype for x in jax.tree.leaves((half, gradients))} == {jnp.dtype("float32")}
    flat, exact_flat = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(t)]) for t in (gradients, exact_gradients))
    cosine = flat @ exact_flat / np.linalg.norm(flat) / np.linalg.norm(exact_flat)
    assert cosine > 0.99


def test_remat_changes_nothing():
    batch = make_packed()
    (loss, _), gradients = loss_and_gradients(make_model(make_config(remat=True, **ON)), batch, TABLE)
    (plain_loss, _), plain_gradients = loss_and_gradients(make_model(make_config(**ON)), batch, TABLE)
    assert loss == pytest.approx(float(plain_loss), rel=1e-6)
    assert worst_gap(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients)) < 1e-4


def test_dropout_is_a_function_of_its_key_and_off_without_one():
    batch = make_packed()
    model, plain = make_model(make_config(dropout=0.3, **ON)), make_model(make_config(**ON))
    np.testing.assert_array_equal(encode(model, batch, TABLE), encode(plain, batch, TABLE))
    once, again, other = (encode(model, batch, TABLE, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    assert np.abs(once - encode(model, batch, TABLE)).max() > 0.1


@pytest.mark.parametrize("tie", [True, False])
def test_candidates_use_the_input_vectors_only_if_tied(tie):
    model = make_model(make_config(tie_items=tie))
    items = np.array([[0, 5], [7, 12]])
    vectors, bias = model.item_vectors(items, TABLE)
    weights = oracle.read_weights(model)
    w = oracle.part(weights, "item_encoder" if tie else "head_encoder")
    expected = [[oracle.item_vector(w, i, TABLE, 1e-6) for i in row] for row in items]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(bias, weights["item_bias_I"][items])
    assert ("head_encoder.row_ID" in weights) != tie


@pytest.mark.parametrize("tie", [True, False])
def test_vectors_that_are_there_already_change_neither_states_nor_gradients(tie):
    model, batch = make_model(make_config(tie_items=tie)), make_batch(4, LENGTHS, 12)
    table = jax.tree.map(jnp.asarray, TABLE)

    @functools.partial(jax.jit, static_argnums=1)
    def pull(model, known):
        def total(model):
            vector_ID = model.item_vectors(jnp.arange(SIZES.n_items), table)[0] if known else None
            state_BTD = model.encode(jax.tree.map(jnp.asarray, batch), table, vector_ID=vector_ID).state_BTD
            return jnp.sum(jnp.sin(state_BTD)), state_BTD

        return jax.value_and_grad(total, has_aux=True)(model)

    ((_, state), grads), ((_, known_state), known_grads) = pull(model, False), pull(model, True)
    np.testing.assert_allclose(known_state, state, atol=1e-5)
    largest = worst_gap(grads, jax.tree.map(jnp.zeros_like, grads))
    assert worst_gap(known_grads, grads) < 1e-6 * largest


def test_without_item_bias_scores_have_none():
    model = make_model(make_config(item_bias=False))
    assert model.item_bias_I is None
    np.testing.assert_array_equal(model.item_vectors(np.arange(3), TABLE)[1], np.zeros(3))


def test_contexts_are_hidden_in_training_alone():
    batch = make_batch(5, [[6]], 8)
    key, states = jax.random.key(3), {}
    for rate in (0.0, 0.9):
        model = make_model(make_config(context_dropout=rate))
        states[rate] = [np.asarray(encode(model, batch, TABLE, k))[0, :6] for k in (None, key)]
    np.testing.assert_array_equal(states[0.0][0], states[0.9][0])
    np.testing.assert_allclose(states[0.0][1], states[0.0][0], atol=1e-5)
    assert np.abs(states[0.9][1] - states[0.9][0]).max() > 1e-2
