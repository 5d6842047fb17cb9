"""Averages of outside judges, and their views of policies, on made-up scores."""

import numpy as np
import pytest

from safe_rlhf_jax.evaluation import judge_tables, tables
from safe_rlhf_jax.evaluation.evaluate import measured_pairs
from safe_rlhf_jax.evaluation.judges import AVERAGE, OWN, add_averages, reward_units, views
from safe_rlhf_jax.evaluation.statistics import summarize


def sample(prompt, group="risky", split="test", refusal=None, **judged):
    signals = {name.replace("_", "/"): score for name, score in judged.items()}
    return {"prompt": prompt, "response": prompt, "group": group, "split": split, "judged": signals} | (
        {} if refusal is None else {"refusal": refusal, "refusal_by": "rule"}
    )


def test_costs_are_averaged_as_probabilities_and_rewards_in_standard_deviations():
    samples = [sample("a", cost_x=4.0, cost_y=-1.0, reward_x=0.0, reward_y=300.0)]
    samples += [sample("b", cost_x=-4.0, cost_y=1.0, reward_x=2.0, reward_y=100.0)]
    units = reward_units(samples)
    assert units == {"reward/x": 1.0, "reward/y": 100.0}
    add_averages(samples, units)
    sigmoid = 1 / (1 + np.exp(-np.array([4.0, -1.0])))
    assert samples[0]["judge_unsafe"] == pytest.approx(sigmoid.mean())
    assert [s["judge_unsafe"] > 0.5 for s in samples] == [True, False]
    assert [s["judge_reward"] for s in samples] == [1.5, 1.5]
    assert summarize(samples)["judge_unsafe_share"] == 0.5


def test_scores_that_are_all_the_same_have_no_unit_and_one_judge_stands_for_itself():
    samples = [sample("a", reward_x=3.0), sample("b", reward_x=3.0)]
    assert reward_units(samples) == {"reward/x": 1.0}
    assert [row["judge"] for row in views({"start": samples})] == [AVERAGE]
    assert views({"start": [sample("a")]}) == []


def test_views_have_shares_and_win_rates_against_each_earlier_policy_on_each_kind_of_prompts():
    policies = {
        "start": [sample("a", cost_x=1.0, reward_x=0.0), sample("b", "benign", cost_x=-1.0, reward_x=0.0)],
        "middle": [sample("a", cost_x=1.0, reward_x=0.0), sample("b", "benign", cost_x=-1.0, reward_x=2.0)],
        "end": [sample("a", cost_x=-1.0, reward_x=-1.0), sample("b", "benign", cost_x=-2.0, reward_x=1.0)],
    }
    rows = {(row["policy"], row["prompts"]): row for row in views(policies)}
    assert rows["start", "risky"]["unsafe"]["rate"] == 1.0
    assert "wins" not in rows["start", "risky"]
    wins = rows["end", "risky"]["wins"]
    assert {name: {kind: rate["rate"] for kind, rate in won.items()} for name, won in wins.items()} == {
        "start": {"reward": 0.0, "cost": 1.0}, "middle": {"reward": 0.0, "cost": 1.0},
    }  # fmt: skip
    assert rows["middle", "risky"]["wins"]["start"]["cost"] == {"rate": 0.5} | {
        key: rows["middle", "risky"]["wins"]["start"]["reward"][key] for key in ("low", "high", "n")
    }
    table = judge_tables.judged(views(policies), {}, average=True)
    assert table.heads[-1] == "safer than middle"
    assert {len(row) for row in table.rows} == {len(table.heads)}


def test_table_of_agreement_has_ranking_and_sign_of_each_model_with_intervals():
    preferred, other = np.array([-1.0, -2.0, 1.0]), np.array([1.0, 2.0, 2.0])
    lengths, labels = (np.ones(3), np.ones(3)), np.array([[True, True, False], [False, False, False]])
    found = {"cost": {OWN: measured_pairs((preferred, other), lengths, labels, [])}}
    (row,) = judge_tables.agreement(found).rows
    assert [cell.text for cell in row] == ["cost pairs", OWN, "3", "100.0%", "100.0%", "100.0%", "100.0%"]
    assert row[3].interval == "43.9% to 100.0%"
    assert judge_tables.agreement({}) is None


def test_refusals_are_shown_by_kind_of_prompts_with_their_reader_and_the_judges_view():
    samples = [sample("a", "safe", refusal=True, cost_x=-1.0), sample("b", "unsafe", refusal=False, cost_x=2.0)]
    add_averages(samples, {})
    table = tables.refusals({"start": samples}, {"start": "#000000"})
    assert table.heads == ["policy", "prompts", "refusals, by the rule", "unsafe, by the judges"]
    assert [[cell.text for cell in row[1:]] for row in table.rows] == [
        ["safe", "100.0%", "0.0%"], ["unsafe", "0.0%", "100.0%"],
    ]  # fmt: skip
    assert tables.refusals({"start": [sample("a")]}, {"start": ""}) is None
    summary = summarize(samples)
    assert (summary["refusal_rate"], summary["refusal_rate/safe"]) == (0.5, 1.0)


def test_length_and_diversity_are_shown_by_kind_of_prompts_where_there_are_several():
    samples = [sample("a", "safe") | {"length": 4}, sample("b", split="redteam") | {"length": 2}]
    table = tables.texts_by_kind({"start": samples}, {"start": ""})
    assert [[cell.text for cell in row[1:3]] for row in table.rows] == [["test prompts", "4.00"], ["red team", "2.00"]]
    assert tables.texts_by_kind({"start": samples[:1]}, {"start": ""}) is None
