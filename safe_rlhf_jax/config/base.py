"""Base schemas of all stages, and their checks against other stages.

Sources: [ref] PKU-Alignment/safe-rlhf@82743cc scripts; [paper] Dai et al. 2023, arXiv 2310.12773.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from safe_rlhf_jax.config.algorithm import Lagrange
from safe_rlhf_jax.config.data import Data, Schema, Share, parts_of, source
from safe_rlhf_jax.config.messages import did_you_mean, nearest_multiples
from safe_rlhf_jax.config.uses import DataUse, Makes, ModelUse, Reads
from safe_rlhf_jax.models.config import PRESETS, TARGETS, Lora


class OptimizerConfig(Schema):
    """AdamW with clipping of the global gradient norm, and its learning-rate schedule."""

    added: ClassVar[frozenset[str]] = frozenset({"moments"})
    lr: PositiveFloat = 2e-5  # [ref]
    schedule: Literal["constant", "linear", "cosine", "hold_linear"] = "cosine"  # [ref]; hold half, then linear to 2 %
    warmup_ratio: Share = 0.03  # share of the optimizer steps [ref]
    weight_decay: NonNegativeFloat = 0.0
    b1: Share = 0.9  # [ref]
    b2: Share = 0.95  # [ref]
    eps: PositiveFloat = 1e-8  # [ref]
    max_grad_norm: PositiveFloat | None = 1.0  # [ref]
    # Dtype of the two moments; parameters stay float32. bfloat16 (stochastic rounding) saves 4 of 12 bytes a parameter.
    moments: Literal["float32", "bfloat16"] = "float32"


class LoraConfig(Schema):
    """Low-rank adapters on a frozen base, in PEFT's terms."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0  # the adapter is scaled by alpha / rank
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = TARGETS  # linear maps of a layer
    layers: PositiveInt | None = None  # the last so many layers have adapters; null: all
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # of an adapter's input, in training
    rank_stabilized: bool = False  # alpha / √rank, arXiv 2312.03732
    # `export/` is the merged model, or a PEFT folder of the adapter; `adapter/` is always the latter.
    export: Literal["merged", "peft"] = "merged"

    @pydantic.field_validator("targets")
    @classmethod
    def targets_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Names of linear maps."""
        for name in value:
            if name not in TARGETS:
                raise ValueError(f"no layer has {name!r}; there are {', '.join(TARGETS)}{did_you_mean(name, TARGETS)}")
        return value

    @property
    def form(self) -> Lora:
        """The adapters of a network."""
        return Lora(self.rank, self.alpha, self.targets, self.layers, self.dropout, self.rank_stabilized)


class Profile(Schema):
    """Steps of which a profile is written."""

    start: Annotated[int, Field(ge=2)] = 10  # the first one, counted from 1; step 1 compiles
    steps: PositiveInt = 3

    @property
    def numbers(self) -> range:
        """The numbers of the steps."""
        return range(self.start, self.start + self.steps)


class StageBase(Schema):
    """Base of all stages.

    `models`, `datasets` and `multipliers` declare the inputs of a stage; nothing else accesses these fields by name.
    """

    makes: ClassVar[Makes | None] = None  # kind of its export
    makes_data: ClassVar[tuple[Reads, ...]] = ()  # what its records can be read as, data.jsonl
    lengths: ClassVar[tuple[str, ...]] = ()  # settings whose sum is the tokens of a text
    kind: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]

    @property
    def scorers(self) -> dict[str, str]:
        """{signal: model}."""
        return {}

    @property
    def adapters(self) -> Lora | None:
        """Form of the adapters that the stage trains; None where it trains whole networks, or nothing."""
        return None

    @property
    def limits(self) -> dict[str, Lagrange]:
        """{cost signal: its limit}."""
        return {}

    @property
    def made_test_share(self) -> float | None:
        """Share of the records that it makes which are `split: test`; None: who reads them may choose."""
        return None

    def models(self) -> dict[str, ModelUse]:
        """Returns the models that the stage reads, by field."""
        return {}

    def datasets(self) -> dict[str, DataUse]:
        """Returns the data sets that the stage reads, by field."""
        return {}

    def multipliers(self) -> dict[str, str]:
        """Returns the dual stages whose multiplier is an initial λ, by field."""
        return {}

    def files(self) -> tuple[str, ...]:
        """Returns further files whose contents decide the result."""
        return ()

    def makers(self) -> tuple[str, ...]:
        """Returns the stages whose records the stage reads."""
        return tuple(dict.fromkeys(part.maker for part in self.parts() if part.maker is not None))

    def parts(self) -> list[Data]:
        """Returns the parts of all data sets that the stage reads."""
        return [part for use in self.datasets().values() for part in parts_of(use.data)]

    def mistakes(self, earlier: Sequence["StageBase"]) -> Iterator[str]:
        """Yields errors with respect to earlier stages, and of sizes that must divide each other."""
        stages = {other.name: other for other in earlier}
        for field, use in self.models().items():
            yield from wrong_reference(field, use, stages)
        uses = self.datasets()
        for field, use_ in uses.items():
            for part in parts_of(use_.data):
                if part.maker is not None:
                    yield from wrong_maker(field, use_.reads, part, stages)
            for held_out_field, held_out in uses.items():
                if (use_.role, held_out.role) == ("train", "evaluate") and use_.reads == held_out.reads:
                    yield from not_held_out(field, use_.data, held_out_field, held_out.data)


def wrong_reference(field: str, use: ModelUse, earlier: dict[str, StageBase]) -> Iterator[str]:
    """Yields why a model is no earlier stage of the right kind, preset, folder or hub id.

    Args:
        field: The field that names it.
        use: The use of the model.
        earlier: The earlier stages, by name.
    """
    value = use.reference
    prefix, _, rest = value.partition(":")
    if rest and prefix in ("path", "hf"):
        return
    if use.is_function:
        if not all(rest.partition(":")[::2]):
            yield f"{field}: {value!r} names no function; write function:MODULE:NAME"
        return
    if rest and prefix == "preset" and use.may_be_new:
        if rest not in PRESETS:
            hint = did_you_mean(rest, PRESETS)
            yield f"{field}: preset {rest!r} is unknown; presets: {sorted(PRESETS)}{hint}"
    elif value not in earlier:
        others = "'path:…', 'hf:…' or 'function:MODULE:NAME'" if use.may_be_function else "'path:…' or 'hf:…'"
        yield (
            f"{field} names {value!r}, which is no earlier stage ({sorted(earlier)}), nor {others}"
            f"{did_you_mean(value, earlier)}"
        )
    elif earlier[value].makes not in use.accepts:
        kinds = " or ".join(use.accepts)
        yield f"{field} names {value!r}, a {earlier[value].kind} stage; it needs one that makes a {kinds} model"


def wrong_maker(field: str, reads: Reads, part: Data, earlier: dict[str, StageBase]) -> Iterator[str]:
    """Yields why a stage makes no data of the wanted kind, or has split it already."""
    maker = str(part.maker)
    if maker not in earlier:
        makers = sorted(name for name, stage in earlier.items() if reads in stage.makes_data)
        yield (
            f"{field} reads what the stage {maker!r} makes, which is no earlier stage; those that make such data: "
            f"{makers}{did_you_mean(maker, earlier)}"
        )
    elif reads not in earlier[maker].makes_data:
        made = ", ".join(earlier[maker].makes_data) or "no data"
        yield f"{field} reads what {maker!r} makes, a {earlier[maker].kind} stage: {made}; it needs {reads}"
    elif part.test_share is not None and earlier[maker].made_test_share is not None:
        yield f"{field}: test_share is a setting of {maker!r}, which makes the prompts; leave it out here"


def not_held_out(train: str, data: Any, test: str, held_out: Any) -> Iterator[str]:
    """Yields why training and evaluation data of a stage are not split in the same place."""
    for one in parts_of(data):
        for other in parts_of(held_out):
            whole = next((part for part in (one, other) if part.test_share is None), None)
            own_split = whole is not None and whole.split != "train"  # test_share divides the split "train"
            if source(one.name) != source(other.name) or own_split:
                continue
            if one.test_share != other.test_share:
                yield (
                    f"{train} and {test} read {one.name!r} with test_share {one.test_share} and {other.test_share}; "
                    "with one test_share no prompt is in both"
                )
            elif one.test_share is not None and one.split == other.split:
                yield (
                    f"{train} and {test} both read the split {one.split!r} of {one.name!r}; the part that test_share "
                    "holds out is split: test"
                )


def indivisible(name: str, rows: int, parts_name: str, parts: int) -> Iterator[str]:
    """Yields why a batch does not divide into its parts."""
    if rows % parts:
        yield (
            f"{name} {rows} does not divide into {parts_name} {parts}; nearest batches that do: "
            f"{nearest_multiples(rows, parts)}"
        )


class TrainingStage(StageBase):
    """Base of all stages that train."""

    unhashed: ClassVar[frozenset[str]] = frozenset(
        {"microbatches", "checkpoint_every", "keep_checkpoints", "keep_best", "eval_every", "fuse", "profile"}
    )
    init_from: str  # "preset:tiny", "path:FOLDER", "hf:OWNER/NAME", or an earlier stage's name
    lora: LoraConfig | None = None  # train adapters on a frozen base, not the whole network
    seed: NonNegativeInt | None = None  # the run's seed by default
    microbatches: PositiveInt = 1  # slices of a (mini)batch whose gradients are accumulated
    checkpoint_every: PositiveInt = 100  # steps
    keep_checkpoints: PositiveInt = 2
    keep_best: Annotated[str, Field(pattern="^-?(train|eval)/")] | None = None  # by metric: highest; -eval/loss: lowest
    eval_every: PositiveInt | None = None  # steps; None evaluates at the end only
    patience: PositiveInt | None = None  # evaluations without a better `keep_best` after which the run ends
    profile: Profile | None = None  # write an XLA profile of these steps
    held_out: ClassVar[str]  # the setting of its own evaluation data

    @property
    def adapters(self) -> Lora | None:
        """Form of the adapters."""
        return None if self.lora is None else self.lora.form

    @property
    def rows(self) -> int:
        """Texts, or pairs of them, of a step."""
        return int(self.batch_size)  # type: ignore[attr-defined]

    @property
    def minibatches(self) -> int:
        """Optimizer steps that share the rows of a step."""
        return 1

    def without_effect(self) -> frozenset[str]:
        """With `patience`, what is evaluated and when decides where the run ends."""
        if self.patience is None:
            return super().without_effect() | {"patience"}
        return super().without_effect() - {"keep_best", "eval_every"}

    def idle(self) -> dict[str, str]:
        """Evaluation settings without evaluation data."""
        reasons = {"eval_every": f"there is no {self.held_out}"} if getattr(self, self.held_out) is None else {}
        return super().idle() | reasons

    def models(self) -> dict[str, ModelUse]:
        """Returns the models that the stage reads, by field."""
        return {"init_from": ModelUse(self.init_from, may_be_new=True, alike=True)} | super().models()

    def mistakes(self, earlier: Sequence[StageBase]) -> Iterator[str]:
        """Yields errors with respect to earlier stages, of `patience`, and why adapters cannot be trained as asked."""
        yield from super().mistakes(earlier)
        evaluated = self.eval_every is not None and (self.keep_best or "").removeprefix("-").startswith("eval/")
        if self.patience is not None and not evaluated:
            yield (
                f"patience {self.patience} counts evaluations without a better keep_best; give eval_every, and as "
                f"keep_best a metric of eval/ (they are {self.eval_every} and {self.keep_best})"
            )
        form = self.adapters
        if form is None:
            return
        if self.init_from.startswith("preset:"):
            yield (
                f"lora: init_from {self.init_from!r} is a network without training, on which an adapter can build "
                "nothing; name a trained model, or leave lora out"
            )
        stages = {other.name: other for other in earlier}
        for field, use in self.models().items():
            theirs = stages[use.reference].adapters if use.reference in stages and not use.judge else None
            if theirs is not None and (reason := form.holds(theirs)):
                yield f"{field} names {use.reference!r}, whose adapter does not fit into this stage's lora: {reason}"
