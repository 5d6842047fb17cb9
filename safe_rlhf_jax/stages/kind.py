"""Kinds of stages: a record with everything that checks, hashes, reports and compilers need to know."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.datasets import load_data
from safe_rlhf_jax.stages.programs import Program
from safe_rlhf_jax.stages.trained import Trained, one_policy


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of stage. Its schema says which models and data sets it reads (`models()`, `datasets()`).

    Attributes:
        schema: Of its config.
        run: (run, stage, folder) -> what goes into result.json, with `metrics`.
        load: (run, stage, field of `datasets()`) -> examples.
        check: (run, stage, examples by field) -> None; raises before the first stage trains.
        refusal: (stage, its result) -> an error that ends the run now that the stage is finished, or None.
        idle: stage -> {setting, dotted: why it changes nothing}.
        training: Of a kind that trains.
        shows_metrics: Print them at the end; an evaluation has its table.
    """

    schema: type[cfg.StageBase]
    run: Callable[[Run, Any, storage.Path], dict[str, Any]]
    load: Callable[[Run, Any, str], Examples] = load_data
    check: Callable[[Run, Any, Mapping[str, Examples]], None] = lambda *_: None
    refusal: Callable[[Any, Mapping[str, Any]], UserError | None] = lambda *_: None
    idle: Callable[[Any], dict[str, str]] = lambda _: {}
    training: "Training | None" = None
    shows_metrics: bool = True


@dataclasses.dataclass(frozen=True)
class Training:
    """The record of a kind of stage that trains.

    Attributes:
        programs: (run, stage) -> the programs of a step, the training one last; called and used under
            `jax.set_mesh(run.mesh)`.
        flops: (run, stage, factor of the backward pass's recomputation) -> {phase: FLOPs of a step on all devices}.
        tokens: stage -> tokens of a step at their full lengths.
        steps: (stage, examples by field) -> steps, at most; None if they are not known before it runs.
        measured: (run, stage, examples by field) -> names of its held-out metrics, without "eval/".
        networks: (run, stage) -> the networks that it trains, by name; the first one is what it makes.
        groups: (stage, examples by field) -> groups of prompts for the share of unsafe responses.
    """

    programs: Callable[[Run, Any], Iterator[Program]]
    flops: Callable[[Run, Any, float], dict[str, float]]
    tokens: Callable[[Any], int]
    steps: Callable[[Any, Mapping[str, Examples]], int | None]
    measured: Callable[[Run, Any, Mapping[str, Examples]], Collection[str]]
    networks: Callable[[Run, Any], dict[str, Trained]] = one_policy
    groups: Callable[[Any, Mapping[str, Examples]], tuple[str, ...]] = lambda *_: ()
