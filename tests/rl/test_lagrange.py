import math
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.constraints import Constraint, init_constraint, move_multiplier, push_all
from safe_rlhf_jax.rl.lagrange import (
    LOG,
    PROJECTED,
    ascend_log_multiplier,
    combine_signals,
    init_window,
    lagrangian_advantage,
    pid_multiplier,
    push_costs,
    share_above_zero,
    t_quantiles,
    window_half_width,
    window_mean,
    window_quantile,
)


def ascend(multiplier, mean_cost, *, limit=0.0, lr=0.1, cap=None):
    log = jnp.log(jnp.float32(multiplier))
    new = ascend_log_multiplier(log, jnp.float32(mean_cost), cost_limit=limit, lr=lr, max_multiplier=cap)
    return math.exp(float(new))


@pytest.mark.parametrize("limit", [-1.0, 0.0, 2.0])
def test_multiplier_rises_when_cost_exceeds_limit(limit):
    assert ascend(0.5, limit + 1, limit=limit) > 0.5
    assert ascend(0.5, limit - 1, limit=limit) < 0.5
    np.testing.assert_allclose(ascend(0.5, limit, limit=limit), 0.5, rtol=1e-6)


def test_multiplier_step_equals_the_formula():
    np.testing.assert_allclose(ascend(2.0, 3.0, limit=1.0, lr=0.1), 2.0 * math.exp(0.1 * 2.0 * 2.0), rtol=1e-6)


def test_multiplier_is_capped():
    np.testing.assert_allclose(ascend(4.0, 100.0, cap=5.0), 5.0, rtol=1e-6)
    assert ascend(4.0, 100.0, cap=None) > 5.0
    assert ascend(4.0, -1.0, cap=5.0) < 4.0


def moves(multiplier, costs, *, initial=0.5, **settings):
    """λ after each of several mean costs, d = 0."""
    limits = {"cost_limit": jnp.zeros(1), "lr": 0.1, "max_multiplier": None, "min_multiplier": 0.0} | settings
    state, out = multiplier.init(jnp.array([initial], jnp.float32)), []
    for cost in costs:
        state = multiplier.move(state, jnp.array([cost], jnp.float32), **limits)
        out.append(float(multiplier.read(state)[0]))
    return np.array(out)


COSTS = [1.0, 2.0, -3.0, -7.0, 0.5, 3.0, 0.0, -0.5]


@pytest.mark.parametrize(
    "multiplier", [LOG, PROJECTED, pid_multiplier(proportional=1, derivative=1, smoothing=0.5, delay=2)]
)
def test_multiplier_stays_between_its_bounds(multiplier):
    bounded = moves(multiplier, [-100.0] * 2 + [100.0] * 3, min_multiplier=0.3, max_multiplier=5.0)
    np.testing.assert_allclose(bounded[[1, -1]], [0.3, 5.0], rtol=1e-6)
    assert moves(multiplier, [-100.0])[0] < 0.3


def test_projected_ascent_equals_the_formula():
    expected, value = [], 0.5
    for cost in COSTS:
        value = max(value + 0.1 * cost, 0.0)
        expected.append(value)
    np.testing.assert_allclose(moves(PROJECTED, COSTS), expected, rtol=1e-6, atol=1e-7)
    assert 0.0 in expected  # the projection was needed


def test_pid_with_the_integral_only_equals_projected_ascent():
    integral = pid_multiplier(proportional=0.0, derivative=0.0, smoothing=0.9, delay=3)
    np.testing.assert_array_equal(moves(integral, COSTS), moves(PROJECTED, COSTS))


def test_pid_equals_the_formula():
    gain_p, gain_d, smooth, delay = 0.3, 0.2, 0.6, 2
    pid = pid_multiplier(proportional=gain_p, derivative=gain_d, smoothing=smooth, delay=delay)
    integral, error, smoothed, expected = 0.5, COSTS[0], [COSTS[0]] * (delay + 1), []
    for i, cost in enumerate(COSTS):
        integral = max(integral + 0.1 * cost, 0.0)
        if i:
            error = smooth * error + (1 - smooth) * cost
            smoothed.append(smooth * smoothed[-1] + (1 - smooth) * cost)
        else:
            smoothed.append(cost)
        slope = max(smoothed[-1] - smoothed[-1 - delay], 0.0)
        expected.append(max(integral + gain_p * error + gain_d * slope, 0.0))
    np.testing.assert_allclose(moves(pid, COSTS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.5])
def test_half_width_of_a_window_is_that_of_students_one_sided_interval(delta):
    costs = np.random.default_rng(1).normal(2.0, 3.0, size=24).astype(np.float32)
    window, width = init_window(16), jax.jit(window_half_width)
    quantiles = jnp.asarray(t_quantiles(delta, 16))
    for i, cost in enumerate(costs, start=1):
        window = push_costs(window, jnp.full(1, cost), jnp.ones(1, bool))
        newest = costs[max(0, i - 16) : i].astype(np.float64)
        low, high = stats.ttest_1samp(newest, 0.0).confidence_interval(1 - 2 * delta) if i > 1 else (0.0, 0.0)
        np.testing.assert_allclose(width(window, quantiles), (high - low) / 2, rtol=2e-5, atol=1e-6)


def test_upper_bound_of_a_window_of_normal_costs_covers_their_mean_as_often_as_stated():
    costs = np.random.default_rng(0).normal(1.0, 2.0, size=(20_000, 12)).astype(np.float32)
    quantiles = jnp.asarray(t_quantiles(0.1, 12))

    def bound(costs):
        window = push_costs(init_window(12), costs, jnp.ones(12, bool))
        return window_mean(window) + window_half_width(window, quantiles)

    missed = float((jax.jit(jax.vmap(bound))(jnp.asarray(costs)) < 1.0).mean())
    assert abs(missed - 0.1) < 4 * math.sqrt(0.1 * 0.9 / len(costs))


# --- constraints with a state


def moved(constraint, state, costs, groups, step=0):
    group = jnp.asarray(groups, jnp.int32)
    state = push_all(constraint, state, jnp.asarray(costs, jnp.float32), group)
    return move_multiplier(constraint, state, group, jnp.int32(step))


def test_multiplier_waits_for_its_delay():
    constraint = Constraint(delay=3)
    start = init_constraint(constraint, multiplier=0.5, window=4)
    logs = [float(moved(constraint, start, [1.0], [0], step).multiplier["log"][0]) for step in range(5)]
    assert logs[:3] == [float(start.multiplier["log"][0])] * 3
    assert min(logs[3:]) > logs[0]


@pytest.mark.parametrize(
    "multiplier", [LOG, PROJECTED, pid_multiplier(proportional=0.1, derivative=0.1, smoothing=0.5, delay=2)]
)
def test_one_group_with_a_multiplier_of_its_own_equals_a_plain_multiplier(multiplier):
    plain = Constraint(multiplier=multiplier, limit=(0.3,))
    own = Constraint(multiplier=multiplier, limit=(0.3,), slots=(0,), names=("only",))
    states = [init_constraint(c, multiplier=0.7, window=6) for c in (plain, own)]
    for i in range(3):
        states = [moved(c, s, [1.0 + i, -2.0, 0.5], [0, 0, 0]) for c, s in zip((plain, own), states, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_groups_move_by_their_own_costs_and_limits_and_keep_their_multiplier_while_unseen():
    constraint = Constraint(limit=(0.0, 10.0), slots=(-1, 0, 1), names=("a", "b"))
    state = init_constraint(constraint, multiplier=1.0, window=4)
    state = moved(constraint, state, [5.0, 1.0, 3.0, 7.0], [0, 1, 1, 2])
    np.testing.assert_allclose(np.exp(state.multiplier["log"]), np.exp([0.1 * 2.0, 0.1 * (7.0 - 10.0)]), rtol=1e-5)
    later = moved(constraint, state, [4.0, 9.0], [1, 0])  # nothing of group b, and its window still says 7
    assert float(later.multiplier["log"][1]) == float(state.multiplier["log"][1])
    assert float(later.multiplier["log"][0]) > float(state.multiplier["log"][0])
    assert later.window.count.tolist() == [3, 1]


@settings(max_examples=40)
@given(
    st.sampled_from([1, 3, 8]),
    st.lists(st.lists(st.tuples(st.floats(-9, 9, width=32), st.booleans()), min_size=4, max_size=4), max_size=5),
)
def test_window_equals_a_deque_of_the_costs_that_count(size, batches):
    window, expected = init_window(size), deque(maxlen=size)
    for batch in batches:
        costs, counted = map(np.array, zip(*batch, strict=True))
        window = push_costs(window, jnp.asarray(costs, jnp.float32), jnp.asarray(counted))
        expected.extend(float(np.float32(c)) for c, ok in batch if ok)
    assert int(window.count) == len(expected)
    assert np.asarray(window.recent)[size - len(expected) :].tolist() == list(expected)
    np.testing.assert_allclose(window_mean(window), np.mean(expected) if expected else 0.0, rtol=1e-5, atol=1e-5)


def test_window_mean_before_the_window_is_full_is_that_of_the_entries():
    window = push_costs(init_window(100), jnp.array([1.0, 2.0, 99.0]), jnp.array([True, True, False]))
    assert float(window_mean(window)) == 1.5
    assert float(window_mean(init_window(4))) == 0.0


def test_lagrangian_advantage_with_zero_multiplier_equals_ppo():
    rng = np.random.default_rng(0)
    reward, cost = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    advantages = {"reward": reward, "cost": cost}
    zero = jnp.zeros((3, 1))
    np.testing.assert_array_equal(ALGORITHMS["ppo_lag"].combine(advantages, {"cost": zero}), reward)
    np.testing.assert_array_equal(ALGORITHMS["ppo"].combine({"reward": reward}, {}), reward)
    assert np.any(ALGORITHMS["ppo_lag"].combine(advantages, {"cost": zero + 1.0}) != reward)


def test_equal_constraints_equal_one_with_the_multiplier_split():
    rng = np.random.default_rng(0)
    reward, cost = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    names = ("cost/a", "cost/b", "cost/c")
    split = combine_signals({"reward": reward} | dict.fromkeys(names, cost), dict.fromkeys(names, jnp.float32(0.5)))
    np.testing.assert_allclose(split, lagrangian_advantage(reward, cost, 1.5), rtol=1e-6)


def test_lagrangian_advantage_takes_one_multiplier_per_sequence():
    reward, cost = jnp.full((2, 3), 4.0), jnp.full((2, 3), 1.0)
    combined = lagrangian_advantage(reward, cost, jnp.array([[0.0], [3.0]]))
    np.testing.assert_array_equal(combined, [[4.0] * 3, [(4.0 - 3.0) / 4.0] * 3])


def test_share_above_zero_is_that_of_the_counted_and_strict():
    costs, counted = jnp.array([1.0, 0.0, -1.0, 5.0]), jnp.array([True, True, True, False])
    np.testing.assert_allclose(share_above_zero(costs, counted), 1 / 3, rtol=1e-6)
    assert float(share_above_zero(costs, jnp.zeros(4, bool))) == 0.0


@settings(max_examples=40)
@given(st.lists(st.floats(-9, 9, width=32), max_size=8), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_window_quantile_is_the_least_cost_that_enough_costs_do_not_exceed(costs, alpha):
    window = push_costs(init_window(8), jnp.asarray(costs, jnp.float32), jnp.ones(len(costs), bool))
    quantile = float(window_quantile(window, alpha))
    if not costs:
        assert quantile == 0.0
        return
    ordered = np.sort(np.float32(costs))
    enough = [c for c in ordered if np.mean(ordered <= c) >= np.float32(alpha)]
    assert quantile == enough[0]
