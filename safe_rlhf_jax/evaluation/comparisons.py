"""Policies against each other: from verdicts on pairs of responses to win rates, Bradley–Terry strengths and Elo.

`won` is f64[P, K, K] for P prompts and K policies: the share of prompt p that policy i wins over policy j, 1, ½ for a
tie or 0, or the average of several verdicts; won[p, i, j] + won[p, j, i] = 1. A *pair judge* sees two responses, and is
asked in both orders: `firsts[p, i, j]` is 1 where it prefers i shown first to j shown second, ½ for a tie, else 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.evaluation.judges import AVERAGE
from safe_rlhf_jax.evaluation.statistics import share_of, sigmoid, wins

AXES = {"reward": "helpfulness", "cost": "harmlessness"}  # by the kind of a judge's signal
BASE, POINTS = 1000.0, 400.0 / np.log(10.0)  # Elo of the first policy, and of one nat of strength


def won_by_scores(scores: np.ndarray) -> np.ndarray:
    """Shares won by higher scores, f64[P, K, K] from f64[P, K]."""
    return wins(scores[:, :, None], scores[:, None, :])


def won_in_both_orders(firsts: np.ndarray) -> np.ndarray:
    """Shares won by the average of the two orders: a judge that follows the position gives a tie."""
    return (firsts + 1.0 - np.swapaxes(firsts, 1, 2)) / 2.0


def order_effects(firsts: np.ndarray) -> dict[str, Any]:
    """Ties, flips and position bias of a pair judge, each as a share with its interval (see `share_of`).

    The shares of each prompt are averaged first: its verdicts are not independent.

    Returns:
        `verdicts`: their number. `ties`: of all verdicts. `flips`: pairs of responses of which each is preferred in one
        order. `first`: verdicts for the response that is shown first, a tie counting one half; ½ without bias.
    """
    rows, columns = np.triu_indices(firsts.shape[1], k=1)
    one, other = firsts[:, rows, columns], firsts[:, columns, rows]
    verdicts = np.concatenate([one, other], axis=1)
    flips = (one == other) & (one != 0.5)
    shares = {"ties": verdicts == 0.5, "flips": flips, "first": verdicts}
    return {"verdicts": verdicts.size} | {name: share_of(found.mean(1)) for name, found in shares.items()}


def win_rates(won: np.ndarray) -> list[list[dict[str, Any] | None]]:
    """Win rate of each policy over each other, with its interval; None of a policy over itself."""
    policies = range(won.shape[1])
    return [[None if i == j else share_of(won[:, i, j]) for j in policies] for i in policies]


def bradley_terry(games: np.ndarray, *, prior: float = 1.0) -> np.ndarray:
    """Strengths θ of the Bradley–Terry model, P(i beats j) = σ(θ_i − θ_j), by maximum likelihood.

        maximise Σ_ij w_ij·log σ(θ_i − θ_j),  w_ij = wins of i over j + prior/2

    by Newton's method, steps cut at 1. With ties as half a win to each, it is logistic regression on the pairs without
    an intercept. The prior of one tie between any two keeps θ finite where a policy always wins.

    Source: Bradley and Terry, "Rank analysis of incomplete block designs" (1952).

    Args:
        games: f64[…, K, K], wins of i over j.
        prior: Ties added to each pair; 0 only where no policy, or group of them, wins or loses all games with others.

    Returns:
        f64[…, K], of mean 0, nats.

    Raises:
        ArithmeticError: If it does not converge.
    """
    size = games.shape[-1]
    w = np.where(np.eye(size, dtype=bool), 0.0, games + prior / 2.0)
    n = w + np.swapaxes(w, -1, -2)
    strengths = np.zeros(games.shape[:-1])
    for _ in range(200):
        p = sigmoid(strengths[..., :, None] - strengths[..., None, :])
        gradient = (w - n * p).sum(-1)
        if np.abs(gradient).max() <= 1e-10 * n.sum((-1, -2)).max():
            return strengths
        curvature = n * p * (1.0 - p)
        # θ is known up to a constant: the 1s keep its mean at 0.
        hessian = np.eye(size) * curvature.sum(-1)[..., None] - curvature + 1.0
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        strengths = strengths + step / np.maximum(np.abs(step).max(-1, keepdims=True), 1.0)
    raise ArithmeticError("the Bradley–Terry strengths do not converge in 200 steps")


def elo(strengths: np.ndarray) -> np.ndarray:
    """Elo ratings, 1000 for the first policy: 1000 + (θ − θ_0)·400/ln 10."""
    return BASE + POINTS * (strengths - strengths[..., :1])


def elo_ratings(
    won: np.ndarray, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[dict[str, float]]:
    """Elo of each policy relative to the first, with percentile bootstrap intervals over prompts.

    A prompt is drawn with all its comparisons: those of one prompt are not independent.

    Source: Efron 1979; ratings as in figure 5 of Dai et al. 2023 (arXiv 2310.12773), the first policy at 1000.

    Args:
        won: f64[P, K, K].
        confidence: Probability mass between the two ends.
        resamples: Number of bootstrap samples.
        seed: The same seed gives the same intervals.

    Returns:
        {elo, low, high} by policy.
    """
    prompts, size, _ = won.shape
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    games = (drawn @ won.reshape(prompts, -1)).reshape(-1, size, size)
    tail = (1 - confidence) / 2
    low, high = np.quantile(elo(bradley_terry(games)), [tail, 1 - tail], axis=0)
    found = zip(elo(bradley_terry(won.sum(0))), low, high, strict=True)
    return [{"elo": float(rating), "low": float(a), "high": float(b)} for rating, a, b in found]


def compared(
    won: Mapping[str, np.ndarray], policies: Sequence[str], prompts: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Win rates and Elo of policies by axis, judge and kind of prompts.

    Args:
        won: By signal of a judge, f64[P, K, K].
        policies: Their names.
        prompts: By kind, bool[P].

    Returns:
        Rows of `prompts`, `axis`, `judge`, `n` prompts, `win_rates` and `elo`. Of several judges of an axis there is
        the average of their shares, and each.
    """
    rows = []
    for kind, members in prompts.items():
        for signal_kind, axis in AXES.items():
            judges = {signal: shares for signal, shares in won.items() if signal.startswith(f"{signal_kind}/")}
            if len(judges) > 1:
                judges = {AVERAGE: np.mean(list(judges.values()), axis=0)} | judges
            for judge, shares in judges.items():
                chosen = shares[members]
                ratings = dict(zip(policies, elo_ratings(chosen), strict=True))
                rows.append({
                    "prompts": kind, "axis": axis, "judge": judge, "n": len(chosen), "win_rates": win_rates(chosen),
                    "elo": ratings,
                })  # fmt: skip
    return rows


def leading(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The first row of each axis: of all prompts, by the average of the judges."""
    return {axis: next(row for row in rows if row["axis"] == axis) for axis in dict.fromkeys(r["axis"] for r in rows)}
