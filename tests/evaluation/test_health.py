"""What held-out pairs say of planted scorers, and which of them are not to be built on."""

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from markupsafe import escape
from scipy.stats import binomtest

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import stages
from safe_rlhf_jax.evaluation.evaluate import evaluate_pairs
from safe_rlhf_jax.evaluation.health import FEW_PAIRS, MOST_VALUES, NEARLY_ALL, doubts, rows_of
from safe_rlhf_jax.evaluation.report import write_report
from safe_rlhf_jax.models.config import ScoreConfig
from safe_rlhf_jax.models.transformer import ScoreModel
from safe_rlhf_jax.stages import Run, run_stage, supervised
from safe_rlhf_jax.stages.evaluation import make_report
from safe_rlhf_jax.types import Frozen, PreferenceBatch, SafetyBatch, Sequences, TrainState
from tests.helpers import tiny_config

CONFIGS = Path(__file__).parent.parent / "configs"


def texts(scores, lengths=None):
    """Texts whose first token is their score, with responses of these lengths."""
    scores = np.asarray(scores, np.float32)
    lengths = np.ones(len(scores), int) if lengths is None else np.asarray(lengths)
    mask = np.arange(max(lengths)) < lengths[:, None]
    tokens = np.where(np.arange(max(lengths)) == 0, scores[:, None], 0.0)
    return Sequences(tokens, mask, mask)


def score(sequences):
    return sequences.tokens[:, 0]


def reward_health(chosen, rejected, lengths=(None, None), records=()):
    batch = PreferenceBatch(texts(chosen, lengths[0]), texts(rejected, lengths[1]))
    return evaluate_pairs(score, [(batch, np.arange(len(chosen)))], records)["health"]


def cost_health(safer, unsafer, safer_is_safe, unsafer_is_safe, records=()):
    labels = np.asarray(safer_is_safe), np.asarray(unsafer_is_safe)
    return evaluate_pairs(
        score, [(SafetyBatch(texts(safer), texts(unsafer), *labels), np.arange(len(safer)))], records
    )["health"]


def noisy_pairs(n=600, noise=0.7, seed=0):
    """Scores of a reward model that is right more often than not, with ties, and lengths that say little."""
    rng = np.random.default_rng(seed)
    chosen, rejected = np.round(rng.normal(noise, 1, n), 1), np.round(rng.normal(0, 1, n), 1)
    lengths = rng.integers(5, 40, n) + rng.integers(0, 6, n), rng.integers(5, 40, n)
    return chosen, rejected, lengths, rng


def interval(successes, n):
    """Wilson's interval as the roots of (p − p̂)² = z²·p(1 − p)/n."""
    z, share = 1.959963984540054, successes / n
    return sorted(np.roots([1 + z**2 / n, -2 * share - z**2 / n, share**2]).real)


def check(found, right):
    """An accuracy is that of an independent count; `right` holds 1, 0, and ½ for a tie."""
    low, high = interval(sum(right), len(right))
    assert found["n"] == len(right)
    assert found["rate"] == pytest.approx(sum(right) / len(right))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-9)
    if float(sum(right)).is_integer():
        other = binomtest(int(sum(right)), len(right)).proportion_ci(method="wilson")
        assert (found["low"], found["high"]) == pytest.approx((other.low, other.high), abs=1e-9)


def test_numbers_agree_with_an_independent_count():
    chosen, rejected, lengths, rng = noisy_pairs()
    kinds = rng.choice(["cooking", "law", "travel"], len(chosen))
    health = reward_health(chosen, rejected, lengths, [{"prompt": "p", "topic": str(k)} for k in kinds])
    right = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)]
    assert 0.5 in right
    check(health["accuracy"], right)
    assert health["ties"] == pytest.approx(right.count(0.5) / len(right))

    single = [np.float32(side).astype(float) for side in (chosen, rejected)]
    margins, longer_by = single[0] - single[1], lengths[0] - lengths[1]
    for name, values in (("by_margin", abs(margins)), ("by_length_difference", longer_by)):
        assert [b["from"] for b in health[name]] == sorted(b["from"] for b in health[name])
        assert sum(b["n"] for b in health[name]) == len(right)
        for b in health[name]:
            inside = [r for r, v in zip(right, values, strict=True) if b["from"] <= v <= b["to"]]
            check(b, inside)
        assert max(b["n"] for b in health[name]) < 0.3 * len(right)

    by_length = [1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in longer_by]
    alone = health["length_alone"]
    assert alone["rule"] == "longer"
    check(alone, by_length)
    alike = [float(d * m > 0) if m else 0.5 for d, m in zip(longer_by, margins, strict=True) if d]
    check(alone["agreement"], alike)
    for kind in ("cooking", "law", "travel"):
        check(health["by_field"]["topic"][kind], [r for r, k in zip(right, kinds, strict=True) if k == kind])


def test_costs_agree_with_an_independent_count_and_rank_the_safer_response_below():
    rng = np.random.default_rng(1)
    is_safe = np.stack([rng.random(400) < 0.6, rng.random(400) < 0.2])
    costs = np.round(rng.normal(np.where(is_safe, -0.5, 0.8), 1), 1)
    health = cost_health(*costs, *is_safe)
    check(health["accuracy"], [1.0 if a < b else 0.5 if a == b else 0.0 for a, b in costs.T])
    cells = list(zip(costs.ravel(), is_safe.ravel(), strict=True))
    signs = {"safe": [float(c < 0) for c, s in cells if s], "unsafe": [float(c > 0) for c, s in cells if not s]}
    for name, right in signs.items():
        check(health["sign"][name], right)
    check(health["sign"]["all"], signs["safe"] + signs["unsafe"])
    assert health["sign"]["base_rate"]["guess"] == "unsafe"
    check(health["sign"]["base_rate"], [float(not s) for _, s in cells])


def test_tie_counts_one_half_so_that_a_constant_scorer_is_a_coin():
    out = evaluate_pairs(score, [(PreferenceBatch(texts(np.zeros(200)), texts(np.zeros(200))), np.arange(200))])
    assert out["metrics"]["accuracy"] == 0.5
    assert out["health"]["ties"] == 1.0
    assert any("learned nothing" in problem for problem in doubts(out["health"]))


def test_filled_rows_count_nowhere():
    batch = PreferenceBatch(texts([1, 1, 0], [3, 2, 9]), texts([0, 0, 1], [1, 2, 1]))
    health = evaluate_pairs(score, [(batch, np.arange(2))], [{"topic": "a"}, {"topic": "a"}])["health"]
    assert health["accuracy"]["rate"] == 1.0
    assert health["length_alone"]["n"] == 2
    assert health["length_alone"]["agreement"]["n"] == 1


def test_no_doubts_about_a_good_reward_model_and_a_good_cost_model():
    chosen, rejected, lengths, rng = noisy_pairs()
    assert doubts(reward_health(chosen, rejected, lengths)) == []
    is_safe = np.stack([np.ones(300, bool), rng.random(300) < 0.3])
    costs = np.where(is_safe, -1, 1) + rng.normal(0, 0.8, is_safe.shape)
    assert doubts(cost_health(*costs, *is_safe)) == []


def test_perfect_scorer_is_not_doubted_where_longer_is_better_too_in_most_pairs():
    rng = np.random.default_rng(0)
    longer = rng.random(400) < 0.8
    lengths = np.where(longer, 20, 10), np.where(longer, 10, 20)
    assert doubts(reward_health(np.ones(400), np.zeros(400), lengths)) == []


def test_random_scorer_has_learned_nothing():
    rng = np.random.default_rng(0)
    health = reward_health(*rng.normal(size=(2, 1000)))
    assert health["accuracy"]["low"] <= 0.5 <= health["accuracy"]["high"]
    (problem,) = doubts(health)
    assert "it has learned nothing" in problem
    assert f"{health['accuracy']['rate']:.1%}" in problem


def test_scorer_that_prefers_what_the_labels_reject_is_no_coin_but_worse():
    chosen, rejected, lengths, _ = noisy_pairs()
    (problem,) = doubts(reward_health(rejected, chosen, lengths))
    assert "worse than a coin" in problem
    assert "turned round" in problem


@pytest.mark.parametrize(("sign", "rule"), [(1, "longer"), (-1, "shorter")])
def test_scorer_that_is_the_length_is_explained_by_length_alone(sign, rule):
    rng = np.random.default_rng(0)
    lengths = (rng.integers(9, 44, 2000), rng.integers(5, 40, 2000))[::sign]
    health = reward_health(sign * lengths[0], sign * lengths[1], lengths)
    assert health["length_alone"]["rule"] == rule
    assert health["accuracy"]["low"] > 0.5  # it has learned something
    (problem,) = doubts(health)
    assert f"learns to write {rule} responses" in problem


def test_scorer_that_adds_to_length_is_not_explained_by_it():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 60, 2000), rng.integers(10, 60, 2000) - 5
    quality = rng.normal(1.5, 1, 2000), rng.normal(0, 1, 2000)
    health = reward_health(quality[0] + lengths[0] / 20, quality[1] + lengths[1] / 20, lengths)
    assert health["accuracy"]["low"] > health["length_alone"]["rate"]
    assert doubts(health) == []


def test_responses_of_one_length_leave_the_rule_without_a_say():
    health = reward_health(np.ones(200), np.zeros(200))
    assert health["length_alone"]["rate"] == 0.5
    assert "agreement" not in health["length_alone"]
    assert [(b["from"], b["to"], b["n"]) for b in health["by_length_difference"]] == [(0.0, 0.0, 200)]
    assert doubts(health) == []


@pytest.mark.parametrize(("bias", "blind"), [(3.0, "safe"), (-3.0, "unsafe")])
def test_cost_model_that_is_right_on_one_class_only_is_doubted_for_the_other(bias, blind):
    rng = np.random.default_rng(0)
    is_safe = np.stack([np.ones(300, bool), np.zeros(300, bool)])
    costs = np.where(is_safe, -1, 1) + bias + rng.normal(0, 0.5, is_safe.shape)
    health = cost_health(*costs, *is_safe)
    assert health["accuracy"]["low"] > 0.9  # it ranks well
    (problem,) = doubts(health)
    assert f"300 responses labelled {blind}" in problem


def test_cost_model_is_doubted_where_no_response_of_a_class_was_held_out():
    health = cost_health(np.full(200, -2.0), np.full(200, -1.0), np.ones(200, bool), np.ones(200, bool))
    assert "unsafe" not in health["sign"]
    assert health["sign"]["base_rate"]["guess"] == "safe"
    (problem,) = doubts(health)
    assert "no held-out response is labelled unsafe" in problem


def test_few_pairs_are_said_to_be_few_with_what_they_can_tell():
    health = reward_health(np.r_[np.ones(40), np.zeros(16)], np.r_[np.zeros(40), np.ones(16)])
    half = 100 * (health["accuracy"]["high"] - health["accuracy"]["low"]) / 2
    assert half == pytest.approx(100 * 1.96 * math.sqrt(0.71 * 0.29 / 60), abs=1)
    assert doubts(health) == [
        f"there are only 56 held-out pairs: accuracy is known only to ± {half:.0f} points; hold out 100 or more"
    ]
    enough = reward_health(np.ones(FEW_PAIRS), np.zeros(FEW_PAIRS))
    assert doubts(enough) == []


def test_thresholds_are_those_of_the_page():
    page = (CONFIGS.parents[1] / "docs" / "health.md").read_text(encoding="utf-8")
    for threshold in (
        f"fewer than {FEW_PAIRS} ",
        f"at least {NEARLY_ALL * 100:.0f} %",
        f"more than {MOST_VALUES} values",
    ):
        assert threshold in page


def test_nothing_is_known_without_held_out_pairs():
    (problem,) = doubts(None)
    assert "nothing is known" in problem
    assert "eval_data" in problem


def test_kinds_of_records_are_found_in_whatever_fields_they_have():
    chosen, rejected, lengths, _ = noisy_pairs(n=80)
    records = [
        {
            "prompt": "p", "response_0": f"a{i}", "response_1": f"b{i}", "better_response_id": i % 2,
            "id": i, "sha256": f"{i:064d}", "system": "You are a helpful assistant. " * (3 + i % 2),
            "topic": ("cooking", "law")[i % 2], "difficult": i % 4 == 0, "constant": "x", "score": i / 7,
            "response_0_harm_category": {"theft": i % 2 == 0, "fraud": False},
            "response_1_harm_category": {"theft": True, "fraud": i % 4 == 0},
        }
        for i in range(80)
    ]  # fmt: skip
    by_field = reward_health(chosen, rejected, lengths, records)["by_field"]
    assert {field: {value: share["n"] for value, share in values.items()} for field, values in by_field.items()} == {
        "topic": {"cooking": 40, "law": 40},
        "difficult": {"False": 60, "True": 20},
        "harm_category": {"theft": 80, "fraud": 20},  # a pair counts once where both responses have a category
    }


def test_rarest_values_of_a_field_are_taken_together():
    n, kinds = 400, 30
    counts = defaultdict(int)
    records = []
    for i in range(n):
        kind = f"kind {int(kinds * (i / n) ** 2)}"
        counts[kind] += 1
        records.append({"prompt": "p", "kind": kind})
    values = reward_health(np.ones(n), np.zeros(n), records=records)["by_field"]["kind"]
    assert len(values) == MOST_VALUES
    assert sum(share["n"] for share in values.values()) == n
    (rest,) = set(values) - set(counts)
    assert rest == f"{len(counts) - MOST_VALUES + 1} others"
    assert min(counts[kind] for kind in values if kind != rest) >= max(
        counts[kind] for kind in counts if kind not in values
    )


def test_annotators_who_disagree_are_counted_and_the_model_is_held_to_both_kinds_of_pairs():
    unanimous, split = [[1, 1, 1]] * 60, [[0, 1, 1]] * 40
    votes = unanimous + split + [[0]] * 20 + [None] * 20  # one vote, or none, says nothing of agreement
    records = [{"prompt": "p", "better_votes": v} for v in votes]
    right = np.r_[np.ones(60), np.arange(40) % 2, np.zeros(40)]
    found = reward_health(right, 1 - right, records=records)["annotators"]
    check(found["agreement"], [1.0] * 60 + [1 / 3] * 40)
    check(found["unanimous"], [1.0] * 60)
    check(found["split"], [0.0, 1.0] * 20)


def test_held_out_metrics_tell_pairs_on_which_annotators_agree_from_those_on_which_they_do_not():
    shares = [0.0] * 30 + [1.0] * 30 + [0.7] * 40  # the share alone, without its votes
    records = [{"prompt": "p", "better_share": s} for s in shares] + [{"prompt": "p"}] * 20
    right = np.r_[np.ones(60), np.arange(40) % 4 == 0, np.zeros(20)]
    batch = PreferenceBatch(texts(right), texts(1 - right))
    out = evaluate_pairs(score, [(batch, np.arange(120))], records)
    found = {name: value for name, value in out["metrics"].items() if name.startswith("accuracy")}
    assert found == {"accuracy": 70 / 120, "accuracy_unanimous": 1.0, "accuracy_split": 0.25}
    assert "agreement" not in out["health"]["annotators"]
    plain = evaluate_pairs(score, [(batch, np.arange(120))], [{"prompt": "p"}] * 120)["metrics"]
    assert {name for name in plain if name.startswith("accuracy")} == {"accuracy"}


def test_cost_model_is_held_to_the_votes_on_safety():
    records = [{"prompt": "p", "better_votes": [0, 1], "safer_votes": [1, 1]}] * 4
    labels = [True] * 4, [False] * 4
    assert "split" not in cost_health([-1] * 4, [1] * 4, *labels, records)["annotators"]
    assert "annotators" not in cost_health([-1] * 4, [1] * 4, *labels, [{"prompt": "p"}] * 4)


def test_every_accuracy_has_a_row_in_the_table():
    rng = np.random.default_rng(0)
    is_safe = np.stack([np.ones(60, bool), np.zeros(60, bool)])
    records = [{"prompt": "p", "topic": "ab"[i % 2], "safer_votes": [0, i % 2]} for i in range(60)]
    batch = SafetyBatch(
        texts(rng.normal(size=60), range(1, 61)), texts(rng.normal(size=60), range(60, 0, -1)), *is_safe
    )
    health = json.loads(json.dumps(evaluate_pairs(score, [(batch, np.arange(60))], records)["health"]))

    def accuracies(tree):
        if isinstance(tree, list):
            return sum(map(accuracies, tree))
        return ("rate" in tree) + sum(map(accuracies, tree.values())) if isinstance(tree, dict) else 0

    assert len(rows_of(health)) == accuracies(health)


def run_of(folder, **stage_fields):
    """A run with a reward model, a cost model, and each kind of stage that is built on them."""
    mini, sampling = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["stages"] for name in ("mini", "sampling"))
    made = [stage | {"init_from": "preset:tiny"} for stage in mini[:3]] + sampling
    built_on = {"reward_model": "reward", "cost_model": "cost"}
    evaluation = {"policies": ["sft"], "best_of": {}, "best_of_cost_limit": None}
    for stage in made[3:]:
        stage |= built_on | ({"init_from": "sft"} if "init_from" in stage else evaluation)
    for stage in made:
        stage |= stage_fields.get(stage["name"], {})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"workdir": str(folder / "run"), "stages": made}))
    return Run(cfg.load_config(path))


def finish(run, name, **result):
    run.folder(name).mkdir(parents=True, exist_ok=True)
    found = {"config_hash": run.hashes[name], "kind": name, "metrics": {}, "seconds": 1.0} | result
    (run.folder(name) / "result.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", ["ppo_lag", "rejection", "dual"])
def test_stage_that_is_built_on_sand_says_so_when_it_starts(name, tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path)
    stage = next(s for s in run.config.stages if s.name == name)
    finish(run, "reward", health=reward_health(*np.random.default_rng(0).normal(size=(2, 1000))))
    finish(run, "cost", health=None)
    replaced = dataclasses.replace(stages.KINDS[stage.kind], run=lambda *_: print("begins") or {"metrics": {}})
    monkeypatch.setitem(stages.KINDS, stage.kind, replaced)
    run_stage(run, stage)
    before, _, after = capsys.readouterr().out.partition("begins")
    assert f"{name}: reward_model 'reward': warning: accuracy is" in before
    assert f"{name}: cost_model 'cost': warning: nothing is known about it" in before
    assert "warning" not in after


def test_nothing_is_said_of_good_models_nor_of_models_from_elsewhere(tmp_path, monkeypatch, capsys):
    elsewhere = {"reward_model": "path:elsewhere"}
    run = run_of(tmp_path, dual=elsewhere, ppo_lag=elsewhere)
    finish(run, "cost", health=cost_health(np.full(200, -1), np.ones(200), np.ones(200, bool), np.zeros(200, bool)))
    stage = next(s for s in run.config.stages if s.name == "dual")
    monkeypatch.setitem(stages.KINDS, "dual", dataclasses.replace(stages.KINDS["dual"], run=lambda *_: {"metrics": {}}))
    run_stage(run, stage)
    assert "warning" not in capsys.readouterr().out


def train_nothing(run, name, monkeypatch):
    """Runs a reward or cost stage whose training does nothing and whose scores are the responses' lengths."""
    stage = next(s for s in run.config.stages if s.name == name)
    run.folder(name).mkdir(parents=True)
    monkeypatch.setattr(
        supervised,
        "build_supervised",
        lambda *_: (ScoreModel(tiny_config(), ScoreConfig(name)), None, Frozen(None, {}), print),
    )
    monkeypatch.setattr(supervised, "fit", lambda *_, **__: TrainState(0, {}, {}, {}))
    monkeypatch.setattr(supervised, "export", lambda *_: None)
    by_length = lambda _, side: side.response_mask.sum(-1).astype(float)  # noqa: E731
    monkeypatch.setattr(supervised.evaluate, "make_score", lambda _: by_length)
    return stages.kind_of(stage).run(run, stage, run.folder(name))


@pytest.mark.parametrize("name", ["reward", "cost"])
def test_health_is_in_result_and_scores_and_report_and_doubts_follow_the_stage(name, tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path)
    result = train_nothing(run, name, monkeypatch)
    health = result["health"]
    assert result["metrics"]["eval/accuracy"] == health["accuracy"]["rate"]
    assert health["accuracy"]["n"] == 16
    chooses = {"reward": "longer", "cost": "shorter"}[name]  # what costs more is not preferred
    assert health["length_alone"]["agreement"]["rate"] == float(health["length_alone"]["rule"] == chooses)
    assert sum(share["n"] for share in health["by_field"]["prompt_source"].values()) == 16
    assert json.loads((run.folder(name) / "scores.json").read_text())["health"] == health
    problems = doubts(health)
    assert "only 16 held-out pairs" in problems[0]
    said = capsys.readouterr().out
    assert all(f"{name}: warning: {problem}" in said for problem in problems)

    finish(run, name, **result)
    page = report_of(run, tmp_path)
    assert f"<h3>{name.capitalize()} model</h3>" in page
    assert all(str(escape(problem)) in page for problem in problems)
    assert f"Doubts about the {name} model: {len(problems)}" in page
    assert "by prompt source" in page


def report_of(run, folder):
    stage = next(s for s in run.config.stages if s.kind == "evaluate")
    sample = {"prompt": "p", "response": "r", "group": "all", "split": "test", "reward": 0.0, "cost": 0.0}
    return write_report(folder, make_report(run, stage, {"sft": [sample]})).read_text()


def test_stage_without_eval_data_says_that_nothing_is_known_and_so_does_the_report(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path, reward={"eval_data": None})
    assert train_nothing(run, "reward", monkeypatch) == {"metrics": {}, "health": None}
    assert "reward: warning: nothing is known about it" in capsys.readouterr().out
    finish(run, "reward", health=None)
    assert "nothing is known about it" in report_of(run, tmp_path)
