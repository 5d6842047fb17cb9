"""Optimal policies of constraints that are not about the mean cost, in the world of `worlds`."""

import dataclasses

import numpy as np

from safe_rlhf_jax.testing.worlds import (
    BETA,
    PROMPTS,
    Optimum,
    Table,
    World,
    bisect,
    combined_score,
    expectation,
    one_constraint,
    tilted,
    within_limit,
)

POWER = 4.0  # of the quantile-weighted cost: the expected worst of four responses


def unsafe_rate(world: World) -> Optimum:
    """Safe RLHF on 1[c > 0]: the limit is a share of responses."""
    return one_constraint(world, (world.costs[0] > 0).astype(float))


def reward_at_most(world: World) -> Optimum:
    """Safe RLHF with E[r] ≤ d beside the reward: π ∝ π_ref·exp((1 − λ)r/((1 + λ)β))."""
    ends = [world.reference, tilted(world.reference, world.reward / BETA)]
    return within_limit(world, world.reward, float(np.mean([expectation(end, world.reward) for end in ends])))


def cost_at_least(world: World) -> Optimum:
    """Safe RLHF with E[c] ≥ d: π ∝ π_ref·exp((r + λc)/((1 + λ)β))."""
    optimum = one_constraint(world, -world.costs[0])
    return dataclasses.replace(optimum, limits=-optimum.limits)


def feasible(world: World) -> Optimum:
    """CGPO with KL in the reward: π ∝ π_ref·exp(σ(r)·1[c ≤ 0]/β)."""
    reward = np.where(world.costs[0] <= 0, 1.0 / (1.0 + np.exp(-world.reward)), 0.0)
    return Optimum(np.zeros((0, 1)), np.zeros((0, 1)), tilted(world.reference, reward / BETA))


def weighted_quantiles(policy: Table, cost: Table) -> tuple[float, Table]:
    """∫ F⁻¹(u)·k·u^{k−1} du over all prompts, and what each response counts as: ∫ k·F^{k−1} up to its cost."""
    order = np.argsort(cost, axis=None)
    ascending, mass = cost.ravel()[order], np.cumsum(policy.ravel()[order]) / PROMPTS
    value = float((ascending * np.diff(mass**POWER, prepend=0.0)).sum())
    counted = np.empty(cost.size)
    counted[order] = np.concatenate([[0.0], np.cumsum(POWER * mass[:-1] ** (POWER - 1.0) * np.diff(ascending))])
    return value, counted.reshape(cost.shape)


def worst_of_several(world: World) -> Optimum:
    """Quantile-weighted cost ≤ d: Safe RLHF on its influence function under the policy itself: a fixed point."""
    cost = world.costs[0]
    ends = [tilted(world.reference, x / BETA) for x in (world.reward, -cost)]
    limit = float(np.mean([weighted_quantiles(end, cost)[0] for end in ends]))

    def policy(multiplier: float) -> Table:
        out = world.reference
        for _ in range(100):
            counted = weighted_quantiles(out, cost)[1]
            new = tilted(world.reference, combined_score(world, counted, multiplier, divided=True))
            out = np.sqrt(out * new)
            out /= out.sum(1, keepdims=True)
        return out

    multiplier = bisect(lambda x: weighted_quantiles(policy(x), cost)[0] - limit, high=20.0)
    return Optimum(np.array([[limit]]), np.array([[multiplier]]), policy(multiplier))
