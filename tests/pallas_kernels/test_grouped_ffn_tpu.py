"""The TPU's kernels, interpreted on the CPU, against every expert over its rows; and the choice by platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import make_plan
from pallas_kernels.grouped_ffn import BACKENDS, grouped_ffn, tpu
from pallas_kernels.specs import LOADS, draw_experts
from tests.pallas_kernels.grouped_ffn_oracle import assert_right


def draw_operands(n_rows, n_choices, n_experts, d=6, f=10, dtype=jnp.float32):
    """Rows, weights, matrices, and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = ((n_rows, d), (n_rows, n_choices), (n_experts, d, f), (n_experts, d, f), (n_experts, f, d), (n_rows, d))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("n_experts", "tile", "backend", "capacity"))
def run(operands, expert_TA, n_experts, tile, backend="pallas_interpret", capacity=None):
    """The output and all gradients."""
    *arguments, g = operands
    plan = make_plan(expert_TA, n_experts, tile, capacity)

    def layer(x, weight, gate, up, down):
        return grouped_ffn(x, weight, gate, up, down, plan, backend)

    y, pull = jax.vjp(layer, *arguments)
    return y, *pull(g)


def assert_as_by_hand(operands, expert_TA, n_experts, tile, capacity=None, tolerance=3e-6):
    got = run(operands, expert_TA, n_experts, tile, "pallas_interpret", capacity)
    assert_right(got, operands, expert_TA, n_experts, tile, capacity, tolerance)


@st.composite
def routes(draw, n_rows=12, n_choices=2, n_experts=5):
    """int32 `[T, A]`: experts of which some get nothing, one gets all, or rows go nowhere (E)."""
    allowed = draw(st.lists(st.integers(0, n_experts), min_size=n_choices, unique=True))
    row = st.permutations(allowed).map(lambda order: order[:n_choices])
    return np.asarray(draw(st.lists(row, min_size=n_rows, max_size=n_rows)), np.int32)


@settings(max_examples=60, deadline=None)
@given(routes())
def test_values_and_gradients_for_any_load(expert_TA):
    # One shape, so that all examples share one program.
    assert_as_by_hand(draw_operands(12, 2, 5), expert_TA, 5, 8)


@pytest.mark.parametrize(
    ("n_rows", "n_choices", "n_experts", "tile", "load", "capacity"),
    [
        (1, 1, 1, 1, "balanced", None),
        (1, 2, 9, 2, "zipf", None),
        (33, 3, 9, 16, "half_empty", None),
        (40, 2, 4, 2, "one_expert", None),
        (60, 2, 5, 8, "zipf", 11),
        (9, 2, 3, 4, "zipf", 0),
    ],
)
def test_values_and_gradients_for_any_shape(n_rows, n_choices, n_experts, tile, load, capacity):
    expert_TA = draw_experts(load, n_rows, n_choices, n_experts)
    assert_as_by_hand(draw_operands(n_rows, n_choices, n_experts), expert_TA, n_experts, tile, capacity)


@pytest.mark.parametrize("load", LOADS)
def test_experts_wider_than_a_block(load, monkeypatch):
    monkeypatch.setattr(tpu, "choose_block", lambda count_bytes, f: tpu.LANES)
    expert_TA = draw_experts(load, 50, 2, 4)
    assert_as_by_hand(draw_operands(50, 2, 4, 130, 300), expert_TA, 4, 16)


@pytest.mark.parametrize("n_rows", [30, 31])
def test_bfloat16_is_right_to_its_own_precision(n_rows):
    operands = draw_operands(n_rows, 2, 4, 130, 200, jnp.bfloat16)
    assert_as_by_hand(operands, draw_experts("zipf", n_rows, 2, 4), 4, 16, tolerance=0.02)


def test_repeats_are_bitwise_identical():
    expert_TA, operands = draw_experts("zipf", 60, 2, 6), draw_operands(60, 2, 6)
    first, second = (run(operands, expert_TA, 6, 8) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def run_kernels(operands, expert_TA, n_experts, tile, interpret):
    """What the kernels leave, before anything is combined; and the plan."""
    x, weight, *matrices, g = operands
    plan = make_plan(expert_TA, n_experts, tile)
    weight_R = jnp.where(plan.used_R, weight[plan.row_R, plan.choice_R], 0)
    y, saved = tpu.forward(x, weight_R, matrices, plan, interpret)
    return (y, *saved, *tpu.backward(x, weight_R, matrices, plan, saved, g, interpret)), plan


def test_unused_tiles_are_left_alone():
    # The interpreter fills what nothing has written with NaN: the kernels leave it, and no test above saw it.
    expert_TA = draw_experts("one_expert", 20, 1, 6)
    (y, gate, up, dx, dweight, d_matrices), plan = run_kernels(draw_operands(20, 1, 6), expert_TA, 6, 4, True)
    behind = int(plan.n_tiles) * 4
    assert behind < len(plan.row_R)
    for a in (y, gate, up, dx, dweight):
        assert np.all(np.isfinite(a[:behind]))
        assert np.all(np.isnan(a[behind:]))
    for matrix in d_matrices:
        assert np.all(matrix[1:] == 0)
        assert np.any(matrix[0] != 0)


def test_copies_do_not_race(monkeypatch):
    """Under the interpreter that runs copies when they are waited for, and keeps track of who has seen what.

    It does not know how to read bfloat16 rows as words; the copies are the same.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the flag is nowhere else

    monkeypatch.setattr(tpu, "choose_block", lambda count_bytes, f: tpu.LANES)
    # Two blocks; four tiles of three experts, and one that gets nothing between them.
    expert_TA, operands = np.array([[3], [0], [0], [1], [0]], np.int32), draw_operands(5, 1, 4, 6, 140)
    expected, _ = run_kernels(operands, expert_TA, 4, 2, True)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        got, plan = jax.block_until_ready(run_kernels(operands, expert_TA, 4, 2, interpret))
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    used = np.asarray(plan.used_R)
    for a, b in zip(jax.tree.leaves(got[:-1]), jax.tree.leaves(expected[:-1]), strict=True):
        np.testing.assert_array_equal(a[used], b[used])
    for a, b in zip(got[-1], expected[-1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", ["ragged_dot", "pallas_interpret"])
def test_every_backend_saves_the_same(backend):
    x, weight, *matrices, _ = draw_operands(40, 2, 4)
    plan = make_plan(draw_experts("zipf", 40, 2, 4), 4, 8)
    weight_R = jnp.where(plan.used_R, weight[plan.row_R, plan.choice_R], 0)
    used = np.asarray(plan.used_R)
    expected = BACKENDS["xla_tiles"][0](x, weight_R, matrices, plan)[1]
    saved = BACKENDS[backend][0](x, weight_R, matrices, plan)[1]
    for a, b in zip(saved, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a[used], b[used], rtol=1e-5, atol=1e-5)


class TestAuto:
    def test_on_a_cpu_it_is_the_loop_over_tiles(self):
        expert_TA, operands = draw_experts("zipf", 40, 2, 4), draw_operands(40, 2, 4)
        for a, b in zip(*(run(operands, expert_TA, 4, 8, name) for name in ("auto", "xla_tiles")), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize(("tile", "dtype"), [(4, jnp.float32), (8, jnp.float16)])
    def test_what_does_not_suit_the_kernels_is_no_error_elsewhere(self, tile, dtype):
        operands = draw_operands(10, 2, 4, dtype=dtype)
        y, *_ = run(operands, draw_experts("zipf", 10, 2, 4), 4, tile, "auto")
        assert np.all(np.isfinite(y))

    def test_gradients_inside_shard_map(self):
        """Rows are split, matrices are not: each device's gradient of the matrices is summed."""
        expert_TA, operands = draw_experts("zipf", 32, 2, 4), draw_operands(32, 2, 4)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows, whole = jax.P("data"), jax.P()

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows, whole, whole, whole, rows), out_specs=rows)
        def layer(x, weight, gate, up, down, expert):
            return grouped_ffn(x, weight, gate, up, down, make_plan(expert, 4, 8), "auto")

        *arguments, g = operands
        y, pull = jax.vjp(lambda *a: jax.jit(layer)(*a, expert_TA), *arguments)
        for a, b in zip((y, *pull(g)), run(operands, expert_TA, 4, 8, "xla_tiles"), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_operands_that_a_tpu_cannot_take_are_refused():
    plan = make_plan(np.zeros((8, 1), np.int32), 2, 4)
    x, weight, *matrices, _ = draw_operands(8, 1, 2)
    with pytest.raises(ValueError, match="multiples of 8"):
        grouped_ffn(x, weight, *matrices, plan, "pallas_tpu")
    with pytest.raises(ValueError, match="float16"):
        grouped_ffn(x.astype(jnp.float16), weight, *matrices, plan, "pallas_interpret")
    huge = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((16, 8192), (2, 8192, 256))]
    plan = jax.eval_shape(lambda: make_plan(jnp.zeros((8192, 1), jnp.int32), 2, 2048))
    assert "VMEM" in tpu.unsupported_reason(huge[0], huge[1:], plan)


@pytest.mark.parametrize(
    ("d", "f"), [(896, 4864), (1536, 8960), (2048, 11008), (3584, 18944), (5120, 27648), (8192, 29568)]
)
def test_every_qwen_fits_with_tiles_of_128(d, f):
    sizes = tpu._Sizes(d, f, 128, 2, 10)
    for count_bytes in (sizes.forward_bytes, sizes.down_bytes, sizes.rows_bytes, sizes.sides_bytes):
        block = tpu.choose_block(count_bytes, f)
        assert block
        assert f % block == 0
