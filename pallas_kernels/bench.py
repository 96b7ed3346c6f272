"""Times of the kernels, as ratios to a reference of the same run, on an otherwise idle machine.

    python -m pallas_kernels.bench [--json] [--rounds=9] [--tpu=v5e:2x2]

Each time is the median over rounds in which all variants take turns, so that a slow moment of the machine hits all of
them. A layer is `grouped_ffn` with its plan, forward and backward; its reference a dense gated network whose width is
that of the experts of one row together, so that both do the same useful multiplications. `--tpu` compiles for a TPU
instead, on any machine with libtpu: bytes and temporaries by the compiler, beside what must move at least.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench_attention import measure_attention
from pallas_kernels.combine import unpermute_sum
from pallas_kernels.cost import count_bytes
from pallas_kernels.dispatch import make_plan
from pallas_kernels.grouped_ffn import grouped_ffn, has_tokamax
from pallas_kernels.router import route
from pallas_kernels.specs import LOADS, LayerOperands, LayerSpec, draw_operands

TILE = 64


def time_in_turns(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each.

    Before each timed call goes another of the same variant, so that what the one before it left in the caches and the
    allocator does not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(times)) for name, times in taken.items()}


def _with_gradients(function: Callable, n_arguments: int) -> Callable:
    """The value and all gradients of a scalar of what the function returns."""
    return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.square(function(*a))), argnums=tuple(range(n_arguments))))


def make_layer(spec: LayerSpec, backend: str) -> Callable[[], Any]:
    """The layer over the spec's operands, forward and backward."""
    operands = draw_operands(spec)

    def layer(x, weight, gate, up, down, expert):
        plan = make_plan(expert, spec.n_experts, TILE)
        return grouped_ffn(x, weight, gate, up, down, plan, backend)

    step = _with_gradients(layer, 5)
    return lambda: step(*operands)


def make_dense(spec: LayerSpec) -> Callable[[], Any]:
    """A dense gated network of the active width."""
    x, _, gate, up, down, _ = draw_operands(spec._replace(n_experts=spec.n_choices))
    gate, up = (jnp.concatenate(list(m), axis=1) for m in (gate, up))
    step = _with_gradients(lambda x, g, u, d: (jax.nn.silu(x @ g) * (x @ u)) @ d, 4)
    down = jnp.concatenate(list(down), axis=0)
    return lambda: step(x, gate, up, down)


def make_matmuls(spec: LayerSpec) -> Callable[[], Any]:
    """The matmuls of an even load alone, batched over experts: what no loop over tiles can be expected to beat."""
    x, _, *matrices, _ = draw_operands(spec)
    rows_ERD = jnp.tile(x, (spec.n_choices, 1)).reshape(spec.n_experts, -1, spec.d)
    step = _with_gradients(lambda x, g, u, d: (jax.nn.silu(x @ g) * (x @ u)) @ d, 4)
    return lambda: step(rows_ERD, *matrices)


def make_plan_only(spec: LayerSpec) -> Callable[[], Any]:
    """The plan alone: what dispatch costs beside the layer."""
    operands: LayerOperands = draw_operands(spec)
    plan = jax.jit(lambda expert: make_plan(expert, spec.n_experts, TILE))
    return lambda: plan(operands.expert_TA)


def make_rows_only(spec: LayerSpec) -> Callable[[], Any]:
    """What the layer does beside the plan and the experts: dispatch and combine, without anything between.

    Forward a gather of the rows and a sum over their row slots; backward a gather of the rows, which are not kept, one
    of the cotangents, and the sum of the rows' gradients.
    """
    x, weight, *_, expert = draw_operands(spec)
    plan = jax.jit(make_plan, static_argnums=(1, 2))(expert, spec.n_experts, TILE)

    @jax.jit
    def step(x, g, weight):
        weight_R = jnp.where(plan.used_R, weight[plan.row_R, plan.choice_R], 0)
        y = unpermute_sum(x[plan.row_R] * weight_R[:, None], plan)
        return y, x[plan.row_R], unpermute_sum(g[plan.row_R], plan)

    return lambda: step(x, x, weight)


def make_router(spec: LayerSpec, backend: str) -> Callable[[], Any]:
    """The router over the spec's rows with three features and three domains, forward and backward."""
    rng = np.random.default_rng(0)
    x = draw_operands(spec).x_TD
    router, features, w_features = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((spec.n_experts, spec.d), (spec.n_rows, 3), (spec.n_experts, 3))
    )
    domain = jnp.asarray(rng.integers(0, 3, spec.n_rows), jnp.int32)

    def routed(x, router, features, w_features):
        r = route(x, router, features, w_features, jnp.zeros(spec.n_experts), domain, 3, spec.n_choices, backend)
        return jnp.concatenate([r.weight_TA.reshape(-1), r.lse_T, r.probability_ZE.reshape(-1)])

    step = _with_gradients(routed, 4)
    return lambda: step(x, router, features, w_features)


def measure(rounds: int) -> list[dict[str, Any]]:
    """Rows of `{name, ms, ratio, to}`: against the dense network by load and by number of experts, and `ragged_dot`.

    Those of attention have `temporary_bytes` too.
    """
    rows = []
    dense = make_dense(LayerSpec())
    for load in LOADS:
        spec = LayerSpec(load=load)
        variants = {
            "dense": dense,
            "layer": make_layer(spec, "xla_tiles"),
            "plan": make_plan_only(spec),
            "dispatch and combine": make_rows_only(spec),
        }
        times = time_in_turns(variants, rounds)
        rows.append(_row(f"layer, {load}", times["layer"], times["dense"], "dense"))
        for part in ("plan", "dispatch and combine"):
            rows.append(_row(f"{part}, {load}", times[part], times["layer"], "layer"))
    others = ("ragged_dot", *(("tokamax",) if has_tokamax() else ()))
    backends = {name: make_layer(LayerSpec(), name) for name in (*others, "xla_tiles")}
    times = time_in_turns(backends, max(rounds // 3, 1))
    rows += [_row(f"layer over {name}", times[name], times["xla_tiles"], "layer") for name in others]
    counts = (8, 16, 32, 64)
    sizes = {f"layer, {e} experts": make_layer(LayerSpec(n_experts=e), "xla_tiles") for e in counts}
    bare = {f"bare matmuls, {e} experts": make_matmuls(LayerSpec(n_experts=e)) for e in counts[::3]}
    times = time_in_turns({**sizes, **bare}, rounds)
    rows += [_row(name, times[name], times["layer, 8 experts"], "8 experts") for name in sizes]
    rows += [_row(name, times[name], times[name.replace("bare matmuls", "layer")], "the layer") for name in bare]
    routers = {name: make_router(LayerSpec(n_experts=64), name) for name in ("xla", "auto")}
    times = time_in_turns(routers, rounds)
    rows.append(_row("router, own gradients", times["auto"], times["xla"], "JAX's gradients"))
    return rows + measure_attention(time_in_turns, rounds)


TPU_LAYER = LayerSpec(n_rows=8192, d=1536, n_experts=16, f=1024, n_choices=2)
TPU_ROUTER = LayerSpec(n_rows=8192, d=1536, n_experts=64, n_choices=2)


def measure_tpu(topology: str) -> list[dict[str, Any]]:
    """Rows of `{name, bytes, least_bytes, temporary_bytes}` by the compiler for one chip, in bfloat16."""
    from jax.experimental import topologies

    (device, *_) = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.SingleDeviceSharding(device)

    def compile_row(name: str, function: Callable, arguments: list[tuple[tuple[int, ...], Any]]) -> dict[str, Any]:
        shapes = [jax.ShapeDtypeStruct(s, t, sharding=sharding) for s, t in arguments]
        results = jax.tree.leaves(jax.eval_shape(function, *shapes))
        compiled = jax.jit(function).lower(*shapes).compile()
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        assert cost is not None
        assert memory is not None
        return {
            "name": name,
            "bytes": int(cost["bytes accessed"]),
            "least_bytes": count_bytes([*shapes, *results]),
            "temporary_bytes": memory.temp_size_in_bytes,
        }

    t, d, e, _, a, _ = TPU_ROUTER
    operands: list[tuple[tuple[int, ...], Any]] = [
        ((t, d), jnp.bfloat16),
        ((e, d), jnp.float32),
        ((t, 4), jnp.float32),
        ((e, 4), jnp.float32),
        ((e,), jnp.float32),
        ((t,), jnp.int32),
    ]

    def router(backend: str) -> Callable:
        def routed(x, router, features, w_features, bias, domain):
            return tuple(route(x, router, features, w_features, bias, domain, 4, a, backend))

        return routed

    rows = [compile_row(f"router, {name}", router(name), operands) for name in ("xla", "pallas_tpu")]
    t, d, e, f, choices, _ = TPU_LAYER
    matrices = [((e, d, f), jnp.bfloat16), ((e, d, f), jnp.bfloat16), ((e, f, d), jnp.bfloat16)]
    operands = [((t, d), jnp.bfloat16), ((t, choices), jnp.bfloat16), *matrices, ((t, choices), jnp.int32)]

    def layer(backend: str) -> Callable:
        def total(x, weight, gate, up, down, expert):
            y = grouped_ffn(x, weight, gate, up, down, make_plan(expert, e, 128), backend)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4))

    return rows + [
        compile_row(f"layer, forward and backward, {name}", layer(name), operands)
        for name in ("ragged_dot", "pallas_tpu")
    ]


def _row(name: str, ms: float, reference_ms: float, to: str) -> dict[str, Any]:
    return {"name": name, "ms": round(ms, 3), "ratio": round(ms / reference_ms, 3), "to": to}


def main() -> None:
    """Prints a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tpu", default="", help="compile for this topology instead, such as v5e:2x2")
    arguments = parser.parse_args()
    if arguments.tpu:
        rows = measure_tpu(arguments.tpu)
        for row in rows:
            ratio = row["bytes"] / row["least_bytes"]
            sizes = (
                f"{row['bytes'] / 1e6:9.1f} MB  {ratio:6.2f} of the least  {row['temporary_bytes'] / 1e6:8.1f} MB kept"
            )
            print(f"{row['name']:42s} {sizes}")
    else:
        rows = measure(arguments.rounds)
        for row in rows:
            kept = f"  {row['temporary_bytes'] / 1e6:8.1f} MB kept" if "temporary_bytes" in row else ""
            print(f"{row['name']:36s} {row['ms']:10.2f} ms  {row['ratio']:7.3f} of {row['to']}{kept}")
    if arguments.json:
        platform = arguments.tpu or jax.default_backend()
        print(json.dumps({"platform": platform, "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
