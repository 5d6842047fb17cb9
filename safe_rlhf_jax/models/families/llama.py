"""Llama and its variants, which differ by a switch: Mistral, Qwen, Phi-3."""

import dataclasses
from typing import Any

from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.families.reading import (
    read_common,
    read_rope,
    read_windows,
    write_common,
    write_rope,
    write_windows,
)
from safe_rlhf_jax.models.families.record import Family, Fields


def read_llama(f: Fields) -> ModelConfig:
    """Reads a Llama."""
    return read_common(f, **read_rope(f), attention_bias=f["attention_bias"], mlp_bias=f["mlp_bias"])


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_llama` reads."""
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return write_common(config) | write_rope(config) | biases


LLAMA = Family(
    causal_lm="LlamaForCausalLM",
    score="LlamaForScore",
    prefix="model.",
    names={
        "embed_tokens": "embedding",
        "norm": "final_norm",
        "layers.{}.input_layernorm": "input_norm",
        "layers.{}.post_attention_layernorm": "post_attention_norm",
        "layers.{}.self_attn.q_proj": "attention.q_proj",
        "layers.{}.self_attn.k_proj": "attention.k_proj",
        "layers.{}.self_attn.v_proj": "attention.v_proj",
        "layers.{}.self_attn.o_proj": "attention.o_proj",
        "layers.{}.self_attn.q_norm": "attention.q_norm",
        "layers.{}.self_attn.k_norm": "attention.k_norm",
        "layers.{}.mlp.gate_proj": "mlp.gate_proj",
        "layers.{}.mlp.up_proj": "mlp.up_proj",
        "layers.{}.mlp.down_proj": "mlp.down_proj",
    },
    read=read_llama,
    write=write_llama,
    spelling={"norm_eps": "rms_norm_eps"},
)


def one_window(f: Fields) -> tuple[int | None, ...]:
    """Reads a `sliding_window` that all layers share."""
    window = f.get("sliding_window")
    return () if window is None else (window,) * f["num_hidden_layers"]


def read_mistral(f: Fields) -> ModelConfig:
    """Reads a Mistral: one window for all layers."""
    return read_common(f, **read_rope(f), windows=one_window(f))


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_mistral` reads."""
    return write_common(config) | write_rope(config) | {"sliding_window": next(iter(config.windows), None)}


MISTRAL = dataclasses.replace(
    LLAMA,
    causal_lm="MistralForCausalLM",
    score="MistralForScore",
    read=read_mistral,
    write=write_mistral,
    accepted={"layer_types": (None,)},
)


def read_qwen2(f: Fields) -> ModelConfig:
    """Reads a Qwen 2 or 2.5: biases of queries, keys and values; windows from some layer on."""
    f.read |= {"use_sliding_window", "max_window_layers"}  # transformers makes layer_types of them
    return read_common(f, **read_rope(f), attention_bias=True, attention_out_bias=False, windows=read_windows(f))


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_qwen2` reads."""
    full = next((i for i, window in enumerate(config.windows) if window is not None), config.num_layers)
    switches = {"use_sliding_window": bool(config.windows), "max_window_layers": full}
    return write_common(config) | write_rope(config) | write_windows(config) | switches


QWEN2 = dataclasses.replace(
    LLAMA, causal_lm="Qwen2ForCausalLM", score="Qwen2ForScore", read=read_qwen2, write=write_qwen2
)


def read_qwen3(f: Fields) -> ModelConfig:
    """Reads a Qwen 3: Qwen 2 with norms of queries and keys, and optional biases."""
    bias = f["attention_bias"]
    return dataclasses.replace(read_qwen2(f), attention_bias=bias, attention_out_bias=None, qk_norm=True)


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_qwen3` reads."""
    return write_qwen2(config) | {"attention_bias": config.attention_bias}


QWEN3 = dataclasses.replace(
    LLAMA, causal_lm="Qwen3ForCausalLM", score="Qwen3ForScore", read=read_qwen3, write=write_qwen3
)


def read_phi3(f: Fields) -> ModelConfig:
    """Reads a Phi-3 or Phi-4: fused projections, optionally partial rotary dimensions."""
    f.read.add("original_max_position_embeddings")  # transformers moves it into rope_parameters
    return read_common(f, **read_rope(f, partial=True), windows=one_window(f))


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_phi3` reads."""
    fields = write_mistral(config) | write_rope(config, partial=True)
    if config.rope_scaling is not None:
        fields["original_max_position_embeddings"] = config.rope_scaling.original_positions
    return fields


PHI3 = dataclasses.replace(
    LLAMA,
    causal_lm="Phi3ForCausalLM",
    score="Phi3ForScore",
    names={
        "embed_tokens": "embedding",
        "norm": "final_norm",
        "layers.{}.input_layernorm": "input_norm",
        "layers.{}.post_attention_layernorm": "post_attention_norm",
        "layers.{}.self_attn.qkv_proj": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "layers.{}.self_attn.o_proj": "attention.o_proj",
        "layers.{}.mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "layers.{}.mlp.down_proj": "mlp.down_proj",
    },
    read=read_phi3,
    write=write_phi3,
)
