"""Stages that make data: responses, labels, what later stages read of them, and what a kill leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import train
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.metrics import read_jsonl, write_jsonl
from safe_rlhf_jax.stages import Run, check_run, making
from safe_rlhf_jax.stages.audit import AUDIT, drawn
from safe_rlhf_jax.stages.labellers import Pair, of_scores, oracle

CONFIG = Path(__file__).parent.parent / "configs" / "making.yaml"
KILLED = "from tests import moments; moments.before({place!r}, moments.death_at({call}))\n"


def length(conversations, responses, ended):
    """A reward: the number of characters."""
    return [float(len(text)) for text in responses]


def tree_of(mini, workdir):
    """The config on the models of a finished run."""
    text = CONFIG.read_text()
    for name, stage in (("policy", "sft"), ("other", "ppo_lag"), ("cost", "cost")):
        text = text.replace(f'"path:{name}"', f'"path:{mini}/{stage}/export"')
    return yaml.safe_load(text) | {"workdir": str(workdir)}


@pytest.fixture(scope="module")
def made(mini_run, finished_run, tmp_path_factory):
    """A finished run: its folder, its config, and what it said."""
    folder = tmp_path_factory.mktemp("making")
    return finished_run(folder, tree_of(mini_run[0], folder / "run"))


def records(folder, stage):
    return read_jsonl(folder / stage / "data.jsonl")


def test_every_policy_responds_to_every_prompt(made, mini_run):
    found = records(made[0], "sample")
    prompts = demo.prompts("test")[:40]
    assert [record["prompt"] for record in found] == [[{"role": "user", "content": p["prompt"]}] for p in prompts]
    assert [record["category"] for record in found] == [p["category"] for p in prompts]
    whose = [f"path:{mini_run[0]}/{name}/export" for name in ("sft", "sft", "ppo_lag", "ppo_lag")]
    assert all(record["policies"] == whose and len(record["responses"]) == 4 for record in found)
    metrics = json.loads((made[0] / "sample" / "result.json").read_text())["metrics"]
    assert (metrics["prompts"], metrics["responses"]) == (40, 160)
    assert 1 < metrics["different_responses"] <= 4


def test_labels_are_on_different_responses_to_one_prompt_in_random_order(made):
    responses = {json.dumps(record["prompt"]): record["responses"] for record in records(made[0], "sample")}
    found = records(made[0], "by_oracle")
    assert len(found) > 60
    for record in found:
        pair = [record["response_0"], record["response_1"]]
        assert pair[0] != pair[1]
        assert set(pair) <= set(responses[json.dumps(record["prompt"])])
        assert record["labelled_by"]["labeller"] == "oracle"
        assert record["policy_0"].endswith("/export")
        assert record["prompt_source"] in ("benign", "sensitive", "risky")
    first = [responses[json.dumps(r["prompt"])].index(r["response_0"]) for r in found]
    second = [responses[json.dumps(r["prompt"])].index(r["response_1"]) for r in found]
    assert 0.2 < np.mean(np.array(first) > np.array(second)) < 0.8


def test_models_and_functions_label_by_their_scores(made):
    for record in records(made[0], "by_models"):
        lengths = [len(record["response_0"]), len(record["response_1"])]
        assert ("better_response_id" in record) == (lengths[0] != lengths[1])
        if "better_response_id" in record:
            assert record["better_response_id"] == int(np.argmax(lengths))
        safe = [record["is_response_0_safe"], record["is_response_1_safe"]]
        assert not (safe[1 - record["safer_response_id"]] and not safe[record["safer_response_id"]])


def test_data_of_a_stage_is_checked_when_it_is_made(made):
    assert "reward: data of by_oracle, by_models is checked when it is made" in made[2]
    assert "is read with the tokenizer 'demo'" not in made[2]  # it is as the data that it is made from
    rows = len(records(made[0], "by_oracle")) + len(records(made[0], "by_models")) // 2
    assert f"reward: {rows} records" in made[2]


def test_what_a_stage_reads_decides_what_is_done_again(made, mini_run, tmp_path):
    def hashes(**changes):
        tree = tree_of(mini_run[0], made[0])
        tree["stages"][0] |= changes
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        return Run(cfg.load_config(tmp_path / "config.yaml")).hashes

    same, other = hashes(), hashes(temperature=0.5)
    assert all(same[name] != other[name] for name in same)


def test_killed_run_asks_for_no_label_and_no_response_twice(made, mini_run, train_process, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree_of(mini_run[0], tmp_path / "run")))
    prelude = KILLED.format(place="stages.sampling:keep_batch", call=3)
    process = train_process(config=tmp_path / "config.yaml", prelude=prelude)
    assert process.returncode == -9, process.stderr
    kept = tmp_path / "run" / "sample" / "batches_0.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    with kept.open("a") as file:
        file.write('[[{"text": ')  # a line that was being written
    prelude = KILLED.format(place="stages.making:keep_batch", call=2)
    process = train_process(config=tmp_path / "config.yaml", prelude=prelude)
    assert process.returncode == -9, process.stderr
    assert len((tmp_path / "run" / "by_oracle" / "batches.jsonl").read_text().splitlines()) == 1
    process = train_process(config=tmp_path / "config.yaml")
    assert process.returncode == 0, process.stderr
    assert "sample: finished, config unchanged; skipped" in process.stdout
    for stage in ("sample", "by_oracle", "by_models"):
        whole, again = records(made[0], stage), records(tmp_path / "run", stage)
        for record in (*whole, *again):
            record.pop("labelled_by", None)
        assert whole == again


def test_check_of_samples_without_responses_says_what_is_missing(mini_run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    tree = tree_of(mini_run[0], tmp_path / "run")
    tree["stages"] = [tree["stages"][1] | {"samples": {"name": str(tmp_path / "prompts.jsonl")}}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(cfg.ConfigError, match="by_oracle: samples: no record has two different texts in `responses`"):
        check_run(Run(cfg.load_config(tmp_path / "config.yaml")))


def test_responses_to_a_mixture_of_prompts_are_data_like_any_other(tmp_path, monkeypatch):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"question {name}", "category": name}])
    data = [{"name": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    stage = {"kind": "sample", "name": "sample", "policies": ["path:x"], "prompts": data}
    run = Run(cfg.RunConfig(workdir=str(tmp_path / "run"), stages=[stage]))
    answers = [[{"text": text, "ended": True} for text in ("yes", "no")]] * 2
    monkeypatch.setattr(making, "responses_of", lambda *_: answers)
    making.run_sample(run, run.config.stages[0], run.folder("sample"))
    found = run.records(cfg.Data(name="stage:sample"))
    assert [(record["prompt"], record["category"]) for record in found] == [("question a", "a"), ("question b", "b")]


# --- Audits


def test_audit_labels_a_share_of_every_category_again_and_says_how_often_it_is_the_same(made):
    audited, labelled = records(made[0], "audit"), records(made[0], "by_oracle")
    found = json.loads((made[0] / "audit" / "result.json").read_text())
    texts = {(json.dumps(r["prompt"]), r["response_0"], r["response_1"]): r for r in labelled}
    before = [texts[json.dumps(r["prompt"]), r["response_0"], r["response_1"]] for r in audited]
    assert {r["category"] for r in audited} == {r["category"] for r in labelled}
    same = [a["better_response_id"] == b["better_response_id"] for a, b in zip(audited, before, strict=True)]
    assert found["agreement"]["helpfulness"]["rate"] == pytest.approx(np.mean(same))
    assert found["agreement"]["safe or not"]["n"] == 2 * len(audited) == 2 * found["metrics"]["pairs"]
    assert sum(part["helpfulness"]["n"] for part in found["by_category"].values()) == len(audited)


def test_audit_looks_at_close_calls_and_at_clear_ones():
    rows = [{"category": "ab"[i % 2], "better_margin": float(i)} for i in range(200)] + [{"category": "c"}]
    found = drawn(rows, 0.1, "category", 0)
    assert found == drawn(rows, 0.1, "category", 0) != drawn(rows, 0.1, "category", 1)
    assert [sum(rows[i]["category"] == c for i in found) for c in "abc"] == [10, 10, 1]
    close = [i for i in found[:-1] if rows[i]["better_margin"] < 100]
    assert len(close) == 10


def test_labels_that_another_labeller_does_not_share_end_the_run_each_time():
    stage = {"kind": "audit", "name": "audit", "labels": {"name": "x"}, "labeller": {"kind": "oracle"}, "minimum": 0.7}
    stage = cfg.RunConfig(workdir="x", stages=[stage]).stages[0]
    rates = {"safety": 0.6, "helpfulness": 0.8}
    agreed = {name: {"rate": rate, "low": rate - 0.1, "high": rate + 0.1} for name, rate in rates.items()}
    error = AUDIT.refusal(stage, {"agreement": agreed})
    assert "less than minimum 0.7" in str(error)
    assert "safety 60.0% (50.0% to 70.0%)" in str(error)
    assert "helpfulness" not in str(error)
    assert AUDIT.refusal(stage.model_copy(update={"minimum": 0.6}), {"agreement": agreed}) is None


def audited_by_people(folder, minimum=0.7):
    """A run whose labels are audited by people before a reward model is trained on them; returns its exit status."""
    records = [
        {"prompt": f"question {i}", "response_0": "yes .", "response_1": "no .", "category": "ab"[i % 2],
         "better_response_id": 1, "safer_response_id": i % 2, "is_response_0_safe": True, "is_response_1_safe": True}
        for i in range(8)
    ]  # fmt: skip
    write_jsonl(folder / "samples.jsonl", records)
    data, lengths = {"name": str(folder / "samples.jsonl")}, {"max_prompt_length": 16, "max_response_length": 4}
    audit = {"name": "audit", "kind": "audit", "labels": data, "labeller": {"kind": "people"}, "share": 0.5}
    reward = {"name": "reward", "kind": "reward", "init_from": "preset:tiny", "data": data, "epochs": 1}
    stages = [audit | lengths | {"minimum": minimum}, reward | {"batch_size": 8, "max_length": 48}]
    tree = {"workdir": str(folder / "run"), "execution": {"scan_layers": False}, "stages": stages}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return train.main(["--config", str(folder / "config.yaml")])


def test_nothing_is_trained_on_labels_that_people_do_not_share(tmp_path, capsys):
    assert audited_by_people(tmp_path) == 75
    folder = tmp_path / "run" / "audit"
    tasks = json.loads((folder / "tasks.json").read_text())
    assert len(tasks) == 4
    answers = {"better": "A", "safer": "B", "harm_a": "harmless", "harm_b": "harmless"}
    result = [{"from_name": q, "type": "choices", "value": {"choices": [a]}} for q, a in answers.items()]
    exported = [task | {"annotations": [{"completed_by": 1, "result": result}]} for task in tasks]
    (folder / "labels.json").write_text(json.dumps(exported))
    for _ in range(2):  # when the audit is done, and whenever the run is started again
        assert audited_by_people(tmp_path) == 1
        said = capsys.readouterr().err
        assert "audit: less than minimum 0.7 of the labels are those of people: helpfulness 0.0%" in said
        assert "safety 50.0%" in said
        assert "safe or not" not in said
        assert not (tmp_path / "run" / "reward").exists()
    (folder / "labels.json").unlink()  # a lower minimum asks nobody again
    assert audited_by_people(tmp_path, minimum=0.0) == 0
    assert (tmp_path / "run" / "reward" / "export").exists()


def test_audit_comes_before_what_is_trained_on_its_labels():
    audit = {"kind": "audit", "name": "audit", "labels": {"name": "stage:label"}, "labeller": {"kind": "oracle"}}
    label = {"kind": "label", "name": "label", "samples": {"name": "x.jsonl"}, "labeller": {"kind": "oracle"}}
    reward = {"kind": "reward", "name": "reward", "init_from": "preset:tiny", "data": {"name": "stage:label"}}
    cfg.RunConfig(workdir="x", stages=[label, audit, reward, audit | {"name": "again"}])
    with pytest.raises(ValueError, match="labels: 'reward' trains on those of 'label' before this audit"):
        cfg.RunConfig(workdir="x", stages=[label, reward, audit])


# --- Labellers


def labelled(pairs, **settings):
    """Returns the oracle's labels of pairs."""
    stage = {"kind": "label", "name": "label", "samples": {"name": "x"}, "labeller": {"kind": "oracle"} | settings}
    config = cfg.RunConfig(workdir="runs/x", stages=[stage])
    return oracle(Run(config), config.stages[0]).label(pairs, 0)


def test_oracle_errs_as_often_as_it_is_told():
    responses = ("blend the apple, then serve it.", "unsafe hack phone step one.")
    prompts = [record["prompt"] for record in demo.prompts("train") if record["prompt_source"] == "risky"][:400]
    pairs = [Pair([{"role": "user", "content": prompt}], *responses, {}) for prompt in prompts]

    def unsafe_share(error_rate):
        return np.mean([not labels["is_response_1_safe"] for labels in labelled(pairs, error_rate=error_rate)])

    assert unsafe_share(0.0) == pytest.approx(0.98, abs=0.03)
    assert unsafe_share(0.3) == pytest.approx(0.98 * 0.7 + 0.02 * 0.3, abs=0.07)


def test_oracle_refuses_prompts_of_another_world():
    pair = Pair([{"role": "user", "content": "What is the capital of France?"}], "Paris.", "Rome.", {})
    with pytest.raises(cfg.ConfigError, match="the oracle knows the embedded world only"):
        labelled([pair])


def test_equal_scores_prefer_neither_response():
    assert of_scores(np.array([1.0, 1.0]), np.array([-1.0, 2.0])) == {
        "better_margin": 0.0, "safer_margin": 3.0,
        "safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False,
    }  # fmt: skip
    assert "safer_response_id" not in of_scores(np.array([1.0, 2.0]), np.array([0.0, 0.0]))


def test_without_a_reward_only_safety_is_labelled():
    assert of_scores(None, np.array([1.0, -1.0])) == {
        "safer_margin": 2.0, "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True,
    }  # fmt: skip
