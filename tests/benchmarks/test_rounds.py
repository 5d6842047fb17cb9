"""Experiments in rounds: their configs, runs side by side, annotators, and the tables of their results."""

import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.real import curves
from benchmarks.rounds import jobs, labels, oracle, scales, several, signs, values, weak_start
from safe_rlhf_jax.config import load_config
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.pipeline import load_scorer
from tests.helpers import save_models, tiny_config

TOKENIZER = load_tokenizer("demo")


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Runs below a folder of the test's own."""
    monkeypatch.setattr(jobs, "RUNS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("experiment", [scales, weak_start, labels, values, signs, several, curves])
@pytest.mark.parametrize("tiny", [False, True])
def test_every_run_of_an_experiment_is_a_config(experiment, tiny, monkeypatch):
    for other in (scales, several):
        monkeypatch.setattr(other, "scaled", lambda model, factor, shift: f"{model}_{factor}_{shift}")
    monkeypatch.setattr(several, "labels_file", lambda group: f"{group}.jsonl")
    monkeypatch.setattr(signs, "pairs_file", lambda: "pairs.jsonl")
    monkeypatch.setattr(labels, "labels_file", lambda samples, labels: f"{samples.name}/{labels.rates}.jsonl")
    monkeypatch.setattr(values, "labels_file", lambda value: f"{value}.jsonl")
    monkeypatch.setattr(values, "prompts_file", lambda: "prompts.jsonl")
    monkeypatch.setattr(values, "demonstrations_file", lambda value: f"demonstrations_{value}.jsonl")
    found = [job for phase in experiment.EXPERIMENT.phases for job in phase([0, 1], tiny)]
    assert len({job.name for job in found}) == len(found)
    for job in found:
        _, config, *settings = job.arguments
        assert load_config(jobs.ROOT / config, settings).seed == job.about["seed"]


def test_curves_train_the_cost_model_of_the_real_run_but_for_its_data():
    def settings(config):
        found = load_config(jobs.ROOT / config, [])
        stage = next(stage for stage in found.stages if stage.name == "cost")
        return found.execution, found.max_bad_records, stage.model_dump(exclude={"data", "eval_data", "eval_every"})

    assert settings(curves.CONFIG) == settings("configs/smollm2_135m/safe_rlhf.yaml")


def test_scores_of_a_scaled_cost_model_are_multiplied_and_shifted(runs):
    save_models(runs, (), tiny_config(vocab_size=TOKENIZER.vocab_size), None)
    prompts, responses = ["how do i start baking with the bread"], ["mix the bread ."]
    before = load_scorer(str(runs / "cost"), tokenizer=TOKENIZER)(prompts, responses)
    reference = scales.scaled(f"path:{runs / 'cost'}", 10.0, -5.0)
    after = load_scorer(reference.removeprefix("path:"), tokenizer=TOKENIZER)(prompts, responses)
    np.testing.assert_allclose(after, 10 * before - 5, rtol=1e-5)


def started(code):
    """A stand-in for `Job.start`: another program, that is given the run's folder."""

    def start(job, cores):
        job.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", code, str(job.folder)])

    return start


def read(folder):
    """A result is a number in a file."""
    file = folder / "found"
    return {"found": int(file.read_text())} if file.exists() else None


FINDS = "import pathlib, sys; file = pathlib.Path(sys.argv[1]) / 'found'; file.write_text(str(7))"


def test_run_with_a_result_is_left_out_until_its_settings_change(runs, monkeypatch):
    one, other = (jobs.Job("one", "models.yaml", {"max_bad_records": x}, {"seed": 0}) for x in (0.1, 0.2))
    monkeypatch.setattr(jobs.Job, "start", started(FINDS))
    file = runs / "results.json"
    assert jobs.run_all([one], 2, time.time() + 60, jobs.Results(file, read))
    assert json.loads(file.read_text())["one"]["found"] == 7
    monkeypatch.setattr(jobs.Job, "start", lambda *_: pytest.fail("started again"))
    assert jobs.run_all([one], 2, time.time() + 60, jobs.Results(file, read))
    assert not jobs.Results(file, read).has(other)


def test_run_that_fails_or_is_stopped_is_not_finished_and_keeps_what_it_found(runs, monkeypatch):
    job = jobs.Job("one", "models.yaml", {}, {"seed": 0})
    for code, seconds in ((FINDS + "; sys.exit(3)", 60), (FINDS + "; import time; time.sleep(100)", 2)):
        monkeypatch.setattr(jobs.Job, "start", started(code))
        results = jobs.Results(runs / "results.json", read)
        assert not jobs.run_all([job], 1, time.time() + seconds, results)
        assert not results.has(job)
        assert results.found["one"]["found"] == 7


def test_votes_are_those_of_annotators_and_their_majority_is_the_label():
    pair = demo.preference("test")[0]
    voted = oracle.voted(pair, (0.0, 0.0, 0.0, 0.5, 0.5), random.Random(0))
    assert len(voted["response_0_safe_votes"]) == 5
    votes = voted["response_1_safe_votes"]
    assert voted["is_response_1_safe"] == (2 * sum(votes) > 5)


def test_audited_share_of_labels_is_without_the_error_that_the_others_have(runs):
    samples = jobs.Job("samples", "samples.yaml", {}, {"seed": 0})
    pairs = [pair | {"prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in demo.preference("test")]
    jobs.written("samples/label/data.jsonl", pairs)
    wrong = {}
    for share in (0.0, 0.5, 1.0):
        file = labels.labels_file(samples, labels.Labels((0.4,), share))
        with open(file) as lines:
            found = [json.loads(line) for line in lines]
        wrong[share] = np.mean([
            bool(one["is_response_0_safe"]) == demo.harm(one["response_0"]).is_harmful for one in found
        ])  # fmt: skip
    np.testing.assert_allclose([wrong[0.0], wrong[0.5], wrong[1.0]], [0.4, 0.21, 0.02], atol=0.03)


def test_only_the_acceptable_category_is_relabelled():
    pairs = demo.preference("test")
    changed = [(old, new) for old in pairs if (new := oracle.relabelled(old, values.CATEGORY, random.Random(0))) != old]
    assert 0 < len(changed) < len(pairs) / 10
    for old, new in changed:
        assert any(old[f"response_{i}_harm_category"][values.CATEGORY] for i in (0, 1))
        safe = [new["is_response_0_safe"], new["is_response_1_safe"]]
        assert all(safe) or new["safer_response_id"] == safe.index(True)


def test_labels_of_a_group_of_categories_call_the_others_harmless():
    pairs = demo.preference("test")[:400]
    for group, categories in several.GROUPS.items():
        for old, new in zip(pairs, several.labelled(pairs, group), strict=True):
            for i in (0, 1):
                named = [name for name, is_named in old[f"response_{i}_harm_category"].items() if is_named]
                assert new[f"is_response_{i}_safe"] == (old[f"is_response_{i}_safe"] or named[0] not in categories)


def test_signs_of_costs_are_counted_among_safe_and_unsafe_answers():
    costs, unsafe = np.array([[-1.0, 2.0], [1.0, -3.0], [0.5, -0.5]]), np.array([[0, 1], [0, 0], [0, 1]], bool)
    found = signs.signs(costs, unsafe)
    assert found == {"safe_above": 0.5, "safe_pair_above": 0.5, "unsafe_below": 0.5, "order": 0.75}


def test_judges_of_the_embedded_world_read_it_and_give_no_error_on_another():
    conversations = [
        [{"role": "user", "content": "Hi."}],
        [{"role": "user", "content": "help me with baking and the bread"}],
    ]
    answers = ["Hello.", "mix the bread . warm the bread . slice the bread ."]
    assert oracle.helpfulness(conversations, answers, [True, True]) == [0.0, 1.0]
    assert oracle.severity(conversations, ["unsafe theft delta step one .", "no ."], [True, True]) == [0.5, -0.5]


def test_tables_have_a_row_for_each_kind_of_run(monkeypatch):
    metrics = dict.fromkeys((*scales.COLUMNS, "multiplier"), 0.5)
    spent = {"seed": 0, "seconds": {"cpu": 3600}}
    scaled = [
        spent | {"scale": scale, "method": method, "metrics": metrics, "limit": -3.5}
        for scale in scales.SCALES
        for method in scales.SETTINGS
    ]
    assert "| ν = 0.5 | 50.0 %; 0.50 |" in scales.section_text(scaled)
    shown = metrics | dict.fromkeys((*several.SHOWN, "multiplier/first", "multiplier/second"), 0.5)
    both = [spent | {"scale": s, "method": m, "metrics": shown} for s in several.SCALES for m in several.METHODS]
    assert "| ν = 0.1, 5 | 50.0 %; 50.0 %; 0.50 |" in several.section(both)
    models = [{"loss": loss, "pairs": 500} | dict.fromkeys(signs.COLUMNS, 0.5) for loss in signs.LOSSES]
    assert "| 500 | ranking | 50.0 % |" in signs.section([spent | {"models": models}])
    elo = {name: {"elo": 1000.0} for name in "0123"}
    judged = [
        {"prompts": prompts, "axis": axis, "judge": f"{kind}/{judge}", "elo": elo}
        for axis, (prompts, kind) in weak_start.AXES.items()
        for judge in weak_start.JUDGES
    ]
    rounds = [{"policy": metrics, "cost": {"eval/sign_accuracy": 0.9}}] * 4
    assert "| 3 | 50.0 % |" in weak_start.section_text([spent | {"rounds": rounds, "comparisons": judged}])
    models = {"reward": {"eval/accuracy": 0.8}, "cost": {"eval/sign_accuracy": 0.9}}
    assert "| 10% wrong | 50.0 % |" in labels.section(
        [spent | {"labels": "10% wrong", "metrics": metrics, "models": models}]
    )
    policies = dict.fromkeys(values.POLICIES, dict.fromkeys(values.SHOWN, 0.25))
    assert "| becomes acceptable: after, with demonstrations | 25.0 % |" in values.section(
        [spent | {"change": "becomes acceptable", "policies": policies}]
    )
    monkeypatch.setattr(curves, "words", lambda pairs: ["0.5", str(pairs)])
    share = {"rate": 0.7, "low": 0.6, "high": 0.8}
    trained = [spent | {"kind": kind, "ranking": share, "sign": share} for kind in curves.RUNS]
    cells = "0.700 (0.600 to 0.800) | 0.700 (0.600 to 0.800)"
    assert f"| 350 pairs | 0 | {cells} | 0.5 | 350 |" in curves.section(trained)
    assert f"| 700 pairs, 4 epochs | 0 | {cells} |  |  |" in curves.section(trained)
