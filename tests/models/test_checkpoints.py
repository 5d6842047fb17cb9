"""Checkpoints that people bring: heads beside tied embeddings, wrappers' names, odd numbers, odd fields."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import save_file as save_any
from safetensors.numpy import load_file, save_file

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.models.families.reading import contradictions
from safe_rlhf_jax.models.safetensors_io import PART, Tensors
from safe_rlhf_jax.sharding import make_mesh
from tests.golden.make_families import FOLDER, MODELS
from tests.helpers import apply, make_lm, perturbed, right_padded, tiny_config
from tests.models.published import PUBLISHED

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CONFIG = tiny_config(vocab_size=96, num_layers=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Language models on disk, one with a head of its own and one without."""
    root = tmp_path_factory.mktemp("saved")
    for name, tied in (("tied", True), ("untied", False)):
        module, variables = make_lm(tiny_config(vocab_size=96, num_layers=1, tie_embeddings=tied))
        hf.save(root / name, module, perturbed(variables))
    return root


@pytest.fixture
def tied(saved, tmp_path):
    return shutil.copytree(saved / "tied", tmp_path / "tied")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "untied", tmp_path / "untied")


def edit_config(folder, **changes):
    """Changes fields of config.json; "absent" removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if not isinstance(v, str) or v != "absent"}))


def edit_tensors(folder, change):
    path = folder / hf.WEIGHTS
    save_file(change(load_file(path)), path)


def logits(folder, **options):
    module, variables = hf.load(folder, **options)
    return np.asarray(apply(module, variables, *right_padded(np.random.default_rng(0), 2, 6, 96)))


# --- Tied embeddings and a stored head --------------------------------------------------------------------------------


def other_head(tensors):
    return tensors | {HEAD: tensors[EMBEDDING][::-1].copy()}


def test_a_stored_head_that_differs_is_used_and_that_is_said(tied, folder, tmp_path):
    edit_tensors(tied, other_head)
    with pytest.warns(
        UserWarning, match=rf"tied: tie_word_embeddings is true.*'{HEAD}'.*differs.*false into config"
    ) as said:
        module, variables = hf.load(tied)
    assert len(said) == 1
    assert not module.config.tie_embeddings
    stored = load_file(tied / hf.WEIGHTS)
    np.testing.assert_array_equal(variables["params"]["lm_head"]["kernel"], stored[HEAD].T)
    edit_tensors(folder, lambda _: stored)  # the same tensors where config.json says what they are
    np.testing.assert_array_equal(logits(tied), logits(folder))
    again = hf.save(tmp_path / "again", module, variables)  # an export says what it holds
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is False
    assert load_file(again / hf.WEIGHTS).keys() == stored.keys()


@pytest.mark.parametrize("store", [np.float32, np.float16, jnp.bfloat16])
def test_a_stored_head_that_is_the_embedding_is_left_out_without_a_word(tied, recwarn, store):
    edit_tensors(tied, lambda t: t | {EMBEDDING: np.asarray(np.asarray(t[EMBEDDING], store), np.float32)})
    expected = logits(tied)
    save_any(load_flax(tied) | {HEAD: jnp.asarray(load_file(tied / hf.WEIGHTS)[EMBEDDING], store)}, tied / hf.WEIGHTS)
    np.testing.assert_array_equal(logits(tied), expected)
    assert hf.load(tied)[0].config.tie_embeddings
    assert not [w for w in recwarn if "tie_word_embeddings" in str(w.message)]


def load_flax(folder):
    with safe_open(folder / hf.WEIGHTS, framework="flax") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict


def test_a_head_that_differs_in_its_last_number_differs(tied):
    def change(tensors):
        head = tensors[EMBEDDING].copy()
        head[-1, -1] += 1.0
        return tensors | {HEAD: head}

    edit_tensors(tied, change)
    with pytest.warns(UserWarning, match="differs"):
        assert not hf.load(tied)[0].config.tie_embeddings


def test_tensors_are_compared_part_by_part_up_to_where_they_differ(tmp_path, monkeypatch):
    size = 3 * PART + 5
    first = np.arange(size, dtype=np.float32)
    early, late = first.copy(), first.copy()
    early[0], late[-1] = -1, -1
    save_file({"first": first, "same": first.copy(), "early": early, "late": late}, tmp_path / hf.WEIGHTS)
    tensors, compared = Tensors(tmp_path), []
    equal = np.array_equal
    monkeypatch.setattr(np, "array_equal", lambda a, b: (compared.append(a.size), equal(a, b))[1])
    assert tensors.equal("first", "same")
    assert max(compared) <= PART * 4
    assert not tensors.equal("first", "late")
    compared.clear()
    assert not tensors.equal("first", "early")
    assert len(compared) == 1


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma", "bloom"])
def test_families_that_are_tied_by_default_use_a_stored_head_too(name, tmp_path):
    folder = shutil.copytree(FOLDER / name, tmp_path / name)
    edit_config(folder, tie_word_embeddings="absent")
    module, variables = hf.load(folder)
    assert module.config.tie_embeddings
    head = np.asarray(variables["params"]["decoder"]["embedding"])[::-1].copy()
    edit_tensors(folder, lambda tensors: tensors | {HEAD: head})
    with pytest.warns(UserWarning, match="by default"):
        module, variables = hf.load(folder)
    np.testing.assert_array_equal(variables["params"]["lm_head"]["kernel"], head.T)


def test_a_tied_embedding_may_be_stored_as_the_head_alone(tied):
    expected = logits(tied)
    edit_tensors(tied, lambda t: {HEAD if name == EMBEDDING else name: value for name, value in t.items()})
    np.testing.assert_array_equal(logits(tied), expected)
    params = hf.load(tied, "score", score_type="reward")[1]["params"]
    np.testing.assert_array_equal(params["decoder"]["embedding"], load_file(tied / hf.WEIGHTS)[HEAD])


def test_an_untied_model_without_a_head_says_how_to_tie_it(folder):
    edit_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if k != HEAD})
    with pytest.raises(ValueError, match=rf"tensor '{HEAD}' is missing; .*\"tie_word_embeddings\": true into config"):
        hf.load(folder)
    edit_config(folder, tie_word_embeddings=True)
    assert hf.load(folder)[0].config.tie_embeddings


def test_a_stored_head_that_differs_goes_into_its_shards(tied):
    edit_tensors(tied, other_head)
    with pytest.warns(UserWarning, match="differs"):
        expected = hf.load(tied)[1]
    sharded = hf.load(tied, mesh=make_mesh((2, 2, 2)))[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), jax.device_get(expected))


def test_what_a_stage_is_told_of_a_model_is_what_is_stored(tied):
    assert hf.stored_config(tied).tie_embeddings
    edit_tensors(tied, other_head)
    with pytest.warns(UserWarning, match="differs"):
        assert not hf.stored_config(tied).tie_embeddings
    (tied / hf.WEIGHTS).unlink()
    assert hf.stored_config(tied).tie_embeddings  # to compile, config.json is enough


# --- Names that others wrote ------------------------------------------------------------------------------------------

WRAPPERS = [
    ("module.", "DistributedDataParallel.*model.module.save_pretrained"),
    ("_orig_mod.", "torch.compile.*model._orig_mod.save_pretrained"),
    ("_fsdp_wrapped_module.", "FSDP.*full state dict"),
    ("base_model.model.", "PEFT.*merge_and_unload"),
    ("pretrained_model.", "TRL.*model.pretrained_model.save_pretrained"),
    ("language_model.", "more than text.*language model"),
    ("model.language_model.", "more than text.*language model"),
    ("actor.", r"'actor\.(.*)' is '\1' behind the prefix 'actor\.'; save the model that is inside"),
]


@pytest.mark.parametrize(("prefix", "message"), WRAPPERS, ids=lambda x: x.split("*")[0])
def test_a_wrappers_prefix_is_named_with_what_to_do(folder, prefix, message):
    edit_tensors(folder, lambda tensors: {prefix + name: value for name, value in tensors.items()})
    with pytest.raises(ValueError, match=f"^{folder}: tensor .*{message}"):
        hf.load(folder)


INSIDE = [
    ("model.layers.0._orig_mod.mlp.up_proj.weight", "torch.compile"),
    ("model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight", "FSDP"),
    ("_flat_param", "FSDP"),
    ("model.layers.0.mlp.up_proj.lora_A.default.weight", "PEFT"),
    ("model.layers.0.mlp.up_proj.base_layer.weight", "PEFT"),
    ("v_head.summary.weight", "head that only its own class"),
    ("rm_head.weight", "head that only its own class"),
    ("regression_layer.weight", "head that only its own class"),
    ("vision_tower.encoder.weight", "more than text"),
    ("model.layers.0.mlp.up_proj.weight_scale_inv", "quantised"),
    ("model.layers.0.mlp.up_proj.qweight", "quantised"),
    ("layers.0.feed_forward.w1.weight", "layout of the model's authors"),
    ("score_head.weight", "has no place in the model"),
]


@pytest.mark.parametrize(("name", "message"), INSIDE)
def test_a_tensor_whose_name_tells_who_wrote_it_is_refused_by_that_name(folder, name, message):
    edit_tensors(folder, lambda tensors: tensors | {name: np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=f"^{folder}: tensor '{name}' .*{message}"):
        hf.load(folder)


@pytest.mark.parametrize("name", ["v_head.weight", "rm_head.weight", "value_head.weight", "regression_layer.weight"])
@pytest.mark.parametrize("as_stored", [False, True])
def test_a_score_head_under_another_name_is_named_and_not_replaced_by_a_new_one(folder, name, as_stored):
    edit_tensors(folder, lambda tensors: tensors | {name: np.zeros((1, 48), np.float32)})
    with pytest.raises(ValueError, match=rf"'{name}' .*'score\.weight' \[1, D\]"):
        hf.load(folder, "score", score_type="reward", as_stored=as_stored)


def test_a_score_model_that_is_opened_as_a_language_model_is_called_one(saved, tmp_path):
    reward = hf.save(tmp_path / "reward", *hf.load(saved / "untied", "score", score_type="reward"))
    with pytest.raises(ValueError, match=r"'score_head\.weight' is not: this is a reward or cost model"):
        hf.load(reward)


def test_a_model_of_text_and_images_is_refused_as_that(folder):
    edit_config(folder, model_type="gemma3", text_config={"model_type": "gemma3_text"})
    with pytest.raises(ValueError, match=r"untied: config\.json: model_type 'gemma3' reads more than text"):
        hf.load(folder)


# --- Numbers ----------------------------------------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_])
def test_whole_numbers_are_no_weights(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors | {UP: tensors[UP].astype(dtype)})
    with pytest.raises(ValueError, match=rf"untied: tensor '{UP}' is stored as [IUB]\w+; weights are read as F64, F32"):
        hf.inspect(folder)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bits_are_refused_by_their_name(folder, dtype):
    save_any(load_flax(folder) | {UP: load_flax(folder)[UP].astype(dtype)}, folder / hf.WEIGHTS)
    with pytest.raises(ValueError, match=rf"'{UP}' is stored as F8_E\dM\d; .*before it was quantised"):
        hf.inspect(folder)


def test_a_model_may_mix_floating_point_numbers(folder):
    tensors = load_flax(folder)
    kinds = (jnp.float16, jnp.bfloat16, jnp.float32)
    rounded = {name: value.astype(kinds[i % 3]) for i, (name, value) in enumerate(sorted(tensors.items()))}
    save_any(rounded, folder / hf.WEIGHTS)
    mixed = hf.load(folder)[1]
    save_any({name: value.astype(jnp.float32) for name, value in rounded.items()}, folder / hf.WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, mixed, hf.load(folder)[1])


@pytest.mark.parametrize(
    ("value", "stored"), [(np.nan, jnp.float32), (np.inf, jnp.bfloat16), (-np.inf, jnp.float16)], ids=str
)
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_weights_that_are_not_finite_are_refused_by_their_name(folder, value, stored, scan_layers):
    tensors = load_flax(folder)
    save_any(tensors | {UP: tensors[UP].at[-1, -1].set(value).astype(stored)}, folder / hf.WEIGHTS)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match=rf"untied: tensor '{UP}' holds a number that is not finite in {dtype}"):
            hf.load(folder, dtype=dtype, scan_layers=scan_layers)


def test_a_number_that_float16_cannot_hold_is_not_made_infinite(folder):
    edit_tensors(folder, lambda tensors: tensors | {UP: np.full_like(tensors[UP], 1e6)})
    with pytest.raises(ValueError, match="not finite in float16"), np.errstate(over="ignore"):
        hf.load(folder, dtype="float16")
    hf.load(folder, dtype="bfloat16")


def test_a_place_that_was_left_empty_is_said(folder):
    edit_tensors(folder, lambda tensors: tensors | {UP: np.zeros(0, np.float32)})
    with pytest.raises(ValueError, match=rf"'{UP}' has shape \(0,\).*DeepSpeed ZeRO-3.*zero_to_fp32"):
        hf.load(folder)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [90, 128])
def test_a_vocabulary_that_disagrees_with_the_embedding_is_told_with_both_numbers(folder, rows):
    edit_config(folder, vocab_size=rows)
    with pytest.raises(ValueError, match=rf"has shape \(96, 48\).*vocab_size {rows}.*\"vocab_size\": 96"):
        hf.inspect(folder)


EXPORTS = [
    {"architectures": None},
    {"architectures": "absent", "torch_dtype": "absent", "dtype": "absent"},
    {"architectures": []},
    {"torch_dtype": None, "dtype": None},
    {"torch_dtype": "bf16", "dtype": "absent"},
    {"torch_dtype": "torch.bfloat16", "dtype": "torch.bfloat16"},
    {"head_dim": None},
    {"head_dim": "absent"},
    {"pad_token_id": -1},
    {"eos_token_id": [1, 2], "bos_token_id": None},
    {"rope_scaling": None},
    {"rope_parameters": "absent", "rope_theta": 10000},
    {
        "use_flash_attention_2": True,
        "_attn_implementation_autoset": True,
        "unsloth_version": "2025",
        "model_max_length": 9,
    },
    {"quantization_config": None},
    {"max_position_embeddings": "absent"},
]


@pytest.mark.parametrize("changes", EXPORTS, ids=lambda changes: " ".join(map(str, changes)))
def test_fields_that_exports_add_or_lack_change_nothing(saved, folder, changes):
    edit_config(folder, **changes)
    expected, found = hf.inspect(saved / "untied"), hf.inspect(folder)
    different = {k for k, v in vars(expected.module.config).items() if v != getattr(found.module.config, k)}
    assert different <= {"stored", "max_positions"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 is not supported"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0 is not supported"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not supported"),
        ({"head_dim": -12}, "head_dim -12 is not supported"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 is not supported"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "96"}, "vocab_size"),
        ({"hidden_act": None}, "hidden_act"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "absent"}, "model_type ''"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_the_folder(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"untied: config\.json: .*{message}") as error:
        hf.inspect(folder)
    assert "\n" not in str(error.value)


def contradictions_of(fields):
    this = family(fields["model_type"])
    return list(contradictions(fields, this.config_to_hf(this.config_from_hf(fields))))


def test_published_configs_do_not_contradict_themselves():
    stored = [json.loads((FOLDER / name / "config.json").read_text()) for name in MODELS]
    for fields in (*stored, *(fields for fields, _ in PUBLISHED.values())):
        assert not contradictions_of(fields)


# --- Rotary positions in every spelling -------------------------------------------------------------------------------

FLAT = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
QWEN = FLAT | {"model_type": "qwen2"}
GEMMA3 = FLAT | {"model_type": "gemma3_text", "head_dim": 12, "num_key_value_heads": 1}
LINEAR = {"rope_theta": 5e5, "scaling": ("linear", 2.0)}
SPELLINGS = [
    (FLAT, {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR),
    (FLAT, {"rope_theta": 500000, "rope_scaling": {"rope_type": "linear", "factor": 2}}, LINEAR),
    (FLAT, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, LINEAR),
    (FLAT, {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}}, LINEAR),
    (FLAT, {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, LINEAR),
    (FLAT, {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5, "scaling": None}),
    (FLAT, {"rope_parameters": None, "rope_theta": 5e5}, {"rope_theta": 5e5, "scaling": None}),
    (FLAT, {"rope_parameters": {}, "rope_scaling": {}}, {"rope_theta": 1e4, "scaling": None}),
    (FLAT, {"rope_scaling": {"type": "default"}}, {"rope_theta": 1e4, "scaling": None}),
    (FLAT, {"rope_scaling": {"rope_type": "default", "factor": 1.0}}, {"rope_theta": 1e4, "scaling": None}),
    (FLAT, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, {"rope_theta": 1e4, "scaling": ("dynamic", 4.0)}),
    (GEMMA3, {}, {"rope_theta": 1e6, "local_rope_theta": 1e4, "scaling": None}),
    (GEMMA3, {"rope_theta": 5e5, "rope_local_base_freq": 2e4}, {"rope_theta": 5e5, "local_rope_theta": 2e4}),
    (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}},
     {"rope_theta": 5e5, "local_rope_theta": 1e4, "scaling": ("linear", 8.0)}),
    (GEMMA3, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, {"scaling": ("linear", 8.0)}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "rope", "expected"), SPELLINGS, ids=lambda x: str(x)[:60])
def test_every_spelling_of_rotary_positions_is_read(fields, rope, expected):
    config = family(fields["model_type"]).config_from_hf(fields | rope)
    scaling = config.rope_scaling and (config.rope_scaling.kind, config.rope_scaling.factor)
    assert {name: scaling if name == "scaling" else getattr(config, name) for name in expected} == expected
    assert not contradictions_of(fields | rope)


REFUSED = [
    (FLAT, {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, "'yarn'"),
    (FLAT, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "'yarn'"),
    (FLAT, {"rope_scaling": {"type": "ntk", "factor": 4.0}}, "'ntk'"),
    (FLAT, {"rope_scaling": {"factor": 4.0}}, r"\{'factor': 4\.0\} .*rope_type"),
    (FLAT, {"rope_scaling": {"type": "linear"}}, "factor"),
    (FLAT, {"rope_scaling": {"type": "linear", "factor": 0}}, "factor 0 .*positive"),
    (FLAT, {"rope_scaling": {"type": "linear", "factor": None}}, "factor None .*positive"),
    (FLAT, {"rope_theta": None}, "rope_theta None .*positive"),
    (FLAT, {"rope_theta": 0}, "rope_theta 0 .*positive"),
    (FLAT, {"rope_theta": "ten"}, "rope_theta 'ten' .*positive"),
    (FLAT, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'full_attention'.*one for all layers"),
    (QWEN, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one for all layers"),
    (FLAT, {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0] * 6,
                             "original_max_position_embeddings": 64}}, "short_factor .*length 5.*6 numbers"),
    (GEMMA3, {"rope_parameters": {"rope_theta": 5e5}}, "under the names sliding_attention and full_attention"),
    (GEMMA3, {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "'yarn'"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "rope", "message"), REFUSED, ids=lambda x: str(x)[:60])
def test_rotary_positions_that_are_not_understood_are_named(fields, rope, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        family(fields["model_type"]).config_from_hf(fields | rope)


@pytest.mark.parametrize(
    ("rope", "used", "message"),
    [
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e4}}, 2e4, r"rope_theta is 500000\.0.*20000\.0, which"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
            1e4,
            r"rope_parameters\.rope_theta is 500000\.0.*10000\.0, which is used, as in transformers",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "dynamic"}},
            1e4,
            r"rope_parameters\.rope_type is 'dynamic'.*'linear', which",
        ),
    ],
)
def test_of_two_spellings_that_differ_the_one_of_transformers_counts_and_that_is_said(folder, rope, used, message):
    edit_config(folder, **{"rope_parameters": "absent"} | rope)
    with pytest.warns(UserWarning, match=rf"untied: config\.json: {message}") as said:
        assert hf.load(folder)[0].config.rope_theta == used
    assert len(said) == 1
