"""The judge stage: policies against each other by judges of one response and of two."""

import json

import numpy as np
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.endpoints import Usage
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.evaluation.comparisons import elo_ratings, won_by_scores
from safe_rlhf_jax.stages import Run, check_run, run_stage
from safe_rlhf_jax.stages.pair_judges import firsts, pair_judges, won_by_votes
from safe_rlhf_jax.stages.people import WaitingForLabelsError
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


def finished(folder, stage):
    run = run_of(folder, stage)
    check_run(run)
    run_stage(run, run.config.stages[0])


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
        finished(folder, stage)
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


class Endpoint:
    """An endpoint that always names the first response, or gives no verdict on safety."""

    def __init__(self, **settings):
        self.model, self.usage, self.asked = settings["model"], Usage(), []

    def answers(self, conversations, **sampling):
        self.asked += [turns[-1]["content"] for turns in conversations]
        return ["A" if "more helpful" in turns[-1]["content"] else "neither" for turns in conversations]


CONVERSATIONS = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]
RESPONSES = [[f"yes {i}" for i in range(3)], [f"no {i}" for i in range(3)]]
SERVED = {"base_url": "http://127.0.0.1:9/v1", "model": "judge"}


def pair_stage(folder, **judges):
    prompts = [{"name": "demo/prompts"}]
    stage = {"name": "compared", "kind": "judge", "policies": ["path:a", "path:b"], "prompts": prompts}
    config = cfg.RunConfig(
        workdir=str(folder), max_bad_records=1.0, stages=[stage | {"pair_judges": judges}],
    )  # fmt: skip
    return Run(config), config.stages[0]


def test_endpoint_is_asked_by_the_constitution_in_both_orders_and_without_a_verdict_it_is_a_tie(tmp_path, monkeypatch):
    monkeypatch.setattr("safe_rlhf_jax.stages.judge_labeller.Endpoint", Endpoint)
    (tmp_path / "own.yaml").write_text("helpfulness: be brief\nsafety: be kind\n")
    judge = SERVED | {"constitution": str(tmp_path / "own.yaml")}
    run, stage = pair_stage(tmp_path, **{"reward/judge": judge, "cost/judge": judge})
    assert stage.files() == (str(tmp_path / "own.yaml"),) * 2
    found = pair_judges(run, stage)
    helpful, safe = (firsts(judge, CONVERSATIONS, RESPONSES, 2) for judge in found.values())
    assert helpful[:, [0, 1], [1, 0]].tolist() == [[1.0, 1.0]] * 3  # the first one, whichever it is
    assert (safe == 0.5).all()
    assert [judge.said()["no_verdict"] for judge in found.values()] == [0.0, 6.0]
    asked = found["reward/judge"].compare.func.__self__.endpoint.asked
    assert len(set(asked)) == 6
    assert all("be brief" in text and "question" in text for text in asked)


def test_people_see_each_pair_once_and_their_votes_are_the_shares_won(tmp_path):
    same = [RESPONSES[0], [*RESPONSES[1][:2], RESPONSES[0][2]]]
    with pytest.raises(WaitingForLabelsError, match="waiting for labels of 2 pairs"):
        won_by_votes(tmp_path, CONVERSATIONS, same, 0)
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    lines = ["pair,annotator,better,safer,harm_a,harm_b"]
    for who in "xyz":  # all find "yes" more helpful, one of three finds it safer; nobody answers about the second pair
        yes, no = ("A", "B") if tasks[0]["data"]["response_a"].startswith("yes") else ("B", "A")
        lines.append(f"{tasks[0]['data']['pair']},{who},{yes},{yes if who == 'x' else no},,")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    won, counts = won_by_votes(tmp_path, CONVERSATIONS, same, 0)
    assert won["reward"][:, 0, 1].tolist() == [1.0, 0.5, 0.5]
    assert won["cost"][:, 0, 1] == pytest.approx([1 / 3, 0.5, 0.5])
    assert won["cost"][:, 1, 0] == pytest.approx([2 / 3, 0.5, 0.5])
    assert counts == {"pairs": 2, "without_better_votes": 1, "without_safer_votes": 1}


def test_stage_waits_for_people_and_goes_on_with_their_answers(models, tmp_path):
    stage = judge(models, prompts=PROMPTS[:1], judges={}, pair_judges={"cost/people": "people"})
    with pytest.raises(WaitingForLabelsError):
        finished(tmp_path, stage)
    folder = tmp_path / "run" / "compared"
    names = [task["data"]["pair"] for task in json.loads((folder / "tasks.json").read_text())]
    answers = [f"{name},x,A,A,," for name in names]
    (folder / "labels.csv").write_text("\n".join(["pair,annotator,better,safer,harm_a,harm_b", *answers]))
    finished(tmp_path, stage)
    result = json.loads((folder / "result.json").read_text())
    assert [row["judge"] for row in result["comparisons"]] == ["cost/people"]
    assert result["people"] == {"pairs": len(names), "without_better_votes": 0, "without_safer_votes": 0}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"pair_judges": {"reward/a": SERVED | {"key_env": "NO_SUCH_KEY"}}},
            ["no key", "NO_SUCH_KEY"],
        ),
        ({"pair_judges": {"reward/a": SERVED | {"constitution": "none.yaml"}}}, ["none.yaml", "cannot be read"]),
        ({"pair_judges": {"reward/a": {"model": "judge"}}}, ["pair_judges.reward/a.base_url", "missing"]),
        ({"pair_judges": {"reward/a": SERVED | {"keyenv": "X"}}}, ["reward/a.keyenv", "key_env"]),
        ({"pair_judges": {"reward/a": "people", "reward/b": "people"}}, ["same answers of people"]),
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
