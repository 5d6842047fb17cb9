import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_rlhf_jax import ops
from tests.helpers import apply, make_lm, make_scorer, prompt_batch, right_padded, tiny_config

VOCAB = 97
BATCH, PROMPT, RESPONSE = 3, 5, 12

response_log_probs = jax.jit(ops.response_log_probs, static_argnames=("module", "prompt_length", "temperature"))
response_values = jax.jit(ops.response_values, static_argnames=("module", "prompt_length"))


@pytest.fixture(scope="module")
def lm():
    return make_lm(tiny_config())


@pytest.fixture(scope="module")
def sequences():
    """Left-padded prompts and responses that end early."""
    rng = np.random.default_rng(1)
    prompts = prompt_batch(rng, BATCH, PROMPT, VOCAB)
    tokens, mask = right_padded(rng, BATCH, RESPONSE, VOCAB)
    return jnp.concatenate([prompts.tokens, tokens], axis=1), jnp.concatenate([prompts.mask, mask], axis=1)


def float64_log_probs(logits, tokens):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return np.take_along_axis(logits, np.asarray(tokens)[..., None], axis=-1)[..., 0] - log_z


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 10.0, 1000.0]))
def test_token_log_probs_equal_float64(seed, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((2, 3, 11))).astype(np.float32)
    tokens = rng.integers(0, 11, (2, 3)).astype(np.int32)
    actual = ops.token_log_probs(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(actual, float64_log_probs(logits, tokens), rtol=1e-5, atol=1e-5)


def test_token_log_probs_are_computed_in_float32():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(5 * rng.standard_normal((2, 3, 500)), jnp.bfloat16)
    tokens = jnp.asarray(rng.integers(0, 500, (2, 3)), jnp.int32)
    actual = ops.token_log_probs(logits, tokens)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, float64_log_probs(logits.astype(jnp.float32), tokens), rtol=1e-5, atol=1e-5)
    naive = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    assert np.abs(np.asarray(naive, np.float64) - np.asarray(actual)).max() > 1e-3  # the error that float32 avoids


def test_masked_mean_averages_sequences_first_and_counts_empty_rows_as_zero():
    x = jnp.array([[1.0, 2.0, 90.0], [6.0, 90.0, 90.0], [90.0, 90.0, 90.0]])
    mask = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
    np.testing.assert_allclose(ops.sequence_mean(x, mask), [1.5, 6.0, 0.0])
    np.testing.assert_allclose(ops.masked_mean(x, mask), 2.5)


def test_masked_mean_ignores_non_finite_values_behind_the_mask_in_values_and_gradients():
    x = jnp.array([[1.0, jnp.nan], [3.0, jnp.inf]])
    mask = jnp.array([[True, False], [True, False]])
    value, gradient = jax.value_and_grad(ops.masked_mean)(x, mask)
    np.testing.assert_allclose(value, 2.0)
    np.testing.assert_allclose(gradient, [[0.5, 0.0], [0.5, 0.0]])


def test_gather_last_reads_the_last_real_token_on_either_side_of_padding():
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    mask = jnp.array([[True, True, False, False], [False, False, True, True], [False, False, False, False]])
    np.testing.assert_array_equal(ops.last_index(mask), [1, 3, 0])
    np.testing.assert_array_equal(ops.gather_last(x, mask), [1.0, 7.0, 8.0])


@pytest.mark.parametrize(("ends", "expected"), [(2, [True, False, False]), ((2, 7), [True, True, False])])
def test_a_response_ends_with_any_of_the_ends_and_padding_is_none(ends, expected):
    tokens = jnp.array([[5, 2, 0, 0], [2, 5, 7, 0], [2, 7, 5, 5]])
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(ops.ends_with(tokens, mask, ends), expected)
    assert not ops.ends_with(tokens, mask, 0).any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_log_probs_read_the_position_before_each_token(lm, sequences, temperature):
    module, variables = lm
    tokens, mask = sequences
    logits = np.asarray(apply(module, variables, tokens, mask), np.float64) / temperature
    expected = float64_log_probs(logits[:, :-1], tokens[:, 1:])[:, PROMPT - 1 :]
    actual = response_log_probs(
        module, variables["params"], tokens, mask, prompt_length=PROMPT, temperature=temperature
    )
    assert actual.shape == (BATCH, RESPONSE)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_response_values_are_read_before_the_token_is_known(sequences):
    module, variables = make_scorer("critic", tiny_config())
    tokens, mask = sequences
    values = response_values(module, variables["params"], tokens, mask, prompt_length=PROMPT)
    everywhere = apply(module, variables, tokens, mask)  # another graph: here no column is left out
    np.testing.assert_allclose(values, everywhere[:, PROMPT - 1 : -1], rtol=1e-5, atol=1e-5)
    t = 4
    changed = tokens.at[:, PROMPT + t].set((tokens[:, PROMPT + t] + 1) % VOCAB)
    other = response_values(module, variables["params"], changed, mask, prompt_length=PROMPT)
    np.testing.assert_array_equal(values[:, : t + 1], other[:, : t + 1])
    assert jnp.abs(values[0, t + 1 :] - other[0, t + 1 :]).max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_chunks_change_neither_log_probs_nor_gradients(lm, sequences, monkeypatch, chunk):
    module, variables = lm
    tokens, mask = sequences
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((BATCH, RESPONSE)), jnp.float32)

    def loss(params):
        log_probs = ops.response_log_probs(module, params, tokens, mask, prompt_length=PROMPT, temperature=0.7)
        return (weights * log_probs).sum(), log_probs

    def run():
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    (_, expected), expected_gradient = run()
    monkeypatch.setattr(ops, "LOGITS_CHUNK", chunk)
    (_, actual), gradient = run()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected_gradient)


def test_no_array_holds_the_logits_of_all_positions(lm, sequences, monkeypatch):
    module, variables = lm
    tokens, mask = sequences

    def program():
        def loss(params):
            return ops.response_log_probs(module, params, tokens, mask, prompt_length=PROMPT).sum()

        return jax.jit(jax.grad(loss)).lower(variables["params"]).compile().as_text()

    def holds_all_logits(text):
        chunks = RESPONSE // 4
        positions = (f"{BATCH},{RESPONSE}", f"{BATCH * RESPONSE}", f"{chunks},{BATCH},4", f"{chunks},{BATCH * 4}")
        return any(f"f32[{p},{VOCAB}]" in text for p in positions)

    assert holds_all_logits(program())  # in one chunk
    monkeypatch.setattr(ops, "LOGITS_CHUNK", 4)
    text = program()
    assert not holds_all_logits(text)
    assert f"f32[{BATCH},4,{VOCAB}]" in text or f"f32[{BATCH * 4},{VOCAB}]" in text
