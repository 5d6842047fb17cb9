"""Schemas of the stages that sample: RL, rejection sampling, one-shot dual, evaluation.

Sources: [ref] PKU-Alignment/safe-rlhf@82743cc scripts; [paper] Dai et al. 2023, arXiv 2310.12773.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from safe_rlhf_jax.config.algorithm import AlgorithmConfig, Lagrange
from safe_rlhf_jax.config.assessing import Answered, policies_of
from safe_rlhf_jax.config.base import OptimizerConfig, StageBase, TrainingStage, indivisible
from safe_rlhf_jax.config.data import Mixture, ReadOnce, Single
from safe_rlhf_jax.config.judging import Judged
from safe_rlhf_jax.config.messages import did_you_mean
from safe_rlhf_jax.config.sampling import OTHER_DISTRIBUTION, DualFields, Round, calibrations, problems
from safe_rlhf_jax.config.signals import EndpointSignal, FunctionSignal, HostSignals
from safe_rlhf_jax.config.uses import DataUse, Makes, ModelUse, scorer


class RLStage(Judged, TrainingStage):
    """On-policy training: PPO, PPO-Lagrangian and their relatives."""

    refused: ClassVar[dict[str, str]] = OTHER_DISTRIBUTION
    added: ClassVar[frozenset[str]] = frozenset({"signals", "reference"})
    makes: ClassVar[Makes] = "policy"
    held_out: ClassVar[str] = "eval_prompts"
    lengths: ClassVar[tuple[str, ...]] = ("max_prompt_length", "max_response_length")
    kind: Literal["rl"]
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reference: str | None = None  # policy that KL is measured from; `init_from` by default
    reward_model: str | None = None  # required, unless `signals` has a reward
    cost_model: str | None = None  # signal `cost`, limited by algorithm.lagrange; without a constraint only reported
    cost_models: dict[str, str] = Field(
        default_factory=dict
    )  # several: signals `cost/<name>`, by algorithm.constraints.<name>
    # {reward, cost or cost/NAME: a function or an endpoint}, asked on the host between sampling and learning
    signals: HostSignals = Field(default_factory=dict)
    # {signal: initial model of its critic}; by default the scorer, or the actor if the scorer has its own tokenizer or
    # template, or is a function or an endpoint.
    critics: dict[str, str] = Field(default_factory=dict)
    prompts: Mixture
    eval_prompts: Single | None = None
    ptx: Mixture | None = None
    group_field: str | None = None  # field of a record that names the prompt's group
    steps: PositiveInt = 200  # iterations: one rollout batch each
    batch_size: PositiveInt = 16  # prompts per iteration [ref]
    responses_per_prompt: PositiveInt = 1  # [ref]
    max_prompt_length: PositiveInt = 256  # tokens
    max_response_length: PositiveInt = 256  # tokens
    long_prompts: Literal["drop", "truncate_left"] = "drop"
    temperature: PositiveFloat = 1.0
    fuse: bool = True  # one program per iteration; False compiles generation and learning apart
    actor: OptimizerConfig = OptimizerConfig(lr=1e-5, weight_decay=0.01)  # [ref]
    critic: OptimizerConfig = OptimizerConfig(lr=5e-6, schedule="constant")  # [ref]

    def idle(self) -> dict[str, str]:
        """Demonstrations without a weight, and the limit of a missing cost."""
        reasons = super().idle()
        if self.algorithm.ptx_coeff == 0:
            reasons["ptx"] = "algorithm.ptx_coeff is 0"
        if "cost" not in self.scored:
            reasons["algorithm.lagrange"] = "it limits the cost of cost_model, which is not given"
        if self.algorithm.kl.refresh_every or self.algorithm.kl.average:
            reasons["reference"] = "the actor makes the reference (algorithm.kl.refresh_every or average)"
        if self.eval_prompts is None:
            reasons["judges"] = "they score responses to eval_prompts, which are not given"
        return reasons

    @property
    def scorers(self) -> dict[str, str]:
        """{signal: model}."""
        single = {"reward": self.reward_model, "cost": self.cost_model}
        named = {f"cost/{name}": model for name, model in self.cost_models.items()}
        return {signal: model for signal, model in single.items() if model is not None} | named

    @property
    def scored(self) -> tuple[str, ...]:
        """All signals: those of models, and those from the host."""
        return (*self.scorers, *self.signals)

    @property
    def limits(self) -> dict[str, Lagrange]:
        """{cost signal: its constraint}, for algorithms that have constraints."""
        single = {"cost": self.algorithm.lagrange} if "cost" in self.scored else {}
        return single | {f"cost/{name}": lagrange for name, lagrange in self.algorithm.constraints.items()}

    @property
    def rows(self) -> int:
        """Responses of an iteration."""
        return self.batch_size * self.responses_per_prompt

    @property
    def minibatches(self) -> int:
        """Optimizer steps that share them."""
        return self.algorithm.minibatches

    def limit_field(self, signal: str, name: str) -> str:
        """Returns the path of a setting of a constraint."""
        of = "lagrange" if signal == "cost" else f"constraints.{signal.removeprefix('cost/')}"
        return f"algorithm.{of}.{name}"

    def models(self) -> dict[str, ModelUse]:
        """Returns the policy, the scorers, and the initial models of critics, by field."""
        found = {"init_from": ModelUse(self.init_from, may_be_new=True, generates=True, alike=True)}
        if self.reference is not None:
            found["reference"] = ModelUse(self.reference, alike=True)
        if self.reward_model is not None:
            found["reward_model"] = scorer(self.reward_model, "reward")
        if self.cost_model is not None:
            found["cost_model"] = scorer(self.cost_model, "cost")
        found |= {f"cost_models.{name}": scorer(model, "cost") for name, model in self.cost_models.items()}
        for signal, model in self.critics.items():
            kind: Literal["reward", "cost"] = "reward" if signal == "reward" else "cost"
            found[f"critics.{signal}"] = ModelUse(model, ("policy", "reward", "cost"), kind)
        for signal, one in self.signals.items():
            if isinstance(one, FunctionSignal):
                use = scorer(one.reference, "reward" if signal == "reward" else "cost")
                found[f"signals.{signal}"] = dataclasses.replace(use, may_be_function=True, in_training=True)
        return found | self.judge_models()

    def files(self) -> tuple[str, ...]:
        """Returns the constitutions of endpoints."""
        named = (one.constitution for one in self.signals.values() if isinstance(one, EndpointSignal))
        return tuple(filter(None, named))

    def datasets(self) -> dict[str, DataUse]:
        """Returns prompts, demonstrations for PTX, and calibration data of limits, by field."""
        total, length = self.max_prompt_length + self.max_response_length, self.max_prompt_length
        found = {"prompts": DataUse(self.prompts, "prompts", length, "train", rows=self.batch_size)}
        if self.eval_prompts is not None:
            found["eval_prompts"] = DataUse(self.eval_prompts, "prompts", length, "evaluate")
        if self.ptx is not None:
            found["ptx"] = DataUse(
                self.ptx, "sft", total, "train", rows=self.rows, rows_are="batch_size·responses_per_prompt",
                factor=self.responses_per_prompt,
            )  # fmt: skip
        return found | calibrations(self, total)

    def multipliers(self) -> dict[str, str]:
        """Returns the dual stages whose multiplier is an initial λ, by field."""
        constraints = {"cost": self.algorithm.lagrange}
        constraints |= {f"cost/{name}": one for name, one in self.algorithm.constraints.items()}
        return {
            self.limit_field(signal, "init"): one.init
            for signal, one in constraints.items()
            if isinstance(one.init, str)
        }

    def mistakes(self, earlier: Sequence[StageBase]) -> Iterator[str]:
        """Yields errors with respect to earlier stages, and of constraints and batches."""
        yield from super().mistakes(earlier)
        functions = {signal: getattr(one, "reference", "") for signal, one in self.signals.items()}
        yield from self.inside_judges(self.scorers | functions)
        yield from self.wrong_multipliers(earlier)
        if "reward" not in self.scored:
            yield "reward_model is required, and missing; a function or an endpoint is named by signals.reward"
        for signal in self.scorers.keys() & self.signals.keys():
            field = "cost_models." + signal.partition("/")[2] if "/" in signal else f"{signal}_model"
            yield f"signals.{signal} and {field} are one signal; leave out one of them, or give it another name"
        if self.lora is not None and self.lora.dropout:
            yield (
                f"lora.dropout {self.lora.dropout}: the ratio of new to old probabilities would measure the dropout; "
                "leave it out"
            )
        parts = self.algorithm.minibatches * self.microbatches
        yield from indivisible("batch_size·responses_per_prompt =", self.rows, "minibatches·microbatches =", parts)
        for signal in self.critics.keys() - set(self.scored):
            yield f"critics names {signal!r}, which no model scores ({sorted(self.scored)})"
        if self.algorithm.lagrange.of == "reward":
            yield "algorithm.lagrange limits the cost of cost_model; limit the reward by algorithm.constraints.NAME"
        for signal, lagrange in self.limits.items():
            name = signal.removeprefix("cost/")
            if lagrange.of == "reward" and signal in self.scored and signal != "cost":
                field = f"cost_models.{name}" if signal in self.scorers else f"signals.{signal}"
                yield f"algorithm.constraints.{name} limits the reward; name no model for it in {field}"
            if lagrange.of == "cost" and signal not in self.scored:
                yield (
                    f"algorithm.constraints.{name} limits a cost that no model measures; name its model in "
                    f"cost_models.{name} (there are {sorted(self.cost_models)}), or a function or an endpoint in "
                    f"signals.{signal}"
                )
            for name in ("constrained_groups", "group_limits"):
                if getattr(lagrange, name) is not None and self.group_field is None:
                    yield f"{self.limit_field(signal, name)} needs group_field, which holds the group"
        if self.algorithm.ptx_coeff > 0 and self.ptx is None:
            yield f"algorithm.ptx_coeff {self.algorithm.ptx_coeff} needs ptx data"

    def wrong_multipliers(self, earlier: Sequence[StageBase]) -> Iterator[str]:
        """Yields why an initial λ is neither a number nor that of an earlier dual stage of the same constraint."""
        duals = {other.name: other for other in earlier if isinstance(other, DualStage)}
        for field, name in self.multipliers().items():
            if name not in duals:
                yield (
                    f"{field} names {name!r}, which is no earlier stage of kind dual ({sorted(duals)}); give a number "
                    f"or such a stage{did_you_mean(name, duals)}"
                )
                continue
            constraint = field.split(".")[2] if field.startswith("algorithm.constraints.") else None
            model = self.cost_models.get(constraint) if constraint else self.cost_model
            lagrange = self.algorithm.constraints[constraint] if constraint else self.algorithm.lagrange
            for what, (theirs, ours) in problems(duals[name], self, model, lagrange).items():
                if theirs != ours:
                    yield (
                        f"{field} names {name!r}, whose {what} is {theirs!r}, but here it is {ours!r}: λ* would be "
                        "that of another problem"
                    )
            other = (lagrange.measure, lagrange.bound, lagrange.of) != ("mean", "at_most", "cost")
            other = other or lagrange.delta is not None
            if other or lagrange.multiplier == "penalty" or lagrange.group_limits is not None:
                yield f"{field} names {name!r}, which solves one limit of the mean cost, not this one"


class RejectionStage(Round, TrainingStage):
    """A round of rejection sampling: supervised fine-tuning on the policy's own best feasible responses."""

    makes: ClassVar[Makes] = "policy"
    held_out: ClassVar[str] = "eval_prompts"
    lengths: ClassVar[tuple[str, ...]] = ("max_prompt_length", "max_response_length")
    kind: Literal["rejection_sampling"]
    optimizer: OptimizerConfig = OptimizerConfig()

    def models(self) -> dict[str, ModelUse]:
        """Returns the policy and the models that score, by field."""
        return {"init_from": ModelUse(self.init_from, may_be_new=True, generates=True)} | Round.models(self)

    def mistakes(self, earlier: Sequence[StageBase]) -> Iterator[str]:
        """Yields errors with respect to earlier stages, and of batches."""
        yield from super().mistakes(earlier)
        yield from indivisible("batch_size", self.batch_size, "microbatches", self.microbatches)


class DualStage(DualFields, StageBase):
    """One-shot dual: the multiplier λ* from samples of the reference alone, for `algorithm.lagrange.init`."""

    lengths: ClassVar[tuple[str, ...]] = ("max_prompt_length", "max_response_length")
    kind: Literal["dual"]

    def models(self) -> dict[str, ModelUse]:
        """Returns the reference and the models that score, by field."""
        return {"init_from": ModelUse(self.init_from, may_be_new=True, generates=True)} | DualFields.models(self)


class EvaluateStage(Answered):
    """Compares policies on held-out prompts and writes the report."""

    added: ClassVar[frozenset[str]] = frozenset({"pairs", "demonstrations"})
    kind: Literal["evaluate"]
    policies: Annotated[tuple[str, ...], Field(min_length=1)]  # stages; the first is the baseline
    reward_model: str
    cost_model: str
    best_of: dict[str, PositiveInt] = Field(default_factory=dict)  # {policy: n}: an extra row, the best of n responses
    best_of_cost_limit: float | None = None  # of those n, only responses with cost ≤ this, where there are any
    # Labelled pairs on which the two models and the judges are measured, cut as long as a prompt with its response.
    pairs: dict[Literal["reward", "cost"], ReadOnce] = Field(default_factory=dict)
    demonstrations: ReadOnce | None = None  # on which the perplexity of every policy is measured

    def idle(self) -> dict[str, str]:
        """A choice among identical responses."""
        alike = {"best_of": "at temperature 0, or with top_k 1, all responses to a prompt are the same"}
        return super().idle() | (alike if self.temperature == 0 or self.top_k == 1 else {})

    @property
    def scorers(self) -> dict[str, str]:
        """{signal: model}."""
        return {"reward": self.reward_model, "cost": self.cost_model}

    def models(self) -> dict[str, ModelUse]:
        """Returns the models that score, and the policies, by field."""
        found = {"reward_model": scorer(self.reward_model, "reward"), "cost_model": scorer(self.cost_model, "cost")}
        return found | policies_of(self.policies) | self.judge_models()

    def responses(self, policy: str) -> dict[str, int]:
        """Returns {row of the report: responses per prompt} of a policy: the first one, and the best of several."""
        number = self.best_of.get(policy)
        return super().responses(policy) | ({f"{policy}, best of {number}": number} if number else {})

    def datasets(self) -> dict[str, DataUse]:
        """Returns the prompts, and the texts that models and policies are measured on, by field."""
        found, total = super().datasets(), self.max_prompt_length + self.max_response_length
        if self.demonstrations is not None:
            found["demonstrations"] = DataUse(self.demonstrations, "sft", total, "evaluate")
        return found | {f"pairs.{kind}": DataUse(data, kind, total, "evaluate") for kind, data in self.pairs.items()}

    def mistakes(self, earlier: Sequence[StageBase]) -> Iterator[str]:
        """Yields errors with respect to earlier stages, and of `best_of`."""
        yield from super().mistakes(earlier)
        yield from self.inside_judges(self.scorers)
        for name, number in self.best_of.items():
            if name not in self.policies:
                yield f"best_of names {name!r}, which is none of its policies {list(self.policies)}"
            if number < 2:
                yield f"best_of.{name} {number}: must be 2 or more, there is nothing to choose"
        if self.best_of_cost_limit is not None and not self.best_of:
            yield f"best_of_cost_limit {self.best_of_cost_limit} needs best_of"
