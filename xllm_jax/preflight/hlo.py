"""The text of a compiled program: computations, instructions, and how often each one runs.

XLA's own cost analysis counts the body of a loop once. Here a loop's body counts as often as its
condition lets it run: every loop of a training step counts from 0 to a constant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from xllm_jax.core.text_lines import split_lines

ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip

ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `fast` says that it lies outside of main memory."""

    kind: str
    shape: tuple[int, ...]
    fast: bool = False

    @property
    def size(self) -> int:
        """Bytes without padding."""
        return math.ceil(math.prod(self.shape) * ITEM_BITS.get(self.kind, 0) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: result, operation, operands by name, and the attributes as text."""

    name: str
    arrays: tuple[Array, ...]
    operation: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    @property
    def size(self) -> int:
        """Bytes of the whole result."""
        return sum(array.size for array in self.arrays)

    def attribute(self, name: str) -> str:
        """Value of `name=value`, or ''."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""

    @property
    def number(self) -> int:
        """Which argument a parameter is."""
        return int(self.attributes.split(")")[0])

    @functools.cached_property
    def source(self) -> str:
        """Where in the model it comes from (the name that JAX gave it), or ''."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each {instruction name: Instruction} in order, and which one starts."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int:
        """How often a `while` runs: the bound of its condition over the counter's step."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations.get(loop.attribute("condition"), {})
        bound = max(filter(None, map(_integer, condition.values())), default=1)
        indices = [line.attribute("index") for line in condition.values()]
        counter = next((int(index) for index in indices if index), None)
        return max(bound // self._step(loop.attribute("body"), counter), 1)

    def _step(self, name: str, counter: int | None) -> int:
        """What a loop's body adds to its counter; 1 where that cannot be read."""
        body = self.computations.get(name, {})
        root = next((line for line in body.values() if line.root), None)
        if root is None or counter is None or counter >= len(root.operands):
            return 1
        line = body.get(root.operands[counter])
        inside = {**body, **(self.fused(line) if line else {})}
        if line is not None and line.operation == "fusion":
            line = next((one for one in self.fused(line).values() if one.root), line)
        steps = [_integer(inside[name]) for name in line.operands if name in inside] if line else []
        return next(filter(None, steps), 1)

    def executed(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, times) of all that runs; a fusion is one instruction."""
        yield from self._run(self.entry, 1)

    def _run(self, name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for line in self.computations.get(name, {}).values():
            yield name, line, times
            if line.operation == "while":
                yield from self._run(line.attribute("body"), times * self.trips(line))
            elif line.operation == "call":
                yield from self._run(line.attribute("to_apply"), times)
            elif line.operation == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", _branches(line.attributes)):
                    yield from self._run(branch, times)

    def fused(self, line: Instruction) -> dict[str, Instruction]:
        """Instructions inside a fusion or an asynchronous call, or nothing."""
        return self.computations.get(line.attribute("calls"), {})


def _integer(line: Instruction) -> int | None:
    """Value of an integer constant, else None."""
    found = re.match(r"(\d+)\)", line.attributes) if line.operation == "constant" else None
    return int(found.group(1)) if found else None


def _branches(attributes: str) -> str:
    found = re.search(r"branch_computations=\{([^}]*)\}|true_computation=[^)]*", attributes)
    return found.group(0) if found else ""


def parse(text: str) -> Program:
    """Reads the text of `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in split_lines(text):
        header = HEADER.match(line)
        if header and not line.startswith(" "):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
            continue
        found = INSTRUCTION.match(line)
        if found:
            made = _instruction(found.group(2), found.group(3), bool(found.group(1)))
            current[made.name] = made
    return Program(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    operation, _, arguments = rest[end:].strip().partition("(")
    close = _closing("(" + arguments) - 1
    inside, behind = arguments[:close], arguments[close:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    attributes = arguments if operation in ("constant", "parameter") else behind
    return Instruction(name, _arrays(rest[:end]), operation, operands, attributes, root)


def _closing(text: str) -> int:
    """Place of the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and letter == ")":
            return place
    return len(text) - 1


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(kind, tuple(int(n) for n in sizes.split(",") if n), "S(" in (layout or ""))
        for kind, sizes, layout in ARRAY.findall(text)
    )
