"""Stages whose judge is a policy of ours behind our own server, over HTTP, and what a kill costs."""

import json

import numpy as np
import pytest
import yaml

from safe_rlhf_jax import train
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.metrics import read_jsonl, write_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.serve import load_engine, parse_arguments
from safe_rlhf_jax.serving.answers import Piece
from tests.helpers import make_lm, save_models, tiny_config
from tests.serving.conftest import KEY, at_address

PAIRS = 10
KILLED = """
import os
os.environ["JUDGE_KEY"] = {key!r}
from tests import moments
kept = []
def die(path, *rest):
    kept.extend([path] if path.parent.name == "answers" else [])
    if len(kept) == {answers}:
        moments.die()
moments.after("storage:write", die)
"""


class Counted:
    """An application that keeps the questions it is asked."""

    def __init__(self, app):
        self.app, self.questions = app, []

    async def __call__(self, scope, receive, send):
        if scope["path"].endswith("/chat/completions"):
            event = await receive()
            while event.get("more_body"):
                more = await receive()
                event = more | {"body": event["body"] + more["body"]}
            self.questions.append(json.loads(event["body"])["messages"][-1]["content"])
            told = iter([event])

            async def replayed():
                return next(told, None) or await receive()

            await self.app(scope, replayed, send)
        else:
            await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The server of a tiny policy with room for questions; its device is not started before it is asked."""
    folder, tokenizer = tmp_path_factory.mktemp("judge"), load_tokenizer("demo")
    module, variables = make_lm(tiny_config(vocab_size=tokenizer.vocab_size, max_positions=2048))
    hf.save(folder / "policy", module, variables, tokenizer.hf)
    arguments = f"{folder / 'policy'} --max-prompt 2000 --max-tokens 16 --batch 4 --queue 16"
    engine = load_engine(parse_arguments(arguments.split()))
    engine.thread.start()
    counted = []
    with at_address(engine, lambda app: counted.append(Counted(app)) or counted[0]) as found:
        found.questions = counted[0].questions
        yield found


@pytest.fixture
def said(judge, monkeypatch):
    """The judge with scripted answers in place of the device's: the longer response is better, the other safer."""

    def generate(answers):
        for answer in answers:
            text = verdict(answer.job.turns[-1]["content"])
            answer.job.deliver(Piece(answer.choice, text, "stop", tokens=2))

    monkeypatch.setattr(judge.engine, "generate", generate)
    judge.questions.clear()
    return judge


def verdict(question):
    if "Is the response harmful?" in question:
        return "harmful" if "bad" in question.split("Response:")[1].split("Is the")[0] else "harmless"
    first, second = question.split("Response A:")[1].split("Which response")[0].split("Response B:")
    is_longer = len(first.strip()) > len(second.strip())
    return "A" if is_longer == ("more helpful" in question.rsplit("Which", 1)[1]) else "B"


def config_of(folder, url, **settings):
    records = [{"prompt": f"question {i}", "responses": [f"a bad answer {i}", f"no {i}"]} for i in range(PAIRS)]
    write_jsonl(folder / "samples.jsonl", records)
    (folder / "principles.yaml").write_text("helpfulness: be brief.\nsafety: harm nobody.\n")
    labeller = {"kind": "judge", "base_url": url, "model": "policy", "key_env": "JUDGE_KEY", "concurrency": 1}
    labeller |= {"constitution": str(folder / "principles.yaml")}
    stage = {"name": "label", "kind": "label", "samples": {"name": str(folder / "samples.jsonl")}, "batch_size": 8}
    return written(folder, stage | {"labeller": labeller}, **settings)


def written(folder, *stages, **settings):
    (folder / "config.yaml").write_text(yaml.safe_dump({"workdir": str(folder / "run"), "stages": stages} | settings))
    return folder / "config.yaml"


def test_our_server_judges_and_a_killed_run_asks_it_nothing_twice(said, train_process, tmp_path):
    config = config_of(tmp_path, said.url)
    for answers in (5, 46):  # in the first batch of eight pairs; in the second one, of two
        process = train_process(config=config, prelude=KILLED.format(key=KEY, answers=answers))
        assert process.returncode == -9, process.stderr
    assert len(said.questions) == 51
    process = train_process(config=config, prelude=KILLED.format(key=KEY, answers=-1))
    assert process.returncode == 0, process.stderr
    assert len(said.questions) == len(set(said.questions)) == 6 * PAIRS
    labelled = read_jsonl(tmp_path / "run" / "label" / "data.jsonl")
    assert len(labelled) == PAIRS
    for record in labelled:
        longer = int("bad" in record["response_1"])
        assert (record["better_response_id"], record["safer_response_id"]) == (longer, 1 - longer)
        assert record["better_votes"] == [longer] * 2
        assert [record["is_response_0_safe"], record["is_response_1_safe"]] == [longer == 1, longer == 0]
        assert record["labelled_by"]["model"] == "policy"
    metrics = json.loads((tmp_path / "run" / "label" / "result.json").read_text())["metrics"]
    assert (metrics["no_verdict"], metrics["better_flipped"]) == (0.0, 0.0)


def test_our_server_compares_policies_and_a_killed_run_asks_it_nothing_twice(said, train_process, tmp_path):
    tokenizer = load_tokenizer("demo")
    config = tiny_config(vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, head_dim=4)
    save_models(tmp_path, "ab", config, tokenizer.hf)
    judge = {"base_url": said.url, "model": "policy", "key_env": "JUDGE_KEY", "concurrency": 1}
    stage = {
        "name": "compared", "kind": "judge", "policies": [f"path:{tmp_path}/a", f"path:{tmp_path}/b"],
        "prompts": [{"name": "demo/prompts", "split": "test", "limit": 8}], "max_prompt_length": 40,
        "max_response_length": 6, "batch_size": 8, "pair_judges": {"reward/served": judge, "cost/served": judge},
    }  # fmt: skip
    config = written(tmp_path, stage, template="plain", execution={"scan_layers": False})
    process = train_process(config=config, prelude=KILLED.format(key=KEY, answers=20))
    assert process.returncode == -9, process.stderr
    assert len(said.questions) == 20
    process = train_process(config=config, prelude=KILLED.format(key=KEY, answers=-1))
    assert process.returncode == 0, process.stderr
    assert len(said.questions) == len(set(said.questions)) == 2 * 2 * 8
    result = json.loads((tmp_path / "run" / "compared" / "result.json").read_text())
    rows = {row["judge"]: row["win_rates"][0][1]["rate"] for row in result["comparisons"]}
    responses = [sample["response"] for sample in read_jsonl(tmp_path / "run" / "compared" / "samples.jsonl")]
    longer = np.mean([len(a) > len(b) for a, b in zip(responses[:8], responses[8:], strict=True)])
    assert rows == {"reward/served": longer, "cost/served": 1 - longer}
    assert [found["flips"]["rate"] for found in result["order_effects"].values()] == [0, 0]
    assert [found["no_verdict"] for found in result["endpoints"].values()] == [0, 0]
    assert [found["requests"] + found["answers_kept"] for found in result["endpoints"].values()] == [16, 16]


def test_answers_of_a_policy_that_cannot_judge_are_no_verdicts_and_are_kept(judge, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge.questions.clear()
    config = config_of(tmp_path, judge.url)
    for _ in range(2):
        assert train.main(["--config", str(config)]) == 1
        assert "answers of policy are no verdict, such as" in capsys.readouterr().err
        assert len(judge.questions) == 48  # of the first batch, once


def test_wrong_key_is_one_line(said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    assert train.main(["--config", str(config_of(tmp_path, said.url))]) == 1
    error = capsys.readouterr().err
    assert "the key is refused" in error
    assert "check the environment variable JUDGE_KEY" in error
    assert error.count("\n") == 1
