import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.rl.losses import (
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    policy_ratio,
    sampler_weights,
)

ONE = jnp.ones((1, 1), bool)


def cell(x):
    return jnp.full((1, 1), x, jnp.float32)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (2.0, 1.0, -2.0, -2.0),  # inside
        (-2.0, 1.0, 2.0, 2.0),
        (2.0, 1.5, -2.4, 0.0),  # good action, already likelier: clipped
        (2.0, 0.5, -1.0, -2.0),  # good action, less likely: not clipped
        (-2.0, 0.5, 1.6, 0.0),  # bad action, already less likely: clipped
        (-2.0, 1.5, 3.0, 2.0),  # bad action, likelier: not clipped
        (0.0, 9.0, 0.0, 0.0),
    ],
)
def test_surrogate_clips_only_where_the_step_went_far_enough(advantage, ratio, loss, gradient):
    def f(x):
        return clipped_surrogate(x, cell(advantage), ONE, clip_range_ratio=0.2)

    value, grad = jax.value_and_grad(f)(cell(ratio))
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(grad[0, 0], gradient, rtol=1e-6)


def test_surrogate_is_the_mean_per_sequence_then_over_sequences():
    mask = jnp.array([[True, True], [True, False]])
    advantages = jnp.array([[1.0, 3.0], [10.0, jnp.nan]])
    loss = clipped_surrogate(jnp.ones((2, 2)), advantages, mask, clip_range_ratio=0.2)
    assert float(loss) == -(2.0 + 10.0) / 2  # a mean over tokens would be −14/3


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),  # inside: ½·2²
        (2.0, 1.0, 3.0, 0.5 * 1.5**2, 0.0),  # moved towards the target by more than ε: the clipped error, no gradient
        (0.0, 1.0, 3.0, 0.5 * 3.0**2, -3.0),  # moved away: the true error
        (4.0, 1.0, 3.0, 0.5 * 1.5**2, 0.0),  # overshot: the clipped error is larger
        (9.0, 1.0, 3.0, 0.5 * 6.0**2, 6.0),  # far overshot: the true error is larger
    ],
)
def test_value_loss_takes_the_larger_error(value, old, target, loss, gradient):
    def f(v):
        return clipped_value_loss(v, cell(old), cell(target), ONE, clip_range_value=0.5)

    out, grad = jax.value_and_grad(f)(cell(value))
    np.testing.assert_allclose(out, loss, rtol=1e-6)
    np.testing.assert_allclose(grad[0, 0], gradient, rtol=1e-6)


def test_value_loss_ignores_masked_tokens():
    mask = jnp.array([[True, False]])
    target = jnp.array([[3.0, jnp.nan]])
    loss = clipped_value_loss(jnp.ones((1, 2)), jnp.ones((1, 2)), target, mask, clip_range_value=0.5)
    assert float(loss) == 2.0


@pytest.mark.parametrize("difference", [1e3, -1e3, np.inf])
def test_policy_ratio_is_finite_for_extreme_log_probs(difference):
    ratio, grad = jax.value_and_grad(lambda x: policy_ratio(x, cell(0.0), ONE).sum())(cell(difference))
    assert np.isfinite(ratio)
    assert np.isfinite(grad[0, 0])


def test_policy_ratio_is_unchanged_in_the_normal_range_and_one_outside_the_mask():
    log_probs = jnp.array([[-1.0, -2.0, jnp.nan]])
    old = jnp.array([[-1.5, -0.5, 0.0]])
    ratio = policy_ratio(log_probs, old, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(ratio[0], [np.exp(0.5), np.exp(-1.5), 1.0], rtol=1e-6)


def test_sampler_weights_make_means_over_the_sampler_those_over_the_policy_until_they_are_cut():
    policy, sampler = (jax.nn.log_softmax(jnp.array([logits])) for logits in ([0.0, 1.0, 3.0], [0.5, 1.0, 1.0]))
    mask, x = jnp.ones((1, 3), bool), jnp.array([[4.0, -1.0, 2.0]])
    weights = sampler_weights(policy, sampler, mask, maximum=10.0)
    np.testing.assert_allclose((jnp.exp(sampler) * weights * x).sum(), (jnp.exp(policy) * x).sum(), rtol=1e-6)
    cut = sampler_weights(policy, sampler, mask.at[0, 0].set(False), maximum=1.5)
    np.testing.assert_allclose(cut, [[1.0, float(weights[0, 1]), 1.5]], rtol=1e-6)
    assert float(weights.max()) > 1.5


def test_clip_fraction_counts_response_tokens_outside_the_range():
    ratio = jnp.array([[1.0, 1.3, 0.7, 1.19], [1.5, 9.0, 9.0, 9.0]])
    mask = jnp.array([[True] * 4, [True] + [False] * 3])
    np.testing.assert_allclose(clip_fraction(ratio, mask, clip_range_ratio=0.2), (2 / 4 + 1) / 2)
    assert float(clip_fraction(jnp.ones((2, 4)), mask, clip_range_ratio=0.2)) == 0.0


def test_explained_variance_equals_numpy_over_masked_tokens():
    rng = np.random.default_rng(0)
    values, returns = rng.normal(size=(2, 3, 4)).astype(np.float32)
    mask = np.arange(4) < np.array([[4], [2], [1]])
    expected = 1 - np.var((returns - values)[mask]) / np.var(returns[mask])
    actual = explained_variance(*map(jnp.asarray, (values, np.where(mask, returns, 1e6), mask)))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert float(explained_variance(*map(jnp.asarray, (returns, returns, mask)))) == 1.0


def test_explained_variance_of_constant_returns_is_zero():
    mask = jnp.ones((2, 3), bool)
    assert float(explained_variance(jnp.arange(6.0).reshape(2, 3), jnp.full((2, 3), 4.0), mask)) == 0.0
    assert float(explained_variance(cell(1.0), cell(2.0), ONE)) == 0.0
    assert np.isfinite(explained_variance(cell(1.0), cell(2.0), ~ONE))
