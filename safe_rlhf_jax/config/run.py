"""Schema of a run: its stages, and what one stage says of another."""

import datetime
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeInt

from safe_rlhf_jax.config.data import TEMPLATE_NAMES, Schema, Share, check_held_out
from safe_rlhf_jax.config.messages import did_you_mean, nearest_multiples
from safe_rlhf_jax.config.sampling import check_best_of, check_multipliers
from safe_rlhf_jax.config.stages import (
    CostStage,
    DPOStage,
    DualStage,
    EvaluateStage,
    MergeStage,
    RejectionStage,
    RewardStage,
    RLStage,
    SFTStage,
    SupervisedStage,
)
from safe_rlhf_jax.models.config import PRESETS, RematPolicy


class Mesh(Schema):
    """Sizes of the device mesh; one of them may be -1 for the devices that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class Execution(Schema):
    """How networks run; none of these changes a result beyond rounding."""

    unhashed: ClassVar[frozenset[str]] = frozenset({"remat", "gather_to_decode"})
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls; parameters stay float32
    remat: RematPolicy = "none"  # what the backward pass recomputes: none, all but matmuls ("dots"), everything
    scan_layers: bool = True  # False unrolls the layers: longer to compile, faster for small models
    # Parameters split over `fsdp` are gathered once before decoding, not for every token: faster, and costs the memory
    # of a copy in `dtype` over `tensor` while responses are generated.
    gather_to_decode: bool = False


Stage = Annotated[
    SFTStage | RewardStage | CostStage | DPOStage | MergeStage | RLStage | RejectionStage | DualStage | EvaluateStage,
    Field(discriminator="kind"),
]
POLICIES = ("sft", "dpo", "merge", "rl", "rejection_sampling")  # kinds of stages that make a policy


class RunConfig(Schema):
    """A run: stages in order, sharing a seed, a tokenizer, a mesh and a folder."""

    workdir: str
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    title: str = "Safe RLHF"
    seed: NonNegativeInt = 0
    tokenizer: str = "demo"  # "demo", a folder, or a hub id
    # "plain", "beaver", "alpaca", "tokenizer" (its own chat template), or a .jinja file; null: the tokenizer's own,
    # where it has one, else "plain".
    template: str | None = None
    template_options: dict[str, Any] = Field(default_factory=dict)  # its variables: {enable_thinking: false}
    template_date: datetime.date = datetime.date(2024, 7, 26)  # what it writes for today; as Llama 3.1's by default
    control_tokens: Literal["text", "tokens"] = "text"  # what control tokens are that stand in a message
    # {model: template}: how texts are written for a scorer with a tokenizer or template of its own; null: as its
    # tokenizer's chat template says, where it has one.
    templates: dict[str, str] = Field(default_factory=dict)
    mesh: Mesh = Mesh()
    execution: Execution = Execution()
    assume: str | None = None  # preset with the shape of `path:` and `hf:` models, to compile where they are absent
    max_bad_records: Share = 0.05  # share of unusable records above which a stage refuses its data
    wandb: bool = False

    @pydantic.field_validator("template", "templates")
    @classmethod
    def template_is_known(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        """A name, or a Jinja file."""
        for name in value.values() if isinstance(value, dict) else filter(None, [value]):
            if name not in TEMPLATE_NAMES and not name.endswith((".jinja", ".jinja2", ".j2")):
                hint = did_you_mean(name, TEMPLATE_NAMES)
                raise ValueError(f"one of {', '.join(map(repr, TEMPLATE_NAMES))}, or the path of a .jinja file{hint}")
        return value

    @pydantic.model_validator(mode="after")
    def stages_fit(self) -> "RunConfig":
        """Checks what one stage says of another, and what divides what."""
        seen: dict[str, str] = {}
        for i, stage in enumerate(self.stages):
            where = f"stages.{i} ({stage.name})"
            if stage.name in seen:
                raise ValueError(f"{where}: name {stage.name!r} is taken by an earlier stage; names must differ")
            check_references(where, stage, seen)
            check_multipliers(where, stage, self.stages[:i])
            check_best_of(where, stage)
            check_divides(where, stage)
            check_held_out(where, stage)
            seen[stage.name] = stage.kind
        used = [model for stage in self.stages for model in references(stage).values()]
        for model in self.templates.keys() - set(used):
            raise ValueError(f"templates names {model!r}, which no stage uses{did_you_mean(model, used)}")
        return self


MODEL_FIELDS = ("init_from", "reference", "other", "reward_model", "cost_model")


def references(stage: Any) -> dict[str, str]:
    """Returns {field: model it names} of a stage."""
    fields = {name: getattr(stage, name, None) for name in MODEL_FIELDS}
    fields |= {f"cost_models.{name}": model for name, model in getattr(stage, "cost_models", {}).items()}
    fields |= {f"critics.{signal}": model for signal, model in getattr(stage, "critics", {}).items()}
    fields |= {f"policies.{i}": name for i, name in enumerate(getattr(stage, "policies", ()))}
    return {field: value for field, value in fields.items() if value is not None}


def check_references(where: str, stage: Any, seen: dict[str, str]) -> None:
    """Every model a stage names is an earlier stage of the right kind, a preset, a folder or a hub id."""
    kinds: dict[str, tuple[str, ...]] = {"reward_model": ("reward",), "cost_model": ("cost",)}
    if stage.kind in ("reward", "cost"):
        kinds["init_from"] = (*POLICIES, "reward", "cost")
    for field, value in references(stage).items():
        prefix, _, rest = value.partition(":")
        if rest and prefix in ("path", "hf"):
            continue
        if rest and prefix == "preset" and field == "init_from":
            if rest not in PRESETS:
                hint = did_you_mean(rest, PRESETS)
                raise ValueError(f"{where}: {field}: preset {rest!r} is unknown; presets: {sorted(PRESETS)}{hint}")
            continue
        allowed = ("cost",) if field.startswith("cost_models.") else kinds.get(field, POLICIES)
        allowed = (*POLICIES, "reward", "cost") if field.startswith("critics.") else allowed
        if value not in seen:
            raise ValueError(
                f"{where}: {field} names {value!r}, which is no earlier stage ({sorted(seen)}), nor 'path:…' or "
                f"'hf:…'{did_you_mean(value, seen)}"
            )
        if seen[value] not in allowed:
            raise ValueError(f"{where}: {field} names {value!r}, a {seen[value]} stage; it needs one of {allowed}")


def check_divides(where: str, stage: Any) -> None:
    """Batches divide into minibatches and microbatches, and a constraint has what it needs."""
    if isinstance(stage, SupervisedStage | RejectionStage) and stage.batch_size % stage.microbatches:
        raise ValueError(
            f"{where}: batch_size {stage.batch_size} does not divide into microbatches {stage.microbatches}; nearest "
            f"batches that do: {nearest_multiples(stage.batch_size, stage.microbatches)}"
        )
    if not isinstance(stage, RLStage):
        return
    rows, parts = stage.batch_size * stage.responses_per_prompt, stage.algorithm.minibatches * stage.microbatches
    if rows % parts:
        raise ValueError(
            f"{where}: batch_size·responses_per_prompt = {rows} does not divide into minibatches·microbatches = {parts}"
            f"; nearest batches that do: {nearest_multiples(rows, parts)}"
        )
    for signal in stage.critics.keys() - stage.scorers.keys():
        raise ValueError(f"{where}: critics names {signal!r}, which no model scores ({sorted(stage.scorers)})")
    for signal, lagrange in stage.limits.items():
        field = "lagrange" if signal == "cost" else f"constraints.{signal.removeprefix('cost/')}"
        if signal not in stage.scorers:
            raise ValueError(
                f"{where}: algorithm.{field} limits a cost that no model measures; name its model in "
                f"cost_models.{signal.removeprefix('cost/')} (there are {sorted(stage.cost_models)})"
            )
        for name in ("constrained_groups", "group_limits"):
            if getattr(lagrange, name) is not None and stage.group_field is None:
                raise ValueError(f"{where}: algorithm.{field}.{name} needs group_field, which holds the group")
    if stage.algorithm.ptx_coeff > 0 and stage.ptx is None:
        raise ValueError(f"{where}: algorithm.ptx_coeff {stage.algorithm.ptx_coeff} needs ptx data")
