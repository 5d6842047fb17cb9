"""The probe of benchmarks/real/baselines.py: hidden states of responses."""

import jax.numpy as jnp
import numpy as np

from benchmarks.preferences import Pairs
from benchmarks.real.baselines import computed_states
from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.pipeline import Policy
from tests.helpers import apply, make_lm, perturbed, tiny_config


def test_states_are_the_last_and_the_mean_of_the_response_alone():
    tokenizer = load_tokenizer("demo")
    module, variables = make_lm(tiny_config(vocab_size=tokenizer.vocab_size))
    policy = Policy("lm", module, perturbed(variables), tokenizer, TEMPLATES["beaver"])
    pairs = Pairs(
        {"prompt": prompt, "response_0": "one two three", "response_1": "no", "better_response_id": 0}
        for prompt in ("hello", "hello how are you")
    )
    found = computed_states(policy, pairs)
    sides = [side for pair in pairs.conversations for side in pair]
    for state, side in zip(found, sides, strict=True):
        text = encode(side, policy.template, tokenizer)
        tokens = jnp.array([text.ids])
        hidden = np.asarray(apply(module, policy.variables, tokens, tokens >= 0, method="hidden"))[0][text.trained]
        np.testing.assert_allclose(state, np.concatenate([hidden[-1], hidden.mean(0)]), atol=1e-5)
