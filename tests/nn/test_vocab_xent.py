import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.nn.heads.vocab_xent import chunked_vocab_xent
from moerec.nn.sharding import make_mesh

S, V, D = 13, 50, 8
RNG = np.random.default_rng(0)
STATE, ROW = RNG.normal(size=(S, D)), 3 * RNG.normal(size=(V, D))
LABEL, WEIGHT = RNG.integers(0, V, S), RNG.choice([0.0, 1.0, 2.5], S)
MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 2), (2, 2, 2)]


def by_hand(state=STATE, row=ROW, label=LABEL, weight=WEIGHT):
    """Loss and both gradients in float64, slot by slot."""
    loss, d_state, d_row = 0.0, np.zeros_like(state), np.zeros_like(row)
    for s in range(len(state)):
        logits = row @ state[s]
        log_p = logits - logits.max() - np.log(np.sum(np.exp(logits - logits.max())))
        p = np.exp(log_p)
        loss -= weight[s] * log_p[label[s]]
        pull = weight[s] * (p - (np.arange(len(row)) == label[s]))
        d_state[s] = pull @ row
        d_row += np.outer(pull, state[s])
    return loss, d_state, d_row


@functools.partial(jax.jit, static_argnums=(4, 5))
def pull(state, row, label, weight, chunk, scale=1.0):
    def loss(state, row):
        return scale * chunked_vocab_xent(state, row, label, weight, chunk)

    return jax.value_and_grad(loss, (0, 1))(state, row)


def operands():
    return (
        (jnp.asarray(x, jnp.float32) for x in (STATE, ROW)),
        jnp.asarray(LABEL, jnp.int32),
        jnp.asarray(WEIGHT, jnp.float32),
    )


@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 99])
def test_loss_and_gradients_are_those_of_the_whole_softmax(chunk):
    (state, row), label, weight = operands()
    wanted = by_hand()
    loss, (d_state, d_row) = pull(state, row, label, weight, chunk, 3.0)
    np.testing.assert_allclose(loss, 3 * wanted[0], rtol=1e-5)
    np.testing.assert_allclose(d_state, 3 * wanted[1], atol=2e-4)
    np.testing.assert_allclose(d_row, 3 * wanted[2], atol=2e-4)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_on_a_mesh_it_is_the_same(shape):
    """13 slots on up to eight devices, 50 rows in two parts, whose width of 8 lies in up to four."""
    (state, row), label, weight = operands()
    wanted = by_hand()
    with jax.set_mesh(make_mesh(*shape)):
        loss, (d_state, d_row) = pull(state, row, label, weight, 7)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(d_state, wanted[1], atol=1e-4)
    np.testing.assert_allclose(d_row, wanted[2], atol=1e-4)


def test_states_may_be_bfloat16_and_large_logits_do_not_overflow():
    (state, row), label, weight = operands()
    loss, (d_state, d_row) = pull((100 * state).astype(jnp.bfloat16), row, label, weight, 8)
    rounded = np.asarray((100 * state).astype(jnp.bfloat16), np.float64)
    wanted = by_hand(rounded, np.asarray(row.astype(jnp.bfloat16), np.float64))
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-3)
    assert d_state.dtype == jnp.bfloat16
    assert d_row.dtype == jnp.float32
    assert np.all(np.isfinite(np.asarray(d_row)))


def test_logits_of_qwen2_never_stand_in_memory():
    """8,192 slots by 151,936 tokens would be 5 GB; beside the gradients it takes less than 200 MB, forward and back."""
    n_slots, n_vocab, d = 8192, 151_936, 896
    shapes = [
        ((n_slots, d), jnp.float32),
        ((n_vocab, d), jnp.float32),
        ((n_slots,), jnp.int32),
        ((n_slots,), jnp.float32),
    ]
    step = jax.jit(lambda *x: jax.grad(lambda h, w: chunked_vocab_xent(h, w, *x[2:], 2048), (0, 1))(*x[:2]))
    memory = step.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 200e6
    assert memory.output_size_in_bytes >= 4 * d * (n_slots + n_vocab)
