"""A plan as a table to read."""

from typing import Any

from moerec.train.plan.chips import GIB

_MEMORY = {
    "params": "parameters",
    "optimizer": "optimiser state",
    "other_arguments": "other arguments",
    "padding": "padding of arguments",
    "temporaries": "temporaries",
    "activations": "  activations kept, among them",
    "unaliased_output": "output that is not aliased",
    "program": "program",
    "total": "together",
}
_BOUNDS = {"flops": "operations", "memory": "memory", "links": "links"}


def format_plan(found: dict[str, Any]) -> str:
    """Lines of a report of `plan_step`: bytes in GiB and of one chip, unless a line says otherwise."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    lines = [
        f"{found['topology']}: {found['n_chips']} chips, {mesh}; {found['tokens']:,} slots a step",
        f"lowered in {found['lower_s']:.1f} s, compiled in {found['compile_s']:.1f} s",
        "",
        "memory of a chip, GiB",
        *(_line(_MEMORY[part], _gib(found["memory"][part])) for part in _MEMORY),
        *_list_work(found),
        "",
        "a step at the least, ms",
        *(_line(_BOUNDS[part], f"{1e3 * seconds:.2f}") for part, seconds in found["bounds_s"].items()),
        _line("model FLOPs utilisation at most, %", f"{100 * found['mfu']:.1f}"),
        _line("slots per second at most", f"{found['tokens_per_s']:,.0f}"),
        "",
        _conclude(found),
    ]
    return "\n".join(lines)


def _list_work(found: dict[str, Any]) -> list[str]:
    flops, n_chips = found["flops"], found["n_chips"]
    lines = [
        "",
        "operations, TFLOP",
        _line("model, all chips", f"{flops['model'] / 1e12:,.2f}"),
        _line("step, all chips", f"{flops['step'] / 1e12:,.2f}"),
        _line("step, a chip's even share", f"{flops['step'] / n_chips / 1e12:,.4f}"),
    ]
    if not found["fits"]:
        return lines
    lines += [
        _line("step, a chip as compiled", f"{found['compiled_flops'] / 1e12:,.4f}"),
        "",
        "traffic of a chip, GiB",
        _line("main memory", _gib(found["bytes_accessed"])),
    ]
    for kind, traffic in found["collectives"].items():
        lines.append(
            _line(kind, _gib(traffic["bytes"])) + f"  {traffic['count']:,.0f} times, sends {_gib(traffic['sent'])}"
        )
    if found["loops"] or flops["loops"]:
        lines.append(f"of {max(found['loops'], flops['loops'])} loops of unknown length one pass is counted")
    return lines


def _conclude(found: dict[str, Any]) -> str:
    memory = found["memory"]
    if not found["fits"] and memory["total"] is None:
        return f"does not fit: {found['reason']}"
    verdict = "fits" if found["fits"] else "does not fit"
    most = f"most of it {_MEMORY[memory['binds']]}"
    told = f"{verdict}: needs {_gib(memory['total'])} GiB of {_gib(memory['chip'])} GiB, {most}"
    return f"{told}; bound by {_BOUNDS[found['bound_by']]}" if found["fits"] else told


def _gib(n_bytes: float | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / GIB:.2f}"


def _line(name: str, value: str) -> str:
    return f"  {name:<36}{value:>14}"
