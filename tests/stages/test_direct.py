"""DPO and its relatives: what each one's loss, labels and reference are, and a run of all of them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import objectives
from safe_rlhf_jax.data.formats import UNUSABLE
from safe_rlhf_jax.objectives import direct_loss, dpo_loss, ipo_loss, safety_loss
from safe_rlhf_jax.ops import sequence_scores, token_log_probs
from safe_rlhf_jax.stages import Run
from safe_rlhf_jax.stages.check import check_same_architecture
from safe_rlhf_jax.stages.direct import LEFT_OUT, rank_by_models, safe_first
from safe_rlhf_jax.stages.kinds import kind_of
from safe_rlhf_jax.types import PreferenceBatch, Sequences
from tests.helpers import apply, make_lm, tiny_config

pair_log_probs = jax.jit(objectives.pair_log_probs, static_argnames="module")
pair_log_ratios = jax.jit(objectives.pair_log_ratios, static_argnames="module")

OFFLINE = Path(__file__).parent.parent / "configs" / "offline.yaml"
CONFIG = tiny_config(vocab_size=24, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, head_dim=8)
B, L = 4, 10


def policy():
    module, variables = make_lm(CONFIG)
    return module, variables["params"]


def texts(seed, extra=0):
    """Texts with prompts of 3 tokens and responses of 2 to 7; `extra` columns of padding."""
    random = np.random.default_rng(seed)
    lengths = np.array([5, 6, 8, 10])
    position = np.arange(L + extra)[None]
    mask = position < lengths[:, None]
    tokens = np.where(mask, random.integers(1, 24, (B, L + extra)), 0)
    tokens[:, :3] = np.arange(1, 4)
    return Sequences(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.asarray(mask & (position >= 3)))


def test_response_log_probs_are_sums_over_response_tokens_with_eos_and_without_padding():
    module, params = policy()
    first, second = texts(0), texts(1)
    for side, found in zip((first, second), pair_log_probs(module, params, first, second), strict=True):
        logits = apply(module, {"params": params}, side.tokens, side.mask)
        log_probs = token_log_probs(logits[:, :-1], side.tokens[:, 1:])
        for row, total in enumerate(np.asarray(found)):
            end = int(side.mask[row].sum())
            np.testing.assert_allclose(total, np.asarray(log_probs)[row, 2 : end - 1].sum(), rtol=1e-5)


def test_padding_changes_no_response_log_prob():
    module, params = policy()
    short = texts(0)
    padded = Sequences(*(jnp.pad(x, ((0, 0), (0, 5))) for x in (short.tokens, short.mask, short.response_mask)))
    plain = pair_log_probs(module, params, short, short)[0]
    np.testing.assert_allclose(pair_log_probs(module, params, padded, padded)[0], plain, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_loss_at_step_zero_is_ln_2(beta):
    module, params = policy()
    ratios = pair_log_ratios(module, params, params, PreferenceBatch(texts(0), texts(1)))
    loss, metrics = direct_loss(*ratios, None, beta=beta, label_smoothing=0.1, squared=False)
    np.testing.assert_allclose(loss, np.log(2), atol=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == 0


def test_reference_gets_no_gradient():
    module, params = policy()
    other = jax.tree.map(lambda x: x * 1.1, params)

    def loss(reference):
        ratios = pair_log_ratios(module, params, reference, PreferenceBatch(texts(0), texts(1)))
        return dpo_loss(*ratios, beta=0.1)

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.grad(loss)(other)))


def all_pairs(log_ratios):
    """Both orders of every two responses: (Δ_w, Δ_l, index of w, index of l)."""
    winner, loser = np.nonzero(~np.eye(len(log_ratios), dtype=bool))
    return log_ratios[winner], log_ratios[loser], winner, loser


def test_expected_loss_is_stationary_exactly_at_the_optimum_of_the_regularised_problem():
    """With labels from Bradley–Terry on r, DPO ends at π_ref·exp(r/β): Δ = r/β + constant."""
    rewards, beta = jnp.asarray(np.random.default_rng(0).normal(size=6), jnp.float32), 0.3

    def expected(log_ratios):
        chosen, rejected, winner, loser = all_pairs(log_ratios)
        weight = jax.nn.sigmoid(rewards[winner] - rewards[loser])
        losses = jax.vmap(lambda a, b: dpo_loss(a[None], b[None], beta=beta))(chosen, rejected)
        return (weight * losses).sum()

    np.testing.assert_allclose(jax.grad(expected)(rewards / beta + 3.0), 0.0, atol=1e-5)
    assert np.abs(jax.grad(expected)(rewards / beta * 1.1)).max() > 1e-3, "any ratio would do"


def test_label_smoothing_mixes_both_orders():
    chosen, rejected = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.2, 1.0, 0.4])
    smooth = dpo_loss(chosen, rejected, beta=0.7, label_smoothing=0.2)
    mixed = 0.8 * dpo_loss(chosen, rejected, beta=0.7) + 0.2 * dpo_loss(rejected, chosen, beta=0.7)
    np.testing.assert_allclose(smooth, mixed, rtol=1e-6)


def test_ipo_pulls_the_difference_to_its_target_and_not_beyond():
    beta = 0.25
    slope = jax.grad(lambda d: ipo_loss(d[None], jnp.zeros(1), beta=beta))
    assert slope(jnp.float32(1.0)) < 0
    np.testing.assert_allclose(slope(jnp.float32(2.0)), 0.0, atol=1e-6)
    assert slope(jnp.float32(3.0)) > 0


def test_margin_of_safe_dpo_shifts_where_the_loss_is_ln_2():
    margin = jnp.array([3.0, 0.0])
    chosen = margin / 0.5
    np.testing.assert_allclose(dpo_loss(chosen, jnp.zeros(2), margin, beta=0.5), np.log(2), atol=1e-6)


def pair(better, safe_0, safe_1):
    return {"better_response_id": better, "is_response_0_safe": safe_0, "is_response_1_safe": safe_1}


def test_safe_first_turns_pairs_round_and_leaves_out_those_without_a_safe_response():
    records = [pair(0, True, True), pair(0, False, True), pair(1, False, True), pair(1, False, False), {"prompt": "x"}]
    out, gone = safe_first(records)
    assert gone == 1
    assert [record.get("better_response_id") for record in out] == [0, 1, 1, None]
    assert UNUSABLE in out[3], "a record without labels is counted among the bad ones"


def test_classifier_sees_each_response_for_itself():
    """Without the ranking term the loss is the cross-entropy of σ(c) against the label unsafe."""
    costs, safe = jnp.array([[0.3, -1.0], [2.0, 0.5]]), jnp.array([[True, True], [False, True]])
    loss = safety_loss(costs[0], costs[1], safe[0], safe[1], regularization=0.0, ranking_weight=0.0)
    p = 1 / (1 + np.exp(-np.asarray(costs)))
    expected = -np.where(safe, np.log(1 - p), np.log(p)).sum(0).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    with_ranking = safety_loss(costs[0], costs[1], safe[0], safe[1], regularization=0.0)
    assert with_ranking > loss + 0.1


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["stages.dpo.loss=ipo", "stages.dpo.label_smoothing=0.1"], ["'sigmoid'", "'ipo'"]),
        (["stages.dpo.label_smoothing=0.5"], ["stages.3.label_smoothing", "less than 0.5"]),
        (["stages.sacpo.safety_margin=2"], ["safety_margin 2.0", "'safe_helpfulness'"]),
        (["stages.dpo.preference=lagrangian"], ["'lagrangian' needs cost_model and reward_model"]),
        (
            ["stages.dpo.cost_model=classifier"],
            ["cost_model does nothing: preference is 'helpfulness', only 'lagrangian' uses"],
        ),
        (["stages.dpo.reference=reward"], ["reference names 'reward', a reward stage"]),
        (["stages.merged.other=sacpoo"], ["other names 'sacpoo'", "did you mean 'sacpo'"]),
    ],
)
def test_stage_that_makes_no_sense_is_refused_with_the_fix(overrides, parts):
    with pytest.raises(cfg.ConfigError) as error:
        cfg.load_config(OFFLINE, overrides)
    assert all(part in str(error.value) for part in parts), error.value


def test_policies_of_two_architectures_are_not_merged():
    tree = yaml.safe_load(OFFLINE.read_text())
    merged = next(stage for stage in tree["stages"] if stage["name"] == "merged")
    other = tree["stages"][0] | {"name": "big", "init_from": "preset:small"}
    tree["stages"] = [*tree["stages"][:4], other, merged | {"other": "big"}]
    run = Run(cfg.RunConfig.model_validate(tree))
    with pytest.raises(cfg.ConfigError, match="init_from 'dpo' and other 'big' differ in hidden_size"):
        check_same_architecture(run, run.config.stages[-1])


# --- A run


@pytest.fixture(scope="module")
def finished(train_process, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("offline") / "run"
    process = train_process(f"workdir={workdir}", config=OFFLINE)
    assert process.returncode == 0, process.stderr
    return workdir, process.stdout


def metrics(folder, step):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[step])


@pytest.mark.parametrize("stage", ["dpo", "sacpo", "lagrangian_dpo"])
def test_first_step_of_a_stage_has_loss_ln_2_and_later_ones_less(finished, stage):
    folder = finished[0] / stage
    assert abs(metrics(folder, 0)["train/loss"] - np.log(2)) < 1e-5
    assert metrics(folder, -1)["train/loss"] < 0.65


def test_safe_dpo_starts_above_ln_2_by_its_margins_and_says_what_it_left_out(finished):
    assert metrics(finished[0] / "safe_dpo", 0)["train/loss"] > np.log(2) + 0.1
    assert LEFT_OUT in finished[1]


def test_merged_policy_is_the_weighted_mean_of_both(finished):
    first, second, merged = (
        load_file(finished[0] / name / "export" / "model.safetensors") for name in ("dpo", "sacpo", "merged")
    )
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, 0.75 * first[name] + 0.25 * second[name], atol=1e-6)
    assert any(np.any(first[name] != second[name]) for name in first)


def test_evaluation_compares_policies_that_were_not_trained_by_rl(finished):
    report = (finished[0] / "evaluate" / "report.html").read_text()
    assert "merged" in report


@pytest.mark.parametrize(("multiplier", "signal"), [(0.0, "reward"), (1e6, "cost")])
def test_lagrangian_labels_follow_the_reward_at_0_and_the_cost_at_a_large_multiplier(finished, multiplier, signal):
    overrides = [f"workdir={finished[0]}", f"stages.lagrangian_dpo.multiplier={multiplier}"]
    run = Run(cfg.load_config(OFFLINE, overrides))
    stage = next(stage for stage in run.config.stages if stage.name == "lagrangian_dpo")
    with jax.set_mesh(run.mesh):
        pairs = kind_of(stage).load(run, stage, "data")
        ranked = rank_by_models(run, stage, pairs).arrays
        model = {"reward": stage.reward_model, "cost": stage.cost_model}[signal]
        module, variables = run.networks.open(model, "score", score_type=signal)
        sides = [
            np.asarray(sequence_scores(module, variables, jnp.asarray(side.tokens), jnp.asarray(side.mask)))
            for side in (ranked.chosen, ranked.rejected)
        ]
    assert np.all(sides[0] >= sides[1]) if signal == "reward" else np.all(sides[0] <= sides[1])
    assert np.any(ranked.chosen.tokens != pairs.arrays.chosen.tokens), "no pair was turned round"
