"""The router's TPU kernels through the real TPU compiler, which runs without a TPU where libtpu is installed.

XLA takes a kernel's bytes from the kernel's own estimate, which follows from its block specs (`pallas_kernels.cost`);
the rest of the program, and all of XLA's own form, is counted by XLA.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.router import route

# A TPU's program in the compilation cache cannot be loaded here; it is compiled anew.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
pytest.importorskip("libtpu", reason="the TPU compiler is not here: pip install -c requirements.lock -e '.[tpu]'")
T, D, E, X, Z, A = 8192, 1536, 64, 6, 4, 2
ROWS = T * D * 2  # bytes of the rows, which one pass must read
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def declare_operands(n_rows=T, n_features=X):
    shapes = [
        ((n_rows, D), jnp.bfloat16),
        ((E, D), jnp.float32),
        ((n_rows, n_features), jnp.float32),
        ((E, n_features), jnp.float32),
        ((E,), jnp.float32),
        ((n_rows,), jnp.int32),
    ]
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def find_mesh(chip, n_devices=1):
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices
    return jax.sharding.Mesh(np.array(devices[:n_devices]), ("rows",))


def compile_for(mesh, function, operands, specs=None):
    """Each program once a session: JAX warns when it finds a TPU's in the compilation cache and cannot load it here."""
    operands = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(operands, specs or [P()] * len(operands), strict=True)
    ]
    return jax.jit(function).lower(*operands).compile()


def count_bytes(compiled):
    return compiled.cost_analysis()["bytes accessed"]


def read_estimates(function, operands):
    """Name of each kernel -> bytes of its estimate."""
    found = {}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found[equation.params["name"]] = equation.params["cost_estimate"].bytes_accessed
                continue
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda a: hasattr(a, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    visit(inner.jaxpr)

    visit(jax.make_jaxpr(function)(*operands))
    return found


def route_by(backend):
    return lambda *operands: route(*operands, Z, A, backend)


def make_gradient(backend):
    def total(*operands):
        routed = route(*operands, Z, A, backend)
        return jnp.sum(routed.weight_TA**2) + jnp.sum(routed.probability_ZE**2) + jnp.sum(routed.lse_T**2)

    return jax.grad(total, argnums=(0, 1, 2, 3))


# What a router must move at least: every operand read once, every result written once.
LEAST = ROWS + 4 * (E * D + T * X + E * X + E + T) + 4 * (2 * T * A + T + 2 * Z * E)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_rows_are_read_once(chip):
    mesh, operands = find_mesh(chip), declare_operands()
    moved = read_estimates(route_by("pallas_tpu"), operands)["router_forward"]
    compiled = compile_for(mesh, route_by("auto"), operands)
    print(f"{chip}: least {LEAST}, by the block specs {moved}, the program {count_bytes(compiled):.0f} bytes")
    assert "router_forward" in compiled.as_text()
    assert ROWS < moved < 1.3 * LEAST
    assert moved <= count_bytes(compiled) < 1.3 * LEAST
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * ROWS


def test_xla_alone_moves_several_times_more():
    """By XLA's count, which holds what stays in VMEM too, and a gather as many readings of its table.

    Only a little of it crosses HBM: on a v5e 1.08 times the least with 8,192 rows, which fit into VMEM, 1.28 times with
    131,072 (operands and results outside VMEM, summed over the program); with the kernel 1.00 times.
    """
    mesh, operands = find_mesh("v5e:2x2"), declare_operands(2048)  # more rows take XLA longer to compile
    by_xla, by_kernel = (count_bytes(compile_for(mesh, route_by(name), operands)) for name in ("xla", "auto"))
    print(f"v5e: XLA alone {by_xla:.0f}, with the kernel {by_kernel:.0f} bytes")
    assert by_xla > 3 * by_kernel


@pytest.mark.parametrize("chip", CHIPS)
def test_the_gradients_keep_no_logits(chip):
    operands = declare_operands()
    moved = read_estimates(make_gradient("pallas_tpu"), operands)
    assert moved["router_backward"] < 1.3 * (LEAST + 4 * T * E)  # that the logits' gradient is written is all it adds
    compiled = compile_for(find_mesh(chip), make_gradient("auto"), operands)
    text = compiled.as_text()
    assert "router_forward" in text
    assert "router_backward" in text
    # The rows forward, backward and for the router's gradient, their copies in VMEM, and their own gradient.
    assert count_bytes(compiled) < 9 * ROWS
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * ROWS


def test_rows_that_fill_no_whole_block_and_fewer_features_than_domains_compile():
    compiled = compile_for(find_mesh("v5e:2x2"), make_gradient("auto"), declare_operands(1000, 2))
    assert "router_backward" in compiled.as_text()


def test_the_kernels_run_inside_shard_map():
    mesh, specs = find_mesh("v5e:2x2", 4), (P("rows"), P(), P("rows"), P(), P(), P("rows"))

    def total(*operands):
        routed = route(*operands, Z, A, "auto")
        return jax.lax.psum(jnp.sum(routed.lse_T) + jnp.sum(routed.probability_ZE**2), "rows")

    gradient = jax.grad(jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P()), argnums=(0, 1, 2, 3))
    text = compile_for(mesh, gradient, declare_operands(), specs).as_text()
    assert "router_backward" in text
    assert "all-reduce" in text  # of the router's gradient
