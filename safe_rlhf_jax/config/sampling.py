"""Schemas shared by stages that sample several responses per prompt, and choose or weigh them.

Sources: [llama2] Touvron et al. 2023, arXiv 2307.09288, section 3.2.3; [MoCAN] Huang et al. 2024, arXiv 2405.19544.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from safe_rlhf_jax.config.algorithm import CalibratedLimit, Lagrange
from safe_rlhf_jax.config.data import Mixture, ReadOnce, Schema, Single, parts_of, source
from safe_rlhf_jax.config.uses import DataUse, ModelUse, scorer

OTHER_DISTRIBUTION = dict.fromkeys(
    ("top_k", "top_p", "min_p", "repetition_penalty", "greedy", "do_sample"),
    "sampling by anything but temperature would train on another distribution than the policy's own",
)


class SampledPrompts(Schema):
    """Prompts, n responses to each, the models that score them, and the limit of their cost."""

    refused: ClassVar[dict[str, str]] = OTHER_DISTRIBUTION
    prompts: Mixture
    reward_model: str
    cost_model: str | None = None
    cost_limit: float | CalibratedLimit = 0.0  # d, cost-model units; 0 is the cost model's own boundary [paper]
    group_field: str | None = None  # field of a record that names the prompt's group
    constrained_groups: tuple[str, ...] | None = None  # values of `group_field` under the limit; null: all prompts
    responses_per_prompt: PositiveInt = 8  # n
    max_prompt_length: PositiveInt = 256  # tokens
    max_response_length: PositiveInt = 256  # tokens
    long_prompts: Literal["drop", "truncate_left"] = "drop"
    temperature: PositiveFloat = 1.0

    @pydantic.field_validator("responses_per_prompt")
    @classmethod
    def at_least_two(cls, value: int) -> int:
        """Checks that there are at least two responses to choose from or to weigh."""
        if value < 2:
            raise ValueError("must be 2 or more: responses to one prompt are compared")
        return value

    @pydantic.model_validator(mode="after")
    def limit_has_what_it_needs(self) -> "SampledPrompts":
        """Checks that groups have their field."""
        if self.constrained_groups is not None and self.group_field is None:
            raise ValueError("constrained_groups needs group_field, which holds the group")
        return self

    def idle(self) -> dict[str, str]:
        """A limit and its prompts, without a cost."""
        limits = ("cost_limit", "constrained_groups") if self.cost_model is None else ()
        return super().idle() | dict.fromkeys(limits, "it limits the cost of cost_model, which is not given")

    @property
    def scorers(self) -> dict[str, str]:
        """{signal: model}."""
        return {"reward": self.reward_model} | ({"cost": self.cost_model} if self.cost_model else {})

    @property
    def limits(self) -> dict[str, Lagrange]:
        """{cost signal: its limit}, in the form that stages with constraints share."""
        if self.cost_model is None:
            return {}
        return {"cost": Lagrange(cost_limit=self.cost_limit, constrained_groups=self.constrained_groups)}

    def limit_field(self, signal: str, name: str) -> str:
        """Returns the path of a setting of the limit."""
        del signal  # there is one
        return name

    def models(self) -> dict[str, ModelUse]:
        """Returns the models that score, by field."""
        found = {"reward_model": scorer(self.reward_model, "reward")}
        return found | ({"cost_model": scorer(self.cost_model, "cost")} if self.cost_model else {})

    def datasets(self) -> dict[str, DataUse]:
        """Returns the prompts, and the calibration data of a limit, by field."""
        prompts = DataUse(self.prompts, "prompts", self.max_prompt_length, "sample")
        return {"prompts": prompts} | calibrations(self, self.max_prompt_length + self.max_response_length)


def calibrations(stage: Any, max_length: int) -> dict[str, DataUse]:
    """Returns the calibration data of the limits of a stage, by field."""
    return {
        f"{stage.limit_field(signal, 'cost_limit')}.data": DataUse(
            one.cost_limit.data, "cost", max_length, "calibrate", signal=signal
        )
        for signal, one in stage.limits.items()
        if isinstance(one.cost_limit, CalibratedLimit)
    }


class Round(SampledPrompts):
    """A round of rejection sampling: choose the best feasible response, train on it."""

    rounds: Literal[1] = 1  # of a config: that many stages, each from the one before (config.repetition)
    prompts_per_round: PositiveInt | None = None  # number taken from a shuffled order; null: all
    prompt_batch_size: PositiveInt = 16  # prompts whose responses are sampled at once
    # Selected responses: of this round, or of all that it goes on from too, as [llama2] from its third version.
    train_on: Literal["this_round", "all_rounds"] = "this_round"
    eval_prompts: Single | None = None
    epochs: PositiveFloat = 1.0  # passes over them, in each round
    batch_size: PositiveInt = 32  # responses per optimizer step

    def datasets(self) -> dict[str, DataUse]:
        """Returns the training prompts and the held-out ones, by field."""
        drawn = dataclasses.replace(
            super().datasets()["prompts"], role="train", rows=self.batch_size, at_most=self.prompts_per_round
        )
        found = super().datasets() | {"prompts": drawn}
        if self.eval_prompts is not None:
            found["eval_prompts"] = DataUse(self.eval_prompts, "prompts", self.max_prompt_length, "evaluate")
        return found


class DualFields(SampledPrompts):
    """One-shot dual: λ* from samples of the reference."""

    prompts: ReadOnce
    cost_model: str
    init_from: str  # the reference: as in other stages
    responses_per_prompt: PositiveInt = 16  # n
    batch_size: PositiveInt = 16  # prompts whose responses are sampled at once
    kl_coeff: PositiveFloat = 0.01  # β, that of the algorithm the multiplier is for
    target: Literal["safe_rlhf", "plain"] = "safe_rlhf"  # KL in both signals (ppo_lag, rloo_lag); R − λC (p3o_lag)
    max_multiplier: PositiveFloat = 5.0  # λ* beyond it is cut off there
    seed: NonNegativeInt | None = None  # the run's seed by default


def problems(dual: Any, stage: Any, cost_model: str | None, lagrange: Lagrange) -> dict[str, tuple[Any, Any]]:
    """Returns {setting that defines the problem of λ*: (value in the dual stage, value in the RL stage)}.

    Prompts are compared by their source: a few hundred of them are enough for λ*.
    """
    same = ("reward_model", "temperature", "max_prompt_length", "max_response_length", "long_prompts")
    found = {name: (getattr(dual, name), getattr(stage, name)) for name in same}
    found["init_from" if stage.reference is None else "reference"] = dual.init_from, stage.reference or stage.init_from
    found |= {name: (getattr(dual, name), getattr(lagrange, name)) for name in ("cost_limit", "constrained_groups")}
    found |= {"cost_model": (dual.cost_model, cost_model), "kl_coeff": (dual.kl_coeff, stage.algorithm.kl_coeff)}
    found |= {"prompts": (prompt_sources(dual), prompt_sources(stage))}
    return found | ({"group_field": (dual.group_field, stage.group_field)} if dual.constrained_groups else {})


def prompt_sources(stage: Any) -> list[tuple[Any, ...]]:
    """Returns the sources, and their parts, of a stage's prompts.

    Their number does not matter, unless there are several sources: then the numbers are the proportions.
    """
    parts = parts_of(stage.prompts)
    found = [(source(part.name), part.split, part.test_share, part.format, part.fields, part.weight) for part in parts]
    return found if len(parts) == 1 else [(part.name, part.limit, *one) for part, one in zip(parts, found, strict=True)]
