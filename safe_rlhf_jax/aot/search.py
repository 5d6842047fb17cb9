"""Search for a mesh, rematerialisation and microbatches that fit a stage into memory: by compiling, not by formula."""

import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.aot.chips import chip_of
from safe_rlhf_jax.aot.compile import argument_bytes, compile_stage
from safe_rlhf_jax.aot.run import AbstractRun, mesh_over
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.stages.check import check_divides

REMATS = ("none", "dots", "full")  # from the fastest to the smallest
MESHES = 4  # number of meshes whose parameters fit to try for an advice


def feasible(
    config: cfg.RunConfig, stage: cfg.TrainingStage, devices: Sequence[jax.Device], count: int
) -> list[dict[str, Any]]:
    """Returns the variants that fit on the `count` most promising meshes, the fastest projected step first.

    Each core searches one mesh at a time.
    """
    look = functools.partial(variants, config, stage, devices)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [variant for some in pool.map(look, meshes(config, stage, devices)[:count]) for variant in some]
    return sorted(found, key=lambda variant: variant.get("projected", {}).get("step_seconds", 0.0))


def advise(config: cfg.RunConfig, stage: cfg.TrainingStage, devices: Sequence[jax.Device]) -> dict[str, Any] | None:
    """Returns the cheapest change that fits, or None.

    It tries more microbatches first, then more rematerialisation, then other meshes.
    """
    own = cfg.Mesh(**dict(mesh_over(config.mesh, devices).shape))
    remats = REMATS[REMATS.index(config.execution.remat) :]
    tries = [(own, remats)]
    tries += [(mesh, ("full",)) for mesh in meshes(config, stage, devices)[:MESHES] if mesh != own]
    found = (variants(config, stage, devices, mesh, remats, first=True) for mesh, remats in tries)
    return next((some[0] for some in found if some), None)


def meshes(config: cfg.RunConfig, stage: cfg.TrainingStage, devices: Sequence[jax.Device]) -> list[cfg.Mesh]:
    """Returns the meshes that devices and stage divide into and whose arguments alone fit, the most promising first.

    Most promising is the least tensor parallelism, whose sums over devices grow with the batch, and of that the least
    gathering. Where parameters are gathered for every decoded token it is the most: over `tensor` they stay in place.
    """
    chip, gathers = chip_of(devices[0]), generates(stage) and config.execution.gather_to_decode
    fitting = []
    for mesh in shapes(len(devices), decode=gathers):
        try:
            run = AbstractRun(config.model_copy(update={"mesh": mesh}), mesh_over(mesh, devices))
            check_divides(run, stage)
        except ConfigError:
            continue
        if chip is None or held_bytes(run, stage) < chip.hbm:
            fitting.append(mesh)
    if generates(stage) and not gathers:
        return sorted(fitting, key=lambda mesh: (-mesh.tensor, mesh.fsdp))
    return sorted(fitting, key=lambda mesh: (mesh.tensor, mesh.fsdp * mesh.decode, -mesh.decode))


def shapes(devices: int, *, decode: bool = False) -> Iterator[cfg.Mesh]:
    """Yields every mesh of powers of two over that many devices, with `decode` in place of `tensor` if asked."""
    powers = [2**i for i in range(devices.bit_length())]
    for fsdp, split in itertools.product(powers, powers):
        if devices % (fsdp * split) == 0:
            data = devices // (fsdp * split)
            yield cfg.Mesh(data=data, fsdp=fsdp, tensor=split)
            if decode and split > 1:
                yield cfg.Mesh(data=data, fsdp=fsdp, decode=split)


def held_bytes(run: AbstractRun, stage: cfg.TrainingStage) -> int:
    """Returns the bytes per device of a step's arguments, which it always holds."""
    with jax.set_mesh(run.mesh):
        return argument_bytes(run, stage)


def variants(
    config: cfg.RunConfig,
    stage: cfg.TrainingStage,
    devices: Sequence[jax.Device],
    mesh: cfg.Mesh,
    remats: Sequence[str] = REMATS,
    *,
    first: bool = False,
) -> list[dict[str, Any]]:
    """Returns the variants that fit on a mesh, with the fewest microbatches per rematerialisation; or only the first.

    More rematerialisation is listed only with fewer microbatches, since otherwise it is slower and no smaller. If
    nothing fits with parameters gathered for decoding, they are not gathered.
    """
    found: list[dict[str, Any]] = []
    counts, chip = microbatch_counts(stage, mesh), chip_of(devices[0])
    capacity, held = math.inf, 0
    if chip is not None:
        run = AbstractRun(config.model_copy(update={"mesh": mesh}), mesh_over(mesh, devices))
        capacity, held = chip.hbm, held_bytes(run, stage)
    for gather in (True, False) if config.execution.gather_to_decode and generates(stage) else (False,):
        below = math.inf
        for remat in remats:
            execution = config.execution.model_copy(update={"remat": remat, "gather_to_decode": gather})
            own = config.model_copy(update={"mesh": mesh, "execution": execution})
            allowed = [n for n in counts if n < below]
            variant = fewest_microbatches(own, stage, devices, allowed, capacity=capacity, held=held)
            if variant is not None:
                below = variant["microbatches"]
                found.append(variant)
            if variant is not None and first:
                return found
        if found:
            break
    return found


def generates(stage: cfg.StageBase) -> bool:
    """Says whether a stage generates responses."""
    return any(use.generates for use in stage.models().values())


def microbatch_counts(stage: cfg.TrainingStage, mesh: cfg.Mesh) -> list[int]:
    """Returns the microbatches that a batch divides into: the stage's own number, and powers of two times it."""
    shards = mesh.data * mesh.fsdp * mesh.decode * stage.minibatches
    return [n for n in (stage.microbatches * 2**i for i in range(20)) if stage.rows % (shards * n) == 0]


def fewest_microbatches(
    config: cfg.RunConfig,
    stage: cfg.TrainingStage,
    devices: Sequence[jax.Device],
    counts: Sequence[int],
    *,
    capacity: float,
    held: float,
) -> dict[str, Any] | None:
    """Returns the first of these numbers of microbatches with which a stage fits, as a variant, or None.

    Memory is modelled as total(n) ≈ held + a/n for n microbatches. `held` starts as the bytes of the arguments; after
    two failed compilations it is estimated from both. Counts that the model predicts not to fit are skipped.
    """
    least, before = 0.0, None
    for count in counts:
        if held >= capacity:
            return None
        if count < least:
            continue
        variant = attempt(config, stage, devices, count)
        if variant["fits"]:
            return variant
        total = variant["total"]
        if before is not None:
            held = max(held, (count * total - before[0] * before[1]) / (count - before[0]))
        before = count, total
        if held < capacity:
            least = count * (total - held) / (capacity - held)
    return None


def attempt(
    config: cfg.RunConfig, stage: cfg.TrainingStage, devices: Sequence[jax.Device], microbatches: int
) -> dict[str, Any]:
    """Compiles one variant; returns its overrides, its needs and whether it fits."""
    started = time.monotonic()
    report = compile_stage(config, stage.model_copy(update={"microbatches": microbatches}), devices)
    total = max(program["memory"]["total"] for program in report["programs"])
    overrides = [f"mesh.{axis}={size}" for axis, size in config.mesh.model_dump().items()]
    overrides += [f"execution.remat={config.execution.remat}", f"stages.{stage.name}.microbatches={microbatches}"]
    if generates(stage):
        overrides.append(f"execution.gather_to_decode={str(config.execution.gather_to_decode).lower()}")
    outcome = f"{total / 2**30:.2f} GiB{'' if report['fits'] else ', too much'}"
    print(f"  {' '.join(overrides)}: {outcome} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    projected = {"projected": report["projected"]} if "projected" in report else {}
    return {"overrides": overrides, "microbatches": microbatches, "total": total, "fits": report["fits"]} | projected
