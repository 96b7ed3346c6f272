"""Attention row by row in float64 NumPy, values and gradients; operands to try it on, and ours run on them."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import attend
from pallas_kernels.attention.operands import Operands

NO_TIME = -(2**31)


class Case(NamedTuple):
    """Arguments of `attend` but the window."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    segment: np.ndarray
    time: np.ndarray | None = None
    time_bias: np.ndarray | None = None
    group: np.ndarray | None = None
    group_bias: np.ndarray | None = None

    def floats(self, dtype=jnp.float32):
        """Name -> array, of what has a gradient."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "time_bias", "group_bias")}
        types = {"q": dtype, "k": dtype, "v": dtype}
        return {n: jnp.asarray(x, types.get(n, jnp.float32)) for n, x in named.items() if x is not None}

    def integers(self):
        named = {name: getattr(self, name) for name in ("segment", "time", "group")}
        return {n: jnp.asarray(x, jnp.int32) for n, x in named.items() if x is not None}


def draw_case(b=2, t=20, n=4, k=2, h=8, j=6, g=3, segments="packed", time=True, group=True, seed=0):
    """`segments`: packed (some padding behind), one, empty (the first sequence all padding), mixed (in any order)."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, t + 1, (b, 3)), axis=1)  # equal ends: no such segment
    packed = 1 + np.sum(np.arange(t) >= ends[:, :2, None], axis=1)
    packed[np.arange(t) >= ends[:, 2:]] = 0
    segment = {
        "packed": packed,
        "one": np.ones((b, t)),
        "empty": packed * (np.arange(b)[:, None] > 0),
        "mixed": rng.integers(-2, 4, (b, t)),
    }[segments].astype(np.int32)
    times = rng.integers(-(2**31) + 1, 2**31, (b, t)).astype(np.int32)  # any two, also far apart
    near = (7e8 + np.cumsum(rng.exponential(3e4, (b, t)) * rng.choice([0.01, 1, 100], (b, t)), axis=1) % 1e9).astype(
        np.int32
    )
    times = np.where(rng.random((b, 1)) < 0.3, times, near)
    times[rng.random((b, t)) < 0.15] = NO_TIME
    return Case(
        *(rng.normal(size=shape) for shape in ((b, t, n, h), (b, t, k, h), (b, t, k, h))),
        segment,
        times if time else None,
        rng.normal(size=(n, j)) if time else None,
        rng.integers(0, g, (b, t)).astype(np.int32) if group else None,
        rng.normal(size=(b, t, n, g)) if group else None,
    )


def find_bucket_by_hand(earlier: int, later: int, n_buckets: int) -> int:
    """By logarithms in float64, from Python's integers."""
    earlier, later = int(earlier), int(later)
    if NO_TIME in (earlier, later):
        return n_buckets - 1
    hours = max(later - earlier, 0) / 3600
    return min(math.floor(math.log2(1 + hours) * 1.5), n_buckets - 2)


def attend_by_hand(case: Case, window=None, d_out=None, d_lse=None):
    """Output, log-sum-exp, and with cotangents the gradients by name."""
    q, k, v, segment, time, time_bias, group, group_bias = case
    (b, t, n, h), share = q.shape, q.shape[2] // k.shape[2]
    out, lse = np.zeros(q.shape), np.zeros((b, t, n))
    grads = {name: np.zeros(getattr(case, name).shape) for name in case.floats()}
    for i in range(b):
        for row in range(t):
            seen = [s for s in range(row + 1) if segment[i, s] == segment[i, row] and row - s < (window or t + 1)]
            for head in range(n):
                own = head // share
                logit = k[i, seen, own] @ q[i, row, head] / np.sqrt(h)
                if time is not None:
                    bucket = [find_bucket_by_hand(time[i, s], time[i, row], time_bias.shape[1]) for s in seen]
                    logit = logit + time_bias[head, bucket]
                if group is not None:
                    logit = logit + group_bias[i, row, head, group[i, seen]]
                top = logit.max()
                lse[i, row, head] = top + np.log(np.sum(np.exp(logit - top)))
                weight = np.exp(logit - lse[i, row, head])
                out[i, row, head] = weight @ v[i, seen, own]
                if d_out is None:
                    continue
                g = d_out[i, row, head]
                d_weight = v[i, seen, own] @ g
                d_logit = weight * (d_weight - weight @ d_weight) + weight * d_lse[i, row, head]
                grads["q"][i, row, head] = d_logit @ k[i, seen, own] / np.sqrt(h)
                grads["k"][i, seen, own] += np.outer(d_logit, q[i, row, head]) / np.sqrt(h)
                grads["v"][i, seen, own] += np.outer(weight, g)
                if time is not None:
                    np.add.at(grads["time_bias"][head], bucket, d_logit)
                if group is not None:
                    np.add.at(grads["group_bias"][i, row, head], group[i, seen], d_logit)
    return out, lse, grads


def to_operands(case: Case, dtype=jnp.float32) -> Operands:
    """What a backend's own functions take."""
    arrays = {**case.floats(dtype), **case.integers()}
    return Operands(*(arrays.get(name) for name in Case._fields))


def call(floats, integers, **options):
    """`attend` of the named arrays."""
    return attend(
        floats["q"],
        floats["k"],
        floats["v"],
        integers["segment"],
        time_BT=integers.get("time"),
        time_bias_NJ=floats.get("time_bias"),
        group_BT=integers.get("group"),
        group_bias_BTNG=floats.get("group_bias"),
        **options,
    )


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _run(floats, integers, d_out, d_lse, backend, window, block):
    results, pull = jax.vjp(lambda f: call(f, integers, backend=backend, window=window, block=block), floats)
    return results, pull((d_out.astype(results[0].dtype), d_lse.astype(jnp.float32)))[0]


def run_case(case: Case, d_out, d_lse, backend, window=None, block=None, dtype=jnp.float32):
    """Output and log-sum-exp, and the gradients by name, as NumPy arrays."""
    results = _run(case.floats(dtype), case.integers(), jnp.asarray(d_out), jnp.asarray(d_lse), backend, window, block)
    return jax.tree.map(np.asarray, results)


def assert_right(case: Case, backend, window=None, block=None, tolerance=1e-5, dtype=jnp.float32):
    """Values and gradients are those by hand, up to `tolerance` of the largest (at least 1)."""
    rng = np.random.default_rng(5)
    d_out, d_lse = rng.normal(size=case.q.shape), rng.normal(size=case.q.shape[:3])
    expected_out, expected_lse, expected = attend_by_hand(case, window, d_out, d_lse)
    (out, lse), gradients = run_case(case, d_out, d_lse, backend, window, block, dtype)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    got = {"out": out, "lse": lse, **gradients}
    for name, value in {"out": expected_out, "lse": expected_lse, **expected}.items():
        scale = max(np.abs(value).max(), 1)
        np.testing.assert_allclose(got[name].astype(np.float32) / scale, value / scale, atol=tolerance, err_msg=name)
