"""Compiles the programs of a stage ahead of time, for devices that need not exist, and says what they need."""

import time
from collections.abc import Sequence
from typing import Any

import jax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.aot.chips import chip_of
from safe_rlhf_jax.aot.flops import forward_flops, iteration_flops
from safe_rlhf_jax.aot.roofline import analyse, exhausted_memory
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.sharding import make_mesh
from safe_rlhf_jax.stages.check import check_divides
from safe_rlhf_jax.stages.common import Run, model_config
from safe_rlhf_jax.stages.constraints import constraints_of
from safe_rlhf_jax.stages.programs import AbstractRun, Program, programs

PARTS = {
    "iteration": ("generation", "scoring", "update"),
    "generation": ("generation",),
    "learning": ("scoring", "update"),
    "sampling": ("generation", "scoring"),
}


def compile_stage(config: cfg.RunConfig, stage: Any, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Compiles every program of a training stage.

    Returns:
        A tree of plain numbers: `programs` with memory, phases, collectives and seconds of compiling each; the
        projection of a whole step where the chip is known; `fits`.

    Raises:
        ConfigError: If the stage does not divide as its mesh asks.
    """
    run = AbstractRun(config, make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.tensor), devices))
    check_divides(run, stage)
    reports = []
    with jax.set_mesh(run.mesh):
        for program in programs(run, stage):
            reports.append(compile_program(run, stage, program))
            if not reports[-1]["memory"]["fits"]:
                break
    fits = all(report["memory"]["fits"] for report in reports)
    result = {"stage": stage.name, "kind": stage.kind, "mesh": dict(run.mesh.shape), "fits": fits, "programs": reports}
    return result | (projection(run, stage, reports) if fits and chip_of(run.mesh.devices.flat[0]) else {})


def compile_program(run: Run, stage: Any, program: Program) -> dict[str, Any]:
    """Compiles one program."""
    devices = list(run.mesh.devices.flat)
    chip = chip_of(devices[0])
    started = time.monotonic()
    try:
        compiled = program.function.lower(*program.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        memory = exhausted_memory(str(error), chip.hbm if chip else None)
        if memory is None:
            raise
        return {"program": program.name, "compile_seconds": time.monotonic() - started, "memory": memory}
    seconds = time.monotonic() - started
    executed = step_flops(run, stage, recomputed=True)
    flops = {phase: executed[phase] for phase in PARTS.get(program.name, ("step",))}
    report = analyse(compiled, mesh_shape=run.mesh.shape, devices=devices, chip=chip, flops=flops)
    return {"program": program.name, "compile_seconds": seconds} | report


def step_flops(run: Run, stage: Any, *, recomputed: bool) -> dict[str, float]:
    """Returns {phase: FLOPs of one step on all devices}, with what `remat: full` repeats where `recomputed`."""
    config = model_config(run, stage.init_from)
    again = 4 / 3 if recomputed and run.config.execution.remat == "full" else 1.0
    if isinstance(stage, cfg.RejectionStage):
        length = stage.max_prompt_length + stage.max_response_length
        sampling = iteration_flops(
            config, stage.prompt_batch_size * stage.responses_per_prompt, stage.max_prompt_length,
            stage.max_response_length, False, critics=0, scorers=len(stage.scorers), reference=False,
        )  # fmt: skip
        return {
            "generation": sampling["generation"],
            "scoring": sampling["scoring"],
            "step": 3 * again * forward_flops(config, stage.batch_size, length, length),
        }
    if stage.kind != "rl":
        sides = 1 if stage.kind == "sft" else 2
        logits = stage.max_length if stage.kind in ("sft", "dpo") else 0
        passes = 3 * again + (1 if stage.kind == "dpo" else 0)  # and the reference's, forward only
        return {"step": passes * forward_flops(config, sides * stage.batch_size, stage.max_length, logits)}
    algorithm = ALGORITHMS[stage.algorithm.name]
    flops = iteration_flops(
        config,
        stage.batch_size * stage.responses_per_prompt,
        stage.max_prompt_length,
        stage.max_response_length,
        stage.algorithm.old_log_probs == "recomputed",
        critics=0 if algorithm.baseline else 1 + len(constraints_of(stage)),
        scorers=len(stage.scorers),
        epochs=stage.algorithm.epochs,
        ptx=stage.ptx is not None and stage.algorithm.ptx_coeff > 0,
    )
    return flops | {"update": again * flops["update"]}


def tokens_per_step(stage: Any) -> int:
    """Returns the tokens of prompts and responses that a step works on, at their full lengths.

    In rejection sampling that is a batch of prompts that is answered, and a batch of responses that is trained on.
    """
    if isinstance(stage, cfg.RejectionStage):
        rows = stage.prompt_batch_size * stage.responses_per_prompt + stage.batch_size
        return int(rows * (stage.max_prompt_length + stage.max_response_length))
    if stage.kind == "rl":
        rows = stage.batch_size * stage.responses_per_prompt
        return int(rows * (stage.max_prompt_length + stage.max_response_length))
    return int(stage.batch_size * (1 if stage.kind == "sft" else 2) * stage.max_length)


def projection(run: Run, stage: Any, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the least seconds of a step, the most tokens/s and the highest MFU: nothing of it is measured.

    MFU counts the FLOPs of the model, not those that rematerialisation repeats.
    """
    devices = run.mesh.devices.size
    chip = chip_of(run.mesh.devices.flat[0])
    seconds = sum(phase["projected_seconds"]["phase"] for report in reports for phase in report["phases"].values())
    flops = sum(step_flops(run, stage, recomputed=False).values())
    return {
        "projected": {
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_step(stage) / seconds,
            "mfu": flops / seconds / devices / chip.flops if chip else None,
        }
    }
