"""Confidence bounds of a policy's costs: their equations, and how often they certify a policy that is at its limit."""

import numpy as np
import pytest
from scipy import stats

from safe_rlhf_jax.evaluation.certificates import CLOPPER_PEARSON, STUDENT, bernstein, certificate, holm

POLICIES = 20_000  # simulated, each at its limit
RNG = np.random.default_rng(0)
LOW, HIGH = -4.0, 6.0
BERNSTEIN = bernstein(LOW, HIGH)


def normal(size):
    return np.random.default_rng(1).normal(0.5, 2.0, size)


def two_points(size):
    """Far costs that are rare: the mean is 0.5."""
    return np.where(np.random.default_rng(2).random(size) < 0.45, HIGH, LOW)


def unsafe(rate):
    return lambda size: np.where(np.random.default_rng(3).random(size) < rate, 1.0, -1.0)


CASES = {
    "Student t of normal costs": (STUDENT, normal, 0.5, True),
    "empirical Bernstein at the ends of the range": (BERNSTEIN, two_points, 0.5, False),
    "Clopper-Pearson of rare unsafe responses": (CLOPPER_PEARSON, unsafe(0.05), 0.05, False),
    "Clopper-Pearson of frequent unsafe responses": (CLOPPER_PEARSON, unsafe(0.4), 0.4, False),
}


def monte_carlo(delta):
    return 4 * np.sqrt(delta * (1 - delta) / POLICIES)


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_at_most_delta_of_policies_at_their_limit_pass(case, delta):
    bound, costs, limit, exact = CASES[case]
    sample = costs((POLICIES, 60))
    passed = np.mean(bound.p_value(sample, limit) <= delta)
    assert passed <= delta + monte_carlo(delta)
    if exact:
        assert passed >= delta - monte_carlo(delta)


@pytest.mark.parametrize("met", [0, 2, 4])
def test_at_most_delta_of_policies_at_their_limits_in_some_groups_pass_any_of_them_after_holm(met):
    """Five groups; in `met` of them the policy is far below its limit, in the others at it."""
    delta, at_limit = 0.05, [(STUDENT, normal, 0.5), (CLOPPER_PEARSON, unsafe(0.3), 0.3)]
    p_values = []
    for group in range(5):
        bound, costs, limit = at_limit[group % 2]
        sample = costs((5, POLICIES, 40))[group] - (20.0 if group < met else 0.0)
        p_values.append(bound.p_value(sample, limit))
    p_values = np.stack(p_values, -1)
    wrong = (holm(p_values) <= delta)[:, met:].any(-1).mean()
    assert wrong <= delta + monte_carlo(delta)
    assert (holm(p_values) <= delta)[:, :met].all(), "a policy that is far below its limit passes"
    if met == 0:
        assert (p_values <= delta).any(-1).mean() > 2 * delta, "without Holm far more would pass"


@pytest.mark.parametrize("bound", [STUDENT, BERNSTEIN, CLOPPER_PEARSON], ids=lambda bound: bound.name)
@pytest.mark.parametrize("delta", [0.003, 0.05, 0.3])
def test_p_value_is_the_delta_at_which_the_bound_meets_the_limit(bound, delta):
    sample = np.random.default_rng(4).normal(-0.5, 2.0, (20, 50))
    upper = bound.upper(sample, delta)
    for costs, limit in zip(sample, upper, strict=True):
        np.testing.assert_allclose(bound.p_value(costs, float(limit)), delta, rtol=1e-6)


def test_bounds_are_those_of_scipy_and_of_the_theorem():
    costs = np.random.default_rng(5).normal(0.2, 1.0, 30)
    expected = stats.ttest_1samp(costs, 0.0, alternative="less").confidence_interval(0.95).high
    np.testing.assert_allclose(STUDENT.upper(costs, 0.05), expected)
    np.testing.assert_allclose(STUDENT.p_value(costs, 0.4), stats.ttest_1samp(costs, 0.4, alternative="less").pvalue)
    exact = stats.binomtest(int((costs > 0).sum()), 30, 0.7, alternative="less")
    np.testing.assert_allclose(CLOPPER_PEARSON.p_value(costs, 0.7), exact.pvalue)
    interval = exact.proportion_ci(0.95, "exact")
    np.testing.assert_allclose(CLOPPER_PEARSON.upper(costs, 0.05), interval.high)
    unit, log = np.clip(costs, LOW, HIGH), np.log(2 / 0.05)
    half = np.sqrt(2 * unit.var(ddof=1) * log / 30) + 7 * (HIGH - LOW) * log / (3 * 29)
    np.testing.assert_allclose(BERNSTEIN.upper(costs, 0.05), unit.mean() + half)


def test_costs_out_of_the_stated_range_are_clipped_and_counted():
    costs = np.array([-9.0, 0.0, 1.0, 20.0, 30.0])
    assert BERNSTEIN.clipped(costs) == 3
    np.testing.assert_allclose(BERNSTEIN.estimate(costs), (LOW + 0 + 1 + HIGH + HIGH) / 5)


def test_holm_adjusts_in_the_order_of_the_p_values():
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03, 0.9])), [0.09, 0.04, 0.09, 0.9])
    np.testing.assert_array_equal(holm(np.array([0.6, 0.7])), [1.0, 1.0])


def test_student_certifies_nothing_without_a_spread():
    (row,) = certificate({"all": {"cost": np.full(50, -1.0)}}, {"cost": [(STUDENT, 0.0)]}, 0.05)
    assert (row["bound"], row["p_value"], row["passes"]) == (None, 1.0, False)


def test_certificate_has_a_row_for_every_group_and_bound_and_its_simultaneous_bounds():
    rng = np.random.default_rng(6)
    costs = {group: {"cost": rng.normal(mean, 1.0, 400)} for group, mean in (("a", -3.0), ("b", 0.5))}
    claims = {"cost": [(STUDENT, 0.0), (BERNSTEIN, 0.0), (CLOPPER_PEARSON, 0.1)]}
    rows = certificate(costs, claims, 0.05)
    assert [(row["group"], row["by"]) for row in rows][:4] == [
        ("a", "Student t"), ("a", "empirical Bernstein"), ("a", "Clopper–Pearson"), ("b", "Student t"),
    ]  # fmt: skip
    assert [row["passes"] for row in rows] == [True] * 3 + [False] * 3
    for row in rows:
        assert row["estimate"] < row["bound"] < row["bound_at_once"]
        assert row["p_value"] <= row["adjusted_p_value"]
    np.testing.assert_allclose(rows[0]["bound_at_once"], STUDENT.upper(costs["a"]["cost"], 0.05 / 6))
