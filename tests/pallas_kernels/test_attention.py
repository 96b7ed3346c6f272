"""Attention's backends against float64 NumPy, row by row: values and all gradients, through both results."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attend, attend_prefix, merge, xla_blocks
from pallas_kernels.attention.buckets import NO_TIME, find_bucket, list_starts, list_thresholds
from pallas_kernels.attention.operands import count_most_blocks, find_block_bounds
from tests.pallas_kernels.attention_oracle import (
    assert_right,
    attend_by_hand,
    call,
    draw_case,
    find_bucket_by_hand,
    run_case,
    to_operands,
)

BACKENDS = ("reference", "xla_blocks")  # the kernels have tests of their own


class TestBuckets:
    @pytest.mark.parametrize("n_buckets", [2, 3, 12, 24, 40])
    def test_at_and_beside_every_threshold_and_anywhere_they_are_those_of_the_logarithm(self, n_buckets):
        rng = np.random.default_rng(0)
        gaps = [g + d for g in list_thresholds(n_buckets) for d in (-1, 0, 1)] + [0, 1, 2**31, 2**32 - 2]
        later = [NO_TIME + 1 + g for g in gaps] + [2**31 - 1] * 2
        earlier = [NO_TIME + 1] * len(gaps) + [2**31 - 1, NO_TIME + 1]
        anywhere = rng.integers(-(2**31), 2**31, (2, 300))
        near = anywhere[0] // 2 + np.exp(rng.uniform(0, 20, 300)).astype(np.int64)
        pairs = np.stack([[*earlier, *anywhere[0], *(anywhere[0] // 2)], [*later, *anywhere[1], *near]])
        pairs = np.concatenate([pairs, [[NO_TIME, 5, NO_TIME], [5, NO_TIME, NO_TIME]]], axis=1)
        expected = [find_bucket_by_hand(a, b, n_buckets) for a, b in pairs.T]
        got = jax.jit(find_bucket, static_argnums=2)(*pairs.astype(np.int32), n_buckets)
        np.testing.assert_array_equal(got, expected)
        assert set(expected) <= set(range(n_buckets))

    def test_they_begin_where_they_always_did(self):
        # 2^(2/3), 2^(4/3) and 4 hours, less one: not rounded by any float.
        assert list_thresholds(24)[:3] == (2115, 5472, 10800)
        assert len(list_thresholds(24)) == 22
        assert list(list_starts(40)) == sorted(list_starts(40))


@pytest.mark.parametrize("backend", BACKENDS)
class TestBackends:
    @settings(max_examples=3)
    @given(data=st.data())
    def test_values_and_gradients_for_any_shape(self, backend, data):
        draw = data.draw
        heads, window = draw(st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)])), draw(st.none() | st.integers(1, 30))
        segments = draw(st.sampled_from(["packed", "one", "empty", "mixed"]))
        time, group, n_buckets = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([2, 5, 24]))
        t, seed = draw(st.integers(1, 30)), draw(st.integers(0, 999))
        case = draw_case(2, t, *heads, 5, n_buckets, draw(st.integers(1, 4)), segments, time, group, seed)
        assert_right(case, backend, window, draw(st.sampled_from([1, 4, 7, 16])))

    @settings(max_examples=16)
    @given(seed=st.integers(0, 9999), segments=st.sampled_from(["packed", "one", "empty", "mixed"]))
    def test_values_and_gradients_for_any_content(self, backend, seed, segments):
        # One shape, so that all examples share one program.
        assert_right(draw_case(segments=segments, seed=seed), backend, block=4)

    def test_bfloat16_is_right_to_its_own_precision(self, backend):
        assert_right(draw_case(h=16), backend, block=8, dtype=jnp.bfloat16, tolerance=0.03)

    def test_nothing_depends_on_what_comes_later_or_is_in_another_segment(self, backend):
        case, t = draw_case(seed=3), 11
        same = case.segment[0] == case.segment[0, t]
        assert 0 < same[:t].sum() < t
        d_out, d_lse = np.zeros(case.q.shape), np.zeros(case.q.shape[:3])
        d_out[0, t], d_lse[0, t] = 1, 1
        (out, lse), gradients = run_case(case, d_out, d_lse, backend, block=4)
        hidden = ~same | (np.arange(case.q.shape[1]) > t)
        for name in ("k", "v"):
            np.testing.assert_array_equal(gradients[name][0, hidden], 0)
            assert np.all(np.any(gradients[name][0, ~hidden] != 0, axis=(1, 2)))
        rng = np.random.default_rng(0)
        q, k, v, *_ = other = [x.copy() for x in case]
        for x in (q, k, v):
            x[0, hidden] = rng.normal(size=x[0, hidden].shape)
        other_out, other_lse = run_case(case._make(other), d_out, d_lse, backend, block=4)[0]
        np.testing.assert_array_equal(other_out[0, t], out[0, t])
        np.testing.assert_array_equal(other_lse[0, t], lse[0, t])

    def test_packed_is_unpacked(self, backend):
        case = draw_case(1, 30, seed=1)
        case.segment[0] = [1] * 10 + [2] * 10 + [0] * 10
        d_out, d_lse = np.ones(case.q.shape), np.ones(case.q.shape[:3])
        (out, lse), gradients = run_case(case, d_out, d_lse, backend, block=8)
        d_table = 0
        for cut in (slice(0, 10), slice(10, 20), slice(20, 30)):
            own = case._make(x if x.shape[0] != 1 else x[:, cut] for x in case)
            (own_out, own_lse), own_gradients = run_case(own, d_out[:, cut], d_lse[:, cut], backend, block=8)
            np.testing.assert_allclose(own_out, out[:, cut], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(own_lse, lse[:, cut], rtol=1e-5, atol=1e-5)
            d_table += own_gradients.pop("time_bias")
            for name, gradient in own_gradients.items():
                np.testing.assert_allclose(gradient, gradients[name][:, cut], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(d_table, gradients["time_bias"], rtol=1e-4, atol=1e-4)

    def test_buckets_that_no_pair_is_in_get_no_gradient_at_all(self, backend):
        case = draw_case()
        case.time[:] = 7 * 10**8 + np.arange(case.q.shape[1]) * 60
        _, gradients = run_case(case, np.ones(case.q.shape), np.ones(case.q.shape[:3]), backend, block=4)
        np.testing.assert_array_equal(gradients["time_bias"][:, 1:], 0)  # an optimiser would scale up even the least
        assert np.all(gradients["time_bias"][:, 0] != 0)

    def test_large_biases_do_no_harm_behind_the_last_slot(self, backend):
        case = draw_case(seed=2)
        assert case.q.shape[1] % 7
        assert_right(case._replace(time_bias=100 * case.time_bias), backend, block=7, tolerance=1e-4)


def draw_cotangents(case, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (case.q.shape, case.q.shape[:3])]


class TestBlocks:
    @pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 20])
    @pytest.mark.parametrize("segments", ["packed", "one", "empty", "mixed"])
    def test_what_is_left_out_is_not_visible_and_in_packed_rows_all_such(self, segments, window):
        segment = draw_case(6, 32, segments=segments, seed=4).segment
        first, last = find_block_bounds(jnp.asarray(segment), 4, window)
        ago = np.arange(32)[:, None] - np.arange(32)
        visible = (segment[:, :, None] == segment[:, None, :]) & (ago >= 0) & (ago < (window or 32))
        pairs = visible.reshape(6, 8, 4, 8, 4).any(axis=(2, 4))  # blocks of queries, blocks of keys
        first_seen, last_seen = pairs.argmax(axis=2), 7 - pairs[:, ::-1].argmax(axis=1)
        assert np.all(first <= first_seen)
        assert np.all(last >= last_seen)
        if segments != "mixed" and window is None:
            np.testing.assert_array_equal(first, first_seen)
            np.testing.assert_array_equal(last, last_seen)
        assert np.max(np.arange(8) - first) < count_most_blocks(8, 4, window)
        assert np.max(last - np.arange(8)) < count_most_blocks(8, 4, window)

    def test_all_sequences_batched_are_one_after_the_other(self):
        case = draw_case(3, 30, seed=7)
        operands = to_operands(case)
        d_out, d_lse = draw_cotangents(case)

        @functools.partial(jax.jit, static_argnums=0)
        def run(batched):
            results = xla_blocks.forward(operands, None, 8, batched)
            return results, xla_blocks.backward(operands, *results, d_out, d_lse, None, 8, batched)

        for a, b in zip(jax.tree.leaves(run(True)), jax.tree.leaves(run(False)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def test_inside_shard_map(self):
        """Sequences over two devices, the table on both: JAX's check of what varies passes, its gradient is summed."""
        case = draw_case(4, seed=3)
        d_out, d_lse = draw_cotangents(case)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split, whole = P("data"), P()

        def pull():
            run = functools.partial(call, window=12, backend="auto", block=8)  # here xla_blocks; all branches are typed
            specs = {name: whole if name == "time_bias" else split for name in case.floats()}
            spread = jax.shard_map(run, mesh=mesh, in_specs=(specs, split), out_specs=split)
            results, pull = jax.vjp(lambda f: spread(f, case.integers()), case.floats())
            return results, pull((d_out, d_lse))[0]

        out, lse, gradients = attend_by_hand(case, 12, d_out, d_lse)
        got = jax.jit(pull)()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(((out, lse), gradients)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_memory_grows_with_the_slots_and_not_with_their_pairs(self):
        ours = {t: count_temporaries("xla_blocks", t) for t in (512, 8192)}
        plain = {t: count_temporaries("reference", t) for t in (512, 1024)}
        print(f"temporaries: xla_blocks {ours}, reference {plain}")
        assert plain[1024] > 3.8 * plain[512]
        # Bytes: eight arrays as large as the queries and their bias, and twelve of all heads' pairs of two blocks.
        for t, ours_t in ours.items():
            assert ours_t < 4 * 4 * (8 * t * 35 + 12 * xla_blocks.BLOCK**2)
        assert ours[8192] < 16 * ours[512]


def count_temporaries(backend, t):
    """Bytes of the temporaries of values and gradients with T slots, B 1, N 4, K 2, H 32, J 24, G 3."""
    heads = (1, t, 4, 32)
    floats = {"q": heads, "k": (1, t, 2, 32), "v": (1, t, 2, 32), "time_bias": (4, 24), "group_bias": (1, t, 4, 3)}
    declare = jax.ShapeDtypeStruct
    floats = {name: declare(shape, jnp.float32) for name, shape in floats.items()}
    integers = {name: declare((1, t), jnp.int32) for name in ("segment", "time", "group")}

    def total(floats, integers):
        out, lse = call(floats, integers, backend=backend)
        return jnp.sum(jnp.square(out)) + jnp.sum(jnp.square(lse))

    return jax.jit(jax.grad(total)).lower(floats, integers).compile().memory_analysis().temp_size_in_bytes


def test_repeats_are_bitwise_identical():
    case = draw_case()
    d_out, d_lse = np.ones(case.q.shape), np.ones(case.q.shape[:3])
    first, second = (run_case(case, d_out, d_lse, "xla_blocks", block=4) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


class TestPrefix:
    def draw(self, m=5, dtype=jnp.float32):
        rng = np.random.default_rng(1)
        shapes = ((2, 7, 4, 6), (2, 7, m, 2, 6), (2, 7, m, 2, 6))
        return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    def test_each_slot_sees_its_own_keys(self):
        q, k, v = operands = self.draw()
        out, lse = jax.jit(attend_prefix)(*operands)
        q, k, v = (np.asarray(x, np.float64) for x in operands)
        for b, t, n in np.ndindex(2, 7, 4):
            logit = k[b, t, :, n // 2] @ q[b, t, n] / np.sqrt(6)
            assert lse[b, t, n] == pytest.approx(np.log(np.sum(np.exp(logit))), rel=1e-5)
            expected = np.exp(logit) / np.sum(np.exp(logit)) @ v[b, t, :, n // 2]
            np.testing.assert_allclose(out[b, t, n], expected, rtol=1e-5, atol=1e-6)
        assert jax.eval_shape(attend_prefix, *self.draw(dtype=jnp.bfloat16))[0].dtype == jnp.bfloat16

    def test_a_bias_is_one_more_place_of_queries_and_keys(self):
        """Values and all gradients: the bias is the last place of the keys, where the queries hold sqrt(H)."""
        q, k, v = self.draw()
        bias_BTM = jnp.asarray(np.random.default_rng(4).normal(size=k.shape[:3]), jnp.float32)

        def biased(q, k, v, bias_BTM):
            out, lse = attend_prefix(q, k, v, bias_BTM)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        def longer(q, k, v, bias_BTM):
            last = jnp.broadcast_to(bias_BTM[..., None, None], (*k.shape[:-1], 1))
            q = jnp.append(q * np.sqrt(7 / 6), jnp.full((*q.shape[:-1], 1), np.sqrt(7)), axis=-1)
            out, lse = attend_prefix(q, jnp.append(k, last, axis=-1), jnp.append(v, 0 * last, axis=-1))
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        got, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(q, k, v, bias_BTM) for f in (biased, longer)
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def test_no_array_has_a_key_for_every_query_head(self):
        q, k, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 64, 8, 16), (2, 64, 9, 1, 16), (2, 64, 9, 1, 16)))

        def total(*operands):
            out, lse = attend_prefix(*operands)
            return jnp.sum(out**2) + jnp.sum(lse**2)

        jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(q, k, v))
        sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", jaxpr)]
        assert max(sizes) == 2 * 64 * 9 * 16

    def test_merged_parts_are_attention_over_all_keys_with_all_gradients(self):
        """The keys of one set, and those cut in three: the last part is of another kind of attention."""
        q, k, v = self.draw(9)
        d_out, d_lse = (np.random.default_rng(2).normal(size=shape) for shape in (q.shape, q.shape[:3]))

        def whole(q, k, v):
            return attend_prefix(q, k, v)

        def merged(q, k, v):
            parts = [attend_prefix(q, k[:, :, cut], v[:, :, cut]) for cut in (slice(0, 1), slice(1, 4), slice(4, 9))]
            nothing = jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf)
            return merge([parts[0], nothing, *parts[1:]])

        def pull(function):
            results, pull = jax.vjp(function, q, k, v)
            return results, pull((jnp.asarray(d_out, jnp.float32), jnp.asarray(d_lse, jnp.float32)))

        got, expected = jax.jit(lambda: (pull(merged), pull(whole)))()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_with_causal_attention_it_is_attention_over_both(self, backend):
        """A prefix that is the same for all slots is a sequence of keys that all slots see."""
        case, m = draw_case(1, 12, segments="one", time=False, group=False), 3
        longer = draw_case(1, m + 12, segments="one", time=False, group=False, seed=9)
        longer.q[:, m:], longer.k[:, m:], longer.v[:, m:] = case.q, case.k, case.v
        prefix = (jnp.broadcast_to(jnp.float32(x[:, None, :m]), (1, 12, m, 2, 8)) for x in (longer.k, longer.v))

        @jax.jit
        def run(floats, prefix):
            own = call(floats, case.integers(), backend=backend, block=4)
            return merge([own, attend_prefix(floats["q"], *prefix)])

        out, lse = run(case.floats(), list(prefix))
        expected_out, expected_lse, _ = attend_by_hand(longer)
        np.testing.assert_allclose(out, expected_out[:, m:], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse, expected_lse[:, m:], rtol=1e-5, atol=1e-5)

    def test_wrong_shapes_are_refused(self):
        q, k, v = self.draw()
        with pytest.raises(ValueError, match="do not fit"):
            attend_prefix(q, k, v[:, :, 1:])
        with pytest.raises(ValueError, match="do not fit"):
            attend_prefix(q, k[:, :, :0], v[:, :, :0])
        with pytest.raises(ValueError, match="do not fit"):
            merge([])
        with pytest.raises(ValueError, match="do not fit"):
            merge([(q, q[..., 0]), (q[:1], q[:1, ..., 0])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "none of"),
        ({"window": 0}, "at least 1"),
        ({"block": 0}, "at least 1"),
        ({"q": np.ones((2, 20, 3, 8))}, "key heads"),
        ({"k": np.ones((2, 20, 2, 7))}, "do not fit"),
        ({"segment": np.ones((2, 19))}, "segment_BT"),
        ({"time": None}, "together"),
        ({"group_bias": None}, "together"),
        ({"time_bias": np.ones((4, 1))}, "buckets"),
        ({"group_bias": np.ones((2, 20, 3, 3))}, "begin with"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    options = {name: change.pop(name) for name in ("backend", "window", "block") if name in change}
    case = draw_case()._replace(**change)
    with pytest.raises(ValueError, match=f"^attend: .*{message}"):
        call(case.floats(), case.integers(), **options)
    with pytest.raises(ValueError, match="of one"):
        attend(*(jnp.ones((1, 2, 1, 4), d) for d in (jnp.float32, jnp.bfloat16, jnp.float32)), jnp.ones((1, 2), int))
