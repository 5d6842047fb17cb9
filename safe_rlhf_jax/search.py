"""Which mesh, rematerialisation and microbatches fit a stage into memory: found by compiling, not by formula."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.analysis.chips import chip_of
from safe_rlhf_jax.config_errors import ConfigError
from safe_rlhf_jax.sharding import make_mesh
from safe_rlhf_jax.stages.abstract import AbstractRun, argument_bytes
from safe_rlhf_jax.stages.ahead import compile_stage
from safe_rlhf_jax.stages.check import check_divides

REMATS = ("none", "dots", "full")  # from the fastest to the smallest
MESHES = 4  # of those whose parameters fit, so many are compiled


def feasible(config: cfg.RunConfig, stage: Any, devices: Sequence[jax.Device]) -> list[dict[str, Any]]:
    """Returns the variants that fit, the fastest projected step first.

    For each mesh and rematerialisation there is one: that with the fewest microbatches, since each gathers the
    parameters anew.
    """
    found = []
    for mesh in meshes(config, stage, devices)[:MESHES]:
        for remat in REMATS:
            variant = fewest_microbatches(config, stage, devices, mesh, remat)
            if variant is not None:
                found.append(variant)
    return sorted(found, key=lambda variant: variant.get("projected", {}).get("step_seconds", 0.0))


def advise(config: cfg.RunConfig, stage: Any, devices: Sequence[jax.Device]) -> dict[str, Any] | None:
    """Returns the cheapest change that fits, None where nothing does.

    It tries more microbatches first, then more rematerialisation, then other meshes.
    """
    own = cfg.Mesh(**dict(make_mesh(sizes(config.mesh), devices).shape))
    first = REMATS.index(config.execution.remat)
    tries = [(own, remat) for remat in REMATS[first:]]
    tries += [(mesh, "full") for mesh in meshes(config, stage, devices)[:MESHES] if mesh != own]
    variants = (fewest_microbatches(config, stage, devices, mesh, remat) for mesh, remat in tries)
    return next((variant for variant in variants if variant is not None), None)


def sizes(mesh: cfg.Mesh) -> tuple[int, int, int]:
    """Returns the sizes in the order of the mesh axes."""
    return mesh.data, mesh.fsdp, mesh.tensor


def meshes(config: cfg.RunConfig, stage: Any, devices: Sequence[jax.Device]) -> list[cfg.Mesh]:
    """Returns the meshes that the stage divides into and whose arguments alone fit, the most promising first.

    That is the one that gathers least while it decodes: parameters over `fsdp` are gathered for every token, those over
    `tensor` stay where they are. Among these, the one with the fewest tensor-parallel devices beyond that.
    """
    chip = chip_of(devices[0])
    fitting = []
    for mesh in shapes(len(devices)):
        run = AbstractRun(config.model_copy(update={"mesh": mesh}), make_mesh(sizes(mesh), devices))
        try:
            check_divides(run, stage)
        except ConfigError:
            continue
        with jax.set_mesh(run.mesh):
            if chip is None or argument_bytes(run, stage) < chip.hbm:
                fitting.append(mesh)
    return sorted(fitting, key=lambda mesh: (-mesh.tensor, mesh.fsdp))


def shapes(devices: int) -> Iterator[cfg.Mesh]:
    """Yields every mesh of powers of two over so many devices."""
    powers = [2**i for i in range(devices.bit_length())]
    for fsdp in powers:
        for tensor in powers:
            if devices % (fsdp * tensor) == 0:
                yield cfg.Mesh(data=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor)


def fewest_microbatches(
    config: cfg.RunConfig, stage: Any, devices: Sequence[jax.Device], mesh: cfg.Mesh, remat: str
) -> dict[str, Any] | None:
    """Returns the variant with the fewest microbatches that fits, from the stage's own number on in powers of two.

    Where none fits while parameters are gathered to decode, they are not.
    """
    rows = stage.batch_size * (stage.responses_per_prompt if stage.kind == "rl" else 1)
    shards = mesh.data * mesh.fsdp * (stage.algorithm.minibatches if stage.kind == "rl" else 1)
    counts = [n for n in (stage.microbatches * 2**i for i in range(20)) if rows % (shards * n) == 0]
    if not counts:
        return None
    # The smallest program first: where that does not fit, none does.
    best = attempt(config, stage, devices, mesh, remat, counts.pop())
    if best is None:
        if stage.kind != "rl" or not config.execution.gather_to_decode:
            return None
        execution = config.execution.model_copy(update={"gather_to_decode": False})
        return fewest_microbatches(config.model_copy(update={"execution": execution}), stage, devices, mesh, remat)
    while counts:  # halve the range: what fits with n microbatches fits with more
        middle = len(counts) // 2
        variant = attempt(config, stage, devices, mesh, remat, counts[middle])
        best, counts = (best, counts[middle + 1 :]) if variant is None else (variant, counts[:middle])
    return best


def attempt(
    config: cfg.RunConfig, stage: Any, devices: Sequence[jax.Device], mesh: cfg.Mesh, remat: str, microbatches: int
) -> dict[str, Any] | None:
    """Compiles one variant; returns its overrides and what it needs, None where it does not fit."""
    execution = config.execution.model_copy(update={"remat": remat})
    variant = config.model_copy(update={"mesh": mesh, "execution": execution})
    own = stage.model_copy(update={"microbatches": microbatches})
    overrides = [f"mesh.{axis}={size}" for axis, size in mesh.model_dump().items()]
    overrides += [f"execution.remat={remat}", f"stages.{stage.name}.microbatches={microbatches}"]
    if stage.kind == "rl":
        overrides.append(f"execution.gather_to_decode={str(execution.gather_to_decode).lower()}")
    report = compile_stage(variant, own, devices)
    total = max(program["memory"]["total"] for program in report["programs"])
    print(f"  {' '.join(overrides)}: {total / 2**30:.2f} GiB{'' if report['fits'] else ', too much'}", file=sys.stderr)
    projected = {"projected": report["projected"]} if "projected" in report else {}
    return {"overrides": overrides, "total": total} | projected if report["fits"] else None
