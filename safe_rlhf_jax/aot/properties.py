"""Checks for instructions that a scalable program must not contain."""

import math
from collections.abc import Iterable, Sequence

from safe_rlhf_jax.aot.collectives import Collective
from safe_rlhf_jax.aot.hlo import Instruction, Module

HOST = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")


def host_transfers(module: Module) -> list[Instruction]:
    """Returns the instructions that wait for the host or send to it: feeds, transfers and callbacks."""
    everything = (i for lines in module.computations.values() for i in lines)
    return [i for i in everything if i.opcode in HOST or "callback" in i.attributes or "S(5)" in i.attributes]


def float32_logits(module: Module, vocabulary: int, rows: int) -> list[Instruction]:
    """Returns the instructions, fusions from outside, with a float32 result of that many rows over the vocabulary."""
    found = []
    for executed in module.walk():
        shapes = [array.shape for array in executed.instruction.arrays if array.dtype == "f32"]
        if any(vocabulary in shape and math.prod(shape) >= rows * vocabulary for shape in shapes):
            found.append(executed.instruction)
    return found


def gathered(collectives: Iterable[Collective], elements: int) -> list[Collective]:
    """Returns the all-gathers that leave more than that many elements of one array on every device."""
    return [c for c in collectives if c.kind == "all-gather" and largest(c) > elements]


def reduced_whole(collectives: Iterable[Collective], axis: str, elements: int) -> list[Collective]:
    """Returns the all-reduces over a mesh axis of at least that many elements: every device receives all of them."""
    return [c for c in collectives if c.kind == "all-reduce" and axis in c.axes and largest(c) >= elements]


def permuted(collectives: Iterable[Collective], axis: str, elements: int) -> list[Collective]:
    """Returns the permutes over a mesh axis that send at least that many elements: rings in place of a gather."""
    kinds = [c for c in collectives if c.kind == "collective-permute" and axis in c.axes]
    return [c for c in kinds if c.times * largest(c) >= elements]


def summed_in(collectives: Iterable[Collective], dtype: str, axes: tuple[str, ...], elements: int) -> list[Collective]:
    """Returns the sums over any of these mesh axes of more than that many elements in a dtype, in HLO's spelling.

    TPUs gather short vectors by adding zeros to them, which does not round.
    """
    sums = [c for c in collectives if c.kind in ("all-reduce", "reduce-scatter") and set(axes) & set(c.axes)]
    return [c for c in sums if largest(c) > elements and any(array.dtype == dtype for array in c.arrays)]


def rounded_products(module: Module) -> list[Instruction]:
    """Returns the products of a float32 network whose operands a TPU rounds to fewer bits."""
    products = [i for lines in module.computations.values() for i in lines if i.opcode in ("dot", "convolution")]
    return [i for i in products if i.arrays[0].dtype == "f32" and "highest" not in i.attributes]


def with_dimension(collectives: Iterable[Collective], size: int) -> list[Collective]:
    """Returns the collectives on arrays that have a dimension of this size."""
    return [c for c in collectives if any(size in array.shape for array in c.arrays)]


def largest(collective: Collective) -> int:
    """Returns the elements of the largest array."""
    sizes: Sequence[int] = [math.prod(array.shape) for array in collective.arrays]
    return max(sizes)
