"""Hugging Face folders in and out: config.json and safetensors, never a pickle.

Two layouts: `*ForCausalLM`, and the Beaver layout `*ForScore` of reward and cost models (`score_head.*` and
`normalizer.*`; REFERENCE section 4).
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from safe_rlhf_jax.models.config import ModelConfig, ScoreConfig, ScoreType
from safe_rlhf_jax.models.families import Weight, family
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


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

    try:
        return pathlib.Path(snapshot_download(str(path_or_id), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        raise FileNotFoundError(
            f"{path_or_id}: no such folder, and the download from the hub failed ({error}). "
            "Give a local folder, check the id, or log in with `hf auth login`."
        ) from error


def score_weights(config: ScoreConfig) -> dict[str, Weight]:
    """Returns {stored name: Weight} of the score head."""
    weights = {"score_head.weight": Weight(("score_kernel",), in_ndim=1)}
    if config.bias:
        weights["score_head.bias"] = Weight(("score_bias",), in_ndim=0)
    return weights


def weight_map(config: ModelConfig, score: ScoreConfig | None) -> dict[str, Weight]:
    """Returns {stored name: Weight} of a whole model."""
    this = family(config.family)
    weights = {this.prefix + name: weight for name, weight in this.decoder_weights(config).items()}
    if score is not None:
        return weights | score_weights(score)
    if not config.tie_embeddings:
        weights["lm_head.weight"] = Weight(("lm_head", "kernel"), in_ndim=1)
    return weights


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns `config.json`.

    Raises:
        FileNotFoundError: If the folder has none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json; not a Hugging Face model folder")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def score_config(hf: dict[str, Any], score_type: ScoreType | None) -> ScoreConfig:
    """Reads the score fields of `config.json`, in the spelling of either version of the reference.

    Raises:
        ValueError: If nothing says which kind of score it is.
    """
    kind = score_type or hf.get("score_type")
    if kind not in ("reward", "cost", "critic"):
        raise ValueError(f"score_type {kind!r}: pass score_type='reward', 'cost' or 'critic'")
    bias = hf.get("score_bias", hf.get("bias", True))
    return ScoreConfig(kind, bool(bias), bool(hf.get("do_normalize")) and kind != "critic", hf.get("momentum"))


def load(
    path_or_id: str | pathlib.Path,
    head: Literal["lm", "score"] = "lm",
    dtype: str = "float32",
    *,
    score_type: ScoreType | None = None,
    scan_layers: bool = True,
    seed: int = 0,
) -> tuple[CausalLM | ScoreModel, dict[str, Any]]:
    """Opens a Hugging Face folder.

    Args:
        path_or_id: A folder, or a hub id.
        head: "lm" for next-token logits, "score" for a reward model, a cost model or a critic. A score model opened
            from a language model gets a fresh head, N(0, 1/√(D+1)) with zero bias.
        dtype: Of parameters and matmuls.
        score_type: "reward", "cost" or "critic"; by default what the folder says.
        scan_layers: Stack the layers and scan them; False unrolls.
        seed: Of a fresh head.

    Returns:
        module: `module.apply(variables, tokens i32[B, L], mask bool[B, L])` gives logits f32[B, L, V], or scores
            f32[B, L].
        variables: {"params": …} and, for reward and cost models, {"stats": {mean, var, count}}.

    Raises:
        FileNotFoundError: If the folder or a file of it is missing.
        ValueError: If a tensor is missing or has another shape, or a switch is not supported; names the field.
    """
    folder = resolve(path_or_id)
    hf = read_config(folder)
    config = family(hf.get("model_type", "")).config_from_hf(hf)
    config = dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers)
    tensors = Tensors(folder)
    module: CausalLM | ScoreModel
    if head == "lm":
        module, score = CausalLM(config), None
    else:
        score = score_config(hf, score_type)
        if "score_head.weight" in tensors.files:  # what is stored counts: the field changed its name and its default
            score = dataclasses.replace(score, bias="score_head.bias" in tensors.files)
        module = ScoreModel(config, score)

    abstract = abstract_variables(module)
    shapes = flatten_dict(abstract["params"])
    leaves: dict[tuple[str, ...], Any] = {}
    for name, weight in weight_map(config, score).items():
        if name.startswith("score_head.") and name not in tensors.files:
            leaves[weight.path] = fresh_head(shapes[weight.path], weight.path, seed).astype(dtype)
            continue
        shape = shapes[weight.path].shape
        array = from_stored(tensors.read(name), shape if weight.layer is None else shape[1:], weight, name)
        if weight.layer is None:
            leaves[weight.path] = array.astype(dtype)
        else:
            stacked = leaves.setdefault(weight.path, np.empty(shape, jnp.dtype(dtype)))
            stacked[weight.layer] = array
    variables: dict[str, Any] = {"params": unflatten_dict({k: jnp.asarray(v) for k, v in leaves.items()})}
    if "stats" in abstract:
        variables["stats"] = {
            "mean": jnp.asarray(tensors.get("normalizer.mean", hf.get("mean", [0.0])), jnp.float32),
            "var": jnp.asarray(tensors.get("normalizer.var", hf.get("var", [1.0])), jnp.float32),
            "count": jnp.asarray(tensors.get("normalizer.count", [0]), jnp.int32),
        }
    return module, variables


def save(
    path: str | pathlib.Path, module: CausalLM | ScoreModel, variables: dict[str, Any], tokenizer: Any = None
) -> pathlib.Path:
    """Writes a folder that transformers' `from_pretrained` opens (score models: in the Beaver layout).

    Args:
        path: The folder; made if needed.
        module: The network.
        variables: Its variables, as `load` returns them.
        tokenizer: A transformers tokenizer, saved beside the weights.

    Returns:
        The folder.
    """
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config, this = module.config, family(module.config.family)
    score = module.score if isinstance(module, ScoreModel) else None
    leaves = flatten_dict(jax.device_get(variables["params"]))
    tensors: dict[str, np.ndarray] = {}
    for name, weight in weight_map(config, score).items():
        array = leaves[weight.path] if weight.layer is None else leaves[weight.path][weight.layer]
        tensors[name] = to_stored(np.asarray(array), weight)
    hf = this.config_to_hf(config) | {"dtype": str(next(iter(tensors.values())).dtype)}
    if tokenizer is not None:
        hf |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if score is None:
        hf["architectures"] = [this.causal_lm]
    else:
        hf |= {
            "architectures": [this.score],
            "score_dim": 1,
            "score_bias": score.bias,
            "score_type": score.score_type,
            "do_normalize": score.normalize,
            "momentum": score.momentum,
            "normalizer_type": "RunningMeanStd" if score.momentum is None else "ExponentialMovingAverage",
        }
        if score.score_type != "critic":
            stats = {k: np.asarray(v) for k, v in jax.device_get(variables["stats"]).items()}
            hf |= {"mean": stats["mean"].tolist(), "var": stats["var"].tolist()}
            tensors |= {f"normalizer.{k}": v.astype(np.int64) if k == "count" else v for k, v in stats.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


class Tensors:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        if (folder / INDEX).is_file():
            self.files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / WEIGHTS).is_file():
            with safe_open(folder / WEIGHTS, framework="flax") as file:
                self.files = dict.fromkeys(file.keys(), WEIGHTS)
        else:
            raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {INDEX}; pickled weights are never opened")

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        if name not in self.files:
            raise ValueError(f"{self.folder}: tensor {name!r} is missing")
        with safe_open(self.folder / self.files[name], framework="flax") as file:
            return np.asarray(file.get_tensor(name))

    def get(self, name: str, default: Any) -> Any:
        """Returns a tensor, or `default` where there is none."""
        return self.read(name) if name in self.files else default


def abstract_variables(module: CausalLM | ScoreModel) -> dict[str, Any]:
    """Returns shapes and dtypes of the module's variables, without axis boxes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    variables: dict[str, Any] = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), tokens, tokens > 0))
    return variables


def fresh_head(shape: jax.ShapeDtypeStruct, path: tuple[str, ...], seed: int) -> jax.Array:
    """Returns the start of a score head: N(0, 1/√(D+1)) weights, zero bias."""
    if path == ("score_bias",):
        return jnp.zeros(shape.shape, jnp.float32)
    std = (shape.shape[0] + 1) ** -0.5
    return std * jax.random.normal(jax.random.key(seed), shape.shape, jnp.float32)


def stored_shape(shape: tuple[int, ...], weight: Weight) -> tuple[int, ...]:
    """Returns the shape in which a parameter of ours is stored."""
    if weight.in_ndim is None:
        return shape
    inputs, outputs = shape[: weight.in_ndim], shape[weight.in_ndim :]
    return (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)


def from_stored(array: np.ndarray, shape: tuple[int, ...], weight: Weight, name: str) -> np.ndarray:
    """Returns a stored tensor in the shape of our parameter.

    Raises:
        ValueError: If it is stored in another shape.
    """
    expected = stored_shape(shape, weight)
    if array.shape != expected:
        raise ValueError(f"tensor {name!r} has shape {array.shape}; config.json asks for {expected}")
    return array if weight.in_ndim is None else array.T.reshape(shape)


def to_stored(array: np.ndarray, weight: Weight) -> np.ndarray:
    """Returns our parameter in the shape it is stored in."""
    shape = stored_shape(array.shape, weight)
    return np.ascontiguousarray(array.reshape(shape[::-1]).T if weight.in_ndim else array.reshape(shape))
