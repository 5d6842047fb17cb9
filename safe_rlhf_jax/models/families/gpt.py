"""GPT-2, GPT-Neo, GPT-J, GPT-NeoX (Pythia), OPT, Bloom and Phi: layer norms, plain MLPs, biases."""

import dataclasses
from typing import Any

from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.families.reading import read_common, read_rope, write_common, write_rope
from safe_rlhf_jax.models.families.record import Family, Fields, Spelling, unsupported

QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
ALL_HEADS_ALIKE: Spelling = {"num_key_value_heads": None, "head_dim": None}  # as many keys as queries, D/H wide
LAYER_NORM: dict[str, Any] = {"norm": "layer", "gated": False}
BIASES = {"attention_bias": True, "mlp_bias": True}

# --- GPT-2 ------------------------------------------------------------------------------------------------------------


def read_gpt2(f: Fields) -> ModelConfig:
    """Reads a GPT-2."""
    scale = None if f["scale_attn_weights"] else 1.0
    return read_common(f, **LAYER_NORM, **BIASES, positions="learned", attention_scale=scale)


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_gpt2` reads."""
    return write_common(config) | {"scale_attn_weights": config.attention_scale is None}


GPT2 = Family(
    causal_lm="GPT2LMHeadModel",
    score="GPT2ForScore",
    prefix="transformer.",
    names={
        "wte": "embedding",
        "wpe": "position_embedding",
        "ln_f": "final_norm",
        "h.{}.ln_1": "input_norm",
        "h.{}.ln_2": "post_attention_norm",
        "h.{}.attn.c_attn": QKV,
        "h.{}.attn.c_proj": "attention.o_proj",
        "h.{}.mlp.c_fc": "mlp.up_proj",
        "h.{}.mlp.c_proj": "mlp.down_proj",
    },
    read=read_gpt2,
    write=write_gpt2,
    spelling=ALL_HEADS_ALIKE
    | {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    },
    accepted={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    transposed=True,
)

# --- GPT-Neo ----------------------------------------------------------------------------------------------------------


def read_gpt_neo(f: Fields) -> ModelConfig:
    """Reads a GPT-Neo: q·k is not scaled, every second layer has a window."""
    f.read.add("attention_types")  # transformers makes attention_layers of them
    kinds, window = f["attention_layers"], f["window_size"]
    for kind in kinds:
        if kind not in ("global", "local"):
            raise unsupported("attention_types", kind, ("global", "local"))
    windows = tuple(window if kind == "local" else None for kind in kinds) if "local" in kinds else ()
    return read_common(
        f,
        **LAYER_NORM,
        positions="learned",
        attention_scale=1.0,
        attention_bias=False,
        attention_out_bias=True,
        mlp_bias=True,
        windows=windows,
    )


def write_gpt_neo(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_gpt_neo` reads."""
    windows = config.windows or (None,) * config.num_layers
    kinds = ["global" if window is None else "local" for window in windows]
    size = next((window for window in windows if window is not None), 256)
    return write_common(config) | {"attention_types": [[kinds, 1]], "attention_layers": kinds, "window_size": size}


GPT_NEO = dataclasses.replace(
    GPT2,
    causal_lm="GPTNeoForCausalLM",
    score="GPTNeoForScore",
    names={
        "wte": "embedding",
        "wpe": "position_embedding",
        "ln_f": "final_norm",
        "h.{}.ln_1": "input_norm",
        "h.{}.ln_2": "post_attention_norm",
        "h.{}.attn.attention.q_proj": "attention.q_proj",
        "h.{}.attn.attention.k_proj": "attention.k_proj",
        "h.{}.attn.attention.v_proj": "attention.v_proj",
        "h.{}.attn.attention.out_proj": "attention.o_proj",
        "h.{}.mlp.c_fc": "mlp.up_proj",
        "h.{}.mlp.c_proj": "mlp.down_proj",
    },
    read=read_gpt_neo,
    write=write_gpt_neo,
    spelling=ALL_HEADS_ALIKE
    | {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    },
    accepted={},
    transposed=False,
)

# --- GPT-J ------------------------------------------------------------------------------------------------------------


def read_gptj(f: Fields) -> ModelConfig:
    """Reads a GPT-J: parallel attention and MLP after one norm, interleaved rotary pairs, a head with bias."""
    if f["rotary_dim"] % 2:
        raise unsupported("rotary_dim", f["rotary_dim"], "an even number")
    return read_common(
        f,
        **LAYER_NORM,
        mlp_bias=True,
        lm_head_bias=True,
        block="parallel_shared",
        rotary_dim=f["rotary_dim"],
        rotary_interleaved=True,
    )


def write_gptj(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_gptj` reads."""
    return write_common(config) | {"rotary_dim": config.rotary_dim}


GPTJ = dataclasses.replace(
    GPT2,
    causal_lm="GPTJForCausalLM",
    score="GPTJForScore",
    names={
        "wte": "embedding",
        "ln_f": "final_norm",
        "h.{}.ln_1": "input_norm",
        "h.{}.attn.q_proj": "attention.q_proj",
        "h.{}.attn.k_proj": "attention.k_proj",
        "h.{}.attn.v_proj": "attention.v_proj",
        "h.{}.attn.out_proj": "attention.o_proj",
        "h.{}.mlp.fc_in": "mlp.up_proj",
        "h.{}.mlp.fc_out": "mlp.down_proj",
    },
    read=read_gptj,
    write=write_gptj,
    accepted={},
    transposed=False,
)

# --- GPT-NeoX (Pythia) ------------------------------------------------------------------------------------------------


def read_gpt_neox(f: Fields) -> ModelConfig:
    """Reads a GPT-NeoX: parallel attention and MLP after separate norms, partial rotary dimensions."""
    return read_common(
        f,
        **LAYER_NORM,
        **read_rope(f, partial=True),
        attention_bias=f["attention_bias"],
        mlp_bias=True,
        block="parallel" if f["use_parallel_residual"] else "pre_norm",
    )


def write_gpt_neox(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_gpt_neox` reads."""
    rope = write_rope(config, partial=True)
    older = {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": config.rope_theta}
    switches = {"attention_bias": config.attention_bias, "use_parallel_residual": config.block == "parallel"}
    return write_common(config) | rope | older | switches


GPT_NEOX = Family(
    causal_lm="GPTNeoXForCausalLM",
    score="GPTNeoXForScore",
    prefix="gpt_neox.",
    names={
        "embed_in": "embedding",
        "final_layer_norm": "final_norm",
        "layers.{}.input_layernorm": "input_norm",
        "layers.{}.post_attention_layernorm": "post_attention_norm",
        "layers.{}.attention.query_key_value": QKV,
        "layers.{}.attention.dense": "attention.o_proj",
        "layers.{}.mlp.dense_h_to_4h": "mlp.up_proj",
        "layers.{}.mlp.dense_4h_to_h": "mlp.down_proj",
    },
    read=read_gpt_neox,
    write=write_gpt_neox,
    spelling=ALL_HEADS_ALIKE | {"norm_eps": "layer_norm_eps"},
    fusion="heads",
    head="embed_out",
)

# --- OPT --------------------------------------------------------------------------------------------------------------


def read_opt(f: Fields) -> ModelConfig:
    """Reads an OPT: position 0 is row 2 of the table; the 350M model has post-norms and narrow embeddings."""
    before, bias, width = f["do_layer_norm_before"], f["enable_bias"], f["word_embed_proj_dim"]
    return read_common(
        f,
        **LAYER_NORM,
        positions="learned",
        position_offset=2,
        attention_bias=bias,
        mlp_bias=bias,
        block="pre_norm" if before else "post_norm",
        final_norm=before and not f.get("_remove_final_layer_norm", False),
        embedding_size=None if width == f["hidden_size"] else width,
    )


def write_opt(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_opt` reads."""
    before = config.block == "pre_norm"
    return write_common(config) | {
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "enable_bias": config.attention_bias,
        "word_embed_proj_dim": config.embedding_width,
    }


OPT = Family(
    causal_lm="OPTForCausalLM",
    score="OPTForScore",
    prefix="model.decoder.",
    names={
        "embed_tokens": "embedding",
        "embed_positions": "position_embedding",
        "project_in": "project_in",
        "project_out": "project_out",
        "final_layer_norm": "final_norm",
        "layers.{}.self_attn_layer_norm": "input_norm",
        "layers.{}.final_layer_norm": "post_attention_norm",
        "layers.{}.self_attn.q_proj": "attention.q_proj",
        "layers.{}.self_attn.k_proj": "attention.k_proj",
        "layers.{}.self_attn.v_proj": "attention.v_proj",
        "layers.{}.self_attn.out_proj": "attention.o_proj",
        "layers.{}.fc1": "mlp.up_proj",
        "layers.{}.fc2": "mlp.down_proj",
    },
    read=read_opt,
    write=write_opt,
    spelling=ALL_HEADS_ALIKE
    | {
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
        "initializer_range": "init_std",
        "norm_eps": None,  # always 1e-5
    },
    accepted={"layer_norm_elementwise_affine": (True,)},
)

# --- Bloom ------------------------------------------------------------------------------------------------------------


def read_bloom(f: Fields) -> ModelConfig:
    """Reads a Bloom: linear biases for positions, a norm after the embedding."""
    return read_common(f, **LAYER_NORM, **BIASES, positions="alibi", embedding_norm=True, activation="gelu_tanh")


BLOOM = Family(
    causal_lm="BloomForCausalLM",
    score="BloomForScore",
    prefix="transformer.",
    names={
        "word_embeddings": "embedding",
        "word_embeddings_layernorm": "embedding_norm",
        "ln_f": "final_norm",
        "h.{}.input_layernorm": "input_norm",
        "h.{}.post_attention_layernorm": "post_attention_norm",
        "h.{}.self_attention.query_key_value": QKV,
        "h.{}.self_attention.dense": "attention.o_proj",
        "h.{}.mlp.dense_h_to_4h": "mlp.up_proj",
        "h.{}.mlp.dense_4h_to_h": "mlp.down_proj",
    },
    read=read_bloom,
    write=write_common,
    spelling=ALL_HEADS_ALIKE
    | {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "seq_length",
        "intermediate_size": None,  # always 4·D
        "hidden_act": None,
    },
    accepted={"apply_residual_connection_post_layernorm": (False,)},
    fusion="heads",
)

# --- Phi (1, 1.5, 2) --------------------------------------------------------------------------------------------------


def read_phi(f: Fields) -> ModelConfig:
    """Reads a Phi: parallel attention and MLP after one norm, partial rotary dimensions, a head with bias."""
    return read_common(
        f,
        **LAYER_NORM,
        **BIASES,
        **read_rope(f, partial=True),
        lm_head_bias=True,
        block="parallel_shared",
        qk_norm=f["qk_layernorm"],
    )


def write_phi(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_phi` reads."""
    return write_common(config) | write_rope(config, partial=True) | {"qk_layernorm": config.qk_norm}


PHI = Family(
    causal_lm="PhiForCausalLM",
    score="PhiForScore",
    prefix="model.",
    names={
        "embed_tokens": "embedding",
        "final_layernorm": "final_norm",
        "layers.{}.input_layernorm": "input_norm",
        "layers.{}.self_attn.q_proj": "attention.q_proj",
        "layers.{}.self_attn.k_proj": "attention.k_proj",
        "layers.{}.self_attn.v_proj": "attention.v_proj",
        "layers.{}.self_attn.dense": "attention.o_proj",
        "layers.{}.self_attn.q_layernorm": "attention.q_norm",
        "layers.{}.self_attn.k_layernorm": "attention.k_norm",
        "layers.{}.mlp.fc1": "mlp.up_proj",
        "layers.{}.mlp.fc2": "mlp.down_proj",
    },
    read=read_phi,
    write=write_phi,
    spelling={"norm_eps": "layer_norm_eps"},
)
