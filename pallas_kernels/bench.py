"""Times of the kernels, as ratios to a reference of the same run, on an otherwise idle machine.

    python -m pallas_kernels.bench [--json] [--rounds=9]

Each figure is the median over rounds in which all variants take turns, so that a slow moment of the machine hits all of
them. A layer is `grouped_ffn` with its plan, forward and backward; its reference a dense gated network whose width is
that of the experts of one row together, so that both do the same useful multiplications.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import make_plan
from pallas_kernels.grouped_ffn import grouped_ffn
from pallas_kernels.specs import LOADS, LayerOperands, LayerSpec, draw_operands

TILE = 64


def time_in_turns(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, after one call that compiles."""
    for call in variants.values():
        jax.block_until_ready(call())
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
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


def make_plan_only(spec: LayerSpec) -> Callable[[], Any]:
    """The plan alone: what dispatch costs beside the layer."""
    operands: LayerOperands = draw_operands(spec)
    plan = jax.jit(lambda expert: make_plan(expert, spec.n_experts, TILE))
    return lambda: plan(operands.expert_TA)


def measure(rounds: int) -> list[dict[str, Any]]:
    """Rows of `{name, ms, ratio, to}`: against the dense network by load and by number of experts, and `ragged_dot`."""
    rows = []
    dense = make_dense(LayerSpec())
    for load in LOADS:
        spec = LayerSpec(load=load)
        variants = {"dense": dense, "layer": make_layer(spec, "xla_tiles"), "plan": make_plan_only(spec)}
        times = time_in_turns(variants, rounds)
        rows.append(_row(f"layer, {load}", times["layer"], times["dense"], "dense"))
        rows.append(_row(f"plan, {load}", times["plan"], times["layer"], "layer"))
    pair = {name: make_layer(LayerSpec(), name) for name in ("ragged_dot", "xla_tiles")}
    times = time_in_turns(pair, max(rounds // 3, 1))
    rows.append(_row("layer over ragged_dot", times["ragged_dot"], times["xla_tiles"], "layer"))
    sizes = {e: make_layer(LayerSpec(n_experts=e), "xla_tiles") for e in (8, 16, 32, 64)}
    times = time_in_turns({str(e): call for e, call in sizes.items()}, rounds)
    rows += [_row(f"layer, {e} experts", times[str(e)], times["8"], "8 experts") for e in sizes]
    return rows


def _row(name: str, ms: float, reference_ms: float, to: str) -> dict[str, Any]:
    return {"name": name, "ms": round(ms, 3), "ratio": round(ms / reference_ms, 3), "to": to}


def main() -> None:
    """Prints a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    for row in rows:
        print(f"{row['name']:28s} {row['ms']:10.2f} ms  {row['ratio']:7.3f} of {row['to']}")
    if arguments.json:
        print(json.dumps({"platform": jax.default_backend(), "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
