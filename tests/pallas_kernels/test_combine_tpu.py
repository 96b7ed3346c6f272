"""The TPU's sum over row slots, interpreted on the CPU, against a loop; and through the real TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.combine import tpu, unpermute_sum
from pallas_kernels.dispatch import make_plan
from pallas_kernels.specs import draw_experts

SHAPES = ((1, 1, 5), (33, 2, 5), (37, 3, 130))  # rows, choices, width
planned = jax.jit(make_plan, static_argnums=(1, 2, 3))
summed = jax.jit(unpermute_sum, static_argnums=2)


def draw_rows(plan, d, dtype=jnp.float32):
    """Rows in all row slots, NaN where nothing stands."""
    rows_RD = np.random.default_rng(0).normal(size=(plan.row_R.shape[0], d))
    rows_RD[~np.asarray(plan.used_R)] = np.nan
    return jnp.asarray(rows_RD, dtype)


def sum_by_loop(rows_RD, plan):
    """In float64, one assignment after the other."""
    rows_RD, row_slot_TA = np.asarray(rows_RD, np.float64), np.asarray(plan.row_slot_TA)
    total = np.zeros((len(row_slot_TA), rows_RD.shape[1]))
    for t, a in np.argwhere(plan.kept_TA):
        total[t] += rows_RD[row_slot_TA[t, a]]
    return total


def assert_equal_to_loop(expert_TA, n_experts, tile, d, dtype, capacity=None, backend="pallas_interpret"):
    plan = planned(expert_TA, n_experts, tile, capacity)
    rows_RD = draw_rows(plan, d, dtype)
    got = summed(rows_RD, plan, backend)
    assert got.dtype == dtype
    # One rounding of the sum: half a unit in the last place.
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        got.astype(jnp.float32), sum_by_loop(rows_RD, plan), rtol=tolerance, atol=tolerance, err_msg=str(plan)
    )


@st.composite
def routes(draw):
    """int32 `[T, A]` over four experts, of which 4 sends a row nowhere; and the width."""
    n_rows, n_choices, d = draw(st.sampled_from(SHAPES))
    seed, nowhere = draw(st.integers(0, 2**16)), draw(st.sampled_from((0.0, 0.3, 1.0)))
    rng = np.random.default_rng(seed)
    expert_TA = np.argsort(rng.random((n_rows, 4)), axis=1)[:, :n_choices]
    return np.where(rng.random(expert_TA.shape) < nowhere, 4, expert_TA).astype(np.int32), d


@settings(max_examples=60, deadline=None)
@given(routes(), st.sampled_from((jnp.float32, jnp.bfloat16)), st.sampled_from((None, 0, 3)))
def test_sums_for_any_load(route, dtype, capacity):
    expert_TA, d = route
    assert_equal_to_loop(expert_TA, 4, 8, d, dtype, capacity)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("n_rows", "n_choices"), [(256, 1), (257, 2), (513, 1)])
def test_many_tiles_an_even_and_an_odd_number_of_them(n_rows, n_choices, dtype):
    # An odd number of row slots too: bfloat16 rows are read in pairs.
    assert_equal_to_loop(draw_experts("zipf", n_rows, n_choices, 3), 3, 1, 64, dtype, 120)


@pytest.mark.parametrize("backend", ["xla", "auto", "pallas_interpret"])
def test_every_backend_sums_the_same(backend):
    assert_equal_to_loop(draw_experts("zipf", 50, 2, 4), 4, 8, 24, jnp.float32, 9, backend)


def test_the_tile_is_the_largest_that_fits():
    assert tpu.choose_tile(8192, 2, 1536, 2) == 128
    assert tpu.choose_tile(40, 2, 1536, 2) == 64
    assert tpu.choose_tile(3, 2, 1536, 2) == 16
    assert tpu.choose_tile(8192, 8, 8192, 2) == 64
    assert tpu.choose_tile(3, 64, 8192, 2) == 0


def test_operands_that_the_kernel_cannot_take():
    plan = planned(np.zeros((8, 1), np.int32), 2, 4)
    halves = draw_rows(plan, 6, jnp.float16)
    with pytest.raises(ValueError, match="float16"):
        unpermute_sum(halves, plan, "pallas_interpret")
    assert np.all(np.isfinite(unpermute_sum(halves, plan, "auto")))
    with pytest.raises(ValueError, match="none of xla"):
        unpermute_sum(halves, plan, "mosaic")
    many = jax.eval_shape(lambda: make_plan(jnp.zeros((8, 64), jnp.int32), 2, 4))
    assert "VMEM" in tpu.unsupported_reason(jax.ShapeDtypeStruct((520, 8192), jnp.bfloat16), many)


def test_copies_do_not_race(monkeypatch):
    """Three tiles in two parts, under the interpreter that runs copies when they are waited for.

    It does not know how to read bfloat16 rows as words; the copies are the same.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the flag is nowhere else

    monkeypatch.setattr(tpu, "TILES", (8,))
    plan = planned(draw_experts("zipf", 19, 2, 4), 4, 4, 7)
    rows_RD = draw_rows(plan, 6)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        got = jax.block_until_ready(jax.jit(functools.partial(tpu.unpermute_sum, interpret=interpret))(rows_RD, plan))
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    np.testing.assert_allclose(got, sum_by_loop(rows_RD, plan), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
class TestRealCompiler:
    @pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    @pytest.mark.parametrize(
        ("n_rows", "n_choices", "d", "dtype"),
        [(1000, 2, 1536, jnp.bfloat16), (5, 3, 100, jnp.bfloat16), (300, 1, 200, jnp.float32)],
    )
    def test_it_compiles(self, topology, n_rows, n_choices, d, dtype):
        pytest.importorskip("libtpu", reason="the TPU compiler is not here")
        from jax.experimental import topologies

        device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        plan = jax.eval_shape(lambda: make_plan(jnp.zeros((n_rows, n_choices), jnp.int32), 4, 16))
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(device)),
            (jax.ShapeDtypeStruct((plan.row_R.shape[0], d), dtype), plan),
        )
        text = jax.jit(functools.partial(unpermute_sum, backend="auto")).lower(*arguments).compile().as_text()
        assert "unpermute_sum" in text
        assert "tpu_custom_call" in text

    def test_inside_shard_map(self):
        """Rows split over four chips, each with a plan of its own: JAX's check of what varies passes."""
        pytest.importorskip("libtpu", reason="the TPU compiler is not here")
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
        mesh, rows = jax.sharding.Mesh(devices, ("data",)), jax.P("data")

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
        def sum_own(rows_RD, expert_TA):
            return unpermute_sum(rows_RD, make_plan(expert_TA, 4, 16), "auto")

        n_row_slots = 4 * make_plan(jnp.zeros((64, 2), jnp.int32), 4, 16).row_R.shape[0]
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, rows))
            for shape, dtype in (((n_row_slots, 256), jnp.bfloat16), ((256, 2), jnp.int32))
        ]
        assert "tpu_custom_call" in jax.jit(sum_own).lower(*arguments).compile().as_text()
