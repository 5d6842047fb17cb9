"""What distinguishes the algorithms from each other."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.rl.advantages import gae, group_normalized, leave_one_out, sequence_advantages
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.constraints import rectified
from safe_rlhf_jax.rl.losses import clipped_surrogate, pairwise_surrogate, sequence_surrogate
from safe_rlhf_jax.rl.step import estimate_advantages, learn, make_step
from safe_rlhf_jax.rl.update import in_pairs, in_rows
from safe_rlhf_jax.types import ScoredRollout
from tests.helpers import compilations
from tests.rl.test_step import KEY, run_learn
from tests.rl.world import PROMPT, RESPONSE, ROWS, fresh, make_prompts, make_rollout, make_world

CRITIC_FREE = {"grpo_lag": 4, "p3o_lag": 2}


def repeated(rows=ROWS, n=2):
    """A rollout in which n responses to one prompt stand together."""
    rollout = make_rollout(rows)
    prompts = jnp.repeat(rollout.tokens[::n, :PROMPT], n, axis=0), jnp.repeat(rollout.mask[::n, :PROMPT], n, axis=0)
    return dataclasses.replace(
        rollout,
        tokens=jnp.concatenate([prompts[0], rollout.tokens[:, PROMPT:]], axis=1),
        mask=jnp.concatenate([prompts[1], rollout.mask[:, PROMPT:]], axis=1),
    )


def scored(rollout, signals=("reward", "cost"), seed=0, **scores):
    """A rollout with random log-probabilities, values and scores."""
    rng = np.random.default_rng(seed)
    log_probs, reference = jnp.asarray(rng.normal(size=(2, ROWS, RESPONSE)), jnp.float32)
    values = {s: jnp.asarray(rng.normal(size=(ROWS, RESPONSE)), jnp.float32) for s in signals}
    scores = {s: jnp.asarray(rng.normal(size=ROWS), jnp.float32) for s in signals} | scores
    return ScoredRollout(rollout, log_probs, reference, scores, values)


# --- reward shaping


def test_shaping_advantage_is_that_of_both_signals_where_critics_are_linear():
    """A(r − νc, V_r − νV_c) = A(r, V_r) − ν·A(c, V_c)."""
    rng = np.random.default_rng(0)
    reward, cost, reward_values, cost_values = jnp.asarray(rng.normal(size=(4, 5, 6)), jnp.float32)
    mask = jnp.arange(6)[None] < jnp.array([6, 5, 3, 2, 1])[:, None]
    options = {"gamma": 0.99, "gae_lambda": 0.9}
    (a_r, _), (a_c, _) = gae(reward, reward_values, mask, **options), gae(cost, cost_values, mask, **options)
    shaped, _ = gae(reward - 2.0 * cost, reward_values - 2.0 * cost_values, mask, **options)
    np.testing.assert_allclose(shaped, a_r - 2.0 * a_c, rtol=1e-4, atol=1e-5)


def test_shaping_takes_the_weighted_cost_off_the_reward_and_nothing_else():
    rollout = repeated()
    record = scored(rollout)
    world, ppo = make_world("reward_shaping", cost_weight=2.0), make_world("ppo")
    shaped, _ = estimate_advantages(world.algorithm, world.hp, world.state, record)
    lower = {"reward": record.scores["reward"] - 2.0 * record.scores["cost"]}
    expected, _ = estimate_advantages(ppo.algorithm, ppo.hp, ppo.state, record.replace(scores=record.scores | lower))
    chex.assert_trees_all_close(shaped, expected, atol=1e-6)
    assert set(world.state.critics) == set(shaped.advantages) == {"reward"}
    assert world.state.constraints == {}


# --- responses that violate a limit by themselves


def test_cgpo_counts_the_reward_of_feasible_responses_only_and_no_size_of_a_cost():
    record = scored(repeated())
    infeasible = record.scores["cost"] > 0
    assert 0 < int(infeasible.sum()) < ROWS
    other = {
        "reward": jnp.where(infeasible, record.scores["reward"] + 5.0, record.scores["reward"]),
        "cost": 100.0 * record.scores["cost"],
    }
    found = {}
    for name in ("cgpo", "reward_shaping"):
        world = make_world(name, num_responses=2)
        both = (record, record.replace(scores=other))
        found[name] = [estimate_advantages(world.algorithm, world.hp, world.state, r)[0].advantages for r in both]
        assert world.state.constraints == {}
    chex.assert_trees_all_equal(*found["cgpo"])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(*found["reward_shaping"], atol=0.1)


def test_cgpo_prefers_any_feasible_response_to_an_infeasible_one_and_the_better_of_two_feasible_ones():
    world = make_world("cgpo", num_responses=2, kl_coeff=0.0)
    record = scored(repeated(), reward=jnp.tile(jnp.array([-9.0, 9.0]), 4), cost=jnp.repeat(jnp.array([-1.0, 1.0]), 4))
    record.scores["cost"] = record.scores["cost"].at[1].set(0.1)
    experience, _ = estimate_advantages(world.algorithm, world.hp, world.state, record)
    advantage = np.asarray(experience.advantages["reward"][:, 0])
    assert advantage[0] > 0 > advantage[1]  # a reward of 9 that is not feasible
    assert advantage[3] > 0 > advantage[2]
    np.testing.assert_allclose(advantage[4:], 0.0, atol=1e-6)  # none is feasible


@functools.cache
def fixed_multiplier(name):
    """A world whose λ = 5 stays, and its compiled update, which takes costs."""
    measure = {"measure": rectified(0.0), "lr": lambda _: 0.0}
    world = make_world(name, multiplier=5.0, constraint=measure if name != "ppo" else None)
    return world, jax.jit(functools.partial(learn, world.networks, world.algorithm, world.hp))


def updated(name, cost):
    """The actor after an update in which all responses cost the same, by the critics of the start."""
    (world, learned), given = fixed_multiplier(name), {"cost": jnp.full(ROWS, cost)}
    return learned(world.state, world.frozen, make_rollout(), None, KEY, given)[0].actor.params


def test_repo_takes_no_cost_into_account_on_responses_within_the_limit():
    """In one batch with others, λ would weaken the reward of a safe response by 1 + λ."""
    chex.assert_trees_all_close(updated("repo", -1.0), updated("ppo", -1.0), atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(updated("ppo_lag", -1.0), updated("ppo", -1.0), atol=1e-6)


def test_repo_updates_on_violations_as_safe_rlhf_does():
    chex.assert_trees_all_close(updated("repo", 1.0), updated("ppo_lag", 1.0), atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(updated("repo", 1.0), updated("ppo", 1.0), atol=1e-6)


# --- without critics


def test_leave_one_out_compares_with_the_mean_of_the_others():
    returns = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = [[row[i] - np.delete(row, i).mean() for i in range(4)] for row in returns]
    np.testing.assert_allclose(leave_one_out(jnp.asarray(returns)), expected, rtol=1e-5, atol=1e-6)


def test_group_normalized_advantages_have_mean_zero_and_deviation_one():
    returns = jnp.asarray(np.random.default_rng(0).normal(3.0, 5.0, size=(3, 8)), jnp.float32)
    advantages = np.asarray(group_normalized(returns))
    np.testing.assert_allclose(advantages.mean(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(advantages.std(1, ddof=1), 1.0, rtol=1e-4)
    np.testing.assert_array_equal(group_normalized(jnp.ones((2, 4))), jnp.zeros((2, 4)))


def test_sequence_advantage_is_the_same_at_every_token_and_counts_no_padding():
    rewards = jnp.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    out = sequence_advantages(rewards, mask, leave_one_out, num_responses=2)
    np.testing.assert_allclose(out, [[-1.0, -1.0, 0.0], [1.0, 0.0, 0.0]], rtol=1e-6)


def test_signals_are_combined_after_they_are_normalised():
    """Costs a hundred times as large pull no harder: each signal is on its own scale before λ weighs it."""
    record = scored(repeated(n=4))
    larger = record.replace(scores=record.scores | {"cost": 100.0 * record.scores["cost"]})
    gap = {}
    for name in ("grpo_lag", "rloo_lag"):
        world = make_world(name, num_responses=4, kl_coeff=0.0, clip_range_score=1e6)
        a, b = (estimate_advantages(world.algorithm, world.hp, world.state, r)[0].advantages for r in (record, larger))
        combined = [world.algorithm.combine(x, {"cost": jnp.ones((ROWS, 1))}) for x in (a, b)]
        gap[name] = float(jnp.abs(combined[0] - combined[1]).max())
    assert gap["grpo_lag"] < 1e-4
    assert gap["rloo_lag"] > 1.0


# --- pairs


def test_pairwise_losses_have_the_gradient_of_the_difference_on_policy():
    """−½·mean D·∇(log π(y_1) − log π(y_2)), from both ways to clip."""
    rng = np.random.default_rng(0)
    mask = jnp.arange(4)[None] < jnp.array([4, 2, 3, 1])[:, None]
    log_probs = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    difference = np.array([1.5, -0.5])
    advantages = jnp.asarray(np.stack([difference, -difference], 1).reshape(-1, 1) * np.ones((1, 4)), jnp.float32)
    expected = np.where(mask, -0.5 * np.array([1.5, -1.5, -0.5, 0.5])[:, None] / 2, 0.0)
    for loss in (pairwise_surrogate, sequence_surrogate):
        grad = jax.grad(lambda x, loss=loss: loss(jnp.exp(x - log_probs), advantages, mask, clip_range_ratio=0.2))(
            log_probs
        )
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)


def test_joint_clipping_looks_at_the_difference_and_separate_clipping_at_each_response():
    ones, mask = jnp.ones((2, 1)), jnp.ones((2, 1), bool)
    advantages = jnp.array([[1.0], [-1.0]])

    def gradients(log_ratio):
        x = jnp.asarray(log_ratio)[:, None]
        losses = (pairwise_surrogate, sequence_surrogate)
        return [
            np.asarray(jax.grad(lambda x, f=f: f(jnp.exp(x), advantages * ones, mask, clip_range_ratio=0.2))(x))[:, 0]
            for f in losses
        ]

    joint, separate = gradients([0.15, -0.15])  # each within the range, their difference not
    np.testing.assert_array_equal(joint, [0.0, 0.0])
    assert separate[0] < 0 < separate[1]
    joint, separate = gradients([0.5, 0.5])  # the other way round
    np.testing.assert_allclose(joint, [-0.5, 0.5])
    assert separate[0] == 0.0 < separate[1]


def test_sequence_surrogate_of_single_tokens_is_the_clipped_surrogate():
    rng = np.random.default_rng(0)
    ratio, advantages = (
        jnp.asarray(rng.uniform(0.5, 1.5, (6, 1)), jnp.float32),
        jnp.asarray(rng.normal(size=(6, 1)), jnp.float32),
    )
    mask = jnp.ones((6, 1), bool)
    args = (ratio, advantages, mask)
    np.testing.assert_allclose(
        sequence_surrogate(*args, clip_range_ratio=0.2), clipped_surrogate(*args, clip_range_ratio=0.2), rtol=1e-5
    )


# --- all of them


@pytest.mark.parametrize("algorithm", ["p3o", "p3o_separate", "ppo"])
def test_p3o_is_invariant_to_a_constant_that_depends_on_the_prompt_and_ppo_is_not(algorithm):
    world, rollout = make_world(algorithm, num_responses=2 if algorithm != "ppo" else 1), repeated()
    constant = jnp.repeat(jnp.array([8.0, -3.0, 1.0, 0.0]), 2)  # one for each prompt

    @jax.jit
    def train(extra):
        def shape(scores, weight):
            return scores | {"reward": scores["reward"] + extra}

        record = dataclasses.replace(world.algorithm, shape=shape)
        return learn(world.networks, record, world.hp, world.state, world.frozen, rollout, None, KEY)[0].actor.params

    plain, shifted = train(0.0 * constant), train(constant)
    gap = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (plain, shifted)), strict=True))
    assert gap > 1e-3 if algorithm == "ppo" else gap < 1e-5


def test_pairs_stay_together_in_minibatches_and_microbatches():
    rollout = repeated(16)
    whole, _ = run_learn(make_world("p3o_lag", num_responses=2), rollout)
    cut, _ = run_learn(make_world("p3o_lag", num_responses=2, microbatches=4), rollout)
    chex.assert_trees_all_close(whole.actor.params, cut.actor.params, atol=1e-6)
    batch = {"x": jnp.arange(8), "y": jnp.arange(16).reshape(8, 2)}
    paired = in_pairs(ALGORITHMS["p3o"], batch)
    assert paired["x"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    chex.assert_trees_all_equal(in_rows(ALGORITHMS["p3o"], paired), batch)
    assert in_pairs(ALGORITHMS["ppo"], batch) is batch


@pytest.mark.parametrize("algorithm", ["p3o_lag", "p3o_separate_lag"])
def test_pairwise_form_with_zero_multiplier_has_the_advantages_of_the_reward(algorithm):
    world, record = make_world(algorithm, num_responses=2), scored(repeated())
    experience, _ = estimate_advantages(world.algorithm, world.hp, world.state, record)
    zero, one = ({"cost": jnp.full((ROWS, 1), x)} for x in (0.0, 1.0))
    advantages = experience.advantages
    np.testing.assert_array_equal(world.algorithm.combine(advantages, zero), advantages["reward"])
    np.testing.assert_allclose(
        world.algorithm.combine(advantages, one), advantages["reward"] - advantages["cost"], rtol=1e-5, atol=1e-6
    )


# --- a whole iteration


@pytest.mark.parametrize("algorithm", ["grpo_lag", "p3o_lag"])
def test_critic_free_iteration_runs_from_prompts_and_compiles_once(algorithm):
    world = make_world(algorithm, num_responses=CRITIC_FREE[algorithm], minibatches=2)
    step = jax.jit(make_step(world.networks, world.algorithm, world.hp))
    state, prompts = fresh(world.state), make_prompts(4)
    with compilations() as first:
        state, _ = step(state, world.frozen, prompts, KEY)
    with compilations() as again:
        state, metrics = step(state, world.frozen, prompts, KEY)
    assert first
    assert not again
    assert int(state.step) == 2
    assert state.critics == {}
    assert not [name for name in metrics if "critic" in name or "value" in name]
    assert float(metrics["train/multiplier"]) != 1.0
    assert float(metrics["train/first_ratio_gap"]) == 0.0
