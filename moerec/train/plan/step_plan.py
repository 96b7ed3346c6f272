"""A training step on a TPU slice before there is one: whether it fits, and how fast it can be at best.

The real step is compiled for the slice ahead of time. Bytes of memory are the compiler's; operations, traffic with
memory and traffic between chips are counted in the programs. From these follow times that no run can beat, each as if
all else were free and hidden behind it.
"""

import dataclasses
import re
import time
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moerec.config import Config
from moerec.errors import WorkError
from moerec.nn.model import ModelSizes
from moerec.nn.sharding import batch_sharding, param_shardings, replicated
from moerec.tasks import make_tasks
from moerec.train.plan.chips import Topology
from moerec.train.plan.hlo import parse_module
from moerec.train.plan.hlo_costs import FLOPS, KINDS, MEMORY, UNBOUNDED, Costs, key, sum_costs
from moerec.train.plan.jaxpr_activations import count_activations
from moerec.train.plan.jaxpr_flops import Flops, count_flops
from moerec.train.step import lower_train_step, make_train_step, sum_losses

Report = dict[str, Any]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def plan_step(config: Config, sizes: ModelSizes, topology: Topology, mesh: Mesh) -> Report:
    """What a training step of the config needs and costs on the slice; JSON types, in bytes, operations and seconds.

    Where the step does not fit, `fits` is false, `reason` says why, and what only a compiled program tells is None.

    Args:
      mesh: `describe_mesh` of the two.

    Raises:
      WorkError: the compiler fails for another reason than memory.
    """
    started = time.perf_counter()
    lowered = lower_train_step(config, sizes, mesh)
    arguments = _abstract_arguments(lowered)
    lowered_at = time.perf_counter()
    compiled, reason = _compile(lowered)
    compiled_at = time.perf_counter()
    costs = sum_costs(parse_module(compiled.as_text() or ""), topology.n_chips) if compiled else None
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(make_train_step(config, make_tasks(config)))(*arguments)
    flops = _count_flops(config, arguments, mesh, count_flops(traced))
    rows = config.train.batch_size // config.train.n_microbatches
    kept = count_activations(traced, rows, config.data.seq_len) // (mesh.shape["data"] * mesh.shape["expert"])
    found: Report = {
        "topology": topology.name,
        "n_chips": topology.n_chips,
        "mesh": dict(mesh.shape),
        "tokens": config.train.batch_size * config.data.seq_len,
        "lower_s": lowered_at - started,
        "compile_s": compiled_at - lowered_at,
        "fits": compiled is not None,
        "reason": reason,
        "memory": {**_report_memory(arguments, mesh, topology, compiled, reason), "activations": kept},
        "flops": flops,
        **_report_costs(costs),
    }
    found |= _report_bounds(found, topology)
    return {**found, "exit_code": 0 if found["fits"] else 1}


def _abstract_arguments(lowered: jax.stages.Lowered) -> tuple[Any, ...]:
    """Shapes and types of the step's arguments: state, batch, catalogue and constants."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.args_info[0])


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str]:
    """The program; or None and the compiler's words where it needs more memory than there is."""
    try:
        with warnings.catch_warnings():  # a TPU's program in JAX's cache cannot be loaded here, and is compiled anew
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        told = str(error).strip().split("\n")[0]
        if "RESOURCE_EXHAUSTED" not in told:
            raise WorkError(f"the TPU compiler: {told}") from None
        return None, told.removeprefix("RESOURCE_EXHAUSTED: ")


def _count_flops(config: Config, arguments: tuple[Any, ...], mesh: Mesh, step: Flops) -> dict[str, float]:
    """Operations of a step on all chips together.

    `step`: all that is computed, what rematerialisation computes again included. `model`: what the model asks for, the
    smaller of two counts that can only be too high: three times the forward pass (each matmul has two gradients; some
    losses compute theirs in the forward pass already), and the step without rematerialisation and microbatches (some
    kernels compute again by themselves). `loops`: those of unknown length, of which one pass is counted.
    """
    tasks = make_tasks(config)
    model, train = dataclasses.replace(config.model, remat=False), dataclasses.replace(config.train, n_microbatches=1)
    plain = dataclasses.replace(config, model=model, train=train)

    def forward(state, batch, catalog, constants):
        key = jax.random.key(0)
        draws = {task.name: task.draw(key, batch, catalog, constants[task.name], config) for task in tasks}
        return sum_losses(state.params, batch, catalog, tasks, draws, config, state.router_bias_LE, key)

    def count(traced: Any) -> Flops:
        with jax.set_mesh(mesh):
            return count_flops(jax.make_jaxpr(traced)(*arguments))

    once = step if plain == config else count(make_train_step(plain, tasks))
    return {"step": step.total, "model": min(3 * count(forward).total, once.total), "loops": step.unbounded}


def _report_memory(
    arguments: tuple[Any, ...], mesh: Mesh, topology: Topology, compiled: jax.stages.Compiled | None, reason: str
) -> dict[str, Any]:
    """Bytes of a chip.

    `params`, `optimizer` and `other_arguments` are counted from the shapes of their shards; `padding` is what the
    compiler's layouts add to them, less arguments that the step does not read.
    """
    state, batch, *rest = arguments
    placed = param_shardings(state, mesh)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    found: dict[str, Any] = {
        "params": _sum_shards(state.params, placed.params),
        "optimizer": _sum_shards(state.opt_state, placed.opt_state),
    }
    everything = (
        _sum_shards(state, placed) + _sum_shards(batch, _all(batch, rows)) + _sum_shards(rest, _all(rest, whole))
    )
    found["other_arguments"] = everything - found["params"] - found["optimizer"]
    parts = ("padding", "temporaries", "unaliased_output", "program", "total")
    found |= dict.fromkeys(parts)
    usable = int(topology.chip.hbm_bytes)
    stats: Any = compiled.memory_analysis() if compiled else None
    if stats is not None:
        values = (
            stats.argument_size_in_bytes - everything,
            stats.temp_size_in_bytes,
            stats.output_size_in_bytes - stats.alias_size_in_bytes,
            stats.generated_code_size_in_bytes,
        )
        found |= dict(zip(parts, (*values, everything + sum(values)), strict=True))
    else:
        shortage = read_shortage(reason)
        if shortage is not None:
            found["total"], usable = shortage
            found["temporaries"] = max(found["total"] - everything, 0)
    largest = {part: value for part, value in found.items() if part != "total" and value}
    return {**found, "chip": usable, "binds": max(largest, key=lambda part: largest[part])}


def _all(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda _: sharding, tree)


def _sum_shards(tree: Any, shardings: Any) -> int:
    """Bytes of a tree's arrays on one chip."""
    pairs: Iterable[tuple[Any, Any]] = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(int(np.prod(s.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x, s in pairs)


def read_shortage(reason: str) -> tuple[int, int] | None:
    """Bytes of main memory that a program needs and may have, in the words of the compiler; None if these are others.

    It has two ways to say so, one for programs that are too large by themselves and one where they are scheduled.
    """
    patterns = (
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    )
    for pattern in patterns:
        if found := re.search(pattern, reason):
            return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])
    return None


def _report_costs(costs: Costs | None) -> Report:
    """Of a chip, from the compiled program."""
    if costs is None:
        return dict.fromkeys(("compiled_flops", "bytes_accessed", "collectives", "loops"))
    found = [kind for kind in KINDS if costs[key(kind, "count")]]
    return {
        "compiled_flops": costs[FLOPS],
        "bytes_accessed": costs[MEMORY],
        "collectives": {kind: {what: costs[key(kind, what)] for what in ("count", "bytes", "sent")} for kind in found},
        "loops": int(costs[UNBOUNDED]),
    }


def _report_bounds(found: Report, topology: Topology) -> Report:
    """Seconds that a step takes at the least, and the shares of the chips' peak that it can reach at most.

    Operations are those of the compiled program, which does on several chips what is not split over them.
    """
    chip, n_chips = topology.chip, topology.n_chips
    per_chip = found["flops"]["step"] / n_chips
    bounds = {"flops": max(per_chip, found["compiled_flops"] or 0) / chip.peak_flops}
    if found["fits"]:
        bounds["memory"] = found["bytes_accessed"] / chip.hbm_rate
        bounds["links"] = sum(kind["sent"] for kind in found["collectives"].values()) / chip.ici_rate
    bound_by = max(bounds, key=lambda name: bounds[name])
    step_s = bounds[bound_by]
    peak = step_s * n_chips * chip.peak_flops
    return {
        "bounds_s": bounds,
        "bound_by": bound_by,
        "step_s": step_s,
        "mfu": found["flops"]["model"] / peak if peak else 0.0,
        "tokens_per_s": found["tokens"] / step_s if step_s else 0.0,
    }
