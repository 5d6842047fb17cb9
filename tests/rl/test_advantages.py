import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_jax.ops import masked_mean
from safe_rlhf_jax.rl.advantages import gae, token_scores
from safe_rlhf_jax.rl.lagrange import lagrangian_advantage


def random_case(seed, rows=4, length=7):
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[length, 1], rng.integers(1, length + 1, rows - 2)])
    mask = np.arange(length) < lengths[:, None]
    return rng.normal(size=(rows, length)).astype(np.float32), rng.normal(size=(rows, length)).astype(np.float32), mask


def backward_loop(rewards, values, mask, gamma, gae_lambda):
    advantages = np.zeros_like(rewards)
    for b, row in enumerate(mask):
        following = next_value = 0.0
        for t in reversed(range(row.sum())):
            following = rewards[b, t] + gamma * next_value - values[b, t] + gamma * gae_lambda * following
            next_value = values[b, t]
            advantages[b, t] = following
    return advantages


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_backward_loop(seed, gamma, gae_lambda):
    rewards, values, mask = random_case(seed)
    advantages, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=gamma, gae_lambda=gae_lambda)
    expected = backward_loop(rewards, values, mask, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), atol=1e-5)


def test_gae_ignores_tokens_after_eos():
    rewards, values, mask = random_case(0)
    clean = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=0.9, gae_lambda=0.8)
    for garbage in (1e6, np.nan, np.inf):
        dirty = [jnp.asarray(np.where(mask, x, garbage)) for x in (rewards, values)]
        for a, b in zip(clean, gae(*dirty, jnp.asarray(mask), gamma=0.9, gae_lambda=0.8), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(clean[0])[~mask])
    assert not np.any(np.asarray(clean[1])[~mask])


def test_gae_with_lambda_one_is_the_monte_carlo_return_minus_the_value():
    rewards, values, mask = random_case(1)
    advantages, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=1.0, gae_lambda=1.0)
    to_go = np.cumsum((rewards * mask)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(advantages, (to_go - values) * mask, atol=1e-5)
    np.testing.assert_allclose(returns, to_go * mask, atol=1e-5)


def test_gae_with_lambda_zero_is_the_temporal_difference():
    rewards, values, mask = random_case(2)
    advantages, _ = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=0.9, gae_lambda=0.0)
    following = np.pad((values * mask)[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(advantages, (rewards + 0.9 * following - values) * mask, atol=1e-5)


def test_gae_of_a_single_token_is_reward_minus_value():
    one = jnp.ones((1, 1), bool)
    advantages, returns = gae(jnp.array([[3.0]]), jnp.array([[1.0]]), one, gamma=0.5, gae_lambda=0.5)
    assert float(advantages[0, 0]) == 2.0
    assert float(returns[0, 0]) == 3.0


def test_gae_passes_no_gradient():
    rewards, values, mask = map(jnp.asarray, random_case(3))
    grads = jax.grad(lambda r, v: sum(x.sum() for x in gae(r, v, mask, gamma=1.0, gae_lambda=0.9)), argnums=(0, 1))(
        rewards, values
    )
    assert not any(np.any(g) for g in grads)


MASK = jnp.array([[True, True, True, True, False]])
LOG_RATIO = jnp.array([[0.5, -1.0, 2.0, 0.0, 99.0]])


@pytest.mark.parametrize(
    ("kl_sign", "score", "expected"),
    [(-1, 3.0, [-0.05, 0.1, -0.2, 3.0]), (+1, -2.0, [0.05, -0.1, 0.2, -2.0])],
)
def test_token_scores_equal_a_hand_example(kl_sign, score, expected):
    scores = token_scores(jnp.array([score]), LOG_RATIO, MASK, kl_coeff=0.1, kl_sign=kl_sign, clip_range_score=50.0)
    np.testing.assert_allclose(scores[0, :4], expected, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_score_lands_on_the_eos_token(length):
    mask = jnp.arange(5)[None] < length
    scores = token_scores(jnp.array([7.0]), jnp.zeros((1, 5)), mask, kl_coeff=0.1, kl_sign=-1, clip_range_score=50.0)
    assert int(jnp.argmax(scores[0])) == length - 1
    assert float(scores.sum()) == 7.0


def test_the_sum_of_score_and_kl_is_clipped():
    def last(score, log_ratio):
        ratios = jnp.full((1, 1), log_ratio)
        mask = jnp.ones((1, 1), bool)
        return float(
            token_scores(jnp.array([score]), ratios, mask, kl_coeff=1.0, kl_sign=1, clip_range_score=5.0)[0, 0]
        )

    assert last(4.0, 1.0) == 5.0
    assert last(4.0, 3.0) == 5.0
    assert last(7.0, -4.0) == 3.0  # the sum lies within, though the score does not
    assert last(-4.0, -3.0) == -5.0
    assert last(0.0, 9.0) == 5.0  # KL alone is clipped too


@pytest.mark.parametrize("multiplier", [0.0, 0.3, 1.0, 20.0])
def test_combined_kl_is_independent_of_multiplier(multiplier):
    rng = np.random.default_rng(0)
    log_ratio, mask = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32), jnp.ones((3, 5), bool)
    scores = [
        token_scores(jnp.zeros(3), log_ratio, mask, kl_coeff=0.1, kl_sign=sign, clip_range_score=50.0)
        for sign in (-1, +1)
    ]
    advantages = [gae(s, jnp.zeros((3, 5)), mask, gamma=1.0, gae_lambda=0.95)[0] for s in scores]
    np.testing.assert_allclose(lagrangian_advantage(*advantages, multiplier), advantages[0], rtol=1e-5, atol=1e-6)
    assert abs(float(masked_mean(advantages[0], mask))) > 1e-3
