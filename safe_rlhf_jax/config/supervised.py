"""Schemas of the stages that train on records, and of the merging of two policies.

Sources: [ref] PKU-Alignment/safe-rlhf@82743cc scripts; [paper] Dai et al. 2023, arXiv 2310.12773.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from safe_rlhf_jax.config.base import OptimizerConfig, StageBase, TrainingStage, indivisible
from safe_rlhf_jax.config.data import Mixture, ReadOnce, Share
from safe_rlhf_jax.config.uses import DataUse, Makes, ModelUse, scorer
from safe_rlhf_jax.models.config import Layout


class SupervisedStage(TrainingStage):
    """Base of SFT, reward and cost stages."""

    data: Mixture
    eval_data: ReadOnce | None = None
    epochs: PositiveFloat = 3.0  # passes over the data
    batch_size: PositiveInt = 32  # examples (pairs for reward and cost) per optimizer step
    max_length: PositiveInt = 512  # tokens of prompt + response [ref]; longer texts lose their end
    group_by_length: bool = False  # batches of texts of similar length: less padding, but batches differ more
    packing: bool = False  # texts share rows: hardly any padding, the same steps but for rounding and dropout
    unhashed: ClassVar[frozenset[str]] = TrainingStage.unhashed | {"packing"}
    optimizer: OptimizerConfig = OptimizerConfig()
    held_out: ClassVar[str] = "eval_data"
    lengths: ClassVar[tuple[str, ...]] = ("max_length",)

    @property
    def reads(self) -> Literal["sft", "reward", "cost"]:
        """Kind of data that the records are read as."""
        raise NotImplementedError

    def datasets(self) -> dict[str, DataUse]:
        """Returns the training data and the held-out data, by field."""
        trained = DataUse(self.data, self.reads, self.max_length, "train", rows=self.batch_size, passes=self.epochs)
        held_out = (
            {}
            if self.eval_data is None
            else {"eval_data": DataUse(self.eval_data, self.reads, self.max_length, "evaluate")}
        )
        return {"data": trained} | held_out

    def mistakes(self, earlier: Sequence[StageBase]) -> Iterator[str]:
        """Yields errors with respect to earlier stages, and of batches."""
        yield from super().mistakes(earlier)
        yield from indivisible("batch_size", self.batch_size, "microbatches", self.microbatches)
        if self.packing and self.group_by_length:
            yield "group_by_length has no use with packing, which leaves hardly any padding; leave it out"


class SFTStage(SupervisedStage):
    """Supervised fine-tuning on demonstrations; the loss is on responses only."""

    makes: ClassVar[Makes] = "policy"
    reads: ClassVar[Literal["sft"]] = "sft"
    kind: Literal["sft"]


class PreferenceStage(SupervisedStage):
    """Base of reward and cost stages."""

    kind: Literal["reward", "cost"]
    epochs: PositiveFloat = 2.0  # [ref]
    labels: Literal["majority", "shares"] = "majority"  # of several annotators, in the loss [ref: there is one]
    weight_field: str | None = None  # field of a record that holds its weight in the loss, ≥ 0; relative to their mean
    added: ClassVar[frozenset[str]] = frozenset({"labels", "weight_field"})
    token_wise: bool = False  # compare scores at every token after the responses diverge [ref: sequence-wise]
    regularization: NonNegativeFloat = 0.001  # weight of the mean squared score [ref]
    normalize: bool = False  # keep a running normaliser of the scores and apply it when scoring [ref: off]
    normalizer_momentum: Share | None = 0.9  # of its exponential average [ref]; null: running mean and variance
    export_layout: Layout = "beaver"  # as [ref]; "sequence_classification": transformers' class, a new head has no bias

    def models(self) -> dict[str, ModelUse]:
        """Returns the initial model, of any kind."""
        return {"init_from": ModelUse(self.init_from, ("policy", "reward", "cost"), self.kind, may_be_new=True)}


class RewardStage(PreferenceStage):
    """A reward model (helpfulness), Bradley–Terry."""

    makes: ClassVar[Makes] = "reward"
    reads: ClassVar[Literal["reward"]] = "reward"
    kind: Literal["reward"]


class CostStage(PreferenceStage):
    """A cost model (harmlessness), ranking and safety-sign terms."""

    makes: ClassVar[Makes] = "cost"
    reads: ClassVar[Literal["cost"]] = "cost"
    kind: Literal["cost"]
    ranking_weight: NonNegativeFloat = 1.0  # of the ranking term [ref]; 0 trains a plain classifier [paper, ablation]


class DPOStage(SupervisedStage):
    """A policy trained on pairs directly: DPO, IPO, SafeDPO, the two steps of SACPO, DPO on Lagrangian labels."""

    makes: ClassVar[Makes] = "policy"
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
    def settings_match_loss_and_preference(self) -> "DPOStage":
        """Checks that settings of one loss or preference are not set for another."""
        if self.loss == "ipo" and (self.label_smoothing or self.safety_margin):
            raise ValueError("label_smoothing and safety_margin belong to loss 'sigmoid'; leave them out with 'ipo'")
        if self.safety_margin and self.preference != "safe_helpfulness":
            raise ValueError(f"safety_margin {self.safety_margin} needs preference 'safe_helpfulness'")
        missing = [name for name in ("cost_model", "reward_model") if getattr(self, name) is None]
        if self.preference == "lagrangian" and missing:
            raise ValueError(f"preference 'lagrangian' needs {' and '.join(missing)}")
        return self

    def idle(self) -> dict[str, str]:
        """Settings that only labels by two models use."""
        models = ("reward_model", "cost_model", "multiplier") if self.preference != "lagrangian" else ()
        return super().idle() | dict.fromkeys(models, f"preference is {self.preference!r}, only 'lagrangian' uses it")

    @property
    def reads(self) -> Literal["reward", "cost"]:
        """Kind of data that the records are read as."""
        return "cost" if self.preference == "harmlessness" else "reward"

    def models(self) -> dict[str, ModelUse]:
        """Returns the policy, its reference, and the models that rank pairs, by field."""
        found = super().models()
        if self.reference is not None:
            found["reference"] = ModelUse(self.reference, alike=True)
        if self.reward_model is not None:
            found["reward_model"] = scorer(self.reward_model, "reward")
        if self.cost_model is not None:
            found["cost_model"] = scorer(self.cost_model, "cost")
        return found


class MergeStage(StageBase):
    """A policy whose parameters are (1 − weight)·init_from + weight·other, as P-SACPO merges its two steps."""

    makes: ClassVar[Makes] = "policy"
    kind: Literal["merge"]
    init_from: str
    other: str
    weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5

    def models(self) -> dict[str, ModelUse]:
        """Returns both policies, by field."""
        return {"init_from": ModelUse(self.init_from, alike=True), "other": ModelUse(self.other, alike=True)}
