import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.row_stream import CHUNK, RowSettings, RowStream
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.types import PromptBatch
from tests.helpers import make_lm, perturbed, tiny_config

VOCAB, EOS, LENGTH, WIDTH = 17, 2, 20, 8
PROMPTS = [[5, 3, 9, 4, 7], [6, 1], [8, 8, 8, 4]]
SETTINGS = [(0.0, 1.0), (0.7, 1.0), (1.3, 0.8)]  # temperature, top_p


@pytest.fixture(scope="module")
def lm():
    module, variables = make_lm(tiny_config(vocab_size=VOCAB))
    return module, perturbed(variables)["params"]


@pytest.fixture(scope="module")
def stream(lm):
    return RowStream(*lm, eos_id=EOS, response_length=LENGTH)


def left_padded(prompts):
    tokens = np.zeros((len(prompts), WIDTH), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[-len(prompt) :] = prompt
    return tokens, tokens > 0


def settings_of(rows, choice=0):
    temperature, top_p = zip(*(SETTINGS[row] for row in rows), strict=True)
    seed = np.array([3 + row for row in rows], np.uint32)
    return RowSettings(seed, np.full(len(rows), choice, np.uint32), np.float32(temperature), np.float32(top_p))


def responses(stream, rows, choice=0):
    """The responses to some of the prompts, together."""
    found = [[] for _ in rows]
    arrays = left_padded([PROMPTS[row] for row in rows])
    for chunk, count in stream(*arrays, settings_of(rows, choice), np.ones(len(rows), bool)):
        for i, response in enumerate(found):
            response += chunk[i, : count[i]].tolist()
    return found


@pytest.mark.parametrize("row", range(3), ids=["greedy", "tempered", "nucleus"])
def test_rows_are_what_generate_gives_for_each_prompt_alone_with_its_own_settings(lm, stream, row):
    tokens, mask = left_padded([PROMPTS[row]])
    batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros((1,), jnp.int32))
    temperature, top_p = SETTINGS[row]
    alone = functools.partial(
        generate, lm[0], response_length=LENGTH, eos_id=EOS, pad_id=0,
        sampling=Sampling(temperature=temperature, top_p=top_p),
    )  # fmt: skip
    rollout = jax.jit(alone)(lm[1], batch, jax.random.key(3 + row))
    expected = rollout.tokens[0, WIDTH:][rollout.mask[0, WIDTH:]].tolist()
    assert len(expected) > 1
    assert responses(stream, range(3))[row] == expected


def test_no_row_depends_on_the_others(stream):
    together = responses(stream, [2, 0, 1])
    assert together == [responses(stream, [row])[0] for row in (2, 0, 1)]


def test_choices_with_one_seed_differ(stream):
    assert responses(stream, [1]) != responses(stream, [1], choice=1)


def test_a_row_that_is_not_wanted_any_longer_gets_no_further_tokens(lm):
    endless = RowStream(*lm, eos_id=-1, response_length=LENGTH)
    alive, counts = np.ones(2, bool), []
    for _, count in endless(*left_padded(PROMPTS[:2]), settings_of([0, 1]), alive):
        counts.append(count.tolist())
        alive[0] = False
    assert counts == [[CHUNK, CHUNK], [0, CHUNK], [0, LENGTH - 2 * CHUNK]]
