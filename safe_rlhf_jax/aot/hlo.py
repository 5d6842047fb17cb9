"""Parses the text of an optimised HLO program: its instructions, their execution counts and phases."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
REFERENCE = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CONDITION = re.compile(r"condition=%([\w.\-]+)")
WORKSPACE = re.compile(r'custom_call_target="__cu(?:blas|dnn)\$')  # its last result is scratch memory
OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # in the fast memory of a core (memory space other than 0), not in HBM

    @property
    def bytes(self) -> int:
        """Size without the padding of tiles."""
        bits = BITS.get(self.dtype) or int("".join(re.findall(r"\d+", self.dtype)[:1]) or 8)
        return math.prod(self.shape) * bits // 8 if self.dtype not in ("token", "opaque") else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of what it returns, tuples flattened
    operands: tuple[str, ...]  # names in the same computation
    value: str  # of a constant; the number of a parameter
    attributes: str
    is_root: bool = False

    @property
    def bytes(self) -> int:
        """Size of the results."""
        return sum(array.bytes for array in self.results)

    @property
    def results(self) -> tuple[Array, ...]:
        """Its results alone: no operands and no state of what it starts, no workspace of a library's kernel."""
        if self.opcode == "copy-start":
            return self.arrays[:1]
        if self.opcode.endswith("-start") and self.opcode != "all-reduce-start":
            return self.arrays[len(self.operands) : 2 * len(self.operands)]
        return self.arrays[:-1] if WORKSPACE.search(self.attributes) else self.arrays

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs, without the condition of a loop."""
        return tuple(name for match in CALLED.finditer(self.attributes) for name in REFERENCE.findall(match[1]))

    @property
    def op_name(self) -> str:
        """Path of the operation in the traced function."""
        match = OP_NAME.search(self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction with its context in the program."""

    instruction: Instruction
    computation: str
    times: int  # executions in one run of the program
    phase: str  # the innermost requested scope that it was traced in, "" outside of them


class Module:
    """An optimised program.

    Args:
        text: Result of `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.text = text
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                current = self.computations[name] = []
                if line.startswith("ENTRY"):
                    self.entry = name
            elif line.startswith(" ") and " = " in line:
                current.append(parse_instruction(line))

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """Instructions of each computation by name."""
        return {name: {i.name: i for i in lines} for name, lines in self.computations.items()}

    def trips(self, loop: Instruction) -> int:
        """Trip count of a loop: as stated by XLA, else the bound in its condition, which an early exit may not reach.

        Raises:
            ValueError: If the condition has no constant bound.
        """
        known = TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition = CONDITION.search(loop.attributes)
        names = [condition[1]] if condition else []
        names += [name for i in self.computations[names[0]] for name in i.called] if names else []
        bounds = [int(i.value) for name in names for i in self.computations[name] if i.value.isdigit()]
        if not bounds:
            raise ValueError(f"loop {loop.name} ({loop.op_name}) has no bound that could be read")
        return max(bounds)

    def walk(self, scopes: tuple[str, ...] = (), *, counts: bool = True) -> Iterator[Executed]:
        """Yields every executed instruction, except those inside of fusions.

        Args:
            scopes: Names of `jax.named_scope`s: the phases.
            counts: False where nobody needs the executions, which need the bound of every loop.
        """
        pending = [(self.entry, 1, "")]
        while pending:
            computation, times, outer = pending.pop()
            for instruction in self.computations[computation]:
                parts = instruction.op_name.split("/")
                phase = next((part for part in reversed(parts) if part in scopes), outer)
                yield Executed(instruction, computation, times, phase)
                rounds = self.trips(instruction) if counts and instruction.opcode == "while" else 1
                if instruction.opcode in ("while", "conditional", "call", "async-start"):
                    pending.extend((name, times * rounds, phase) for name in instruction.called)


def parse_instruction(line: str) -> Instruction:
    """Returns the instruction on a line `[ROOT] %name = type opcode(operands), attributes`."""
    name, _, rest = line.strip().partition(" = ")
    end = balanced(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    opcode, rest = rest[:start], rest[start:]
    end = balanced(rest)
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), bool(re.search(r"S\([1-9]", layout or "")))
        for dtype, shape, layout in ARRAY.findall(kind)
    )
    operands = tuple(REFERENCE.findall(rest[:end]))
    value = rest[1 : end - 1] if opcode in ("constant", "parameter") else ""
    label = name.removeprefix("ROOT ").lstrip("%")
    return Instruction(label, opcode, arrays, operands, value, rest[end:], name.startswith("ROOT"))


def balanced(text: str) -> int:
    """Returns the end of the text's opening parenthesis."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses: {text[:80]}")
