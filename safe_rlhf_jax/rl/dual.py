"""One-shot dual: the multiplier λ* at which the constrained optimum meets its limit, from samples of π_ref alone.

**Plain Lagrangian**, E[r] − λ(E[c] − d) − β·KL(π ‖ π_ref). For fixed λ its maximum is at π_λ ∝ π_ref·exp((r − λc)/β),
with value

    D(λ) = E_x[β·log E_{y~π_ref} exp((r − λ(c − d))/β)],    D′(λ) = d − E_{π_λ}[c],    D″(λ) = Var_{π_λ}(c)/β ≥ 0

(the variance within a prompt). So argmin_{λ ≥ 0} D is 0 where E_{π_0}[c] ≤ d, else the root of E_{π_λ}[c] = d, which is
unique as E_{π_λ}[c] falls. Source: Huang et al. 2024 (arXiv 2405.19544), MoCAN.

**Safe RLHF** has −βk in the rewards and +βk in the costs, k = log π − log π_ref: for fixed λ the policy maximises
E[r − λc] − (1 + λ)β·KL, so π_λ ∝ π_ref·exp((r − λc)/((1 + λ)β)). Its λ moves by J_C − d with J_C the mean of the costs
*without* their KL term, so it settles where E_{π_λ}[c] = d. (The minimum of that problem's own dual is where
E_{π_λ}[c] + β·KL = d; training does not converge there.) With u = λ/(1 + λ) the exponent is ((1 − u)r − uc)/β, hence

    d/du E_{π_λ}[c] = −Cov_{π_λ}(c, r + c)/β = −(Var(c) + Cov(c, r))/β,

which is negative if reward and cost are positively correlated (Cov ≥ 0), and the root is again unique.

In both, expectations are self-normalised sums over the n samples of a prompt: w_i ∝ exp(score_i), which are exact as
n → ∞. They are unreliable if β is small beside the spread of the scores: then one sample has all the weight
(`effective_sample_size` near 1), and λ* is that of best-of-n.
"""

import dataclasses
from typing import Any

import numpy as np

from safe_rlhf_jax.errors import UserError

Table = np.ndarray  # f[prompts, n]
HALVINGS = 60


def tilted_weights(rewards: Table, costs: Table, multiplier: float, *, kl_coeff: float, divided: bool) -> Table:
    """Weight of each sample of π_ref under π_λ, f64[prompts, n]; they sum to 1 in each row.

    Args:
        rewards: f[prompts, n].
        costs: f[prompts, n].
        multiplier: λ.
        kl_coeff: β.
        divided: Divide the score by 1 + λ, Safe RLHF's target; False: the plain Lagrangian's.
    """
    scale = kl_coeff * (1.0 + multiplier if divided else 1.0)
    score = (np.asarray(rewards, np.float64) - multiplier * np.asarray(costs, np.float64)) / scale
    weights = np.exp(score - score.max(axis=1, keepdims=True))
    normalised: Table = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def tilted_cost(rewards: Table, costs: Table, multiplier: float, **target: Any) -> float:
    """E_{π_λ}[c], the mean over prompts; arguments as in `tilted_weights`."""
    return float((tilted_weights(rewards, costs, multiplier, **target) * costs).sum(axis=1).mean())


def dual_value(rewards: Table, costs: Table, multiplier: float, *, cost_limit: float, kl_coeff: float) -> float:
    """D(λ) of the plain Lagrangian; arguments as in `tilted_weights`."""
    score = (np.asarray(rewards, np.float64) - multiplier * (np.asarray(costs, np.float64) - cost_limit)) / kl_coeff
    top = score.max(axis=1)
    return float(kl_coeff * (top + np.log(np.exp(score - top[:, None]).mean(axis=1))).mean())


def effective_sample_size(weights: Table) -> float:
    """1/Σw², from 1 (one sample has all the weight) to n, the mean over prompts."""
    return float((1.0 / np.square(weights).sum(axis=1)).mean())


@dataclasses.dataclass(frozen=True)
class DualSolution:
    """λ*, and the expectations at λ*."""

    multiplier: float
    expected_cost: float  # E_{π_λ*}[c]
    expected_reward: float
    effective_sample_size: float  # of the n samples of a prompt
    capped: bool  # λ* is larger than the bound


def solve_dual(
    rewards: Table,
    costs: Table,
    *,
    cost_limit: float,
    kl_coeff: float,
    divided: bool,
    max_multiplier: float,
) -> DualSolution:
    """Finds λ* with E_{π_λ*}[c] = d by bisection: 0 if the limit already holds, the bound if λ* is beyond it.

    Args:
        rewards: f[prompts, n] of samples of π_ref.
        costs: f[prompts, n] of the same samples.
        cost_limit: d.
        kl_coeff: β.
        divided: As in `tilted_weights`.
        max_multiplier: The bound.

    Raises:
        UserError: If no λ reaches the limit on these samples; names the reachable cost.
    """
    target: dict[str, Any] = {"kl_coeff": kl_coeff, "divided": divided}

    def excess(multiplier: float) -> float:
        return tilted_cost(rewards, costs, multiplier, **target) - cost_limit

    low, high, capped = 0.0, max_multiplier, False
    if excess(low) <= 0:
        high = low
    elif excess(high) > 0:
        # λ → ∞: with KL in both signals π_ref·exp(−c/β), else the least cost of each prompt.
        least = tilted_cost(-np.asarray(costs), costs, 0.0, **target)
        least = least if divided else float(np.min(costs, axis=1).mean())
        if least > cost_limit:
            raise UserError(
                f"cost_limit {cost_limit:.3f} is below what the samples of the reference reach with any multiplier "
                f"({least:.3f}; their mean cost is {float(np.mean(costs)):.3f}). Raise cost_limit, or "
                "responses_per_prompt" + (", or lower kl_coeff" if divided else "")
            )
        low, capped = high, True
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    multiplier = (low + high) / 2
    weights = tilted_weights(rewards, costs, multiplier, **target)
    return DualSolution(
        multiplier=multiplier,
        expected_cost=float((weights * costs).sum(axis=1).mean()),
        expected_reward=float((weights * rewards).sum(axis=1).mean()),
        effective_sample_size=effective_sample_size(weights),
        capped=capped,
    )
