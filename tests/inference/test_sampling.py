import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_rlhf_jax.inference.sampling import (
    EXCLUDED,
    Sampling,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample_token,
)

DRAWS = 20_000
LOGITS = np.array([1.5, 0.2, -0.7, 2.1, 0.9, -2.0, 0.0], np.float32)


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x))
    return x / x.sum()


def draws(sampling, logits=LOGITS, seed=0, seen=None):
    rows = jnp.tile(jnp.asarray(logits)[None], (DRAWS, 1))
    seen = None if seen is None else jnp.tile(jnp.asarray(seen)[None], (DRAWS, 1))
    return [np.asarray(x) for x in sample_token(jax.random.key(seed), rows, seen, sampling)]


def assert_drawn_from(tokens, probabilities):
    """Chi-square test at about 1e-4: mean plus 3.7 deviations is beyond that quantile for few degrees of freedom."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    expected = DRAWS * probabilities[kept]
    assert expected.min() > 5
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 4.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_frequencies_and_log_probs_follow_the_softmax_at_that_temperature(temperature):
    tokens, log_probs = draws(Sampling(temperature=temperature))
    probabilities = softmax(LOGITS / temperature)
    assert_drawn_from(tokens, probabilities)
    np.testing.assert_allclose(log_probs, np.log(probabilities)[tokens], rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, softmax(LOGITS / (temperature + 0.1)))


def test_top_k_draws_only_the_k_most_probable_in_their_proportions():
    tokens, log_probs = draws(Sampling(top_k=3))
    probabilities = softmax(np.where(np.argsort(np.argsort(-LOGITS)) < 3, LOGITS, -np.inf))
    assert_drawn_from(tokens, probabilities)
    np.testing.assert_allclose(log_probs, np.log(probabilities[tokens]), rtol=1e-5, atol=1e-5)


def test_top_p_draws_only_from_the_nucleus_in_its_proportions():
    order = np.argsort(-LOGITS)
    total = np.cumsum(softmax(LOGITS)[order])
    nucleus = order[: np.searchsorted(total, 0.7) + 1]
    assert 1 < len(nucleus) < len(LOGITS)
    tokens, log_probs = draws(Sampling(top_p=0.7))
    probabilities = softmax(np.where(np.isin(np.arange(len(LOGITS)), nucleus), LOGITS, -np.inf))
    assert_drawn_from(tokens, probabilities)
    np.testing.assert_allclose(log_probs, np.log(probabilities[tokens]), rtol=1e-5, atol=1e-5)


def test_temperature_comes_before_the_nucleus():
    nucleus = {p: set(draws(Sampling(temperature=p, top_p=0.7))[0]) for p in (0.3, 3.0)}
    assert len(nucleus[0.3]) < len(nucleus[3.0])


@given(seed=st.integers(0, 2**31), p=st.floats(0.01, 0.99))
def test_the_nucleus_is_the_smallest_set_that_reaches_p(seed, p):
    logits = 2 * np.random.default_rng(seed).standard_normal(9)
    kept = np.asarray(keep_top_p(jnp.asarray(logits[None], jnp.float32), p))[0] > EXCLUDED / 2
    probabilities = softmax(logits)
    assert kept.any()
    assert probabilities[kept].min() >= probabilities[~kept].max(initial=0.0)
    assert probabilities[kept].sum() >= p - 1e-6
    assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-6


def test_a_nucleus_of_almost_nothing_keeps_the_most_probable_token():
    tokens, log_probs = draws(Sampling(top_p=1e-6))
    assert set(tokens) == {int(LOGITS.argmax())}
    np.testing.assert_allclose(log_probs, 0.0, atol=1e-6)


def test_top_k_keeps_k_tokens_and_more_than_the_vocabulary_keeps_all():
    kept = np.asarray(keep_top_k(jnp.asarray(LOGITS[None]), 2))[0] > EXCLUDED / 2
    assert set(np.flatnonzero(kept)) == set(np.argsort(-LOGITS)[:2])
    np.testing.assert_array_equal(draws(Sampling(top_k=100))[0], draws(Sampling())[0])


def test_temperature_zero_takes_the_most_probable_and_reports_its_probability():
    tokens, log_probs = draws(Sampling(temperature=0.0))
    assert set(tokens) == {int(LOGITS.argmax())}
    np.testing.assert_allclose(log_probs, np.log(softmax(LOGITS).max()), rtol=1e-5)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = jnp.array([[True, True, False, False, True]])
    np.testing.assert_allclose(penalize_repetition(logits, seen, 4.0), [[0.5, -8.0, 2.0, -2.0, 0.0]])


def test_repetition_penalty_comes_before_temperature():
    seen = LOGITS > 1.0
    sampling = Sampling(temperature=0.7, repetition_penalty=1.8)
    tokens, log_probs = draws(sampling, seen=seen)
    probabilities = softmax(np.where(seen, LOGITS / 1.8, LOGITS) / 0.7)
    assert_drawn_from(tokens, probabilities)
    np.testing.assert_allclose(log_probs, np.log(probabilities)[tokens], rtol=1e-5, atol=1e-5)
    plain = draws(dataclasses.replace(sampling, repetition_penalty=1.0), seen=seen)[0]
    assert not np.array_equal(tokens, plain)


@pytest.mark.reference
def test_processors_equal_those_of_transformers():
    import torch
    from transformers.generation import logits_process as theirs

    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((5, 31))).astype(np.float32)
    history = rng.integers(0, 31, (5, 8))
    seen = np.zeros((5, 31), bool)
    np.put_along_axis(seen, history, True, axis=1)
    ours = jnp.asarray(logits)
    cases = [
        (penalize_repetition(ours, jnp.asarray(seen), 1.7), theirs.RepetitionPenaltyLogitsProcessor(1.7)),
        (keep_top_k(ours, 6), theirs.TopKLogitsWarper(6)),
        (keep_top_p(ours, 0.8), theirs.TopPLogitsWarper(0.8)),
    ]
    for actual, process in cases:
        expected = process(torch.tensor(history), torch.tensor(logits)).numpy()
        expected = np.where(np.isinf(expected), EXCLUDED, expected)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
