"""Step 8 of the line: the clipped losses of PPO."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from safe_rlhf_jax.ops import masked_mean


def clipped_surrogate(
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_range_ratio: float,
) -> Float[Array, ""]:
    """−mean min(ρ·A, clip(ρ, 1 ± ε)·A), per sequence, then over sequences.

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; PKU-Alignment/safe-rlhf@82743cc `actor_loss_fn`.

    Args:
        ratio: f32[B, T], ρ = π(y_t) / π_old(y_t).
        advantages: f32[B, T], A.
        mask: bool[B, T], response tokens.
        clip_range_ratio: ε.

    Returns:
        f32[], to minimise.
    """
    clipped = jnp.clip(ratio, 1.0 - clip_range_ratio, 1.0 + clip_range_ratio)
    return -masked_mean(jnp.minimum(ratio * advantages, clipped * advantages), mask)


def clip_fraction(ratio: Float[Array, "B T"], mask: Bool[Array, "B T"], *, clip_range_ratio: float) -> Float[Array, ""]:
    """Share of response tokens whose ratio lies outside 1 ± ε."""
    return masked_mean((jnp.abs(ratio - 1.0) > clip_range_ratio).astype(jnp.float32), mask)


def clipped_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_range_value: float,
) -> Float[Array, ""]:
    """½·mean max((V − R)², (clip(V, V_old ± ε) − R)²), per sequence, then over sequences.

    Source: PKU-Alignment/safe-rlhf@82743cc `critic_loss_fn`.

    Args:
        values: f32[B, T], V of the critic that is trained.
        old_values: f32[B, T], V when the rollout was scored.
        returns: f32[B, T], R.
        mask: bool[B, T], response tokens.
        clip_range_value: ε, in units of the signal.

    Returns:
        f32[], to minimise.
    """
    clipped = jnp.clip(values, old_values - clip_range_value, old_values + clip_range_value)
    error = jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
    return 0.5 * masked_mean(error, mask)


def policy_ratio(
    log_probs: Float[Array, "B T"], old_log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """ρ = exp(log_probs − old_log_probs), 1 outside the mask, the exponent clamped to ±20 against overflow."""
    difference = jnp.where(mask, log_probs - old_log_probs, 0.0)
    return jnp.exp(jnp.clip(difference, -20.0, 20.0))


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> jax.Array:
    """1 − var(R − V)/var(R) over all response tokens; 0 where R does not vary."""
    count = jnp.maximum(mask.sum(), 1)

    def variance(x: Float[Array, "B T"]) -> jax.Array:
        mean = jnp.where(mask, x, 0.0).sum() / count
        return jnp.where(mask, jnp.square(x - mean), 0.0).sum() / count

    total = variance(returns)
    return jnp.where(total > 1e-8, 1.0 - variance(returns - values) / jnp.maximum(total, 1e-8), 0.0)
