import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import ScoreConfig
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from tests.helpers import apply, drawn, make_lm, make_scorer, perturbed, right_padded, tiny_config

GOLDEN = Path(__file__).parent.parent / "golden" / "trajectory"
CONFIGS = {
    "grouped": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_embeddings": True},
    "odd": {"vocab_size": 89, "hidden_size": 30, "intermediate_size": 41, "num_heads": 3, "num_kv_heads": 1,
            "head_dim": 14, "num_layers": 3, "rope_theta": 5e5, "norm_eps": 1e-3},
}  # fmt: skip


def edit_config(folder, **changes):
    """Changes fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder, **changes):
    """Changes tensors; None removes one. Dots are written as double underscores."""
    path = folder / hf.WEIGHTS
    tensors = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def folder(tmp_path):
    """A language model on disk."""
    module, variables = make_lm(tiny_config(attention_bias=True))
    return hf.save(tmp_path / "model", module, perturbed(variables))


@pytest.fixture
def beaver(tmp_path):
    """A reward model on disk, with statistics that are not the initial ones."""
    module, variables = make_scorer("reward", tiny_config(), normalize=True)
    stats = {"mean": jnp.array([0.5]), "var": jnp.array([4.0]), "count": jnp.array([12], jnp.int32)}
    return hf.save(tmp_path / "beaver", module, {"params": perturbed(variables)["params"], "stats": stats})


# --- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_language_model_survives_saving_and_loading_bit_for_bit(tmp_path, name, scan_layers):
    module = CausalLM(tiny_config(**CONFIGS[name], scan_layers=scan_layers))
    variables = {"params": drawn(module)}
    hf.save(tmp_path / "first", module, variables)
    again, loaded = hf.load(tmp_path / "first", scan_layers=scan_layers)
    assert again.config == module.config
    assert_trees_equal(loaded, variables)
    hf.save(tmp_path / "second", *hf.load(tmp_path / "first", scan_layers=not scan_layers))
    for file in ("config.json", hf.WEIGHTS):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("score_type", ["reward", "cost", "critic"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "normalize": True, "momentum": 0.9}], ids=["plain", "normalised"]
)
def test_a_score_model_survives_saving_and_loading_bit_for_bit(tmp_path, score_type, options):
    options = {k: v for k, v in options.items() if k != "normalize" or score_type != "critic"}
    module = ScoreModel(tiny_config(scan_layers=True), ScoreConfig(score_type, **options))
    variables = {"params": drawn(module)}
    if score_type != "critic":
        variables["stats"] = {"mean": jnp.array([-2.5]), "var": jnp.array([0.3]), "count": jnp.array([7], jnp.int32)}
    hf.save(tmp_path / "first", module, variables)
    again, loaded = hf.load(tmp_path / "first", "score")
    assert_trees_equal(loaded, variables)
    assert again.score == module.score
    hf.save(tmp_path / "second", again, loaded)
    for file in ("config.json", hf.WEIGHTS):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("head", ["lm", "score"])
def test_bfloat16_files_load_exactly_in_either_precision(tmp_path, folder, beaver, head):
    source = folder if head == "lm" else beaver
    module, variables = hf.load(source, head)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    stored = hf.save(tmp_path / "half", module, variables | {"params": half})
    assert json.loads((stored / "config.json").read_text())["dtype"] == "bfloat16"
    module, loaded = hf.load(stored, head, "bfloat16")
    assert_trees_equal(loaded["params"], half)
    assert module.config.dtype == "bfloat16"
    assert_trees_equal(hf.load(stored, head)[1]["params"], jax.tree.map(lambda x: x.astype(jnp.float32), half))


def test_a_model_in_several_files_loads_like_one_in_a_single_file(folder):
    _, expected = hf.load(folder)
    tensors = load_file(folder / hf.WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / hf.INDEX).write_text(json.dumps(index))
    (folder / hf.WEIGHTS).unlink()
    assert_trees_equal(hf.load(folder)[1], expected)


@pytest.mark.parametrize(("name", "head"), [("actor", "lm"), ("reward", "score"), ("cost", "score")])
def test_files_of_the_reference_are_written_as_they_were_read(tmp_path, name, head):
    written = load_file(hf.save(tmp_path, *hf.load(GOLDEN / name, head)) / hf.WEIGHTS)
    stored = load_file(GOLDEN / name / hf.WEIGHTS)
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {k: (v.shape, v.dtype) for k, v in stored.items()}
    assert_trees_equal(written, stored)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_loading_in_the_stored_dtype_and_saving_changes_no_bit(tmp_path, folder, stored):
    module, variables = hf.load(folder, dtype=stored)
    first = hf.save(tmp_path / "first", module, variables, max_file_bytes=30_000)
    second = hf.save(tmp_path / "second", *hf.load(first, dtype=stored), max_file_bytes=30_000)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert len(names) > 5
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_fields_of_config_that_we_have_no_use_for_survive(tmp_path, folder):
    fields = {"bos_token_id": 1, "eos_token_id": [2, 7], "use_cache": False, "pretraining_tp": 1, "anything": {"a": 0}}
    stale = {"auto_map": {"AutoModel": "code.py"}, "transformers_version": "4.1"}
    edit_config(folder, **fields, **stale)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": true}')
    before = json.loads((folder / "config.json").read_text())
    saved = hf.save(tmp_path / "saved", *hf.load(folder))
    after = json.loads((saved / "config.json").read_text())
    assert after == {name: value for name, value in before.items() if name not in stale}
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
    reward = hf.save(tmp_path / "reward", *hf.load(folder, "score", score_type="reward"))
    config = json.loads((reward / "config.json").read_text())
    assert {name: config[name] for name in fields} == fields
    assert config["architectures"] == ["LlamaForScore"]
    assert not (reward / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [({}, 2), ({"eos_token_id": 7}, 2), ({"eos_token_id": [7, 2]}, [7, 2]), ({"eos_token_id": [7, 8]}, 2)],
)
def test_a_model_ends_where_its_tokenizer_ends(tmp_path, folder, stored, expected):
    tokenizer = load_tokenizer("demo").hf
    assert tokenizer.eos_token_id == 2
    edit_config(folder, **stored)
    saved = hf.save(tmp_path / "saved", *hf.load(folder), tokenizer)
    for file in ("config.json", "generation_config.json"):
        ids = json.loads((saved / file).read_text())
        assert ids["eos_token_id"] == expected
        assert (ids["bos_token_id"], ids["pad_token_id"]) == (tokenizer.bos_token_id, tokenizer.pad_token_id)


def test_ends_of_a_run_are_written_for_whoever_generates(tmp_path, folder):
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    saved = hf.save(tmp_path / "saved", *hf.load(folder), load_tokenizer("demo").hf, ends=(7, 2))
    generation = json.loads((saved / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"]) == ([2, 7], 0.6)
    assert set(load_tokenizer(str(saved)).ends) == {2, 7}


def test_tokenizer_and_chat_template_are_saved_beside_the_weights(tmp_path):
    tokenizer = load_tokenizer("demo").hf
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    folder = hf.save(tmp_path, *make_lm(tiny_config()), tokenizer)
    again = AutoTokenizer.from_pretrained(folder)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"


# --- The layout of reward and cost models -----------------------------------------------------------------------------


def test_a_stored_head_without_bias_has_none(beaver):
    edit_tensors(beaver, score_head__bias=None)
    module, variables = hf.load(beaver, "score")
    assert not module.score.bias
    assert "score_bias" not in variables["params"]
    apply(module, variables, *right_padded(np.random.default_rng(0), 2, 4, 97))


@pytest.mark.parametrize("bias", [True, False])
def test_the_older_spelling_of_the_bias_field_is_read(folder, bias):
    edit_config(folder, score_type="cost", bias=bias)
    module, variables = hf.load(folder, "score")
    assert module.score.bias == ("score_bias" in variables["params"]) == bias


def test_a_stored_bias_is_used_whatever_the_older_field_says(beaver):
    edit_config(beaver, score_bias=None, bias=False)
    stored = load_file(beaver / hf.WEIGHTS)["score_head.bias"]
    np.testing.assert_array_equal(hf.load(beaver, "score")[1]["params"]["score_bias"], stored)


def test_statistics_come_from_tensors_then_config_then_zero_and_one(beaver):
    edit_config(beaver, mean=[1.5], var=[9.0])
    stats = hf.load(beaver, "score")[1]["stats"]
    assert (float(stats["mean"][0]), float(stats["var"][0]), int(stats["count"][0])) == (0.5, 4.0, 12)
    edit_tensors(beaver, normalizer__mean=None, normalizer__var=None, normalizer__count=None)
    stats = hf.load(beaver, "score")[1]["stats"]
    assert (float(stats["mean"][0]), float(stats["var"][0]), int(stats["count"][0])) == (1.5, 9.0, 0)
    edit_config(beaver, mean=None, var=None)
    stats = hf.load(beaver, "score")[1]["stats"]
    assert (float(stats["mean"][0]), float(stats["var"][0]), int(stats["count"][0])) == (0.0, 1.0, 0)


def test_tensors_that_are_not_parameters_are_ignored(beaver):
    _, expected = hf.load(beaver, "score")
    edit_tensors(beaver, **{"model__layers__0__self_attn__rotary_emb__inv_freq": np.ones(6, np.float32)})
    assert_trees_equal(hf.load(beaver, "score")[1], expected)


def test_a_reward_model_opened_as_a_critic_is_not_normalised(beaver):
    reward, reward_variables = hf.load(beaver, "score")
    critic, variables = hf.load(beaver, "score", score_type="critic")
    assert reward.score.normalize
    assert "stats" not in variables
    assert critic.score.score_type == "critic"
    batch = right_padded(np.random.default_rng(0), 2, 6, 97)
    raw = apply(reward, reward_variables, *batch, method="raw_scores")
    np.testing.assert_array_equal(apply(critic, variables, *batch), raw)
    assert not np.array_equal(apply(reward, reward_variables, *batch), raw)


@pytest.mark.parametrize("score_type", ["reward", "critic"])
def test_a_score_model_from_a_language_model_gets_a_fresh_head(tmp_path, score_type):
    config = tiny_config(hidden_size=2048, num_layers=1, vocab_size=11)
    folder = hf.save(tmp_path, *make_lm(config))
    module, variables = hf.load(folder, "score", score_type=score_type)
    params = variables["params"]
    np.testing.assert_allclose(params["score_kernel"].std(), 2049**-0.5, rtol=0.08)  # five standard errors
    np.testing.assert_array_equal(params["score_bias"], [0.0])
    assert module.score.score_type == score_type
    assert ("stats" in variables) == (score_type == "reward")
    other = hf.load(folder, "score", score_type=score_type, seed=1)[1]["params"]
    assert not np.array_equal(other["score_kernel"], params["score_kernel"])
    np.testing.assert_array_equal(other["decoder"]["embedding"], params["decoder"]["embedding"])


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_config_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model: no config\.json"):
        hf.load(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        hf.load(tmp_path / "nowhere")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The hub's cache in a folder of its own, and no network."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_id_is_opened_from_the_cache_without_a_network(folder, offline):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = offline / "models--owner--name" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (offline / "models--owner--name" / "refs").mkdir()
    (offline / "models--owner--name" / "refs" / "main").write_text(commit)
    assert_trees_equal(hf.load("owner/name")[1], hf.load(folder)[1])


def test_a_failed_download_says_what_to_do(offline):
    with pytest.raises(FileNotFoundError) as error:
        hf.load("owner/name")
    message = str(error.value)
    assert message.startswith("owner/name: no such folder")
    assert all(part in message for part in ("hf auth login", "HF_HUB_OFFLINE=1", "hf download owner/name", "folder"))
    assert "\n" not in message


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(folder, name):
    edit_tensors(folder, **{name.replace(".", "__"): None})
    with pytest.raises(ValueError, match=f"{name}' is missing"):
        hf.load(folder)


def test_a_score_model_is_not_a_language_model(beaver):
    with pytest.raises(ValueError, match=r"lm_head\.weight' is missing"):
        hf.load(beaver)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (48, 48), "(24, 48)"),
        ("model.layers.0.self_attn.k_proj.weight", (48, 24), "(24, 48)"),  # as many numbers, in another order
        ("model.layers.1.self_attn.k_proj.bias", (2, 12), "(24,)"),
        ("model.embed_tokens.weight", (48, 97), "(97, 48)"),
        ("model.norm.weight", (47,), "(48,)"),
    ],
)
def test_a_tensor_of_another_shape_is_named(folder, name, shape, expected):
    edit_tensors(folder, **{name.replace(".", "__"): np.zeros(shape, np.float32)})
    with pytest.raises(ValueError) as error:  # noqa: PT011
        hf.load(folder)
    assert all(part in str(error.value) for part in (name, str(shape), expected))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.2.mlp.up_proj.weight", "score_head.weight"]
)
def test_a_tensor_that_has_no_place_is_named(folder, name):
    edit_tensors(folder, **{name.replace(".", "__"): np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=rf"'{name}' has no place in the model"):
        hf.load(folder)


def test_of_many_tensors_without_a_place_the_first_are_named(folder):
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.input_layernorm\.weight', .* \(and 10 more\)"):
        hf.load(folder)


def test_a_file_of_the_bare_decoder_makes_a_score_model(folder):
    expected = hf.load(folder, "score", score_type="reward")[1]
    path = folder / hf.WEIGHTS
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path)
    assert_trees_equal(hf.load(folder, "score", score_type="reward")[1], expected)


@pytest.mark.parametrize("dtype", ["fp16", "float64", "int8", ""])
def test_a_dtype_that_is_none_is_named_with_those_there_are(folder, dtype):
    with pytest.raises(ValueError, match=rf"dtype '{dtype}': pass one of .*float32.*bfloat16.*float16"):
        hf.load(folder, dtype=dtype)


def test_a_quantised_model_is_refused_by_the_name_of_the_field(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"config\.json: quantization_config"):
        hf.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"model_type 'mamba'.*llama"),
        ({"model_type": None}, "model_type ''"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.*high_freq_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters 'yarn'"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
    ],
)
def test_an_unsupported_switch_is_named(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        hf.load(folder)


def test_a_model_that_does_not_say_what_its_scores_are_asks_for_it(folder):
    with pytest.raises(ValueError, match="score_type None"):
        hf.load(folder, "score")


def test_config_fields_of_older_files_have_their_usual_defaults(folder):
    edit_config(folder, rope_parameters=None, rope_theta=5e5, head_dim=None, num_key_value_heads=None)
    config = family("llama").config_from_hf(json.loads((folder / "config.json").read_text()))
    assert (config.rope_theta, config.head_dim, config.num_kv_heads) == (5e5, 12, 4)
    edit_config(folder, rope_theta=None, rope_scaling={"rope_type": "default"})
    assert family("llama").config_from_hf(json.loads((folder / "config.json").read_text())).rope_theta == 1e4


# --- transformers -----------------------------------------------------------------------------------------------------


def torch_batch(rng, side, vocab):
    tokens, mask = right_padded(rng, 3, 9, vocab)
    if side == "none":
        mask = jnp.ones_like(mask)
    return (tokens[:, ::-1], mask[:, ::-1]) if side == "left" else (tokens, mask)


def their_logits(model, tokens, mask):
    import torch

    mask = np.array(mask)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)  # as `generate` counts them
    with torch.no_grad():
        out = model(
            torch.tensor(np.array(tokens), dtype=torch.long),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
        )
    return out.logits.numpy()


@pytest.mark.reference
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(tmp_path, name, side):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = tiny_config(**CONFIGS[name])
    theirs = LlamaForCausalLM(LlamaConfig(**family("llama").config_to_hf(config))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    tokens, mask = torch_batch(np.random.default_rng(0), side, config.vocab_size)
    module, variables = hf.load(tmp_path)
    actual, expected = apply(module, variables, tokens, mask), their_logits(theirs, tokens, mask)
    real = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(actual)[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_opens_what_we_save(tmp_path, name):
    import torch
    from transformers import AutoModelForCausalLM

    module, variables = make_lm(tiny_config(**CONFIGS[name]))
    variables = perturbed(variables)
    hf.save(tmp_path, module, variables)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = torch_batch(np.random.default_rng(1), "none", module.config.vocab_size)
    expected = their_logits(theirs.eval(), tokens, mask)
    np.testing.assert_allclose(apply(module, variables, tokens, mask), expected, rtol=1e-5, atol=1e-5)
