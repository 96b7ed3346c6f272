"""The kernels through the real TPU compiler, which runs on a machine without TPUs where libtpu is installed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.router import route

pytest.importorskip("libtpu", reason="the TPU compiler is not here: pip install -c requirements.lock -e '.[tpu]'")
T, D, E, Z, A = 8192, 1536, 64, 4, 2
ROWS = T * D * 2  # bytes of the rows, which one pass must read


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def device(request):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices[0]


def compile_for(device, function, *shapes):
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(function).lower(*arguments).compile()


ROUTER = [
    ((T, D), jnp.bfloat16),
    ((E, D), jnp.float32),
    ((T, Z), jnp.float32),
    ((E, Z), jnp.float32),
    ((E,), jnp.float32),
    ((T,), jnp.int32),
]


def test_the_router_reads_the_rows_once(device):
    compiled = compile_for(device, lambda *a: route(*a, A, "pallas_tpu"), *ROUTER)
    small = T * (Z + 2 * A + 2) * 4 + E * (D + Z + 1) * 4 + 2 * (T // 256) * Z * E * 4
    assert compiled.cost_analysis()["bytes accessed"] < 1.3 * (ROWS + small)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * ROWS


def test_its_gradients_keep_no_logits(device):
    def total(x, router, prior, lift, bias, domain):
        routed = route(x, router, prior, lift, bias, domain, A, "pallas_tpu")
        return jnp.sum(routed.weight_TA**2) + jnp.sum(routed.probability_ZE**2) + jnp.sum(routed.lse_T**2)

    compiled = compile_for(device, jax.grad(total, argnums=(0, 1, 2, 3)), *ROUTER)
    # The rows forward, backward and for the router's gradient, and their own gradient, in float32 while it is made.
    assert compiled.cost_analysis()["bytes accessed"] < 9 * ROWS
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * ROWS
