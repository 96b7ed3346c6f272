"""The TPU's attention kernels, interpreted on the CPU, against float64 NumPy; and the choice by platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu
from pallas_kernels.cost import count_bytes
from tests.pallas_kernels.attention_oracle import assert_right, attend_by_hand, call, draw_case, run_case, to_operands


@settings(max_examples=10)
@given(seed=st.integers(0, 9999), segments=st.sampled_from(["packed", "one", "empty", "mixed"]))
def test_values_and_gradients_for_any_content(seed, segments):
    # One shape, so that all examples share one program.
    assert_right(draw_case(2, 21, segments=segments, seed=seed), "pallas_interpret", window=9, block=4)


@pytest.mark.parametrize(
    ("t", "heads", "j", "g", "block", "window", "time", "group"),
    [
        (13, (3, 1), 40, 4, 4, 3, True, False),
        (16, (2, 2), 24, 1, 8, 1, False, True),
        (130, (4, 2), 24, 3, None, None, True, True),
    ],
)
def test_values_and_gradients_for_any_shape(t, heads, j, g, block, window, time, group):
    case = draw_case(1, t, *heads, 5, j, g, time=time, group=group)
    assert_right(case, "pallas_interpret", window, block)


def test_bfloat16_is_right_to_its_own_precision():
    assert_right(draw_case(2, 21, h=16), "pallas_interpret", None, 8, 0.03, jnp.bfloat16)


def test_nothing_is_read_before_it_is_written():
    case = draw_case(1, 11, 2, 1, seed=2)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    operands, rng = to_operands(case), np.random.default_rng(0)
    cotangents = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (case.q.shape, case.q.shape[:3])]

    @jax.jit
    def run(operands):
        results = tpu.forward(operands, None, 8, interpret)
        return results, tpu.backward(operands, *results, *cotangents, None, 8, interpret)

    try:
        got = jax.block_until_ready(run(operands))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    out, lse, gradients = attend_by_hand(case, None, *cotangents)
    for a, b in zip(jax.tree.leaves(got), [out, lse, *gradients.values()], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_buckets_that_no_pair_is_in_get_no_gradient_at_all():
    case = draw_case(2, 21)
    case.time[:] = 7 * 10**8 + np.arange(21) * 60
    _, gradients = run_case(case, np.ones(case.q.shape), np.ones(case.q.shape[:3]), "pallas_interpret", 9, 4)
    np.testing.assert_array_equal(gradients["time_bias"][:, 1:], 0)


def test_inside_shard_map():
    """Sequences and heads over four devices; the interpreter does not know what varies, so that is not checked."""
    case, p = draw_case(2, 20, 4, 2, seed=3), jax.P
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads = p("data", None, "model")
    specs = {"q": heads, "k": heads, "v": heads, "group_bias": heads, "time_bias": p("model")}
    run = functools.partial(call, backend="pallas_interpret", block=8)
    spread = jax.shard_map(run, mesh=mesh, in_specs=(specs, p("data")), out_specs=heads, check_vma=False)
    got = jax.jit(spread)(case.floats(), case.integers())
    expected, _ = run_case(case, np.ones(case.q.shape), np.ones(case.q.shape[:3]), "reference")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def read_estimates(function, *operands):
    """Name of each kernel -> its estimate."""
    found = {}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found[equation.params["name"]] = equation.params["cost_estimate"]
                continue
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda a: hasattr(a, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    visit(inner.jaxpr)

    visit(jax.make_jaxpr(function)(*operands).jaxpr)
    return found


def test_estimates_follow_from_what_a_kernel_visits():
    def estimate(t, **options):
        operands = to_operands(draw_case(2, t, 4, 2, 16, 24, segments="one"))
        results = operands.q_BTNH, operands.q_BTNH[..., 0]

        def both(operands):
            got = tpu.forward(operands, options.get("window"), 128)
            return got, tpu.backward(operands, *results, *results, options.get("window"), 128)

        return read_estimates(both, operands), count_bytes([*operands[:3], operands.group_bias_BTNG, *results])

    (one, least), (four, _), (banded, _) = estimate(128), estimate(512), estimate(512, window=2)
    for name, products in (("attention_forward", 2), ("attention_bwd_dq", 3), ("attention_bwd_dkv", 4)):
        assert one[name].flops == 2 * products * 128**2 * 16 * 8
        assert four[name].flops == 10 * one[name].flops  # pairs of blocks
        assert banded[name].flops == 7 * one[name].flops
        assert banded[name].bytes_accessed < four[name].bytes_accessed
    metadata = 2 * 2 * 2 * 8 * 128 * 4  # of queries and of keys, two sequences, two heads of keys
    assert one["attention_forward"].bytes_accessed == least + metadata + 4 * 4 * 24 * 4  # the table, as often as heads


class TestAuto:
    def test_on_a_cpu_it_is_the_loop_over_blocks(self):
        case = draw_case(2, 20)
        results = [run_forward(case, name, 128) for name in ("auto", "xla_blocks")]
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize(
        ("h", "block", "dtype"), [(5, 128, jnp.float32), (8, 100, jnp.float32), (16, 8, "float16")]
    )
    def test_what_does_not_suit_the_kernels_is_no_error_elsewhere(self, h, block, dtype):
        case = draw_case(1, 20, h=h)
        text = lower_for_tpu(case, block, dtype)
        assert "attention_forward" not in text
        out, _ = run_forward(case, "auto", block, dtype)
        assert np.all(np.isfinite(out))

    def test_on_a_tpu_it_is_the_kernels(self):
        assert "attention_forward" in lower_for_tpu(draw_case(1, 20), 128, jnp.float32)


def run_forward(case, backend, block, dtype=jnp.float32):
    return jax.jit(functools.partial(call, backend=backend, block=block))(case.floats(dtype), case.integers())


def lower_for_tpu(case, block, dtype):
    run = jax.jit(functools.partial(call, block=block))
    return run.trace(case.floats(dtype), case.integers()).lower(lowering_platforms=("tpu",)).as_text()


def test_operands_that_a_tpu_cannot_take_are_refused():
    def run(case, dtype=jnp.float32, backend="pallas_tpu", block=None):
        return call(case.floats(dtype), case.integers(), backend=backend, block=block)

    with pytest.raises(ValueError, match="multiples of 8"):
        run(draw_case(1, 20, h=12))
    with pytest.raises(ValueError, match="multiples of 128"):
        run(draw_case(1, 20), block=64)
    with pytest.raises(ValueError, match="float16"):
        run(draw_case(1, 20), "float16", "pallas_interpret")
    wide = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 256, 64, 1024), (1, 256, 1, 1024))]
    assert "VMEM" in tpu.unsupported_reason(to_operands(draw_case())._replace(q_BTNH=wide[0], k_BTKH=wide[1]), None)


@pytest.mark.parametrize(("n", "k", "h"), [(14, 2, 64), (12, 2, 128), (16, 8, 128), (28, 4, 128), (64, 8, 128)])
def test_every_qwen_fits_with_the_largest_block(n, k, h):
    q, key = (jax.ShapeDtypeStruct((1, 4096, heads, h), jnp.bfloat16) for heads in (n, k))
    assert tpu.choose_block(to_operands(draw_case())._replace(q_BTNH=q, k_BTKH=key)) == max(tpu.BLOCKS)
