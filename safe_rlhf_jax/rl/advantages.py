"""Step 6 of the line: token scores and advantages, once per signal, with or without a critic."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from safe_rlhf_jax.ops import last_index


def token_scores(
    score: Float[Array, " B"],
    log_ratio: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coeff: float | Float[Array, ""],
    kl_sign: int,
    clip_range_score: float,
) -> Float[Array, "B T"]:
    """Spreads a sequence's score over its tokens and adds the KL term.

        s_t = clip(kl_sign · β · k_t + 1[t = last]·score, ±clip_range_score),   k_t = log π(y_t) − log π_ref(y_t)

    The *sum* is clipped, as in the reference. A KL term in rewards (−1) and in costs (+1) leaves an effective
    coefficient β for every multiplier, because the advantages are combined as (A_r − λA_c)/(1 + λ).

    Source: Dai et al. 2023 (arXiv 2310.12773) appendix B.2;
    PKU-Alignment/safe-rlhf@82743cc `add_kl_divergence_regularization`.

    Args:
        score: f32[B], of the whole sequence, in units of the signal.
        log_ratio: f32[B, T], log_probs − ref_log_probs, nats.
        mask: bool[B, T], response tokens, EOS included.
        kl_coeff: β, score per nat.
        kl_sign: −1 for rewards, +1 for costs.
        clip_range_score: Bound on the absolute value of every entry.

    Returns:
        f32[B, T]; entries outside the mask are undefined.
    """
    position = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    terminal = jnp.where(position == last_index(mask)[:, None], score[:, None], 0.0)
    return jnp.clip(kl_sign * kl_coeff * log_ratio + terminal, -clip_range_score, clip_range_score)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation over the response tokens.

        δ_t = r_t + γ·V_{t+1} − V_t,   A_t = δ_t + γ·λ·A_{t+1},   returns = A + V

    V after the last response token is 0: an episode ends there, truncated or not.

    Source: Schulman et al. 2015, arXiv 1506.02438; PKU-Alignment/safe-rlhf@82743cc `get_advantages_and_returns`.

    Args:
        rewards: f32[B, T], r_0 … r_{T−1}; ignored outside the mask.
        values: f32[B, T], V_0 … V_{T−1}; ignored outside the mask.
        mask: bool[B, T], response tokens.
        gamma: γ, discount.
        gae_lambda: λ of GAE; 0 is the TD error, 1 the Monte-Carlo return minus the value.

    Returns:
        advantages and returns, f32[B, T] each, 0 outside the mask, without gradient.
    """
    rewards = jnp.where(mask, rewards, 0.0)
    values = jnp.where(mask, values, 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * next_values - values

    def backward(following: Float[Array, " B"], delta: Float[Array, " B"]) -> tuple[jax.Array, jax.Array]:
        advantage = delta + gamma * gae_lambda * following
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    advantages = jax.lax.stop_gradient(advantages.T)
    return advantages, jax.lax.stop_gradient(advantages + values)


def leave_one_out(returns: Float[Array, "P n"]) -> Float[Array, "P n"]:
    """A_i = G_i − mean of the other responses to the same prompt.

    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740.

    Args:
        returns: f32[P, n], n ≥ 2 responses to each of P prompts.

    Returns:
        f32[P, n]; a constant added to all returns of a prompt changes nothing.
    """
    n = returns.shape[1]
    return n / (n - 1) * (returns - returns.mean(1, keepdims=True))


def group_normalized(returns: Float[Array, "P n"]) -> Float[Array, "P n"]:
    """A_i = (G_i − mean)/(standard deviation + 1e-6) over the responses to the same prompt.

    Source: Shao et al. 2024 (GRPO), arXiv 2402.03300. Scales are lost: docs/algorithms.md gives
    the resulting objective.

    Args:
        returns: f32[P, n], n ≥ 2 responses to each of P prompts.

    Returns:
        f32[P, n].
    """
    return (returns - returns.mean(1, keepdims=True)) / (returns.std(1, ddof=1, keepdims=True) + 1e-6)


def sequence_advantages(
    rewards: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    baseline: Callable[[Float[Array, "P n"]], Float[Array, "P n"]],
    *,
    num_responses: int,
) -> Float[Array, "B T"]:
    """Advantages without a critic: the sum of a response's rewards against the other responses to its prompt.

    Args:
        rewards: f32[B, T], r_0 … r_{T−1}; ignored outside the mask.
        mask: bool[B, T], response tokens.
        baseline: Compares the n returns of each prompt.
        num_responses: n; responses to one prompt are adjacent rows.

    Returns:
        f32[B, T], the same at every token of a response, 0 outside the mask, without gradient.
    """
    returns = jnp.where(mask, rewards, 0.0).sum(-1).reshape(-1, num_responses)
    return jax.lax.stop_gradient(jnp.where(mask, baseline(returns).reshape(-1, 1), 0.0))


def whiten(advantages: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """(A − mean)/(standard deviation + 1e-8) over all response tokens of a minibatch, on all devices together."""
    count = jnp.maximum(mask.sum(), 1)
    centred = advantages - jnp.where(mask, advantages, 0.0).sum() / count
    variance = jnp.where(mask, jnp.square(centred), 0.0).sum() / count
    return jnp.where(mask, centred / (jnp.sqrt(variance) + 1e-8), 0.0)
