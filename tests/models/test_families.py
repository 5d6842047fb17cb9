"""Every family: small random models that transformers saved (tests/golden/make_families.py), and published configs."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import ScoreConfig
from safe_rlhf_jax.models.families import FAMILIES, family
from safe_rlhf_jax.models.positions import token_positions
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.sharding import axes_of, init_sharded, make_mesh
from tests.golden.make_families import FOLDER, LENGTH, LENGTHS, MODELS, SIDES, VOCAB, batch
from tests.helpers import apply, tiny_config
from tests.models.published import PUBLISHED

EQUAL = 2e-5  # of the largest logit: to transformers, and cached decoding to the full forward
SAME = 1e-5  # of the largest logit: the same row in other company
LAYOUTS = pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
NAMES = pytest.mark.parametrize("name", MODELS)
BY_LENGTH = {"llama_dynamic", "phi3_longrope"}  # frequencies depend on the length of the text


@functools.cache
def load(name, scan_layers):
    return hf.load(FOLDER / name, scan_layers=scan_layers)


def all_sides():
    """Unpadded, left-padded and right-padded rows in one batch."""
    tokens, mask = (np.concatenate(parts) for parts in zip(*map(batch, SIDES), strict=True))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


@functools.cache
def our_logits(name, scan_layers):
    return np.asarray(apply(*load(name, scan_layers), *all_sides()))


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(), equal_nan=False)


# --- transformers -----------------------------------------------------------------------------------------------------


@LAYOUTS
@NAMES
def test_logits_equal_those_of_transformers(name, scan_layers):
    with np.load(FOLDER / name / "logits.npz") as file:
        expected = np.concatenate([file[side] for side in SIDES])
    real = np.asarray(all_sides()[1])
    assert_close(our_logits(name, scan_layers)[real], expected, EQUAL)


# What golden models are there for: without it the logits are others.
SWITCHES = [
    ("llama_llama3", {"rope_scaling": None}),
    ("llama_dynamic", {"rope_scaling": None}),
    ("mistral", {"windows": ()}),
    ("qwen2", {"windows": (4, 4)}),
    ("phi3", {"windows": (5, 5)}),
    ("phi3_longrope", {"rope_scaling": None}),
    ("gemma", {"activation": "gelu"}),
    ("gemma2", {"attention_softcap": None}),
    ("gemma3_text", {"local_rope_theta": None}),
    ("gemma3_text", {"windows": (5, None, 5)}),
    ("gpt_neo", {"windows": (4, None)}),
    ("gptj", {"rotary_interleaved": False}),
    ("gpt_neox", {"block": "pre_norm"}),
    ("gpt_neox", {"rotary_dim": None}),
    ("bloom", {"positions": "rotary"}),
]


@pytest.mark.parametrize(("name", "changes"), SWITCHES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_logits_tell_whether_a_switch_is_set(name, changes):
    module, variables = load(name, False)
    other = CausalLM(dataclasses.replace(module.config, **changes))
    real = np.asarray(all_sides()[1])
    expected = our_logits(name, False)[real]
    actual = np.asarray(apply(other, variables, *all_sides()))[real]
    assert np.abs(actual - expected).max() > 5 * EQUAL * np.abs(expected).max()


# --- Padding and company ----------------------------------------------------------------------------------------------


@NAMES
def test_padding_and_batch_composition_change_nothing(name):
    module, variables = load(name, False)
    tokens, mask = all_sides()
    logits, real = our_logits(name, False), np.asarray(mask)
    none, left, right = np.split(logits, 3)
    for row, length in enumerate(LENGTHS):
        assert_close(left[row, LENGTH - length :][-1], left[row, -1], 0.0)
        if row == 0 or name not in BY_LENGTH:  # the same tokens, then more of them
            assert_close(right[row, :length], none[row, :length], SAME)
    assert_close(left[0], right[0], SAME)
    order = np.array([5, 8, 2, 0, 7, 1, 3, 6, 4])
    other = jnp.where(mask, tokens, 77)[order]
    shuffled = np.asarray(apply(module, variables, other, mask[order]))
    assert_close(shuffled[real[order]], logits[order][real[order]], SAME)


@NAMES
def test_left_padding_changes_nothing(name):
    module, variables = load(name, False)
    tokens, mask = batch("right")
    shifted = [np.roll(x, LENGTH - n, axis=0) for x, n in zip(tokens, LENGTHS, strict=True)]
    moved = [np.roll(x, LENGTH - n, axis=0) for x, n in zip(mask, LENGTHS, strict=True)]
    rows = np.tile(np.arange(3), 3)  # as many as in all_sides: compiled already
    tokens, mask = jnp.asarray(np.stack(shifted)[rows], jnp.int32), jnp.asarray(np.stack(moved)[rows])
    left = np.asarray(apply(module, variables, tokens, mask))
    right = our_logits(name, False)[6:]
    for row, length in enumerate(LENGTHS):
        assert_close(left[row, LENGTH - length :], right[row, :length], SAME)


# --- Decoding ---------------------------------------------------------------------------------------------------------


# Scanning knows of windows and positions, of no other difference.
SCANNED = ("llama", "gemma3_text", "gpt2", "bloom", "mistral")


@pytest.mark.parametrize(
    ("name", "scan_layers"), [*((name, False) for name in MODELS), *((name, True) for name in SCANNED)]
)
def test_cached_decoding_equals_the_full_forward(name, scan_layers):
    module, variables = load(name, scan_layers)
    length = module.config.fixed_length or LENGTH
    tokens, mask = (x[3:5, -length:] for x in all_sides())  # left-padded, the second of 7 tokens
    expected = our_logits(name, scan_layers)[3:5]
    if length < LENGTH:
        expected = np.asarray(apply(module, variables, tokens, mask))
    prompt = length - 5
    prefill = jax.jit(lambda v, *args: module.apply(v, *args, length, method="prefill"))
    decode = jax.jit(lambda v, *args: module.apply(v, *args, method="decode"))
    logits, cache = prefill(variables, tokens[:, :prompt], mask[:, :prompt])
    assert_close(logits, expected[:, prompt - 1], EQUAL)
    positions = token_positions(mask)
    for slot in range(prompt, length):
        visible = mask & (jnp.arange(length) <= slot)[None]
        logits, cache = decode(variables, tokens[:, slot], positions[:, slot], visible, cache, jnp.int32(slot))
        assert_close(logits, expected[:, slot], EQUAL)


@pytest.mark.parametrize(("name", "limit"), [("llama_dynamic", 8), ("phi3_longrope", 8)])
def test_decoding_beyond_the_length_that_fixes_frequencies_is_refused(name, limit):
    module, variables = load(name, False)
    tokens, mask = all_sides()
    with pytest.raises(ValueError, match=f"rope_scaling.*beyond {limit}"):
        jax.eval_shape(lambda: module.apply(variables, tokens, mask, limit + 1, method="prefill"))


def test_more_tokens_than_learned_positions_are_refused():
    module, variables = load("gpt2", False)
    tokens = jnp.zeros((1, 17), jnp.int32)
    with pytest.raises(ValueError, match="17 tokens are more than the model's 16 learned"):
        jax.eval_shape(lambda: module.apply(variables, tokens, tokens == 0))


# --- Files ------------------------------------------------------------------------------------------------------------


@NAMES
def test_a_folder_of_transformers_is_written_as_it_was_read(name, tmp_path):
    module, variables = load(name, True)
    written = load_file(hf.save(tmp_path, module, variables) / hf.WEIGHTS)
    stored = load_file(FOLDER / name / hf.WEIGHTS)
    assert written.keys() == stored.keys()
    for tensor, value in stored.items():
        assert written[tensor].dtype == value.dtype, tensor
        np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)
    again, loaded = hf.load(tmp_path, scan_layers=False)
    assert again.config == dataclasses.replace(module.config, scan_layers=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, load(name, False)[1])


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "gpt_neox"])
def test_a_file_of_the_bare_decoder_loads_too(name, tmp_path):
    """As the hub has GPT-2 and Bloom; NeoX with the name that its head has in memory."""
    from safetensors.numpy import save_file

    prefix = FAMILIES[MODELS[name][0]].prefix
    tensors = load_file(FOLDER / name / hf.WEIGHTS)
    bare = {
        k.removeprefix(prefix.partition(".")[0] + ".").replace("embed_out", "lm_head"): v for k, v in tensors.items()
    }
    save_file(bare, tmp_path / hf.WEIGHTS)
    (tmp_path / "config.json").write_text((FOLDER / name / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path)[1], load(name, True)[1])


def places(weights):
    return [(path, weight.layer) for weight in weights.values() for path in weight.paths]


def check_coverage(module, score=None):
    """The weight map and the parameter tree name the same parameters, each once."""
    found = places(hf.weight_map(module.config, score))
    assert len(set(found)) == len(found)
    expected = set()
    for path, leaf in flatten_dict(hf.abstract_variables(module)["params"]).items():
        stacked = path[:2] == ("decoder", "layers")
        expected |= {(path, i) for i in range(leaf.shape[0])} if stacked else {(path, None)}
    assert set(found) == expected


@pytest.mark.parametrize("score", [None, ScoreConfig("reward")], ids=["lm", "score"])
@LAYOUTS
@NAMES
def test_weight_map_covers_every_parameter_once(name, scan_layers, score):
    config = load(name, scan_layers)[0].config
    check_coverage(CausalLM(config) if score is None else ScoreModel(config, score), score)


# --- Published models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_build_with_their_number_of_parameters(name):
    fields, size = PUBLISHED[name]
    module = CausalLM(family(fields["model_type"]).config_from_hf(fields))
    check_coverage(module)
    params = hf.abstract_variables(module)["params"]
    assert size in (None, sum(leaf.size for leaf in jax.tree.leaves(params)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_survive_writing_and_reading(name):
    fields, _ = PUBLISHED[name]
    this = family(fields["model_type"])
    config = this.config_from_hf(fields)
    assert this.config_from_hf(json.loads(json.dumps(this.config_to_hf(config)))) == config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-3.2-1B", {"rope_theta": 5e5, "tie_embeddings": True}),
        ("Mistral-7B-v0.1", {"windows": (4096,) * 32}),
        ("Mistral-7B-v0.3", {"windows": ()}),
        ("Qwen2.5-7B", {"windows": (), "attention_bias": True, "attention_out_bias": False}),
        ("gemma-2b", {"activation": "gelu_tanh", "num_kv_heads": 1}),
        ("gemma-2-27b", {"attention_scale": 144**-0.5, "windows": (4096, None) * 23}),
        (
            "gemma-3-1b",
            {"windows": ((512,) * 5 + (None,)) * 4 + (512,) * 2, "local_rope_theta": 1e4, "rope_theta": 1e6},
        ),
        ("pythia-70m", {"rotary_dim": 16, "block": "parallel"}),
        ("phi-2", {"rotary_dim": 32}),
        ("bloom-560m", {"num_heads": 16, "hidden_size": 1024, "intermediate_size": 4096, "max_positions": 2048}),
        ("gpt-neo-1.3B", {"windows": (None, 256) * 12}),
    ],
)
def test_older_spellings_of_published_configs_are_understood(name, expected):
    fields, _ = PUBLISHED[name]
    config = family(fields["model_type"]).config_from_hf(fields)
    assert {field: getattr(config, field) for field in expected} == expected


# --- Sharding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama-3.1-70B", "gemma-2-27b", "opt-350m", "gpt2", "bloom-7b1", "phi-2"])
def test_every_matrix_of_a_published_model_is_sharded_over_fsdp_and_tensor(name):
    fields, _ = PUBLISHED[name]
    module = CausalLM(family(fields["model_type"]).config_from_hf(fields))
    tokens = jnp.zeros((1, 2), jnp.int32)
    boxed = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens > 0)["params"]
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)):
        axes = set(itertools.chain.from_iterable(axes_of(name) for name in leaf.names))
        assert len(leaf.names) == leaf.value.ndim
        scanned = leaf.names[0] == "layers"
        if leaf.value.ndim - scanned > 1 and "length" not in leaf.names and "fsdp" in axes:
            assert {"fsdp", "tensor"} <= axes, leaf.names


def test_a_sharded_model_gives_the_logits_of_one_device():
    switches = {"positions": "alibi", "embedding_norm": True, "embedding_size": 32, "lm_head_bias": True,
                "norm": "layer", "qk_norm": True, "windows": (3, None), "gated": False}  # fmt: skip
    module = CausalLM(tiny_config(vocab_size=96, attention_bias=True, mlp_bias=True, scan_layers=True, **switches))
    tokens, mask = (x[:8] for x in all_sides())
    mesh = make_mesh((1, 4, 2))
    with jax.set_mesh(mesh):
        sharded = init_sharded(module.init, mesh, jax.random.key(0, impl="unsafe_rbg"), tokens, mask)
        actual = jax.jit(module.apply)(sharded, tokens, mask)
    expected = apply(module, jax.device_put(jax.device_get(sharded)), tokens, mask)
    assert_close(actual, np.asarray(expected), SAME)


# --- Errors -----------------------------------------------------------------------------------------------------------

UNSUPPORTED = [
    ("llama", {"hidden_act": "relu2"}, "hidden_act 'relu2'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters 'yarn'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder True"),
    ("llama", {"vocab_size": "many"}, "vocab_size"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types 'chunked_attention'"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "rope_parameters.sliding_attention 'linear'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    ("gptj", {"rotary_dim": 3}, "rotary_dim 3"),
    ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ("gpt_neox", {"hidden_act": "mish"}, "hidden_act 'mish'"),
    ("opt", {"activation_function": "tanh"}, "activation_function 'tanh'"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
    ("phi", {"partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), UNSUPPORTED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_switch_that_is_not_implemented_is_named(name, changes, message):
    model_type, fields = MODELS[name]
    fields = {k: v for k, v in fields.items() if k != "rope_parameters" or name == "phi3_longrope"}
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        family(model_type).config_from_hf({"model_type": model_type} | fields | changes)


@pytest.mark.parametrize("model_type", ["falcon", "gemma3", "mamba", ""])
def test_an_unknown_architecture_is_named_with_those_that_exist(model_type):
    with pytest.raises(ValueError, match=f"model_type '{model_type}' is not supported.*bloom.*qwen3"):
        family(model_type)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_that_transformers_knows_is_read_or_known_not_to_matter(model_type):
    from safe_rlhf_jax.models.families.record import ACCEPTED, UNUSED, Fields, completed

    this = FAMILIES[model_type]
    values, defaults = completed({"model_type": model_type})
    fields = Fields(values, this.spelling)
    this.read(fields)
    assert not defaults.keys() - fields.read - this.accepted.keys() - ACCEPTED.keys() - UNUSED


def test_a_field_with_a_meaning_we_do_not_know_is_an_error_unless_it_has_its_default(monkeypatch):
    from safe_rlhf_jax.models.families import record

    monkeypatch.setattr(record, "UNUSED", record.UNUSED - {"attention_dropout"})
    fields = {"model_type": "llama"} | MODELS["llama"][1]
    assert family("llama").config_from_hf(fields | {"attention_dropout": 0.0}).vocab_size == VOCAB
    with pytest.raises(ValueError, match=r"attention_dropout 0\.5 is not supported"):
        family("llama").config_from_hf(fields | {"attention_dropout": 0.5})
