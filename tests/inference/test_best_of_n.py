"""The best of n: who is chosen, and what k of the n samples would have given."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.inference.best_of_n import (
    best_of_n,
    gain_by_number,
    make_sampler,
    numbers_up_to,
    order_statistic_weights,
)
from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.ops import sequence_scores
from tests.helpers import make_lm, make_scorer, perturbed, prompt_batch, tiny_config

REWARDS = jnp.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
COSTS = jnp.array([[-1.0, 1.0, -1.0], [2.0, 3.0, 1.0], [0.0, 0.5, 0.1]])


def test_best_is_the_highest_reward_among_feasible_and_else_the_lowest_cost():
    index, possible = best_of_n(REWARDS, COSTS, 0.0)
    assert index.tolist() == [2, 2, 0]  # the last row's limit is met exactly
    assert possible.tolist() == [True, False, True]


@pytest.mark.parametrize(("costs", "limit"), [(None, 0.0), (COSTS, None), (None, None), (COSTS, 10.0)])
def test_without_a_limit_that_binds_it_is_the_highest_reward(costs, limit):
    index, possible = best_of_n(REWARDS, costs, limit)
    assert index.tolist() == [1, 1, 2]
    assert possible.all()


@pytest.mark.parametrize("n", [2, 5])
def test_choice_follows_the_distribution_of_the_best_feasible_of_n(n):
    """P(y) = ((1 − P(feasible, better))ⁿ − (1 − P(feasible, better or y))ⁿ)/(1 − (1 − P(feasible))ⁿ)."""
    rng = np.random.default_rng(0)
    chances, rewards = np.array([0.3, 0.1, 0.25, 0.15, 0.2]), np.array([2.0, 5.0, 1.0, 3.0, 4.0])
    costs = np.array([-1.0, 1.0, -2.0, 0.0, 2.0])
    feasible = costs <= 0
    samples = rng.choice(5, (100_000, n), p=chances)
    index, possible = best_of_n(jnp.asarray(rewards[samples]), jnp.asarray(costs[samples]), 0.0)
    chosen = samples[np.arange(len(samples)), np.asarray(index)][np.asarray(possible)]
    better = np.array([chances[feasible & (rewards > reward)].sum() for reward in rewards])
    share = (1 - better) ** n - (1 - better - chances) ** n
    expected = np.where(feasible, share, 0.0) / (1 - (1 - chances[feasible].sum()) ** n)
    np.testing.assert_allclose(np.bincount(chosen, minlength=5) / len(chosen), expected, atol=0.006)
    assert expected.sum() == pytest.approx(1.0)


def test_best_of_one_is_that_one_whatever_it_costs():
    index, possible = best_of_n(REWARDS[:, :1], COSTS[:, :1], 0.0)
    assert index.tolist() == [0, 0, 0]
    assert possible.tolist() == [True, False, True]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 3), (6, 4), (6, 6)])
def test_weights_of_order_statistics_count_subsets(n, k):
    for rank in range(1, k + 1):
        picked = [subset[rank - 1] for subset in itertools.combinations(range(n), k)]
        expected = np.bincount(picked, minlength=n) / len(picked)
        np.testing.assert_allclose(order_statistic_weights(n, k, rank), expected, atol=1e-12)


def test_gain_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    rewards, feasible = rng.normal(size=(7, 6)), rng.random((7, 6)) < 0.3
    for row in gain_by_number(rewards, feasible):
        subsets = [list(s) for s in itertools.combinations(range(6), int(row["number"]))]
        assert row["reward_max"] == pytest.approx(np.mean([rewards[:, s].max(1) for s in subsets]))
        assert row["reward_median"] == pytest.approx(np.mean([np.median(rewards[:, s], 1) for s in subsets]))
        assert row["feasible_share"] == pytest.approx(np.mean([feasible[:, s].any(1) for s in subsets]))
        best = [rewards[i, s][feasible[i, s]].max() for i in range(7) for s in subsets if feasible[i, s].any()]
        assert row["reward_selected"] == pytest.approx(np.mean(best))
    assert "reward_selected" not in gain_by_number(rewards, np.zeros_like(feasible))[0]
    everything = gain_by_number(rewards, np.ones_like(feasible))
    assert all(row["reward_selected"] == pytest.approx(row["reward_max"]) for row in everything)


def test_gain_of_normal_rewards_is_the_known_expected_maximum():
    rewards = np.random.default_rng(0).normal(size=(20_000, 8))
    rows = {row["number"]: row for row in gain_by_number(rewards, np.ones_like(rewards, bool))}
    for number, expected in {1: 0.0, 2: 0.5642, 4: 1.0294, 8: 1.4236}.items():
        assert rows[number]["reward_max"] == pytest.approx(expected, abs=0.02)
        assert rows[number]["reward_median"] == pytest.approx(0.0, abs=0.02)


def test_numbers_are_powers_of_two_and_the_last():
    assert [numbers_up_to(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_sampler_gives_what_generation_and_scoring_give_apart():
    config = tiny_config(vocab_size=24, hidden_size=16, num_layers=1, head_dim=4)
    module, policy = make_lm(config)
    scorer, scores = make_scorer("reward", config)
    scores = perturbed(scores)
    prompts, key = prompt_batch(np.random.default_rng(0), 3, 5, 24), jax.random.key(1)
    sampler = {"response_length": 6, "eos_id": 2, "pad_id": 0, "sampling": Sampling()}
    sample = make_sampler(module, {"reward": scorer}, num_responses=4, **sampler)
    out = sample(policy["params"], {"reward": scores}, prompts, key)
    again = functools.partial(generate, module, num_responses=4, **sampler)
    rollout = jax.jit(again)(policy["params"], prompts, key)
    np.testing.assert_array_equal(out["tokens"].reshape(12, 6), rollout.tokens[:, 5:])
    np.testing.assert_array_equal(out["length"].reshape(12), rollout.mask[:, 5:].sum(-1))
    expected = jax.jit(functools.partial(sequence_scores, scorer))(scores, rollout.tokens, rollout.mask)
    np.testing.assert_allclose(out["reward"].reshape(12), expected, rtol=1e-5, atol=1e-6)
    assert out["reward"].shape == (3, 4)
    assert len(np.unique(np.asarray(out["tokens"][0]), axis=0)) > 1
