"""Bytes that an instruction of a compiled program moves to and from a chip's main memory.

As XLA's own analysis has it: operands are read and results are written, once; of what is only sliced the slice is
read, and what is updated in place is written where it changes. What lies in a memory beside (a TPU's VMEM) is not
counted: copies into it and out of it are instructions of their own.
"""

import itertools
import re
from collections.abc import Iterable, Sequence

from moerec.train.plan.hlo import Array, Computation, Instruction, Module

_NOTHING_MOVES = set(
    """parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier domain
    copy-done slice-done async-update async-done all-gather-done all-reduce-done reduce-scatter-done
    collective-permute-done all-to-all-done send-done recv-done""".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_RENAMED = ("bitcast", "reshape")


def count_memory_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes read and written; of a fusion, those of its operands and results."""
    opcode, results = instruction.opcode, instruction.arrays
    if opcode in _NOTHING_MOVES or "AllocateBuffer" in instruction.attributes:
        return 0.0
    operands = [computation.arrays_of((name,)) for name in instruction.operands]
    if opcode == "fusion":
        return _count_fusion(instruction, operands, module)
    if opcode == "custom-call" and (declared := re.search(r'"bytes_accessed":"(\d+)"', instruction.attributes)):
        return float(declared[1])
    if opcode == "slice-start":  # ((operand), result, flag)
        return _sum_bytes(results[1:]) + _sum_part(results[:1], results[1:2])
    if opcode.endswith("-start"):  # operands are among the results
        return _sum_bytes(results)
    if opcode in _SLICES:
        rest = _sum_bytes(itertools.chain(*operands[1:]))
        return _sum_part(operands[0], results) + rest + _sum_bytes(results)
    if opcode in _IN_PLACE:  # the new part is read, and written
        part = _new_part(instruction, computation)
        return _sum_bytes(itertools.chain(*operands[1:])) + _sum_part(results, part)
    return _sum_bytes(itertools.chain(*operands)) + _sum_bytes(results)


def _sum_bytes(arrays: Iterable[Array]) -> float:
    return sum(array.n_bytes for array in arrays if array.space == 0)


def _sum_part(whole: Sequence[Array], part: Sequence[Array]) -> float:
    """Bytes of a part of an array that lies in main memory."""
    return sum(array.n_bytes for array in part) if whole and whole[0].space == 0 else 0.0


def _new_part(instruction: Instruction, computation: Computation) -> list[Array]:
    return computation.arrays_of(instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else -1 :][:1])


def _count_fusion(fusion: Instruction, operands: list[list[Array]], module: Module) -> float:
    inner = module.computations[fusion.called("calls")[0]]
    total = 0.0
    for instruction in inner.instructions.values():
        if instruction.opcode == "parameter" and any(x.space == 0 for x in operands[int(instruction.content)]):
            total += _count_read(instruction.name, inner, module)
    root = inner.instructions[inner.root]
    parts = root.operands if root.opcode == "tuple" else (root.name,)
    if len(parts) != len(fusion.arrays):
        return total + _sum_bytes(fusion.arrays)
    for name, array in zip(parts, fusion.arrays, strict=True):
        total += min(_count_written(name, inner, module), array.n_bytes) if array.space == 0 else 0.0
    return total


def _count_read(name: str, inner: Computation, module: Module) -> float:
    """How much of an array is read within a fusion."""
    whole = sum(array.n_bytes for array in inner.instructions[name].arrays)
    total = 0.0
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        is_first = user.operands[0] == name and name not in user.operands[1:]
        if user.opcode in _SLICES and is_first:
            total += sum(array.n_bytes for array in user.arrays)
        elif user.opcode in _RENAMED:
            total += _count_read(user.name, inner, module)
        elif user.opcode == "fusion":
            within = module.computations[user.called("calls")[0]]
            for found in within.instructions.values():
                if found.opcode == "parameter" and user.operands[int(found.content)] == name:
                    total += _count_read(found.name, within, module)
        elif not (user.opcode in _IN_PLACE and is_first):
            return whole
    return min(total, whole)


def _count_written(name: str, inner: Computation, module: Module) -> float:
    """How much of a result of a fusion is new: of a parameter that is updated in place, what is put there."""
    instruction = inner.instructions[name]
    if instruction.opcode in _RENAMED:
        return _count_written(instruction.operands[0], inner, module)
    if instruction.opcode == "fusion" and len(instruction.arrays) == 1:
        within = module.computations[instruction.called("calls")[0]]
        return _count_written(within.root, within, module)
    if instruction.opcode in _IN_PLACE and _is_parameter(instruction.operands[0], inner):
        return sum(array.n_bytes for array in _new_part(instruction, inner))
    return sum(array.n_bytes for array in instruction.arrays)


def _is_parameter(name: str, inner: Computation) -> bool:
    instruction = inner.instructions[name]
    if instruction.opcode in _RENAMED:
        return _is_parameter(instruction.operands[0], inner)
    return instruction.opcode == "parameter"
