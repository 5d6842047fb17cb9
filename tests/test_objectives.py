import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safe_rlhf_jax.config import CostStage, RewardStage, SFTStage
from safe_rlhf_jax.models.config import ScoreConfig
from safe_rlhf_jax.objectives import (
    bradley_terry_loss,
    divergence_mask,
    lm_loss,
    pair_scores,
    safety_loss,
    sign_accuracy,
    token_weights,
    update_normalizer,
)
from safe_rlhf_jax.ops import gather_last
from safe_rlhf_jax.optim import gradient_step, init_state
from safe_rlhf_jax.sharding import make_mesh, shard_batch
from safe_rlhf_jax.stages.supervised import cost_step, reward_step, sft_step
from safe_rlhf_jax.types import PreferenceBatch, SafetyBatch, SafetyShares, Sequences, SupervisedBatch
from tests.helpers import apply, make_lm, make_scorer, right_padded, tiny_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = tiny_config(vocab_size=24, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, head_dim=8)


def reference_slice(d):
    """The reference's token-wise slice: from the first difference to the end of the longer text, padding included."""
    ids, masks = (d["first_ids"], d["second_ids"]), (d["first_mask"], d["second_mask"])
    position = np.arange(ids[0].shape[1])[None]
    start = np.argmax(ids[0] != ids[1], axis=1)
    end = np.max([np.where(mask, position, 0).max(1) for mask in masks], axis=0)
    return jnp.asarray((position >= start[:, None]) & (position <= end[:, None]))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*_loss_*.npz")), ids=lambda path: path.stem)
def test_preference_losses_and_gradients_equal_the_reference(path):
    d = dict(np.load(path))
    rows, regularization = len(d["first_ids"]), float(d["regularization"])
    mask = reference_slice(d) if "token" in path.stem else None

    def loss(scores):
        first, second = scores[:rows], scores[rows:]
        if mask is None:
            first = gather_last(first, jnp.asarray(d["first_mask"]))
            second = gather_last(second, jnp.asarray(d["second_mask"]))
        if path.stem.startswith("reward"):
            return bradley_terry_loss(first, second, mask, regularization=regularization)
        safe = jnp.asarray(d["safer_sign"] > 0), jnp.asarray(d["unsafer_sign"] > 0)
        return safety_loss(first, second, *safe, mask, regularization=regularization)

    value, grad = jax.value_and_grad(loss)(jnp.asarray(d["scores"]))
    np.testing.assert_allclose(value, d["out_loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad, d["grad_scores"], rtol=1e-5, atol=1e-5)
    assert np.any(grad)


@pytest.mark.parametrize("difference", [-1e3, -5.0, 0.0, 5.0, 1e3])
def test_ranking_loss_is_finite_and_its_gradient_is_minus_the_chance_of_the_other_order(difference):
    def f(x):
        return bradley_terry_loss(x, jnp.zeros(1), regularization=0.0)

    value, grad = jax.value_and_grad(f)(jnp.array([difference], jnp.float32))
    assert np.isfinite(value)
    np.testing.assert_allclose(grad[0], -1 / (1 + np.exp(np.float64(difference))), rtol=1e-5, atol=1e-7)


def test_safety_loss_is_finite_for_extreme_scores():
    extreme, yes = jnp.array([1e3, -1e3]), jnp.array([True, True])
    value, grad = jax.value_and_grad(lambda x: safety_loss(x, -x, yes, ~yes, regularization=0.0))(extreme)
    assert np.isfinite(value)
    assert np.all(np.isfinite(grad))


def test_safe_costs_are_pushed_below_zero_and_unsafe_above():
    yes, zero = jnp.array([True]), jnp.zeros(1)
    for safe, sign in ((yes, 1), (~yes, -1)):  # descent moves against the gradient
        grads = jax.grad(lambda a, b, s: safety_loss(a, b, s, s, regularization=0.0), argnums=(0, 1))(zero, zero, safe)
        ranking = 0.5  # raises the unsafer and lowers the safer
        np.testing.assert_allclose(grads[0], sign * 0.5 + ranking)
        np.testing.assert_allclose(grads[1], sign * 0.5 - ranking, atol=1e-7)


# --- several annotators, and weights


def pair_losses(first, second, mask, *labels, **options):
    """Both losses of pairs with labels (the first is preferred, the first is safe, the second is safe)."""
    options = {"regularization": 0.01} | options
    preferred, *safe = labels
    return (
        bradley_terry_loss(first, second, mask, share=preferred, **options),
        safety_loss(first, second, *safe, mask, share=preferred, **options),
    )


def scores_of_pairs(token_wise, rows=5):
    rng = np.random.default_rng(3)
    shape = (rows, 4) if token_wise else (rows,)
    mask = jnp.asarray(np.arange(4)[None] < rng.integers(1, 5, (rows, 1))) if token_wise else None
    return *(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)), mask


def full(label, rows=5):
    return jnp.full((rows,), label, jnp.float32)


@pytest.mark.parametrize("token_wise", [False, True])
def test_votes_of_two_to_one_have_the_loss_of_the_weighted_mean_of_both_labels(token_wise):
    first, second, mask = scores_of_pairs(token_wise)
    kept = [full(1.0), full(0.0)]
    for i, hard in enumerate([full(1.0), full(1.0), full(0.0)]):
        labels = [full(1.0), *kept]
        labels[i] = full(2 / 3)
        found = pair_losses(first, second, mask, *labels)
        labels[i] = hard
        one = pair_losses(first, second, mask, *labels)
        labels[i] = 1 - hard
        other = pair_losses(first, second, mask, *labels)
        share = 2 / 3 if float(hard[0]) == 1 else 1 / 3
        for soft, a, b in zip(found, one, other, strict=True):
            np.testing.assert_allclose(soft, share * a + (1 - share) * b, rtol=1e-6)
        assert found[1] != one[1]
    by_hand = -(2 * jax.nn.log_sigmoid(first - second) + jax.nn.log_sigmoid(second - first)) / 3
    if not token_wise:
        loss = bradley_terry_loss(first, second, regularization=0.0, share=full(2 / 3))
        np.testing.assert_allclose(loss, by_hand.mean(), rtol=1e-6)


@pytest.mark.parametrize("token_wise", [False, True])
def test_unanimous_shares_and_equal_weights_are_hard_labels_bit_for_bit(token_wise):
    first, second, mask = scores_of_pairs(token_wise)
    safe = jnp.array([True, True, False, False, True]), jnp.array([True, False, False, True, False])
    soft = [x.astype(jnp.float32) for x in safe]

    def gradients(*labels, **options):
        def loss(scores):
            ranking, safety = pair_losses(*scores, mask, *labels, **options)
            return ranking + 3.0 * safety

        return jax.jit(jax.value_and_grad(loss))((first, second))

    hard = gradients(None, *safe)
    chex.assert_trees_all_equal(gradients(full(1.0), *soft), hard)
    chex.assert_trees_all_equal(gradients(full(1.0), *soft, weight=full(1.0)), hard)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(gradients(full(0.9), *soft), hard)


@pytest.mark.parametrize("token_wise", [False, True])
def test_weights_scale_the_terms_of_their_pairs(token_wise):
    first, second, mask = scores_of_pairs(token_wise)
    labels = [full(0.8), full(0.9), full(0.1)]
    alone = []
    for i in range(5):
        rows = jnp.array([i])
        part = [label[rows] for label in labels]
        alone.append(pair_losses(first[rows], second[rows], None if mask is None else mask[rows], *part))
    weight = jnp.array([2.0, 0.0, 1.0, 0.5, 1.5])
    for found, terms in zip(
        pair_losses(first, second, mask, *labels, weight=weight), zip(*alone, strict=True), strict=True
    ):
        np.testing.assert_allclose(found, (np.asarray(weight) * np.asarray(terms)).mean(), rtol=1e-5)
    doubled = pair_losses(first, second, mask, *labels, weight=2 * weight)
    np.testing.assert_allclose(
        doubled, 2 * np.asarray(pair_losses(first, second, mask, *labels, weight=weight)), rtol=1e-6
    )


def annotated(kind, pad=0):
    """Eight pairs with shares and weights, and `pad` more columns."""
    rng = np.random.default_rng(4)
    numbers = [jnp.asarray(rng.uniform(size=8), jnp.float32) for _ in range(4)]
    texts = []
    for _ in range(2):
        tokens, mask = right_padded(rng, 8, 7, 24)
        texts.append(jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad))), Sequences(tokens, mask, mask)))
    if kind == "reward":
        return PreferenceBatch(*texts, share=numbers[0], weight=numbers[3])
    labels = [x > 0.5 for x in numbers[1:3]]
    return SafetyBatch(*texts, *labels, SafetyShares(*numbers[:3]), weight=numbers[3])


@functools.cache
def trained_on_annotated(kind, pad=0, microbatches=1, devices=None):
    """Parameters and metrics after a step on pairs with shares and weights."""
    stage = {"reward": RewardStage, "cost": CostStage}[kind](
        name="s", kind=kind, init_from="preset:tiny", data={"name": "demo/preference"}, token_wise=True,
        microbatches=microbatches,
    )  # fmt: skip
    module, variables = make_scorer(kind, CONFIG, 1)
    optimizer = optax.sgd(1.0)
    step = jax.jit({"reward": reward_step, "cost": cost_step}[kind](stage, module, optimizer))
    state = init_state(variables["params"], optimizer, stats=variables["stats"])
    batch = annotated(kind, pad)
    key = jax.random.key(0)
    if devices is None:
        state, metrics = step(state, None, batch, key)
    else:
        mesh = make_mesh((devices, 1, 1))
        with jax.set_mesh(mesh):
            state, metrics = step(state, None, shard_batch(batch, mesh), key)
    return jax.device_get((state.params, {k: metrics[k] for k in ("train/loss", "train/accuracy")}))


@pytest.mark.parametrize("kind", ["reward", "cost"])
@pytest.mark.parametrize("change", [{"pad": 5}, {"microbatches": 4}, {"devices": 8}])
def test_padding_microbatches_and_devices_do_not_change_a_step_with_shares_and_weights(kind, change):
    chex.assert_trees_all_close(trained_on_annotated(kind, **change), trained_on_annotated(kind), atol=2e-6, rtol=1e-5)


def test_sign_accuracy_is_strict():
    costs, safe = jnp.array([-1.0, 1.0, 0.0, 2.0]), jnp.array([True, False, True, True])
    assert float(sign_accuracy(costs, safe)) == 0.5


def sequences(tokens, lengths):
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.arange(tokens.shape[1])[None] < jnp.asarray(lengths)[:, None]
    return Sequences(tokens=tokens, mask=mask, response_mask=mask)


def test_divergence_mask_starts_at_the_first_difference_and_leaves_out_padding():
    first = sequences([[5, 6, 7, 8, 0, 0], [5, 6, 7, 0, 0, 0], [5, 6, 0, 0, 0, 0]], [4, 3, 2])
    second = sequences([[5, 6, 9, 8, 4, 2], [5, 6, 7, 0, 0, 0], [4, 6, 0, 0, 0, 0]], [6, 3, 2])
    expected = [[0, 0, 1, 1, 0, 0], [0] * 6, [1, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(divergence_mask(first, second), np.array(expected, bool))


def test_one_forward_of_both_sides_equals_two():
    module, variables = make_scorer("reward", CONFIG, 1)
    rng = np.random.default_rng(0)
    sides = [Sequences(tokens, mask, mask) for tokens, mask in (right_padded(rng, 4, 7, 24) for _ in range(2))]
    both = jax.jit(functools.partial(pair_scores, module))(variables["params"], variables["stats"], *sides)
    for side, scores in zip(sides, both, strict=True):
        alone = apply(module, variables, side.tokens, side.mask)
        np.testing.assert_allclose(jnp.where(side.mask, scores - alone, 0), 0, atol=1e-5)


def texts(rows=4, length=7):
    tokens, mask = right_padded(np.random.default_rng(2), rows, length, 24)
    return SupervisedBatch(tokens, mask, mask & (jnp.arange(length) >= min(2, length))[None])


def test_sft_loss_is_the_mean_over_response_tokens_eos_included():
    module, variables = make_lm(CONFIG)
    batch = texts()
    loss, _ = jax.jit(functools.partial(lm_loss, module))(variables["params"], batch, token_weights(batch.loss_mask))
    log_probs = jax.nn.log_softmax(apply(module, variables, batch.tokens, batch.mask))
    terms = [-float(log_probs[b, t - 1, batch.tokens[b, t]]) for b, t in zip(*np.nonzero(batch.loss_mask), strict=True)]
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
    last = np.asarray(batch.mask).sum(1) - 1
    assert bool(batch.loss_mask[0, last[0]])


def test_targets_outside_the_response_change_no_sft_loss():
    module, variables = make_lm(CONFIG)
    batch = texts()
    only_last = jnp.arange(7)[None] == 6
    batch = dataclasses.replace(batch, loss_mask=batch.mask & only_last)
    weights = token_weights(batch.loss_mask)
    assert int(batch.loss_mask.sum()) >= 1

    def loss(weights):
        return lm_loss(module, variables["params"], batch, weights)[0]

    assert float(loss(weights)) > 0
    assert float(loss(jnp.where(only_last, 0.0, weights))) == 0.0


@pytest.mark.parametrize("microbatches", [2, 8])
def test_sft_microbatches_of_uneven_lengths_take_the_same_step(microbatches):
    import optax

    module, variables = make_lm(CONFIG)
    batch, optimizer = texts(8), optax.sgd(0.1)
    rows = batch, token_weights(batch.loss_mask)

    def step(parts):
        loss = lambda params, part: lm_loss(module, params, *part)  # noqa: E731
        state = init_state(variables["params"], optimizer)
        take = jax.jit(lambda state: gradient_step(loss, state, rows, optimizer, microbatches=parts))
        return take(state)

    (whole, metrics), (cut, cut_metrics) = step(1), step(microbatches)
    chex.assert_trees_all_close(whole.params, cut.params, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], cut_metrics["loss"], rtol=1e-5)


def normalise(batches, momentum):
    stats = {"mean": jnp.zeros(1), "var": jnp.ones(1), "count": jnp.zeros(1, jnp.int32)}
    config = ScoreConfig("reward", normalize=True, momentum=momentum)
    for batch in batches:
        stats = update_normalizer(stats, batch, config)
    return stats


def test_exponential_normaliser_follows_its_formula():
    batches = np.random.default_rng(0).normal(3, 2, (5, 8)).astype(np.float32)
    mean, var = 0.0, 1.0
    for batch in batches:
        mean, var = 0.9 * mean + 0.1 * batch.mean(), 0.9 * var + 0.1 * batch.var(ddof=1)
    stats = normalise(map(jnp.asarray, batches), 0.9)
    np.testing.assert_allclose([stats["mean"][0], stats["var"][0]], [mean, var], rtol=1e-4)


def test_running_normaliser_has_the_mean_of_all_scores():
    batches = np.random.default_rng(0).normal(3, 2, (5, 40)).astype(np.float32)
    stats = normalise(map(jnp.asarray, batches), None)
    np.testing.assert_allclose(stats["mean"][0], batches.mean(), rtol=1e-4)
    np.testing.assert_allclose(stats["var"][0], batches.var(), rtol=0.03)  # unbiased within a batch
    assert int(stats["count"][0]) == batches.size


@pytest.mark.parametrize("momentum", [0.0, None])
def test_normaliser_keeps_a_variance_that_is_small_beside_the_mean(momentum):
    scores = np.random.default_rng(0).normal(50.0, 0.02, 64).astype(np.float32)
    stats = normalise([jnp.asarray(scores)], momentum)
    np.testing.assert_allclose(stats["var"][0], scores.astype(np.float64).var(ddof=1), rtol=1e-2)
    assert 3e-4 < float(stats["var"][0]) < 5e-4


@pytest.mark.parametrize("microbatches", [1, 4, 16])
def test_perplexity_is_that_of_the_batch_however_it_is_cut(microbatches):
    import optax

    module, variables = make_lm(CONFIG)
    stage = SFTStage(
        name="sft", kind="sft", init_from="preset:tiny", data={"name": "demo/sft"}, microbatches=microbatches
    )
    state = init_state(variables["params"], optax.sgd(0.1))
    _, metrics = jax.jit(sft_step(stage, module, optax.sgd(0.1)))(state, None, texts(16), jax.random.key(0))
    np.testing.assert_allclose(metrics["train/perplexity"], np.exp(metrics["train/loss"]), rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_scores_of_pairs_are_normalised_alike_however_the_batch_is_cut(microbatches):
    import optax

    module, variables = make_scorer("reward", CONFIG, 1, normalize=True, momentum=None)
    rng = np.random.default_rng(0)
    batch = PreferenceBatch(
        *(Sequences(tokens, mask, mask) for tokens, mask in (right_padded(rng, 16, 7, 24) for _ in range(2)))
    )
    stage = RewardStage(
        name="reward", kind="reward", init_from="preset:tiny", data={"name": "demo/preference"},
        batch_size=16, microbatches=microbatches,
    )  # fmt: skip
    state = init_state(variables["params"], optax.sgd(0.1), variables["stats"])
    state, metrics = jax.jit(reward_step(stage, module, optax.sgd(0.1)))(state, None, batch, jax.random.key(0))
    scores = np.concatenate(
        [
            gather_last(score, side.mask)
            for score, side in zip(
                jax.jit(functools.partial(pair_scores, module))(
                    variables["params"], variables["stats"], batch.chosen, batch.rejected
                ),
                (batch.chosen, batch.rejected),
                strict=True,
            )
        ]
    )
    np.testing.assert_allclose(metrics["train/score_mean"], scores.mean(), rtol=1e-4)
    np.testing.assert_allclose(state.stats["mean"][0], scores.mean(), rtol=1e-4)
    np.testing.assert_allclose(state.stats["var"][0], scores.var(ddof=1), rtol=1e-4)
    assert all(value.ndim == 0 for value in metrics.values())
