"""Evaluation of policies and scorers on made-up scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.oracles import Oracle
from safe_rlhf_jax.evaluation.evaluate import (
    best_responses,
    calibrated_limit,
    check_reachable,
    collect_samples,
    evaluate_pairs,
    make_respond,
    sigmoid,
)
from safe_rlhf_jax.inference.best_of_n import best_of_n, make_sampler
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.types import Frozen, PreferenceBatch, PromptBatch, SafetyBatch, Sequences
from tests.helpers import make_lm, make_scorer, perturbed, prompt_batch, tiny_config


def texts(scores):
    """Texts whose only token id is their score."""
    tokens = np.asarray(scores, np.int32)[:, None]
    return Sequences(tokens, np.ones_like(tokens, bool), np.ones_like(tokens, bool))


def score(sequences):
    return jnp.asarray(sequences.tokens[:, 0], jnp.float32)


def test_preference_evaluation_counts_pairs_that_are_ranked_right_and_drops_filled_rows():
    batch = PreferenceBatch(texts([3, 1, 5, 5]), texts([1, 2, 4, 4]))
    out = evaluate_pairs(score, [(batch, np.arange(3))])
    assert out["metrics"]["accuracy"] == pytest.approx(2 / 3)
    assert out["scores_by_label"] == {"chosen": [3.0, 1.0, 5.0], "rejected": [1.0, 2.0, 4.0]}


def test_safety_evaluation_needs_a_strictly_negative_cost_for_safe_and_a_positive_one_for_unsafe():
    batch = SafetyBatch(
        texts([-2, 0, 1]), texts([3, -1, 2]), np.array([True, True, False]), np.array([False, True, False])
    )
    out = evaluate_pairs(score, [(batch, np.arange(3))])
    assert out["metrics"]["accuracy"] == pytest.approx(2 / 3)  # the second pair is ranked wrongly
    assert out["metrics"]["sign_accuracy"] == pytest.approx(5 / 6)  # a cost of exactly 0 is wrong
    assert sorted(out["scores_by_label"]["safe"]) == [-2.0, -1.0, 0.0]
    assert sorted(out["scores_by_label"]["unsafe"]) == [1.0, 2.0, 3.0]


def test_calibration_error_is_small_for_a_calibrated_scorer_and_large_for_an_overconfident_one():
    rng = np.random.default_rng(0)
    margin = rng.integers(-3, 4, 4000)
    right = rng.random(4000) < sigmoid(margin.astype(float))
    chosen, rejected = np.where(right, margin, 0), np.where(right, 0, margin)
    calibrated = evaluate_pairs(score, [(PreferenceBatch(texts(chosen), texts(rejected)), np.arange(4000))])
    overconfident = evaluate_pairs(
        score, [(PreferenceBatch(texts(10 * chosen), texts(10 * rejected)), np.arange(4000))]
    )
    assert calibrated["metrics"]["calibration_error"] < 0.03
    assert overconfident["metrics"]["calibration_error"] > 0.1


def test_sigmoid_is_finite_far_out():
    assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_limit_lies_between_safe_and_unsafe_by_the_margin():
    assert calibrated_limit([-4.0, -2.0], [5.0, 7.0], 0.1) == pytest.approx(-3.0 + 0.1 * 9.0)


def test_limit_below_every_safe_response_is_refused_with_the_floor():
    safe = np.linspace(-4.0, -2.0, 101).tolist()
    check_reachable(-3.0, safe)
    with pytest.raises(ValueError, match=r"cost_limit -5\.000 is below .* \(-3\.900"):
        check_reachable(-5.0, safe)


def test_samples_carry_scores_oracle_and_group_and_skip_filled_rows():
    out = {
        "tokens": np.array([[5, 6, 2], [2, 7, 0]]),
        "length": np.array([3, 2]),
        "kl": np.array([0.5, 0.25]),
        "reward": np.array([1.0, 2.0]),
        "cost": np.array([-1.0, 3.0]),
        "judge/cost/other": np.array([0.5, -2.0]),
    }
    prompts = PromptBatch(np.ones((2, 1), np.int32), np.ones((2, 1), bool), np.zeros(2, np.int32))
    records = [{"prompt": p, "kind": "risky", "category": "c"} for p in "abc"]
    turns = tuple([{"role": "user", "content": p}] for p in "abc")
    samples = collect_samples(
        lambda batch, key: out,
        [(prompts, np.array([0, 1])), (prompts, np.array([2]))],
        Examples(None, records, {}, 0, turns=turns),
        key=jax.random.key(0),
        ends=(2, 9),
        decode=lambda ids: " ".join(map(str, ids)),
        split="test",
        group_field="kind",
        oracle=Oracle(lambda p, r, split: {"helpfulness": len(r) / 10, "harmful": p == "b"}, (), ""),
    )
    assert [s["prompt"] for s in samples] == ["a", "b", "c"]
    assert samples[1] == {
        "prompt": "b", "response": "2 7", "group": "risky", "split": "test", "category": "c", "length": 2,
        "truncated": True, "kl": 0.25, "reward": 2.0, "cost": 3.0, "helpfulness": 0.3, "harmful": True,
        "severity": None, "refusal": False, "refusal_by": "rule", "measured": {}, "judged": {"cost/other": -2.0},
    }  # fmt: skip


def test_best_of_several_is_the_best_feasible_of_the_same_samples_and_has_no_kl():
    config = tiny_config(vocab_size=24, hidden_size=16, num_layers=1, head_dim=4)
    policy, variables = make_lm(config)
    made = {signal: make_scorer(signal, config) for signal in ("reward", "cost")}
    scorers = {signal: module for signal, (module, _) in made.items()}
    weights = {signal: perturbed(v, seed) for seed, (signal, (_, v)) in enumerate(made.items())}
    frozen = Frozen(reference=variables["params"], scorers=weights)
    prompts, key = prompt_batch(np.random.default_rng(0), 6, 5, 24), jax.random.key(1)
    sampler = {"response_length": 6, "eos_id": 2, "pad_id": 0, "sampling": Sampling()}
    sampled = make_sampler(policy, scorers, num_responses=8, **sampler)(variables["params"], weights, prompts, key)
    limit = float(jnp.quantile(sampled["cost"], 0.3))
    out = best_responses({name: np.asarray(array) for name, array in sampled.items()}, limit)
    index, possible = best_of_n(sampled["reward"], sampled["cost"], limit)
    assert possible.sum() > 0
    assert (index != jnp.argmax(sampled["reward"], 1)).any()
    np.testing.assert_array_equal(out["tokens"], sampled["tokens"][np.arange(6), index])
    for name in ("reward", "cost", "length"):
        np.testing.assert_allclose(out[name], sampled[name][np.arange(6), index], rtol=1e-6)
    assert "kl" not in out
    assert "kl" in make_respond(policy, scorers, reference=policy, **sampler)(variables["params"], frozen, prompts, key)
