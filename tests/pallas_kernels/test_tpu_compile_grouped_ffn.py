"""The experts' kernels through the real TPU compiler, which runs without TPUs where libtpu is installed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import make_plan
from pallas_kernels.grouped_ffn import grouped_ffn

pytest.importorskip("libtpu", reason="the TPU compiler is not here: pip install -c requirements.lock -e '.[tpu]'")
T, D, E, F, A, TILE = 8192, 1536, 16, 1024, 2, 128
KERNELS = ("grouped_ffn_forward", "grouped_ffn_transposed", "grouped_ffn_rows")


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def devices(request):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices


def shapes(t=T, d=D, e=E, f=F, dtype=jnp.bfloat16):
    """Rows, weights, matrices, experts of the rows."""
    floats = ((t, d), (t, A), (e, d, f), (e, d, f), (e, f, d))
    return [*(jax.ShapeDtypeStruct(s, dtype) for s in floats), jax.ShapeDtypeStruct((t, A), jnp.int32)]


def layer(x, weight, gate, up, down, expert, backend="auto", tile=TILE):
    return grouped_ffn(x, weight, gate, up, down, make_plan(expert, gate.shape[0], tile), backend)


def layer_by_sort_and_repeat(x, weight, gate, up, down, expert):
    """The plain form: rows repeated, sorted by expert, multiplied group by group, sorted back and summed."""
    flat = expert.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=gate.shape[0]).astype(jnp.int32)
    rows = jnp.repeat(x, A, axis=0)[order]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    y = jax.lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order)]
    return jnp.sum(y.reshape(*expert.shape, -1) * weight[..., None], axis=1)


def with_gradients(function):
    """Of a loss whose cotangent depends on the answer, as any but a linear one's does."""
    return jax.value_and_grad(lambda *a: jnp.sum(jnp.square(function(*a)), dtype=jnp.float32), argnums=(0, 1, 2, 3, 4))


def compile_for(device, function, arguments):
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    return jax.jit(function).lower(*placed).compile()


def count_temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes
