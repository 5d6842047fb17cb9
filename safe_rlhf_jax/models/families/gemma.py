"""Gemma, Gemma 2, and the text models of Gemma 3."""

import dataclasses
from typing import Any

from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.families.llama import LLAMA
from safe_rlhf_jax.models.families.reading import (
    positive,
    read_common,
    read_rope,
    read_windows,
    write_common,
    write_rope,
    write_scaling,
    write_windows,
)
from safe_rlhf_jax.models.families.record import Fields, unsupported

SANDWICH: dict[str, str | tuple[str, ...]] = {
    "layers.{}.post_attention_layernorm": "attention_output_norm",
    "layers.{}.pre_feedforward_layernorm": "post_attention_norm",
    "layers.{}.post_feedforward_layernorm": "mlp_output_norm",
}


def read_gemma(f: Fields) -> ModelConfig:
    """Reads a Gemma: norms scale by 1 + w, embeddings by √D."""
    return read_common(
        f, **read_rope(f), attention_bias=f["attention_bias"], norm_unit_offset=True, scale_embedding=True
    )


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_gemma` reads."""
    return write_common(config) | write_rope(config) | {"attention_bias": config.attention_bias}


GEMMA = dataclasses.replace(
    LLAMA,
    causal_lm="GemmaForCausalLM",
    score="GemmaForScore",
    read=read_gemma,
    write=write_gemma,
    accepted={"use_bidirectional_attention": (None, False)},
)


def read_gemma2(f: Fields) -> ModelConfig:
    """Reads a Gemma 2: four norms in a layer, soft caps, windows in every second layer."""
    return dataclasses.replace(
        read_gemma(f),
        block="sandwich",
        attention_scale=f["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=f.get("attn_logit_softcapping"),
        logit_softcap=f.get("final_logit_softcapping"),
        windows=read_windows(f),
    )


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_gemma2` reads."""
    assert config.attention_scale is not None
    return (
        write_gemma(config)
        | write_windows(config)
        | {
            "query_pre_attn_scalar": round(config.attention_scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    )


GEMMA2 = dataclasses.replace(
    GEMMA,
    causal_lm="Gemma2ForCausalLM",
    score="Gemma2ForScore",
    names=LLAMA.names | SANDWICH,
    read=read_gemma2,
    write=write_gemma2,
    spelling=LLAMA.spelling | {"hidden_act": "hidden_activation"},
)


def read_gemma3(f: Fields) -> ModelConfig:
    """Reads a Gemma 3: as Gemma 2, with norms of queries and keys, and a separate rotary base for windows."""
    f.read |= {"_sliding_window_pattern", "sliding_window_pattern"}  # transformers makes layer_types of them
    rope = f["rope_parameters"]
    local, whole = rope["sliding_attention"], rope["full_attention"]
    if local["rope_type"] != "default":
        raise unsupported("rope_parameters.sliding_attention", local["rope_type"], ("default",))
    unread = {name: rope[name] for name in rope.keys() - {"sliding_attention", "full_attention"}}
    if any(value != whole.get(name) for name, value in unread.items()):
        raise unsupported("rope_parameters", unread, "under the names sliding_attention and full_attention")
    full = Fields(f.values | {"rope_parameters": whole}, f.spelling)
    config = dataclasses.replace(read_gemma2(full), qk_norm=True, local_rope_theta=positive(local, "rope_theta"))
    f.read |= full.read
    return config


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_gemma3` reads."""
    full = {"rope_type": "default"} | write_scaling(config.rope_scaling) | {"rope_theta": config.rope_theta}
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    rope = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    return write_gemma2(config) | rope | {"rope_local_base_freq": config.local_rope_theta}


GEMMA3 = dataclasses.replace(
    GEMMA2, causal_lm="Gemma3ForCausalLM", score="Gemma3ForScore", read=read_gemma3, write=write_gemma3
)
