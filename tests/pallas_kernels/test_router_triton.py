"""The router's GPU kernels lowered for CUDA on a machine without one. Numbers: test_router, interpreted."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.router import route, triton

pytestmark = [
    pytest.mark.skipif(not triton.is_installed(), reason="this JAX has no Pallas-Triton any more"),
    # Since 0.11 JAX says so whenever a kernel is lowered; until it is gone, this is what runs on GPUs.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
CUSTOM_CALL = "__gpu$xla.gpu.triton"


def lower_for_cuda(function, n_rows, d, n_experts, n_features, dtype):
    """The program's text."""
    shapes = [
        ((n_rows, d), dtype),
        ((n_experts, d), jnp.float32),
        ((n_rows, n_features), jnp.float32),
        ((n_experts, n_features), jnp.float32),
        ((n_experts,), jnp.float32),
        ((n_rows,), jnp.int32),
    ]
    # JAX 0.12 must be told which GPU it lowers for where there is none.
    device = jax.sharding.AbstractDevice("NVIDIA H200", None, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(
            jax.jit(function),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(CUSTOM_CALL)],
        )(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return exported.mlir_module()


def make_gradient(backend, n_domains, n_choices):
    def total(*operands):
        routed = route(*operands, n_domains, n_choices, backend)
        return jnp.sum(routed.weight_TA**2) + jnp.sum(routed.probability_ZE**2) + jnp.sum(routed.lse_T**2)

    return jax.grad(total, argnums=(0, 1, 2, 3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("d", [896, 1536])
def test_both_kernels_lower(d, dtype):
    forward = lower_for_cuda(lambda *a: route(*a, 4, 2, "pallas_triton"), 8192, d, 64, 9, dtype)
    assert forward.count(CUSTOM_CALL) == 1
    assert "stablehlo.pad" not in forward  # nothing is copied to fit the blocks
    assert lower_for_cuda(make_gradient("pallas_triton", 4, 2), 8192, d, 64, 9, dtype).count(CUSTOM_CALL) == 2


def test_sizes_that_are_no_powers_of_two_lower():
    assert lower_for_cuda(make_gradient("pallas_triton", 5, 3), 1000, 100, 60, 3, jnp.bfloat16).count(CUSTOM_CALL) == 2


def test_auto_is_these_kernels_on_cuda():
    assert lower_for_cuda(make_gradient("auto", 4, 2), 8192, 896, 64, 4, jnp.bfloat16).count(CUSTOM_CALL) == 2


@pytest.mark.parametrize("d", [6, 100, 896, 960, 1536, 4096])
@pytest.mark.parametrize("n_experts", [4, 60, 64, 256, 1024])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_sizes_suit_the_chip(d, n_experts, itemsize):
    rows, columns, e = triton._pick_sizes(d, n_experts, itemsize)
    assert all(size >= 16 and size & (size - 1) == 0 for size in (rows, columns, e))
    assert e >= n_experts
    assert rows * e <= 16 * 1024
    assert columns == 16 or 3 * (rows + e) * columns * itemsize <= 96 * 1024
    assert d % columns == 0 or d % 32
