"""Checks before the first stage trains: data, groups, positions, batches.

An error here costs seconds; later it would cost hours.
"""

import dataclasses
import importlib.util
import logging

import jax
from jax.sharding import Mesh

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.config.messages import nearest_divisors, nearest_multiples
from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.records import Unusable
from safe_rlhf_jax.data.sources import demo_tokenizer_warning
from safe_rlhf_jax.data.templates import PROBE
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.errors import ConfigError, ModelError, UserError
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.sharding import axes_of, decoding_layout, parts
from safe_rlhf_jax.stages.common import Run, weights
from safe_rlhf_jax.stages.datasets import keep
from safe_rlhf_jax.stages.encoding import described, has_tokenizer
from safe_rlhf_jax.stages.held_out import warn_of_overlap
from safe_rlhf_jax.stages.host_signals import FunctionSignal
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.kinds import idle_settings, kind_of
from safe_rlhf_jax.stages.metric_names import check_keep_best
from safe_rlhf_jax.stages.room import check_room
from safe_rlhf_jax.stages.small_data import data_warnings

LOGGER = logging.getLogger(__name__)

PROCESSOR = "/proc/cpuinfo"
EXECUTION = (*cfg.Execution.model_fields, "initializer_range", "unused_rows")  # not part of an architecture


def slow_dtype(dtype: str, processor: str = PROCESSOR) -> str | None:
    """Returns a hint where a CPU computes in bfloat16 no faster than in float32."""
    if dtype != "bfloat16" or jax.default_backend() != "cpu" or not storage.is_file(storage.path(processor)):
        return None
    about = storage.read_text(storage.path(processor))
    if "flags" not in about or "amx_bf16" in about or ("AuthenticAMD" in about and "avx512_bf16" in about):
        return None
    return "execution.dtype: this CPU computes in bfloat16 no faster than in float32 (docs/launching.md)"


def check_run(run: Run) -> None:
    """Checks every stage that is not finished.

    Raises:
        ValueError: Names the stage, the field, the value and the fix.
    """
    if run.config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb: true, but the package is not installed: pip install 'safe_rlhf_jax[wandb]'")
    names = [part.name for stage in run.config.stages for part in stage.parts() if part.maker is None]
    lines = *described(run), demo_tokenizer_warning(run.config.tokenizer, names), slow_dtype(run.config.execution.dtype)
    for line in filter(None, lines):
        LOGGER.info(line)
    for stage in run.config.stages:
        if run.result(stage.name) is not None:
            continue
        for field, reason in idle_settings(stage).items():
            if cfg.is_set(stage, field):
                raise ConfigError(f"{stage.name}: {field} does nothing: {reason}; leave it out")
        check_same_architecture(run, stage)
        check_divides(run, stage)
        for field, use in stage.models().items():
            check_model(run, stage, field, use)
        if run.has_data(stage):
            check_data(run, stage)
        else:
            run.unchecked.add(stage.name)
            LOGGER.info(f"{stage.name}: data of {', '.join(stage.makers())} is checked when it is made")
    check_room(run)


def check_data(run: Run, stage: cfg.StageBase) -> None:
    """Checks the data of a stage, and what depends on it.

    Raises:
        ValueError: Names the stage, the field, the value and the fix.
    """
    kind = kind_of(stage)
    loaded = load_all(run, stage, kind)
    kind.check(run, stage, loaded)
    if kind.training is not None:
        check_keep_best(run, stage, kind.training, loaded)  # type: ignore[arg-type]
        check_profile(stage, kind.training.steps(stage, loaded))  # type: ignore[arg-type]
    warn_of_overlap(run, stage)
    run.unchecked.discard(stage.name)


def check_profile(stage: cfg.TrainingStage, total: int | None) -> None:
    """Checks that a stage has the steps whose profile is asked for.

    Raises:
        ConfigError: With the number of steps.
    """
    if stage.profile is not None and total is not None and (last := stage.profile.numbers[-1]) > total:
        raise ConfigError(
            f"{stage.name}: profile.start {stage.profile.start} and profile.steps {stage.profile.steps} end at step "
            f"{last}, and the stage has {total}; lower them"
        )


def load_all(run: Run, stage: cfg.StageBase, kind: Kind) -> dict[str, Examples]:
    """Returns a stage's data by setting, except calibration data, whose cost model may not exist yet.

    Raises:
        ValueError: If it cannot be used.
    """
    loaded = {}
    for field, use in stage.datasets().items():
        if use.role == "calibrate":
            continue
        loaded[field] = keep(run, stage, field, kind.load)
        check_parts(stage, field, use.data, loaded[field])
        for warning in data_warnings(stage, field, use, loaded[field]):
            run.warn(stage.name, warning)
    return loaded


def check_parts(stage: cfg.StageBase, field: str, data: cfg.Mixture, loaded: Examples) -> None:
    """Checks that rows can be drawn from every part of a weighted mixture.

    Raises:
        ConfigError: Names the part.
    """
    for i in range(len(weights(data) or ())):
        if not (loaded.parts == i).any():
            raise ConfigError(f"{stage.name}: {field}.{i} has a weight, but none of its records can be used")


def check_batch(run: Run, stage: cfg.StageBase) -> None:
    """Checks that a batch divides into the devices that share it."""
    axes, shards = split("batch", run.mesh)
    for field in ("batch_size", "prompt_batch_size"):
        rows = getattr(stage, field, shards)
        if rows % shards:
            raise ConfigError(
                f"{stage.name}: {field} {rows} does not divide into the mesh's {axes} = {shards} shards; "
                f"nearest batches that do: {nearest_multiples(rows, shards)}"
            )


def split(name: str, mesh: Mesh) -> tuple[str, int]:
    """Returns the mesh axes that split a logical axis, as messages name them, and the number of parts."""
    axes = [axis for axis in axes_of(name) if axis != "decode" or mesh.shape[axis] > 1]
    return "·".join(axes), parts(name, mesh.shape)


def check_divides(run: Run, stage: cfg.StageBase) -> None:
    """Checks that batches, and the heads, widths and vocabularies of models, divide by the mesh axes.

    Raises:
        ConfigError: With the numbers and the nearest valid ones.
    """
    check_batch(run, stage)
    with decoding_layout():  # splits heads the most
        asked = dict.fromkeys(("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"), split("mlp", run.mesh))
    asked["hidden_size"] = split("embed", run.mesh)
    networks = {field: use for field, use in stage.models().items() if not use.is_function}
    for field, use in networks.items():
        config = run.networks.config(use.reference)
        for name, (axes, count) in asked.items():
            value = getattr(config, name)
            if value % count:
                raise ConfigError(
                    f"{stage.name}: {field} {use.reference!r} has {name} {value}, which does not divide into the "
                    f"mesh's {axes} = {count}; nearest {axes} sizes that do: {nearest_divisors(value, count)}"
                )


def check_model(run: Run, stage: cfg.StageBase, field: str, use: cfg.ModelUse) -> None:
    """Checks that a model exists, has enough positions and vocabulary, and a score head if needed."""
    reference = use.reference
    where = f"{stage.name}: {field} {reference!r}"
    if use.is_function:
        check_function(where, use)
        return
    config = run.networks.config(reference)
    fields = {name: getattr(stage, name) for name in stage.lengths}
    room = config.generated_length if use.generates else config.max_positions
    if use.scores and run.end_id is not None and "max_response_length" in fields:
        fields["end_truncated"] = 1
    if sum(fields.values()) > room:
        terms = " + ".join(f"{name} {value}" for name, value in fields.items())
        beyond = "" if room == config.max_positions else ", beyond which its rope_scaling cannot generate"
        raise ConfigError(
            f"{where} has {room} positions{beyond}, fewer than the {sum(fields.values())} tokens of {terms}; "
            "shorten them"
        )
    fixed = config.fixed_length
    packs = isinstance(stage, cfg.SupervisedStage) and stage.packing and field in ("init_from", "reference")
    if packs and fixed is not None and fixed < fields["max_length"]:
        raise ConfigError(
            f"{where}: its rope_scaling encodes a text of more than {fixed} tokens by its length, and texts in one row "
            f"have one encoding; leave packing out, or make max_length {fixed}"
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
        check_folder(run, where, use)


def check_function(where: str, use: cfg.ModelUse) -> None:
    """Checks that a judge is a function that returns a number for each of two responses, or pairs of them.

    A function that reads records is not called here, where there are none.

    Raises:
        UserError: Says what it is or returns instead.
    """
    *conversation, response = PROBE
    try:
        conversations, responses = [conversation] * 2, [response["content"]] * 2
        if use.pairs:
            FunctionSignal(use.reference).numbers(conversations, responses, responses)
        elif not (judge := FunctionSignal(use.reference)).reads_records and not use.in_training:
            judge(conversations, responses, [True, False])
    except UserError as error:
        raise type(error)(f"{where}: {error}") from error


def check_folder(run: Run, where: str, use: cfg.ModelUse) -> None:
    """Checks that a folder holds the expected kind of model, with the run's token ids unless it only scores."""
    folder = hf.resolve(run.model_folder(use.reference))
    try:
        check_stored(use, folder)
    except ModelError as error:
        raise ConfigError(f"{where}: {error}") from error
    if use.reference in run.own or not has_tokenizer(folder):
        return
    theirs = load_tokenizer(str(folder))
    if different := run.tokenizer.differing(theirs):
        i = different[0]
        raise ConfigError(
            f"{where} has another tokenizer than the run's {run.config.tokenizer!r}: {len(different)} ids differ, such "
            f"as {i}, {theirs.texts.get(i)!r} there and {run.tokenizer.texts[i]!r} here. Policies, and the critics "
            "that read their tokens, share one tokenizer; only reward and cost models may have one of their own"
        )


def check_stored(use: cfg.ModelUse, folder: storage.Path) -> None:
    """Checks that a folder's tensors match its config.json, and its score type matches its use."""
    stored, kind = hf.stored_score_type(hf.read_config(folder)), use.scores
    if use.as_stored and stored != kind:
        raise ModelError(
            f"{folder} has score_type {stored!r} in its config.json, not {kind!r}; if its scores are {kind}s, write "
            f'"score_type": "{kind}" there; if it is a language model, train a {kind} stage from it'
        )
    hf.inspect(folder, "score" if kind else "lm", score_type=kind, as_stored=use.as_stored)


def check_same_architecture(run: Run, stage: cfg.StageBase) -> None:
    """Checks that policies that are compared or merged share an architecture."""
    alike = {field: use.reference for field, use in stage.models().items() if use.alike}
    configs = {field: (name, run.networks.config(name)) for field, name in alike.items()}
    for field, (name, config) in configs.items():
        first, (first_name, first_config) = next(iter(configs.items()))
        different = [f for f, v in vars(config).items() if v != getattr(first_config, f) and f not in EXECUTION]
        if different:
            raise ConfigError(
                f"{stage.name}: {first} {first_name!r} and {field} {name!r} differ in {', '.join(different)}; "
                "they need one architecture"
            )
