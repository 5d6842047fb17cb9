"""Schemas of the stages: what each kind can be told, and its defaults.

Sources: [ref] PKU-Alignment/safe-rlhf@82743cc scripts; [paper] Dai et al. 2023, arXiv 2310.12773.
"""

from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from safe_rlhf_jax.config.algorithm import AlgorithmConfig, Lagrange
from safe_rlhf_jax.config.data import Mixture, ReadOnce, Schema, Share, Single
from safe_rlhf_jax.config.sampling import OTHER_DISTRIBUTION, DualFields, Rounds
from safe_rlhf_jax.models.config import Layout


class OptimizerConfig(Schema):
    """AdamW with clipping of the global gradient norm, and its learning-rate schedule."""

    lr: PositiveFloat = 2e-5  # [ref]
    schedule: Literal["constant", "linear", "cosine", "hold_linear"] = "cosine"  # [ref]; hold half, then linear to 2 %
    warmup_ratio: Share = 0.03  # share of the optimizer steps [ref]
    weight_decay: NonNegativeFloat = 0.0
    b1: Share = 0.9  # [ref]
    b2: Share = 0.95  # [ref]
    eps: PositiveFloat = 1e-8  # [ref]
    max_grad_norm: PositiveFloat | None = 1.0  # [ref]


class StageBase(Schema):
    """What every stage has."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]


class TrainingStage(StageBase):
    """What every stage that trains has."""

    unhashed: ClassVar[frozenset[str]] = frozenset(
        {"microbatches", "checkpoint_every", "keep_checkpoints", "keep_best", "eval_every", "fuse"}
    )
    init_from: str  # "preset:tiny", "path:FOLDER", "hf:OWNER/NAME", or an earlier stage's name
    seed: NonNegativeInt | None = None  # the run's seed by default
    microbatches: PositiveInt = 1  # slices of a (mini)batch whose gradients are accumulated
    checkpoint_every: PositiveInt = 100  # steps
    keep_checkpoints: PositiveInt = 2
    keep_best: Annotated[str, Field(pattern="^-?(train|eval)/")] | None = None  # by metric: highest; -eval/loss: lowest
    eval_every: PositiveInt | None = None  # steps; None evaluates at the end only

    def idle(self) -> dict[str, str]:
        """An evaluation of nothing."""
        held_out = next(name for name in ("eval_data", "eval_prompts") if name in type(self).model_fields)
        reasons = {"eval_every": f"there is no {held_out}"} if getattr(self, held_out) is None else {}
        return super().idle() | reasons


class SupervisedStage(TrainingStage):
    """What SFT, reward and cost stages share."""

    data: Mixture
    eval_data: ReadOnce | None = None
    epochs: PositiveFloat = 3.0  # passes over the data
    batch_size: PositiveInt = 32  # examples (pairs for reward and cost) per optimizer step
    max_length: PositiveInt = 512  # tokens of prompt + response [ref]; longer texts lose their end
    optimizer: OptimizerConfig = OptimizerConfig()


class SFTStage(SupervisedStage):
    """Supervised fine-tuning on demonstrations; the loss is on responses only."""

    kind: Literal["sft"]


class PreferenceStage(SupervisedStage):
    """What reward and cost stages share."""

    epochs: PositiveFloat = 2.0  # [ref]
    token_wise: bool = False  # compare scores at every token after the responses diverge [ref: sequence-wise]
    regularization: NonNegativeFloat = 0.001  # weight of the mean squared score [ref]
    normalize: bool = False  # keep a running normaliser of the scores and apply it when scoring [ref: off]
    normalizer_momentum: Share | None = 0.9  # of its exponential average [ref]; null: running mean and variance
    export_layout: Layout = "beaver"  # as [ref]; "sequence_classification": transformers' class, a new head has no bias


class RewardStage(PreferenceStage):
    """A reward model (helpfulness), Bradley–Terry."""

    kind: Literal["reward"]


class CostStage(PreferenceStage):
    """A cost model (harmlessness), ranking and safety-sign terms."""

    kind: Literal["cost"]
    ranking_weight: NonNegativeFloat = 1.0  # of the ranking term [ref]; 0 trains a plain classifier [paper, ablation]


class DPOStage(SupervisedStage):
    """A policy trained on pairs directly: DPO, IPO, SafeDPO, the two steps of SACPO, DPO on Lagrangian labels."""

    kind: Literal["dpo"]
    epochs: PositiveFloat = 2.0  # [ref]
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6, weight_decay=0.05)  # [ref]
    reference: str | None = None  # policy that KL is measured from; `init_from` by default
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: PositiveFloat = 0.1  # [ref scale_coeff]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0  # share of wrong labels, of `sigmoid`
    # Which response of a pair is chosen: the better one, the safer one, the better one of those that are safe (pairs of
    # two unsafe responses are left out), or the one with the higher reward − multiplier·cost by two models.
    preference: Literal["helpfulness", "harmlessness", "safe_helpfulness", "lagrangian"] = "helpfulness"
    safety_margin: NonNegativeFloat = 0.0  # Δ of SafeDPO: margin of a safe response over an unsafe one
    reward_model: str | None = None  # of `lagrangian`
    cost_model: str | None = None  # of `lagrangian`
    multiplier: NonNegativeFloat = 1.0  # λ of `lagrangian`

    @pydantic.model_validator(mode="after")
    def fits(self) -> "DPOStage":
        """What belongs to one loss or one preference is not set for another."""
        if self.loss == "ipo" and (self.label_smoothing or self.safety_margin):
            raise ValueError("label_smoothing and safety_margin belong to loss 'sigmoid'; leave them out with 'ipo'")
        if self.safety_margin and self.preference != "safe_helpfulness":
            raise ValueError(f"safety_margin {self.safety_margin} needs preference 'safe_helpfulness'")
        missing = [name for name in ("cost_model", "reward_model") if getattr(self, name) is None]
        if self.preference == "lagrangian" and missing:
            raise ValueError(f"preference 'lagrangian' needs {' and '.join(missing)}")
        return self

    def idle(self) -> dict[str, str]:
        """What only labels by two models need."""
        models = ("reward_model", "cost_model", "multiplier") if self.preference != "lagrangian" else ()
        return super().idle() | dict.fromkeys(models, f"preference is {self.preference!r}, only 'lagrangian' uses it")


class MergeStage(StageBase):
    """A policy whose parameters are (1 − weight)·init_from + weight·other, as P-SACPO merges its two steps."""

    kind: Literal["merge"]
    init_from: str
    other: str
    weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5


class RLStage(TrainingStage):
    """On-policy training: PPO, PPO-Lagrangian and their relatives."""

    refused: ClassVar[dict[str, str]] = OTHER_DISTRIBUTION
    kind: Literal["rl"]
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward_model: str
    cost_model: str | None = None  # signal `cost`, limited by algorithm.lagrange; without a constraint only reported
    cost_models: dict[str, str] = Field(
        default_factory=dict
    )  # several: signals `cost/<name>`, by algorithm.constraints.<name>
    # {signal: model} that its critic starts from; by default the scorer, or the actor where the scorer has a tokenizer
    # or template of its own.
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
        """Demonstrations without a weight, and the limit of a cost that is not there."""
        reasons = super().idle()
        if self.algorithm.ptx_coeff == 0:
            reasons["ptx"] = "algorithm.ptx_coeff is 0"
        if self.cost_model is None:
            reasons["algorithm.lagrange"] = "it limits the cost of cost_model, which is not given"
        return reasons

    @property
    def scorers(self) -> dict[str, str]:
        """{signal: model}."""
        single = {"reward": self.reward_model} | ({"cost": self.cost_model} if self.cost_model else {})
        return single | {f"cost/{name}": model for name, model in self.cost_models.items()}

    @property
    def limits(self) -> dict[str, Lagrange]:
        """{cost signal: its constraint}, for algorithms that have constraints."""
        single = {"cost": self.algorithm.lagrange} if self.cost_model else {}
        return single | {f"cost/{name}": lagrange for name, lagrange in self.algorithm.constraints.items()}


class RejectionStage(TrainingStage, Rounds):
    """Rejection sampling: supervised fine-tuning on the policy's own best feasible responses, in rounds."""

    kind: Literal["rejection_sampling"]
    optimizer: OptimizerConfig = OptimizerConfig()  # anew in each round


class DualStage(StageBase, DualFields):
    """One-shot dual: the multiplier λ* from samples of the reference alone, for `algorithm.lagrange.init`."""

    kind: Literal["dual"]


class EvaluateStage(StageBase):
    """Compares policies on held-out prompts and writes the report."""

    kind: Literal["evaluate"]
    policies: Annotated[tuple[str, ...], Field(min_length=1)]  # stages; the first is the baseline
    reward_model: str
    cost_model: str
    prompts: Annotated[tuple[Single, ...], Field(min_length=1)]
    group_field: str | None = None
    batch_size: PositiveInt = 64
    max_prompt_length: PositiveInt = 256
    max_response_length: PositiveInt = 256
    temperature: NonNegativeFloat = 1.0  # 0 is greedy
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    repetition_penalty: PositiveFloat = 1.0
    best_of: dict[str, PositiveInt] = Field(default_factory=dict)  # {policy: n}: a row more, the best of n responses
    best_of_cost_limit: float | None = None  # of those n, only responses with cost ≤ this, where there are any
    seed: NonNegativeInt | None = None

    def idle(self) -> dict[str, str]:
        """A choice among responses that are all the same."""
        alike = {"best_of": "at temperature 0, or with top_k 1, all responses to a prompt are the same"}
        return super().idle() | (alike if self.temperature == 0 or self.top_k == 1 else {})
