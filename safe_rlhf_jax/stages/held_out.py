"""Data that is meant to be held out, and prompts in it that a stage before was trained on: found by their text.

Names and paths do not tell: one prompt stands in several files, one file goes by several names, and each stage may take
another part of it.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.sources import opening
from safe_rlhf_jax.stages.common import Run, described

TRAINED = ("data", "prompts", "ptx")  # settings that hold what a stage is trained on


def warn_of_overlap(run: Run, stage: Any) -> None:
    """Says how much of what a stage measures on opens with a prompt that it, or a stage it is built on, trains on."""
    trained: dict[str, set[str]] = {}
    for field, data in held_out(run, stage):
        if not trained:
            trained = {where: openings(run, data) for where, data in training_data(run, stage)}
        measured = [opening(record) for record in run.records(data)]
        found = {where: sum(prompt in seen for prompt in measured if prompt) for where, seen in trained.items()}
        every = set().union(*trained.values())
        shared = sum(prompt in every for prompt in measured if prompt)
        if shared:
            where = ", ".join(where for where, count in found.items() if count)
            run.warn(
                stage.name,
                f"{field}: {shared} of {len(measured)} records ({shared / len(measured):.0%}) of {described(data)} "
                f"open with a prompt of {where}: there, what was trained on is measured. One test_share in all stages "
                "keeps every prompt on one side",
            )


def held_out(run: Run, stage: Any) -> Iterator[tuple[str, cfg.Mixture]]:
    """Yields (setting, data) of what a stage measures on.

    Data that a limit is calibrated on counts where its cost model goes over its own data more than once: from the
    second pass on, pairs are learned by heart (docs/results.md).
    """
    for field in ("eval_data", "eval_prompts"):
        if getattr(stage, field, None) is not None:
            yield field, getattr(stage, field)
    if isinstance(stage, cfg.EvaluateStage):
        yield from ((f"prompts.{i}", data) for i, data in enumerate(stage.prompts))
    for signal, lagrange in getattr(stage, "limits", {}).items():
        cost, _ = origin(run.config.stages, stage.scorers[signal])
        if isinstance(lagrange.cost_limit, cfg.CalibratedLimit) and cost is not None and cost.epochs > 1:
            yield "cost_limit.data", lagrange.cost_limit.data


def training_data(run: Run, stage: Any) -> Iterator[tuple[str, cfg.Mixture]]:
    """Yields (stage and setting, data) of what a stage and all that it is built on are trained on."""
    for other in lineage(run.config.stages, stage):
        for field in TRAINED if isinstance(other, cfg.TrainingStage) else ():
            data = getattr(other, field, None)
            if data is not None:
                yield f"{other.name}.{field}", data


def lineage(stages: Sequence[Any], stage: Any) -> list[Any]:
    """Returns a stage of a run, and all that it is built on."""
    found, pending = [], [(stage, stages)]
    while pending:
        one, others = pending.pop()
        if one is not None and one not in found:
            found.append(one)
            pending += [origin(others, reference) for reference in cfg.references(one).values()]
    return found


def origin(stages: Sequence[Any], reference: str) -> tuple[Any, Sequence[Any]]:
    """Returns the stage that made a model, of this run or of the one that left the folder, and the stages of that run.

    None for a model from elsewhere, or from a version whose configs are not read any more.
    """
    if reference.startswith("path:"):
        file = pathlib.Path(reference.removeprefix("path:")).expanduser().parent / "config.yaml"
        with contextlib.suppress(cfg.ConfigError):
            before = cfg.load_config(file).stages if file.is_file() else (None,)
            return before[-1], before
    return next((stage for stage in stages if stage.name == reference), None), stages


def openings(run: Run, data: cfg.Mixture) -> set[str]:
    """Returns how the conversations of a data set open; nothing where it is gone, which only a finished stage's is."""
    with contextlib.suppress(ValueError):
        return {opening(record) for record in run.records(data)}
    return set()
