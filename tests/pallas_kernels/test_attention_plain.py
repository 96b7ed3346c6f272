"""Attention through libraries' kernels: values and gradients by hand, and what is lowered for which platform."""

import functools
import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from moerec.nn import attention as layers
from moerec.nn.sharding import make_mesh
from pallas_kernels.attention import attend_plain
from pallas_kernels.attention import plain as module
from tests.pallas_kernels.attention_oracle import attend_by_hand, draw_case

HERE = {
    "splash": functools.partial(module.attend_splash, interpret=True),
    "cudnn": functools.partial(module.attend_cudnn, implementation="xla"),
    "auto": attend_plain,
}
OPERANDS = (
    *(jax.ShapeDtypeStruct((2, 300, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)),
    jax.ShapeDtypeStruct((2, 300), jnp.int32),
)
FORWARD, BACKWARD = "__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward("
HAS_GPU = jax.default_backend() == "gpu"


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


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_bfloat16_is_right_to_its_own_precision(name):
    assert_as_by_hand(HERE[name], draw_case(h=16, time=False, group=False), 9, 0.03, jnp.bfloat16)


@pytest.mark.skipif(not HAS_GPU, reason="no GPU is here")
@pytest.mark.parametrize("window", [None, 50])
def test_on_a_gpu_cudnn_is_right(window):
    case = draw_case(2, 192, 4, 2, 64, segments="packed", time=False, group=False)
    assert not module.cudnn_unsupported_reason(case.floats(jnp.bfloat16)["q"])
    attend = functools.partial(attend_plain, backend="cudnn")
    assert_as_by_hand(attend, case, window, 0.03, jnp.bfloat16)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """What is asked of a GPU while cuDNN's call is traced."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.extend.backend, "get_backend", lambda: types.SimpleNamespace(platform_version="cuda"))

    def pretend(capability):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda backend: [device])

    pretend("9.0")
    return pretend


def lower(platform, backend="auto", window=None, operands=OPERANDS):
    def total(q, k, v, segment):
        return jnp.sum(jnp.square(attend_plain(q, k, v, segment, backend=backend, window=window).astype(jnp.float32)))

    traced = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2))).trace(*operands)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("backend", "window"), [("auto", None), ("cudnn", None), ("cudnn", 100)])
def test_where_a_gpu_is_cudnn_is_for_gpus_alone(pretend_gpu, backend, window):
    text = lower("cuda", backend, window)
    assert (text.count(FORWARD), text.count(BACKWARD)) == (1, 1)
    assert "384x" in text  # of 300 slots three blocks of 128
    assert "cudnn" not in lower("cpu", backend, window)


@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 2, 4)])
def test_on_a_mesh_each_device_calls_cudnn(pretend_gpu, shape):
    """Through the layers' attention: of two key heads four devices have all, each."""
    operands = tuple(jax.ShapeDtypeStruct((3, 600, *a.shape[2:]), a.dtype) for a in OPERANDS)

    def total(q, k, v, segment):
        return jnp.sum(layers.attend_plain(q, k, v, segment).astype(jnp.float32))

    with jax.set_mesh(make_mesh(*shape)):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*operands)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert (text.count(FORWARD), text.count(BACKWARD)) == (1, 1)


def test_long_rows_and_windows_are_not_masked_unasked(pretend_gpu):
    assert "cudnn" not in lower("cuda", window=100)
    longer = tuple(jax.ShapeDtypeStruct((1, 2049, *a.shape[2:]), a.dtype) for a in OPERANDS)
    assert "cudnn" not in lower("cuda", operands=longer)


def test_what_cudnn_cannot_take_goes_through_ours(pretend_gpu):
    q = OPERANDS[0]
    assert not module.cudnn_unsupported_reason(q)
    single = q.update(dtype=jnp.float32)
    assert module.cudnn_unsupported_reason(single) == "takes bfloat16 and float16, not float32"
    narrow = q.update(shape=(2, 300, 4, 12))
    assert module.cudnn_unsupported_reason(narrow) == "takes heads of multiples of 8 up to 128, not of 12"
    assert "cudnn" not in lower(
        "cuda", "cudnn", operands=(*(a.update(dtype=jnp.float32) for a in OPERANDS[:3]), OPERANDS[3])
    )
    for capability in ("7.5", "10.3"):
        pretend_gpu(capability)
        reason = module.cudnn_unsupported_reason(q)
        assert reason == f"does not run on GPUs of compute capability {capability}"


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
@pytest.mark.parametrize("backend", ["auto", "cudnn"])
def test_where_no_gpu_is_cudnn_is_not(backend):
    assert "cudnn" not in lower("cuda", backend)


def test_where_no_tpu_is_splash_is_not():
    assert "tpu_custom_call" not in lower("cpu", "splash")
    case = draw_case(time=False, group=False)
    assert_as_by_hand(functools.partial(attend_plain, backend="splash"), case, 7)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"backend": "splsh"}, "'splsh' is none of .*cudnn, splash"),
        ({"window": 0}, "window 0"),
        ({"segment": jnp.zeros((2, 4), jnp.int32)}, r"segment_BT is int32\(2, 4\), not"),
        ({"k": jnp.zeros((2, 8, 2, 16), jnp.bfloat16)}, "not of one"),
    ],
)
@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_what_does_not_fit_is_refused(backend, change, line):
    arrays = {name: jnp.zeros((2, 8, 2, 16)) for name in "qkv"} | {"segment": jnp.zeros((2, 8), jnp.int32)}
    arguments = {**arrays, "backend": backend, "window": None} | change
    q, k, v, segment = (arguments.pop(name) for name in arrays)
    with pytest.raises(ValueError, match=line):
        attend_plain(q, k, v, segment, **arguments)
