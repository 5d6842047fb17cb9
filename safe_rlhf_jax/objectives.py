"""Supervised losses: language modelling (SFT, PTX), Bradley–Terry (reward model), safety (cost model), DPO and IPO."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from safe_rlhf_jax.models.adapters import LanguageModel, Scorer
from safe_rlhf_jax.models.config import ScoreConfig
from safe_rlhf_jax.ops import gather_last, packed, sequence_mean, text_log_probs, unpacked
from safe_rlhf_jax.types import Metrics, Packing, Params, PreferenceBatch, SafetyBatch, Sequences, SupervisedBatch


def token_weights(loss_mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """Weights w with mean_b Σ_t w·x = mean of x over all tokens in the loss.

    Computed from the whole batch before it is split into microbatches, so that the split changes nothing.
    """
    return loss_mask.astype(jnp.float32) * (loss_mask.shape[0] / jnp.maximum(loss_mask.sum(), 1))


def lm_loss(
    module: LanguageModel, params: Params, batch: SupervisedBatch, weights: Float[Array, "B L"]
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of the tokens in the loss.

    Source: PKU-Alignment/safe-rlhf@82743cc SFT trainer: the mean over all non-ignored tokens of the batch.

    Args:
        module: The language model.
        params: Its parameters.
        batch: Texts [B, L].
        weights: f32[B, L], `token_weights` of the whole batch.

    Returns:
        f32[], nats per token, and no metrics: the exponential of one microbatch's share is not a perplexity.
    """
    log_probs = text_log_probs(module, params, batch.tokens, batch.mask, batch.packing)
    loss = -(weights[:, 1:] * log_probs).sum(-1).mean()
    return loss, {}


def slice_mean(x: Float[Array, "B ..."], mask: Bool[Array, "B L"] | None) -> Float[Array, " B"]:
    """Mean over the masked tokens of each sequence; x itself if scores are per sequence."""
    return x if mask is None else sequence_mean(x, mask)


def label_loss(
    logit: Float[Array, "B ..."], label: Bool[Array, " B"] | Float[Array, " B"] | None
) -> Float[Array, "B ..."]:
    """−log of the probability of a label, with σ(logit) that of true.

    For a share p of annotators who say true it is the mean of their losses, −p·log σ(logit) − (1 − p)·log σ(−logit).

    Args:
        logit: f32[B] or f32[B, L].
        label: bool[B]; f32[B], p in [0, 1]; None: all true.
    """
    if label is None:
        return -jax.nn.log_sigmoid(logit)
    label = label.reshape((-1,) + (1,) * (logit.ndim - 1))
    if label.dtype == bool:
        return -jax.nn.log_sigmoid(jnp.where(label, logit, -logit))
    return -label * jax.nn.log_sigmoid(logit) - (1.0 - label) * jax.nn.log_sigmoid(-logit)


def weighted_mean(x: Float[Array, " B"], weight: Float[Array, " B"] | None) -> Float[Array, ""]:
    """mean_i w_i·x_i."""
    return (x if weight is None else weight * x).mean()


def bradley_terry_loss(
    chosen: Float[Array, "B ..."],
    rejected: Float[Array, "B ..."],
    mask: Bool[Array, "B L"] | None = None,
    *,
    regularization: float,
    share: Float[Array, " B"] | None = None,
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """mean_i w_i·[−log σ(r_w − r_l)] + ρ·mean w_i·r².

    With a share p of annotators who prefer the chosen response: −p·log σ(r_w − r_l) − (1 − p)·log σ(r_l − r_w).
    Sequence-wise with scores [B]. Token-wise with scores [B, L] and a mask of the positions to compare: both terms are
    means over the masked tokens of a pair, then over pairs.

    Source: Dai et al. 2023 (arXiv 2310.12773) eq. 2; PKU-Alignment/safe-rlhf@82743cc reward trainer.

    Args:
        chosen: f32[B] or f32[B, L], scores of the preferred response.
        rejected: f32[B] or f32[B, L].
        mask: bool[B, L] for token-wise scores, else None.
        regularization: ρ ≥ 0.
        share: f32[B], p; None is 1.
        weight: f32[B], w ≥ 0; None is 1.

    Returns:
        f32[].
    """
    loss = weighted_mean(slice_mean(label_loss(chosen - rejected, share), mask), weight)
    return loss + regularization * mean_square(chosen, rejected, mask, weight)


def mean_square(
    first: Float[Array, "B ..."],
    second: Float[Array, "B ..."],
    mask: Bool[Array, "B L"] | None,
    weight: Float[Array, " B"] | None,
) -> Float[Array, ""]:
    """Mean of the squared scores of both sides of the pairs."""
    return 0.5 * weighted_mean(slice_mean(jnp.square(first), mask) + slice_mean(jnp.square(second), mask), weight)


def safety_loss(
    safer: Float[Array, "B ..."],
    unsafer: Float[Array, "B ..."],
    safer_is_safe: Bool[Array, " B"] | Float[Array, " B"],
    unsafer_is_safe: Bool[Array, " B"] | Float[Array, " B"],
    mask: Bool[Array, "B L"] | None = None,
    *,
    regularization: float,
    ranking_weight: float = 1.0,
    share: Float[Array, " B"] | None = None,
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """mean_i [−w·log σ(c_h − c_l) − log σ(−s_l·c_l) − log σ(−s_h·c_h)] + ρ·mean c².

    c_l is the cost of the safer response, c_h of the other, s = +1 for safe and −1 for unsafe: the less safe response
    costs more, and a response is unsafe if its cost is positive (c > 0). With w = 0 a cost is the logit of a
    classifier, the paper's ablation. Where a label is a share of annotators, its term is the mean of theirs.

    Source: Dai et al. 2023 (arXiv 2310.12773) eq. 3; PKU-Alignment/safe-rlhf@82743cc cost trainer.

    Args:
        safer: f32[B] or f32[B, L], costs of the safer response.
        unsafer: f32[B] or f32[B, L], costs of the less safe response.
        safer_is_safe: bool[B], label of the safer response; or f32[B], the share of annotators who call it safe.
        unsafer_is_safe: The same of the other.
        mask: bool[B, L] for token-wise scores, else None.
        regularization: ρ ≥ 0.
        ranking_weight: w ≥ 0.
        share: f32[B], of annotators who call the safer response the safer one; None is 1.
        weight: f32[B], of a pair in both means, ≥ 0; None is 1.

    Returns:
        f32[].
    """
    ranking = ranking_weight * label_loss(unsafer - safer, share)
    signs = label_loss(-safer, safer_is_safe) + label_loss(-unsafer, unsafer_is_safe)
    loss = weighted_mean(slice_mean(ranking + signs, mask), weight)
    return loss + regularization * mean_square(safer, unsafer, mask, weight)


def stack_pair(first: Sequences, second: Sequences) -> Sequences:
    """Stacks two sides of B pairs into 2B rows, so that one forward pass scores both."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def divergence_mask(first: Sequences, second: Sequences) -> Bool[Array, "B L"]:
    """Positions that a token-wise loss compares: from the first differing token to the end of the shorter text.

    The reference continues to the end of the longer text and compares real tokens with padding (REFERENCE Q11).
    """
    differ = (first.tokens != second.tokens) | (first.mask != second.mask)
    started = jnp.cumsum(differ.astype(jnp.int32), axis=-1) > 0
    return started & first.mask & second.mask


def pair_scores(
    module: Scorer, params: Params, stats: Params, first: Sequences, second: Sequences, packing: Packing | None = None
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Scores of every token of both sides, f32[B, L] each, before normalisation."""
    both = stack_pair(first, second)
    rows, texts = packed(both.tokens, both.mask, packing)
    scores: Any = module.apply({"params": params, "stats": stats}, rows, texts, method="raw_scores")
    scores = unpacked(scores, packing, both.tokens.shape[1])
    size = first.tokens.shape[0]
    return scores[:size], scores[size:]


def reward_loss(
    module: Scorer,
    params: Params,
    stats: Params,
    batch: PreferenceBatch,
    *,
    token_wise: bool,
    regularization: float,
) -> tuple[jax.Array, Metrics]:
    """Bradley–Terry loss of a batch of pairs, with metrics {accuracy, score_mean} and the `scores` themselves, [2B]."""
    chosen, rejected = pair_scores(module, params, stats, batch.chosen, batch.rejected, batch.packing)
    end_chosen, end_rejected = gather_last(chosen, batch.chosen.mask), gather_last(rejected, batch.rejected.mask)
    options: dict[str, Any] = {"regularization": regularization, "share": batch.share, "weight": batch.weight}
    if token_wise:
        loss = bradley_terry_loss(chosen, rejected, divergence_mask(batch.chosen, batch.rejected), **options)
    else:
        loss = bradley_terry_loss(end_chosen, end_rejected, **options)
    ends = jnp.concatenate([end_chosen, end_rejected])
    metrics = {
        "accuracy": (end_chosen > end_rejected).mean(),
        "score_mean": ends.mean(),
        "scores": ends,
    }
    return loss, metrics


def cost_loss(
    module: Scorer,
    params: Params,
    stats: Params,
    batch: SafetyBatch,
    *,
    token_wise: bool,
    regularization: float,
    ranking_weight: float = 1.0,
) -> tuple[jax.Array, Metrics]:
    """Safety loss of a batch of pairs, with metrics {accuracy, sign_accuracy, score_mean} and `scores`, f32[2B]."""
    safer, unsafer = pair_scores(module, params, stats, batch.safer, batch.unsafer, batch.packing)
    end_safer, end_unsafer = gather_last(safer, batch.safer.mask), gather_last(unsafer, batch.unsafer.mask)
    soft = batch.shares or batch
    labels = (soft.safer_is_safe, soft.unsafer_is_safe)
    options: dict[str, Any] = {"regularization": regularization, "ranking_weight": ranking_weight}
    options |= {"share": None if batch.shares is None else batch.shares.safer, "weight": batch.weight}
    if token_wise:
        loss = safety_loss(safer, unsafer, *labels, divergence_mask(batch.safer, batch.unsafer), **options)
    else:
        loss = safety_loss(end_safer, end_unsafer, *labels, **options)
    ends = jnp.concatenate([end_safer, end_unsafer])
    metrics = {
        "accuracy": (end_unsafer > end_safer).mean(),
        "sign_accuracy": sign_accuracy(ends, jnp.concatenate([batch.safer_is_safe, batch.unsafer_is_safe])),
        "score_mean": ends.mean(),
        "scores": ends,
    }
    return loss, metrics


def dpo_loss(
    chosen_log_ratio: Float[Array, " B"],
    rejected_log_ratio: Float[Array, " B"],
    margin: Float[Array, " B"] | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """mean_i [−(1 − ε)·log σ(h_i) − ε·log σ(−h_i)], h = β·(Δ_w − Δ_l) − m.

    Source: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; ε: a share ε of the labels is wrong (Mitchell 2023,
    "conservative" DPO); m: Kim et al. 2025 (arXiv 2505.20065, SafeDPO).

    Args:
        chosen_log_ratio: f32[B], Δ_w = log π(y_w|x) − log π_ref(y_w|x), sums over the response, nats.
        rejected_log_ratio: f32[B], Δ_l.
        margin: f32[B], m; None is 0.
        beta: β > 0, the KL coefficient of the problem whose solution this is.
        label_smoothing: ε in [0, ½).

    Returns:
        f32[]; ln 2 where π = π_ref and m = 0.
    """
    h = beta * (chosen_log_ratio - rejected_log_ratio) - (0.0 if margin is None else margin)
    return (-(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)).mean()


def ipo_loss(
    chosen_log_ratio: Float[Array, " B"], rejected_log_ratio: Float[Array, " B"], *, beta: float
) -> Float[Array, ""]:
    """mean_i (Δ_w − Δ_l − 1/(2β))²: the difference has a target, so that certain labels do not drive it to infinity.

    Source: Azar et al. 2023 (arXiv 2310.12036) eq. 17, with sums over responses as there, not means over tokens.

    Args:
        chosen_log_ratio: f32[B], Δ_w as in `dpo_loss`.
        rejected_log_ratio: f32[B], Δ_l.
        beta: β > 0, τ in the paper.

    Returns:
        f32[], nats².
    """
    return jnp.square(chosen_log_ratio - rejected_log_ratio - 0.5 / beta).mean()


def pair_log_probs(
    module: LanguageModel, params: Params, first: Sequences, second: Sequences, packing: Packing | None = None
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Log-probability of each side's response, EOS included, f32[B] each, nats: sums, not means, over its tokens.

    The reference's slice of the shifted log-probs omits the first differing token and includes the padding after EOS
    (REFERENCE Q1); here the mask is shifted too.
    """
    both = stack_pair(first, second)
    log_probs = text_log_probs(module, params, both.tokens, both.mask, packing)
    sums = jnp.where(both.response_mask[:, 1:], log_probs, 0.0).sum(-1)
    size = first.tokens.shape[0]
    return sums[:size], sums[size:]


def pair_log_ratios(
    module: LanguageModel, params: Params, reference: Params, batch: PreferenceBatch
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Δ = log π(y|x) − log π_ref(y|x) of chosen and rejected, f32[B] each, nats; π_ref has no gradient."""
    pair = batch.chosen, batch.rejected, batch.packing
    policy = pair_log_probs(module, params, *pair)
    fixed = jax.lax.stop_gradient(pair_log_probs(module, reference, *pair))
    return policy[0] - fixed[0], policy[1] - fixed[1]


def direct_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    margin: Float[Array, " B"] | None,
    *,
    beta: float,
    label_smoothing: float,
    squared: bool,
) -> tuple[jax.Array, Metrics]:
    """DPO loss of log-ratios, or the IPO loss if `squared`, with metrics.

    `margin` is the difference of the implicit rewards β·Δ, `accuracy` the share of pairs with a positive margin (a tie
    counts half), `*_log_ratio` the mean Δ of a side in nats.
    """
    if squared:
        loss = ipo_loss(chosen, rejected, beta=beta)
    else:
        loss = dpo_loss(chosen, rejected, margin, beta=beta, label_smoothing=label_smoothing)
    difference = beta * (chosen - rejected)
    metrics = {
        "accuracy": (0.5 + 0.5 * jnp.sign(difference)).mean(),
        "margin": difference.mean(),
        "chosen_log_ratio": chosen.mean(),
        "rejected_log_ratio": rejected.mean(),
    }
    return loss, metrics


def sign_accuracy(costs: Float[Array, " B"], is_safe: Bool[Array, " B"]) -> Float[Array, ""]:
    """Share of costs on the right side of zero: negative for safe, positive for unsafe; 0 itself is wrong."""
    return (jnp.where(is_safe, -costs, costs) > 0).mean()


def update_normalizer(stats: Params, scores: Float[Array, " N"], config: ScoreConfig) -> Params:
    """Updates a score normaliser with the end scores of a batch.

    Exponential average with momentum a: μ ← aμ + (1−a)m, σ² ← aσ² + (1−a)v. Without momentum, mean and variance of all
    scores so far (Chan et al. 1979). v is the unbiased variance of the batch, computed from deviations from its mean:
    the mean of squares minus the squared mean would cancel a variance that is small beside the mean.

    Source: PKU-Alignment/safe-rlhf@82743cc `normalizer.py`.

    Args:
        stats: {mean f32[1], var f32[1], count i32[1]}.
        scores: f32[N], end scores of the batch, N ≥ 2.
        config: Selects the average.

    Returns:
        The new stats.
    """
    count = scores.size
    batch_mean, batch_var = scores.mean(keepdims=True), scores.var(keepdims=True, ddof=1)
    total = stats["count"] + count
    if config.momentum is not None:
        a = config.momentum
        new_mean = a * stats["mean"] + (1 - a) * batch_mean
        return {"mean": new_mean, "var": a * stats["var"] + (1 - a) * batch_var, "count": total}
    seen, share = stats["count"].astype(jnp.float32), count / total.astype(jnp.float32)
    delta = batch_mean - stats["mean"]
    mass = stats["var"] * seen + batch_var * count + delta**2 * seen * share
    return {"mean": stats["mean"] + delta * share, "var": mass / total.astype(jnp.float32), "count": total}
