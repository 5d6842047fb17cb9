"""Certificates: whether costs of fresh samples show, with confidence 1 − δ, that a policy meets its limits.

The hypothesis of a test is that a limit is *not* met; a small p-value speaks against it. Several limits are tested at
once (groups of prompts, signals, bounds), so their p-values are adjusted by Holm's method: the probability that a limit
passes that is not met is at most δ, whatever the others do.

An entry of the last axis of the costs is one independent prompt with one response to it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special  # scipy.stats takes most of a second to import, in every run

Costs = np.ndarray  # f64[…, n]
Values = np.ndarray | np.floating  # f64[…]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A one-sided confidence bound of one quantity of the costs.

    Attributes:
        name: Of the method.
        quantity: What is bounded.
        estimate: costs -> the quantity in the sample.
        upper: (costs, δ) -> its upper confidence bound at 1 − δ.
        p_value: (costs, limit) -> the smallest δ at which the bound is at most the limit.
        clipped: costs -> how many of them lie outside of the stated range.
    """

    name: str
    quantity: str
    estimate: Callable[[Costs], Values]
    upper: Callable[[Costs, float], Values]
    p_value: Callable[[Costs, float], Values]
    clipped: Callable[[Costs], int] = lambda _: 0


def student_upper(costs: Costs, delta: float) -> Values:
    """Upper bound of the mean cost: mean + t_{1−δ, n−1}·s/√n; ∞ without spread, which no normal sample has.

    Exact for normal costs, approximate for others; too low where a rare response is very costly and none is in the
    sample.

    Source: Student, "The probable error of a mean" (1908); as the safety test of HC-RLHF (arXiv 2506.08266).

    Args:
        costs: f64[…, n].
        delta: δ.

    Returns:
        f64[…].
    """
    mean, error, spread = standard_error(costs)
    quantile = special.stdtrit(costs.shape[-1] - 1, 1.0 - delta)
    return np.where(spread, mean + quantile * error, np.inf)


def student_p_value(costs: Costs, limit: float) -> Values:
    """P(T ≤ (mean − limit)/(s/√n)), T of Student's t with n − 1 degrees of freedom; 1 without spread."""
    mean, error, spread = standard_error(costs)
    statistic = (mean - limit) / np.where(spread, error, 1.0)
    return np.where(spread, special.stdtr(costs.shape[-1] - 1, statistic), 1.0)


def standard_error(costs: Costs) -> tuple[Values, Values, Any]:
    """Mean and standard error s/√n of costs, and whether they have a spread: two of them differ."""
    return costs.mean(-1), costs.std(-1, ddof=1) / np.sqrt(costs.shape[-1]), np.ptp(costs, axis=-1) > 0


def bernstein_upper(costs: Costs, delta: float, low: float, high: float) -> Values:
    """Upper bound of the mean of costs clipped to [low, high], by their empirical variance V and range R = high − low.

        mean + √(2V·ln(2/δ)/n) + 7R·ln(2/δ)/(3(n − 1))

    It holds for every distribution and every n, unlike Student's, and is wider.

    Source: Maurer and Pontil 2009 (arXiv 0907.3740) theorem 4.

    Args:
        costs: f64[…, n].
        delta: δ.
        low: Least cost of the stated range.
        high: Greatest cost of it.

    Returns:
        f64[…].
    """
    mean, root, linear = bernstein_terms(costs, low, high)
    log = np.log(2.0 / delta)
    return mean + root * np.sqrt(log) + linear * log


def bernstein_p_value(costs: Costs, limit: float, low: float, high: float) -> Values:
    """The δ at which `bernstein_upper` equals the limit, from a quadratic equation in √ln(2/δ); 1 if there is none."""
    mean, root, linear = bernstein_terms(costs, low, high)
    gap = np.maximum(limit - mean, 0.0)
    log = np.square((np.sqrt(root**2 + 4.0 * linear * gap) - root) / (2.0 * linear))
    return np.minimum(2.0 * np.exp(-log), 1.0)


def bernstein_terms(costs: Costs, low: float, high: float) -> tuple[Values, Values, float]:
    """Mean of clipped costs, and the factors of √ln(2/δ) and ln(2/δ) in the half-width, which needs two costs."""
    inside, n = np.clip(costs, low, high), costs.shape[-1]
    return inside.mean(-1), np.sqrt(2.0 * inside.var(-1, ddof=1) / n), 7.0 * (high - low) / (3.0 * (n - 1))


def clopper_pearson_upper(costs: Costs, delta: float) -> Values:
    """Upper bound of the rate of unsafe responses: the 1 − δ quantile of Beta(k + 1, n − k), k of n costs above 0.

    Exact for every n: P(Binomial(n, bound) ≤ k) = δ.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits" (1934).

    Args:
        costs: f64[…, n].
        delta: δ.

    Returns:
        f64[…], 1 if all are unsafe.
    """
    k, n = (costs > 0).sum(-1), costs.shape[-1]
    return np.where(k < n, special.betaincinv(k + 1, np.maximum(n - k, 1), 1.0 - delta), 1.0)


def clopper_pearson_p_value(costs: Costs, limit: float) -> Values:
    """P(Binomial(n, limit) ≤ k) of k of n costs above 0."""
    return np.asarray(special.bdtr((costs > 0).sum(-1), costs.shape[-1], limit))


STUDENT = Bound("Student t", "mean cost", lambda costs: costs.mean(-1), student_upper, student_p_value)
CLOPPER_PEARSON = Bound(
    "Clopper–Pearson", "unsafe responses", lambda costs: (costs > 0).mean(-1), clopper_pearson_upper,
    clopper_pearson_p_value,
)  # fmt: skip


def bernstein(low: float, high: float) -> Bound:
    """Returns the empirical Bernstein bound of the mean of costs clipped to a range."""
    return Bound(
        name="empirical Bernstein",
        quantity=f"mean cost within [{low:g}, {high:g}]",
        estimate=lambda costs: np.clip(costs, low, high).mean(-1),
        upper=lambda costs, delta: bernstein_upper(costs, delta, low, high),
        p_value=lambda costs, limit: bernstein_p_value(costs, limit, low, high),
        clipped=lambda costs: int(((costs < low) | (costs > high)).sum()),
    )


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjusts p-values of m tests at once: the i-th smallest times m − i + 1, at least those before it, at most 1.

    A test passes at δ if its adjusted p-value is at most δ; the probability that one passes wrongly is then at most δ.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Args:
        p_values: f64[…, m].

    Returns:
        f64[…, m], in the same order.
    """
    order = np.argsort(p_values, axis=-1, kind="stable")
    scaled = np.take_along_axis(p_values, order, -1) * np.arange(p_values.shape[-1], 0, -1)
    adjusted = np.empty_like(p_values)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0), -1)
    return adjusted


def certificate(
    costs: Mapping[str, Mapping[str, Costs]], claims: Mapping[str, Sequence[tuple[Bound, float]]], delta: float
) -> list[dict[str, Any]]:
    """Tests every claim about every group of prompts.

    Args:
        costs: {group: {signal: f64[n]}}, n ≥ 2.
        claims: {signal: (bound, limit) pairs}.
        delta: δ, of all of them at once.

    Returns:
        A row for each: `group`, `signal`, `quantity`, `by` (the method), `n`, `clipped` costs, `estimate`, `bound` of
        this quantity alone, `bound_at_once` (all bounds of the list hold at once), `limit`, `p_value`,
        `adjusted_p_value` and `passes`. A bound that the sample does not give is None.
    """
    tests = [
        (group, signal, np.asarray(by_signal[signal], np.float64), bound, limit)
        for group, by_signal in costs.items()
        for signal, bounds in claims.items()
        for bound, limit in bounds
    ]
    p_values = np.array([bound.p_value(sample, limit) for *_, sample, bound, limit in tests], np.float64)
    rows = []
    for test, p_value, adjusted in zip(tests, p_values.tolist(), holm(p_values).tolist(), strict=True):
        group, signal, sample, bound, limit = test
        alone, at_once = (float(bound.upper(sample, share)) for share in (delta, delta / len(tests)))
        rows.append({
            "group": group, "signal": signal, "quantity": bound.quantity, "by": bound.name, "n": sample.size,
            "clipped": bound.clipped(sample), "estimate": float(bound.estimate(sample)),
            "bound": alone if np.isfinite(alone) else None, "bound_at_once": at_once if np.isfinite(at_once) else None,
            "limit": limit, "p_value": p_value, "adjusted_p_value": adjusted, "passes": adjusted <= delta,
        })  # fmt: skip
    return rows
