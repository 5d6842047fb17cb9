"""Algorithms: small records of pure functions over one shared learner.

Scoring, KL, windows, λ, epochs and minibatches are the same for all. `ppo` is `ppo_lag` without constraints.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safe_rlhf_jax.rl.advantages import group_normalized, leave_one_out
from safe_rlhf_jax.rl.lagrange import combine_plain, combine_signals
from safe_rlhf_jax.rl.losses import clipped_surrogate, pairwise_surrogate, sequence_surrogate
from safe_rlhf_jax.types import Signals


def as_scored(scores: Signals, cost_weight: float) -> Signals:
    """Returns the scores unchanged."""
    return scores


def shaped_reward(scores: Signals, cost_weight: float) -> Signals:
    """R − ν·C as the reward.

    Source: PKU-Alignment/safe-rlhf@82743cc `ppo_reward_shaping`: a constant ν, and no division by 1 + ν.
    """
    return scores | {"reward": scores["reward"] - cost_weight * scores["cost"]}


def feasible_reward(scores: Signals, cost_weight: float) -> Signals:
    """σ(R) where no cost is positive, else 0: the reward of an infeasible response does not count.

    Source: Xu et al. 2024 (CGPO, arXiv 2409.20370), the constrained calibrated reward of CRPG. There R is compared with
    the reward of a baseline response to the prompt, σ(R − R_0); prompts have none here, so that R_0 is 0.
    """
    costs = jnp.stack([score for signal, score in scores.items() if signal != "reward"])
    return scores | {"reward": jnp.where((costs <= 0).all(0), jax.nn.sigmoid(scores["reward"]), 0.0)}


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The parts in which on-policy algorithms differ."""

    constrained: bool = False  # costs have advantages and multipliers
    shape: Callable[[Signals, float], Signals] = as_scored  # (scores f32[B], ν) -> scores
    baseline: Callable[[Float[Array, "P n"]], Float[Array, "P n"]] | None = None  # None: critics and GAE
    combine: Callable[[Signals, Signals], Float[Array, "B T"]] = combine_signals  # (advantages, λ by signal)
    policy_loss: Callable[..., Float[Array, ""]] = clipped_surrogate
    paired: bool = False  # the loss compares the two responses to a prompt
    # Of the KL term in costs: +1 with `combine_signals`, whose division would weaken the one in the reward; else 0.
    cost_kl_sign: int = +1
    kl_as_loss: bool = False  # a KL term in the signals would be divided by their spread
    needs_cost: bool = False  # also without a constraint
    split: bool = False  # λ counts only on responses that violate their limit themselves


PAIRS = Algorithm(
    baseline=leave_one_out, combine=combine_plain, policy_loss=pairwise_surrogate, paired=True, cost_kl_sign=0
)

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(),
    "ppo_lag": Algorithm(constrained=True),
    "reward_shaping": Algorithm(shape=shaped_reward, needs_cost=True),
    "repo": Algorithm(constrained=True, split=True),
    "cgpo": Algorithm(shape=feasible_reward, baseline=leave_one_out, needs_cost=True),
    "rloo_lag": Algorithm(constrained=True, baseline=leave_one_out),
    "grpo_lag": Algorithm(constrained=True, baseline=group_normalized, kl_as_loss=True),
    "p3o": PAIRS,
    "p3o_lag": dataclasses.replace(PAIRS, constrained=True),
    "p3o_separate": dataclasses.replace(PAIRS, policy_loss=sequence_surrogate),
    "p3o_separate_lag": dataclasses.replace(PAIRS, policy_loss=sequence_surrogate, constrained=True),
}
