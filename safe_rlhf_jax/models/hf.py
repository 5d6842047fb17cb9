"""Hugging Face folders in and out: config.json and safetensors, never a pickle.

Layouts: `*ForCausalLM`, and for score models `*ForScore` and `*ForSequenceClassification` (`score_layouts`). Weights
are loaded into their shards, and saved, one tensor at a time.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
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
from safe_rlhf_jax.models.folders import GENERATION, INDEX, WEIGHTS, clear, is_adapter, read_json, resolve, say_once
from safe_rlhf_jax.models.json_out import as_json, config_fields, generation_fields
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
from safe_rlhf_jax.models.peft import Index, StoredAdapter, read_adapter
from safe_rlhf_jax.models.peft_heads import config_folder, over_base, read_config
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
from safe_rlhf_jax.models.weights import Path, Shape, Weight, layerless
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
MAX_FILE_BYTES = 5 * 10**9

Variables = dict[str, Any]


# --- In ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Matched:
    """A folder that matches the network its config.json describes; its weights have not been read.

    A PEFT folder is its base with the adapter merged.
    """

    module: CausalLM | ScoreModel
    tensors: Tensors
    weights: dict[str, Weight]  # by stored name, the tensors to read
    shapes: dict[Path, Shape]  # of all parameters: a fresh head is not among the weights
    boxed: Variables
    statistics: dict[str, np.ndarray]  # of the normaliser, if any
    adapter: StoredAdapter | None
    adapted: Collection[str]  # stored modules that the adapter changes

    def merged(self, name: str, path: Path, index: Index, part: np.ndarray) -> np.ndarray:
        """Returns a part of a parameter in a stored tensor, with the adapter added in float32."""
        module = name.removesuffix(".weight")
        if self.adapter is None or module not in self.adapted:
            return part
        shapes = layerless(self.shapes, self.weights[name])
        out = self.adapter.product(module, self.weights[name], shapes, path, index)
        out += part
        return out

    def source(self, path: Path) -> str:
        """Returns the files that determine a parameter: one that no adapter changes is the base's."""
        names = [name for name, weight in self.weights.items() if path in weight.paths]
        files = {self.tensors.entries[name].file.parent for name in names}
        if self.adapter is not None and any(name.removesuffix(".weight") in self.adapted for name in names):
            files.add(self.adapter.folder)
        return " ".join(sorted(map(str, files)))


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

    Arguments and errors are those of `load`; `trunk` gives the number of leading layers that are a stack of their own.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: pass one of {DTYPES}")
    folder = resolve(path_or_id)
    hf, config = read_model_config(folder)
    tensors, adapter = opened(folder)
    stored = {"config.json": hf}
    for file in (tensors.folder / GENERATION, folder / GENERATION):
        stored |= {GENERATION: read_json(file)} if storage.is_file(file) else {}
    config = dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers, stored=stored, trunk=trunk(config))
    respell(tensors, config)
    adapted = adapter.adapted(config) if adapter else ()
    if head == "lm":
        if adapter and adapter.scores:
            raise ModelError(f"{folder}: task_type 'SEQ_CLS' is a reward or cost model, not a language model")
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
    return Matched(module, tensors, weights, shapes, boxed, statistics, adapter, adapted)


def opened(folder: storage.Path) -> tuple[Tensors, StoredAdapter | None]:
    """Returns the tensors of a folder; of a PEFT folder those of its base, and the adapter."""
    adapter = read_adapter(folder) if is_adapter(folder) else None
    return (Tensors(folder) if adapter is None else over_base(adapter)), adapter


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
        scan_layers=scan_layers,
    )  # fmt: skip
    return found.module, read(found, seed=seed, mesh=mesh, placed=placed)


def read(
    found: Matched,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    placed: dict[Any, Any] | None = None,
    finish: Callable[[Path, Any], Any] | None = None,
) -> Variables:
    """Returns the variables of a folder that is matched; `finish` is applied to each parameter once it is placed.

    Further arguments are those of `load`.
    """
    dtype = found.module.config.dtype
    shardings = named_shardings(found.boxed, mesh) if mesh else jax.tree.map(lambda _: None, nn.unbox(found.boxed))
    where = flatten_dict(shardings["params"])
    stored = {path for weight in found.weights.values() for path in weight.paths}
    params = {}
    known = {} if placed is None else placed
    for path, shape in found.shapes.items():
        key = found.source(path), path, shape, dtype, finish is None
        if key in known:
            params[path] = known[key]
            continue
        if path in stored:
            part = reader(found.tensors, found.weights, path, found.shapes, jnp.dtype(dtype), found.merged)
        else:
            part = fresh_head(shape, seed).astype(dtype).__getitem__
        params[path] = place(part, shape, where[path])
        if finish is not None:
            params[path] = finish(path, params[path])
        if path in stored:
            known[key] = params[path]
    variables: Variables = {"params": unflatten_dict(params)}
    if found.statistics:
        stats = found.statistics.items()
        variables["stats"] = {k: place(v.__getitem__, v.shape, shardings["stats"][k]) for k, v in stats}
    return variables


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
        tensors, _ = opened(folder)
        respell(tensors, config)
        return tied_as_stored(tensors, config)
    except (OSError, ModelError):  # reported where the weights are opened; a model that is only compiled needs none
        return config


def read_model_config(folder: storage.Path) -> tuple[dict[str, Any], ModelConfig]:
    """Returns config.json and the configuration that it describes."""
    hf = read_config(folder)
    with within(config_folder(folder)):
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
    hf = config_fields(stored, this.config_to_hf(config), tokenizer)
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
        clear(folder)
    write_tensors(folder, specs, max_bytes=max_file_bytes, writes=writes)
    if writes:
        if tokenizer is not None:
            with storage.local_draft(folder) as local:
                tokenizer.save_pretrained(local)
        if not isinstance(module, ScoreModel):
            storage.write(folder / GENERATION, as_json(generation_fields(stored, hf, tokenizer, ends)))
        storage.write(folder / "config.json", as_json(hf))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{folder} is written")
    return folder
