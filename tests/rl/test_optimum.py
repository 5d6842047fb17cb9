"""The learner ends where the constrained problem's exact solution says, and planted faults keep it from there.

The full table, with every algorithm and five seeds: benchmarks/constrained_optimum.py.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.constrained_optimum import tables
from safe_rlhf_jax.models import layers
from safe_rlhf_jax.models.adapters import on
from safe_rlhf_jax.optim import make_optimizer
from safe_rlhf_jax.testing.faults import FAULTS, run_fault
from safe_rlhf_jax.testing.optimum import CASES, compare, run_case, train, within
from safe_rlhf_jax.testing.worlds import (
    BASE,
    TablePolicy,
    divergence,
    expectation,
    make_world,
    mean_cost,
    plain_lagrangian,
    probabilities,
    tilted,
    without_future_kl,
)

ROOT = Path(__file__).parent.parent.parent
SEEDS = range(2)


@pytest.mark.parametrize("name", ["ppo_lag", "p3o_lag"])
def test_learner_reaches_the_known_optimum(name):
    for result in run_case(CASES[name], SEEDS):
        assert result["within"], (name, result)


@pytest.mark.parametrize("name", ["ppo_lag, weighted quantiles", "ppo_lag, exact penalty", "cgpo"])
def test_limits_of_other_quantities_are_near_their_known_optimum_in_a_quarter_of_the_report(name):
    (result,) = run_case(CASES[name], range(1), iterations=200)
    assert result["regret"] < 0.05, (name, result)
    assert result.get("violation", 0.0) < 0.05, (name, result)


def test_a_penalty_below_the_multiplier_of_the_optimum_does_not_hold_the_limit():
    case = dataclasses.replace(CASES["ppo_lag, exact penalty"], starts=(0.1,))
    (result,) = run_case(case, range(1), iterations=200)
    assert result["cost"]["reached"] > result["limit"][0] + 0.1


def test_adapters_reach_the_known_optimum():
    """In half of the report's iterations, at twice its learning rate."""
    case = dataclasses.replace(CASES["ppo_lag, MLP policy with adapters"], lr=0.04, regret=0.02)
    (result,) = run_case(case, range(1), iterations=400)
    assert result["within"], result


def path(case, iterations):
    """λ and the cost of a run by iteration, and its final policy."""
    world = make_world(0, case.policy())
    params, multipliers, costs = train(case, [(world, mean_cost(world), 1.0, 0)], iterations)
    policy = on(case.policy(), {BASE: world.ref_params})
    final = probabilities(policy, jax.tree.map(lambda x: x[0], params))
    return np.ravel(multipliers), np.ravel(costs), final, world


def test_a_rank_as_large_as_the_matrices_with_a_fixed_a_is_full_fine_tuning(monkeypatch):
    """With A the identity, x·W + (x·A)·B is x·(W + B): B's updates are those of W, and not one sample differs."""

    def fixed(*args, **kwargs):
        labels = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key)
        optimizer = make_optimizer(*args, **kwargs)
        return optax.multi_transform({"lora_a": optax.set_to_zero(), "lora_b": optimizer, "table": optimizer}, labels)

    whole = CASES["ppo_lag, MLP policy"]
    multipliers, costs, policy, world = path(whole, 60)
    monkeypatch.setattr(layers, "lora_a_init", lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype))
    monkeypatch.setattr("safe_rlhf_jax.testing.optimum.make_optimizer", fixed)
    adapters = dataclasses.replace(CASES["ppo_lag, MLP policy with adapters of full rank"], lr=whole.lr)
    ours = path(adapters, 60)
    np.testing.assert_allclose(ours[0], multipliers, rtol=1e-3)
    np.testing.assert_allclose(ours[1], costs, atol=5e-3)  # the cost of one response in 512
    assert divergence(ours[2], policy) < 1e-5 * divergence(world.reference, policy)
    assert np.ptp(multipliers) > 1
    assert np.ptp(costs) > 0.3


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_keeps_the_learner_from_the_optimum(name):
    for result in run_fault(name, SEEDS, iterations=400):
        assert result["regret"] > 5 * CASES["ppo_lag"].regret, (name, result)


def test_tables_of_the_results_are_those_of_the_committed_report_and_all_runs_are_within_their_bounds():
    report = json.loads((ROOT / "benchmarks/results/constrained_optimum.json").read_text())
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert page.split("<!-- constrained-optimum -->\n")[1].split("<!-- /constrained-optimum -->")[0] == tables(report)
    assert set(report["cases"]) == set(CASES)
    assert set(report["faults"]) == set(FAULTS)
    assert all(run["within"] for entry in report["cases"].values() for run in entry["runs"])
    assert not any(run["within"] for entry in report["faults"].values() for run in entry["runs"])


# --- the exact solutions themselves


@pytest.fixture(scope="module")
def world():
    return make_world(0, TablePolicy())


def test_world_is_in_conflict_and_its_limit_binds(world):
    correlation = np.corrcoef(world.reward.ravel(), world.costs[0].ravel())[0, 1]
    assert 0.4 < correlation < 0.6
    optimum = mean_cost(world)
    np.testing.assert_allclose(expectation(optimum.policy, world.costs[0]), optimum.limits[0, 0], atol=1e-9)
    assert optimum.multipliers[0, 0] > 0.3


def test_no_nearby_policy_within_the_limit_has_a_higher_objective(world):
    """The plain Lagrangian's optimum, against random policies mixed in and brought back to the limit."""
    optimum, rng = plain_lagrangian(world), np.random.default_rng(0)

    def objective(policy):
        return expectation(policy, world.reward) - 0.5 * divergence(policy, world.reference)

    safest = tilted(world.reference, -10.0 * world.costs[0])
    limit = optimum.limits[0, 0]
    for _ in range(20):
        policy = tilted(optimum.policy, 0.3 * rng.normal(size=world.reward.shape))
        cost, low = expectation(policy, world.costs[0]), expectation(safest, world.costs[0])
        share = max((cost - limit) / (cost - low), 0.0)
        policy = (1 - share) * policy + share * safest
        assert expectation(policy, world.costs[0]) <= limit + 1e-9
        assert objective(policy) < objective(optimum.policy)


def test_fixed_point_of_a_token_kl_loss_has_no_gradient(world):
    """At every token π ∝ π_ref·exp(Q), with Q the mean score below it."""
    policy = without_future_kl(world.reference, world.reward).reshape(4, 6, 6, 6)
    reference, reward = world.reference.reshape(4, 6, 6, 6), world.reward.reshape(4, 6, 6, 6)
    first, ref_first = policy.sum((2, 3)), reference.sum((2, 3))
    value = (policy * reward).sum((2, 3)) / first
    slope = np.log(first / ref_first) - value
    np.testing.assert_allclose(slope, slope[:, :1] * np.ones((1, 6)), atol=1e-9)


def test_bounds_are_not_met_by_the_reference(world):
    case, optimum = CASES["ppo_lag"], mean_cost(world)
    history = np.full((1, 100, 1), optimum.multipliers[0, 0])
    result = compare(case, world, optimum, world.ref_params, history)
    np.testing.assert_allclose(result["regret"], 1.0, rtol=1e-4)
    assert not within(case, result)
    assert result["oscillation"] < 1e-9
