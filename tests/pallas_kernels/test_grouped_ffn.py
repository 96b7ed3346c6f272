"""Values and gradients of all backends against every expert over its rows, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.dispatch import make_plan
from pallas_kernels.grouped_ffn import grouped_ffn, grouped_ffn_reference
from pallas_kernels.specs import LOADS, draw_experts
from tests.pallas_kernels.grouped_ffn_oracle import assert_right
from tests.pallas_kernels.routes import routes


def draw_operands(n_rows, n_choices, n_experts, d=6, f=10, seed=0):
    """Rows, weights, matrices, and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = ((n_rows, d), (n_rows, n_choices), (n_experts, d, f), (n_experts, d, f), (n_experts, f, d), (n_rows, d))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("n_experts", "tile", "backend", "capacity"))
def run(operands, expert_TA, n_experts, tile, backend, capacity=None):
    *arguments, g = operands
    plan = make_plan(expert_TA, n_experts, tile, capacity)

    def layer(x, weight, gate, up, down):
        if backend == "reference":
            return grouped_ffn_reference(x, weight, expert_TA, gate, up, down, plan.kept_TA)
        return grouped_ffn(x, weight, gate, up, down, plan, backend)

    y, pull = jax.vjp(layer, *arguments)
    return y, *pull(g)


def assert_as_by_hand(backend, operands, expert_TA, n_experts, tile, capacity=None):
    got = run(operands, expert_TA, n_experts, tile, backend, capacity)
    assert_right(got, operands, expert_TA, n_experts, tile, capacity)


@pytest.mark.parametrize("capacity", [None, 11])
def test_every_expert_over_every_row_is_the_network_by_hand(capacity):
    assert_as_by_hand("reference", draw_operands(60, 2, 5), draw_experts("zipf", 60, 2, 5), 5, 8, capacity)


@pytest.mark.parametrize("load", ["zipf", "one_expert"])
def test_tokamax_is_one_more_backend(load):
    pytest.importorskip("tokamax", reason="the extra is not here: pip install -c requirements.lock -e '.[tokamax]'")
    expert_TA = draw_experts(load, 60, 2, 5)
    assert_as_by_hand("tokamax", draw_operands(60, 2, 5), expert_TA, 5, 8, capacity=40)


@pytest.mark.parametrize("backend", ["xla_tiles", "ragged_dot"])  # the kernels have tests of their own
class TestBackends:
    @settings(max_examples=8, deadline=None)
    @given(route=routes())
    def test_values_and_gradients_for_any_load(self, backend, route):
        expert_TA, n_experts, tile = route
        operands = draw_operands(*expert_TA.shape, n_experts)
        assert_as_by_hand(backend, operands, expert_TA, n_experts, tile)

    @pytest.mark.parametrize("load", LOADS)
    @pytest.mark.parametrize("tile", [4, 32])
    def test_values_and_gradients_over_many_tiles(self, backend, load, tile):
        expert_TA = draw_experts(load, 300, 2, 7)
        assert_as_by_hand(backend, draw_operands(300, 2, 7), expert_TA, 7, tile)

    def test_dropped_assignments_add_nothing_and_pull_nothing(self, backend):
        expert_TA = draw_experts("zipf", 60, 2, 5)
        operands = draw_operands(60, 2, 5)
        assert_as_by_hand(backend, operands, expert_TA, 5, 8, capacity=11)

    def test_repeats_are_bitwise_identical(self, backend):
        expert_TA, operands = draw_experts("zipf", 90, 2, 6), draw_operands(90, 2, 6)
        first, second = (run(operands, expert_TA, 6, 8, backend) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_the_numbering_of_experts_means_nothing(self, backend):
        expert_TA, operands = draw_experts("zipf", 90, 2, 6), draw_operands(90, 2, 6)
        order = np.array([3, 0, 5, 1, 4, 2])  # new expert e is old expert order[e]
        renumbered = np.argsort(order)[expert_TA].astype(np.int32)
        moved = [*operands[:2], *(m[order] for m in operands[2:5]), operands[5]]
        old, new = run(operands, expert_TA, 6, 8, backend), run(moved, renumbered, 6, 8, backend)
        for k, (a, b) in enumerate(zip(old, new, strict=True)):
            np.testing.assert_allclose(a[order] if k >= 3 else a, b, rtol=2e-5, atol=2e-5)

    def test_equal_experts_with_weights_of_one_are_the_dense_network(self, backend):
        x, _, gate, up, down, g = draw_operands(90, 2, 6)
        gate, up, down = (np.repeat(m[:1], 6, axis=0) for m in (gate, up, down))
        weight = np.full((90, 2), 0.5, np.float32)
        y = run([x, weight, gate, up, down, g], draw_experts("zipf", 90, 2, 6), 6, 8, backend)[0]
        np.testing.assert_allclose(y, (jax.nn.silu(x @ gate[0]) * (x @ up[0])) @ down[0], rtol=1e-5, atol=1e-5)


def test_wrong_shapes_and_unknown_backends_are_refused():
    x, weight, gate, up, down, _ = draw_operands(4, 2, 3)
    plan = make_plan(jnp.zeros((4, 2), jnp.int32), 3, 2)
    with pytest.raises(ValueError, match="none of"):
        grouped_ffn(x, weight, gate, up, down, plan, "fast")
    with pytest.raises(ValueError, match="do not fit"):
        grouped_ffn(x, weight, gate, down, up, plan)
    with pytest.raises(ValueError, match="weights"):
        grouped_ffn(x, weight[:, :1], gate, up, down, plan)
