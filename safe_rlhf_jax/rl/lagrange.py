"""Step 7 of the line: the cost window and the Lagrange multiplier λ."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from safe_rlhf_jax.types import CostWindow, LagrangeState


def init_multiplier(initial: float) -> LagrangeState:
    """Returns λ = `initial`, stored as its logarithm."""
    return LagrangeState(log_multiplier=jnp.asarray(math.log(initial), jnp.float32))


def init_window(size: int) -> CostWindow:
    """Returns an empty window of `size` costs."""
    return CostWindow(recent=jnp.zeros((size,), jnp.float32), count=jnp.zeros((), jnp.int32))


def push_costs(window: CostWindow, costs: Float[Array, " B"], counted: Bool[Array, " B"]) -> CostWindow:
    """Appends the costs that count and forgets the oldest.

    One window serves all devices: the reference keeps one per process and averages their means (REFERENCE Q5).

    Args:
        window: The newest W costs so far.
        costs: f32[B], one per sequence.
        counted: bool[B], sequences to which the constraint applies.

    Returns:
        The window; unchanged where nothing counts.
    """
    size = window.recent.shape[0]
    filled = jnp.arange(size, dtype=jnp.int32) >= size - window.count
    entries = jnp.concatenate([window.recent, costs])
    valid = jnp.concatenate([filled, counted])
    newest_last = jnp.argsort(valid, stable=True)[-size:]
    count = jnp.minimum(window.count + counted.sum(dtype=jnp.int32), size)
    return CostWindow(recent=entries[newest_last], count=count)


def window_mean(window: CostWindow) -> Float[Array, ""]:
    """J_C: mean of the costs in the window; 0 while it is empty."""
    size = window.recent.shape[0]
    filled = jnp.arange(size, dtype=jnp.int32) >= size - window.count
    return jnp.where(filled, window.recent, 0.0).sum() / jnp.maximum(window.count, 1)


def ascend_log_multiplier(
    log_multiplier: Float[Array, ""],
    mean_cost: Float[Array, ""],
    *,
    cost_limit: float | Float[Array, ""],
    lr: float | Float[Array, ""],
    max_multiplier: float | None,
) -> Float[Array, ""]:
    """One step of gradient ascent in log λ: log λ ← min(log λ + lr·λ·(J_C − d), log λ_max).

    Source: Dai et al. 2023 (arXiv 2310.12773) eq. 31, with d = −(their d).

    Args:
        log_multiplier: f32[], log λ.
        mean_cost: f32[], J_C, in cost-model units.
        cost_limit: d; the constraint is J_C ≤ d.
        lr: Step size.
        max_multiplier: λ_max, or None.

    Returns:
        f32[], the new log λ.
    """
    ascended = log_multiplier + lr * jnp.exp(log_multiplier) * (mean_cost - cost_limit)
    return ascended if max_multiplier is None else jnp.minimum(ascended, math.log(max_multiplier))


def lagrangian_advantage(
    reward_advantages: Float[Array, "B T"],
    cost_advantages: Float[Array, "B T"],
    multiplier: float | Float[Array, ""] | Float[Array, "B 1"],
) -> Float[Array, "B T"]:
    """A = (A_r − λ·A_c)/(1 + λ).

    Source: Dai et al. 2023 (arXiv 2310.12773) appendix B.3.

    Args:
        reward_advantages: f32[B, T].
        cost_advantages: f32[B, T].
        multiplier: λ ≥ 0; f32[B, 1] where it differs by sequence (0 on prompts that the constraint does not name).

    Returns:
        f32[B, T].
    """
    return (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)


def share_above_zero(costs: Float[Array, " B"], counted: Bool[Array, " B"]) -> jax.Array:
    """Share of the counted sequences whose cost is positive, that is, which the cost model calls unsafe."""
    return ((costs > 0) & counted).sum() / jnp.maximum(counted.sum(), 1)
