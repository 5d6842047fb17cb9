"""Inputs of a stage: the models and data sets that it names, and their use."""

import dataclasses
from typing import Literal

from safe_rlhf_jax.config.data import Mixture

Makes = Literal["policy", "reward", "cost"]
Reads = Literal["sft", "reward", "cost", "prompts"]  # demonstrations, preferences, safety labels, prompts


@dataclasses.dataclass(frozen=True)
class ModelUse:
    """A model that a stage reads."""

    reference: str  # "preset:…", "path:…", "hf:…", or an earlier stage
    accepts: tuple[Makes, ...] = ("policy",)  # required kind of an earlier stage's model
    scores: Literal["reward", "cost"] | None = None  # score type that it is opened with; None: a language model
    as_stored: bool = False  # its scores are used as stored: a new head is refused
    may_be_new: bool = False  # may be a preset
    generates: bool = False  # it writes responses
    alike: bool = False  # it shares one compiled program, or parameters, with the other models that are `alike`
    judge: bool = False  # it scores results, and nothing is trained on it
    may_be_function: bool = False  # may be "function:MODULE:NAME"
    pairs: bool = False  # a judge that sees two responses
    in_training: bool = False  # a function that is called in training, with the records of its stage

    @property
    def is_function(self) -> bool:
        """It is a Python function."""
        return self.may_be_function and self.reference.startswith("function:")


@dataclasses.dataclass(frozen=True)
class DataUse:
    """A data set that a stage reads."""

    data: Mixture
    reads: Reads
    max_length: int  # tokens of a text, or of a prompt
    role: Literal["train", "evaluate", "calibrate", "sample"]
    rows: int | None = None  # drawn per step; None: it is read from the first record to the last
    rows_are: str = "batch_size"  # the setting, or the product of settings, of `rows`
    factor: int = 1  # rows over batch_size
    at_most: int | None = None  # records to draw from
    passes: float | None = None  # over the data
    signal: str = ""  # whose limit is calibrated on it


def scorer(reference: str, kind: Literal["reward", "cost"]) -> ModelUse:
    """Returns the use of a reward or cost model with its stored scores."""
    return ModelUse(reference, (kind,), kind, as_stored=True)
