"""Schemas of what stages share that sample several responses to each prompt and choose or weigh them.

Sources: [llama2] Touvron et al. 2023, arXiv 2307.09288, section 3.2.3; [MoCAN] Huang et al. 2024, arXiv 2405.19544.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from safe_rlhf_jax.config.algorithm import CalibratedLimit, Lagrange
from safe_rlhf_jax.config.data import Mixture, ReadOnce, Schema, Single, parts_of, source
from safe_rlhf_jax.config.messages import did_you_mean

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
    constrained_groups: tuple[str, ...] | None = None  # values of `group_field` the limit is about; null: all prompts
    responses_per_prompt: PositiveInt = 8  # n
    max_prompt_length: PositiveInt = 256  # tokens
    max_response_length: PositiveInt = 256  # tokens
    long_prompts: Literal["drop", "truncate_left"] = "drop"
    temperature: PositiveFloat = 1.0

    @pydantic.field_validator("responses_per_prompt")
    @classmethod
    def several(cls, value: int) -> int:
        """One response leaves nothing to choose or to weigh."""
        if value < 2:
            raise ValueError("must be 2 or more: responses to one prompt are compared")
        return value

    @pydantic.model_validator(mode="after")
    def limit_has_what_it_needs(self) -> "SampledPrompts":
        """Groups need the field that holds them."""
        if self.constrained_groups is not None and self.group_field is None:
            raise ValueError("constrained_groups needs group_field, which holds the group")
        return self

    def idle(self) -> dict[str, str]:
        """A limit, and the prompts it is about, without a cost."""
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


class Rounds(SampledPrompts):
    """Rejection sampling: choose the best feasible response, train on it, and again from the new policy."""

    rounds: PositiveInt = 3
    prompts_per_round: PositiveInt | None = None  # the next so many of a shuffled order; null: as many as there are
    prompt_batch_size: PositiveInt = 16  # prompts whose responses are sampled at once
    train_on: Literal["this_round", "all_rounds"] = "this_round"  # selected responses; all: as [llama2] from its third
    eval_prompts: Single | None = None
    epochs: PositiveFloat = 1.0  # passes over them, in each round
    batch_size: PositiveInt = 32  # responses per optimizer step


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


def multipliers(stage: Any) -> dict[str, str]:
    """Returns {field: dual stage whose multiplier is a λ at the start} of a stage."""
    if stage.kind != "rl":
        return {}
    constraints = {"lagrange": stage.algorithm.lagrange}
    constraints |= {f"constraints.{name}": one for name, one in stage.algorithm.constraints.items()}
    return {f"algorithm.{field}.init": one.init for field, one in constraints.items() if isinstance(one.init, str)}


def check_multipliers(where: str, stage: Any, earlier: Sequence[Any]) -> None:
    """A λ at the start is a number or an earlier dual stage's, and that stage solves the same constraint."""
    duals = {other.name: other for other in earlier if other.kind == "dual"}
    for field, name in multipliers(stage).items():
        if name not in duals:
            raise ValueError(
                f"{where}: {field} names {name!r}, which is no earlier stage of kind dual ({sorted(duals)}); give a "
                f"number or such a stage{did_you_mean(name, duals)}"
            )
        constraint = field.split(".")[2] if field.startswith("algorithm.constraints.") else None
        model = stage.cost_models.get(constraint) if constraint else stage.cost_model
        lagrange = stage.algorithm.constraints[constraint] if constraint else stage.algorithm.lagrange
        for what, (theirs, ours) in problems(duals[name], stage, model, lagrange).items():
            if theirs != ours:
                raise ValueError(
                    f"{where}: {field} names {name!r}, whose {what} is {theirs!r}, but here it is {ours!r}: λ* would "
                    "be that of another problem"
                )
        if lagrange.measure != "mean" or lagrange.group_limits is not None:
            raise ValueError(f"{where}: {field} names {name!r}, which solves one limit of the mean cost, not this one")


def problems(dual: Any, stage: Any, cost_model: str | None, lagrange: Lagrange) -> dict[str, tuple[Any, Any]]:
    """Returns {what defines the problem that λ* solves: as the dual stage has it, and as the RL stage does}.

    Of the prompts it is where they come from: a few hundred of them are enough for λ*.
    """
    same = ("init_from", "reward_model", "temperature", "max_prompt_length", "max_response_length", "long_prompts")
    found = {name: (getattr(dual, name), getattr(stage, name)) for name in same}
    found |= {name: (getattr(dual, name), getattr(lagrange, name)) for name in ("cost_limit", "constrained_groups")}
    found |= {"cost_model": (dual.cost_model, cost_model), "kl_coeff": (dual.kl_coeff, stage.algorithm.kl_coeff)}
    found |= {"prompts": (prompt_sources(dual), prompt_sources(stage))}
    return found | ({"group_field": (dual.group_field, stage.group_field)} if dual.constrained_groups else {})


def prompt_sources(stage: Any) -> list[tuple[Any, ...]]:
    """Returns which parts of which sources the prompts of a stage are.

    Whatever number of them it takes, unless there are several: then the numbers are their proportions.
    """
    parts = parts_of(stage.prompts)
    found = [(source(part.name), part.split, part.test_share, part.format, part.fields, part.weight) for part in parts]
    return found if len(parts) == 1 else [(part.name, part.limit, *one) for part, one in zip(parts, found, strict=True)]


def check_best_of(where: str, stage: Any) -> None:
    """`best_of` names policies of the stage, with responses to choose among."""
    if stage.kind != "evaluate":
        return
    for name, number in stage.best_of.items():
        if name not in stage.policies:
            raise ValueError(f"{where}: best_of names {name!r}, which is none of its policies {list(stage.policies)}")
        if number < 2:
            raise ValueError(f"{where}: best_of.{name} {number}: must be 2 or more, there is nothing to choose")
    if stage.best_of_cost_limit is not None and not stage.best_of:
        raise ValueError(f"{where}: best_of_cost_limit {stage.best_of_cost_limit} needs best_of")
