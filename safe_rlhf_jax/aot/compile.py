"""Compiles the programs of a stage ahead of time, for devices that need not exist, and reports their needs."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.aot.chips import chip_of
from safe_rlhf_jax.aot.gpus import compiler_options
from safe_rlhf_jax.aot.roofline import analyse, exhausted_memory
from safe_rlhf_jax.aot.run import AbstractRun, mesh_over
from safe_rlhf_jax.stages.check import check_divides
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.kind import Training
from safe_rlhf_jax.stages.kinds import kind_of
from safe_rlhf_jax.stages.programs import PHASES, Program


def compile_stage(config: cfg.RunConfig, stage: cfg.StageBase, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Compiles every program of a training stage.

    Returns:
        A tree of plain numbers: `programs` with memory, phases, collectives and seconds of compiling each; the
        projection of a whole step if the chip is known; `fits`.

    Raises:
        ConfigError: If the devices do not divide into the mesh, or the stage by its axes.
    """
    run = AbstractRun(config, mesh_over(config.mesh, devices))
    check_divides(run, stage)
    reports = []
    with jax.set_mesh(run.mesh):
        for program in training_of(stage).programs(run, stage):
            reports.append(compile_program(run, stage, program))
            if not reports[-1]["memory"]["fits"]:
                break
    fits = all(report["memory"]["fits"] for report in reports)
    result = {"stage": stage.name, "kind": stage.kind, "mesh": dict(run.mesh.shape), "fits": fits, "programs": reports}
    return result | (projection(run, stage, reports) if fits and chip_of(run.mesh.devices.flat[0]) else {})


def compile_program(run: Run, stage: cfg.StageBase, program: Program) -> dict[str, Any]:
    """Compiles one program."""
    devices = list(run.mesh.devices.flat)
    chip = chip_of(devices[0])
    started = time.monotonic()
    try:
        compiled = program.function.lower(*program.arguments).compile(compiler_options(devices[0]))
    except jax.errors.JaxRuntimeError as error:
        memory = exhausted_memory(str(error), chip.hbm if chip else None)
        if memory is None:
            raise
        return {"program": program.name, "compile_seconds": time.monotonic() - started, "memory": memory}
    seconds = time.monotonic() - started
    executed = step_flops(run, stage, recomputed=True)
    flops = {phase: executed[phase] for phase in PHASES.get(program.name, ("step",))}
    report = analyse(compiled, mesh_shape=run.mesh.shape, devices=devices, chip=chip, flops=flops, reads=program.reads)
    return {"program": program.name, "compile_seconds": seconds} | report


def step_flops(run: Run, stage: cfg.StageBase, *, recomputed: bool) -> dict[str, float]:
    """Returns {phase: FLOPs of one step on all devices}, with the recomputation of `remat: full` if `recomputed`."""
    again = 4 / 3 if recomputed and run.config.execution.remat == "full" else 1.0
    return training_of(stage).flops(run, stage, again)


def training_of(stage: cfg.StageBase) -> Training:
    """Returns the training record of a stage's kind."""
    training = kind_of(stage).training
    if training is None:
        raise TypeError(f"a stage of kind {stage.kind} trains nothing")
    return training


def argument_bytes(run: Run, stage: cfg.StageBase) -> int:
    """Returns the bytes per device of a step's arguments; call it under `jax.set_mesh(run.mesh)`."""
    program = next(training_of(stage).programs(run, stage))
    leaves = [leaf for leaf in jax.tree.leaves(program.arguments) if leaf.sharding is not None]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def projection(run: Run, stage: cfg.StageBase, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns bounds of a step's seconds, tokens/s and MFU, and the seconds that are expected; nothing is measured.

    MFU counts the FLOPs of the model, not those of rematerialisation.
    """
    devices = run.mesh.devices.size
    chip = chip_of(run.mesh.devices.flat[0])
    phases = [phase for report in reports for phase in report["phases"].values()]
    seconds = sum(phase["projected_seconds"]["phase"] for phase in phases)
    flops = sum(step_flops(run, stage, recomputed=False).values())
    return {
        "projected": {
            "step_seconds": seconds,
            "expected_seconds": sum(phase["expected_seconds"] for phase in phases),
            "tokens_per_second": training_of(stage).tokens(stage) / seconds,
            "mfu": flops / seconds / devices / chip.flops if chip else None,
        }
    }
