"""PEFT folders: written and read back, merged into their base, and refused where they would mean something else."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import TARGETS, Lora, ScoreConfig
from safe_rlhf_jax.models.families.record import module_path
from safe_rlhf_jax.models.peft import kernel_shapes, linear_maps, read_adapter
from safe_rlhf_jax.models.peft_export import write_adapter
from safe_rlhf_jax.models.peft_heads import read_head
from safe_rlhf_jax.sharding import make_mesh
from tests.golden.make_families import FOLDER
from tests.models.test_hf_streaming import host_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gptj",
            "gpt_neox", "opt", "opt_post_norm", "bloom", "phi")  # fmt: skip
UNROLLED = ("llama", "phi3", "gpt2", "gpt_neox")
CASES = pytest.mark.parametrize(
    ("name", "scan_layers"),
    [(name, True) for name in FAMILIES] + [(name, False) for name in UNROLLED],
    ids=[*FAMILIES, *(f"{name}-unrolled" for name in UNROLLED)],
)
PREFIX = "base_model.model."


def config_of(name, scan_layers=True):
    return dataclasses.replace(hf.stored_config(FOLDER / name), scan_layers=scan_layers)


def random_adapter(config, form, seed=0):
    """A tree of A and B, all of it random."""
    rng = np.random.default_rng(seed)
    size = form.layers or config.num_layers
    ins = {path: weight.in_ndim for weight in linear_maps(config).values() for path in weight.paths}
    out = {}
    for path, shape in kernel_shapes(config).items():
        if path[-2] not in form.targets:
            continue
        a, b = (*shape[: ins[path]], form.rank), (form.rank, *shape[ins[path] :])
        stacks = {path[:-1]: (size,)} if config.scan_layers else {
            module_path(config, ".".join(path[2:-1]), layer): () for layer in range(config.num_layers)[-size:]
        }  # fmt: skip
        for place, axis in stacks.items():
            out[(*place, "lora_a")] = rng.standard_normal(axis + a).astype(np.float32)
            out[(*place, "lora_b")] = rng.standard_normal(axis + b).astype(np.float32)
    return unflatten_dict(out)


def written(folder, name, form, *, scan_layers=True, seed=0, **more):
    """Writes a random adapter of a golden model; returns its folder and tree."""
    config = config_of(name, scan_layers)
    adapter = random_adapter(config, form, seed)
    return write_adapter(folder, config, form, adapter, base=str(FOLDER / name), **more), adapter


def edit(folder, **changes):
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in (fields | changes).items() if v != "absent"}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: np.ascontiguousarray(v) for k, v in change(tensors).items()}, folder / WEIGHTS)


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def plus_product(params, adapter, scale):
    """Parameters + s·A·B, leaf by leaf, of a scanned or an unrolled tree."""
    out, factors = dict(flatten_dict(params)), flatten_dict(adapter)
    for path in [path[:-1] for path in factors if path[-1] == "lora_a"]:
        a, b = (np.asarray(factors[(*path, name)], np.float64) for name in ("lora_a", "lora_b"))
        kernel = np.array(out[(*path, "kernel")], np.float64)
        if "layers" in path:
            for row, a_row, b_row in zip(kernel[-len(a) :], a, b, strict=True):
                row += scale * np.tensordot(a_row, b_row, 1)
        else:
            kernel += scale * np.tensordot(a, b, 1)
        out[(*path, "kernel")] = kernel
    return unflatten_dict(out)


def assert_close(actual, expected, tolerance=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.abs(a - e).max() <= tolerance * np.abs(e).max()


# --- Round trips ------------------------------------------------------------------------------------------------------


@CASES
def test_an_adapter_is_read_back_as_it_was_written(name, scan_layers, tmp_path):
    form = Lora(3, 8.0, layers=1, rank_stabilized=True, dropout=0.1)
    folder, adapter = written(tmp_path / "a", name, form, scan_layers=scan_layers)
    config, stored = config_of(name, scan_layers), read_adapter(folder)
    targets = tuple(t for t in TARGETS if config.gated or t != "gate_proj")
    assert stored.form(config) == dataclasses.replace(form, targets=targets)
    assert_trees_equal(stored.params(config, form), adapter)
    assert stored.base == str(FOLDER / name)


@CASES
def test_a_folder_is_opened_as_base_plus_product(name, scan_layers, tmp_path):
    form = Lora(2, 6.0)
    folder, adapter = written(tmp_path / "a", name, form, scan_layers=scan_layers)
    module, base = hf.load(FOLDER / name, scan_layers=scan_layers)
    merged_module, merged = hf.load(folder, scan_layers=scan_layers)
    assert merged_module.config == module.config
    assert_close(merged["params"], plus_product(base["params"], adapter, 3.0))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "bloom"])
@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("o_proj", "up_proj"), ("k_proj",), ("down_proj",)], ids="+".join
)
def test_some_targets_are_read_back_and_the_other_matrices_stay(name, targets, tmp_path):
    form = Lora(3, 3.0, targets)
    folder, adapter = written(tmp_path / "a", name, form)
    stored, config = read_adapter(folder), config_of(name)
    assert stored.form(config) == form
    assert_trees_equal(stored.params(config, form), adapter)
    assert_close(hf.load(folder)[1]["params"], plus_product(hf.load(FOLDER / name)[1]["params"], adapter, 1.0))


def test_an_untrained_adapter_of_a_fused_matrix_is_read_back(tmp_path):
    config, form = config_of("gpt2"), Lora(3, 3.0, ("q_proj", "v_proj"))
    adapter = random_adapter(config, form)
    zero = {path: leaf * (path[-1] == "lora_a") for path, leaf in flatten_dict(adapter).items()}
    folder = write_adapter(tmp_path, config, form, unflatten_dict(zero), base=str(FOLDER / "gpt2"))
    assert_trees_equal(read_adapter(folder).params(config, form), unflatten_dict(zero))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_one_a_of_a_fused_matrix_is_that_of_each_part_and_is_written_as_one(name, tmp_path):
    form, config = Lora(4, 8.0), config_of(name)
    folder, _ = written(tmp_path / "a", name, form)
    rng = np.random.default_rng(1)
    shape = lambda k, v: (4, v.shape[1]) if "lora_A" in k else (v.shape[0], 4)  # noqa: E731
    edit_tensors(folder, lambda t: {k: rng.standard_normal(shape(k, v)).astype(np.float32) for k, v in t.items()})
    edit(folder, rank_pattern={}, alpha_pattern={})
    stored = read_adapter(folder)
    adapter = stored.params(config, form)
    attention = adapter["decoder"]["layers"]["attention"]
    np.testing.assert_array_equal(attention["q_proj"]["lora_a"], attention["v_proj"]["lora_a"])
    again = write_adapter(tmp_path / "b", config, form, adapter, base=stored.base)
    tensors, expected = load_file(again / WEIGHTS), load_file(folder / WEIGHTS)
    assert tensors.keys() == expected.keys()
    for key in tensors:
        np.testing.assert_array_equal(tensors[key], expected[key])
    assert_close(hf.load(folder)[1]["params"], plus_product(hf.load(FOLDER / name)[1]["params"], adapter, 2.0))


def test_ranks_of_a_fused_matrix_are_multiples_and_keep_the_scale(tmp_path):
    folder, _ = written(tmp_path, "gpt2", Lora(2, 4.0))
    fields = json.loads((folder / CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"]) == (2, 4)
    assert (fields["rank_pattern"], fields["alpha_pattern"]) == ({"attn.c_attn": 6}, {"attn.c_attn": 12})
    assert fields["fan_in_fan_out"] is True
    assert fields["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    folder, _ = written(tmp_path, "gpt2", Lora(2, 4.0, ("o_proj",)))
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == ["attn.c_proj"]


# --- Forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_larger_form_is_filled_with_zeros_and_means_the_same(name, scan_layers, tmp_path):
    small, large = Lora(2, 6.0, ("q_proj", "down_proj"), layers=1), Lora(5, 2.0, rank_stabilized=True)
    folder, adapter = written(tmp_path, name, small, scan_layers=scan_layers)
    config = config_of(name, scan_layers)
    padded = read_adapter(folder).params(config, large)
    shapes = jax.tree.map(np.shape, random_adapter(config, large))
    assert jax.tree.map(np.shape, padded) == shapes
    base = hf.load(FOLDER / name, scan_layers=scan_layers)[1]["params"]
    assert_close(plus_product(base, padded, large.scale), plus_product(base, adapter, small.scale))


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_an_adapter_that_is_trained_further_in_a_larger_form_has_no_dead_ranks(scan_layers, tmp_path):
    small, large = Lora(2, 2.0, ("q_proj",), layers=1), Lora(3, 3.0, ("q_proj", "o_proj"))
    folder, _ = written(tmp_path, "llama", small, scan_layers=scan_layers)
    stored, config = read_adapter(folder), config_of("llama", scan_layers)
    fresh = random_adapter(config, large, seed=1)
    zero, started = (flatten_dict(stored.params(config, large, start)) for start in (None, fresh))
    for path, leaf in started.items():
        if path[-1] == "lora_b":
            np.testing.assert_array_equal(leaf, zero[path])
        else:
            assert leaf.all()
            held = zero[path] != 0
            np.testing.assert_array_equal(leaf, np.where(held, zero[path], flatten_dict(fresh)[path]))


def test_ranks_and_alphas_of_single_modules_are_kept_in_b(tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(2, 4.0, ("q_proj", "down_proj")))
    edit(folder, rank_pattern={"layers.1.self_attn.q_proj": 4}, alpha_pattern={"mlp.down_proj": 1})
    wide = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_"
    edit_tensors(folder, lambda t: t | {f"{wide}A.weight": np.ones((4, 24), np.float32),
                                        f"{wide}B.weight": np.ones((30, 4), np.float32)})  # fmt: skip
    stored, config = read_adapter(folder), config_of("llama")
    form = stored.form(config)
    assert (form.rank, form.alpha, form.scale) == (4, 4.0, 1.0)
    adapter = stored.params(config, form)
    tensors = load_file(folder / WEIGHTS)
    down = adapter["decoder"]["layers"]["mlp"]["down_proj"]["lora_b"]
    np.testing.assert_array_equal(down[0, :2], 0.5 * tensors[f"{PREFIX}model.layers.0.mlp.down_proj.lora_B.weight"].T)
    assert not down[0, 2:].any()
    base = hf.load(FOLDER / "llama")[1]["params"]
    assert_close(hf.load(folder)[1]["params"], plus_product(base, adapter, form.scale))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Lora(3, 4.0), r"'model\.layers\.0\.self_attn\.q_proj' does not fit into lora\.rank: 3 is less than its 4"),
        (Lora(4, 4.0, ("q_proj",)), r"does not fit into lora\.targets: 'o_proj' is adapted"),
        (Lora(4, 4.0, layers=1), r"does not fit into lora\.layers: layer 0 of 2 is adapted, not one of the last 1"),
    ],
    ids=["rank", "target", "layer"],
)
def test_what_does_not_fit_into_a_form_is_said_with_the_setting(form, message, tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(4, 4.0, ("q_proj", "o_proj")))
    with pytest.raises(ValueError, match=message):
        read_adapter(folder).params(config_of("llama"), form)


def test_adapters_on_first_layers_are_merged_and_not_trained(tmp_path):
    form = Lora(2, 4.0, ("q_proj",), layers=1)
    folder, adapter = written(tmp_path, "llama", form)
    edit(folder, layers_to_transform=[0])
    edit_tensors(folder, lambda t: {k.replace("layers.1", "layers.0"): v for k, v in t.items()})
    with pytest.raises(ValueError, match=r"layers \[0\] of 2 have adapters; training takes .* the last k"):
        read_adapter(folder).form(config_of("llama"))
    kernel, base = (hf.load(place)[1]["params"]["decoder"]["layers"]["attention"]["q_proj"]["kernel"]
                    for place in (folder, FOLDER / "llama"))  # fmt: skip
    leaves = adapter["decoder"]["layers"]["attention"]["q_proj"]
    assert_close(kernel[0] - base[0], 2.0 * np.tensordot(leaves["lora_a"][0], leaves["lora_b"][0], 1), 1e-5)
    np.testing.assert_array_equal(kernel[1], base[1])


# --- Opened as a model ------------------------------------------------------------------------------------------------


def test_shards_are_those_of_the_whole_model(tmp_path):
    config = dataclasses.replace(
        config_of("llama"), vocab_size=96, hidden_size=32, intermediate_size=64, num_heads=8, num_kv_heads=8,
        head_dim=8, stored={},
    )  # fmt: skip
    module = hf.CausalLM(config)
    shapes = hf.abstract_variables(module)
    variables = jax.tree.map(lambda x: np.random.default_rng(x.size).standard_normal(x.shape, np.float32), shapes)
    base = hf.save(tmp_path / "base", module, variables)
    form = Lora(3, 3.0)
    folder = write_adapter(tmp_path / "a", config, form, random_adapter(config, form), base=str(base))
    _, whole = hf.load(folder)
    _, sharded = hf.load(folder, mesh=make_mesh((2, 2, 2)))
    assert_close(jax.device_get(sharded), jax.device_get(whole))


def test_merging_holds_one_layer_of_one_parameter_more_in_host_memory(tmp_path):
    config = dataclasses.replace(
        config_of("llama"), vocab_size=512, hidden_size=256, intermediate_size=1024, num_layers=8, num_heads=8,
        num_kv_heads=8, head_dim=32, stored={},
    )  # fmt: skip
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), hf.abstract_variables(hf.CausalLM(config)))
    base = hf.save(tmp_path / "base", hf.CausalLM(config), variables)
    form = Lora(2, 2.0)
    folder = write_adapter(tmp_path / "a", config, form, random_adapter(config, form), base=str(base))
    hf.load(folder)  # what stays in caches does not count
    peak, _ = host_bytes(lambda: hf.load(folder))
    assert (
        peak < 1.5 * variables["params"]["decoder"]["layers"]["mlp"]["up_proj"]["kernel"].nbytes + 2 * 2**20
    )  # a product of all layers would be as much again


def test_the_sum_is_taken_in_float32_and_rounded_once(tmp_path):
    form = Lora(2, 2.0, ("q_proj",))
    folder, adapter = written(tmp_path, "llama", form)
    exact = plus_product(hf.load(FOLDER / "llama")[1]["params"], adapter, 1.0)
    half = hf.load(folder, dtype="bfloat16")[1]["params"]
    name = ("decoder", "layers", "attention", "q_proj", "kernel")
    expected = flatten_dict(exact)[name].astype(np.float32).astype(flatten_dict(half)[name].dtype)
    np.testing.assert_array_equal(flatten_dict(half)[name], expected)


def test_adapters_on_one_base_share_what_none_of_them_changes(tmp_path):
    folders = [written(tmp_path / str(seed), "llama", Lora(2, 2.0, ("q_proj",)), seed=seed)[0] for seed in (0, 1)]
    placed = {}
    first, second, base = (hf.load(place, placed=placed)[1]["params"] for place in (*folders, FOLDER / "llama"))
    different = {path[-2] for path, leaf in flatten_dict(first).items() if leaf is not flatten_dict(second)[path]}
    assert different == {"q_proj"}
    assert base["decoder"]["embedding"] is first["decoder"]["embedding"]
    kernels = [tree["decoder"]["layers"]["attention"]["q_proj"]["kernel"] for tree in (first, second, base)]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_config_and_vocabulary_are_the_bases(tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0))
    assert hf.read_config(folder) == hf.read_config(FOLDER / "llama")
    assert hf.stored_config(folder) == hf.stored_config(FOLDER / "llama")
    assert hf.inspect(folder).module.config.num_layers == 2


def test_a_merged_model_is_saved_over_its_adapter_and_an_adapter_over_a_model(tmp_path):
    folder, adapter = written(tmp_path / "a", "llama", Lora(2, 2.0))
    module, merged = hf.load(folder)
    hf.save(folder, module, merged)
    assert not (folder / CONFIG).exists()
    assert_trees_equal(jax.device_get(hf.load(folder)[1]), jax.device_get(merged))
    write_adapter(folder, module.config, Lora(2, 2.0), adapter, base=str(FOLDER / "llama"))
    assert not (folder / "model.safetensors").exists()
    assert_trees_equal(jax.device_get(hf.load(folder)[1]), jax.device_get(merged))


def test_end_tokens_are_written_beside_an_adapter_and_kept(tmp_path):
    folder, _ = written(tmp_path / "a", "llama", Lora(2, 2.0), ends=(2, 5))
    saved = hf.save(tmp_path / "merged", *hf.load(folder))
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [2, 5]


# --- Score heads ------------------------------------------------------------------------------------------------------

STATISTICS = {"mean": np.array([1.5], np.float32), "var": np.array([0.3], np.float32), "count": np.array([7], np.int32)}


@pytest.mark.parametrize(
    ("score", "stats"),
    [
        (ScoreConfig("reward", normalize=True, momentum=0.9), STATISTICS),
        (ScoreConfig("cost", bias=False), STATISTICS),
        (ScoreConfig("critic"), {}),
    ],
    ids=["reward", "cost", "critic"],
)
def test_head_bias_and_normaliser_are_read_back(score, stats, tmp_path):
    rng = np.random.default_rng(0)
    head = {"score_kernel": rng.standard_normal((24, 1)).astype(np.float32)}
    head |= {"score_bias": np.array([0.1], np.float32)} if score.bias else {}
    folder, adapter = written(tmp_path, "llama", Lora(2, 2.0), score=score, head=head, stats=stats)
    assert load_file(folder / WEIGHTS)[f"{PREFIX}score.weight"].shape == (1, 24)
    found, found_head, found_stats = read_head(read_adapter(folder), config_of("llama"))
    assert found == score
    assert_trees_equal(found_head, head)
    assert_trees_equal(found_stats, stats)
    module, variables = hf.load(folder, "score", score_type=score.score_type, as_stored=True)
    assert module.score == score
    expected = plus_product(hf.load(FOLDER / "llama")[1]["params"], adapter, 1.0)
    assert_close(variables["params"], {"decoder": expected["decoder"]} | head)
    assert_trees_equal(jax.device_get(variables.get("stats", {})), stats)
    assert hf.stored_score_type(hf.read_config(folder)) == score.score_type


def test_a_head_that_skips_padding_ids_is_read_back(tmp_path):
    score = ScoreConfig("reward", bias=False, pad_id=0)
    head = {"score_kernel": np.ones((24, 1), np.float32)}
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0), score=score, head=head, stats=STATISTICS)
    assert hf.load(folder, "score", as_stored=True)[0].score == score


@pytest.fixture
def classifier(tmp_path):
    """A SEQ_CLS folder as peft writes it."""
    folder, _ = written(tmp_path / "a", "llama", Lora(2, 2.0), score=ScoreConfig("reward", bias=False),
                        head={"score_kernel": np.ones((24, 1), np.float32)}, stats=STATISTICS)  # fmt: skip
    (folder / "score_config.json").unlink()
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if "normalizer" not in k})
    return folder


def test_sequence_classification_is_a_reward_model_unless_a_file_beside_says_cost(classifier):
    module, _ = hf.load(classifier, "score", as_stored=True)
    assert module.score == ScoreConfig("reward", bias=False, pad_id=0)
    with pytest.raises(ValueError, match='write "score_type": "cost" there'):
        hf.load(classifier, "score", score_type="cost", as_stored=True)
    (classifier / "config.json").write_text('{"score_type": "cost"}')
    assert hf.load(classifier, "score", as_stored=True)[0].score.score_type == "cost"


def test_an_adapters_head_takes_the_place_of_its_bases(classifier, tmp_path):
    shutil.copytree(FOLDER / "llama", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / hf.WEIGHTS)
    more = {"score_head.weight": np.zeros((1, 24), np.float32), "normalizer.mean": np.ones(1, np.float32)}
    save_file(tensors | more, tmp_path / "base" / hf.WEIGHTS)
    edit(classifier, base_model_name_or_path=str(tmp_path / "base"))
    module, variables = hf.load(classifier, "score", as_stored=True)
    assert not module.score.bias
    np.testing.assert_array_equal(variables["params"]["score_kernel"], np.ones((24, 1)))
    assert variables["stats"]["mean"] == 0


def test_a_score_model_is_no_language_model_and_has_one_label(classifier):
    with pytest.raises(ValueError, match="'SEQ_CLS' is a reward or cost model, not a language model"):
        hf.load(classifier)
    edit_tensors(classifier, lambda t: t | {f"{PREFIX}score.weight": np.ones((3, 24), np.float32)})
    with pytest.raises(ValueError, match=r"score\.weight' is \[3, 24\]; a reward or cost model has one label"):
        hf.load(classifier, "score")


def test_a_language_model_gets_a_fresh_head_only_to_be_trained(tmp_path):
    folder, adapter = written(tmp_path, "llama", Lora(2, 2.0))
    with pytest.raises(ValueError, match="holds no score head"):
        hf.load(folder, "score", score_type="reward", as_stored=True)
    _, variables = hf.load(folder, "score", score_type="reward")
    assert variables["params"]["score_kernel"].any()
    expected = plus_product(hf.load(FOLDER / "llama")[1]["params"], adapter, 1.0)
    assert_close(variables["params"]["decoder"], expected["decoder"])


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; supported: 'LORA'; merge the adapter"),
        ({"peft_type": "absent"}, "peft_type None is not supported"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type 'SEQ_2_SEQ_LM' is not supported; supported: 'CAUSAL_LM', 'SEQ_CLS'"),
        ({"use_dora": True}, "use_dora True is not supported; merge the adapter"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens \[1\] is not supported"),
        ({"a_later_field": {"x": 1}}, r"a_later_field .* is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported; supported: 'none'"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, r"modules_to_save \['embed_tokens', 'lm_head'\] is not"),
        ({"modules_to_save": ["score"]}, r"modules_to_save \['score'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' has changed the base: convert"),
        ({"r": 0}, "r is 0; a rank is a whole number from 1 on"),
        ({"r": True}, "r is True; a rank"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0; a rank"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
        ({"lora_alpha": 0}, "lora_alpha is 0; write a positive number"),
        ({"alpha_pattern": {"(": 1}}, r"'\(' is no regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"revision": "abc"}, "revision 'abc' .* is not fetched"),
        (
            {"task_type": "SEQ_CLS"},
            r"task_type is 'SEQ_CLS', but there is no tensor 'base_model\.model\.score\.weight'",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_not_supported_is_one_line_that_names_the_field(changes, message, tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0))
    edit(folder, **changes)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}") as error:
        hf.load(folder)
    assert "\n" not in str(error.value)


def without(pattern):
    return lambda tensors: {k: v for k, v in tensors.items() if not re.search(pattern, k)}


def renamed(old, new):
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("layers.1.", "layers.7."), r"layers\.7\..* has no place: .* of the 2 layers of '.*another base"),
        (renamed("model.layers", "transformer.h"), r"transformer\.h\..* has no place"),
        (renamed("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector"), "lora_magnitude_vector' has no place"),
        (renamed("layers.0.self_attn.q_proj.lora_A", "embed_tokens.lora_embedding_A"), "embedding_A.* has no place"),
        (lambda t: t | {f"{PREFIX}lm_head.weight": np.ones((97, 24), np.float32)}, r"lm_head\.weight' has no place"),
        (lambda t: t | {f"{PREFIX}model.layers.0.self_attn.q_proj.bias": np.ones(30, np.float32)}, "has no place"),
        (without(r"layers\.1\..*q_proj"), r"no lora_A and lora_B of 'model\.layers\.1\.self_attn\.q_proj' in"),
        (without("lora_B"), "no lora_A and lora_B of"),
        (lambda t: {k: v[:, :5] if "q_proj.lora_A" in k else v for k, v in t.items()}, r"is F32 \[2, 5\]; .*\[2, 24\]"),
        (lambda t: {k: v[:1] if "lora_A" in k else v for k, v in t.items()}, r"is F32 \[1, .* rank 2 ask for \[2"),
        (lambda t: {k: np.zeros(0, np.float32) for k in t}, r"is F32 \[0\]"),
        (lambda t: {k: v.astype(np.int64) for k, v in t.items()}, "is I64"),
        (lambda t: {k: v * np.nan for k, v in t.items()}, "holds a number that is not finite"),
    ],
    ids=["layer", "names", "DoRA", "embedding", "head", "bias", "layer lacking", "B lacking", "width", "rank", "ZeRO",
         "integers", "NaN"],
)  # fmt: skip
def test_tensors_that_the_base_has_no_place_for_are_named(change, message, tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0))
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{message}") as error:
        hf.load(folder)
    assert "\n" not in str(error.value)


def test_tensors_that_peft_would_ignore_are_not_merged(tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0))
    for changes in ({"target_modules": ["q_proj"]}, {"layers_to_transform": [1]}, {"exclude_modules": ["v_proj"]}):
        copy = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        edit(copy, **changes)
        with pytest.raises(ValueError, match=r"which adapter_config\.json does not name: peft ignores them"):
            hf.load(copy)


@pytest.mark.parametrize("targets", [r".*\.(self_attn|mlp)\.\w+_proj", "all-linear", list(TARGETS)], ids=str)
def test_targets_are_matched_as_in_peft(targets, tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0))
    edit(folder, target_modules=targets)
    assert len(read_adapter(folder).adapted(config_of("llama"))) == 14


def test_a_folder_of_another_base_is_said(tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0))
    for other in ("gpt2", "gemma3_text", "qwen2"):
        edit(folder, base_model_name_or_path=str(FOLDER / other))
        with pytest.raises(ValueError, match=rf"{other}.*a PEFT folder of another base"):
            hf.load(folder)


def test_a_write_that_is_killed_leaves_nothing_that_looks_like_an_adapter(tmp_path, monkeypatch):
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0))

    def killed(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("safe_rlhf_jax.models.peft_export.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, "llama", Lora(2, 2.0))
    assert not (folder / CONFIG).exists()


def test_what_is_wrong_with_the_base_is_said(tmp_path):
    folder, _ = written(tmp_path / "a", "llama", Lora(2, 2.0))
    edit(folder, base_model_name_or_path=str(tmp_path / "nowhere/at/all"))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: base_model_name_or_path .*all: no such folder"):
        hf.load(folder)
    second, _ = written(tmp_path / "b", "llama", Lora(2, 2.0))
    edit(second, base_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="is a PEFT adapter too; merge"):
        hf.load(second)
    base = shutil.copytree(FOLDER / "llama", tmp_path / "base")
    (base / "config.json").write_text(json.dumps(hf.read_config(base) | {"quantization_config": {"bits": 4}}))
    edit(second, base_model_name_or_path=str(base))
    with pytest.raises(ValueError, match=rf"^{base}: config\.json: quantization_config is not supported"):
        hf.load(second)


@pytest.mark.parametrize(
    ("left", "message"), [("adapter_model.bin", "pickled weights are never"), ("x", "fetch the folder")]
)
def test_an_adapter_without_weights_is_said(left, message, tmp_path):
    folder, _ = written(tmp_path, "llama", Lora(2, 2.0))
    (folder / WEIGHTS).rename(folder / left)
    with pytest.raises(FileNotFoundError, match=rf"adapter_config\.json, but no adapter_model\.safetensors; {message}"):
        hf.load(folder)
