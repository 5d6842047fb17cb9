"""What can be known before the first stage trains: data, groups, positions, batches.

An error here costs seconds, and would cost hours later.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.config.messages import nearest_divisors, nearest_multiples
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.records import Unusable
from safe_rlhf_jax.data.sources import demo_tokenizer_warning
from safe_rlhf_jax.data.templates import PROBE
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.rl.algorithms import ALGORITHMS, as_scored
from safe_rlhf_jax.rl.lagrange import combine_signals
from safe_rlhf_jax.stages.common import Run, model_config, weights
from safe_rlhf_jax.stages.constraints import Limited, check_groups, constraints_of, labelled_data
from safe_rlhf_jax.stages.encoding import described, has_tokenizer
from safe_rlhf_jax.stages.hashing import datasets
from safe_rlhf_jax.stages.held_out import warn_of_overlap
from safe_rlhf_jax.stages.metric_names import check_keep_best
from safe_rlhf_jax.stages.reinforcement import load_prompts, load_ptx
from safe_rlhf_jax.stages.room import check_room
from safe_rlhf_jax.stages.small_data import data_warnings
from safe_rlhf_jax.stages.supervised import load_examples

EXECUTION = (*cfg.Execution.model_fields, "initializer_range", "unused_rows")  # no part of an architecture


def check_run(run: Run) -> None:
    """Checks every stage that is not finished.

    Raises:
        ValueError: Names the stage, the field, the value and the fix.
    """
    if run.config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb: true, but the package is not installed: pip install 'safe_rlhf_jax[wandb]'")
    names = [part.name for stage in run.config.stages for part in datasets(stage)]
    for line in filter(None, (*described(run), demo_tokenizer_warning(run.config.tokenizer, names))):
        print(line)
    for stage in run.config.stages:
        if run.result(stage.name) is not None:
            continue
        check_same_architecture(run, stage)
        if not isinstance(stage, cfg.MergeStage):
            check_divides(run, stage)
        for field, reference in cfg.references(stage).items():
            check_model(run, stage, field, reference)
        loaded = load_all(run, stage)
        if isinstance(stage, cfg.RLStage):
            check_algorithm(stage)
            check_targets(run, stage)
        if isinstance(stage, cfg.RLStage | cfg.SampledPrompts):
            check_constraints(run, stage, loaded)
        check_keep_best(run, stage, loaded)
        warn_of_overlap(run, stage)
    check_room(run)


def load_all(run: Run, stage: Any) -> dict[str, examples.Examples]:
    """Returns the data of a stage by setting: it is converted now, so that nothing about it is left to raise later.

    Raises:
        ValueError: If it cannot be used.
    """
    wanted: dict[str, tuple[Callable[..., examples.Examples], Any]] = {}
    if isinstance(stage, cfg.SupervisedStage):
        wanted = {name: (load_examples, getattr(stage, name)) for name in ("data", "eval_data")}
    elif isinstance(stage, cfg.RLStage | cfg.SampledPrompts):
        wanted = {name: (load_prompts, getattr(stage, name, None)) for name in ("prompts", "eval_prompts")}
        wanted["ptx"] = (load_ptx, getattr(stage, "ptx", None))
    elif isinstance(stage, cfg.EvaluateStage):
        wanted = {f"prompts.{i}": (load_prompts, data) for i, data in enumerate(stage.prompts)}
    loaded = {}
    for field, (load, data) in wanted.items():
        if data is not None:
            loaded[field] = load(run, stage, data)
            check_parts(stage, field, data, loaded[field])
            for warning in data_warnings(stage, field, data, loaded[field]):
                run.warn(stage.name, warning)
    return loaded


def check_parts(stage: Any, field: str, data: cfg.Mixture, loaded: examples.Examples) -> None:
    """Rows can be drawn from every part of a weighted mixture.

    Raises:
        ConfigError: Names the part.
    """
    for i in range(len(weights(data) or ())):
        if not (loaded.parts == i).any():
            raise ConfigError(f"{stage.name}: {field}.{i} has a weight, but none of its records can be used")


def check_batch(run: Run, stage: Any) -> None:
    """A batch divides into the devices that share it."""
    shards = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    for field in ("batch_size", "prompt_batch_size"):
        rows = getattr(stage, field, shards)
        if rows % shards:
            raise ConfigError(
                f"{stage.name}: {field} {rows} does not divide into the mesh's data·fsdp = {shards} shards; "
                f"nearest batches that do: {nearest_multiples(rows, shards)}"
            )


def check_divides(run: Run, stage: Any) -> None:
    """Batches, and the heads, widths and vocabularies of models, divide as the mesh asks.

    Raises:
        ConfigError: With the numbers and the nearest that work.
    """
    check_batch(run, stage)
    shards, tensor = run.mesh.shape["fsdp"], run.mesh.shape["tensor"]
    for field, reference in cfg.references(stage).items():
        config = model_config(run, reference)
        asked = dict.fromkeys(("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"), tensor)
        asked["hidden_size"] = shards
        for name, parts in asked.items():
            value, axis = getattr(config, name), "fsdp" if name == "hidden_size" else "tensor"
            if value % parts:
                raise ConfigError(
                    f"{stage.name}: {field} {reference!r} has {name} {value}, which does not divide into the mesh's "
                    f"{axis} = {parts}; nearest {axis} sizes that do: {nearest_divisors(value, parts)}"
                )


def check_model(run: Run, stage: Any, field: str, reference: str) -> None:
    """A model exists, has the positions and the vocabulary, and scores where it is asked to."""
    where = f"{stage.name}: {field} {reference!r}"
    config = model_config(run, reference)
    if isinstance(stage, cfg.SupervisedStage):
        fields = {"max_length": stage.max_length}
    else:
        lengths = ("max_prompt_length", "max_response_length")
        fields = {name: getattr(stage, name) for name in lengths if hasattr(stage, name)}
    only_reads = isinstance(stage, cfg.SupervisedStage) or scored_kind(field) is not None
    room = config.max_positions if only_reads else config.generated_length
    if sum(fields.values()) > room:
        terms = " + ".join(f"{name} {value}" for name, value in fields.items())
        beyond = "" if room == config.max_positions else ", beyond which its rope_scaling cannot generate"
        raise ConfigError(
            f"{where} has {room} positions{beyond}, fewer than the {sum(fields.values())} tokens of {terms}; "
            "shorten them"
        )
    tokenizer, name = run.encoding(reference).tokenizer, run.config.tokenizer
    if missing := tokenizer.lacking(config.vocab_size):
        raise ConfigError(
            f"{where} embeds {config.vocab_size} tokens, but tokenizer {reference if reference in run.own else name!r} "
            f"has {tokenizer.vocab_size}, such as {tokenizer.quoted(missing[:3])}; use the model's own tokenizer"
        )
    encoding = run.encoding(reference)
    try:
        encode(PROBE, encoding.template, dataclasses.replace(encoding.tokenizer, rows=config.vocab_size))
    except Unusable as error:
        raise ConfigError(
            f"{where} embeds {config.vocab_size} tokens, but its template writes {error}; use a model with that token, "
            "or another template"
        ) from error
    if reference.startswith(("path:", "hf:")):
        check_folder(run, where, stage, field, reference)


def check_folder(run: Run, where: str, stage: Any, field: str, reference: str) -> None:
    """A folder holds the model that it is opened as, and its token ids are the run's, unless it only scores."""
    folder = hf.resolve(run.model_folder(reference))
    try:
        check_stored(stage, field, folder)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if reference in run.own or not has_tokenizer(folder):
        return
    theirs = load_tokenizer(str(folder))
    if different := run.tokenizer.differing(theirs):
        i = different[0]
        raise ConfigError(
            f"{where} has another tokenizer than the run's {run.config.tokenizer!r}: {len(different)} ids differ, such "
            f"as {i}, {theirs.texts.get(i)!r} there and {run.tokenizer.texts[i]!r} here. Policies, and the critics "
            "that read their tokens, share one tokenizer; only reward and cost models may have one of their own"
        )


def scored_kind(field: str) -> str | None:
    """Returns whether a field names a "reward" or a "cost" model; None for a policy."""
    return next((kind for kind in ("reward", "cost") if field.startswith(f"{kind}_model")), None)


def check_stored(stage: Any, field: str, folder: pathlib.Path) -> None:
    """A folder's tensors are those of its config.json, and its scores of the kind that they are used as."""
    scorer = scored_kind(field)
    kind: Any = scorer or (stage.kind if stage.kind in ("reward", "cost") else None)
    stored = hf.stored_score_type(hf.read_config(folder))
    if scorer not in (None, stored):
        raise ValueError(
            f"{folder} has score_type {stored!r} in its config.json, not {kind!r}; if its scores are {kind}s, write "
            f'"score_type": "{kind}" there; if it is a language model, train a {kind} stage from it'
        )
    hf.inspect(folder, "score" if kind else "lm", score_type=kind, as_stored=scorer is not None)


def check_same_architecture(run: Run, stage: Any) -> None:
    """Policies that go through one compiled program, or become one, share an architecture."""
    if isinstance(stage, cfg.RLStage):
        return
    fields = {field: name for field, name in cfg.references(stage).items() if not field.endswith("_model")}
    configs = {field: (name, model_config(run, name)) for field, name in fields.items()}
    for field, (name, config) in configs.items():
        first, (first_name, first_config) = next(iter(configs.items()))
        different = [f for f, v in vars(config).items() if v != getattr(first_config, f) and f not in EXECUTION]
        if different:
            raise ConfigError(
                f"{stage.name}: {first} {first_name!r} and {field} {name!r} differ in {', '.join(different)}; "
                "they need one architecture"
            )


def idle_settings(stage: Any) -> dict[str, str]:
    """Returns {setting of an RL stage that the record of its algorithm has no use for: why}."""
    if not isinstance(stage, cfg.RLStage):
        return {}
    algorithm, name = ALGORITHMS[stage.algorithm.name], stage.algorithm.name
    unused: dict[str, tuple[str, ...]] = {}
    if not algorithm.constrained:
        unused["has no constraint"] = ("algorithm.lagrange", "algorithm.constraints")
    if algorithm.baseline is not None:
        fields = ("gamma", "gae_lambda", "clip_range_value")
        unused["has no critics"] = ("critic", "critics", *(f"algorithm.{field}" for field in fields))
    if algorithm.shape is as_scored:
        unused["takes no fixed weight of the cost off the reward"] = ("algorithm.cost_weight",)
    if algorithm.paired:
        unused["clips pairs"] = ("algorithm.dual_clip",)
    return {field: f"algorithm {name!r} {reason}" for reason, fields in unused.items() for field in fields}


def check_algorithm(stage: cfg.RLStage) -> None:
    """An algorithm has the models, the responses and the KL term that it needs, and no setting that it does not use.

    Raises:
        ConfigError: Names the field and the fix.
    """
    a, algorithm, where = stage.algorithm, ALGORITHMS[stage.algorithm.name], f"{stage.name}: algorithm"
    rows, parts = stage.batch_size * stage.responses_per_prompt, stage.algorithm.minibatches * stage.microbatches
    for field, reason in idle_settings(stage).items():
        if cfg.is_set(stage, field):
            raise ConfigError(f"{stage.name}: {field} does nothing: {reason}; leave it out")
    if algorithm.constrained and not stage.limits:
        raise ConfigError(f"{where}.name {a.name!r} needs cost_model; name a cost stage, or use 'ppo'")
    if algorithm.needs_cost and stage.cost_model is None:
        raise ConfigError(f"{where}.name {a.name!r} weighs a cost, and needs cost_model; name a cost stage")
    if algorithm.paired and stage.responses_per_prompt != 2:
        raise ConfigError(
            f"{where}.name {a.name!r} compares the two responses to a prompt: responses_per_prompt is "
            f"{stage.responses_per_prompt}, must be 2"
        )
    if algorithm.baseline is not None and stage.responses_per_prompt < 2:
        raise ConfigError(
            f"{where}.name {a.name!r} compares responses to one prompt: responses_per_prompt is "
            f"{stage.responses_per_prompt}, must be 2 or more"
        )
    if algorithm.paired and rows // 2 % parts:
        raise ConfigError(
            f"{where}.name {a.name!r}: {rows // 2} pairs do not divide into minibatches·microbatches = {parts}"
        )
    if algorithm.kl_as_loss and a.kl.place == "signals" and a.kl_coeff > 0:
        raise ConfigError(
            f"{where}.name {a.name!r} divides each signal by its spread, which would scale the KL term away; set "
            f"{where.partition(' ')[2]}.kl.place: k2"
        )


def check_targets(run: Run, stage: cfg.RLStage) -> None:
    """A dual stage that gives λ its start solves for the policy that this algorithm ends at."""
    target = "safe_rlhf" if ALGORITHMS[stage.algorithm.name].combine is combine_signals else "plain"
    for field, name in cfg.multipliers(stage).items():
        other = next(other for other in run.config.stages if other.name == name)
        if isinstance(other, cfg.DualStage) and other.target != target:
            raise ConfigError(
                f"{stage.name}: {field} names {name!r}, whose target is {other.target!r}; algorithm.name "
                f"{stage.algorithm.name!r} ends at that of {target!r}"
            )


def check_constraints(run: Run, stage: Limited, loaded: Mapping[str, examples.Examples]) -> None:
    """The prompts that are left have the groups that limits name, and there is labelled data to calibrate limits on."""
    constraints = constraints_of(stage)
    if constraints:
        check_groups(stage, examples.group_names(loaded["prompts"].records, stage.group_field))
    for signal, lagrange in constraints.items():
        data = labelled_data(run, stage, signal)
        if isinstance(lagrange.cost_limit, cfg.CalibratedLimit) and data is not None:
            for warning in data_warnings(stage, "cost_limit.data", lagrange.cost_limit.data, data):
                run.warn(stage.name, warning)
