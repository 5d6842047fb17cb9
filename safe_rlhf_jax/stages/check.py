"""What can be known before the first stage trains: data, groups, positions, batches.

An error here costs seconds, and would cost hours later.
"""

import copy
import importlib.util
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.config_errors import ConfigError, nearest_multiples
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.stages.common import Run, new_config
from safe_rlhf_jax.stages.reinforcement import check_groups, constrained_records, load_prompts
from safe_rlhf_jax.stages.supervised import load_examples

EXECUTION = ("dtype", "remat", "scan_layers", "initializer_range")  # no part of an architecture
SAMPLE = 100  # records that are converted on trial


def check_run(run: Run) -> None:
    """Checks every stage that is not finished.

    Raises:
        ValueError: Names the stage, the field, the value and the fix.
    """
    if run.config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb: true, but the package is not installed: pip install 'safe_rlhf_jax[wandb]'")
    # On trial, a few bad records are no error: the stage itself counts them all.
    trial = copy.copy(run)
    trial.config = run.config.model_copy(update={"max_bad_records": 1.0})
    for stage in run.config.stages:
        if run.result(stage.name) is not None:
            continue
        check_same_architecture(run, stage)
        check_batch(run, stage)
        for field, reference in cfg.references(stage).items():
            check_model(run, stage, field, reference)
        if isinstance(stage, cfg.SupervisedStage):
            for data in filter(None, (stage.data, stage.eval_data)):
                load_examples(trial, stage, first(trial, data), stage.kind)  # type: ignore[attr-defined]
        elif isinstance(stage, cfg.RLStage):
            check_reinforcement(trial, stage)
        else:
            for data in stage.prompts:
                load_prompts(trial, stage, first(trial, data))


def first(run: Run, data: cfg.Data) -> cfg.Data:
    """Returns the first records of a dataset, all of which has been read."""
    return data.model_copy(update={"limit": min(len(run.records(data)), SAMPLE)})


def check_batch(run: Run, stage: Any) -> None:
    """A batch divides into the devices that share it."""
    shards = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    if stage.batch_size % shards:
        raise ConfigError(
            f"{stage.name}: batch_size {stage.batch_size} does not divide into the mesh's data·fsdp = {shards} shards; "
            f"nearest batches that do: {nearest_multiples(stage.batch_size, shards)}"
        )


def check_model(run: Run, stage: Any, field: str, reference: str) -> None:
    """A model exists, has the positions and the vocabulary, and scores where it is asked to."""
    where = f"{stage.name}: {field} {reference!r}"
    config = model_config(run, reference)
    if isinstance(stage, cfg.SupervisedStage):
        fields = {"max_length": stage.max_length}
    else:
        fields = {name: getattr(stage, name) for name in ("max_prompt_length", "max_response_length")}
    if sum(fields.values()) > config.max_positions:
        terms = " + ".join(f"{name} {value}" for name, value in fields.items())
        raise ConfigError(
            f"{where} has {config.max_positions} positions, fewer than the {sum(fields.values())} tokens of {terms}; "
            "shorten them"
        )
    if run.tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{where} embeds {config.vocab_size} tokens, but tokenizer {run.config.tokenizer!r} has "
            f"{run.tokenizer.vocab_size}; use the model's own tokenizer"
        )
    if field in ("reward_model", "cost_model") and ":" in reference:
        kind, stored = field.removesuffix("_model"), hf.read_config(hf.resolve(run.model_folder(reference)))
        if stored.get("score_type") != kind:
            raise ConfigError(f"{where} has score_type {stored.get('score_type')!r} in its config.json, not {kind!r}")


def check_same_architecture(run: Run, stage: Any) -> None:
    """Policies that are compared run through one compiled program, so they share an architecture."""
    configs = {name: model_config(run, name) for name in getattr(stage, "policies", ())}
    for name, config in configs.items():
        first_name, first_config = next(iter(configs.items()))
        different = [f for f, v in vars(config).items() if v != getattr(first_config, f) and f not in EXECUTION]
        if different:
            raise ConfigError(
                f"{stage.name}: policies {first_name!r} and {name!r} differ in {', '.join(different)}; compare them in "
                "evaluate stages of their own"
            )


def model_config(run: Run, reference: str) -> ModelConfig:
    """Returns the configuration of a model, also of one that an earlier stage has yet to make."""
    prefix, _, rest = reference.partition(":")
    if rest and prefix == "preset":
        return new_config(run, rest)
    for stage in run.config.stages:
        if stage.name == reference and isinstance(stage, cfg.TrainingStage):
            return model_config(run, stage.init_from)
    stored = hf.read_config(hf.resolve(run.model_folder(reference)))
    return family(stored.get("model_type", "")).config_from_hf(stored)


def check_reinforcement(run: Run, stage: cfg.RLStage) -> None:
    """Prompts have the groups that the constraint names, and the limit's data has labels on both sides of it."""
    load_prompts(run, stage, first(run, stage.prompts))
    if stage.eval_prompts is not None:
        load_prompts(run, stage, first(run, stage.eval_prompts))
    if stage.ptx is not None:
        examples.load_supervised(
            run.records(first(run, stage.ptx)),
            run.template,
            run.tokenizer,
            max_length=stage.max_prompt_length + stage.max_response_length,
            where=f"{stage.name}: ptx {stage.ptx.name}",
            max_bad=1.0,
        )
    if ALGORITHMS[stage.algorithm.name].constrained:
        check_groups(stage, examples.group_names(run.records(stage.prompts), stage.group_field))
        if isinstance(stage.algorithm.lagrange.cost_limit, cfg.CalibratedLimit):
            constrained_records(run, stage, stage.algorithm.lagrange.cost_limit.data)
