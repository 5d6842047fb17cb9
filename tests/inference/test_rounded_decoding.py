"""Decoding from a copy of the weights, and from a cache, in 8 bits."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax import ops
from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.models.attention import attend
from safe_rlhf_jax.models.quantized import dequantize, quantize, rounded_vectors
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.sharding import init_sharded, make_mesh
from tests.helpers import make_lm, perturbed, prompt_batch, tiny_config

VOCAB, PROMPT, RESPONSE, BATCH = 18, 6, 12, 4
OPTIONS = {"response_length": RESPONSE, "eos_id": 2, "pad_id": 0, "sampling": Sampling()}
FORMS = [{}, {"windows": (5, None)}, {"positions": "alibi"}, {"num_kv_heads": 1}, {"num_kv_heads": 4}]

response_log_probs = jax.jit(ops.response_log_probs, static_argnames=("module", "prompt_length", "temperature"))
sample = jax.jit(functools.partial(generate, **OPTIONS), static_argnames=("module", "num_responses"))


@pytest.fixture(scope="module")
def prompts():
    return prompt_batch(np.random.default_rng(0), BATCH, PROMPT, VOCAB)


def gap(module, params, rollout):
    """|log π − log μ| of the response tokens."""
    ours = response_log_probs(module, params, rollout.tokens, rollout.mask, prompt_length=PROMPT, temperature=1.0)
    return np.abs(ours - rollout.sampler_log_probs)[np.asarray(rollout.mask)[:, PROMPT:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_to_integers_is_attention_to_what_they_stand_for(dtype):
    rng = np.random.default_rng(0)
    queries, keys, values = (jnp.asarray(rng.normal(size=(2, n, 5, 8)), dtype) for n in (6, 2, 2))
    visible = jnp.asarray(rng.random((2, 5, 5)) < 0.7).at[:, :, 0].set(True)
    rounded = rounded_vectors(keys), rounded_vectors(3.0 * values)
    actual = attend(queries, *rounded, visible, scale=0.5, cap=4.0)
    expected = attend(queries, *(dequantize(x, dtype) for x in rounded), visible, scale=0.5, cap=4.0)
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(*(np.float32(x) for x in (actual, expected)), rtol=tolerance, atol=tolerance)


def test_no_vector_is_further_off_than_half_its_scale_and_zeros_stay_zeros():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 8)), jnp.float32).at[0, 0, 0].set(0.0)
    rounded = rounded_vectors(x)
    assert rounded.qvalue.dtype == jnp.int8
    assert rounded.scale.shape == (2, 3, 4, 1)
    error = np.abs(dequantize(rounded) - x)
    assert (error <= 0.5001 * np.abs(x).max(-1, keepdims=True) / 127).all()
    assert not error[0, 0, 0].any()


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_a_rounded_cache_costs_little_and_something(prompts, scan_layers, changes):
    config = tiny_config(vocab_size=VOCAB, scan_layers=scan_layers, num_layers=2, **changes)
    module, variables = make_lm(config)
    params = perturbed(variables)["params"]
    rounding = CausalLM(dataclasses.replace(config, decode_cache="int8"))
    gaps = gap(module, params, sample(rounding, params, prompts, jax.random.key(0), num_responses=3))
    assert 1e-3 < gaps.mean() < 0.02  # nats a token; logits of this network spread over several
    assert gap(module, params, sample(module, params, prompts, jax.random.key(0))).max() < 1e-5


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_rounded_weights_are_those_of_the_copy_alone(prompts, scan_layers):
    config = tiny_config(vocab_size=VOCAB, scan_layers=scan_layers)
    module, variables = make_lm(config)
    params = perturbed(variables)["params"]
    rollout = sample(CausalLM(dataclasses.replace(config, decode_weights="int8")), params, prompts, jax.random.key(0))
    assert gap(module, dequantize(quantize(params, "int8")), rollout).max() < 1e-5
    assert gap(module, params, rollout).mean() > 1e-4


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_the_loop_over_tokens_carries_integers(prompts, scan_layers):
    """A cache of floats, or a stack of float kernels, that the loop carries would be read for every token."""

    def carried(**rounding):
        module, variables = make_lm(tiny_config(vocab_size=VOCAB, scan_layers=scan_layers, **rounding))
        program = sample.lower(module, variables["params"], prompts, jax.random.key(0)).compile().as_text()
        (loop,) = (line for line in program.splitlines() if " while(" in line and f"s32[{BATCH},{RESPONSE}]" in line)
        return set(re.findall(r"\w+\[[\d,]+\]", loop.partition(" while(")[0]))

    c = tiny_config(vocab_size=VOCAB)
    layers = f"{c.num_layers}," if scan_layers else ""
    large = [f"[{layers}{BATCH},{c.num_kv_heads},{PROMPT + RESPONSE},{c.head_dim}]"]
    if scan_layers:  # of single layers XLA's CPU compiler moves the conversion out of the loop
        large.append(f"[{layers}{c.hidden_size},{c.intermediate_size}]")
    plain, rounded = carried(), carried(decode_cache="int8", decode_weights="int8")
    for shape in large:
        assert f"f32{shape}" in plain
        assert f"s8{shape}" in rounded
        assert f"f32{shape}" not in rounded


def test_eight_devices_sample_what_one_does(prompts):
    rollouts = []
    one = make_mesh((1, 1, 1), devices=jax.devices()[:1])
    for mesh in one, make_mesh((1, 4, 2)), make_mesh((1, 4, 1), decode=2):
        with jax.set_mesh(mesh):
            rounding = {"decode_cache": "int8", "decode_weights": "int8", "gather_to_decode": mesh is not one}
            module = CausalLM(tiny_config(vocab_size=VOCAB, scan_layers=True, **rounding))
            init = functools.partial(module.init, tokens=prompts.tokens, mask=prompts.mask)
            params = init_sharded(init, mesh, jax.random.key(0))["params"]
            rollouts.append(jax.device_get(sample(module, params, prompts, jax.random.key(0))))
    for other in rollouts[1:]:
        np.testing.assert_array_equal(other.tokens, rollouts[0].tokens)
        # Sums in another order round to another integer here and there.
        np.testing.assert_allclose(other.sampler_log_probs, rollouts[0].sampler_log_probs, atol=0.05)
