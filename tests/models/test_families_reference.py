"""Every family against transformers itself, in more sizes than the golden models have, and back into transformers."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.models.positions import config_rotary
from tests.golden.make_families import MODELS, SIDES, TOKENS, batch, logits, random_model
from tests.helpers import apply

pytestmark = pytest.mark.reference

EQUAL = 1e-4  # of the largest logit
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
WIDE = {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 5}
ALTERNATING = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 3}
YOUNG = {"n_embd": 35, "n_head": 5, "n_layer": 3, "n_inner": None}

VARIANTS = [
    ("llama", GROUPED | {"tie_word_embeddings": True, "rms_norm_eps": 1e-2, "hidden_act": "gelu"}),
    ("llama", WIDE | {"attention_bias": False, "num_hidden_layers": 3}),
    ("llama_llama3", {"vocab_size": 61, "num_hidden_layers": 1}),
    ("llama_dynamic", {"max_position_embeddings": 5}),
    ("mistral", WIDE | {"sliding_window": 1}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", ALTERNATING),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", GROUPED | ALTERNATING | {"attention_bias": False}),
    ("phi3", GROUPED | {"tie_word_embeddings": True, "sliding_window": None}),
    ("phi3_longrope", {"original_max_position_embeddings": 16}),
    ("gemma", WIDE),
    ("gemma2", GROUPED | {"attn_logit_softcapping": None, "num_hidden_layers": 3}),
    ("gemma2", {"sliding_window": 2, "tie_word_embeddings": False}),
    ("gemma3_text", GROUPED | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None}),
    ("gpt2", YOUNG | {"scale_attn_weights": False, "tie_word_embeddings": False}),
    ("gpt2", {"activation_function": "relu", "layer_norm_epsilon": 1e-2}),
    ("gpt_neo", {"attention_types": [[["local"], 2]], "window_size": 3}),
    ("gptj", YOUNG | {"rotary_dim": 2}),
    ("gpt_neox", {"num_attention_heads": 2, "head_dim": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("opt", {"enable_bias": False, "_remove_final_layer_norm": True}),
    ("opt_post_norm", {"word_embed_proj_dim": 24}),
    ("bloom", {"n_head": 6, "n_layer": 3}),
    ("bloom", {"n_head": 4}),
    ("phi", {"num_key_value_heads": 1, "qk_layernorm": False, "partial_rotary_factor": 0.5}),
]


def variant(name, changes):
    model_type, config = MODELS[name]
    return model_type, config | changes


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_logits_of_more_sizes_equal_those_of_transformers(name, changes, tmp_path):
    model_type, config = variant(name, changes)
    random_model(model_type, config, seed=1).save_pretrained(tmp_path)
    module, variables = hf.load(tmp_path, scan_layers=len(changes) % 2 == 0)
    for side in SIDES:
        tokens, mask = batch(side, seed=1)
        tokens = tokens % config["vocab_size"]
        expected = logits(tmp_path, tokens, mask)
        actual = apply(module, variables, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
        assert np.abs(np.asarray(actual)[mask] - expected).max() <= EQUAL * np.abs(expected).max(), side


@pytest.mark.parametrize("name", MODELS)
def test_transformers_opens_what_we_save(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    random_model(*MODELS[name], seed=2).save_pretrained(tmp_path / "theirs")
    path = hf.save(tmp_path / "ours", *hf.load(tmp_path / "theirs")) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TOKENS))  # as a tokenizer's
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = batch("left", seed=2)
    expected = logits(tmp_path / "theirs", tokens, mask)
    assert np.abs(logits(tmp_path / "ours", tokens, mask) - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("length", [6, 12, 200])
@pytest.mark.parametrize("name", ["llama", "llama_llama3", "llama_linear", "llama_dynamic", "phi3_longrope"])
def test_rotary_tables_equal_those_of_transformers(name, length):
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    model_type, fields = MODELS[name]
    theirs = random_model(model_type, fields).config
    table = {"llama": LlamaRotaryEmbedding, "phi3": Phi3RotaryEmbedding}[model_type](theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cos, sin = table(torch.zeros(1), torch.arange(length)[None])
    config = family(model_type).config_from_hf({"model_type": model_type} | fields)
    config = dataclasses.replace(config, scan_layers=False)
    ours = jax.jit(lambda p: config_rotary(config, p, local=False))(jnp.arange(length, dtype=jnp.int32)[None])
    for actual, expected in zip(ours, (cos, sin), strict=True):
        half = actual.shape[-1]
        np.testing.assert_allclose(actual[:, 0], expected.numpy()[..., :half], atol=1e-4)
