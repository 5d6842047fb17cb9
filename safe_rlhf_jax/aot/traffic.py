"""Bytes that a compiled program moves to and from HBM, counted from its instructions and their executions."""

import math
import re
from collections import defaultdict

from safe_rlhf_jax.aot.collectives import KINDS
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
NAMES = re.compile(r'custom_call_target="(?:AllocateBuffer|ConcatBitcast)"')  # of TPUs: they only name memory
STARTS, ENDS = 'custom_call_target="AsyncCollectiveStart"', 'custom_call_target="AsyncCollectiveDone"'
CARRIED = {"parameter", *KINDS}  # what a fusion beside a collective hands on
ALIASED = re.compile(r"\{(\d*)\}: \(\d+, \{\}\)")  # a result of a fusion that has the memory of an operand


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


def core_bytes(module: Module, scopes: tuple[str, ...] = ()) -> dict[str, float]:
    """Returns {phase: bytes that its instructions write into the fast memory of the core} in place of HBM."""
    total: dict[str, float] = defaultdict(float)
    for executed in module.walk(scopes):
        instruction = executed.instruction
        if not is_free(instruction):
            total[executed.phase] += executed.times * (instruction.bytes - in_hbm(instruction.results))
    return dict(total)


def instruction_bytes(module: Module, executed: Executed) -> float:
    """Returns the bytes that one execution of an instruction moves."""
    instruction = executed.instruction
    if is_free(instruction):
        return 0
    here = module.by_name[executed.computation]
    if instruction.opcode == "dynamic-update-slice":
        update = here[instruction.operands[1]]
        return in_hbm(update.arrays) + (update.bytes if in_hbm(instruction.arrays) else 0)
    if instruction.opcode in SLICES:
        read = instruction.bytes if in_hbm(here[instruction.operands[0]].arrays) else 0
        return in_hbm(instruction.results) + read
    if instruction.opcode == "fusion":
        return fusion_bytes(module, instruction, here)
    operands = [here[name] for name in instruction.operands if name in here]
    return in_hbm(instruction.results) + sum(in_hbm(operand.arrays) for operand in operands)


def is_free(instruction: Instruction) -> bool:
    """Says whether an instruction moves nothing itself."""
    free = instruction.opcode in FREE or instruction.opcode.endswith("-done")
    return free or NAMES.search(instruction.attributes) is not None


def in_hbm(arrays: tuple[Array, ...]) -> int:
    """Returns the bytes of the arrays in HBM."""
    return sum(array.bytes for array in arrays if not array.on_chip)


def fusion_bytes(module: Module, fusion: Instruction, here: dict[str, Instruction]) -> float:
    """Returns the bytes that a fusion reads and writes."""
    inner = module.by_name[fusion.called[0]]
    root = next(i for i in inner.values() if i.is_root)
    if ENDS in root.attributes:
        return 0
    carried = carried_results(fusion, inner, root)
    handed_on = aliased(fusion) if STARTS in root.attributes else carried.keys()
    results = [array for n, array in enumerate(fusion.arrays) if n not in handed_on]
    parameters = [i for i in inner.values() if i.opcode == "parameter"]
    updates = {source(inner, i.operands[0]): i for i in inner.values() if i.opcode == "dynamic-update-slice"}
    passing = {root.name, *carried.values()} if carried else set()
    moved = 0.0
    for parameter in parameters:
        operand = here[fusion.operands[int(parameter.value)]]
        if passing and all(i.name in passing for i in inner.values() if parameter.name in i.operands):
            continue
        if parameter.name in updates:  # in place: only the updated part is written, and none of the rest is read
            moved += in_size(inner, updates[parameter.name], operand)
            continue
        moved += min(read_bytes(module, inner, parameter.name), in_hbm(operand.arrays))
    updated = sum(1 for parameter in parameters if parameter.name in updates)
    return moved + in_hbm(tuple(sorted(results, key=lambda array: -array.bytes)[updated:]))


def aliased(fusion: Instruction) -> set[int]:
    """Returns the results, by number, that have the memory of an operand."""
    _, found, rest = fusion.attributes.partition("output_to_operand_aliasing={")
    return {int(number or 0) for number in ALIASED.findall(rest.partition(")}")[0] + ")")} if found else set()


def carried_results(fusion: Instruction, inner: dict[str, Instruction], root: Instruction) -> dict[int, str]:
    """Returns {number of a result: what it is inside} of results that a fusion hands on: nothing is moved for them.

    TPUs run a collective beside several fusions. Each of them names the collective again, and takes and returns its
    buffers; its bytes are those of the fusion that starts it.
    """
    if root.opcode != "tuple":
        return {}
    named = {n: root.operands[n] for n in aliased(fusion) if n < len(root.operands)}
    return {n: name for n, name in named.items() if inner[name].opcode in CARRIED}


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
