"""What is summed and multiplied in which precision: float32 is float32, and bfloat16 loses nothing by adding up."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.objectives import lm_loss, token_weights
from safe_rlhf_jax.ops import next_token_log_probs
from safe_rlhf_jax.types import SupervisedBatch
from tests.helpers import make_lm, make_scorer, right_padded, tiny_config

MANY = 4096  # times that one token occurs


def gradient(module, params, tokens):
    ones = jnp.ones(tokens.shape, bool)
    batch = SupervisedBatch(tokens, ones, ones)
    loss = lambda params: lm_loss(module, params, batch, token_weights(ones))[0]  # noqa: E731
    return jax.jit(jax.grad(loss))(params)


def difference(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


@pytest.fixture(scope="module", params=["rotary", "learned"])
def gradients(request):
    """Gradients in bfloat16 and in float32, of texts in which one token stands thousands of times."""
    biases = {"attention_bias": True, "mlp_bias": True, "positions": request.param}
    config = tiny_config(num_layers=1, tie_embeddings=True, **biases)
    _, variables = make_lm(config)
    tokens = np.random.default_rng(0).integers(3, 97, (MANY // 16, 32)).astype(np.int32)
    tokens[:, ::2] = 5
    of = {dtype: gradient(CausalLM(dataclasses.replace(config, dtype=dtype)), variables["params"], jnp.asarray(tokens))
          for dtype in ("bfloat16", "float32")}  # fmt: skip
    return of["bfloat16"]["decoder"], of["float32"]["decoder"]


def test_gradient_of_a_frequent_token_is_as_good_in_bfloat16_as_the_rest(gradients):
    low, high = gradients
    assert difference(low["embedding"][5], high["embedding"][5]) < 0.03
    assert difference(low["embedding"], high["embedding"]) < 0.03
    if "position_embedding" in low:
        assert difference(low["position_embedding"][:32], high["position_embedding"][:32]) < 0.03


def test_gradients_of_biases_are_sums_in_float32(gradients):
    low, high = ({"attention": g["layers_0"]["attention"], "mlp": g["layers_0"]["mlp"]} for g in gradients)
    for part, name in (("attention", "v_proj"), ("attention", "o_proj"), ("mlp", "up_proj"), ("mlp", "down_proj")):
        assert difference(low[part][name]["bias"], high[part][name]["bias"]) < 0.02, name


@pytest.mark.parametrize("head", ["tied", "untied", "score"])
def test_logits_and_scores_in_bfloat16_are_not_rounded_to_eight_bits(head):
    config = tiny_config(dtype="bfloat16", tie_embeddings=head == "tied")
    module, variables = make_scorer("cost", config) if head == "score" else make_lm(config)
    tokens, mask = right_padded(np.random.default_rng(1), 64, 16, 97)
    out = np.asarray(module.apply(variables, tokens, mask))
    assert out.dtype == np.float32
    rounded = np.asarray(jnp.asarray(out).astype(jnp.bfloat16), np.float32)
    assert (out != rounded).mean() > 0.9


def lowered(dtype, what):
    """The program of a loss and its gradient, before a backend has seen it."""
    config = tiny_config(dtype=dtype, attention_bias=True, scan_layers=True)
    tokens = jnp.ones((2, 8), jnp.int32)
    if what == "lm":
        module = CausalLM(config)
        loss = lambda params: next_token_log_probs(  # noqa: E731
            module, params, module.apply({"params": params}, tokens, tokens > 0, method="hidden"), tokens
        ).sum()
        variables = make_lm(config)[1]
    else:
        module, variables = make_scorer("cost", config)
        stats = variables["stats"]
        loss = lambda params: module.apply({"params": params, "stats": stats}, tokens, tokens > 0).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss)).lower(variables["params"])


@pytest.mark.parametrize("what", ["lm", "score"])
def test_every_product_of_a_float32_network_is_one_of_float32_on_any_backend(what):
    products = re.findall(r"stablehlo\.dot_general.*", lowered("float32", what).as_text())
    assert len(products) > 10
    assert not [line for line in products if "HIGHEST, HIGHEST" not in line]


@pytest.mark.parametrize("what", ["lm", "score"])
def test_no_sum_of_a_bfloat16_network_is_taken_in_bfloat16(what):
    text = lowered("bfloat16", what).as_text()
    assert "bf16" in text
    sums = re.findall(r"stablehlo\.reduce\(.*|\"stablehlo\.scatter\".*", text)
    assert len(sums) > 5
    assert not [line for line in sums if "applies stablehlo.add" in line and "bf16" in line]
    # The gradient of every matrix leaves its product in float32; what is bfloat16 are activations.
    results = re.findall(r"stablehlo\.dot_general.*-> tensor<(\S+?)>", text)
    assert {result.rpartition("x")[2] for result in results} == {"bf16", "f32"}
