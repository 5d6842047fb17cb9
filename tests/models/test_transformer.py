import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from safe_rlhf_jax import ops
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.attention import causal_mask
from safe_rlhf_jax.models.config import PRESETS, ModelConfig, ScoreConfig
from safe_rlhf_jax.models.positions import token_positions
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.sharding import LOGICAL_RULES
from tests.helpers import apply, make_lm, make_scorer, perturbed, prompt_batch, right_padded, tiny_config

GOLDEN = Path(__file__).parent.parent / "golden" / "trajectory"
VOCAB = 97
BATCH, LENGTH = 4, 10
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

response_log_probs = jax.jit(ops.response_log_probs, static_argnames=("module", "prompt_length"))
response_values = jax.jit(ops.response_values, static_argnames=("module", "prompt_length"))


@pytest.fixture(scope="module")
def lm():
    module, variables = make_lm(tiny_config(attention_bias=True, mlp_bias=True))
    return module, perturbed(variables)


@pytest.fixture
def batch():
    return right_padded(np.random.default_rng(0), BATCH, LENGTH, VOCAB)


# --- Golden -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trajectory():
    with np.load(GOLDEN / "trajectory.npz") as file:
        return {name: file[name] for name in file}


@pytest.fixture(scope="module")
def rollout(trajectory):
    return jnp.asarray(trajectory["input_ids"], jnp.int32), jnp.asarray(trajectory["attention_mask"] > 0)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(("folder", "name"), [("actor", "out_old_log_probs"), ("reference", "out_ref_log_probs")])
def test_log_probs_of_the_reference_rollout_are_reproduced(trajectory, rollout, folder, name, scan_layers):
    tokens, mask = rollout
    width = int(trajectory["prompt_width"])
    module, variables = hf.load(GOLDEN / folder, scan_layers=scan_layers)
    actual = response_log_probs(module, variables["params"], tokens, mask, prompt_length=width)
    real = np.asarray(mask)[:, width:]
    np.testing.assert_allclose(np.asarray(actual)[real], trajectory[name][:, width - 1 :][real], **TOLERANCE)


@pytest.mark.parametrize("signal", ["reward", "cost"])
def test_scores_of_the_reference_rollout_are_reproduced(trajectory, rollout, signal):
    tokens, mask = rollout
    module, variables = hf.load(GOLDEN / signal, "score")
    assert module.score.score_type == signal
    scores = ops.gather_last(apply(module, variables, tokens, mask), mask)
    np.testing.assert_allclose(scores, trajectory[f"out_{signal}"], **TOLERANCE)


@pytest.mark.parametrize("signal", ["reward", "cost"])
def test_values_of_the_reference_rollout_are_reproduced(trajectory, rollout, signal):
    tokens, mask = rollout
    width = int(trajectory["prompt_width"])
    module, variables = hf.load(GOLDEN / signal, "score", score_type="critic")
    assert set(variables) == {"params"}
    actual = response_values(module, variables["params"], tokens, mask, prompt_length=width)
    real = np.asarray(mask)[:, width:]
    expected = trajectory[f"out_{signal}_values"][:, width - 1 :]
    np.testing.assert_allclose(np.asarray(actual)[real], expected[real], **TOLERANCE)


# --- Padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(8))
def test_padding_on_either_side_changes_no_logit(lm, batch, k):
    module, variables = lm
    tokens, full = batch[0], jnp.ones((BATCH, LENGTH), bool)
    expected = apply(module, variables, tokens, full)
    junk = jnp.asarray(np.random.default_rng(k).integers(0, VOCAB, (BATCH, k)), jnp.int32)
    hidden = jnp.zeros((BATCH, k), bool)
    left = apply(module, variables, jnp.concatenate([junk, tokens], 1), jnp.concatenate([hidden, full], 1))
    right = apply(module, variables, jnp.concatenate([tokens, junk], 1), jnp.concatenate([full, hidden], 1))
    np.testing.assert_allclose(left[:, k:], expected, **TOLERANCE)
    np.testing.assert_allclose(right[:, :LENGTH], expected, **TOLERANCE)


def test_a_score_is_the_same_whatever_stands_beside_it(batch):
    module, variables = make_scorer("reward", tiny_config())
    tokens, mask = batch
    together = ops.gather_last(apply(module, variables, tokens, mask), mask)
    for row in range(BATCH):
        length = int(mask[row].sum())
        alone = apply(module, variables, tokens[row : row + 1, :length], jnp.ones((1, length), bool))[0, -1]
        np.testing.assert_allclose(together[row], alone, **TOLERANCE)
    order = np.array([2, 0, 3, 1])
    shuffled = ops.gather_last(apply(module, variables, tokens[order], mask[order]), mask[order])
    np.testing.assert_allclose(shuffled, together[order], **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_behind_the_mask_are_never_read(lm, batch, side):
    module, variables = lm
    tokens, mask = (batch[0], batch[1]) if side == "right" else (batch[0][:, ::-1], batch[1][:, ::-1])
    expected = apply(module, variables, tokens, mask)
    actual = apply(module, variables, jnp.where(mask, tokens, 77), mask)
    np.testing.assert_array_equal(np.asarray(actual)[np.asarray(mask)], np.asarray(expected)[np.asarray(mask)])
    assert not np.array_equal(actual, expected)  # padding positions have outputs of their own


def test_a_row_of_padding_is_finite_and_leaves_other_rows_and_gradients_alone(lm, batch):
    module, variables = lm
    tokens, mask = batch
    more_tokens = jnp.concatenate([tokens, jnp.zeros((1, LENGTH), jnp.int32)])
    more_mask = jnp.concatenate([mask, jnp.zeros((1, LENGTH), bool)])
    out = apply(module, variables, more_tokens, more_mask)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:-1], apply(module, variables, tokens, mask), **TOLERANCE)

    @jax.jit
    def gradient(params, tokens, mask):
        def loss(params):
            log_probs = ops.response_log_probs(module, params, tokens, mask, prompt_length=2)
            return jnp.where(mask[:, 2:], log_probs, 0.0).sum()

        return jax.grad(loss)(params)

    expected = gradient(variables["params"], tokens, mask)
    actual = gradient(variables["params"], more_tokens, more_mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected) if leaf.ndim > 1)


def test_positions_count_real_tokens():
    mask = jnp.array([[False, False, True, True], [True, True, True, False]])
    np.testing.assert_array_equal(token_positions(mask), [[0, 0, 0, 1], [0, 1, 2, 2]])


# --- Causality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 4, 8])
def test_later_tokens_change_no_earlier_logit_by_a_single_bit(lm, batch, t):
    module, variables = lm
    tokens, full = batch[0], jnp.ones((BATCH, LENGTH), bool)
    changed = jnp.where(jnp.arange(LENGTH)[None] > t, (tokens + 5) % VOCAB, tokens)
    before, after = apply(module, variables, tokens, full), apply(module, variables, changed, full)
    np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
    assert (jnp.abs(before[:, t + 1 :] - after[:, t + 1 :]).max(-1) > 1e-3).all()


def test_gradients_do_not_flow_from_a_logit_to_later_tokens(lm):
    module, variables = lm
    tokens = jnp.arange(LENGTH, dtype=jnp.int32)[None] + 3  # all different: row i of the gradient belongs to column i
    full = jnp.ones((1, LENGTH), bool)
    t = 4

    def logit(params):
        return module.apply({"params": params}, tokens, full)[0, t].sum()

    gradient = jax.jit(jax.grad(logit))(variables["params"])["decoder"]["embedding"][tokens[0]]
    assert (np.abs(gradient[: t + 1]).max(-1) > 0).all()
    np.testing.assert_array_equal(gradient[t + 1 :], 0.0)


# --- Ways to run ------------------------------------------------------------------------------------------------------


def rearranged(module, variables, tmp_path, **changes):
    """The same weights in a module that runs them otherwise."""
    hf.save(tmp_path, module, variables)
    module, variables = hf.load(tmp_path, scan_layers=changes.pop("scan_layers"))
    return CausalLM(dataclasses.replace(module.config, **changes)), variables


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanning_and_rematerialisation_change_neither_logits_nor_gradients(lm, batch, tmp_path, scan_layers, remat):
    tokens, mask = batch
    module, variables = lm

    def run(module, params):
        def loss(params):
            logits = module.apply({"params": params}, tokens, mask)
            return jnp.where(mask[..., None], jnp.sin(logits), 0.0).sum(), logits

        (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return logits, gradient["decoder"]["embedding"]

    expected, expected_gradient = run(module, variables["params"])
    other, other_variables = rearranged(module, variables, tmp_path, scan_layers=scan_layers, remat=remat)
    actual, gradient = run(other, other_variables["params"])
    np.testing.assert_allclose(actual, expected, **TOLERANCE)
    scale = np.abs(expected_gradient).max()  # some entries are sums of large terms that cancel
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=3e-7 * scale)


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_cached_decoding_equals_the_full_forward(scan_layers, tie_embeddings):
    module, variables = make_lm(tiny_config(scan_layers=scan_layers, tie_embeddings=tie_embeddings))
    rng = np.random.default_rng(3)
    prompts = prompt_batch(rng, BATCH, 6, VOCAB)
    tokens = jnp.concatenate([prompts.tokens, jnp.asarray(rng.integers(3, VOCAB, (BATCH, 5)), jnp.int32)], 1)
    mask = jnp.concatenate([prompts.mask, jnp.ones((BATCH, 5), bool)], 1)
    expected = apply(module, variables, tokens, mask)

    prefill = jax.jit(lambda v, *args: module.apply(v, *args, 11, method="prefill"))
    decode = jax.jit(lambda v, *args: module.apply(v, *args, method="decode"))
    logits, cache = prefill(variables, prompts.tokens, prompts.mask)
    np.testing.assert_allclose(logits, expected[:, 5], **TOLERANCE)
    positions = token_positions(mask)
    for slot in range(6, 11):
        visible = mask & (jnp.arange(11) <= slot)[None]
        logits, cache = decode(variables, tokens[:, slot], positions[:, slot], visible, cache, jnp.int32(slot))
        np.testing.assert_allclose(logits, expected[:, slot], **TOLERANCE)


def test_bfloat16_matmuls_stay_near_float32_and_return_float32(lm, batch):
    module, variables = lm
    tokens, mask = batch
    half = CausalLM(dataclasses.replace(module.config, dtype="bfloat16"))
    expected, actual = apply(module, variables, tokens, mask), apply(half, variables, tokens, mask)
    assert actual.dtype == jnp.float32
    error = np.abs(actual - expected)[np.asarray(mask)]
    assert 0 < error.mean() < 0.05 * np.abs(expected).mean()


# --- Scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score_type", "expected"),
    [("reward", lambda x: (x - 3.0) / 2.0), ("cost", lambda x: x / 2.0), ("critic", lambda x: x)],
)
def test_normaliser_is_affine_for_rewards_scale_for_costs_and_absent_for_critics(batch, score_type, expected):
    tokens, mask = batch
    module, variables = make_scorer(score_type, tiny_config(), normalize=True)
    if score_type == "critic":
        assert "stats" not in variables
    else:
        variables = variables | {"stats": {**variables["stats"], "mean": jnp.array([3.0]), "var": jnp.array([4.0])}}
    raw = apply(module, variables, tokens, mask, method="raw_scores")
    scores = apply(module, variables, tokens, mask)
    np.testing.assert_allclose(scores, expected(raw), rtol=1e-6, atol=1e-6)
    if score_type == "cost":
        np.testing.assert_array_equal(np.sign(scores), np.sign(raw))
        assert {-1.0, 1.0} <= set(np.sign(np.asarray(raw)).ravel())


@pytest.mark.parametrize("score_type", ["reward", "cost"])
def test_scores_are_left_as_they_are_unless_normalisation_is_asked_for(batch, score_type):
    module, variables = make_scorer(score_type, tiny_config())
    variables = variables | {"stats": {**variables["stats"], "mean": jnp.array([3.0]), "var": jnp.array([4.0])}}
    raw = apply(module, variables, *batch, method="raw_scores")
    np.testing.assert_array_equal(apply(module, variables, *batch), raw)


def test_new_score_head_has_the_published_deviation_and_no_offset():
    config = tiny_config(hidden_size=4096, num_layers=1)
    params = make_scorer("reward", config)[1]["params"]
    np.testing.assert_allclose(params["score_kernel"].std(), 4097**-0.5, rtol=0.06)  # five standard errors
    np.testing.assert_array_equal(params["score_bias"], 0.0)


# --- Shapes -----------------------------------------------------------------------------------------------------------

LLAMA_7B = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128, max_positions=4096,
)  # fmt: skip
LLAMA_70B = ModelConfig(
    vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8,
    head_dim=128, max_positions=4096,
)  # fmt: skip
CONFIGS = {
    "7B": LLAMA_7B,
    "70B": LLAMA_70B,
    "biases": tiny_config(attention_bias=True, mlp_bias=True),
    "tied": tiny_config(tie_embeddings=True),
} | {name: ModelConfig(**({"vocab_size": 512} | sizes)) for name, sizes in PRESETS.items()}
# Large models are always scanned.
LAYOUTS = [(name, scanned) for name in CONFIGS for scanned in (True, False) if scanned or name not in ("7B", "70B")]


@pytest.mark.parametrize(
    ("config", "size"), [(LLAMA_7B, 6_738_415_616), (LLAMA_70B, 68_976_648_192)], ids=["7B", "70B"]
)
def test_published_models_have_their_published_size(config, size):
    params = hf.abstract_variables(CausalLM(config))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


@pytest.mark.parametrize(
    "score", [None, ScoreConfig("cost"), ScoreConfig("critic", bias=False)], ids=["lm", "score", "no bias"]
)
@pytest.mark.parametrize(("name", "scan_layers"), LAYOUTS)
def test_weight_map_covers_every_parameter_once(name, scan_layers, score):
    layers = CONFIGS[name].num_layers if scan_layers else min(CONFIGS[name].num_layers, 3)  # each is traced anew
    config = dataclasses.replace(CONFIGS[name], scan_layers=scan_layers, num_layers=layers)
    module = CausalLM(config) if score is None else ScoreModel(config, score)
    shapes = flatten_dict(hf.abstract_variables(module)["params"])
    weights = hf.weight_map(config, score).values()
    places = [(path, weight.layer) for weight in weights for path in weight.paths]
    assert len(set(places)) == len(places)
    expected = set()
    for path, leaf in shapes.items():
        stacked = scan_layers and path[:2] == ("decoder", "layers")
        expected |= {(path, i) for i in range(leaf.shape[0])} if stacked else {(path, None)}
    assert set(places) == expected


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("head", ["lm", "score"])
def test_every_parameter_names_a_known_axis_for_every_dimension(head, scan_layers):
    config = tiny_config(attention_bias=True, mlp_bias=True, scan_layers=scan_layers)
    module = CausalLM(config) if head == "lm" else ScoreModel(config, ScoreConfig("reward"))
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens == 0)["params"]
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= set(LOGICAL_RULES)


def test_causal_mask_hides_padding_and_the_future():
    mask = jnp.array([[False, True, True]])
    np.testing.assert_array_equal(causal_mask(mask)[0], [[False] * 3, [False, True, False], [False, True, True]])
