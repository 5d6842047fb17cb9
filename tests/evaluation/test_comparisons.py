"""Win rates, Bradley-Terry strengths and Elo of policies, from verdicts on pairs of responses."""

import numpy as np
import pytest

from safe_rlhf_jax.evaluation.comparisons import (
    bradley_terry,
    compared,
    elo,
    elo_ratings,
    order_effects,
    win_rates,
    won_by_scores,
    won_in_both_orders,
)
from safe_rlhf_jax.evaluation.statistics import paired_win_rate, sigmoid

WINS = np.array([[0, 31, 44, 57], [19, 0, 38, 49], [6, 12, 0, 33], [3, 1, 17, 0]], np.float64)
# choix 0.4.1 on these games: opt_pairwise, ilsr_pairwise and mm_pairwise with alpha=0 agree in these digits.
CHOIX = [0.0, -0.48822509, -1.99777295, -2.94003941]


def gradient(games, strengths, prior):
    """Of the log-likelihood in each strength, pair by pair."""
    found = np.zeros(len(strengths))
    for i in range(len(strengths)):
        for j in range(len(strengths)):
            if i != j:
                expected = 1 / (1 + np.exp(strengths[j] - strengths[i]))
                weight = games[i, j] + prior / 2
                found[i] += weight * (1 - expected)
                found[j] -= weight * (1 - expected)
    return found


def test_strengths_are_those_of_a_library():
    strengths = bradley_terry(WINS, prior=0.0)
    np.testing.assert_allclose(strengths - strengths[0], CHOIX, atol=1e-7)


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_strengths_are_at_the_maximum_of_the_likelihood(prior):
    rng = np.random.default_rng(0)
    for size in (2, 3, 6):
        games = rng.integers(1, 40, (size, size)) / 2
        np.testing.assert_allclose(gradient(games, bradley_terry(games, prior=prior), prior), 0.0, atol=1e-6)


def test_strengths_equal_logistic_regression_without_an_intercept():
    linear = pytest.importorskip("sklearn.linear_model")
    rows, weights = [], []
    for i, j in zip(*np.nonzero(WINS), strict=True):
        row = np.zeros(4)
        row[i], row[j] = 1.0, -1.0
        rows += [row, -row]
        weights += [WINS[i, j]] * 2
    fit = linear.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(np.array(rows), [1, 0] * (len(rows) // 2), sample_weight=weights)
    strengths = bradley_terry(WINS, prior=0.0)
    np.testing.assert_allclose(fit.coef_[0] - fit.coef_[0].mean(), strengths, atol=1e-4)


@pytest.mark.parametrize("prompts", [1, 10_000])
def test_policy_that_always_wins_has_a_finite_strength(prompts):
    games = np.triu(np.full((4, 4), float(prompts)), k=1)
    strengths = bradley_terry(games)
    np.testing.assert_allclose(gradient(games, strengths, 1.0), 0.0, atol=1e-4)
    assert (np.diff(strengths) < 0).all()


def test_two_policies_differ_by_the_logit_of_the_win_rate():
    np.testing.assert_allclose(np.diff(bradley_terry(np.array([[0, 30], [10, 0.0]]), prior=0.0)), -np.log(3))
    np.testing.assert_allclose(elo(np.array([0.3, 0.3 + np.log(10)])), [1000.0, 1400.0])


def simulated(strengths, prompts, rng):
    """Every pair of policies compared once on each prompt; some prompts suit a policy."""
    size = len(strengths)
    shift = rng.normal(0, 1, (prompts, size))
    p = sigmoid(strengths[:, None] - strengths[None] + shift[:, :, None] - shift[:, None])
    upper = np.triu(rng.random((prompts, size, size)) < p, k=1).astype(np.float64)
    return upper + np.tril(1 - np.swapaxes(upper, 1, 2), k=-1)


def test_bootstrap_intervals_of_elo_cover_the_rating_of_endless_prompts():
    strengths, rng = np.array([0.0, 0.7, -0.4]), np.random.default_rng(0)
    truth = elo(bradley_terry(simulated(strengths, 200_000, rng).sum(0)))
    covered = []
    for _ in range(150):
        ratings = elo_ratings(simulated(strengths, 120, rng), resamples=200)
        covered.append([r["low"] <= t <= r["high"] for r, t in zip(ratings, truth, strict=True)])
        assert ratings[0] == {"elo": 1000.0, "low": 1000.0, "high": 1000.0}
    assert 0.88 < np.mean(np.array(covered)[:, 1:]) <= 1.0


def test_judge_that_follows_the_position_gives_ties_and_shows_as_flips_and_bias():
    always_first = np.ones((10, 3, 3))
    assert (won_in_both_orders(always_first) == 0.5).all()
    effects = order_effects(always_first)
    assert (effects["first"]["rate"], effects["flips"]["rate"], effects["ties"]["rate"]) == (1.0, 1.0, 0.0)
    assert (effects["verdicts"], effects["first"]["n"], effects["flips"]["n"]) == (60, 10, 10)
    better = won_by_scores(np.array([[2.0, 1.0, 0.0]] * 10))
    effects = order_effects(better)
    assert (effects["first"]["rate"], effects["flips"]["rate"], effects["ties"]["rate"]) == (0.5, 0.0, 0.0)
    np.testing.assert_array_equal(won_in_both_orders(better), better)
    assert order_effects(np.full((10, 2, 2), 0.5))["ties"]["rate"] == 1.0


def test_verdict_in_one_order_and_a_tie_in_the_other_is_three_quarters_of_a_win():
    firsts = np.array([[[0.5, 1.0], [0.5, 0.5]]])
    assert won_in_both_orders(firsts)[0, 0, 1] == 0.75
    effects = order_effects(firsts)
    assert (effects["flips"]["rate"], effects["ties"]["rate"], effects["first"]["rate"]) == (0.0, 0.5, 0.75)


def test_win_rates_by_scores_are_those_of_the_evaluation():
    scores = np.random.default_rng(1).integers(0, 3, (30, 2)).astype(np.float64)
    samples = [
        [{"split": "test", "prompt": str(i), "reward": row[k]} for i, row in enumerate(scores)] for k in range(2)
    ]
    rates = win_rates(won_by_scores(scores))
    assert rates[0][1] == paired_win_rate(*samples, "reward")
    assert rates[0][0] is None


def test_axes_are_rated_apart_and_several_judges_are_averaged():
    rng = np.random.default_rng(2)
    scores = {name: rng.normal(size=(40, 2)) for name in ("reward/a", "reward/b", "cost/c")}
    won = {name: won_by_scores(values) for name, values in scores.items()}
    first_half = np.arange(40) < 20
    rows = compared(won, ["x", "y"], {"all prompts": np.ones(40, bool), "half": first_half})
    assert [(row["prompts"], row["axis"], row["judge"], row["n"]) for row in rows] == [
        (kind, axis, judge, n)
        for kind, n in (("all prompts", 40), ("half", 20))
        for axis, judge in (
            ("helpfulness", "average"), ("helpfulness", "reward/a"), ("helpfulness", "reward/b"),
            ("harmlessness", "cost/c"),
        )
    ]  # fmt: skip
    mean = (won["reward/a"] + won["reward/b"]).mean(0)[0, 1] / 2
    assert rows[0]["win_rates"][0][1]["rate"] == pytest.approx(mean)
    assert rows[3]["elo"]["y"] == elo_ratings(won["cost/c"])[1]
