"""The router's backends against float64 NumPy, row by row; its gradients against differences of that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels.router import Routed, route, tpu, triton

TRITON = pytest.param(
    "pallas_triton_interpret",
    marks=pytest.mark.skipif(not triton.is_installed(), reason="this JAX has no Pallas-Triton any more"),
)
BACKENDS = ("xla", "auto", "pallas_interpret", TRITON)


def draw_operands(n_rows=21, d=6, n_experts=5, n_features=4, n_domains=3, seed=0):
    """Rows, router, features, their weights, bias, domains (some of them -1)."""
    rng = np.random.default_rng(seed)
    x, router, w_features, bias = (
        rng.normal(size=s) for s in ((n_rows, d), (n_experts, d), (n_experts, n_features), n_experts)
    )
    features = np.log(rng.dirichlet(np.ones(n_features), n_rows))
    domain = rng.integers(-1, n_domains, n_rows).astype(np.int32)
    return [x, router, features, w_features, bias, domain]


def route_by_hand(x, router, features, w_features, bias, domain, n_domains, n_choices):
    n_experts = len(router)
    experts, chosen_p, lse = [], [], []
    p_sum, count = np.zeros((n_domains, n_experts)), np.zeros((n_domains, n_experts))
    for t, row in enumerate(x):
        logit = np.array([router[e] @ row + w_features[e] @ features[t] for e in range(n_experts)])
        p = np.exp(logit - logit.max())
        p /= p.sum()
        order = sorted(range(n_experts), key=lambda e: (-(logit[e] + bias[e]), e))[:n_choices]
        experts.append(order)
        chosen_p.append(p[order])
        lse.append(np.log(np.sum(np.exp(logit))))
        if domain[t] >= 0:
            p_sum[domain[t]] += p
            count[domain[t], order] += 1
    return np.array(experts), np.array(chosen_p), np.array(lse), p_sum, count


def route_by_one_hots(x, router, features, w_features, bias, domain, n_domains, n_choices):
    """The same in float32, to be differentiated by JAX."""
    logit = jnp.matmul(x, router.T, precision="highest") + jnp.matmul(features, w_features.T, precision="highest")
    exps = jnp.exp(logit)
    p = exps / jnp.sum(exps, axis=1, keepdims=True)
    order = jnp.argsort(-jax.lax.stop_gradient(logit + bias), axis=1)[:, :n_choices]
    chosen = order[:, :, None] == jnp.arange(len(router))
    own = (domain[:, None] == jnp.arange(n_domains)).astype(jnp.float32)
    p_sum, count = own.T @ p, own.T @ jnp.sum(chosen, axis=1).astype(jnp.float32)
    return order, jnp.sum(jnp.where(chosen, p[:, None], 0), axis=2), jnp.log(jnp.sum(exps, axis=1)), p_sum, count


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def run(x, router, features, w_features, bias, domain, n_domains, n_choices, backend):
    return route(x, router, features, w_features, bias, domain, n_domains, n_choices, backend)


def float32(operands):
    return [jnp.asarray(a, jnp.int32 if a.dtype == np.int32 else jnp.float32) for a in operands]


@pytest.mark.parametrize("backend", BACKENDS)
class TestBackends:
    @settings(max_examples=8, deadline=None)
    @given(
        n_rows=st.integers(1, 40),
        n_experts=st.integers(1, 9),
        n_features=st.integers(1, 5),
        n_domains=st.integers(1, 4),
        seed=st.integers(0, 999),
    )
    def test_values_are_those_by_hand(self, backend, n_rows, n_experts, n_features, n_domains, seed):
        operands = draw_operands(n_rows, 6, n_experts, n_features, n_domains, seed)
        n_choices = min(2, n_experts)
        routed = run(*float32(operands), n_domains, n_choices, backend)
        for got, expected in zip(routed, route_by_hand(*operands, n_domains, n_choices), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(routed.weight_TA.sum(axis=1), 1, rtol=1e-6)

    @pytest.mark.parametrize(("n_features", "n_domains"), [(7, 2), (2, 5)])
    def test_domains_are_counted_whatever_the_features_are(self, backend, n_features, n_domains):
        """Values and all gradients, over several blocks, against plain JAX with one-hots."""
        operands = float32(draw_operands(300, 6, 9, n_features, n_domains, seed=5))
        rng = np.random.default_rng(6)
        shapes = [(300, 2), (300,), (n_domains, 9)]
        cotangents = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

        def total(route_any):
            def weigh(*floats):
                routed = route_any(*floats, operands[5])
                return sum(jnp.sum(a * b) for a, b in zip(routed[1:4], cotangents, strict=True)), routed

            return jax.jit(jax.grad(weigh, argnums=range(5), has_aux=True))(*operands[:5])

        gradients, routed = total(lambda *a: tuple(route(*a, n_domains, 2, backend)))
        expected_gradients, expected = total(lambda *a: route_by_one_hots(*a, n_domains, 2))
        assert routed[3].shape == routed[4].shape == (n_domains, 9)
        assert np.sum(routed[4]) == 2 * np.sum(operands[5] >= 0)
        for got, value in zip(routed, expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-4)
        for got, value in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-4)
        assert all(np.any(gradient != 0) for gradient in gradients[:4])
        assert not np.any(gradients[4])

    def test_values_over_several_blocks(self, backend):
        operands = draw_operands(700, 8, 16)
        routed = run(*float32(operands), 3, 3, backend)
        for got, expected in zip(routed, route_by_hand(*operands, 3, 3), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)

    def test_gradients_are_the_slopes_of_the_values_by_hand(self, backend):
        operands = draw_operands()
        rng = np.random.default_rng(1)
        cotangents = [rng.normal(size=a.shape) for a in route_by_hand(*operands, 3, 2)[1:4]]

        def pulled(routed):
            return sum((a * b).sum() for a, b in zip(routed[1:4], cotangents, strict=True))

        gradients = jax.grad(lambda *a: pulled(run(*a, *float32(operands[4:]), 3, 2, backend)), argnums=(0, 1, 2, 3))(
            *float32(operands[:4])
        )
        for k, gradient in enumerate(gradients):
            for _ in range(6):
                direction = rng.normal(size=operands[k].shape)
                ahead, behind = (
                    pulled(route_by_hand(*operands[:k], operands[k] + s * 1e-5 * direction, *operands[k + 1 :], 3, 2))
                    for s in (1, -1)
                )
                assert np.sum(gradient * direction) == pytest.approx((ahead - behind) / 2e-5, rel=2e-3, abs=2e-4)

    def test_of_equals_the_lower_number_is_chosen(self, backend):
        operands = draw_operands(300, 6, 8)
        operands[1][:], operands[3][:], operands[4][:] = 0, 0, [0, 1, 0, 1, 1, 0, 0, 0]
        routed = run(*float32(operands), 3, 4, backend)
        np.testing.assert_array_equal(routed.expert_TA, np.tile([1, 3, 4, 0], (300, 1)))
        np.testing.assert_allclose(routed.probability_TA, 1 / 8, rtol=1e-6)

    def test_the_bias_moves_the_choice_and_not_the_probabilities(self, backend):
        operands = draw_operands(50)
        plain = run(*float32(operands), 3, 5, backend)
        operands[4] = operands[4] + np.array([0, 1000.0, 0, 0, 0])
        pushed = run(*float32(operands), 3, 5, backend)
        assert np.all(np.asarray(pushed.expert_TA)[:, 0] == 1)
        np.testing.assert_array_equal(pushed.lse_T, plain.lse_T)
        np.testing.assert_array_equal(pushed.probability_ZE, plain.probability_ZE)
        by_expert = [
            np.take_along_axis(np.asarray(r.probability_TA), np.argsort(r.expert_TA, 1), 1) for r in (plain, pushed)
        ]
        np.testing.assert_array_equal(*by_expert)

    def test_repeats_are_bitwise_identical(self, backend):
        operands = float32(draw_operands(600, 8, 16))
        for a, b in zip(run(*operands, 3, 2, backend), run(*operands, 3, 2, backend), strict=True):
            np.testing.assert_array_equal(a, b)


def pull(operands, backend, n_choices=3, mesh=None, check_vma=True):
    """What `route` returns, and the gradients of a weighted sum of it; on a mesh with the rows spread over it."""
    rng = np.random.default_rng(2)

    def routed(*operands):
        routed = route(*operands, 3, n_choices, backend)
        sums = {name: getattr(routed, name) for name in ("probability_ZE", "count_ZE")}
        return routed._replace(**jax.lax.psum(sums, "rows")) if mesh else routed

    if mesh:
        rows, all_of_it = P("rows"), P()
        in_specs = (rows, all_of_it, rows, all_of_it, all_of_it, rows)
        out_specs = Routed(rows, rows, rows, all_of_it, all_of_it)
        routed = jax.shard_map(routed, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    shapes = jax.eval_shape(lambda *a: route(*a, 3, n_choices), *operands)
    cotangents = [rng.normal(size=a.shape).astype(np.float32) for a in shapes[1:4]]

    def total(floats):
        got = routed(*floats, operands[5])
        return sum(jnp.sum(a * b) for a, b in zip(got[1:4], cotangents, strict=True)), got

    gradients, got = jax.jit(jax.grad(total, has_aux=True))(tuple(operands[:5]))
    return got, gradients


@pytest.fixture(scope="module")
def on_one_device():
    operands = float32(draw_operands(80, 8, 16))
    return operands, pull(operands, "xla")


@pytest.fixture(scope="module")
def in_bfloat16():
    operands = float32(draw_operands(300, 40, 16))
    operands[0] = operands[0].astype(jnp.bfloat16)
    return operands, pull(operands, "auto")


def assert_close(got, expected, rtol, atol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("backend", "check_vma"),
    [
        ("xla", True),
        ("auto", True),
        ("pallas_interpret", False),
        pytest.param(*TRITON.values, False, marks=TRITON.marks),
    ],
)
def test_rows_spread_over_a_mesh_give_what_they_give_on_one_device(on_one_device, backend, check_vma):
    operands, expected = on_one_device
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("rows",))
    assert_close(pull(operands, backend, 3, mesh, check_vma), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["pallas_interpret", TRITON])
def test_bfloat16_rows_give_what_plain_jax_makes_of_them(in_bfloat16, backend):
    operands, (expected, expected_gradients) = in_bfloat16
    got, gradients = pull(operands, backend)
    assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert_close(gradients, expected_gradients, rtol=0.02, atol=0.02)
    assert gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == jnp.float32


def test_what_stands_behind_the_last_row_counts_nowhere():
    x, router, features, w_features, _, domain = operands = float32(draw_operands(300, 8, 16))
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")  # and so what a block reads beyond its array
    got = jax.jit(lambda *a: tpu.forward(*a, 3, 3, interpret))(*operands)
    assert_close(got, tuple(run(*operands, 3, 3, "xla")), rtol=1e-4, atol=1e-4)
    residuals = (x, router, features, w_features, domain, got[0], got[2], got[1], jnp.ones(300), jnp.ones_like(got[3]))
    expected = jax.jit(tpu.backward, static_argnums=10)(*residuals, True)
    assert_close(jax.jit(lambda *a: tpu.backward(*a, interpret))(*residuals), expected, rtol=1e-5, atol=1e-5)


def test_wrong_shapes_and_unknown_backends_are_refused():
    operands = float32(draw_operands())
    with pytest.raises(ValueError, match="none of"):
        route(*operands, 3, 2, "fast")
    with pytest.raises(ValueError, match="do not fit"):
        route(*operands, 3, 6)
    with pytest.raises(ValueError, match="do not fit"):
        route(*operands[:2], operands[2][:, 1:], *operands[3:], 3, 2)
    with pytest.raises(ValueError, match="0 domains"):
        route(*operands, 0, 2)
