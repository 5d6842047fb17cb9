import math
from collections import deque

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.lagrange import (
    ascend_log_multiplier,
    init_multiplier,
    init_window,
    lagrangian_advantage,
    push_costs,
    share_above_zero,
    window_mean,
)
from safe_rlhf_jax.rl.step import Hyperparameters, update_multiplier

SHAPE = {"prompt_length": 5, "response_length": 6, "eos_id": 2, "pad_id": 0}


def ascend(multiplier, mean_cost, *, limit=0.0, lr=0.1, cap=None):
    log = init_multiplier(multiplier).log_multiplier
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


def test_multiplier_stays_above_its_floor():
    hp = Hyperparameters(**SHAPE, min_multiplier=0.3)
    moved = update_multiplier(hp, init_multiplier(0.5), jnp.float32(-100.0), jnp.int32(0))
    np.testing.assert_allclose(jnp.exp(moved.log_multiplier), 0.3, rtol=1e-6)
    free = update_multiplier(Hyperparameters(**SHAPE), init_multiplier(0.5), jnp.float32(-100.0), jnp.int32(0))
    assert float(jnp.exp(free.log_multiplier)) < 0.3


def test_multiplier_waits_for_its_delay():
    hp, start = Hyperparameters(**SHAPE, multiplier_delay=3), init_multiplier(0.5)
    logs = [float(update_multiplier(hp, start, jnp.float32(1.0), jnp.int32(i)).log_multiplier) for i in range(5)]
    initial = float(start.log_multiplier)
    assert logs[:3] == [initial] * 3
    assert logs[3] > initial
    assert logs[4] > initial


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
    np.testing.assert_array_equal(ALGORITHMS["ppo_lag"].combine(advantages, zero), reward)
    np.testing.assert_array_equal(ALGORITHMS["ppo"].combine({"reward": reward}, zero + 5.0), reward)
    assert np.any(ALGORITHMS["ppo_lag"].combine(advantages, zero + 1.0) != reward)


def test_lagrangian_advantage_takes_one_multiplier_per_sequence():
    reward, cost = jnp.full((2, 3), 4.0), jnp.full((2, 3), 1.0)
    combined = lagrangian_advantage(reward, cost, jnp.array([[0.0], [3.0]]))
    np.testing.assert_array_equal(combined, [[4.0] * 3, [(4.0 - 3.0) / 4.0] * 3])


def test_share_above_zero_is_that_of_the_counted_and_strict():
    costs, counted = jnp.array([1.0, 0.0, -1.0, 5.0]), jnp.array([True, True, True, False])
    np.testing.assert_allclose(share_above_zero(costs, counted), 1 / 3, rtol=1e-6)
    assert float(share_above_zero(costs, jnp.zeros(4, bool))) == 0.0
