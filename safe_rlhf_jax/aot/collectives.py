"""Every collective of a compiled program: kind, mesh axes, and the bytes that each device sends for it."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from safe_rlhf_jax.aot.hlo import Array, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
CHANNEL = re.compile(r"channel_id=(\d+)")
# XLA's notations of device groups: a list, a reshaped and transposed range, or axes of its own mesh.
LIST = re.compile(r"replica_groups=\{\{([\d,]+)\}")
RANGE = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")  # of a permutation: a group is a device and its target


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation, as executed in one run of the program."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that it communicates over
    group: tuple[int, ...]  # devices of its first group, by their index in the mesh
    arrays: tuple[Array, ...]  # its results; of a reduce-scatter one shard of each
    bytes_each: float  # sent by each device per execution
    times: int
    phase: str
    op_name: str

    @property
    def bytes(self) -> float:
        """Sent by each device in one run of the program."""
        return self.bytes_each * self.times


def find_collectives(module: Module, mesh_shape: Mapping[str, int], scopes: tuple[str, ...] = ()) -> list[Collective]:
    """Returns the collectives of a program.

    A ring is assumed: each of n devices sends (n − 1)/n of a gather, scatter or exchange, and twice that of an
    all-reduce.

    Args:
        module: The program.
        mesh_shape: Sizes of the mesh axes, in order.
        scopes: Names of the phases.
    """
    found: dict[Any, Collective] = {}
    for executed in module.walk(scopes):
        for i, (instruction, kind) in enumerate(underlying(module, executed.instruction)):
            group = first_group(instruction.attributes, math.prod(mesh_shape.values()))
            if len(group) < 2:
                continue
            factor = {"all-reduce": 2.0, "collective-permute": 2.0}.get(kind, 1.0)  # a permutation sends all, 2 · 1/2
            scale = len(group) if instruction.opcode.startswith("reduce-scatter") else 1  # its result is one shard
            sent = factor * scale * instruction.bytes * (len(group) - 1) / len(group)
            # TPUs overlap a collective with several fusions; each of them contains it, with the same channel.
            channel = CHANNEL.search(instruction.attributes)
            key = channel[1] if channel else (executed.computation, executed.instruction.name, i)
            name = instruction.op_name or executed.instruction.op_name
            axes = axes_of(group, mesh_shape)
            found[key] = Collective(kind, axes, group, instruction.results, sent, executed.times, executed.phase, name)
    return list(found.values())


def underlying(module: Module, instruction: Instruction) -> Iterator[tuple[Instruction, str]]:
    """Yields the collectives of an instruction, itself or inside its fusion, and their kinds."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        yield instruction, kind
    elif instruction.opcode == "fusion":
        for name in instruction.called:
            for inner in module.computations[name]:
                for wrapped, inner_kind in underlying(module, inner):
                    scatters = inner_kind == "all-reduce" and "all-reduce-scatter" in name
                    yield wrapped, "reduce-scatter" if scatters else inner_kind


def numbers(text: str | None) -> tuple[int, ...]:
    """Returns comma-separated integers."""
    return tuple(int(n) for n in (text or "").split(",") if n)


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Returns the devices of the first group that communicates.

    Raises:
        ValueError: For an unknown notation.
    """
    if match := LIST.search(attributes):
        return numbers(match[1])
    if match := RANGE.search(attributes):
        shape, dims, order = numbers(match[1]), numbers(match[2]), numbers(match[3])
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order or None)
        return tuple(int(i) for i in ids.reshape(shape[0], -1)[0])
    if match := AXES.search(attributes):
        return mesh_group(*match.groups())
    if match := PAIRS.search(attributes):
        pairs = [numbers(pair) for pair in re.findall(r"\d+,\d+", match[1])]
        return next((pair for pair in pairs if pair[0] != pair[1]), ())
    if "replica_groups={}" in attributes:
        return tuple(range(devices))
    raise ValueError(f"replica groups in a notation that is not known: {attributes[:200]}")


def mesh_group(mesh: str, dims: str | None, order: str | None, axes: str) -> tuple[int, ...]:
    """Returns the first group of `mesh['a'=2,'b'=4] {'b'}`; `'b':(2)2` is a part of an axis: 2, after a 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    total = math.prod(sizes.values())
    ids = np.arange(total).reshape(numbers(dims) or (total,)).transpose(numbers(order) or None).reshape(-1)
    parts = []  # (stride, size) of each axis that varies
    strides = dict(zip(sizes, [math.prod(list(sizes.values())[i + 1 :]) for i in range(len(sizes))], strict=True))
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        if size:
            parts.append((strides[name] * sizes[name] // (int(before) * int(size)), int(size)))
        else:
            parts.append((strides[name], sizes[name]))
    offsets = (sum(i) for i in itertools.product(*([stride * n for n in range(size)] for stride, size in parts)))
    return tuple(int(ids[offset]) for offset in offsets)


def axes_of(group: tuple[int, ...], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ."""
    coordinates = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    return tuple(name for name, c in zip(mesh_shape, coordinates, strict=True) if len(set(c.tolist())) > 1)
