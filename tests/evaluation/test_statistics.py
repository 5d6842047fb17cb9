"""Rates, means and their intervals."""

import math
import warnings

import numpy as np
import pytest

from safe_rlhf_jax.evaluation.statistics import (
    ALL,
    QUADRANTS,
    bootstrap_interval,
    breakdowns,
    expected_calibration_error,
    largest,
    paired_win_rate,
    quadrants,
    reliability_curve,
    summarize,
    wilson_interval,
    win_rate,
)


def sample(**changes):
    base = {
        "prompt": "p",
        "response": "a b a b",
        "group": "risky",
        "split": "test",
        "category": "theft",
        "reward": 1.0,
        "cost": -1.0,
        "kl": 0.5,
        "length": 4,
        "truncated": False,
        "helpfulness": 0.5,
        "harmful": False,
        "severity": 0,
        "refusal": False,
    }
    return base | changes


def test_bootstrap_interval_matches_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(3).normal(2.0, 3.0, size=2500)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_interval_is_deterministic_and_widens_with_confidence():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    narrow, wide = bootstrap_interval(values, confidence=0.5), bootstrap_interval(values, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_interval_of_a_constant_is_a_point():
    assert bootstrap_interval([2.0] * 7) == (2.0, 2.0)


def test_bootstrap_interval_refuses_an_empty_list():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


def test_wilson_interval_equals_a_published_value():
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_wilson_interval_is_symmetric_and_contains_the_share():
    for successes, n in ((0, 5), (5, 5), (2, 7), (2.5, 7)):
        low, high = wilson_interval(successes, n)
        mirrored = wilson_interval(n - successes, n)
        assert 0 <= low <= successes / n <= high <= 1
        assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_wilson_interval_without_trials_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_refuses_impossible_counts():
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(3, 2)


def test_win_rate_counts_a_tie_as_half():
    result = win_rate([1, 2, 3, 4], [0, 2, 5, 1])  # win, tie, loss, win
    assert result["rate"] == 2.5 / 4
    assert result["low"] < result["rate"] < result["high"]


def test_win_rates_of_both_sides_add_up_to_one():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 100), rng.integers(0, 4, 100)
    forward, backward = win_rate(a, b), win_rate(b, a)
    assert forward["rate"] + backward["rate"] == pytest.approx(1)
    assert forward["low"] == pytest.approx(1 - backward["high"])


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_win_rate_refuses_unpaired_scores(a, b):
    with pytest.raises(ValueError, match="equally long"):
        win_rate(a, b)


def test_paired_win_rate_pairs_by_prompt_not_by_position():
    a = [sample(prompt="p", reward=2.0), sample(prompt="q", reward=0.0), sample(prompt="only a", reward=9.0)]
    b = [sample(prompt="q", reward=-1.0), sample(prompt="p", reward=1.0)]
    result = paired_win_rate(a, b, "reward")
    assert result is not None
    assert result["rate"] == 1.0
    lower = paired_win_rate(a, b, "reward", lower_wins=True)
    assert lower is not None
    assert lower["rate"] == 0.0
    assert paired_win_rate(a, [], "reward") is None


def test_calibrated_probabilities_have_no_calibration_error():
    probabilities = np.repeat([0.25, 0.75], 4)
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 0])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0)
    assert reliability_curve(probabilities, labels) == [(0.25, 0.25, 4), (0.75, 0.75, 4)]


def test_calibration_error_weighs_bins_by_their_count():
    # Three at 0.9 that are all false, one at 0.1 that is false: 3/4 · 0.9 + 1/4 · 0.1.
    assert expected_calibration_error([0.9, 0.9, 0.9, 0.1], [0, 0, 0, 0]) == pytest.approx(0.7)


def test_certain_probabilities_fall_into_the_last_bin():
    assert reliability_curve([1.0, 0.0], [1, 0], bins=2) == [(0.0, 0.0, 1), (1.0, 1.0, 1)]
    assert reliability_curve([], []) == []
    assert expected_calibration_error([], []) == 0.0


def test_largest_names_stay_and_the_rarest_go_together():
    names = ["b"] * 3 + ["a"] * 2 + ["d", "c"]
    assert largest(names, 4) == {"a": ("a",), "b": ("b",), "c": ("c",), "d": ("d",)}
    assert largest(names, 3) == {"a": ("a",), "b": ("b",), "2 others": ("c", "d")}
    assert largest([], 3) == {}


def test_quadrants_are_the_shares_of_helpful_and_harmless_responses():
    samples = [sample(reward=2.0), sample(reward=2.0, cost=0.0), sample(reward=1.0, cost=3.0), sample(cost=None)]
    assert quadrants(samples, 1.0) == dict(zip(QUADRANTS, (2 / 3, 0, 0, 1 / 3), strict=True))
    assert quadrants([], 1.0) == {}


def test_breakdown_is_of_harm_where_it_is_known_and_else_of_positive_costs():
    first = [sample(harmful=True, cost=-1.0), sample(group="law"), sample(split="redteam", harmful=True)]
    known = breakdowns({"a": first, "b": first[:1]}, {})
    by_prompts = known["harmful responses, by prompts"]
    assert by_prompts == {
        "law": {"a": (0.0, 1), "b": (0, 0)}, "risky": {"a": (1.0, 1), "b": (1.0, 1)},
        "red team": {"a": (1.0, 1), "b": (0, 0)},
    }  # fmt: skip
    unknown = breakdowns({"a": [s | {"harmful": None, "group": "all"} for s in first]}, {})
    assert unknown == {"responses with cost > 0, by prompts": {ALL: {"a": (0.0, 2)}, "red team": {"a": (0.0, 1)}}}


def test_breakdown_is_by_the_parts_that_were_measured_or_else_by_category():
    samples = [sample(), sample(category="law_and,order", harmful=True)]
    assert breakdowns({"a": samples}, {})["harmful responses, by category"] == {
        "law and, order": {"a": (1.0, 1)}, "theft": {"a": (0.0, 1)}
    }  # fmt: skip
    parts = [s | {"measured": {f"harm_by/{s['category']}": s["harmful"]}} for s in samples]
    found = breakdowns({"a": parts}, {"harm_by": "harm, by part"})
    assert list(found) == ["harmful responses, by prompts", "harm, by part"]
    assert found["harm, by part"]["theft"] == {"a": (0.0, 1)}


def test_summarize_averages_what_an_oracle_measured_and_splits_the_models_opinions():
    samples = [
        sample(measured={"harm": True, "harm_by/theft": True, "help": 0.25}, cost=2.0),
        sample(measured={"harm": False, "harm_by/fraud": False, "help": 0.75}),
        sample(measured={"harm_redteam": True}, split="redteam", cost=3.0),
        sample(group="benign", reward=-1.0),
        sample(group="sensitive"),
    ]
    summary = summarize(samples)
    assert summary["harm"] == 0.5
    assert (summary["harm_low"], summary["harm_high"]) == wilson_interval(1, 2)
    assert (summary["help"], summary["help_low"], summary["help_high"]) == (0.5, 0.25, 0.75)
    assert summary["harm_redteam"] == 1.0
    assert summary["harm_by/theft"] == 1.0
    assert summary["harm_by/fraud"] == 0.0
    assert "harm_by/theft_low" not in summary
    assert summary["reward_mean"] == 0.5  # red-team samples do not count
    assert summary["cost_mean"] == -0.25
    assert summary["cost_positive_share"] == 0.25
    assert summary["cost_positive_share/risky"] == 0.5
    assert summary["cost_positive_share/benign"] == 0.0
    assert summary["cost_positive_share_redteam"] == 1.0
    assert summary["kl_mean"] == 0.5
    assert summary["length_mean"] == 4
    assert summary["truncation_rate"] == 0
    assert summary["distinct_1"] == 2 / 16
    assert summary["same_opening"] == 1.0
    assert all(isinstance(value, float) and math.isfinite(value) for value in summary.values())


def test_summarize_leaves_out_what_only_an_oracle_knows():
    blind = {"helpfulness": None, "harmful": None, "severity": None, "refusal": None}
    summary = summarize([sample(**blind), sample(group="benign", **blind)])
    assert not [key for key in summary if key.startswith(("harm", "help", "refusal"))]
    assert summary["reward_mean"] == 1.0


def test_summarize_of_nothing_is_empty_and_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summarize([]) == {}
