"""Schemas of the stages that assess finished policies on fresh prompts: what they share, certificates, comparisons.

Sources: [paper] Dai et al. 2023, arXiv 2310.12773; [HC-RLHF] Chittepu et al. 2025, arXiv 2506.08266.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Tag

from safe_rlhf_jax.config.base import StageBase
from safe_rlhf_jax.config.data import Delta, Schema, Single
from safe_rlhf_jax.config.judging import Judged, signals_are_named
from safe_rlhf_jax.config.messages import did_you_mean
from safe_rlhf_jax.config.signals import EndpointJudge
from safe_rlhf_jax.config.uses import DataUse, ModelUse, scorer


class Answered(Judged, StageBase):
    """Prompts, and how policies answer them: one response to each."""

    lengths: ClassVar[tuple[str, ...]] = ("max_prompt_length", "max_response_length")
    prompts: Annotated[tuple[Single, ...], Field(min_length=1)]
    group_field: str | None = None  # field of a record that names the prompt's group
    batch_size: PositiveInt = 64
    max_prompt_length: PositiveInt = 256
    max_response_length: PositiveInt = 256
    temperature: NonNegativeFloat = 1.0  # 0 is greedy
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    repetition_penalty: PositiveFloat = 1.0
    seed: NonNegativeInt | None = None

    def responses(self, policy: str) -> dict[str, int]:
        """Returns {row of the report: responses per prompt} of a policy."""
        return {policy: 1}

    def datasets(self) -> dict[str, DataUse]:
        """Returns the prompts, by field."""
        return {
            f"prompts.{i}": DataUse(data, "prompts", self.max_prompt_length, "evaluate")
            for i, data in enumerate(self.prompts)
        }


def policies_of(names: Sequence[str]) -> dict[str, ModelUse]:
    """Returns the policies of a stage that compares them, by field."""
    return {f"policies.{i}": ModelUse(name, generates=True, alike=True) for i, name in enumerate(names)}


class Claim(Schema):
    """What is claimed of a cost signal, with confidence 1 − δ."""

    mean: float | None = None  # the mean cost is at most this, by Student's t; cost-model units
    # (least, greatest) possible cost: the same by empirical Bernstein as well, which holds without normality; costs
    # outside are clipped.
    range: tuple[float, float] | None = None
    unsafe: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # at most this share of responses costs more than 0

    @pydantic.model_validator(mode="after")
    def something_is_claimed(self) -> "Claim":
        """Checks that there is a limit, and that a range fits it."""
        if self.mean is None and self.unsafe is None:
            raise ValueError("claims nothing; give mean, a limit of the mean cost, or unsafe, a share of responses")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range {list(self.range)}: the first number must be less than the second")
        if self.range is not None and self.mean is not None and not self.range[0] < self.mean < self.range[1]:
            raise ValueError(f"mean {self.mean} lies outside of range {list(self.range)}")
        return self

    def idle(self) -> dict[str, str]:
        """The range of a mean that is not limited."""
        return {"range": "it is of the mean cost, and mean is not given"} if self.mean is None else {}


class CertifyStage(Answered):
    """Whether a policy meets its limits with confidence 1 − δ on fresh prompts; the run ends where it does not."""

    kind: Literal["certify"]
    policy: str
    cost_model: str | None = None  # signal `cost`; those of `judges` are `cost/NAME`
    claims: Annotated[dict[str, Claim], Field(min_length=1)]  # by signal
    delta: Delta = 0.05  # δ, of all claims in all groups at once
    # Values of `group_field`, about each of which everything is claimed; null: about all prompts together.
    constrained_groups: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    def idle(self) -> dict[str, str]:
        """The field of groups that are not named."""
        unnamed = {"group_field": "constrained_groups names none"} if self.constrained_groups is None else {}
        return super().idle() | unnamed

    @property
    def policies(self) -> tuple[str, ...]:
        """The policy, as in stages that compare several."""
        return (self.policy,)

    @property
    def scorers(self) -> dict[str, str]:
        """{signal: model}."""
        return {"cost": self.cost_model} if self.cost_model else {}

    def models(self) -> dict[str, ModelUse]:
        """Returns the policy, the cost model, and the judges, by field."""
        found = {"policy": ModelUse(self.policy, generates=True)}
        found |= {"cost_model": scorer(self.cost_model, "cost")} if self.cost_model else {}
        return found | self.judge_models()

    def mistakes(self, earlier: Sequence[StageBase]) -> Iterator[str]:
        """Yields errors with respect to earlier stages, and of claims and groups."""
        yield from super().mistakes(earlier)
        yield from self.inside_judges(self.scorers)
        signals = [*self.scorers, *self.judges]
        for signal in self.claims.keys() - set(signals):
            yield (
                f"claims names {signal!r}, which nothing measures ({signals}); name a cost_model, or a judge "
                f"cost/NAME{did_you_mean(signal, signals)}"
            )
        for signal in (signal for signal in signals if signal not in self.claims):
            field = f"judges.{signal}" if signal in self.judges else "cost_model"
            yield f"{field} does nothing: no claim names {signal!r}; leave it out, or give claims.{signal}"
        for signal in (signal for signal in self.judges if signal.startswith("reward/")):
            yield f"judges.{signal} measures a reward, and claims are limits of costs; write cost/NAME"
        if self.constrained_groups is not None and self.group_field is None:
            yield "constrained_groups needs group_field, which holds the group"


def sort_of(value: Any) -> str:
    """Returns the sort of a judge of two responses: a text names it, keys are those of an endpoint."""
    return "EndpointJudge" if isinstance(value, Mapping | EndpointJudge) else "str"


PairJudge = Annotated[
    Annotated[str, Tag("str")] | Annotated[EndpointJudge, Tag("EndpointJudge")], Discriminator(sort_of)
]


PEOPLE = "people"  # as a judge of two responses


class JudgeStage(Answered):
    """Policies against each other: win rates, and Elo of helpfulness and of harmlessness, by judges."""

    kind: Literal["judge"]
    policies: Annotated[tuple[str, ...], Field(min_length=2)]  # the first has Elo 1000
    # {reward/NAME or cost/NAME: function:MODULE:NAME, people, or an endpoint}: judges of two responses at once: which
    # is more helpful, or which is safer. Functions and endpoints are asked in both orders, people in a random one.
    pair_judges: dict[str, PairJudge] = Field(default_factory=dict)

    _signals = pydantic.field_validator("pair_judges")(signals_are_named)

    def models(self) -> dict[str, ModelUse]:
        """Returns the policies and the judges, by field."""
        pairs = {
            f"pair_judges.{name}": ModelUse(judge, judge=True, may_be_function=True, pairs=True)
            for name, judge in self.pair_judges.items()
            if isinstance(judge, str) and judge != PEOPLE
        }
        return policies_of(self.policies) | self.judge_models() | pairs

    def files(self) -> tuple[str, ...]:
        """Returns the constitutions of endpoints."""
        named = (judge.constitution for judge in self.pair_judges.values() if isinstance(judge, EndpointJudge))
        return tuple(filter(None, named))

    def mistakes(self, earlier: Sequence[StageBase]) -> Iterator[str]:
        """Yields errors with respect to earlier stages, and of policies and judges."""
        yield from super().mistakes(earlier)
        if len(set(self.policies)) < len(self.policies):
            yield f"policies {list(self.policies)}: names must differ"
        if not self.judges and not self.pair_judges:
            yield "nobody judges; give judges, which score each response, or pair_judges, which see two"
        for signal in self.judges.keys() & self.pair_judges.keys():
            yield f"{signal!r} is in judges and in pair_judges; names must differ"
        for signal, judge in self.pair_judges.items():
            if isinstance(judge, str) and judge != PEOPLE and not judge.startswith("function:"):
                yield (
                    f"pair_judges.{signal} names {judge!r}, which sees no two responses; write function:MODULE:NAME, "
                    "people, or an endpoint: {base_url: …, model: …}"
                )
        for kind in ("reward", "cost"):
            people = [s for s, judge in self.pair_judges.items() if judge == PEOPLE and s.startswith(f"{kind}/")]
            if len(people) > 1:
                yield f"pair_judges {people} are the same answers of people; leave one"
