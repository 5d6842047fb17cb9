"""Schema of a run: its stages, and the references between them."""

import datetime
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt

from safe_rlhf_jax.config.assessing import CertifyStage, JudgeStage
from safe_rlhf_jax.config.data import TEMPLATE_NAMES, Schema, Share
from safe_rlhf_jax.config.making import AuditStage, LabelStage, RedTeamStage, SampleStage
from safe_rlhf_jax.config.messages import did_you_mean
from safe_rlhf_jax.config.sampled import DualStage, EvaluateStage, RejectionStage, RLStage
from safe_rlhf_jax.config.supervised import CostStage, DPOStage, MergeStage, RewardStage, SFTStage
from safe_rlhf_jax.models.config import RematPolicy


class Mesh(Schema):
    """Sizes of the device mesh; one of `data`, `fsdp`, `tensor` may be -1 for the remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    # Devices that split parameters and batch as `fsdp` does, and heads and MLPs as `tensor` does while responses are
    # generated: training sends fewer bytes without tensor parallelism, and decoding reads fewer with it.
    decode: PositiveInt = 1


class Execution(Schema):
    """Execution of networks; none of these changes a result beyond rounding."""

    added: ClassVar[frozenset[str]] = frozenset({"decode_weights", "decode_cache"})
    unhashed: ClassVar[frozenset[str]] = frozenset({"remat", "gather_to_decode", "merge_to_decode", "whole_base"})
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls; parameters stay float32
    remat: RematPolicy = "none"  # recomputed in the backward pass: nothing, all but matmuls ("dots"), everything
    scan_layers: bool = True  # False unrolls the layers: longer to compile, faster for small models
    # Gather parameters split over `fsdp` once before decoding, not for every token: faster, but needs the memory of a
    # copy in `dtype` over `tensor` while responses are generated.
    gather_to_decode: bool = False
    # Merge adapters into a copy of their layers before decoding: faster, but needs the memory of that copy. On a GPU,
    # where reading from a stack of scanned layers is slow, the copy is of the whole network, also without adapters.
    merge_to_decode: bool = True
    # Keep the frozen bases of adapters whole on the devices of `mesh.decode`: they send less, for that many times the
    # memory.
    whole_base: bool = False
    # Numbers that decoding reads: the kernels of the layers in a copy, and keys and values. Responses are then those of
    # the rounded policy; `train/sampler_gap` is what it costs, `max_sampler_weight` of the algorithm corrects for it.
    decode_weights: Literal["int8"] | None = None
    decode_cache: Literal["int8"] | None = None
    base: Literal["int8", "int4"] | None = None  # quantisation of the frozen bases of adapters; null: `dtype`

    @pydantic.model_validator(mode="after")
    def gathers_what_is_merged(self) -> "Execution":
        """Checks that the copy that decoding gathers exists."""
        if self.gather_to_decode and not self.merge_to_decode:
            raise ValueError("gather_to_decode gathers the copy that merge_to_decode: false does not make; set one")
        if self.decode_weights is not None and not self.merge_to_decode:
            raise ValueError(
                "decode_weights is of the copy that merge_to_decode: false does not make; set base, which is read then"
            )
        return self


Stage = Annotated[
    SFTStage
    | RewardStage
    | CostStage
    | DPOStage
    | MergeStage
    | RLStage
    | RejectionStage
    | DualStage
    | EvaluateStage
    | SampleStage
    | LabelStage
    | AuditStage
    | RedTeamStage
    | CertifyStage
    | JudgeStage,
    Field(discriminator="kind"),
]


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
    template_date: datetime.date = datetime.date(2024, 7, 26)  # its current date; Llama 3.1's by default
    control_tokens: Literal["text", "tokens"] = "text"  # treatment of control tokens in a message
    # {model: template}: the template of a scorer with its own tokenizer or template; null: its tokenizer's chat
    # template, if there is one.
    templates: dict[str, str] = Field(default_factory=dict)
    mesh: Mesh = Mesh()
    execution: Execution = Execution()
    assume: str | None = None  # preset with the shape of `path:` and `hf:` models, to compile without them
    # Scorers read a response that max_response_length has cut as if it had ended: an end token stands after it.
    end_truncated: bool = False
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
        """Checks the references between stages, and which sizes divide each other."""
        for i, stage in enumerate(self.stages):
            where, earlier = f"stages.{i} ({stage.name})", self.stages[:i]
            if any(stage.name == other.name for other in earlier):
                raise ValueError(f"{where}: name {stage.name!r} is taken by an earlier stage; names must differ")
            for mistake in stage.mistakes(earlier):
                raise ValueError(f"{where}: {mistake}")
        if self.execution.base is not None and all(stage.adapters is None for stage in self.stages):
            raise ValueError(
                f"execution.base {self.execution.base!r} quantises the frozen bases of adapters, and no stage has "
                "lora; a base that is trained itself cannot be quantised"
            )
        if self.mesh.decode > 1 and not self.execution.gather_to_decode:
            raise ValueError(
                f"mesh.decode {self.mesh.decode} splits the copy that execution.gather_to_decode makes; set that to "
                "true, or leave out mesh.decode"
            )
        if self.execution.whole_base and self.mesh.decode == 1:
            raise ValueError("execution.whole_base does nothing: mesh.decode is 1; leave it out")
        used = [use.reference for stage in self.stages for use in stage.models().values()]
        for model in self.templates.keys() - set(used):
            raise ValueError(f"templates names {model!r}, which no stage uses{did_you_mean(model, used)}")
        return self
