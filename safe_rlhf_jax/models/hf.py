"""Hugging Face folders in and out: config.json and safetensors, never a pickle.

Layouts: `*ForCausalLM`, and for score models `*ForScore` and `*ForSequenceClassification` (`score_layouts`). Weights
go from the disk to where they belong one tensor at a time, and back.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from safe_rlhf_jax.models.config import Layout, ModelConfig, ScoreConfig, ScoreType
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.models.parameters import (
    abstract_variables,
    boxed_variables,
    fresh_head,
    gather,
    place,
    reader,
    stored_specs,
)
from safe_rlhf_jax.models.safetensors_io import INDEX, WEIGHTS, Spec, Tensors, read_json, write_tensors
from safe_rlhf_jax.models.score_layouts import (
    BIAS,
    KERNEL,
    in_layout,
    read_score_config,
    score_weights,
    stored_layout,
    stored_score_type,
)
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.models.weights import Weight
from safe_rlhf_jax.sharding import named_shardings

__all__ = ["INDEX", "WEIGHTS", "Tensors", "abstract_variables", "load", "resolve", "save", "stored_score_type"]

DTYPES = ("float32", "bfloat16", "float16")
JSON_FILES = ("config.json", "generation_config.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Buffers of older files, which are computed: rotary frequencies, causal masks, positions.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|position_ids)$")
# Of a stored config.json, what is not true of what we write.
STALE = ("auto_map", "quantization_config", "transformers_version")
MAX_FILE_BYTES = 5 * 10**9

Variables = dict[str, Any]


# --- Folders ----------------------------------------------------------------------------------------------------------


def resolve(path_or_id: str | pathlib.Path) -> pathlib.Path:
    """Returns a local folder: the path itself, or the hub's snapshot in its cache (downloaded when missing).

    Raises:
        FileNotFoundError: If there is neither, saying what to do.
    """
    folder = pathlib.Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if len(folder.parts) != 2:
        raise FileNotFoundError(f"{path_or_id}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    second_copies = ["*/*", "consolidated*"]
    try:
        return pathlib.Path(snapshot_download(str(path_or_id), allow_patterns=wanted, ignore_patterns=second_copies))
    except Exception as error:
        raise FileNotFoundError(
            f"{path_or_id}: no such folder, and not to be had from the hub ({' '.join(str(error).split())}). Check the "
            "id; log in with `hf auth login` if it is gated or private; with HF_HUB_OFFLINE=1 or without a network it "
            f"must be in the cache already (`hf download {path_or_id}`); or give a local folder."
        ) from error


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns `config.json`.

    Raises:
        FileNotFoundError: If the folder has none.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; not a Hugging Face model folder, or one half written")
    return read_json(folder / "config.json")


def weight_map(config: ModelConfig, score: ScoreConfig | None, layout: Layout = "beaver") -> dict[str, Weight]:
    """Returns {stored name: Weight} of a whole model."""
    this = family(config.family)
    weights = {this.prefix + name: weight for name, weight in this.decoder_weights(config).items()}
    if score is not None:
        return weights | score_weights(score, layout)
    return weights | this.head_weights(config)


# --- In ---------------------------------------------------------------------------------------------------------------


def load(
    path_or_id: str | pathlib.Path,
    head: Literal["lm", "score"] = "lm",
    dtype: str = "float32",
    *,
    score_type: ScoreType | None = None,
    score_bias: bool | None = None,
    scan_layers: bool = True,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[CausalLM | ScoreModel, Variables]:
    """Opens a Hugging Face folder.

    Every parameter goes from its files into its shards: host memory holds one shard of one parameter at a time, and a
    process reads what its own shards need.

    Args:
        path_or_id: A folder, or a hub id.
        head: "lm" for next-token logits, "score" for a reward model, a cost model or a critic. A score model opened
            from a language model gets a fresh head, N(0, 1/√(D+1)) with zero bias.
        dtype: Of parameters and matmuls: "float32", "bfloat16" or "float16".
        score_type: "reward", "cost" or "critic"; by default what the folder says, and where a sequence-classification
            model says nothing, "reward".
        score_bias: Whether a fresh head has a bias; by default as config.json says, else True.
        scan_layers: Stack the layers and scan them; False unrolls.
        seed: Of a fresh head.
        mesh: Devices to shard over by the table of `sharding`; by default everything is put on the default device.

    Returns:
        module: `module.apply(variables, tokens i32[B, L], mask bool[B, L])` gives logits f32[B, L, V], or scores
            f32[B, L].
        variables: {"params": …} and, for reward and cost models, {"stats": {mean, var, count}}.

    Raises:
        FileNotFoundError: If the folder or a file of it is missing.
        ValueError: If a file is cut off, a tensor is missing, unknown or has another shape, or a switch is not
            supported; names the file, tensor or field.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: pass one of {DTYPES}")
    folder = resolve(path_or_id)
    hf = read_config(folder)
    if hf.get("quantization_config"):
        raise ValueError(f"{folder}: config.json: quantization_config is not supported; open the unquantised model")
    this = family(hf.get("model_type", ""))
    stored = {name: read_json(folder / name) for name in JSON_FILES if (folder / name).is_file()}
    config = dataclasses.replace(this.config_from_hf(hf), dtype=dtype, scan_layers=scan_layers, stored=stored)
    tensors = Tensors(folder)
    if head == "lm":
        module: CausalLM | ScoreModel = CausalLM(config)
        weights, fresh = weight_map(config, None), {}
    else:
        layout = stored_layout(hf, tensors.entries)
        score = read_score_config(hf, tensors.entries, score_type, score_bias)
        module = ScoreModel(config, score)
        weights = weight_map(config, score, layout or "beaver")
        fresh = {} if layout else score_weights(score, "beaver")
    match_names(tensors, weights.keys() - fresh.keys(), config)
    boxed = boxed_variables(module)
    shardings = named_shardings(boxed, mesh) if mesh else jax.tree.map(lambda _: None, nn.unbox(boxed))
    where = flatten_dict(shardings["params"])
    shapes = {path: leaf.shape for path, leaf in flatten_dict(nn.unbox(boxed)["params"]).items()}
    fresh_paths = [weight.paths[0] for weight in fresh.values()]
    params = {}
    for path, shape in shapes.items():
        if path in fresh_paths:
            params[path] = place(fresh_head(shape, seed).astype(dtype).__getitem__, shape, where[path])
        else:
            params[path] = place(reader(tensors, weights, path, shapes, jnp.dtype(dtype)), shape, where[path])
    variables: Variables = {"params": unflatten_dict(params)}
    if "stats" in boxed:
        stats = {
            "mean": np.array(tensors.get("normalizer.mean", hf.get("mean", [0.0])), np.float32),
            "var": np.array(tensors.get("normalizer.var", hf.get("var", [1.0])), np.float32),
            "count": np.array(tensors.get("normalizer.count", [0]), np.int32),
        }
        variables["stats"] = {k: place(v.__getitem__, v.shape, shardings["stats"][k]) for k, v in stats.items()}
    return module, variables


def match_names(tensors: Tensors, needed: Collection[str], config: ModelConfig) -> None:
    """Every parameter is stored, under whichever spelling, and nothing is that we would leave out unknowingly.

    Raises:
        ValueError: Naming the tensors.
    """
    language_model = weight_map(dataclasses.replace(config, tie_embeddings=False), None)
    known = {*needed, *language_model, "normalizer.mean", "normalizer.var", "normalizer.count"}
    tensors.rename({name: family(config.family).spellings(name) for name in known})
    missing = [name for name in needed if name not in tensors.entries]
    if missing:
        raise ValueError(f"{tensors.folder}: tensor {listed(missing)} is missing")
    unknown = [name for name in tensors.entries if name not in known and not BUFFERS.search(name)]
    if unknown:
        raise ValueError(
            f"{tensors.folder}: tensor {listed(unknown)} has no place in the model that config.json describes; without "
            "it the results would be wrong"
        )


def listed(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(map(repr, sorted(names)[:3])) + more


# --- Out --------------------------------------------------------------------------------------------------------------


def save(
    path: str | pathlib.Path,
    module: CausalLM | ScoreModel,
    variables: Variables,
    tokenizer: Any = None,
    *,
    layout: Layout | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> pathlib.Path:
    """Writes a folder that transformers' `from_pretrained` opens.

    Tensors are gathered and written one at a time. With several processes all of them call this, and the first one
    writes. `config.json` is written last: a folder without it is not finished. What the config.json and
    generation_config.json that the module was loaded with say beyond our own fields is kept.

    Args:
        path: The folder; made if needed.
        module: The network.
        variables: Its variables, as `load` returns them.
        tokenizer: A transformers tokenizer, saved beside the weights with its chat template.
        layout: Of a score model: "beaver", or "sequence_classification", which transformers'
            AutoModelForSequenceClassification opens; by default the one it was loaded from, else "beaver".
        max_file_bytes: Size above which weights are split into several files.

    Returns:
        The folder.

    Raises:
        ValueError: If the layout cannot hold the model.
    """
    folder, writes = pathlib.Path(path), jax.process_index() == 0
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
        folder.mkdir(parents=True, exist_ok=True)
        for file in [folder / name for name in (*JSON_FILES, INDEX, WEIGHTS)] + [*folder.glob("model-*.safetensors")]:
            file.unlink(missing_ok=True)
    write_tensors(folder, specs, max_bytes=max_file_bytes, writes=writes)
    if writes:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if not isinstance(module, ScoreModel):
            generation = {k: v for k, v in stored.get("generation_config.json", {}).items() if k not in STALE}
            ids = {name: hf[name] for name in TOKEN_IDS if name in hf}
            write_json(folder / "generation_config.json", with_token_ids(ids | generation, tokenizer))
        write_json(folder / "config.json", hf)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{folder} is written")
    return folder


def with_token_ids(fields: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the fields with the tokenizer's special tokens; a list of end tokens that has the tokenizer's is kept."""
    out = dict(fields)
    for name in TOKEN_IDS:
        ours, stored = getattr(tokenizer, name, None), out.get(name)
        if ours is not None and ours not in (stored if isinstance(stored, list) else [stored]):
            out[name] = ours
    return out


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a file that is whole whenever it is there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    partial.rename(path)
