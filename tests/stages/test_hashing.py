"""What a stage's hash covers: everything that decides its result, by content, and nothing that does not."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.stages import Run, hashing
from tests.helpers import make_lm, make_scorer, tiny_config

MINI = Path(__file__).parent.parent / "configs" / "mini.yaml"
STAGES = {"sft", "reward", "cost", "ppo_lag", "evaluate"}
PAIR = {
    "prompt": "a", "response_0": "b", "response_1": "c", "safer_response_id": 0, "is_response_0_safe": True,
    "is_response_1_safe": False,
}  # fmt: skip
TOKENIZER = load_tokenizer("demo")
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size, hidden_size=8, num_layers=1, head_dim=2, max_positions=128)


def hashes(tmp_path, *overrides):
    run = Run(cfg.load_config(MINI, [f"workdir={tmp_path}/run", *overrides]))
    run.digests.save()  # as training does once the run has its folder
    return run.hashes


def different(before, after):
    return {name for name in before if before[name] != after[name]}


@pytest.fixture
def folder(tmp_path):
    """A policy, and a reward model, behind paths."""
    hf.save(tmp_path / "models" / "policy", *make_lm(CONFIG), TOKENIZER.hf)
    hf.save(tmp_path / "models" / "reward", *make_scorer("reward", CONFIG), TOKENIZER.hf)
    return tmp_path / "models"


def test_weights_behind_a_path_are_part_of_what_stands_on_them(tmp_path, folder):
    models = [f"stages.sft.init_from=path:{folder}/policy", f"stages.ppo_lag.reward_model=path:{folder}/reward"]
    before = hashes(tmp_path, *models)
    shutil.copytree(folder, tmp_path / "copy")
    assert different(before, hashes(tmp_path, *models)) == set()
    hf.save(folder / "reward", *make_scorer("reward", CONFIG, seed=1), TOKENIZER.hf)
    assert different(before, hashes(tmp_path, *models)) == {"ppo_lag", "evaluate"}
    hf.save(folder / "policy", *make_lm(CONFIG, seed=1), TOKENIZER.hf)
    assert different(before, hashes(tmp_path, *models)) == STAGES


def add_one(file):
    """Replaces a file of weights by one of the same size and time, with other numbers."""
    status = file.stat()
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file.with_suffix(".new"))
    assert file.with_suffix(".new").stat().st_size == status.st_size
    os.utime(file.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    file.with_suffix(".new").rename(file)


def test_a_file_that_is_replaced_by_one_of_its_size_and_time_is_another(tmp_path, folder):
    file = folder / "policy" / hf.WEIGHTS
    save_file(load_file(file), file)
    before = hashes(tmp_path, f"stages.sft.init_from=path:{folder}/policy")
    add_one(file)
    assert different(before, hashes(tmp_path, f"stages.sft.init_from=path:{folder}/policy")) == STAGES


def test_weights_in_a_folder_below_are_part_of_what_stands_on_them(tmp_path, folder):
    file, below = folder / "policy" / hf.WEIGHTS, folder / "policy" / "weights" / "1.safetensors"
    below.parent.mkdir()
    save_file(tensors := load_file(file), below)
    file.unlink()
    (folder / "policy" / hf.INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "weights/1.safetensors")})
    )
    before = hashes(tmp_path, f"stages.sft.init_from=path:{folder}/policy")
    add_one(below)
    assert different(before, hashes(tmp_path, f"stages.sft.init_from=path:{folder}/policy")) == STAGES


def test_a_folder_that_is_opened_in_place_of_a_hub_id_is_known_by_its_contents(tmp_path, folder):
    before = hashes(tmp_path, f"stages.sft.init_from=hf:{folder}/policy")
    hf.save(folder / "policy", *make_lm(CONFIG, seed=1), TOKENIZER.hf)
    assert different(before, hashes(tmp_path, f"stages.sft.init_from=hf:{folder}/policy")) == STAGES


def test_a_link_that_leads_elsewhere_is_another_model(tmp_path, folder):
    hf.save(folder / "other", *make_lm(CONFIG, seed=1), TOKENIZER.hf)
    link = folder / "link"
    link.symlink_to(folder / "policy")
    before = hashes(tmp_path, f"stages.sft.init_from=path:{link}")
    link.unlink()
    link.symlink_to(folder / "other")
    assert different(before, hashes(tmp_path, f"stages.sft.init_from=path:{link}")) == STAGES


@pytest.mark.parametrize("change", ["chat template", "vocabulary", "ends"])
def test_tokenizer_in_a_folder_is_part_of_every_stage(tmp_path, folder, change):
    settings = [f"tokenizer={folder}/policy", "template=tokenizer"]
    settings += ["stages.sft.init_from=preset:tiny"]
    file = folder / "policy" / "chat_template.jinja"
    file.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    before = hashes(tmp_path, *settings)
    assert different(before, hashes(tmp_path, *settings)) == set()
    if change == "chat template":
        file.write_text(file.read_text().replace("m.content", "m.content + ' '"))
    elif change == "ends":
        (folder / "policy" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    else:
        content = json.loads((folder / "policy" / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        first, second = (token for token, i in vocabulary.items() if i in (40, 41))
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (folder / "policy" / "tokenizer.json").write_text(json.dumps(content))
    assert different(before, hashes(tmp_path, *settings)) == STAGES


def test_template_file_its_options_and_its_date_are_part_of_every_stage(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    before = hashes(tmp_path, f"template={file}")
    for setting in ("template_options={a: 1}", "template_date=2025-01-01", "control_tokens=tokens"):
        assert different(before, hashes(tmp_path, f"template={file}", setting)) == STAGES
    file.write_text("{% for m in messages %}{{ m.content + '.' + eos_token }}{% endfor %}")
    assert different(before, hashes(tmp_path, f"template={file}")) == STAGES


def test_data_is_found_however_deep_it_is_named(tmp_path):
    file = tmp_path / "limit.jsonl"
    file.write_text(json.dumps(PAIR) + "\n")
    limit = {"cost_limit": {"data": {"name": str(file)}, "margin": 0.1}}
    stage = {
        "name": "ppo_lag",
        "kind": "rl",
        "init_from": "sft",
        "reward_model": "reward",
        "cost_models": {"a": "cost"},
    }
    stage |= {"prompts": {"name": "demo/prompts"}, "algorithm": {"constraints": {"a": limit}}}
    setting = f"stages.ppo_lag={json.dumps(stage)}"
    before = hashes(tmp_path, setting)
    file.write_text(json.dumps(PAIR | {"is_response_0_safe": False}) + "\n")
    assert different(before, hashes(tmp_path, setting)) == {"ppo_lag", "evaluate"}


@pytest.mark.parametrize(
    "setting",
    [
        "stages.sft.microbatches=2", "stages.sft.checkpoint_every=7", "stages.sft.keep_checkpoints=5",
        "stages.sft.eval_every=3", "stages.ppo_lag.fuse=false", "execution.remat=full", "mesh.data=1", "title=other",
    ],
)  # fmt: skip
def test_setting_that_changes_no_result_changes_no_hash(tmp_path, setting):
    mesh = ["mesh.data=-1"] if "mesh" not in setting else ["mesh.fsdp=8"]
    assert different(hashes(tmp_path), hashes(tmp_path, setting, *mesh)) == set()


@pytest.mark.parametrize("setting", ["execution.dtype=bfloat16", "seed=3", "tokenizer=TOKENIZER", "template=beaver"])
def test_setting_that_changes_every_result_changes_every_hash(tmp_path, folder, setting):
    other = setting.replace("TOKENIZER", f"{folder}/policy")
    changed = set() if "TOKENIZER" in setting else STAGES  # the same tokenizer under another name
    assert different(hashes(tmp_path), hashes(tmp_path, other)) == changed


def test_end_after_truncated_responses_is_part_of_stages_that_sample_responses(tmp_path):
    assert different(hashes(tmp_path), hashes(tmp_path, "end_truncated=true")) == {"ppo_lag", "evaluate"}


def test_large_files_are_read_once_as_long_as_they_do_not_change(tmp_path, folder, monkeypatch):
    models = f"stages.sft.init_from=path:{folder}/policy"
    before = hashes(tmp_path, models)
    monkeypatch.setattr(hashing, "digest", lambda path: pytest.fail(f"{path} was read again"))
    assert hashes(tmp_path, models) == before


def test_a_run_that_cannot_write_its_folder_has_its_hashes_all_the_same(tmp_path, folder):
    models = f"stages.sft.init_from=path:{folder}/policy"
    before = hashes(tmp_path, models)
    (tmp_path / "file").write_text("")
    run = Run(cfg.load_config(MINI, [f"workdir={tmp_path}/file/run", models]))
    run.digests.save()
    assert run.hashes == before
