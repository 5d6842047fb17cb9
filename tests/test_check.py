"""What can be known of stored models before the first stage trains."""

import json
import shutil
from pathlib import Path

import pytest

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.stages import Run, check_run
from tests.helpers import make_lm, make_scorer, tiny_config

MINI = Path(__file__).parent / "configs" / "mini.yaml"


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
    parts = ("ppo_lag", field, "another tokenizer than the run's 'demo'", "2 ids differ", "as 10", "one tokenizer")
    assert all(part in message for part in parts), message


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
