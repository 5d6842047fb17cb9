"""Roofline of one compiled program: its needs and its best possible speed, as plain numbers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safe_rlhf_jax.aot.chips import Chip, ring_rate
from safe_rlhf_jax.aot.collectives import Collective, find_collectives
from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.aot.traffic import hbm_bytes

PHASES = ("generation", "scoring", "update")  # scopes of an iteration; a program without them is one phase
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Two wordings of libtpu: for the program as a whole, and for its temporaries.
EXHAUSTED = re.compile(r"(?:Used |\()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds available HBM)")


def memory_of(compiled: Any, capacity: int | None) -> dict[str, Any]:
    """Returns bytes per device by kind; `total` must fit into the memory of a device."""
    stats = compiled.memory_analysis()
    memory = {
        "argument": stats.argument_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = memory["argument"] + memory["output"] - memory["alias"] + memory["temporary"] + memory["code"]
    return memory | {"total": total, "capacity": capacity, "fits": capacity is None or total <= capacity}


def exhausted_memory(message: str, capacity: int | None) -> dict[str, Any] | None:
    """Returns the compiler's memory figure from an out-of-memory message; None for any other message."""
    match = EXHAUSTED.search(message)
    if match is None:
        return None
    total = int(float(match[1]) * UNITS[match[2]])
    return {"total": total, "capacity": capacity, "fits": False}


def analyse(
    compiled: Any,
    *,
    mesh_shape: Mapping[str, int],
    devices: Sequence[Any],
    chip: Chip | None,
    flops: Mapping[str, float],
) -> dict[str, Any]:
    """Returns memory, collectives and phases of a compiled program.

    Args:
        compiled: Result of `jit(…).lower(…).compile()`.
        mesh_shape: Sizes of the mesh axes.
        devices: In the order of the mesh.
        chip: Chip of each device; None omits the projection.
        flops: {phase: executed by all devices in one run}; its phases are the scopes of the program.
    """
    module = Module(compiled.as_text())
    scopes = tuple(flops)
    collectives = find_collectives(module, mesh_shape, scopes)
    traffic = hbm_bytes(module, scopes)
    # The little outside of all scopes is counted with the last of them.
    last = scopes[-1]
    phases = {}
    for phase in scopes:
        own = {phase, ""} if phase == last else {phase}
        phases[phase] = roofline(
            flops[phase] / len(devices),
            sum(traffic.get(name, 0.0) for name in own),
            [c for c in collectives if c.phase in own],
            chip,
            devices,
        )
    memory = memory_of(compiled, chip.hbm if chip else None)
    return {"memory": memory, "phases": phases, "collectives": summary(collectives, last)}


def roofline(
    flops: float, traffic: float, collectives: Sequence[Collective], chip: Chip | None, devices: Sequence[Any]
) -> dict[str, Any]:
    """Returns a phase's needs of one device, and its least time: everything overlaps, at peak rates."""
    row: dict[str, Any] = {"flops": flops, "hbm_bytes": traffic, "sent_bytes": sum(c.bytes for c in collectives)}
    if chip is None:
        return row
    seconds = {
        "compute": flops / chip.flops,
        "hbm": traffic / chip.hbm_rate,
        "interconnect": sum(c.bytes / ring_rate(chip, devices, c.group) for c in collectives),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return row | {"projected_seconds": seconds | {"phase": seconds[bound]}, "bound": bound}


def summary(collectives: Sequence[Collective], last: str) -> list[dict[str, Any]]:
    """Returns one row per phase, kind and axes, the largest first."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for c in collectives:
        key = c.phase or last, c.kind, "·".join(c.axes)
        row = rows.setdefault(key, dict(zip(("phase", "kind", "axes"), key, strict=True)) | {"runs": 0, "bytes": 0.0})
        row["runs"] += c.times
        row["bytes"] += c.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])
