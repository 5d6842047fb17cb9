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
    dual_clip: float | None = None,
) -> Float[Array, ""]:
    """−mean min(ρ·A, clip(ρ, 1 ± ε)·A), per sequence, then over sequences.

    With a dual clip c the term of a negative A is at least c·A, whatever ρ is.

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; PKU-Alignment/safe-rlhf@82743cc `actor_loss_fn`. Dual clip:
    Ye et al. 2020, arXiv 1912.09729, eq. 5.

    Args:
        ratio: f32[B, T], ρ = π(y_t) / π_old(y_t).
        advantages: f32[B, T], A.
        mask: bool[B, T], response tokens.
        clip_range_ratio: ε.
        dual_clip: c > 1, or None.

    Returns:
        f32[], to minimise.
    """
    clipped = jnp.clip(ratio, 1.0 - clip_range_ratio, 1.0 + clip_range_ratio)
    surrogate = jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        surrogate = jnp.where(advantages < 0, jnp.maximum(surrogate, dual_clip * advantages), surrogate)
    return -masked_mean(surrogate, mask)


def sequence_log_ratio(ratio: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Log π(y)/π_old(y) of whole responses, f32[B], from the ratios of their tokens."""
    return jnp.where(mask, jnp.log(ratio), 0.0).sum(-1)


def pairwise_surrogate(
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_range_ratio: float,
    dual_clip: float | None = None,
) -> Float[Array, ""]:
    """Pairwise PPO, clipped jointly: −½·mean min(D·h, D·clip(h, ±ε)).

        D = R_1 − R_2,   h = log π(y_1)/π(y_2) − log π_old(y_1)/π_old(y_2)

    On policy the gradient is −½·E[D·∇ log π(y_1)/π(y_2)]. Trajectory-wise: the log-ratios are those of whole responses.

    Source: Wu et al. 2023 (P3O), arXiv 2310.00212, section 4.2, the second variant; without the weight π/π_old of both
    responses in its theorem 1, which is 1 on policy.

    Args:
        ratio: f32[2P, T], ρ by token; the two responses to a prompt stand next to each other.
        advantages: f32[2P, T], ±D, the same at every token (`leave_one_out` of two).
        mask: bool[2P, T], response tokens.
        clip_range_ratio: ε, of the log-ratio.
        dual_clip: None; pairs have none.

    Returns:
        f32[], to minimise.
    """
    del dual_clip
    log_ratio = sequence_log_ratio(ratio, mask)
    difference = log_ratio[0::2] - log_ratio[1::2]
    reward = advantages[0::2, 0]
    clipped = jnp.clip(difference, -clip_range_ratio, clip_range_ratio)
    return -0.5 * jnp.minimum(reward * difference, reward * clipped).mean()


def sequence_surrogate(
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_range_ratio: float,
    dual_clip: float | None = None,
) -> Float[Array, ""]:
    """Pairwise PPO, clipped separately: the clipped surrogate with one ratio per response.

        −mean_i min(ρ_i·D_i, clip(ρ_i, 1 ± ε)·D_i),   ρ_i = π(y_i)/π_old(y_i),   D_1 = R_1 − R_2 = −D_2

    Source: Wu et al. 2023 (P3O), arXiv 2310.00212, section 4.2, the first variant. Arguments as above.
    """
    whole = jnp.exp(jnp.clip(sequence_log_ratio(ratio, mask), -20.0, 20.0))[:, None]
    one = jnp.ones_like(whole, dtype=bool)
    return clipped_surrogate(whole, advantages[:, :1], one, clip_range_ratio=clip_range_ratio, dual_clip=dual_clip)


def negative_entropy(
    ratio: Float[Array, "B T"], log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean ρ·log π per token, nats: an estimate of −H(π) whose gradient is unbiased, also off policy."""
    return masked_mean(ratio * jax.lax.stop_gradient(jnp.where(mask, log_probs, 0.0)), mask)


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
        values: f32[B, T], V of the trained critic.
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


def sampler_weights(
    log_probs: Float[Array, "B T"], sampler_log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"], *, maximum: float
) -> Float[Array, "B T"]:
    """min(π_old(y_t) / μ(y_t), C): weights of tokens sampled by μ, a rounded copy of the policy; 1 outside the mask.

    The mean of w·x over μ is that of x over π_old where no weight is cut; the cut bounds its variance.

    Source: truncated importance sampling, Ionides 2008, doi 10.1198/106186008X320456; of a sampler that rounds, Yao et
    al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Args:
        log_probs: f32[B, T], log π_old, recomputed by the learner.
        sampler_log_probs: f32[B, T], log μ.
        mask: bool[B, T], response tokens.
        maximum: C ≥ 1.
    """
    return jnp.minimum(policy_ratio(log_probs, sampler_log_probs, mask), maximum)


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
