import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.texts import encode
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.ops import sequence_scores
from safe_rlhf_jax.pipeline import load_policy, load_scorer
from tests.helpers import apply, make_lm, make_scorer, perturbed, tiny_config

PROMPTS = ["hello", "one two three"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    root, config = tmp_path_factory.mktemp("models"), tiny_config(vocab_size=tokenizer.vocab_size)
    for name, (module, variables) in {"policy": make_lm(config), "cost": make_scorer("cost", config)}.items():
        hf.save(root / name, module, perturbed(variables), tokenizer.hf)
    return root


def test_greedy_answer_repeats_the_most_probable_token(folders, tokenizer):
    policy = load_policy(str(folders / "policy"), template="beaver")
    module, variables = hf.load(folders / "policy")
    answers = policy(PROMPTS, max_tokens=3, temperature=0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = encode([{"role": "user", "content": prompt}], TEMPLATES["beaver"], tokenizer).ids
        response = []
        for _ in range(3):
            tokens = jnp.asarray([ids + response], jnp.int32)
            response.append(int(apply(module, variables, tokens, tokens >= 0)[0, -1].argmax()))
        assert answer == tokenizer.decode(response)


def test_score_is_read_at_the_end_of_the_text(folders, tokenizer):
    module, variables = hf.load(folders / "cost", "score")
    scores = load_scorer(str(folders / "cost"))(PROMPTS, ["fine", "bad bad"])
    for prompt, response, score in zip(PROMPTS, ["fine", "bad bad"], scores, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = encode(turns, TEMPLATES["plain"], tokenizer).ids
        assert ids[-1] == tokenizer.eos_id
        tokens = jnp.asarray([ids], jnp.int32)
        np.testing.assert_allclose(score, sequence_scores(module, variables, tokens, tokens >= 0)[0], atol=1e-5)


def test_what_does_not_fit_is_refused(folders):
    with pytest.raises(ValueError, match="max_tokens 100 exceed the model's 64 positions"):
        load_policy(str(folders / "policy"))(["hello"], max_tokens=100)
