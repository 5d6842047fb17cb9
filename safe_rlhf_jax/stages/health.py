"""Warnings about reward and cost models, given after their training and in stages that use them."""

import logging
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.evaluation.health import doubts
from safe_rlhf_jax.stages.common import Run

LOGGER = logging.getLogger(__name__)


def warn_of_model(name: str, health: dict[str, Any] | None) -> None:
    """Warns of problems of a reward or cost model that has just been trained."""
    for problem in doubts(health):
        LOGGER.warning(f"{name}: warning: {problem}")


def warn_of_scorers(run: Run, stage: cfg.StageBase) -> None:
    """Warns of problems of the reward and cost models of this run that a stage scores with.

    There is no warning about models from elsewhere, whose health is unknown.
    """
    for field, use in stage.models().items():
        result = run.result(use.reference) if use.as_stored and use.reference in run.hashes else None
        if result is not None and "health" in result:
            warn_of_model(f"{stage.name}: {field} {use.reference!r}", result["health"])
