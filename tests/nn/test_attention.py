"""Attention against loops over slots and heads; positions, causality and padding as properties."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moerec.config import ModelConfig
from moerec.errors import InputError
from moerec.nn.attention import BLOCKED_FROM, Attention, _attend, attend_plain, rotate
from moerec.nn.sharding import ROW_AXES, batch_sharding, make_mesh, replicated
from moerec.nn.temporal import N_GAPS
from tests.nn import numpy_model as oracle
from tests.small_model import fill, make_config

SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 0, 0]], np.int32)
POSITION = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 2, 3, 4, 0, 0]], np.int32)
X = np.random.default_rng(1).standard_normal((2, 8, 8)).astype(np.float32)


@functools.cache
def make_attention(n_heads: int, n_kv_heads: int) -> Attention:
    config = make_config(n_heads=n_heads, n_kv_heads=n_kv_heads, rope_theta=100.0)
    return fill(jax.eval_shape(lambda: Attention(jax.random.key(0), config)))


@jax.jit
def attend(attention, x, segment, position):
    return attention(x, position, segment)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 2), (4, 1), (2, 2)])
def test_equals_a_loop_over_slots_and_heads_in_value_and_gradient(n_heads, n_kv_heads):
    attention = make_attention(n_heads, n_kv_heads)
    cotangent = np.random.default_rng(2).standard_normal(X.shape)

    def value(w):
        rows = zip(w["x"], POSITION, SEGMENT, strict=True)
        return np.stack([oracle.attention(w, x, p, s, 100.0) for x, p, s in rows])

    def weighted(attention, x):
        out = attend(attention, x, SEGMENT, POSITION)
        return jnp.sum(out * cotangent), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(attention, X)
    weights = {**oracle.read_weights(attention), "x": X.astype(np.float64)}
    np.testing.assert_allclose(out, value(weights), atol=1e-5, rtol=1e-5)
    found = {**oracle.read_weights(gradients[0]), "x": np.asarray(gradients[1], np.float64)}
    oracle.assert_slopes(lambda w: np.sum(value(w) * cotangent), weights, found, 1e-5)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(
    ("n_slots", "backend"),
    [(BLOCKED_FROM - 6, "auto"), (BLOCKED_FROM + 6, "auto"), (BLOCKED_FROM + 6, "reference"), (50, "xla_blocks")],
)
def test_short_and_long_rows_equal_a_softmax_over_the_mask(n_slots, backend, window):
    """Values against numpy, gradients by differences along random directions."""
    rng = np.random.default_rng(3)
    segment = np.sort(rng.integers(1, 4, (2, n_slots)), axis=1).astype(np.int32)
    segment[:, -3:] = 0
    q, k, v = (rng.standard_normal((2, n_slots, heads, 4)) for heads in (4, 2, 2))
    cotangent = rng.standard_normal(q.shape)

    def by_hand(q, k, v):
        logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)) / 2
        at = np.arange(n_slots)
        ago = at[:, None] - at
        sees = (segment[:, :, None] == segment[:, None]) & (ago >= 0) & (ago < (window or n_slots))
        weight = np.where(sees[:, None], np.exp(logits), 0)
        return np.einsum("bnts,bsnh->btnh", weight / weight.sum(axis=-1, keepdims=True), np.repeat(v, 2, axis=2))

    def weighted(*operands):
        out = attend_plain(*operands, segment, window, backend)
        return jnp.sum(out * cotangent), out

    slopes, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(
        *(x.astype(np.float32) for x in (q, k, v))
    )
    np.testing.assert_allclose(out[:, :-3], by_hand(q, k, v)[:, :-3], atol=2e-5)
    weights, found = dict(zip("qkv", (q, k, v), strict=True)), dict(zip("qkv", map(np.asarray, slopes), strict=True))
    oracle.assert_slopes(lambda w: np.sum(by_hand(w["q"], w["k"], w["v"]) * cotangent), weights, found, 1e-4)


@pytest.mark.parametrize(("n_model", "n_gathers"), [(2, 0), (4, 1)])
def test_on_a_mesh_each_device_has_its_own_rows_and_heads(n_model, n_gathers):
    """Two key heads: four devices cannot share them, and have all heads each."""
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((4, 12, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    segment = np.repeat([[1, 2, 0]], 4, axis=0).repeat(4, axis=1).astype(np.int32)

    def run(*operands):
        return attend_plain(*operands, window=3, backend="xla_blocks")

    alone = jax.jit(run)(q, k, v, segment)
    mesh = make_mesh(2, 1, n_model)
    by_head, by_row = (NamedSharding(mesh, PartitionSpec(ROW_AXES, None, name)) for name in ("model", None))
    spread = [jax.device_put(x, by_head if x.shape[2] % n_model == 0 else by_row) for x in (q, k, v)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*spread, jax.device_put(segment, batch_sharding(mesh))).compile()
    text = compiled.as_text()
    assert (len(re.findall(r" all-gather\(", text)) > 0) == (n_gathers > 0)
    out = compiled(*spread, jax.device_put(segment, batch_sharding(mesh)))
    np.testing.assert_allclose(out, alone, atol=1e-6)
    heads = {shard.data.shape[2] for shard in out.addressable_shards}
    assert heads == {4 if n_gathers else 2}


@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 4, 2), (1, 2, 4)])
@pytest.mark.parametrize("backend", ["splash", "xla_blocks"])
def test_on_a_mesh_without_biases_values_and_gradients_are_those_of_one_device(backend, shape):
    """Three rows, which neither two nor four devices can share evenly; four devices cannot share two key heads."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((3, 12, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    segment = jnp.asarray(np.sort(rng.integers(1, 3, (3, 12)), axis=1), jnp.int32)
    cotangent = rng.standard_normal(q.shape).astype(np.float32)

    def run(q, k, v, name):
        out = attend_plain(q, k, v, segment, 5, name)
        return jnp.sum(out * cotangent), out

    differentiate = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    alone = differentiate(q, k, v, "reference")
    with jax.set_mesh(make_mesh(*shape)):
        spread = differentiate(q, k, v, backend)
    for expected, found in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 2), (2, 2, 1), (1, 4, 2), (1, 2, 4)])
def test_on_a_mesh_biases_and_gradients_are_those_of_one_device(shape):
    """Three rows, which neither two nor four devices can share evenly; biases by time and by kind, of every head."""
    rng = np.random.default_rng(5)
    b, t, n = 3, 12, 4
    q, k, v = (rng.standard_normal((b, t, heads, 4)).astype(np.float32) for heads in (n, 2, 2))
    segment = np.sort(rng.integers(1, 3, (b, t)), axis=1).astype(np.int32)
    time = np.cumsum(rng.integers(1, 10_000, (b, t)), axis=1).astype(np.int32)
    kind = rng.integers(0, 3, (b, t)).astype(np.int32)
    time_bias_NR = rng.standard_normal((n, N_GAPS + 1)).astype(np.float32)
    kind_bias_BTNZ = rng.standard_normal((b, t, n, 3)).astype(np.float32)
    cotangent = rng.standard_normal((b, t, n, 4)).astype(np.float32)

    def run(q, k, v, time_bias, kind_bias):
        out, lse = _attend(q, k, v, jnp.asarray(segment), 5, "xla_blocks", (time, time_bias), (kind, kind_bias))
        return jnp.sum(out * cotangent) + jnp.sum(lse), out

    operands = (q, k, v, time_bias_NR, kind_bias_BTNZ)
    differentiate = jax.grad(run, argnums=range(5), has_aux=True)
    alone = jax.jit(differentiate)(*operands)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        found = jax.jit(differentiate)(*(jax.device_put(x, replicated(mesh)) for x in operands))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_rotation_turns_pairs_of_halves_as_complex_numbers():
    x = np.random.default_rng(3).standard_normal((1, 5, 2, 6)).astype(np.float32)
    position = np.array([[0, 1, 2, 7, 40]], np.int32)
    turned = np.asarray(rotate(x, position, 50.0))
    pairs = x[..., :3].astype(np.float64) + 1j * x[..., 3:]
    expected = pairs * np.exp(1j * position[0][:, None, None] * 50.0 ** (-np.arange(3) / 3))
    np.testing.assert_allclose(turned[..., :3] + 1j * turned[..., 3:], expected, atol=1e-5)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_only_the_distance_of_positions_matters():
    attention = make_attention(4, 2)
    moved = POSITION + np.array([[5], [11]], np.int32)
    np.testing.assert_allclose(attend(attention, X, SEGMENT, moved), attend(attention, X, SEGMENT, POSITION), atol=2e-5)
    apart = np.where(POSITION > 1, POSITION + 3, POSITION)
    gap = np.abs(attend(attention, X, SEGMENT, apart) - attend(attention, X, SEGMENT, POSITION))
    assert gap[POSITION > 1].max() > 1e-3


def test_a_slot_depends_on_its_own_past_and_on_nothing_else():
    attention = make_attention(4, 2)

    def row(x, segment, position):
        return attend(attention, x[None], segment[None], position[None])[0]

    jacobian = jax.jit(jax.vmap(jax.jacrev(row)))(X, SEGMENT, POSITION)  # [B, T, D, S, D]
    strength = np.abs(jacobian).max(axis=(2, 4))
    for b, t, s in np.ndindex(strength.shape):
        past = s <= t and SEGMENT[b, s] == SEGMENT[b, t]
        assert (strength[b, t, s] > 1e-4) if past else (strength[b, t, s] == 0), (b, t, s)


def test_rows_of_padding_give_finite_values_and_gradients():
    attention = make_attention(4, 2)
    nothing = np.zeros_like(SEGMENT)

    def total(attention, x):
        return jnp.sum(attend(attention, x, nothing, nothing) ** 2)

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(attention, 1e4 * X)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_bfloat16_stays_bfloat16_and_close():
    attention = make_attention(4, 2)
    half = attend(attention, X.astype(jnp.bfloat16), SEGMENT, POSITION)
    assert half.dtype == jnp.bfloat16
    full = np.asarray(attend(attention, X, SEGMENT, POSITION))
    assert np.abs(np.asarray(half, np.float32) - full).max() < 0.03 * np.abs(full).max()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"compute_dtype": "float32"}, "cudnn needs model.compute_dtype='bfloat16'"),
        ({"d_head": 12}, "cudnn needs a model.d_head of a multiple of 8 up to 128"),
        ({"d_head": 136}, "cudnn needs a model.d_head of a multiple of 8 up to 128"),
    ],
)
def test_what_cudnn_cannot_take_is_refused(fields, line):
    with pytest.raises(InputError, match=f"model.attention: {line}"):
        ModelConfig(attention="cudnn", **{"compute_dtype": "bfloat16", "d_head": 16, **fields})
