"""The text of a compiled XLA program as data: its computations and their instructions."""

import re
from typing import NamedTuple

_BYTES = {"pred": 1.0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "token": 0.0, "opaque": 0.0, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Array(NamedTuple):
    """`space`: 0 is a chip's main memory, others are memories beside it (1 is a TPU's VMEM)."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def n_bytes(self) -> float:
        """Without what tiles of a layout are padded with."""
        if self.dtype in _BYTES:
            return self.size * _BYTES[self.dtype]
        bits = re.match(r"[a-z]+(\d+)", self.dtype)  # f32, bf16, s8, f8e4m3fn
        return self.size * int(bits[1]) / 8 if bits else 0.0


class Instruction(NamedTuple):
    """Attributes:
    arrays: what it results in, the leaves of a tuple in order. operands: names, in order.
    content: what stands between its parentheses. attributes: what follows them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    content: str
    attributes: str

    def find(self, key: str) -> str | None:
        """The value of an attribute that is one word, `{…}` or `[…]`."""
        found = re.search(rf"(?<![\w.]){key}=(\{{[^{{}}]*(?:\{{[^{{}}]*\}}[^{{}}]*)*\}}|[^\s,{{]+)", self.attributes)
        return found[1] if found else None

    def called(self, key: str) -> list[str]:
        """Names of the computations that an attribute lists."""
        value = self.find(key) or ""
        return [name.strip().lstrip("%") for name in value.strip("{}").split(",") if name.strip()]


class Computation(NamedTuple):
    """Attributes: instructions, by name in order; the name of the one that is its result."""

    instructions: dict[str, Instruction]
    root: str

    def arrays_of(self, names: tuple[str, ...]) -> list[Array]:
        return [array for name in names if name in self.instructions for array in self.instructions[name].arrays]


class Module(NamedTuple):
    """Attributes: computations, by name; the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str


def parse_module(text: str) -> Module:
    """The text of `jax.stages.Compiled.as_text()`. Lines that are no instructions are passed over."""
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith("}"):
            computations[name] = Computation(instructions, root or next(reversed(instructions), ""))
        elif line[:1].strip():
            if header := _COMPUTATION.match(line):
                name, root, instructions = header[2], "", {}
                entry = name if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _parse_instruction(found[2], re.sub(r"/\*.*?\*/", "", found[3]))
            instructions[instruction.name] = instruction
            root = instruction.name if found[1] else root
    return Module(computations, entry or next(reversed(computations), ""))


def _parse_instruction(name: str, rest: str) -> Instruction:
    end = _find_end(rest) if rest.startswith("(") else rest.find(" ")
    kind, call = rest[:end], rest[end:].lstrip()
    opcode, _, _ = call.partition("(")
    close = _find_end(call[len(opcode) :]) + len(opcode)
    content = call[len(opcode) + 1 : close - 1]
    arrays = tuple(_parse_array(*found.groups()) for found in _ARRAY.finditer(kind))
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", content))
    return Instruction(name, opcode, arrays, operands, content, call[close:])


def _find_end(text: str) -> int:
    """The place behind the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0:
            return place + 1
    return len(text)


def _parse_array(dtype: str, shape: str, layout: str | None) -> Array:
    sizes = tuple(int(size.strip("<= ")) for size in shape.split(",") if size.strip("<= "))
    space = re.search(r"S\((\d+)\)", layout or "")
    return Array(dtype, sizes, int(space[1]) if space else 0)
