"""Hugging Face folders in and out: config.json and safetensors, never a pickle.

Layouts: `*ForCausalLM`, and for score models `*ForScore` and `*ForSequenceClassification` (`score_layouts`). Weights
are loaded into their shards, and saved, one tensor at a time.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.config import Layout, ModelConfig, ScoreType
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.models.families.reading import contradictions
from safe_rlhf_jax.models.folders import INDEX, WEIGHTS, read_config, read_json, resolve, say_once
from safe_rlhf_jax.models.matching import match_names, match_shapes, respell, tied_as_stored, weight_map
from safe_rlhf_jax.models.parameters import (
    abstract_variables,
    boxed_variables,
    fresh_head,
    gather,
    place,
    reader,
    stored_specs,
)
from safe_rlhf_jax.models.safetensors_io import Spec, Tensors, write_tensors
from safe_rlhf_jax.models.score_layouts import (
    BIAS,
    KERNEL,
    check_scores,
    in_layout,
    read_score_config,
    read_statistics,
    score_weights,
    stored_layout,
    stored_score_type,
)
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.models.weights import Path, Shape, Weight
from safe_rlhf_jax.sharding import named_shardings

__all__ = [
    "INDEX",
    "WEIGHTS",
    "Matched",
    "abstract_variables",
    "inspect",
    "load",
    "read_config",
    "resolve",
    "save",
    "stored_config",
    "stored_score_type",
    "weight_map",
]

DTYPES = ("float32", "bfloat16", "float16")
JSON_FILES = ("config.json", "generation_config.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of a stored config.json that do not apply to the files we write.
STALE = ("auto_map", "quantization_config", "transformers_version")
MAX_FILE_BYTES = 5 * 10**9

Variables = dict[str, Any]


# --- In ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Matched:
    """A folder that matches the network its config.json describes; its weights have not been read."""

    module: CausalLM | ScoreModel
    tensors: Tensors
    weights: dict[str, Weight]  # by stored name, the tensors to read
    shapes: dict[Path, Shape]  # of all parameters: a fresh head is not among the weights
    boxed: Variables
    statistics: dict[str, np.ndarray]  # of the normaliser, if any


def inspect(
    path_or_id: storage.Place,
    head: Literal["lm", "score"] = "lm",
    dtype: str = "float32",
    *,
    score_type: ScoreType | None = None,
    score_bias: bool | None = None,
    as_stored: bool = False,
    scan_layers: bool = True,
    trunk: Callable[[ModelConfig], int] = lambda _: 0,
) -> Matched:
    """Returns the network that `load` would open, after all checks that need no weights.

    Arguments and errors are those of `load`.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: pass one of {DTYPES}")
    folder = resolve(path_or_id)
    hf, config = read_model_config(folder)
    stored = {name: read_json(folder / name) for name in JSON_FILES if storage.is_file(folder / name)}
    config = dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers, stored=stored, trunk=trunk(config))
    tensors = Tensors(folder)
    respell(tensors, config)
    if head == "lm":
        config = tied_as_stored(tensors, config)
        module: CausalLM | ScoreModel = CausalLM(config)
        weights = weight_map(config, None)
    else:
        names = tensors.entries
        layout = stored_layout(hf, names)
        if as_stored and layout is None:
            match_names(tensors, (), config)  # a head under another name is named
        with within(folder):
            if as_stored:
                check_scores(hf, names, score_type)
            score = read_score_config(hf, names, score_type, score_bias)
        module, fresh = ScoreModel(config, score), {} if layout else score_weights(score, "beaver")
        weights = {k: v for k, v in weight_map(config, score, layout or "beaver").items() if k not in fresh}
    match_names(tensors, weights, config)
    boxed = boxed_variables(module)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(nn.unbox(boxed)["params"]).items()}
    match_shapes(tensors, weights, shapes, config)
    with within(folder):
        statistics = read_statistics(hf, tensors) if "stats" in boxed else {}
    return Matched(module, tensors, weights, shapes, boxed, statistics)


def load(
    path_or_id: storage.Place,
    head: Literal["lm", "score"] = "lm",
    dtype: str = "float32",
    *,
    score_type: ScoreType | None = None,
    score_bias: bool | None = None,
    as_stored: bool = False,
    scan_layers: bool = True,
    seed: int = 0,
    mesh: Mesh | None = None,
    placed: dict[Any, Any] | None = None,
    trunk: Callable[[ModelConfig], int] = lambda _: 0,
    finish: Callable[[Path, Any], Any] | None = None,
) -> tuple[CausalLM | ScoreModel, Variables]:
    """Opens a Hugging Face folder.

    Parameters are read from the files into their shards: host memory holds one shard of one parameter at a time, and a
    process reads only its own shards.

    Args:
        path_or_id: A folder, or a hub id.
        head: "lm" for next-token logits, "score" for a reward model, a cost model or a critic. A score model opened
            from a language model gets a fresh head, N(0, 1/√(D+1)) with zero bias, to be trained.
        dtype: Of parameters and matmuls: "float32", "bfloat16" or "float16".
        score_type: "reward", "cost" or "critic"; by default the folder's, or "reward" for a sequence-classification
            model that does not say.
        score_bias: Give a fresh head a bias; by default as in config.json, else True.
        as_stored: Use the scores as they are: refuse a folder without a score head, or with scores of another kind than
            `score_type`.
        scan_layers: Stack the layers and scan them; False unrolls.
        seed: Of a fresh head.
        mesh: Devices to shard over by the table of `sharding`; by default the default device holds everything.
        placed: Parameters read before, which are shared; those that are read now are added. Several networks that
            start from one folder read it once.
        trunk: Number of leading layers that are a stack of their own, by the folder's configuration.
        finish: Applied to each parameter as soon as it is placed, such as a cast.

    Returns:
        module: `module.apply(variables, tokens i32[B, L], mask bool[B, L])` gives logits f32[B, L, V], or scores
            f32[B, L].
        variables: {"params": …} and, for reward and cost models, {"stats": {mean, var, count}}.

    Raises:
        MissingModelError: If the folder or a file of it is missing.
        ModelError: If a file is cut off, a tensor is missing, unknown, of another shape or not finite, or a switch is
            not supported; names the file, tensor or field.
    """
    found = inspect(
        path_or_id, head, dtype, score_type=score_type, score_bias=score_bias, as_stored=as_stored,
        scan_layers=scan_layers, trunk=trunk,
    )  # fmt: skip
    shardings = named_shardings(found.boxed, mesh) if mesh else jax.tree.map(lambda _: None, nn.unbox(found.boxed))
    where = flatten_dict(shardings["params"])
    stored = {path for weight in found.weights.values() for path in weight.paths}
    params = {}
    known = {} if placed is None else placed
    for path, shape in found.shapes.items():
        key = str(found.tensors.folder), path, shape, dtype, finish is None
        if key in known:
            params[path] = known[key]
            continue
        if path in stored:
            read = reader(found.tensors, found.weights, path, found.shapes, jnp.dtype(dtype))
        else:
            read = fresh_head(shape, seed).astype(dtype).__getitem__
        params[path] = place(read, shape, where[path])
        if finish is not None:
            params[path] = finish(path, params[path])
        if path in stored:
            known[key] = params[path]
    variables: Variables = {"params": unflatten_dict(params)}
    if found.statistics:
        stats = found.statistics.items()
        variables["stats"] = {k: place(v.__getitem__, v.shape, shardings["stats"][k]) for k, v in stats}
    return found.module, variables


def stored_config(folder: storage.Path) -> ModelConfig:
    """Returns the configuration of a folder's language model, with a separate head if one is stored.

    Raises:
        MissingModelError: If there is no config.json.
        ModelError: For a field that is not supported, naming it.
    """
    _, config = read_model_config(folder)
    if not config.tie_embeddings:
        return config
    try:
        tensors = Tensors(folder)
        respell(tensors, config)
        return tied_as_stored(tensors, config)
    except (OSError, ModelError):  # reported where the weights are opened; a model that is only compiled needs none
        return config


def read_model_config(folder: storage.Path) -> tuple[dict[str, Any], ModelConfig]:
    """Returns config.json and the configuration that it describes."""
    hf = read_config(folder)
    with within(folder):
        if hf.get("quantization_config"):
            raise ModelError("config.json: quantization_config is not supported; open the unquantised model")
        if hf.get("text_config"):
            raise ModelError(
                f"config.json: model_type {hf.get('model_type')!r} reads more than text; save its language model by "
                "itself, with its text_config as config.json"
            )
        this = family(str(hf.get("model_type") or ""))
        config = this.config_from_hf(hf)
    for contradiction in contradictions(hf, this.config_to_hf(config)):
        say_once(f"{folder}: {contradiction}")
    return hf, config


@contextlib.contextmanager
def within(folder: storage.Path) -> Iterator[None]:
    """Names the folder in errors about its contents."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


# --- Out --------------------------------------------------------------------------------------------------------------


def save(
    path: storage.Place,
    module: CausalLM | ScoreModel,
    variables: Variables,
    tokenizer: Any = None,
    *,
    layout: Layout | None = None,
    ends: Collection[int] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> storage.Path:
    """Writes a folder that transformers' `from_pretrained` opens.

    Tensors are gathered and written one at a time. All processes call this, and the first one writes. `config.json` is
    written last: a folder without it is not finished. Further fields of the config.json and generation_config.json
    that the module was loaded with are kept.

    Args:
        path: The folder; created if needed.
        module: The network.
        variables: Its variables, as `load` returns them.
        tokenizer: A transformers tokenizer, saved beside the weights with its chat template.
        layout: Of a score model: "beaver", or "sequence_classification", which transformers'
            AutoModelForSequenceClassification opens; by default the one it was loaded from, else "beaver".
        ends: Tokens that end a response, for generation_config.json; by default the tokenizer's and those it was
            loaded with.
        max_file_bytes: Size above which weights are split into several files.

    Returns:
        The folder.

    Raises:
        ModelError: If the layout cannot hold the model.
    """
    folder, writes = storage.path(path), jax.process_index() == 0
    config, stored, leaves = module.config, module.config.stored, flatten_dict(variables["params"])
    this = family(config.family)
    hf = {name: value for name, value in stored.get("config.json", {}).items() if name not in STALE}
    hf = with_token_ids(hf | this.config_to_hf(config), tokenizer)
    if isinstance(module, ScoreModel):
        layout = layout or stored_layout(hf) or "beaver"
        head = {name: gather(leaves[name]) for name in (KERNEL, BIAS) if name in leaves}
        stats = {name: gather(value) for name, value in variables.get("stats", {}).items()}
        spelled = in_layout(layout, this, module.score, head, stats, hf)
        hf, leaves = spelled.fields, leaves | spelled.head
        specs = stored_specs(leaves, weight_map(config, spelled.score, layout))
        specs |= {k: Spec(v.shape, v.dtype, lambda v=v: v) for k, v in spelled.buffers.items()}  # type: ignore[misc]
    else:
        hf["architectures"] = [this.causal_lm]
        specs = stored_specs(leaves, weight_map(config, None))
    dtype = str(next(iter(specs.values())).dtype)
    hf |= {"dtype": dtype, "torch_dtype": dtype}  # its name before transformers 5

    if writes:
        storage.make_folder(folder)
        older = [folder / name for name in (*JSON_FILES, INDEX, WEIGHTS)]
        # Shards of an older save, and partial files of a killed run.
        for file in older + storage.matching(folder, "model-*.safetensors", f"model*{storage.PARTIAL}"):
            storage.remove(file)
    write_tensors(folder, specs, max_bytes=max_file_bytes, writes=writes)
    if writes:
        if tokenizer is not None:
            with storage.local_draft(folder) as local:
                tokenizer.save_pretrained(local)
        if not isinstance(module, ScoreModel):
            generation = {k: v for k, v in stored.get("generation_config.json", {}).items() if k not in STALE}
            ids = {name: hf[name] for name in TOKEN_IDS if name in hf}
            generation = with_token_ids(ids | generation, tokenizer)
            several = {"eos_token_id": sorted(ends)} if len(ends) > 1 else {}
            storage.write(folder / "generation_config.json", as_json(generation | several))
        storage.write(folder / "config.json", as_json(hf))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{folder} is written")
    return folder


def with_token_ids(fields: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the fields with the tokenizer's special tokens; keeps a list of end tokens that contains its EOS."""
    out = dict(fields)
    for name in TOKEN_IDS:
        ours, stored = getattr(tokenizer, name, None), out.get(name)
        if ours is not None and ours not in (stored if isinstance(stored, list) else [stored]):
            out[name] = ours
    return out


def as_json(value: Mapping[str, Any]) -> str:
    """Returns a JSON file's text."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
