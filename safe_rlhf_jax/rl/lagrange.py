"""Step 7 of the line: the cost window and the Lagrange multiplier λ.

A constraint may have several windows and multipliers, one per group of prompts: their arrays then have a leading axis.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy import special

from safe_rlhf_jax.types import CostWindow, Signals

MultiplierState = dict[str, jax.Array]


def init_window(size: int) -> CostWindow:
    """Returns an empty window of `size` costs."""
    return CostWindow(recent=jnp.zeros((size,), jnp.float32), count=jnp.zeros((), jnp.int32))


def push_costs(window: CostWindow, costs: Float[Array, " B"], counted: Bool[Array, " B"]) -> CostWindow:
    """Appends the counted costs and drops the oldest.

    One window serves all devices: the reference keeps one per process and averages their means (REFERENCE Q5).

    Args:
        window: The newest W costs so far.
        costs: f32[B], one per sequence.
        counted: bool[B], sequences to which the constraint applies.

    Returns:
        The window; unchanged if nothing counts.
    """
    size = window.recent.shape[0]
    entries = jnp.concatenate([window.recent, costs])
    valid = jnp.concatenate([filled(window), counted])
    newest_last = jnp.argsort(valid, stable=True)[-size:]
    count = jnp.minimum(window.count + counted.sum(dtype=jnp.int32), size)
    return CostWindow(recent=entries[newest_last], count=count)


def filled(window: CostWindow) -> Bool[Array, " W"]:
    """Entries of a window that hold a cost, bool[W]."""
    size = window.recent.shape[0]
    return jnp.arange(size, dtype=jnp.int32) >= size - window.count


def window_mean(window: CostWindow) -> Float[Array, ""]:
    """J_C: mean of the costs in the window; 0 while it is empty."""
    return jnp.where(filled(window), window.recent, 0.0).sum() / jnp.maximum(window.count, 1)


def t_quantiles(delta: float, size: int) -> Float[np.ndarray, " W1"]:
    """Returns t_{1−δ, n−1}, the quantiles of Student's t by the number n of costs, f32[W + 1]; 0 where n < 2.

    A table, because the quantile has no jit-safe form.
    """
    n = np.arange(size + 1)
    return np.where(n < 2, 0.0, special.stdtrit(np.maximum(n - 1, 1), 1.0 - delta)).astype(np.float32)


def window_half_width(window: CostWindow, quantiles: Float[Array, " W1"]) -> Float[Array, ""]:
    """Half-width of the one-sided confidence interval of J_C: t_{1−δ, n−1}·s/√n of the n costs in the window.

    s² = Σ(C − J_C)²/(n − 1). It is 0 while the window holds fewer than two costs, whose spread says nothing.

    Source: Chittepu et al. 2025 (HC-RLHF, arXiv 2506.08266), whose λ ascends by J_C + half-width − d. Differences:
    theirs adds the half-width that a safety test of m prompts will have, and the gradient of s to the policy's costs;
    here the limit alone is pessimistic.

    Args:
        window: The newest W costs so far.
        quantiles: f32[W + 1], of `t_quantiles`.

    Returns:
        f32[], in cost-model units.
    """
    n = window.count
    deviations = jnp.where(filled(window), window.recent - window_mean(window), 0.0)
    variance = jnp.square(deviations).sum() / jnp.maximum(n - 1, 1)
    return quantiles[n] * jnp.sqrt(variance / jnp.maximum(n, 1))


def window_quantile(window: CostWindow, alpha: float) -> Float[Array, ""]:
    """The `alpha`-quantile: the smallest cost that a share `alpha` of them does not exceed; the minimum for 0."""
    size = window.recent.shape[0]
    ascending = jnp.sort(jnp.where(filled(window), window.recent, -jnp.inf))  # empty entries come first
    rank = jnp.maximum(jnp.ceil(alpha * window.count).astype(jnp.int32) - 1, 0)
    return jnp.where(window.count > 0, ascending[jnp.minimum(size - window.count + rank, size - 1)], 0.0)


def ascend_log_multiplier(
    log_multiplier: Float[Array, "*G"],
    mean_cost: Float[Array, "*G"],
    *,
    cost_limit: float | Float[Array, "*G"],
    lr: float | Float[Array, ""],
    max_multiplier: float | None,
) -> Float[Array, "*G"]:
    """One step of gradient ascent in log λ: log λ ← min(log λ + lr·λ·(J_C − d), log λ_max).

    Source: Dai et al. 2023 (arXiv 2310.12773) eq. 31, with d = −(their d).

    Args:
        log_multiplier: f32[], log λ; or one per group.
        mean_cost: f32[], J_C, in cost-model units.
        cost_limit: d; the constraint is J_C ≤ d.
        lr: Step size.
        max_multiplier: λ_max, or None.

    Returns:
        f32[], the new log λ.
    """
    ascended = log_multiplier + lr * jnp.exp(log_multiplier) * (mean_cost - cost_limit)
    return ascended if max_multiplier is None else jnp.minimum(ascended, math.log(max_multiplier))


def ascend_multiplier(
    multiplier: Float[Array, "*G"],
    mean_cost: Float[Array, "*G"],
    *,
    cost_limit: float | Float[Array, "*G"],
    lr: float | Float[Array, ""],
    max_multiplier: float | None,
) -> Float[Array, "*G"]:
    """One step of projected gradient ascent in λ: λ ← min([λ + lr·(J_C − d)]⁺, λ_max). Arguments as above."""
    ascended = jnp.maximum(multiplier + lr * (mean_cost - cost_limit), 0.0)
    return ascended if max_multiplier is None else jnp.minimum(ascended, max_multiplier)


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """Representation and update rule of λ; the state is a dictionary of arrays with a leading group axis."""

    init: Callable[[Float[Array, " G"]], MultiplierState]  # λ at the start -> state
    # (state, J_C, cost_limit=, lr=, max_multiplier=, min_multiplier=) -> state
    move: Callable[..., MultiplierState]
    read: Callable[[MultiplierState], Float[Array, " G"]]  # state -> λ


def move_log(state: MultiplierState, mean_cost: jax.Array, *, min_multiplier: float, **limits: Any) -> MultiplierState:
    """Ascent in log λ."""
    moved = ascend_log_multiplier(state["log"], mean_cost, **limits)
    return {"log": jnp.maximum(moved, jnp.log(jnp.float32(min_multiplier))) if min_multiplier else moved}


def move_projected(
    state: MultiplierState, mean_cost: jax.Array, *, min_multiplier: float, **limits: Any
) -> MultiplierState:
    """Projected ascent in λ."""
    return {"value": jnp.maximum(ascend_multiplier(state["value"], mean_cost, **limits), min_multiplier)}


LOG = Multiplier(
    init=lambda initial: {"log": jnp.log(initial)}, move=move_log, read=lambda state: jnp.exp(state["log"])
)
PROJECTED = Multiplier(init=lambda initial: {"value": initial}, move=move_projected, read=lambda state: state["value"])


def move_penalty(
    state: MultiplierState, mean_cost: jax.Array, *, cost_limit: float | jax.Array, **unused: Any
) -> MultiplierState:
    """The whole weight where the limit is exceeded, else 0."""
    del unused
    return state | {"value": jnp.where(mean_cost > cost_limit, state["weight"], 0.0)}


# −ν·[J_C − d]⁺ in place of a dual: its gradient is −ν·∇J_C where J_C > d and 0 elsewhere. The penalty is exact, and the
# optimum that of the constraint, if ν is larger than the λ of that optimum.
# Source: Pandit et al. 2025 (CS-RLHF, arXiv 2510.03520), with ν = λ there.
PENALTY = Multiplier(init=lambda initial: {"value": initial, "weight": initial}, move=move_penalty, read=PROJECTED.read)


def pid_multiplier(*, proportional: float, derivative: float, smoothing: float, delay: int) -> Multiplier:
    """λ = [K_p·P + I + K_d·D]⁺ of the error J_C − d; the integral I is projected ascent, so its gain K_i is `lr`.

        P ← αP + (1 − α)(J_C − d),   I ← min([I + K_i·(J_C − d)]⁺, λ_max),   D = [S − S `delay` moves ago]⁺,
        S ← αS + (1 − α)J_C

    P and S start at their first values, so that there is no false slope at the start.

    Source: Stooke et al. 2020 (arXiv 2007.03964) algorithm 2, smoothed as in omnisafe's `PIDLagrangian`.

    Args:
        proportional: K_p.
        derivative: K_d.
        smoothing: α of both averages.
        delay: Moves over which the slope is taken.
    """

    def init(initial: jax.Array) -> MultiplierState:
        zeros = jnp.zeros_like(initial)
        past = jnp.zeros((*initial.shape, delay), jnp.float32)
        return {"value": initial, "integral": initial, "error": zeros, "past": past, "moves": zeros}

    def move(state: MultiplierState, mean_cost: jax.Array, *, min_multiplier: float, **limits: Any) -> MultiplierState:
        started = state["moves"] > 0
        error = mean_cost - limits["cost_limit"]
        error = jnp.where(started, smoothing * state["error"] + (1.0 - smoothing) * error, error)
        past = jnp.where(started[..., None], state["past"], mean_cost[..., None])
        smoothed = smoothing * past[..., -1] + (1.0 - smoothing) * mean_cost
        slope = jnp.maximum(smoothed - past[..., 0], 0.0)
        integral = ascend_multiplier(state["integral"], mean_cost, **limits)
        value = jnp.clip(integral + proportional * error + derivative * slope, min_multiplier, limits["max_multiplier"])
        past = jnp.concatenate([past[..., 1:], smoothed[..., None]], axis=-1)
        moves = state["moves"] + 1.0
        return {"value": value, "integral": integral, "error": error, "past": past, "moves": moves}

    return Multiplier(init=init, move=move, read=PROJECTED.read)


def combine_signals(advantages: Signals, multipliers: Signals) -> Float[Array, "B T"]:
    """A = (A_r − Σ_k λ_k·A_k)/(1 + Σ_k λ_k); without constraints it is A_r.

    Args:
        advantages: f32[B, T] by signal.
        multipliers: λ_k ≥ 0 by cost signal, f32[B, 1] or scalars.

    Returns:
        f32[B, T].
    """
    costs = sum(multiplier * advantages[signal] for signal, multiplier in multipliers.items())
    return (advantages["reward"] - costs) / (1.0 + sum(multipliers.values()))


def combine_plain(advantages: Signals, multipliers: Signals) -> Float[Array, "B T"]:
    """A = A_r − Σ_k λ_k·A_k, the plain Lagrangian; arguments as above."""
    return advantages["reward"] - sum(multiplier * advantages[signal] for signal, multiplier in multipliers.items())


def lagrangian_advantage(
    reward_advantages: Float[Array, "B T"],
    cost_advantages: Float[Array, "B T"],
    multiplier: float | Float[Array, ""] | Float[Array, "B 1"],
) -> Float[Array, "B T"]:
    """A = (A_r − λ·A_c)/(1 + λ), of one constraint.

    Source: Dai et al. 2023 (arXiv 2310.12773) appendix B.3.

    Args:
        reward_advantages: f32[B, T].
        cost_advantages: f32[B, T].
        multiplier: λ ≥ 0; f32[B, 1] if it differs by sequence (0 on prompts that the constraint does not name).

    Returns:
        f32[B, T].
    """
    return combine_signals({"reward": reward_advantages, "cost": cost_advantages}, {"cost": jnp.asarray(multiplier)})


def share_above_zero(costs: Float[Array, " B"], counted: Bool[Array, " B"]) -> jax.Array:
    """Share of the counted sequences with a positive cost, that is, called unsafe by the cost model."""
    return ((costs > 0) & counted).sum() / jnp.maximum(counted.sum(), 1)
