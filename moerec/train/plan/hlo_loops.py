"""How often the loops of a compiled program run.

The compiler says so of some (`known_trip_count`). Of the others it is read from the program: a condition that compares
a counter with a limit, the counter's first value, and what each pass adds to it.
"""

import re
from typing import NamedTuple, Optional

from moerec.train.plan.hlo import Computation, Instruction, Module

_UNCHANGED = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier")
_MOST_HOPS = 256


class _Frame(NamedTuple):
    """A computation, and the fusion that it is the inside of, with the frame that this stands in."""

    computation: Computation
    fusion: Instruction | None = None
    outer: Optional["_Frame"] = None


class _Place(NamedTuple):
    frame: _Frame
    instruction: Instruction

    @property
    def constant(self) -> int | None:
        is_number = self.instruction.opcode == "constant" and re.fullmatch(r"-?\d+", self.instruction.content)
        return int(self.instruction.content) if is_number else None

    @property
    def carried(self) -> int | None:
        """Which element of the loop's tuple this is, unchanged since the pass began."""
        if self.instruction.opcode != "get-tuple-element":
            return None
        source = self.frame.computation.instructions[self.instruction.operands[0]]
        return int(self.instruction.find("index") or 0) if source.opcode == "parameter" else None


def count_trips(loop: Instruction, caller: Computation, module: Module) -> int | None:
    """Passes of a `while` that stands in `caller`; None where they depend on what the program computes."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (_Frame(module.computations[loop.called(part)[0]]) for part in ("condition", "body"))
    outside = _Frame(caller)
    start = _find(outside, loop.operands[0], module).instruction
    compare = _find(condition, condition.computation.root, module)
    if start.opcode != "tuple" or compare.instruction.opcode != "compare":
        return None
    counter, limit = (_find(compare.frame, name, module) for name in compare.instruction.operands)
    index = counter.carried
    if index is None:
        return None
    last = limit.constant
    if limit.carried is not None and _next(body, limit.carried, module).carried == limit.carried:
        last = _find(outside, start.operands[limit.carried], module).constant
    first = _find(outside, start.operands[index], module).constant
    step = _find_step(body, index, module)
    if first is None or last is None or not step:
        return None
    return _divide(first, last, step, compare.instruction.find("direction") or "")


def _divide(first: int, last: int, step: int, direction: str) -> int | None:
    if direction == "NE" and (last - first) % step == 0:
        return max((last - first) // step, 0)
    if direction not in (("LT", "LE") if step > 0 else ("GT", "GE")):
        return None
    end = last + {"LE": 1, "GE": -1}.get(direction, 0)
    return max(-((first - end) // step), 0)


def _next(body: _Frame, index: int, module: Module) -> _Place:
    """Where the next pass has an element of the loop's tuple from."""
    root = _find(body, body.computation.root, module)
    is_tuple = root.instruction.opcode == "tuple"
    return _find(root.frame, root.instruction.operands[index], module) if is_tuple else root


def _find_step(body: _Frame, index: int, module: Module) -> int | None:
    """What a pass adds to the counter."""
    frame, instruction = _next(body, index, module)
    if instruction.opcode not in ("add", "subtract"):
        return None
    left, right = (_find(frame, name, module) for name in instruction.operands)
    if instruction.opcode == "subtract":
        return -right.constant if left.carried == index and right.constant is not None else None
    for counter, step in ((left, right), (right, left)):
        if counter.carried == index and step.constant is not None:
            return step.constant
    return None


def _find(frame: _Frame, name: str, module: Module) -> _Place:
    """What makes a value: behind copies, through tuples, into fusions and out of them."""
    for _ in range(_MOST_HOPS):
        instruction = frame.computation.instructions[name]
        if instruction.opcode in _UNCHANGED:
            name = instruction.operands[0]
        elif instruction.opcode == "fusion":
            frame = _Frame(module.computations[instruction.called("calls")[0]], instruction, frame)
            name = frame.computation.root
        elif instruction.opcode == "parameter" and frame.fusion is not None and frame.outer is not None:
            name, frame = frame.fusion.operands[int(instruction.content)], frame.outer
        elif instruction.opcode == "get-tuple-element":
            source = _find(frame, instruction.operands[0], module)
            if source.instruction.opcode != "tuple":
                break
            frame, name = source.frame, source.instruction.operands[int(instruction.find("index") or 0)]
        else:
            break
    return _Place(frame, instruction)
