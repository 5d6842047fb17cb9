import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.inference.stream import Stream
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import RopeScaling
from safe_rlhf_jax.ops import sequence_scores
from safe_rlhf_jax.pipeline import Policy, Scorer, load_policy, load_scorer
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


LIMITED = {
    "rotary": {},
    "learned": {"positions": "learned"},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0)},
    "longrope": {
        "max_positions": 256,
        "rope_scaling": RopeScaling(
            "longrope", original_positions=64, short_factors=(1.0,) * 6, long_factors=(4.0,) * 6
        ),
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=LIMITED)
def limited(request, tokenizer):
    """A policy and a scorer that generate and read 64 tokens: of 256 with longrope."""
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_layers=1, **LIMITED[request.param])
    (lm, policy), (scorer, reward) = make_lm(config), make_scorer("reward", config)
    shared = tokenizer, TEMPLATES["plain"]
    return Policy("lm", lm, perturbed(policy), *shared), Scorer("reward", scorer, perturbed(reward), *shared)


def of_length(tokens, tokenizer):
    """A prompt of so many tokens."""
    words = next(n for n in range(1, 99) if len(ids_of("one " * n, tokenizer)) == tokens)
    return "one " * words


def ids_of(prompt, tokenizer):
    return encode([{"role": "user", "content": prompt}], TEMPLATES["plain"], tokenizer).ids


@pytest.mark.parametrize("length", [33, 40, 60])
def test_a_prompt_that_fits_is_not_refused_for_its_padding(limited, tokenizer, length):
    policy, _ = limited
    prompt = of_length(length, tokenizer)
    ids, response = ids_of(prompt, tokenizer), []
    for _ in range(64 - length if length > 59 else 4):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids) + len(response)] = ids + response
        mask = np.arange(64)[None] < len(ids) + len(response)
        logits = apply(policy.module, policy.variables, jnp.asarray(tokens), jnp.asarray(mask))
        response.append(int(logits[0, len(ids) + len(response) - 1].argmax()))
    assert policy([prompt], max_tokens=len(response), temperature=0) == [tokenizer.decode(response)]
    stream = Stream(policy.module, policy.variables["params"], eos_id=-1)
    key, greedy = jax.random.key(0), Sampling(temperature=0.0)
    assert list(stream(ids, key, sampling=greedy, max_tokens=len(response))) == response


def test_what_is_longer_is_refused_with_its_own_numbers(limited, tokenizer):
    policy, scorer = limited
    prompt = of_length(60, tokenizer)
    message = r"a prompt of 60 tokens \+ max_tokens 5 exceed the model's 64 positions"
    with pytest.raises(ValueError, match=message + ("" if policy.module.config.max_positions == 64 else ".* longrope")):
        policy([prompt], max_tokens=5)
    stream = Stream(policy.module, policy.variables["params"], eos_id=-1)
    tokens = stream(ids_of(prompt, tokenizer), jax.random.key(0), sampling=Sampling(), max_tokens=5)
    with pytest.raises(ValueError, match=r"60 \+ 5 tokens exceed the 64"):
        next(tokens)
    room = scorer.module.config.max_positions
    with pytest.raises(ValueError, match=f"{room + 1} tokens exceeds the scorer's {room} positions"):
        scorer.score_tokens([[5] * 3, [5] * (room + 1)])


def test_a_text_that_fits_is_scored_whatever_its_width(limited):
    _, scorer = limited
    rows = [np.random.default_rng(0).integers(5, 90, length).tolist() for length in (62, 33, 5)]
    together = scorer.score_tokens(rows)
    for row, score in zip(rows, together, strict=True):
        tokens = jnp.asarray([row], jnp.int32)
        alone = sequence_scores(scorer.module, scorer.variables, tokens, tokens >= 0)[0]
        np.testing.assert_allclose(score, alone, rtol=1e-4, atol=1e-4)


def test_a_language_model_is_no_scorer_and_a_cost_no_reward(folders):
    with pytest.raises(ValueError, match=r"policy: holds no score head.*Train a reward or cost stage"):
        load_scorer(str(folders / "policy"), score_type="reward")
    with pytest.raises(ValueError, match="score_type is 'cost', not 'reward'"):
        load_scorer(str(folders / "cost"), score_type="reward")
    assert load_scorer(str(folders / "cost"), score_type="cost").module.score.score_type == "cost"


def test_a_pointer_in_place_of_the_tokenizer_is_said(folders, tmp_path):
    folder = shutil.copytree(folders / "policy", tmp_path / "policy")
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a pointer of Git LFS"):
        load_policy(str(folder))


def test_what_does_not_fit_is_refused(folders):
    with pytest.raises(ValueError, match="max_tokens 100 exceed the model's 64 positions"):
        load_policy(str(folders / "policy"))(["hello"], max_tokens=100)
