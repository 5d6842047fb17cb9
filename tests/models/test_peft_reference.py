"""PEFT folders against peft itself: ours in peft, and peft's here, with the same logits and scores."""

import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import Lora, ScoreConfig
from safe_rlhf_jax.models.peft import read_adapter
from safe_rlhf_jax.models.peft_export import write_adapter
from safe_rlhf_jax.models.peft_heads import read_head
from tests.golden.make_families import MODELS, VOCAB, random_model
from tests.helpers import apply
from tests.models.test_peft import random_adapter

pytest.importorskip("peft", reason="peft is not installed (extra `torch`)")
pytestmark = pytest.mark.reference

EQUAL = 1e-5  # of the largest logit, float32
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, 12))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Saves random models of transformers, each once."""
    made = {}

    def base(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            random_model(*MODELS[name]).save_pretrained(made[name])
        return made[name]

    return base


def theirs(base, folder=None, task="CausalLM", **more):
    """A model of transformers, with an adapter by peft."""
    import peft
    import torch
    import transformers

    opened = getattr(transformers, f"AutoModelFor{task}").from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", **more
    )
    if folder is None:
        return opened
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|mismatch).*")
        return peft.PeftModel.from_pretrained(opened, folder).eval()


def outputs(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


def ours(folder, head="lm", **more):
    module, variables = hf.load(folder, head, **more)
    return np.asarray(apply(module, variables, jnp.asarray(TOKENS, jnp.int32), jnp.ones(TOKENS.shape, bool)))


def assert_close(actual, expected):
    assert np.abs(actual - expected).max() <= EQUAL * np.abs(expected).max()


def small(config, form, seed=0):
    """A random adapter that changes logits about as much as the base makes them."""
    import jax

    return jax.tree.map(lambda leaf: 0.3 * leaf, random_adapter(config, form, seed))


FORMS = {
    "all": Lora(3, 6.0),
    "last layer": Lora(4, 6.0, ("q_proj", "v_proj", "o_proj"), layers=1, rank_stabilized=True),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "gpt_neox", "phi3", "opt_post_norm"])
def test_peft_opens_what_we_write_with_the_same_logits(name, form, bases, tmp_path):
    config = hf.stored_config(bases(name))
    folder = write_adapter(tmp_path, config, form, small(config, form), base=str(bases(name)))
    expected = outputs(theirs(bases(name), folder))
    assert np.abs(expected - outputs(theirs(bases(name)))).max() > 100 * EQUAL * np.abs(expected).max()
    assert_close(ours(folder), expected)


SETTINGS = {
    "all-linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "patterns": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True,
                 "rank_pattern": {r"layers.1.*|h.1.*": 5}, "alpha_pattern": {r".*(o_proj|c_fc)": 3}},
    "first layer": {"r": 2, "target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
}  # fmt: skip


def trained(base, folder, settings, task="CausalLM", **more):
    """Saves an adapter of peft with random weights; returns the model."""
    import peft
    import torch

    kind = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}[task]
    model = peft.get_peft_model(theirs(base, task=task, **more), peft.LoraConfig(task_type=kind, **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "gpt_neox", "bloom"])
def test_what_peft_writes_has_the_same_logits_here(name, settings, bases, tmp_path):
    model = trained(bases(name), tmp_path, settings)
    assert_close(ours(tmp_path), outputs(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_what_peft_writes_is_trained_further_here_and_goes_back(name, bases, tmp_path):
    model = trained(bases(name), tmp_path / "theirs", SETTINGS["patterns"])
    config, stored = hf.stored_config(bases(name)), read_adapter(tmp_path / "theirs")
    form = dataclasses.replace(stored.form(config), rank=6)
    folder = write_adapter(tmp_path / "ours", config, form, stored.params(config, form), base=stored.base)
    assert_close(outputs(theirs(bases(name), folder)), outputs(model))
    assert_close(ours(folder), outputs(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sequence_classification_goes_both_ways(name, bases, tmp_path):
    base, more = bases(name), {"task": "SequenceClassification", "num_labels": 1}
    model = trained(base, tmp_path / "theirs", SETTINGS["all-linear"], **more)
    assert_close(ours(tmp_path / "theirs", "score", as_stored=True)[:, -1:], outputs(model))
    config, form = hf.stored_config(base), Lora(4, 8.0)
    stored = read_adapter(tmp_path / "theirs")
    _, head, stats = read_head(stored, config)
    score = ScoreConfig("reward", bias=False)
    folder = write_adapter(tmp_path / "ours", config, form, stored.params(config, form), score=score, head=head,
                           stats=stats, base=str(base))  # fmt: skip
    assert_close(outputs(theirs(base, folder, **more)), outputs(model))
    assert_close(ours(folder, "score", as_stored=True)[:, -1:], outputs(model))


def test_transformers_opens_a_folder_of_ours_by_its_base(bases, tmp_path):
    config, form = hf.stored_config(bases("llama")), FORMS["all"]
    score, head = (
        ScoreConfig("cost"),
        {"score_kernel": np.ones((24, 1), np.float32), "score_bias": np.ones(1, np.float32)},
    )
    stats = {"mean": np.ones(1, np.float32), "var": np.ones(1, np.float32), "count": np.ones(1, np.int32)}
    folder = write_adapter(tmp_path, config, form, small(config, form), score=score, head=head, stats=stats,
                           base=str(bases("llama")))  # fmt: skip
    scores = outputs(theirs(folder, task="SequenceClassification", num_labels=1))
    assert_close(ours(folder, "score", as_stored=True)[:, -1:], scores + 1)  # peft knows no bias
