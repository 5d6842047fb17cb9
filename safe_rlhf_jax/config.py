"""Every schema of a config file, and `load_config`.

Defaults live here, with unit and source; a YAML holds what differs.

Sources: [ref] PKU-Alignment/safe-rlhf@82743cc scripts; [paper] Dai et al. 2023, arXiv 2310.12773.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from safe_rlhf_jax.config_algorithm import AlgorithmConfig as AlgorithmConfig
from safe_rlhf_jax.config_algorithm import CalibratedLimit as CalibratedLimit
from safe_rlhf_jax.config_algorithm import KLConfig as KLConfig
from safe_rlhf_jax.config_algorithm import Lagrange as Lagrange
from safe_rlhf_jax.config_algorithm import PIDConfig as PIDConfig
from safe_rlhf_jax.config_data import TEMPLATE_NAMES, Data, Mixture, Schema, Share, check_held_out, parts_of
from safe_rlhf_jax.config_errors import ConfigError, did_you_mean, explain_all, nearest_multiples
from safe_rlhf_jax.config_sampling import OTHER_DISTRIBUTION, DualFields, Rounds, check_best_of, check_multipliers
from safe_rlhf_jax.config_sampling import SampledPrompts as SampledPrompts
from safe_rlhf_jax.config_sampling import multipliers as multipliers
from safe_rlhf_jax.models.config import PRESETS, Layout, RematPolicy

__all__ = ["ConfigError", "Data", "Mixture", "RunConfig", "Schema", "Share", "Stage", "load_config", "parts_of"]


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


class Mesh(Schema):
    """Sizes of the device mesh; one of them may be -1 for the devices that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class Execution(Schema):
    """How networks run; none of these changes a result beyond rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls; parameters stay float32
    remat: RematPolicy = "none"  # what the backward pass recomputes: none, all but matmuls ("dots"), everything
    scan_layers: bool = True  # False unrolls the layers: longer to compile, faster for small models


class StageBase(Schema):
    """What every stage has."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]


class TrainingStage(StageBase):
    """What every stage that trains has."""

    init_from: str  # "preset:tiny", "path:FOLDER", "hf:OWNER/NAME", or an earlier stage's name
    seed: NonNegativeInt | None = None  # the run's seed by default
    microbatches: PositiveInt = 1  # slices of a (mini)batch whose gradients are accumulated
    checkpoint_every: PositiveInt = 100  # steps
    keep_checkpoints: PositiveInt = 2
    keep_best: Annotated[str, Field(pattern="^-?(train|eval)/")] | None = None  # by metric: highest; -eval/loss: lowest
    eval_every: PositiveInt | None = None  # steps; None evaluates at the end only


class SupervisedStage(TrainingStage):
    """What SFT, reward and cost stages share."""

    data: Mixture
    eval_data: Mixture | None = None
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
    prompts: Mixture
    eval_prompts: Data | None = None
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
    prompts: Annotated[tuple[Data, ...], Field(min_length=1)]
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


Stage = Annotated[
    SFTStage | RewardStage | CostStage | RLStage | RejectionStage | DualStage | EvaluateStage,
    Field(discriminator="kind"),
]
POLICIES = ("sft", "rl", "rejection_sampling")  # kinds that export one


class RunConfig(Schema):
    """A run: stages in order, sharing a seed, a tokenizer, a mesh and a folder."""

    workdir: str
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    title: str = "Safe RLHF"
    seed: NonNegativeInt = 0
    tokenizer: str = "demo"  # "demo", a folder, or a hub id
    template: str = "plain"  # "plain", "beaver", "alpaca", "tokenizer" (its own chat template), or a .jinja file
    mesh: Mesh = Mesh()
    execution: Execution = Execution()
    assume: str | None = None  # preset with the shape of `path:` and `hf:` models, to compile where they are absent
    max_bad_records: Share = 0.05  # share of unusable records above which a stage refuses its data
    wandb: bool = False

    @pydantic.field_validator("template")
    @classmethod
    def template_is_known(cls, value: str) -> str:
        """A name, or a Jinja file."""
        if value not in TEMPLATE_NAMES and not value.endswith((".jinja", ".jinja2", ".j2")):
            hint = did_you_mean(value, TEMPLATE_NAMES)
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
        return self


def references(stage: Any) -> dict[str, str]:
    """Returns {field: model it names} of a stage."""
    fields = {name: getattr(stage, name, None) for name in ("init_from", "reward_model", "cost_model")}
    fields |= {f"cost_models.{name}": model for name, model in getattr(stage, "cost_models", {}).items()}
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


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config, applies `dotted.key=value` overrides, and validates the whole.

    Args:
        path: The file.
        overrides: Such as `stages.1.algorithm.lagrange.lr=0.05`; stages by index or name, values are YAML.

    Raises:
        ConfigError: Names the field, the value and the nearest valid key.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in pathlib.Path("configs").glob("**/*.yaml"))
        raise ConfigError(f"--config {path}: no such file; configs here: {', '.join(near) or 'none'}")
    try:
        tree = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {explain_all(RunConfig, error.errors())}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted key in the raw tree.

    Raises:
        ConfigError: If it is not `key=value`, or a path leads nowhere.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: write dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[list_index(node, part, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise ConfigError(f"override {override!r}: {part!r} lies below a plain value")
    if isinstance(node, list):
        node[list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {override!r}: {last!r} lies below a plain value")


def list_index(items: list[Any], part: str, override: str) -> int:
    """Returns the index of a list entry given as a number or by its `name`."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part.isdigit() and int(part) < len(items):
        return int(part)
    if part in names:
        return names.index(part)
    raise ConfigError(f"override {override!r}: {part!r} is neither an index below {len(items)} nor one of {names}")


def dump(run: RunConfig, stage: StageBase) -> str:
    """Returns a YAML config of the run up to this stage, defaults written out; running it again changes nothing."""
    tree = run.model_dump(mode="json")
    tree["stages"] = tree["stages"][: [s.name for s in run.stages].index(stage.name) + 1]
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text


def config_hash(*parts: Any) -> str:
    """Returns 12 hex digits that change when any part changes."""
    plain = [part.model_dump(mode="json") if isinstance(part, pydantic.BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
