"""Norm, gated feed-forward and dropout against NumPy; the scanned stack against a Python loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.nn.block import Block, LayerContext, run_blocks, stack_blocks
from moerec.nn.layers import RMSNorm, SwiGLU, declare, dropout, fan_in, fan_in_heads, fan_in_second, normal
from tests.nn import numpy_model as oracle
from tests.small_model import fill, make_config, random_like, worst_gap

X = 3 * np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)
SEGMENT = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]], np.int32)
POSITION = np.array([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]], np.int32)
CONTEXT = LayerContext(POSITION, SEGMENT)


def check_against(module, formula):
    """Values and gradients of `module(X)` against `formula(weights, x)`."""
    cotangent = np.random.default_rng(2).standard_normal(X.shape)

    def weighted(module, x):
        out = module(x)
        return jnp.sum(out * cotangent), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(module, X)
    weights = {**oracle.read_weights(module), "x": X.astype(np.float64)}
    np.testing.assert_allclose(out, formula(weights, weights["x"]), atol=1e-5, rtol=1e-5)
    found = {**oracle.read_weights(gradients[0]), "x": np.asarray(gradients[1], np.float64)}
    oracle.assert_slopes(lambda w: np.sum(formula(w, w["x"]) * cotangent), weights, found, 1e-5)


def test_rms_norm():
    norm = fill(jax.eval_shape(lambda: RMSNorm(8, 0.01)))
    check_against(norm, lambda w, x: oracle.rms_norm(x, w["scale"], 0.01))


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    norm = fill(jax.eval_shape(lambda: RMSNorm(8, 1e-6)))
    x = jnp.asarray(X, jnp.bfloat16)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    exact = oracle.rms_norm(np.asarray(x, np.float64), np.asarray(norm.scale[...], np.float64), 1e-6)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8)  # one rounding


def test_swiglu():
    check_against(fill(jax.eval_shape(lambda: SwiGLU(jax.random.key(0), 8, 16))), oracle.swiglu)


def test_initialisers_have_unit_gain():
    for init, shape, n_inputs in ((fan_in, (50, 20, 40), 50), (fan_in_heads, (10, 20, 200), 200)):
        w = np.asarray(init(jax.random.key(1), shape, jnp.float32))
        assert np.std(w) * np.sqrt(n_inputs) == pytest.approx(1, rel=0.03)


def test_a_declaration_whose_shape_and_axes_differ_in_length_is_refused():
    with pytest.raises(ValueError, match="differ in length"):
        declare(jax.random.key(0), (2, 3), ("embed",), jax.nn.initializers.zeros)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", [jax.nn.initializers.ones, fan_in, fan_in_heads, fan_in_second, normal(0.1)])
def test_a_weight_has_the_dtype_that_its_declaration_asks_for(init, dtype):
    weight = declare(jax.random.key(0), (2, 3, 4), ("embed", None, None), init, dtype=dtype)
    assert weight.dtype == jnp.dtype(dtype)
    assert weight.shape == (2, 3, 4)
    assert declare(jax.random.key(0), (2, 3, 4), ("embed", None, None), init).dtype == jnp.float32  # if nothing is said


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation_and_scales_what_it_keeps(rate):
    n = 200_000
    out, pullback = jax.vjp(lambda x: dropout(x, rate, jax.random.key(3)), jnp.full(n, 2.0))
    kept = np.asarray(out) != 0
    np.testing.assert_allclose(np.asarray(out)[kept], 2 / (1 - rate), rtol=1e-3)
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / n)
    np.testing.assert_allclose(pullback(jnp.ones(n))[0], np.asarray(out) / 2, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_dropout_of_neighbors_is_independent(width):
    """Two of them share a random word."""
    kept = np.asarray(dropout(jnp.ones((200_000 // width, width)), 0.5, jax.random.key(5))).reshape(-1) != 0
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(kept))
    assert abs(np.corrcoef(kept[:-1], kept[1:])[0, 1]) < 4 / np.sqrt(len(kept))


def test_dropout_without_key_or_rate_is_the_identity():
    x = jnp.asarray(X)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@functools.cache
def make_stack(rate: float = 0.0) -> Block:
    """Two layers with random weights."""
    config = make_config(dropout=rate)
    return fill(jax.eval_shape(lambda: stack_blocks(jax.random.split(jax.random.key(0), 2), config)))


def run(blocks, x, key, remat: bool):
    keys = None if key is None else jax.random.split(key, 2)
    return run_blocks(blocks, x, CONTEXT, None, keys, remat)[0]


def loop(blocks, x, key, remat: bool):
    """The same blocks one after the other."""
    keys = [None, None] if key is None else jax.random.split(key, 2)
    for index in range(2):
        x, _ = jax.tree.map(lambda w, i=index: w[i], blocks)(x, CONTEXT, None, keys[index])
    return x


@functools.cache
def value_and_gradients(function, rate: float, remat: bool = False):
    """Of the sum of the output against a fixed cotangent; with dropout at a fixed key unless the rate is 0."""

    def weighted(blocks, x):
        out = function(blocks, x, jax.random.key(7) if rate else None, remat)
        return jnp.sum(out * random_like(X, 5).astype(np.float32)), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(make_stack(rate), X)
    return out, gradients


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_scan_over_stacked_layers_is_a_loop_over_blocks(rate):
    assert worst_gap(value_and_gradients(run, rate), value_and_gradients(loop, rate)) < 2e-5


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_remat_changes_neither_value_nor_gradient(rate):
    assert worst_gap(value_and_gradients(run, rate, True), value_and_gradients(run, rate, False)) < 2e-5


def test_block_equals_the_formula():
    weights = oracle.read_weights(make_stack())
    config = make_config()
    for b in range(2):
        x = X[b].astype(np.float64)
        for index in range(2):
            x = oracle.block(oracle.layer(weights, index), x, POSITION[b], SEGMENT[b], config)
        np.testing.assert_allclose(value_and_gradients(run, 0.0)[0][b], x, atol=2e-5, rtol=1e-5)


def test_layers_start_different():
    blocks = jax.jit(lambda: stack_blocks(jax.random.split(jax.random.key(0), 2), make_config()))()
    for kernel in (blocks.attention.q_DNH, blocks.ffn.up_DF):
        assert kernel.shape[0] == 2
        assert np.abs(kernel[0] - kernel[1]).min() > 0
