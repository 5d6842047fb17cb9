"""What can be known of stored models before the first stage trains."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import ScoreConfig
from safe_rlhf_jax.stages import Run, check_run
from safe_rlhf_jax.stages.check import check_model, check_same_architecture, check_stored, slow_dtype
from safe_rlhf_jax.stages.datasets import load_data
from tests.helpers import make_lm, make_scorer, stage_of, tiny_config
from tests.tokenizers import make_tokenizer

MINI = Path(__file__).parent.parent / "configs" / "mini.yaml"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folders of a language model, a cost model, and a reward model as others publish it, with the demo tokenizer."""
    config = tiny_config(vocab_size=1000, hidden_size=8, num_layers=1, head_dim=2, max_positions=128)
    folder, tokenizer = tmp_path_factory.mktemp("stored"), load_tokenizer("demo").hf
    hf.save(folder / "lm", *make_lm(config), tokenizer)
    hf.save(folder / "cost", *make_scorer("cost", config, bias=False), tokenizer)
    hf.save(folder / "reward", *make_scorer("reward", config), tokenizer, layout="sequence_classification")
    file = folder / "reward" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "score_type"}))
    return folder


def checked(stored, tmp_path, *overrides):
    """Reads the config and checks what can be known before training, without starting to train."""
    models = (f"stages.ppo_lag.reward_model=path:{stored}/reward", f"stages.ppo_lag.cost_model=path:{stored}/cost")
    check_run(Run(cfg.load_config(MINI, [f"workdir={tmp_path}", *models, *overrides])))


@pytest.mark.parametrize(
    ("dtype", "flags", "slow"),
    [
        ("bfloat16", "flags\t: fpu avx512_bf16 avx512f", True),
        ("bfloat16", "flags\t: fpu avx512_bf16 amx_bf16", False),
        ("bfloat16", "vendor_id\t: AuthenticAMD\nflags\t: fpu avx512_bf16 avx512f", False),
        ("bfloat16", "vendor_id\t: AuthenticAMD\nflags\t: fpu avx512f", True),
        ("float32", "flags\t: fpu", False),
        ("bfloat16", "Features\t: fp asimd", False),  # another architecture: unknown
    ],
)
def test_a_cpu_that_is_slower_in_bfloat16_is_told(tmp_path, dtype, flags, slow):
    (tmp_path / "cpuinfo").write_text(flags)
    assert bool(slow_dtype(dtype, str(tmp_path / "cpuinfo"))) == slow
    assert slow_dtype(dtype, str(tmp_path / "none")) is None


def test_scorers_of_both_layouts_are_accepted_as_what_they_are(stored, tmp_path):
    checked(stored, tmp_path)
    for field, folder, found in (("cost_model", "reward", "reward"), ("reward_model", "cost", "cost")):
        with pytest.raises(cfg.ConfigError, match=rf"{field} .* has score_type '{found}' in its config\.json"):
            checked(stored, tmp_path, f"stages.ppo_lag.{field}=path:{stored}/{folder}")


@pytest.mark.parametrize("field", ["reward_model", "cost_model", "init_from"])
def test_a_model_with_another_tokenizer_is_refused_with_the_reason(stored, tmp_path, field):
    source = {"reward_model": "reward", "cost_model": "cost", "init_from": "lm"}[field]
    other = shutil.copytree(stored / source, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (token for token, i in vocabulary.items() if i in (10, 11))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(cfg.ConfigError) as error:
        checked(stored, tmp_path, f"stages.ppo_lag.{field}=path:{other}")
    message = str(error.value)
    parts = ["ppo_lag", field]
    if field == "init_from":
        parts += ["another tokenizer than the run's 'demo'", "2 ids differ", "as 10", "one tokenizer"]
    else:
        parts += ["a tokenizer of its own, without a chat template", f"templates: {{'path:{other}'"]
        checked(stored, tmp_path, f"stages.ppo_lag.{field}=path:{other}", f"templates={{'path:{other}': beaver}}")
    assert all(part in message for part in parts), message


def test_a_token_without_a_row_is_said_and_texts_that_have_it_are_unusable(stored, tmp_path, capsys):
    folder = shutil.copytree(stored / "lm", tmp_path / "lm")
    tokenizer = load_tokenizer(str(folder)).hf
    tokenizer.add_tokens([f"<image_{i}>" for i in range(1000 - len(tokenizer) + 2)])
    tokenizer.save_pretrained(folder)
    file = tmp_path / "prompts.jsonl"
    texts = ["how do i bake"] * 30 + [f"what is <image_{1001 - len(load_tokenizer('demo').hf)}>"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    data = {"name": str(file)}
    stage = {"name": "ppo_lag", "kind": "rl", "init_from": f"path:{folder}", "reward_model": f"path:{folder}/../reward"}
    stage |= {"prompts": data, "max_prompt_length": 24, "max_response_length": 8, "algorithm": {"name": "ppo"}}
    shutil.copytree(stored / "reward", tmp_path / "reward")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"workdir": str(tmp_path / "run"), "tokenizer": str(folder), "stages": [stage]}))
    run = Run(cfg.load_config(config, []))
    check_run(run)
    assert re.search(r"no row of an embedding for 2 tokens, such as '<image_\d+>' \(1000\)", capsys.readouterr().out)
    loaded = load_data(run, run.config.stages[0], "prompts")
    assert len(loaded) == 30
    assert list(loaded.skipped.values()) == [1]
    assert "for which a model has no row" in next(iter(loaded.skipped))


def test_ends_that_are_no_tokens_are_said(tmp_path, capsys):
    """ChatML with the tokenizer of a base model, and a generation_config.json of another one."""
    chatml = (Path(__file__).parent.parent / "data" / "chat_templates" / "chatml.jinja").read_text()
    make_tokenizer(tmp_path / "base", ["<unk>", "<s>", "</s>"], "</s>", spaces=None, template=chatml)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 151643]}))
    stage = {"name": "sft", "kind": "sft", "init_from": "preset:tiny", "data": {"name": "demo/sft", "limit": 40}}
    tree = {"workdir": str(tmp_path / "run"), "tokenizer": str(tmp_path / "base"), "stages": [stage]}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    check_run(Run(cfg.load_config(tmp_path / "config.yaml", [])))
    out = capsys.readouterr().out
    assert out.count("base names [151643], which is no token of the tokenizer: not an end") == 1
    assert out.count("template: ends a turn with '<|im_end|>', for which the tokenizer has no token") == 1


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(stored, tmp_path):
    small = shutil.copytree(stored / "lm", tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(cfg.ConfigError, match=r"embeds 100 tokens, but tokenizer 'demo' has \d+"):
        checked(stored, tmp_path, f"stages.sft.init_from=path:{small}")


def test_a_model_whose_file_is_cut_off_is_refused_before_training(stored, tmp_path):
    broken = shutil.copytree(stored / "cost", tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"broken/model\.safetensors: truncated"):
        checked(stored, tmp_path, f"stages.ppo_lag.cost_model=path:{broken}")


# --- Weights and their config.json ------------------------------------------------------------------------------------


def edited(folder, target, change):
    """A copy of a folder whose tensors are others."""
    copy = shutil.copytree(folder, target)
    save_file(change(load_file(copy / hf.WEIGHTS)), copy / hf.WEIGHTS)
    return copy


@pytest.mark.parametrize(
    ("field", "source", "change", "message"),
    [
        ("cost_model", "cost", lambda t: {f"module.{k}": v for k, v in t.items()}, "DistributedDataParallel"),
        ("cost_model", "cost", lambda t: t | {"score_head.weight": np.zeros((2, 8), np.float32)}, r"shape \(2, 8\)"),
        ("reward_model", "reward", lambda t: t | {"model.norm.weight": np.ones(8, np.int64)}, "stored as I64"),
        ("init_from", "lm", lambda t: {k: v for k, v in t.items() if "norm" not in k}, "is missing"),
        ("init_from", "lm", lambda t: t | {"v_head.summary.weight": np.zeros((1, 8), np.float32)}, "v_head"),
    ],
)
def test_tensors_that_do_not_match_are_refused_before_training(stored, tmp_path, field, source, change, message):
    folder = edited(stored / source, tmp_path / "other", change)
    with pytest.raises(cfg.ConfigError, match=rf"ppo_lag: {field} 'path:.*other': .*other: tensor .*{message}"):
        checked(stored, tmp_path, f"stages.ppo_lag.{field}=path:{folder}")


def test_a_language_model_that_says_it_scores_is_refused_before_training(stored, tmp_path):
    folder = shutil.copytree(stored / "lm", tmp_path / "says")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"score_type": "reward"}))
    with pytest.raises(cfg.ConfigError, match=r"reward_model 'path:.*says': .*holds no score head"):
        checked(stored, tmp_path, f"stages.ppo_lag.reward_model=path:{folder}")


@pytest.mark.parametrize("field", ["cost_model", "cost_models.harm"])
def test_every_cost_of_several_is_one(stored, field):
    named = f"stages.ppo_lag.{field}=cost" if "." not in field else "stages.ppo_lag.cost_models={harm: cost}"
    use = cfg.load_config(MINI, [named]).stages[3].models()[field]
    check_stored(use, stored / "cost")
    for other in ("lm", "reward"):
        with pytest.raises(ValueError, match=r"has score_type .* not 'cost'"):
            check_stored(use, stored / other)


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_stage_that_trains_scores_starts_from_any_model(stored, kind):
    stage = next(stage for stage in cfg.load_config(MINI).stages if stage.kind == kind)
    for source in ("lm", "reward", "cost"):
        check_stored(stage.models()["init_from"], stored / source)


def test_a_policy_whose_encoding_changes_on_the_way_is_refused_before_it_generates(stored, tmp_path):
    folder = shutil.copytree(stored / "lm", tmp_path / "long")
    factors = {"short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 8}
    rope = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4} | factors}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | rope))
    with pytest.raises(cfg.ConfigError, match=r"init_from .*long' has 8 positions, beyond which .* cannot generate"):
        checked(stored, tmp_path, f"stages.ppo_lag.init_from=path:{folder}")
    run = Run(cfg.load_config(MINI, [f"workdir={tmp_path}"]))
    use = cfg.ModelUse(f"path:{folder}")
    check_model(run, stage_of(run.config, "sft"), "init_from", use)  # reading a text needs no cache
    stage = stage_of(run.config, "sft").model_copy(update={"packing": True})
    with pytest.raises(
        cfg.ConfigError, match=r"more than 8 tokens by its length.* leave packing out, or make max_length 8"
    ):
        check_model(run, stage, "init_from", use)
    check_model(run, stage.model_copy(update={"max_length": 8}), "init_from", use)


def test_a_model_that_is_only_called_tied_differs_in_architecture_from_one_that_is(stored, tmp_path):
    tied = tiny_config(vocab_size=1000, hidden_size=8, num_layers=1, head_dim=2, max_positions=128, tie_embeddings=True)
    folder = hf.save(tmp_path / "tied", *make_lm(tied))
    run = Run(cfg.load_config(MINI, [f"workdir={tmp_path}"]))
    assert run.networks.config(f"path:{folder}").tie_embeddings
    head = lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1.0}  # noqa: E731
    with pytest.warns(UserWarning, match="differs"):
        assert not run.networks.config(f"path:{edited(folder, tmp_path / 'other', head)}").tie_embeddings


def test_settings_of_execution_are_no_part_of_an_architecture(tmp_path):
    """A new network has those of the run, one from a folder the defaults."""
    config = Run(cfg.load_config(MINI, [f"workdir={tmp_path}"])).networks.config("preset:tiny")
    folder = hf.save(tmp_path / "policy", *make_lm(config))
    execution = {"dtype": "bfloat16", "remat": "full", "scan_layers": True, "gather_to_decode": True}
    execution |= {"merge_to_decode": False, "decode_weights": "int8", "decode_cache": "int8"}
    # Bases belong to adapters: these settings are of no network's configuration.
    assert execution.keys() | {"base", "whole_base"} == cfg.Execution.model_fields.keys()
    for setting in ({}, *({name: value} for name, value in execution.items())):
        overrides = [f"execution={json.dumps(setting)}", f"stages.evaluate.policies=[sft, 'path:{folder}']"]
        run = Run(cfg.load_config(MINI, [f"workdir={tmp_path}", *overrides]))
        check_same_architecture(run, stage_of(run.config, "evaluate"))


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_new_head_is_trained_or_is_a_critic_and_never_scores(stored, tmp_path, kind):
    run, model = Run(cfg.load_config(MINI, [f"workdir={tmp_path}"])), f"path:{stored}/lm"
    with pytest.raises(ValueError, match="holds no score head"):
        run.networks.open(model, "score", score_type=kind)
    assert run.networks.open(model, "score", score=ScoreConfig(kind))[0].score.score_type == kind
    assert run.networks.open(model, "score", score_type="critic")[0].score.score_type == "critic"
    other = {"reward": "cost", "cost": "reward"}[kind]
    with pytest.raises(ValueError, match=f"score_type is '{other}', not '{kind}'"):
        run.networks.open(f"path:{stored}/{other}", "score", score_type=kind)
