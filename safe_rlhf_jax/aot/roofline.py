"""Roofline of one compiled program: its needs and its best possible speed, as plain numbers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safe_rlhf_jax.aot.chips import Chip, ring_rate
from safe_rlhf_jax.aot.collectives import Collective, find_collectives
from safe_rlhf_jax.aot.expectation import expected_seconds
from safe_rlhf_jax.aot.floors import Reads, program_bytes
from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.aot.traffic import core_bytes, hbm_bytes

DECODING = "decoding"  # the scope of the loop over tokens, within that of generation
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
    reads: Mapping[str, Reads] | None = None,
) -> dict[str, Any]:
    """Returns memory, collectives and phases of a compiled program, and what is implausible in the count of its bytes.

    Args:
        compiled: Result of `jit(…).lower(…).compile()`.
        mesh_shape: Sizes of the mesh axes.
        devices: In the order of the mesh.
        chip: Chip of each device; None omits the projection.
        flops: {phase: executed by all devices in one run}; its phases are the scopes of the program.
        reads: {phase, or decoding: what it cannot go below}.
    """
    module, reads = Module(compiled.as_text()), reads or {}
    scopes = tuple(flops)
    inner = (*scopes, *([DECODING] if "generation" in scopes else []))
    collectives = find_collectives(module, mesh_shape, scopes)
    traffic, kept = dict.fromkeys(inner, 0.0) | hbm_bytes(module, inner), core_bytes(module, inner)
    least = {phase: read.least(chip.fast if chip else 0) for phase, read in reads.items()}
    # The little outside of all scopes is counted with the last of them.
    last = scopes[-1]
    phases = {}
    for phase in scopes:
        own = {phase, ""} if phase == last else {phase}
        own |= {DECODING} if phase == "generation" else set()
        row = roofline(
            flops[phase] / len(devices),
            sum(traffic.get(name, 0.0) for name in own),
            [c for c in collectives if c.phase in own],
            chip,
            devices,
            max(least.get(name, 0.0) for name in own),
        )
        row["core_bytes"] = sum(kept.get(name, 0.0) for name in own)
        if DECODING in own & reads.keys():
            row[DECODING] = decoding(traffic.get(DECODING, 0.0), reads[DECODING])
        phases[phase] = row | (expected_seconds(phase, row, chip) if chip else {})
    memory = memory_of(compiled, chip.hbm if chip else None)
    found = implausible(traffic, least, program_bytes(module))
    return {"memory": memory, "phases": phases, "collectives": summary(collectives, last), "implausible": found}


def roofline(
    flops: float,
    traffic: float,
    collectives: Sequence[Collective],
    chip: Chip | None,
    devices: Sequence[Any],
    least: float = 0.0,
) -> dict[str, Any]:
    """Returns a phase's needs of one device, and its bound: everything overlaps, at peak rates.

    `least` bytes of HBM are needed even where the count of the program has fewer.
    """
    row: dict[str, Any] = {"flops": flops, "hbm_bytes": traffic, "least_hbm_bytes": least}
    row |= {"sent_bytes": sum(c.bytes for c in collectives)}
    if chip is None:
        return row
    seconds = {
        "compute": flops / chip.flops,
        "hbm": max(traffic, least) / chip.hbm_rate,
        "interconnect": sum(c.bytes / ring_rate(chip, devices, c.group) for c in collectives),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return row | {"projected_seconds": seconds | {"phase": seconds[bound]}, "bound": bound}


def decoding(traffic: float, reads: Reads) -> dict[str, float]:
    """Returns the HBM bytes of a decoded token, beside those of its weights and cache read once."""
    token = traffic / reads.times
    return {"token_bytes": token, "least_token_bytes": reads.bytes, "ratio": token / reads.bytes}


def implausible(traffic: Mapping[str, float], least: Mapping[str, float], arguments: float) -> list[str]:
    """Returns in words where a count of HBM bytes is below what it cannot go below.

    Args:
        traffic: {phase of the program: bytes counted}.
        least: {phase: bytes that it cannot go below}, also of phases of other programs.
        arguments: Bytes of arguments and results of the program.
    """
    rows = [(phase, traffic[phase], least[phase], "its weights and cache") for phase in least if phase in traffic]
    rows.append(("program", sum(traffic.values()), arguments, "its arguments and results"))
    return [
        f"{name}: {count / 1e9:.3g} GB of HBM are counted, less than the {bytes_ / 1e9:.3g} GB of {what}"
        for name, count, bytes_, what in rows
        if count < bytes_
    ]


def summary(collectives: Sequence[Collective], last: str) -> list[dict[str, Any]]:
    """Returns one row per phase, kind and axes, the largest first."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for c in collectives:
        key = c.phase or last, c.kind, "·".join(c.axes)
        row = rows.setdefault(key, dict(zip(("phase", "kind", "axes"), key, strict=True)) | {"runs": 0, "bytes": 0.0})
        row["runs"] += c.times
        row["bytes"] += c.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])
