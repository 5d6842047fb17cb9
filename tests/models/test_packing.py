"""A text in a row with others gets what it gets in a row of its own: every family, both heads, losses and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safe_rlhf_jax.data.packing import Rows, pack
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.objectives import cost_loss, lm_loss, pair_log_probs, reward_loss, token_weights
from safe_rlhf_jax.ops import packed, text_log_probs, unpacked
from safe_rlhf_jax.optim import gradient_step, init_state
from safe_rlhf_jax.sharding import make_mesh, shard_batch
from safe_rlhf_jax.types import PreferenceBatch, SafetyBatch, Sequences, SupervisedBatch
from tests.golden.make_families import FOLDER, MODELS, VOCAB
from tests.helpers import make_lm, make_scorer, tiny_config
from tests.models.test_families import BY_LENGTH, SAME, assert_close

LENGTH, SIZES = 12, (12, 3, 7, 1, 9, 4, 5, 2)
CONFIG = tiny_config(vocab_size=VOCAB)


def texts(seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < np.array(sizes)[:, None]
    tokens = np.where(mask, rng.integers(3, VOCAB, mask.shape), 0)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


def packing_of(sizes, rows=3, parts=1):
    sides = np.asarray(sizes).reshape(-1, len(SIZES))
    return jax.tree.map(jnp.asarray, pack(sides, LENGTH, Rows(rows * parts, (2 * LENGTH,), parts)))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BY_LENGTH])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_log_probs_of_every_family_are_those_of_unpacked_rows(name, scan_layers):
    module, variables = hf.load(FOLDER / name, scan_layers=scan_layers)
    tokens, mask = texts()

    def log_probs(packing):
        return jax.jit(text_log_probs, static_argnums=0)(module, variables["params"], tokens, mask, packing)

    real = np.asarray(mask[:, 1:])
    assert packing_of(SIZES).sources.shape[0] < len(SIZES)
    assert_close(np.asarray(log_probs(packing_of(SIZES)))[real], np.asarray(log_probs(None))[real], SAME)


@pytest.mark.parametrize("pad_id", [None, 5])
def test_scores_are_those_of_unpacked_rows_also_where_they_are_read_before_padding_tokens(pad_id):
    tokens, mask = texts()
    tokens = tokens.at[0, -2:].set(5).at[2, 6].set(5)
    module, variables = make_scorer("reward", CONFIG, pad_id=pad_id)

    def scores(packing):
        rows, numbers = packed(tokens, mask, packing)
        return unpacked(module.apply(variables, rows, numbers), packing, LENGTH)

    real = np.asarray(mask)
    assert_close(np.asarray(scores(packing_of(SIZES)))[real], np.asarray(scores(None))[real], SAME)


def sides(seed):
    tokens, mask = texts(seed, np.roll(SIZES, seed))
    return Sequences(tokens, mask, mask & (jnp.arange(LENGTH)[None] > 1))


SAFE = jnp.arange(len(SIZES)) % 3 > 0
PAIR = sides(0), sides(1)
LM, LM_VARIABLES = make_lm(CONFIG)
SCORER, SCORER_VARIABLES = make_scorer("cost", CONFIG)
PARAMS = {"lm": LM_VARIABLES["params"], "score": SCORER_VARIABLES["params"]}
STATS = SCORER_VARIABLES["stats"]


def supervised_loss(params, rows):
    return lm_loss(LM, params["lm"], *rows)


def direct_loss(params, batch):
    first, second = pair_log_probs(LM, params["lm"], batch.chosen, batch.rejected, batch.packing)
    return (first - 0.5 * second).mean(), {}


def scalars(loss_of, **options):
    def loss(params, batch):
        value, metrics = loss_of(SCORER, params["score"], STATS, batch, token_wise=False, regularization=0.1, **options)
        return value, {name: value for name, value in metrics.items() if value.ndim == 0}

    return loss


def token_wise(params, batch):
    return reward_loss(SCORER, params["score"], STATS, batch, token_wise=True, regularization=0.1)[0], {}


text = SupervisedBatch(*texts(), PAIR[0].response_mask)
LOSSES = {
    "lm": (supervised_loss, (text, token_weights(text.loss_mask)), 1),
    "reward": (scalars(reward_loss), PreferenceBatch(*PAIR), 2),
    "token-wise": (token_wise, PreferenceBatch(*PAIR), 2),
    "cost": (scalars(cost_loss), SafetyBatch(*PAIR, SAFE, ~SAFE), 2),
    "dpo": (direct_loss, PreferenceBatch(*PAIR), 2),
}


def with_packing(batch, packing):
    if isinstance(batch, tuple):
        return dataclasses.replace(batch[0], packing=packing), batch[1]
    return dataclasses.replace(batch, packing=packing)


def step(loss, batch, parts):
    optimizer = optax.sgd(0.1)  # Adam would turn rounding of a gradient near 0 into a whole step
    run = jax.jit(lambda state, batch: gradient_step(loss, state, batch, optimizer, microbatches=parts))
    state, metrics = run(init_state(PARAMS, optimizer), batch)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_is_that_of_unpacked_rows_on_one_device_and_on_eight(kind, parts):
    loss, batch, count = LOSSES[kind]
    sizes = [np.asarray(side.mask).sum(1) for side in (PAIR if count == 2 else (text,))]
    plain, plain_metrics = step(loss, batch, parts)
    packed_batch = with_packing(batch, packing_of(sizes, rows=8 // parts, parts=parts))
    mesh = make_mesh((2, 4, 1))
    with jax.set_mesh(mesh):
        eight = step(loss, shard_batch(packed_batch, mesh), parts)
    for params, metrics in (step(loss, packed_batch, parts), eight):
        for name, value in plain_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, plain)


def test_the_comparison_sees_texts_that_attend_to_each_other():
    tokens, mask = texts()
    packing = packing_of(SIZES)
    rows, numbers = packed(tokens, mask, packing)
    apart, together = (
        LM.apply(LM_VARIABLES, rows, seen, method="hidden") for seen in (numbers, (numbers > 0).astype(jnp.int32))
    )
    assert not np.allclose(apart, together, atol=1e-2)
