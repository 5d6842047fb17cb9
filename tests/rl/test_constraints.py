"""What a constraint measures, and several of them together."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from safe_rlhf_jax.rl.constraints import (
    MEAN,
    Constraint,
    by_group,
    init_constraint,
    mean_costs,
    measured_costs,
    pessimistic_costs,
    push_all,
    rectified,
    row_multipliers,
    tail,
)
from safe_rlhf_jax.rl.lagrange import LOG, PROJECTED, pid_multiplier
from tests.rl.test_step import KEY, run_learn, trained
from tests.rl.world import ROWS, make_rollout, make_world

COSTS = np.random.default_rng(0).normal(size=32).astype(np.float32)
GROUP = jnp.zeros(32, jnp.int32)


def measured(measure, costs=COSTS, window=32):
    """J_C, and what every row counts as."""
    constraint = Constraint(measure=measure)
    state = push_all(constraint, init_constraint(constraint, multiplier=1.0, window=window), jnp.asarray(costs), GROUP)
    return float(mean_costs(constraint, state)[0]), np.asarray(
        measured_costs(constraint, state, jnp.asarray(costs), GROUP)
    )


def test_cvar_at_zero_equals_the_mean():
    mean, rows = measured(tail(0.0))
    np.testing.assert_allclose(mean, measured(MEAN)[0], rtol=1e-5)
    np.testing.assert_allclose(rows, COSTS, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_cvar_is_the_mean_of_the_worst_costs(alpha):
    mean, rows = measured(tail(alpha))
    worst = np.sort(COSTS)[int(alpha * 32) :]
    np.testing.assert_allclose(mean, worst.mean(), rtol=1e-5)
    np.testing.assert_allclose(rows.mean(), worst.mean(), rtol=1e-5)
    assert len(set(rows[worst[0] > COSTS])) == 1, "below the quantile all costs count alike"


def test_rectified_cost_lets_no_response_pay_for_another():
    mean, rows = measured(rectified(0.5))
    np.testing.assert_allclose(rows, np.maximum(COSTS - 0.5, 0.0), rtol=1e-6)
    np.testing.assert_allclose(mean, rows.mean(), rtol=1e-5)
    lower = np.where(COSTS < 0, COSTS - 100.0, COSTS)  # very negative costs change nothing
    np.testing.assert_allclose(measured(rectified(0.5), lower)[0], mean, rtol=1e-6)
    assert measured(MEAN, lower)[0] < measured(MEAN)[0] - 10.0


@pytest.mark.parametrize(
    "multiplier", [LOG, PROJECTED, pid_multiplier(proportional=1, derivative=1, smoothing=0.5, delay=2)]
)
def test_no_two_arrays_of_a_state_share_a_buffer(multiplier):
    """The state is donated, and a buffer can be donated once."""
    leaves = jax.tree.leaves(init_constraint(Constraint(multiplier=multiplier), multiplier=1.0, window=4))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_rows_take_the_multiplier_of_their_group():
    constraint = Constraint(limit=(0.0, 0.0), slots=(1, -1, 0), names=("a", "b"))
    state = init_constraint(constraint, multiplier=1.0, window=2)
    state = state.replace(multiplier={"log": jnp.log(jnp.array([2.0, 3.0]))})
    rows = row_multipliers({"cost": constraint}, {"cost": state}, jnp.array([0, 1, 2]))
    np.testing.assert_allclose(rows["cost"], [[3.0], [0.0], [2.0]], rtol=1e-6)


def test_slots_of_named_groups():
    groups = ("benign", "risky", "sensitive")
    assert by_group(groups, None, separate=False) is None
    assert by_group(groups, ("risky", "sensitive"), separate=False) == (-1, 0, 0)
    assert by_group(groups, ("sensitive", "benign"), separate=True) == (1, -1, 0)


def test_pessimistic_cost_of_each_slot_is_the_upper_bound_of_what_its_constraint_measures():
    constraint = Constraint(measure=rectified(0.5), limit=(0.0, 0.0), slots=(0, 1), names=("a", "b"), delta=0.1)
    costs, group = jnp.asarray(COSTS), jnp.arange(32) % 2
    state = push_all(constraint, init_constraint(constraint, multiplier=1.0, window=64), costs, group)
    for slot, bound in enumerate(pessimistic_costs(constraint, state)):
        excess = np.maximum(COSTS[slot::2].astype(np.float64) - 0.5, 0.0)
        expected = stats.ttest_1samp(excess, 0.0).confidence_interval(0.8).high  # two-sided: a tail of 0.1 on each side
        np.testing.assert_allclose(bound, expected, rtol=1e-5)


def test_without_delta_the_multiplier_reads_the_mean_by_the_same_operations():
    constraint, pessimistic = Constraint(), Constraint(delta=0.05)
    state = init_constraint(constraint, multiplier=1.0, window=8)
    programs = [str(jax.make_jaxpr(functools.partial(mean_costs, one))(state)) for one in (constraint, pessimistic)]
    assert str(jax.make_jaxpr(functools.partial(pessimistic_costs, constraint))(state)) == programs[0] == programs[1]
    assert str(jax.make_jaxpr(functools.partial(pessimistic_costs, pessimistic))(state)) != programs[0]


# --- through the learner


@pytest.mark.parametrize("every", ["rollout", "minibatch"])
def test_pessimistic_limit_holds_the_upper_bound_of_the_window_against_the_limit(every):
    mean, plain = run_learn(make_world(constraint={"every": every}))
    bound, metrics = run_learn(make_world(constraint={"every": every, "delta": 0.05}))
    assert "train/cost_bound" not in plain
    assert metrics["train/cost_bound"] > metrics["train/mean_cost"] == plain["train/mean_cost"]
    assert metrics["train/multiplier"] > plain["train/multiplier"]
    # the bound at half the width above is the same step as a limit lowered by it
    width = float(metrics["train/cost_bound"] - metrics["train/mean_cost"])
    lowered, _ = run_learn(make_world(constraint={"every": every, "limit": (-width,)}))
    np.testing.assert_allclose(
        bound.constraints["cost"].multiplier["log"], lowered.constraints["cost"].multiplier["log"], rtol=1e-5
    )
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(trained(mean), trained(bound))


def test_each_of_several_constraints_has_its_own_critic_window_and_multiplier():
    world = make_world(costs=("cost/a", "cost/b"))
    state, metrics = run_learn(world)
    assert set(state.critics) == {"reward", "cost/a", "cost/b"}
    logs = {s: float(c.multiplier["log"][0]) for s, c in state.constraints.items()}
    assert logs["cost/a"] != logs["cost/b"]
    for name in ("a", "b"):
        costs = np.asarray(state.constraints[f"cost/{name}"].window.recent[0, -ROWS:])
        np.testing.assert_allclose(metrics[f"train/mean_cost/{name}"], costs.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics[f"train/multiplier/{name}"], np.exp(logs[f"cost/{name}"]), rtol=1e-5)
        assert f"train/unsafe_share/{name}" in metrics
        assert f"train/cost/{name}_critic_loss" in metrics


def test_equal_constraints_move_the_policy_as_one_with_the_multiplier_split():
    """Two copies of one cost model with λ = ½ each, and one with λ = 1: the same update."""
    held = {"lr": lambda _: 0.0}
    one = make_world(constraint=held, multiplier=1.0)
    two = make_world(constraint=held, multiplier=0.5, costs=("cost/a", "cost/b"))
    scorers = dict.fromkeys(("cost/a", "cost/b"), one.frozen.scorers["cost"])
    frozen = two.frozen.replace(scorers=scorers | {"reward": one.frozen.scorers["reward"]})
    critics = {name: one.state.critics["cost"] for name in scorers} | {"reward": one.state.critics["reward"]}
    rollout = make_rollout()
    a, _ = jax.jit(one.learn)(one.state, one.frozen, rollout, None, KEY)
    b, _ = jax.jit(two.learn)(two.state.replace(critics=critics), frozen, rollout, None, KEY)
    chex.assert_trees_all_close(a.actor.params, b.actor.params, atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(a.actor.params, one.state.actor.params, atol=1e-6)


def test_one_group_with_a_multiplier_of_its_own_trains_as_a_plain_constraint():
    rollout = make_rollout()
    rollout = rollout.replace(group=jnp.zeros_like(rollout.group))
    plain, _ = run_learn(make_world(), rollout)
    own, metrics = run_learn(make_world(constraint={"slots": (0,), "names": ("only",)}), rollout)
    chex.assert_trees_all_equal(trained(plain), trained(own))
    assert "train/multiplier/only" in metrics
