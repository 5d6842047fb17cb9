"""The judge stage: policies against each other by judges of one response and of two."""

import json

import numpy as np
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.evaluation.comparisons import elo_ratings, won_by_scores
from safe_rlhf_jax.stages import Run, check_run, run_stage
from tests.helpers import save_models, tiny_config

TOKENIZER = load_tokenizer("demo")
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=1, head_dim=4)
PROMPTS = [
    {"name": "demo/prompts", "split": "test", "limit": 16},
    {"name": "demo/prompts", "split": "redteam", "limit": 8},
]
FUNCTIONS = """
import math
def longer(conversations, first, second):
    assert [turns[-1]["role"] for turns in conversations] == ["user"] * len(first)
    return [len(a) - len(b) for a, b in zip(first, second)]
def first_shown(conversations, first, second):
    return [1.0] * len(first)
def length(conversations, responses, ended):
    return [float(len(response)) for response in responses]
def too_few(conversations, first, second):
    return [0.0]
def not_a_number(conversations, first, second):
    return [math.nan] * len(first)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, "ab", CONFIG, TOKENIZER.hf)
    (folder / "pair_functions.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(autouse=True)
def _path(models, monkeypatch):
    monkeypatch.syspath_prepend(str(models))


def judge(models, **settings):
    return {
        "name": "compared", "kind": "judge", "policies": [f"path:{models}/a", f"path:{models}/b"], "prompts": PROMPTS,
        "max_prompt_length": 40, "max_response_length": 6, "batch_size": 16,
        "judges": {"reward/length": "function:pair_functions:length"},
    } | settings  # fmt: skip


def run_of(folder, stage):
    tree = {"workdir": str(folder / "run"), "template": "plain", "execution": {"scan_layers": False}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"stages": [stage]}))
    return Run(cfg.load_config(folder / "config.yaml", []))


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):
    """The folder of a finished stage with judges of every sort."""
    folder = tmp_path_factory.mktemp("compared")
    pair = {"reward/longer": "function:pair_functions:longer", "cost/first": "function:pair_functions:first_shown"}
    stage = judge(
        models, judges={"reward/length": "function:pair_functions:length", "cost/model": f"path:{models}/cost"},
        pair_judges=pair,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(models))
        run = run_of(folder, stage)
        check_run(run)
        run_stage(run, run.config.stages[0])
    return folder / "run" / "compared"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_judge_of_two_responses_agrees_with_one_that_scores_each_by_the_same_rule(compared, models):
    rows = {
        (row["judge"], row["prompts"]): row for row in json.loads((compared / "result.json").read_text())["comparisons"]
    }
    alone, pairs = rows["reward/length", "all prompts"], rows["reward/longer", "all prompts"]
    assert alone["win_rates"] == pairs["win_rates"]
    assert alone["elo"] == pairs["elo"]
    samples = lines(compared / "samples.jsonl")
    policies = [f"path:{models}/a", f"path:{models}/b"]
    lengths = np.array([[len(s["response"]) for s in samples if s["policy"] == name] for name in policies], float).T
    assert list(alone["elo"].values()) == elo_ratings(won_by_scores(lengths))
    assert len({s["response"] for s in samples}) > 10
    assert {row["prompts"] for row in rows.values()} == {"all prompts", "test prompts", "red team"}
    assert rows["average", "red team"]["n"] == 8


def test_position_bias_flips_and_every_verdict_are_reported(compared):
    orders = json.loads((compared / "result.json").read_text())["order_effects"]
    first, longer = orders["cost/first"], orders["reward/longer"]
    assert (first["first"]["rate"], first["flips"]["rate"], first["verdicts"]) == (1.0, 1.0, 48)
    assert (longer["first"]["rate"], longer["flips"]["rate"]) == (0.5, 0.0)
    verdicts = lines(compared / "verdicts.jsonl")
    assert len(verdicts) == 2 * 48
    samples = lines(compared / "samples.jsonl")
    text = {(s["policy"], i % 24): s["response"] for i, s in enumerate(samples)}
    for verdict in verdicts:
        a, b = (len(text[verdict[side], verdict["prompt"]]) for side in ("first", "second"))
        expected = 1.0 if verdict["judge"] == "cost/first" else (1 + np.sign(a - b)) / 2
        assert verdict["for_first"] == expected


def test_lower_cost_is_safer_and_the_report_has_the_figure_of_both_axes(compared):
    result = json.loads((compared / "result.json").read_text())
    rows = {(row["judge"], row["prompts"]): row for row in result["comparisons"]}
    by_policy = {}
    for sample in lines(compared / "samples.jsonl"):
        by_policy.setdefault(sample["policy"], []).append(sample["judged"]["cost/model"])
    first, second = map(np.array, by_policy.values())
    assert rows["cost/model", "all prompts"]["win_rates"][1][0]["rate"] == np.mean(second < first)
    assert [name.rpartition("/")[2] for name in result["metrics"]] == ["helpfulness_elo"] * 2 + ["harmlessness_elo"] * 2
    page = (compared / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "Helpfulness by average, Elo on 24 prompts" in page
    assert "for the first shown" in page


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"judges": {}}, ["nobody judges"]),
        ({"policies": ["path:x"]}, ["policies", "at least 2"]),
        ({"policies": ["path:x", "path:x"]}, ["policies", "names must differ"]),
        ({"pair_judges": {"better": "function:pair_functions:longer"}}, ["pair_judges", "reward/NAME or cost/NAME"]),
        ({"pair_judges": {"reward/a": "path:x"}}, ["pair_judges.reward/a", "sees no two responses"]),
        ({"pair_judges": {"reward/length": "function:pair_functions:longer"}}, ["is in judges and in pair_judges"]),
        (
            {"pair_judges": {"reward/a": "function:pair_functions:lnger"}},
            ["pair_judges.reward/a", "did you mean 'longer'"],
        ),
        ({"pair_judges": {"reward/a": "function:pair_functions:too_few"}}, ["pair_judges.reward/a", "shape (1,)"]),
        (
            {"pair_judges": {"reward/a": "function:pair_functions:not_a_number"}},
            ["pair_judges.reward/a", "returned nan"],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else json.dumps(value)[:60],
)
def test_comparison_that_cannot_be_made_is_refused_before_the_first_stage(models, tmp_path, settings, parts):
    with pytest.raises(UserError) as caught:
        check_run(run_of(tmp_path, judge(models, **settings)))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
