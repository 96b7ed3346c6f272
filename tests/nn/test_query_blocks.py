"""What is computed block by block is what is computed at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.nn.heads.item import add_probability
from moerec.nn.heads.query_blocks import LEAST_ROWS, MOST_NUMBERS, MOST_OF_LEAST, map_blocks
from tests.small_model import make_config, make_model, make_table


@pytest.mark.parametrize("n", [0, 1, 5, 12])
@pytest.mark.parametrize("most", [1, 20, 35, 50, 1000])
def test_every_row_is_computed_once_and_in_its_place(n, most):
    seen = []

    def f(x, pair):
        seen.append(len(x))
        return x * pair["a"][:, 0], (pair["a"] + pair["b"][:, None], jnp.full(len(x), 7))

    x, a, b = jnp.arange(n), jnp.arange(2 * n).reshape(n, 2), jnp.arange(n) ** 2
    product, (total, sevens) = map_blocks(f, (x, {"a": a, "b": b}), 10, most)
    np.testing.assert_array_equal(product, np.arange(n) * np.arange(0, 2 * n, 2))
    np.testing.assert_array_equal(total, np.arange(2 * n).reshape(n, 2) + np.arange(n)[:, None] ** 2)
    np.testing.assert_array_equal(sevens, np.full(n, 7))
    assert max(seen) <= max(most // 10, 1)


@pytest.mark.parametrize(
    ("n_items", "n_blocks"),
    [(1_200, 1), (MOST_NUMBERS // 64, 4), (1_000_000, 8), (2 * MOST_OF_LEAST, 256)],
)
def test_blocks_are_large_where_many_items_are_read_for_them(n_items, n_blocks):
    sizes = []
    jax.eval_shape(lambda x: map_blocks(lambda x: sizes.append(len(x)) or x, (x,), n_items), jnp.zeros(256))
    assert sizes[0] == 256 // n_blocks
    assert sizes[0] * n_items <= MOST_OF_LEAST or sizes[0] == 1
    assert sizes[0] >= LEAST_ROWS or sizes[0] * n_items * 2 > MOST_OF_LEAST


def test_probability_is_added_as_in_float64():
    rng = np.random.default_rng(0)
    log_p = np.concatenate([-120 * rng.random(200), [-200.0, -3.0, -3.0, -3.0]]).astype(np.float32)
    more = np.concatenate([10 ** (-12 * rng.random(200)), [1e-5, 0.0, 1e-42, 0.9]]).astype(np.float32)
    found = np.asarray(jax.jit(add_probability)(log_p, more))
    np.testing.assert_allclose(found, np.log(np.exp(log_p.astype(np.float64)) + more), rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(found[more < 1e-30], log_p[more < 1e-30])
    slope = jax.grad(lambda x, m: jnp.sum(add_probability(x, m)), argnums=(0, 1))(log_p, more)
    assert all(np.isfinite(x).all() for x in slope)


@pytest.mark.parametrize("most", [24, 72, 168])
def test_the_vectors_of_all_items_and_their_gradients_are_those_of_one_pass(most):
    model, table = make_model(make_config(), 1), jax.tree.map(jnp.asarray, make_table())
    toward_ID = np.random.default_rng(0).standard_normal((len(table.service_I), 8)).astype(np.float32)

    def value(model, most):
        bound = model.head.bind(table, model.item_encoder, most)
        return jnp.sum(bound.vector_ID * toward_ID) + jnp.sum(jnp.square(bound.bias_I)), bound

    (_, bound), slope = jax.value_and_grad(value, has_aux=True)(model, most)
    (_, whole), whole_slope = jax.value_and_grad(value, has_aux=True)(model, 10**6)
    np.testing.assert_allclose(bound.vector_ID, whole.vector_ID, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(bound.bias_I, whole.bias_I)
    for one, other in zip(jax.tree.leaves(slope), jax.tree.leaves(whole_slope), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
