import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.inference.stream import Stream, columns, round_up
from safe_rlhf_jax.types import PromptBatch
from tests.helpers import make_lm, perturbed, tiny_config

VOCAB, EOS = 17, 2


@pytest.fixture(scope="module")
def lm():
    module, variables = make_lm(tiny_config(vocab_size=VOCAB))
    return module, perturbed(variables)["params"]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=0.7)], ids=["greedy", "sampled"])
def test_stream_gives_the_tokens_of_generate(lm, sampling):
    module, params = lm
    prompt, key = [5, 3, 9, 4, 7], jax.random.key(3)
    columns = round_up(len(prompt))
    tokens = np.zeros((1, columns), np.int32)
    tokens[0, -len(prompt) :] = prompt
    prompts = PromptBatch(jnp.asarray(tokens), jnp.asarray(tokens > 0), jnp.zeros((1,), jnp.int32))
    whole = functools.partial(
        generate, module, response_length=12, eos_id=EOS, pad_id=0, sampling=sampling, early_exit=True
    )
    rollout = jax.jit(whole)(params, prompts, key)
    expected = rollout.tokens[0, columns:][rollout.mask[0, columns:]].tolist()
    assert list(Stream(module, params, eos_id=EOS)(prompt, key, sampling=sampling, max_tokens=12)) == expected
    assert len(expected) > 1


def test_stream_stops_after_eos(lm):
    module, params = lm
    prompt = [5, 3, 9, 4, 7]
    free = Stream(module, params, eos_id=-1)(prompt, jax.random.key(0), sampling=Sampling(), max_tokens=12)
    tokens = list(free)
    assert len(tokens) == 12
    ended = Stream(module, params, eos_id=tokens[4])(prompt, jax.random.key(0), sampling=Sampling(), max_tokens=12)
    assert list(ended) == tokens[: tokens.index(tokens[4]) + 1]


def test_widths_are_few():
    assert [round_up(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
    assert [columns(n, 100) for n in (1, 64, 65, 100)] == [32, 64, 100, 100]
