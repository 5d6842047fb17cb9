"""Bytes that a compiled program moves to and from HBM, counted from its instructions and their executions."""

import math
from collections import defaultdict

from safe_rlhf_jax.aot.hlo import Array, Executed, Instruction, Module

# They name memory, or run other instructions that are counted separately.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "copy-done", "slice-done", "async-start", "async-update", "async-done",
    "opt-barrier",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}  # read as many bytes as they return
THROUGH = {
    "bitcast",
    "reshape",
    "copy",
    "convert",
    "transpose",
    "broadcast",
}  # without a size of their own inside a fusion


def hbm_bytes(module: Module, scopes: tuple[str, ...] = ()) -> dict[str, float]:
    """Returns {phase: bytes read from and written to HBM by one device in one run}.

    Every instruction reads its operands and writes its result; values inside of a fusion, or in the fast memory of the
    core, cost nothing. An array that is only sliced counts with the slice; one that is updated in place, with the
    update.
    """
    total: dict[str, float] = defaultdict(float)
    for executed in module.walk(scopes):
        total[executed.phase] += executed.times * instruction_bytes(module, executed)
    return dict(total)


def instruction_bytes(module: Module, executed: Executed) -> float:
    """Returns the bytes that one execution of an instruction moves."""
    instruction = executed.instruction
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0
    here = module.by_name[executed.computation]
    if instruction.opcode == "dynamic-update-slice":
        return 2 * in_hbm(here[instruction.operands[1]].arrays)
    if instruction.opcode in SLICES:
        read = instruction.bytes if in_hbm(here[instruction.operands[0]].arrays) else 0
        return in_hbm(instruction.results) + read
    if instruction.opcode == "fusion":
        return fusion_bytes(module, instruction, here)
    operands = [here[name] for name in instruction.operands if name in here]
    return in_hbm(instruction.results) + sum(in_hbm(operand.arrays) for operand in operands)


def in_hbm(arrays: tuple[Array, ...]) -> int:
    """Returns the bytes of the arrays in HBM."""
    return sum(array.bytes for array in arrays if not array.on_chip)


def fusion_bytes(module: Module, fusion: Instruction, here: dict[str, Instruction]) -> float:
    """Returns the bytes that a fusion reads and writes."""
    inner = module.by_name[fusion.called[0]]
    parameters = [i for i in inner.values() if i.opcode == "parameter"]
    updates = {source(inner, i.operands[0]): i for i in inner.values() if i.opcode == "dynamic-update-slice"}
    moved = 0.0
    for parameter in parameters:
        operand = here[fusion.operands[int(parameter.value)]]
        if parameter.name in updates:  # in place: only the updated part is read and written
            moved += 2 * in_size(inner, updates[parameter.name], operand)
            continue
        moved += min(read_bytes(module, inner, parameter.name), in_hbm(operand.arrays))
    updated = sum(1 for parameter in parameters if parameter.name in updates)
    results = sorted(fusion.arrays, key=lambda array: -array.bytes)[updated:]
    return moved + in_hbm(tuple(results))


def in_size(inner: dict[str, Instruction], update: Instruction, operand: Instruction) -> int:
    """Returns the bytes written into an operand, 0 if it is in the fast memory."""
    return inner[update.operands[1]].bytes if in_hbm(operand.arrays) else 0


def source(inner: dict[str, Instruction], name: str) -> str:
    """Returns the parameter behind a chain of instructions that only rename it."""
    while inner[name].opcode in THROUGH:
        name = inner[name].operands[0]
    return name


def read_bytes(module: Module, inner: dict[str, Instruction], name: str) -> float:
    """Returns the bytes that a fused computation reads of a value; infinite if it reads all of it."""
    readers = uses(inner, name)
    total = 0.0 if readers else math.inf
    for reader, position in readers:
        if reader.opcode in SLICES:
            total += reader.bytes
        elif reader.opcode == "fusion":  # a fusion inside of the fusion
            nested = module.by_name[reader.called[0]]
            parameter = next(i for i in nested.values() if i.opcode == "parameter" and int(i.value) == position)
            root = next(i for i in nested.values() if i.is_root)
            if source(nested, root.name) == parameter.name:  # it only changes the layout, for its own readers
                total += read_bytes(module, inner, reader.name)
            else:
                total += read_bytes(module, nested, parameter.name)
        else:
            return math.inf
    return total


def uses(inner: dict[str, Instruction], name: str) -> list[tuple[Instruction, int]]:
    """Returns the instructions that read a value, through those that only rename it, and the operand index."""
    readers = []
    for instruction in inner.values():
        if name in instruction.operands:
            if instruction.opcode == "bitcast":
                readers += uses(inner, instruction.name)
            else:
                readers += [(instruction, i) for i, operand in enumerate(instruction.operands) if operand == name]
    return readers
