"""Attention through libraries' kernels: values and gradients by hand, and what is lowered for which platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pallas_kernels.attention import attend_plain
from pallas_kernels.attention import plain as module
from tests.pallas_kernels.attention_oracle import attend_by_hand, draw_case

HERE = {
    "splash": functools.partial(attend_plain, backend="splash_interpret"),
    "cudnn": lambda *operands, window: module.attend_cudnn(*operands, window, implementation="xla"),
    "auto": attend_plain,
}
OPERANDS = (
    *(jax.ShapeDtypeStruct((2, 300, n, 64), jnp.bfloat16) for n in (4, 2, 2)),
    jax.ShapeDtypeStruct((2, 300), jnp.int32),
)


def assert_as_by_hand(attend, case, window, tolerance=1e-5, dtype=jnp.float32):
    d_out = np.random.default_rng(5).normal(size=case.q.shape)
    expected, _, slopes = attend_by_hand(case, window, d_out, np.zeros(case.q.shape[:3]))

    def run(floats):
        return attend(floats["q"], floats["k"], floats["v"], jnp.asarray(case.segment), window=window)

    out, pull = jax.jit(functools.partial(jax.vjp, run))(case.floats(dtype))
    (found,) = pull(jnp.asarray(d_out, out.dtype))
    for name, value in {"out": expected, **slopes}.items():
        got = np.asarray(out if name == "out" else found[name], np.float32)
        np.testing.assert_allclose(got / np.abs(value).max(), value / np.abs(value).max(), atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    ("segments", "window", "t", "heads"),
    [("packed", None, 40, (4, 2)), ("mixed", 7, 20, (3, 1)), ("empty", 200, 140, (2, 2))],
)
def test_values_and_gradients_are_those_by_hand(name, segments, window, t, heads):
    case = draw_case(2, t, *heads, 8, segments=segments, time=False, group=False)
    assert_as_by_hand(HERE[name], case, window)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU is here")
@pytest.mark.parametrize("window", [None, 50])
def test_on_a_gpu_cudnn_is_right(window):
    case = draw_case(2, 192, 4, 2, 64, segments="packed", time=False, group=False)
    attend = functools.partial(attend_plain, backend="cudnn")
    assert_as_by_hand(attend, case, window, 0.03, jnp.bfloat16)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """What JAX asks a GPU for while it traces cuDNN's call."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(module, "cudnn_unsupported_reason", lambda q_BTNH: "")


def lower(platform, backend="auto", window=None):
    def total(q, k, v, segment):
        return jnp.sum(jnp.square(attend_plain(q, k, v, segment, backend=backend, window=window).astype(jnp.float32)))

    traced = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2))).trace(*OPERANDS)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window", [None, 100])
def test_where_a_gpu_is_auto_is_cudnn_for_gpus_alone(pretend_gpu, window):
    text = lower("cuda", window=window)
    assert text.count("__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "384x" in text  # of 300 slots three blocks of 128
    assert "cudnn" not in lower("cpu", window=window)


def test_where_none_is_auto_is_not_and_cudnn_says_why():
    assert "cudnn" not in lower("cuda")
    with pytest.raises(ValueError, match="cudnn: there is no NVIDIA GPU in this process"):
        lower("cuda", "cudnn")
    q = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match="cudnn: takes bfloat16 and float16, not float32"):
        attend_plain(q, q, q, jnp.zeros((1, 8), jnp.int32), backend="cudnn")
    q = jnp.zeros((1, 8, 2, 12), jnp.bfloat16)
    with pytest.raises(ValueError, match="cudnn: takes heads of multiples of 8 up to 128, not of 12"):
        attend_plain(q, q, q, jnp.zeros((1, 8), jnp.int32), backend="cudnn")
