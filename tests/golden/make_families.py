"""Writes tests/golden/families: a small random model of each family, as transformers saves it, and its logits.

Needs torch. From the root of the repository, with the names of the models to write (default: all):

    PYTHONPATH=. python tests/golden/make_families.py [NAME ...]

Every row is computed by itself, in a fresh model: transformers encodes all rows of a batch by the longest one where
frequencies depend on the length of the text.
"""

import inspect
import shutil
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "families"
VOCAB, LENGTH = 97, 12
LENGTHS = (12, 7, 4)  # of the rows of a padded batch
SIDES = ("none", "left", "right")

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2,
         "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "max_position_embeddings": 64,
         "initializer_range": 0.2, **TOKENS, "tie_word_embeddings": False}  # fmt: skip
GPT = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16, "n_inner": 31,
       "initializer_range": 0.2, **TOKENS}  # fmt: skip
HEADS_OF_8 = {"head_dim": 8, "num_key_value_heads": 3}
OPT = {"vocab_size": VOCAB, "hidden_size": 24, "ffn_dim": 31, "num_hidden_layers": 2, "num_attention_heads": 3,
       "max_position_embeddings": 16, "init_std": 0.2, "word_embed_proj_dim": 24, **TOKENS}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.1, 3.0, 8.0],
            "original_max_position_embeddings": 8}  # fmt: skip

# Name: model_type and its configuration. Windows and pretraining lengths are shorter than LENGTH.
MODELS = {
    "llama": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama_llama3": ("llama", SIZES | {"hidden_size": 25, "num_attention_heads": 5, "rope_parameters": LLAMA3}),
    "llama_linear": ("llama", SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
                                       "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama_dynamic": ("llama", SIZES | {"max_position_embeddings": 8, "rope_parameters":
                                        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("mistral", SIZES | {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("qwen2", SIZES | {"hidden_size": 20, "num_attention_heads": 5, "head_dim": 4, "use_sliding_window": True,
                                "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES | {"attention_bias": True}),
    "phi3": ("phi3", SIZES | {"head_dim": 8, "sliding_window": 6}),
    "phi3_longrope": ("phi3", SIZES | {"head_dim": 8, "original_max_position_embeddings": 8, "rope_parameters":
                                       LONGROPE | {"partial_rotary_factor": 0.75}}),
    "gemma": ("gemma", SIZES | {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", SIZES | {"num_key_value_heads": 3, "sliding_window": 5, "query_pre_attn_scalar": 7,
                                  "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                                  "tie_word_embeddings": True}),
    "gemma3_text": ("gemma3_text", SIZES | {"sliding_window": 5, "query_pre_attn_scalar": 7, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2}}, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT),
    "gpt_neo": ("gpt_neo", {"vocab_size": VOCAB, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "window_size": 4,
                            "intermediate_size": 31, "attention_types": [[["global", "local"], 1]],
                            "max_position_embeddings": 16, "initializer_range": 0.2, **TOKENS}),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", SIZES | HEADS_OF_8 | {"rotary_pct": 0.5}),
    "gpt_neox_sequential": ("gpt_neox", SIZES | HEADS_OF_8 | {"use_parallel_residual": False, "attention_bias": False,
                                                              "rotary_pct": 1.0, "hidden_act": "gelu_fast"}),
    "opt": ("opt", OPT),
    "opt_post_norm": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 14}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 24, "n_layer": 2, "n_head": 3, "initializer_range": 0.2,
                        **TOKENS}),
    "phi": ("phi", SIZES | {"head_dim": 8, "partial_rotary_factor": 0.75, "qk_layernorm": True}),
}  # fmt: skip


def batch(side, seed=0):
    """Tokens i64[3, LENGTH] and mask, padded on a side."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (len(LENGTHS), LENGTH))
    lengths = np.array([LENGTH] * len(LENGTHS) if side == "none" else LENGTHS)[:, None]
    columns = np.arange(LENGTH)[None]
    mask = columns >= LENGTH - lengths if side == "left" else columns < lengths
    return np.where(mask, tokens, 0), mask


def random_model(model_type, config, seed=0):
    """A model of transformers with random weights, norms and biases too."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(folder, tokens, mask):
    """Logits f32[real tokens, V] of a saved model, each row by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    found = []
    for row, real in zip(tokens, mask, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        inputs = {"input_ids": torch.tensor(row[None]), "attention_mask": torch.tensor(real[None].astype(np.int64))}
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = torch.tensor(np.maximum(real.cumsum() - 1, 0)[None])
        with torch.no_grad():
            found.append(model(**inputs).logits[0].numpy()[real])
    return np.concatenate(found)


def write(name):
    """Writes one model and its logits."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    random_model(*MODELS[name]).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "logits.npz", **{side: logits(folder, *batch(side)) for side in SIDES})


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        write(name)
        print(name, sum(file.stat().st_size for file in (FOLDER / name).iterdir()))
