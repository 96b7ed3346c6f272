"""What a compiled program does on one chip: traffic between chips, traffic with its memory, matmuls. Loops count whole.

Of a `conditional` each figure is that of the branch in which it is highest. Where nobody knows how often a loop runs
(`UNBOUNDED`), one pass counts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from moerec.train.plan.hlo import Array, Computation, Instruction, Module
from moerec.train.plan.hlo_loops import count_trips
from moerec.train.plan.hlo_memory import count_memory_bytes

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FLOPS, MEMORY, UNBOUNDED = "flops", "memory", "unbounded"
Costs = defaultdict[str, float]  # FLOPS; MEMORY in bytes; UNBOUNDED loops; `key(kind, …)` of each collective


def key(kind: str, what: str) -> str:
    """The key of `what` of a collective: `count` of runs, `bytes`, or `sent`.

    `bytes`: of an all-gather the result, else what goes in. `sent`: what a chip has to send at the least, by whatever
    algorithm: with n chips in a group (n - 1) / n of that, and twice as much for an all-reduce.
    """
    return f"{kind} {what}"


def sum_costs(module: Module, n_chips: int) -> Costs:
    """One run of the program on one of `n_chips`; what there is none of has no key."""
    return _Program(module, n_chips).total(module.entry)


class _Program:
    def __init__(self, module: Module, n_chips: int):
        self.module, self.n_chips = module, n_chips
        self.known: dict[str, Costs] = {}

    def total(self, name: str) -> Costs:
        """One run of a computation."""
        if name not in self.known:
            computation, found = self.module.computations[name], Costs(float)
            for instruction in computation.instructions.values():
                _add(found, self.cost(instruction, computation))
            self.known[name] = found
        return self.known[name]

    def cost(self, instruction: Instruction, computation: Computation) -> Costs:
        """One run of an instruction with all that it calls."""
        opcode, found = instruction.opcode, Costs(float)
        if opcode == "while":
            trips = count_trips(instruction, computation, self.module)
            _add(found, self.total(instruction.called("body")[0]), 1 if trips is None else trips)
            found[UNBOUNDED] += trips is None
        elif opcode == "conditional":
            names = ("branch_computations", "true_computation", "false_computation")
            for branch in [name for part in names for name in instruction.called(part)]:
                for what, value in self.total(branch).items():
                    found[what] = max(found[what], value)
        elif opcode in ("call", "call-start", "async-start"):
            _add(found, self.total((instruction.called("to_apply") or instruction.called("calls"))[0]))
        else:
            found[MEMORY] += count_memory_bytes(instruction, computation, self.module)
            found[FLOPS] += _count_flops(instruction, computation, self.module)
            for kind, collective, place in _find_collectives(instruction, computation, self.module):
                _add(found, _cost_of_collective(kind, collective, place, self.n_chips))
        return found


def _add(total: Costs, more: Mapping[str, float], times: int = 1) -> None:
    for what, value in more.items():
        total[what] += times * value


def _find_collectives(
    instruction: Instruction, computation: Computation, module: Module
) -> Iterator[tuple[str, Instruction, Computation]]:
    """The collectives that an instruction begins: kind, the collective, and what it stands in.

    On TPUs a collective may run inside of several fusions, beside their own work. All of them hold it, in one chain;
    only that in which the chain starts counts. An all-reduce of which each chip keeps a part is a fusion of its own
    (`all-reduce-scatter`), and runs as a reduce-scatter.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        yield kind, instruction, computation
    elif instruction.opcode == "fusion":
        called = instruction.called("calls")[0]
        inner = module.computations[called]
        started = {
            operand
            for found in inner.instructions.values()
            if found.find("custom_call_target") == '"AsyncCollectiveStart"'
            for operand in found.operands
        }
        for found in inner.instructions.values():
            is_chain = "chain_id=" in found.attributes
            for kind, collective, place in _find_collectives(found, inner, module):
                if collective.name in started or not is_chain:
                    is_scattered = called.startswith("all-reduce-scatter") and kind == "all-reduce"
                    yield "reduce-scatter" if is_scattered else kind, collective, place


def _cost_of_collective(kind: str, collective: Instruction, place: Computation, n_chips: int) -> dict[str, float]:
    taken = collective.operands[:1] if kind == "ragged-all-to-all" else collective.operands
    n = _group_size(collective, n_chips)
    n_bytes = sum(array.n_bytes for array in place.arrays_of(taken)) * (n if kind == "all-gather" else 1)
    share = 1.0 if kind in ("collective-permute", "collective-broadcast") else (n - 1) / n
    sent = share * n_bytes * (2 if kind == "all-reduce" else 1)
    return {key(kind, "count"): 1.0, key(kind, "bytes"): n_bytes, key(kind, "sent"): sent}


def _group_size(collective: Instruction, n_chips: int) -> int:
    """Chips of a group, in each of the ways in which XLA writes them down."""
    text = collective.attributes
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return n_chips


def _count_flops(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Matmuls and convolutions of an instruction and of what it fuses; what a kernel declares."""
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        return sum(_count_flops(found, inner, module) for found in inner.instructions.values())
    if instruction.opcode == "custom-call":
        declared = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        return float(declared[1]) if declared else 0.0
    if instruction.opcode == "dot":
        left = computation.instructions[instruction.operands[0]].arrays[0]
        axes = [int(axis) for axis in instruction.called("lhs_contracting_dims")]
        return 2.0 * instruction.arrays[0].size * math.prod(left.shape[axis] for axis in axes)
    if instruction.opcode == "convolution":
        sides = [computation.instructions[operand].arrays[0] for operand in instruction.operands]
        return _count_convolution(instruction, *sides)
    return 0.0


def _count_convolution(instruction: Instruction, image: Array, kernel: Array) -> float:
    """Products of inputs that are there, not of padding or gaps: TPUs do matmuls with batches as such."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.find("dim_labels") or "")
    assert labels is not None, instruction.name
    found = instruction.arrays[0]
    window = dict(re.findall(r"(\w+)=(\S+)", (instruction.find("window") or "{}").strip("{}")))
    places = 1.0
    for axis in sorted(set(labels[1]) - set("bf")):
        d = int(axis)
        n_in, n_out = image.shape[labels[1].index(axis)], found.shape[labels[3].index(axis)]
        size, stride = _read_window(window, "size", d), _read_window(window, "stride", d)
        spread, gap = _read_window(window, "lhs_dilate", d), _read_window(window, "rhs_dilate", d)
        low = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
        place = np.arange(n_out)[:, None] * stride + np.arange(size) * gap - low
        places *= np.count_nonzero((place >= 0) & (place % spread == 0) & (place // spread < n_in))
    features = kernel.shape[labels[2].index("i")] * found.shape[labels[3].index("f")]
    n_rows = image.shape[labels[1].index("b")] / int(instruction.find("batch_group_count") or 1)
    return 2.0 * places * features * n_rows


def _read_window(window: dict[str, str], part: str, axis: int) -> int:
    return int(window[part].split("x")[axis]) if part in window else 1
