"""Overlap of held-out data with prompts that an earlier stage was trained on, found by their text.

Names and paths are not enough: a prompt may be in several files, a file may have several names, and each stage may use
another part of it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.sources import opening
from safe_rlhf_jax.stages.common import Run, described

Openings = dict[str, set[str]]  # the prompts that open the conversations of a data set


def warn_of_overlap(run: Run, stage: cfg.StageBase) -> None:
    """Warns of the share of a stage's held-out data whose prompts it, or a stage it is built on, trains on."""
    known: Openings = {}
    for field, data, (model, stages) in held_out(run, stage):
        if shared := overlap(run, data, training_data(stages, model), known):
            run.warn(
                stage.name,
                f"{field}: {shared}: there, what was trained on is measured. One test_share in all stages keeps every "
                "prompt on one side",
            )


def check_fresh(run: Run, stage: cfg.StageBase) -> None:
    """Checks that a stage's prompts had no part in how the models that it reads were trained, chosen or calibrated.

    Raises:
        ConfigError: Names the prompts and the stage that has read them.
    """
    known: Openings = {}
    before = [one for one in lineage(run.config.stages, stage) if one is not stage]
    uses = [(f"{one.name}.{field}", one, use) for one in before for field, use in one.datasets().items()]
    seen = [(where, use.data) for where, one, use in uses if use.role != "evaluate" or chooses(one)]
    for field, use in stage.datasets().items():
        if shared := overlap(run, use.data, seen, known):
            raise cfg.ConfigError(
                f"{stage.name}: {field}: {shared}: a certificate takes fresh prompts, which had no part in how the "
                "policy and the cost models were trained, chosen or calibrated. Give others; with one test_share in "
                "all stages, split: test has them"
            )


def chooses(stage: Any) -> bool:
    """Says whether a stage chooses its result by its evaluations."""
    return (getattr(stage, "keep_best", None) or "").removeprefix("-").startswith("eval/")


def overlap(run: Run, data: cfg.Mixture, seen: Sequence[tuple[str, cfg.Mixture]], known: "Openings") -> str | None:
    """Describes the records of data that open with a prompt of other data; None if there are none.

    Args:
        run: The run.
        data: The data.
        seen: (stage and setting, data) of the other data.
        known: What has been read of them; filled.
    """
    known |= {repr(part): openings(run, part) for _, part in seen if repr(part) not in known}
    prompts = [opening(record) for record in run.records(data)]
    every = set().union(*(known[repr(part)] for _, part in seen))
    shared = sum(prompt in every for prompt in prompts)
    if not shared:
        return None
    where = ", ".join(where for where, part in seen if not known[repr(part)].isdisjoint(prompts))
    return (
        f"{shared} of {len(prompts)} records ({shared / len(prompts):.0%}) of {described(data)} open with a prompt of "
        f"{where}"
    )


def held_out(run: Run, stage: cfg.StageBase) -> Iterator[tuple[str, cfg.Mixture, tuple[Any, Sequence[Any]]]]:
    """Yields (setting, data, the stage whose training it must not overlap, the stages of its run) of held-out data.

    Calibration data of a limit counts if its cost model trains for more than one epoch: from the second pass on, pairs
    are memorised (docs/results.md).
    """
    stages = run.config.stages
    for field, use in stage.datasets().items():
        if use.role == "evaluate":
            yield field, use.data, (stage, stages)
        if use.role == "calibrate":
            cost, others = origin(stages, stage.scorers.get(use.signal, ""))
            if cost is not None and any((one.passes or 0) > 1 for one in cost.datasets().values()):
                yield field, use.data, (cost, others)


def training_data(stages: Sequence[Any], stage: cfg.StageBase) -> list[tuple[str, cfg.Mixture]]:
    """Returns (stage and setting, data) of the training data of a stage of a run and of all it is built on."""
    uses = [(f"{one.name}.{field}", use) for one in lineage(stages, stage) for field, use in one.datasets().items()]
    return [(where, use.data) for where, use in uses if use.role == "train"]


def lineage(stages: Sequence[Any], stage: cfg.StageBase) -> list[Any]:
    """Returns a stage of a run, and all that it is built on; of judges, only its own."""
    found, pending = [], [(stage, stages)]
    while pending:
        one, others = pending.pop()
        if one is not None and one not in found:
            found.append(one)
            uses = [use for use in one.models().values() if one is stage or not use.judge]
            pending += [origin(others, use.reference) for use in uses]
    return found


def origin(stages: Sequence[Any], reference: str) -> tuple[Any, Sequence[Any]]:
    """Returns the stage that made a model, of this run or of the one that wrote the folder, and that run's stages.

    None for a model from elsewhere, or from a version whose configs are no longer supported.
    """
    if reference.startswith("path:"):
        file = storage.expanded(reference.removeprefix("path:")).parent / "config.yaml"
        with contextlib.suppress(cfg.ConfigError):
            before = cfg.load_config(file).stages if storage.is_file(file) else (None,)
            return before[-1], before
    return next((stage for stage in stages if stage.name == reference), None), stages


def openings(run: Run, data: cfg.Mixture) -> set[str]:
    """Returns the prompts that open the conversations of a data set; empty if it is gone (only in a finished stage)."""
    with contextlib.suppress(ValueError):
        return {opening(record) for record in run.records(data)} - {""}
    return set()
