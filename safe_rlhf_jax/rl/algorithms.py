"""Algorithms: small records of pure functions over one shared learner.

`ppo_lag` maximises reward subject to E[cost] ≤ d; `ppo` only maximises reward (λ ≡ 0, one critic).
"""

import dataclasses
from collections.abc import Callable

import jax

from safe_rlhf_jax.rl.lagrange import lagrangian_advantage
from safe_rlhf_jax.rl.losses import clipped_surrogate
from safe_rlhf_jax.types import Signals

# The KL term enters each signal with the sign that keeps the policy near the reference.
KL_SIGN = {"reward": -1, "cost": +1}


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What distinguishes one on-policy algorithm from another."""

    signals: tuple[str, ...]  # those that have a critic and an advantage
    constrained: bool  # a cost window and a multiplier exist, and the multiplier is learned
    combine: Callable[[Signals, jax.Array], jax.Array]  # (advantages, λ f32[B, 1]) -> f32[B, T]
    policy_loss: Callable[..., jax.Array] = clipped_surrogate


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(signals=("reward",), constrained=False, combine=lambda advantages, _: advantages["reward"]),
    "ppo_lag": Algorithm(
        signals=("reward", "cost"),
        constrained=True,
        combine=lambda advantages, multiplier: lagrangian_advantage(
            advantages["reward"], advantages["cost"], multiplier
        ),
    ),
}
