"""λ* from samples of the reference: against the enumerated optimum, and the formulas in the docstring."""

import numpy as np
import pytest

from safe_rlhf_jax.rl.dual import dual_value, effective_sample_size, solve_dual, tilted_cost, tilted_weights
from safe_rlhf_jax.testing.worlds import BETA, PROMPTS, TablePolicy, make_world, mean_cost, plain_lagrangian

SAMPLES = 20_000
EXACT = {True: mean_cost, False: plain_lagrangian}


@pytest.fixture(scope="module", params=range(3))
def world(request):
    return make_world(request.param, TablePolicy())


def sampled(world, count=SAMPLES, seed=0):
    """Rewards and costs of samples of the reference, [prompts, count]."""
    rng = np.random.default_rng(seed)
    responses = [rng.choice(world.reference.shape[1], count, p=p / p.sum()) for p in world.reference]
    return [np.stack([table[x, y] for x, y in enumerate(responses)]) for table in (world.reward, world.costs[0])]


@pytest.mark.parametrize("divided", [True, False])
def test_multiplier_of_many_samples_is_that_of_the_enumerated_optimum(world, divided):
    exact = EXACT[divided](world)
    limit, expected = float(exact.limits[0, 0]), float(exact.multipliers[0, 0])
    found = solve_dual(
        *sampled(world), cost_limit=limit, kl_coeff=BETA, divided=divided, max_multiplier=100.0
    )  # fmt: skip
    assert found.multiplier == pytest.approx(expected, rel=0.04)
    assert found.expected_cost == pytest.approx(limit, abs=1e-9)
    other = EXACT[not divided](world)  # the two targets are told apart by far more than that
    assert abs(float(other.multipliers[0, 0]) / expected - 1) > 0.1
    assert not found.capped


def test_slope_of_the_dual_is_the_slack_of_the_constraint(world):
    """D′(λ) = d − E_{π_λ}[c], and D is convex: the root is its minimum."""
    rewards, costs = sampled(world, 50)
    scalars = {"cost_limit": -0.3, "kl_coeff": 0.5}
    grid = np.linspace(0.0, 3.0, 13)
    for x in grid:
        ends = [dual_value(rewards, costs, x + h, **scalars) for h in (1e-5, -1e-5)]
        slope = -0.3 - tilted_cost(rewards, costs, x, kl_coeff=0.5, divided=False)
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, abs=1e-6)
    found = solve_dual(rewards, costs, divided=False, max_multiplier=100.0, **scalars)
    least = dual_value(rewards, costs, found.multiplier, **scalars)
    assert least <= min(dual_value(rewards, costs, x, **scalars) for x in grid) + 1e-12


@pytest.mark.parametrize("divided", [True, False])
def test_cost_falls_with_the_multiplier_where_help_and_harm_go_together(world, divided):
    rewards, costs = sampled(world, 200)
    falling = [tilted_cost(rewards, costs, x, kl_coeff=0.5, divided=divided) for x in np.linspace(0, 20, 41)]
    assert np.all(np.diff(falling) < 0)


def test_slope_of_the_cost_under_safe_rlhf_is_the_covariance_with_reward_and_cost(world):
    """d/du E[c] = −Cov(c, r + c)/β with u = λ/(1 + λ)."""
    rewards, costs = sampled(world, 50)

    def cost(u):
        return tilted_cost(rewards, costs, u / (1 - u), kl_coeff=0.5, divided=True)

    weights = tilted_weights(rewards, costs, 0.4 / 0.6, kl_coeff=0.5, divided=True)
    means = [(weights * x).sum(1) for x in (costs, rewards + costs, costs * (rewards + costs))]
    covariance = (means[2] - means[0] * means[1]).mean()
    assert (cost(0.4 + 1e-6) - cost(0.4 - 1e-6)) / 2e-6 == pytest.approx(-covariance / 0.5, rel=1e-4)


@pytest.mark.parametrize("divided", [True, False])
def test_limit_that_holds_anyway_needs_no_multiplier(world, divided):
    rewards, costs = sampled(world, 50)
    found = solve_dual(rewards, costs, cost_limit=10.0, kl_coeff=0.5, divided=divided, max_multiplier=5.0)
    assert found.multiplier == 0.0
    assert not found.capped


@pytest.mark.parametrize("divided", [True, False])
def test_limit_beyond_all_samples_is_refused_and_one_beyond_the_bound_is_capped(world, divided):
    rewards, costs = sampled(world, 50)
    scalars = {"kl_coeff": 0.5, "divided": divided}
    with pytest.raises(ValueError, match=r"cost_limit -10\.000 is below what the samples of the reference reach"):
        solve_dual(rewards, costs, cost_limit=-10.0, max_multiplier=5.0, **scalars)
    limit = tilted_cost(rewards, costs, 3.0, **scalars)
    capped = solve_dual(rewards, costs, cost_limit=limit, max_multiplier=2.0, **scalars)
    assert (capped.multiplier, capped.capped) == (2.0, True)
    assert solve_dual(rewards, costs, cost_limit=limit, max_multiplier=5.0, **scalars).multiplier == pytest.approx(3.0)


def test_effective_sample_size_counts_the_samples_that_matter():
    rewards = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    even = tilted_weights(np.zeros((PROMPTS, 4)), np.zeros((PROMPTS, 4)), 1.0, kl_coeff=1.0, divided=True)
    assert effective_sample_size(even) == pytest.approx(4.0)
    sharp = tilted_weights(rewards, np.zeros_like(rewards), 0.0, kl_coeff=0.01, divided=True)
    assert effective_sample_size(sharp) == pytest.approx((4.0 + 1.0) / 2)


def test_weights_are_finite_where_scores_are_large_beside_the_kl_coefficient():
    weights = tilted_weights(np.array([[1e4, -1e4]]), np.array([[1.0, 2.0]]), 1.0, kl_coeff=1e-3, divided=False)
    assert weights.tolist() == [[1.0, 0.0]]
