"""Attention's TPU kernels through the real TPU compiler, which runs without a TPU where libtpu is installed."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import attend_plain
from tests.pallas_kernels.attention_oracle import call

# A TPU's program in the compilation cache cannot be loaded here; it is compiled anew.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
pytest.importorskip("libtpu", reason="the TPU compiler is not here: pip install -c requirements.lock -e '.[tpu]'")
N, K, H, J, G = 4, 2, 64, 24, 3
KERNELS = ("attention_forward", "attention_bwd_dq", "attention_bwd_dkv")
# Bytes a slot, of everything that waits between kernels: queries, output, its cotangent and the queries' gradient.
BOUND = 4 * N * H * 2


def list_devices(topology):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def declare(t, b=1, dtype=jnp.bfloat16, biased=True, n=N, h=H):
    """Arrays by name: those with a gradient, and integers."""
    shapes = {"q": (b, t, n, h), "k": (b, t, K, h), "v": (b, t, K, h)}
    floats = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    if biased:
        floats["time_bias"] = jax.ShapeDtypeStruct((n, J), jnp.float32)
        floats["group_bias"] = jax.ShapeDtypeStruct((b, t, n, G), jnp.float32)
    names = ("segment", "time", "group") if biased else ("segment",)
    return floats, {name: jax.ShapeDtypeStruct((b, t), jnp.int32) for name in names}


def total(floats, integers, **options):
    out, lse = call(floats, integers, **options)
    return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(jnp.square(lse))


def compile_for(device, operands, **options):
    """Values and all gradients."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), operands)
    return jax.jit(jax.grad(functools.partial(total, **options))).lower(*placed).compile()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_memory_grows_with_the_slots_and_not_with_their_pairs(topology):
    device, b, t = list_devices(topology)[0], 32, 8192  # fewer sequences, and XLA keeps all of it in VMEM on v5e, v6e
    compiled = compile_for(device, declare(t, b))
    assert all(name in compiled.as_text() for name in KERNELS)
    bytes_a_slot = compiled.memory_analysis().temp_size_in_bytes / (b * t)
    print(f"{topology}: {bytes_a_slot:.0f} bytes a slot")
    assert 0 < bytes_a_slot < BOUND  # one [T, S] array of one head has 4 T, 16 times as many
    if topology == "v5e:2x2":  # one chip will do: a program takes seconds to compile
        longer = compile_for(device, declare(2 * t, b)).memory_analysis().temp_size_in_bytes / (2 * b * t)
        print(f"{topology}: {longer:.0f} bytes a slot with twice as many")
        assert longer < 1.1 * bytes_a_slot


def test_any_length_type_and_window_compile():
    """And query heads of one key head whose loop is not unrolled."""
    device = list_devices("v5e:2x2")[0]
    for compiled in (
        compile_for(device, declare(1000, 2, jnp.float32, n=6, h=24), window=300),
        compile_for(device, declare(300, 2, biased=False, n=6)),
    ):
        assert all(name in compiled.as_text() for name in KERNELS)


@pytest.mark.parametrize(("t", "h", "window", "on_mesh"), [(1024, 64, None, False), (300, 128, 200, True)])
def test_splash_attention_compiles(t, h, window, on_mesh):
    """Also with sequences over two chips and heads over two."""
    devices = list_devices("v5e:2x2")
    if not on_mesh:
        devices = devices[:1]
    shape = (2, 2) if on_mesh else (1, 1)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)
    specs = (*(jax.P("data", None, "model"),) * 3, jax.P("data"))
    floats, integers = declare(t, 2, biased=False, h=h)
    operands = floats["q"], floats["k"], floats["v"], integers["segment"]
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
        for a, spec in zip(operands, specs, strict=True)
    ]
    attend = functools.partial(attend_plain, window=window, backend="splash")
    spread = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    total = jax.grad(lambda *a: jnp.sum(jnp.square(spread(*a).astype(jnp.float32))), argnums=(0, 1, 2))
    text = jax.jit(total).lower(*placed).compile().as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, backward to queries, to keys and values
    assert not any(name in text for name in KERNELS)


def test_inside_shard_map():
    """Sequences over two chips, heads over two: JAX's check of what varies passes, the table's gradient is summed."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=list_devices("v5e:2x2")
    )
    p = jax.P
    heads = p("data", None, "model")
    specs = {"q": heads, "k": heads, "v": heads, "group_bias": heads, "time_bias": p("model")}, p("data")
    floats, integers = declare(256, 2)
    placed = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)),
        (floats, integers),
        (specs[0], dict.fromkeys(integers, specs[1])),
    )

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=p())
    def spread(floats, integers):
        return jax.lax.psum(total(floats, integers), ("data", "model"))

    text = jax.jit(jax.grad(spread)).lower(*placed).compile().as_text()
    assert all(name in text for name in (*KERNELS, "all-reduce"))
