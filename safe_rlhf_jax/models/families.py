"""Model families: how each Hugging Face `model_type` spells our configuration and our parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from safe_rlhf_jax.models.config import ModelConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One stored tensor: where it lives in our tree, and how many of its dimensions there are inputs of a linear map.

    Linear maps are stored [out, in] and biases [out], with heads and head dimension as one; the rest as it is.
    """

    path: Path
    layer: int | None = None  # index on the leading axis of a scanned parameter
    in_ndim: int | None = None  # 0 for a bias; None for what belongs to no linear map


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to one `model_type`."""

    causal_lm: str  # architecture names
    score: str
    prefix: str  # of the decoder's tensors
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    decoder_weights: Callable[[ModelConfig], dict[str, Weight]]


def layer_path(config: ModelConfig, layer: int) -> tuple[Path, int | None]:
    """Returns the path of a layer's parameters and its index there when layers are stacked."""
    return (("decoder", "layers"), layer) if config.scan_layers else (("decoder", f"layers_{layer}"), None)


# --- Llama ------------------------------------------------------------------------------------------------------------


def llama_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads the `config.json` of a Llama model.

    Raises:
        ValueError: For a switch that is not implemented, naming the field.
    """
    for field in ("rope_parameters", "rope_scaling"):
        scaling = hf.get(field) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json: {field} {kind!r} is not supported; only 'default'")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; only 'silu'")
    rope = hf.get("rope_parameters") or {}
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        max_positions=hf.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        initializer_range=hf.get("initializer_range", 0.02),
    )


def llama_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a Llama `config.json`."""
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
    }


def llama_decoder_weights(config: ModelConfig) -> dict[str, Weight]:
    """Returns {name without prefix: Weight} of the decoder."""
    weights = {
        "embed_tokens.weight": Weight(("decoder", "embedding")),
        "norm.weight": Weight(("decoder", "final_norm", "weight")),
    }
    linear = {
        "self_attn": ("attention", ("q_proj", "k_proj", "v_proj", "o_proj"), config.attention_bias),
        "mlp": ("mlp", ("gate_proj", "up_proj", "down_proj"), config.mlp_bias),
    }
    norms = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}
    for i in range(config.num_layers):
        base, index = layer_path(config, i)
        for theirs, ours in norms.items():
            weights[f"layers.{i}.{theirs}.weight"] = Weight((*base, ours, "weight"), index)
        for theirs, (ours, names, bias) in linear.items():
            for name in names:
                stem = f"layers.{i}.{theirs}.{name}"
                in_ndim = 2 if name == "o_proj" else 1  # heads and head dimension
                weights[f"{stem}.weight"] = Weight((*base, ours, name, "kernel"), index, in_ndim)
                if bias:
                    weights[f"{stem}.bias"] = Weight((*base, ours, name, "bias"), index, in_ndim=0)
    return weights


FAMILIES: dict[str, Family] = {
    "llama": Family(
        causal_lm="LlamaForCausalLM",
        score="LlamaForScore",
        prefix="model.",
        config_from_hf=llama_config_from_hf,
        config_to_hf=llama_config_to_hf,
        decoder_weights=llama_decoder_weights,
    ),
}


def family(model_type: str) -> Family:
    """Returns the family of a `model_type`.

    Raises:
        ValueError: If there is none, naming those there are.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type {model_type!r} is not supported; supported: {sorted(FAMILIES)}")
    return FAMILIES[model_type]
