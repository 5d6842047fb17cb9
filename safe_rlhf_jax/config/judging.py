"""Schema of outside judges: models that score results and that training never sees."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pydantic
from pydantic import Field

from safe_rlhf_jax.config.data import Schema
from safe_rlhf_jax.config.uses import ModelUse, scorer

SIGNAL = re.compile(r"(reward|cost)/[A-Za-z0-9_\-]+")


def signals_are_named(value: dict[str, Any]) -> dict[str, Any]:
    """Checks that the keys of judges are kinds with a name."""
    for signal in value:
        if not SIGNAL.fullmatch(signal):
            raise ValueError(f"{signal!r} is no signal of a judge; write reward/NAME or cost/NAME")
    return value


class Judged(Schema):
    """Judges of a stage's responses."""

    added: ClassVar[frozenset[str]] = frozenset({"judges"})
    # {reward/NAME or cost/NAME: an earlier stage, path:…, hf:… or function:MODULE:NAME}: models that score results, and
    # on which nothing is trained. A cost is the logit of "unsafe".
    judges: dict[str, str] = Field(default_factory=dict)

    _signals = pydantic.field_validator("judges")(signals_are_named)

    def judge_models(self) -> dict[str, ModelUse]:
        """Returns the judges, by field."""
        uses = {
            signal: scorer(model, "reward" if signal.startswith("reward/") else "cost")
            for signal, model in self.judges.items()
        }
        return {
            f"judges.{signal}": dataclasses.replace(use, judge=True, may_be_function=True)
            for signal, use in uses.items()
        }

    def inside_judges(self, scorers: dict[str, str]) -> Iterator[str]:
        """Yields why a judge is no outside judge: it is a scorer of the stage itself."""
        for signal, model in self.judges.items():
            for own in (own for own, other in scorers.items() if other == model):
                yield (
                    f"judges.{signal} names {model!r}, which is the stage's own {own} model; a judge is a model "
                    "that training never saw"
                )
