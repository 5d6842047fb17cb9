"""The certify stage: it says yes or "no safe policy found", in its result, its report and its exit status."""

import json

import numpy as np
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import train
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.errors import NotCertifiedError, UserError
from safe_rlhf_jax.evaluation.certificates import STUDENT
from safe_rlhf_jax.stages import Run, check_run, run_stage
from tests.helpers import save_models, tiny_config

TOKENIZER = load_tokenizer("demo")
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=1, head_dim=4)
PROMPTS = {"name": "demo/prompts", "split": "test", "limit": 40}
FUNCTIONS = """
import zlib
def digit(conversations, responses, ended):
    return [zlib.crc32(repr((turns, text)).encode()) % 10 for turns, text in zip(conversations, responses)]
def far_below(*texts):
    return [-1.0 - 0.1 * number for number in digit(*texts)]
def above(*texts):
    return [1.0 + 0.1 * number for number in digit(*texts)]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, "a", CONFIG, TOKENIZER.hf)
    (folder / "cost_functions.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(autouse=True)
def _path(models, monkeypatch):
    monkeypatch.syspath_prepend(str(models))


def certify(models, **settings):
    return {
        "name": "certificate", "kind": "certify", "policy": f"path:{models}/a", "prompts": [PROMPTS],
        "max_prompt_length": 24, "max_response_length": 4, "judges": {"cost/far": "function:cost_functions:far_below"},
        "claims": {"cost/far": {"mean": 0.0, "range": [-3, 1], "unsafe": 0.2}},
    } | settings  # fmt: skip


def config_of(folder, *stages):
    tree = {"workdir": str(folder / "run"), "template": "plain", "execution": {"scan_layers": False}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"stages": list(stages)}))
    return folder / "config.yaml"


def finished(folder, *stages):
    run = Run(cfg.load_config(config_of(folder, *stages), []))
    check_run(run)
    for stage in run.config.stages:
        run_stage(run, stage)
    return json.loads((folder / "run" / "certificate" / "result.json").read_text())


def refused(folder, *stages):
    with pytest.raises(UserError) as caught:
        check_run(Run(cfg.load_config(config_of(folder, *stages), [])))
    return str(caught.value)


def test_policy_that_is_far_within_its_limits_is_certified_by_every_bound(models, tmp_path):
    result = finished(tmp_path, certify(models))
    assert result["certified"]
    assert [row["by"] for row in result["rows"]] == ["Student t", "empirical Bernstein", "Clopper–Pearson"]
    page = (tmp_path / "run" / "certificate" / "report.html").read_text()
    assert "meets its limits with confidence 0.95: all 3 claims hold" in page
    samples = [json.loads(line) for line in (tmp_path / "run/certificate/samples.jsonl").read_text().splitlines()]
    costs = np.array([sample["judged"]["cost/far"] for sample in samples])
    row = result["rows"][0]
    assert (row["n"], row["estimate"], row["bound"]) == (40, costs.mean(), STUDENT.upper(costs, 0.05))


def test_run_ends_with_status_3_where_no_safe_policy_is_found_and_does_so_again(models, tmp_path, capsys):
    judges = {"cost/far": "function:cost_functions:far_below", "cost/above": "function:cost_functions:above"}
    claims = {"cost/far": {"mean": 0.0}, "cost/above": {"unsafe": 0.1}}
    later = certify(models) | {"name": "later"}
    config = config_of(tmp_path, certify(models, judges=judges, claims=claims), later)
    for _ in range(2):  # the second time the stage is finished
        assert train.main(["--config", str(config)]) == 3
        said = capsys.readouterr().err
        assert "certificate: no safe policy found: with confidence 0.95, 1 of 2 claims" in said
        assert "cost/above: unsafe responses 100.00%" in said.splitlines()[-1]
    result = json.loads((tmp_path / "run" / "certificate" / "result.json").read_text())
    assert {row["signal"]: row["passes"] for row in result["rows"]} == {"cost/far": True, "cost/above": False}
    assert not result["certified"]
    assert "no safe policy found" in (tmp_path / "run" / "certificate" / "report.html").read_text()
    assert not (tmp_path / "run" / "later").exists()
    with pytest.raises(NotCertifiedError, match="no safe policy found"):
        train.run(config)


def test_every_named_group_is_certified_by_the_cost_model_and_by_judges(models, tmp_path):
    groups = {"group_field": "prompt_source", "constrained_groups": ["risky", "benign"], "prompts": [PROMPTS, PROMPTS]}
    claims = {"cost": {"mean": 1000.0, "unsafe": 0.999}, "cost/far": {"mean": 0.0}}
    stage = certify(models, cost_model=f"path:{models}/cost", claims=claims, delta=0.2, **groups)
    rows = finished(tmp_path, stage)["rows"]
    assert [(row["group"], row["signal"]) for row in rows] == [
        (group, signal) for group in ("risky", "benign") for signal in ("cost", "cost", "cost/far")
    ]
    samples = [json.loads(line) for line in (tmp_path / "run/certificate/samples.jsonl").read_text().splitlines()]
    risky = np.array([sample["cost"] for sample in samples if sample["group"] == "risky"])
    assert (rows[0]["n"], rows[0]["estimate"]) == (len(risky), risky.mean())
    responses = [sample["response"] for sample in samples]
    assert responses[:40] != responses[40:], "the same prompts again are answered independently"


def test_clipped_costs_are_counted_and_warned_of(models, tmp_path):
    result = finished(tmp_path, certify(models, claims={"cost/far": {"mean": 0.0, "range": [-1.55, 1]}}))
    clipped = result["rows"][1]["clipped"]
    assert 0 < clipped < 40
    assert f"{clipped} of 40 costs of cost/far" in result["warnings"][0]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"delta": 0}, ["delta", "greater than 0"]),
        ({"delta": 1}, ["delta", "less than 1"]),
        ({"claims": {}}, ["claims", "at least 1"]),
        ({"claims": {"cost/far": {}}}, ["claims.cost/far", "claims nothing"]),
        ({"claims": {"cost/far": {"unsafe": 0}}}, ["claims.cost/far.unsafe", "greater than 0"]),
        ({"claims": {"cost/far": {"unsafe": 1}}}, ["claims.cost/far.unsafe", "less than 1"]),
        ({"claims": {"cost/far": {"mean": 0, "range": [1, -1]}}}, ["claims.cost/far", "range [1.0, -1.0]"]),
        ({"claims": {"cost/far": {"mean": 3, "range": [-1, 1]}}}, ["claims.cost/far", "mean 3.0 lies outside"]),
        ({"claims": {"cost/far": {"unsafe": 0.1, "range": [-1, 1]}}}, ["range does nothing"]),
        ({"claims": {"cost/fat": {"mean": 0}}}, ["claims", "'cost/fat'", "did you mean 'cost/far'"]),
        (
            {"judges": {"reward/a": "function:cost_functions:above"}, "claims": {"reward/a": {"mean": 0}}},
            ["judges.reward/a"],
        ),
        ({"constrained_groups": ["risky"]}, ["constrained_groups", "needs group_field"]),
        ({"group_field": "prompt_source"}, ["group_field", "constrained_groups names none"]),
        (
            {"group_field": "prompt_source", "constrained_groups": ["rsky"]},
            ["'rsky'", "there are 0 prompts", "'risky'"],
        ),
        ({"prompts": [PROMPTS | {"limit": 1}]}, ["prompts", "two or more"]),
    ],
    ids=lambda value: None if isinstance(value, list) else json.dumps(value)[:60],
)
def test_certificate_that_cannot_be_given_is_refused_before_the_first_stage(models, tmp_path, settings, parts):
    message = refused(tmp_path, certify(models, **settings))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("delta", [0, 1, -0.1, 1.5])
def test_delta_of_the_pessimistic_limit_is_refused_outside_of_0_and_1(delta):
    with pytest.raises(cfg.ConfigError, match=r"stages\.3\.algorithm\.lagrange\.delta"):
        cfg.load_config("tests/configs/mini.yaml", [f"stages.ppo_lag.algorithm.lagrange.delta={delta}"])


def sft(**settings):
    data = {"name": "demo/sft", "split": "test", "limit": 16}
    return {
        "name": "sft", "kind": "sft", "init_from": "preset:tiny", "data": data, "epochs": 1, "max_length": 48,
        "batch_size": 16,
    } | settings  # fmt: skip


def test_prompts_that_had_a_part_in_training_or_in_choosing_the_policy_are_refused(models, tmp_path):
    seen = {"name": "demo/sft", "split": "test", "limit": 40}
    other = {"name": "demo/sft", "limit": 16}
    stage = certify(models, policy="sft", prompts=[seen])
    assert "with a prompt of sft.data: a certificate takes fresh prompts" in refused(tmp_path, sft(), stage)
    choosing = sft(data=other, eval_data=seen, eval_every=1, keep_best="-eval/loss")
    message = refused(tmp_path, choosing, stage)
    assert "40 of 40 records (100%)" in message
    assert "with a prompt of sft.eval_data" in message
    reading = sft(data=other, eval_data=seen)
    check_run(Run(cfg.load_config(config_of(tmp_path, reading, stage), [])))
