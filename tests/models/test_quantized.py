"""Frozen networks in 8 and 4 bits: what is rounded, by how much, and that nothing but that changes."""

import dataclasses
import functools
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.compile import topology_devices
from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.parameters import boxed_variables, cast_matrices
from safe_rlhf_jax.models.quantization_error import error
from safe_rlhf_jax.models.quantized import (
    INPUT_AXES,
    block_size,
    dequantize,
    is_quantized,
    quantize,
    quantized_matmul,
    require_unquantized,
    stored_bytes,
)  # fmt: skip
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.sharding import make_mesh, named_shardings, partition_spec, with_shardings
from tests.helpers import apply, make_lm, make_scorer, perturbed, right_padded, tiny_config

KINDS = ("int8", "int4")
# Several blocks of int4 in every kernel.
CONFIG = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "head_dim": 32}
SCRIPT = Path(__file__).parents[2].parent / "shared" / "tools" / "real_model.py"


def kernels(params):
    """{path: kernel} of all kernels of layers, quantised or not."""
    leaves = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
    return {
        path: leaf for path, leaf in leaves.items() if path.endswith(tuple(f"/{name}/kernel" for name in INPUT_AXES))
    }


def difference(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


def spread(scale, shape):
    """A scale for each number."""
    for axis, size in enumerate(shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
    return scale


@functools.cache
def network(scan_layers=False, **overrides):
    module, variables = make_lm(tiny_config(**CONFIG, scan_layers=scan_layers, **overrides))
    return module, perturbed(variables)["params"]


@pytest.fixture(scope="module")
def batch():
    return right_padded(np.random.default_rng(0), 8, 16, 96)


# --- Rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_further_off_than_half_its_scale(kind, scan_layers):
    _, params = network(scan_layers)
    before, after = kernels(params), kernels(quantize(params, kind))
    rounded = kernels(dequantize(quantize(params, kind)))
    assert len(before) == (7 if scan_layers else 14)
    for path, kernel in before.items():
        scale = spread(np.asarray(after[path].scale), kernel.shape)
        off = np.abs(np.asarray(rounded[path]) - kernel)
        assert after[path].qvalue.dtype == kind
        assert np.all(off <= scale / 2 * (1 + 1e-4)), path
        assert off.max() > 0.4 * scale.max()  # no larger scale than needed


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_one_for_each_output_channel_or_for_each_block_of_its_inputs(kind):
    shapes = {path.split("/")[-2]: leaf.scale.shape for path, leaf in kernels(quantize(network()[1], kind)).items()}
    heads, size = 4, 32
    if kind == "int8":
        assert shapes["q_proj"] == (1, heads, size)
        assert shapes["o_proj"] == (1, 1, 128)
        assert shapes["down_proj"] == (1, 128)
    else:
        assert shapes["q_proj"] == (2, heads, size)
        assert shapes["o_proj"] == (heads, 1, 128)  # a block within each head
        assert shapes["down_proj"] == (4, 128)


@pytest.mark.parametrize(("inputs", "block"), [(4096, 64), (11008, 64), (64, 64), (96, 48), (80, 40), (12, 12)])
def test_blocks_are_divisors(inputs, block):
    assert block_size(inputs) == block


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_heads_norms_and_biases_stay_as_they_are(kind):
    _, params = network(attention_bias=True, mlp_bias=True, tie_embeddings=False)
    before, after = flatten_dict(params), flatten_dict(quantize(params, kind))
    rest = {path for path in before if "/".join(path) not in kernels(params)}
    assert ("lm_head", "kernel") in rest
    assert all(after[path] is before[path] for path in rest)
    assert all(is_quantized(after[path]) for path in set(before) - rest)


def test_a_channel_of_zeros_stays_zero():
    params = {"up_proj": {"kernel": jnp.zeros((64, 8), jnp.float32)}}
    for kind in KINDS:
        assert not np.asarray(dequantize(quantize(params, kind))["up_proj"]["kernel"]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_are_rounded_once(kind):
    params = cast_matrices(network()[1], "bfloat16")
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, kernels(quantize(params, kind)), kernels(quantize(exact, kind)))


def test_size_counts_four_bits_as_four():
    _, params = network(scan_layers=True)
    numbers = sum(kernel.size for kernel in kernels(params).values())
    for kind, bits, scales in (("int8", 8, 0), ("int4", 4, 32 / 64)):
        saved = stored_bytes(params) - stored_bytes(quantize(params, kind))
        assert saved == pytest.approx(numbers * (32 - bits - scales) / 8, rel=0.03)


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_network_is_the_network_of_its_rounded_weights(kind, scan_layers, batch):
    module, params = network(scan_layers, attention_bias=True, mlp_bias=True, remat="dots")
    params = quantize(params, kind)
    expected = apply(module, {"params": dequantize(params)}, *batch)
    assert difference(apply(module, {"params": params}, *batch), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_layers_are_quantised_as_unrolled_ones(kind, batch):
    module, params = network()
    decoder = dict(params["decoder"])
    layers = [decoder.pop(f"layers_{i}") for i in range(2)]
    stacked = {**params, "decoder": decoder | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}
    scanned = CausalLM(tiny_config(**CONFIG, scan_layers=True))
    unrolled, together = quantize(params, kind), quantize(stacked, kind)
    layers = [unrolled["decoder"][f"layers_{i}"] for i in range(2)]
    jax.tree.map(
        np.testing.assert_array_equal, together["decoder"]["layers"], jax.tree.map(lambda *x: jnp.stack(x), *layers)
    )
    actual = apply(scanned, {"params": together}, *batch)
    assert difference(actual, apply(module, {"params": unrolled}, *batch)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_quantised_layers_as_through_rounded_ones(kind, batch):
    module, params = network(scan_layers=True, attention_bias=True)
    params = quantize(params, kind)

    @jax.jit
    def gradient(embedding, params):
        def loss(embedding):
            decoder = params["decoder"] | {"embedding": embedding}
            return jnp.square(module.apply({"params": params | {"decoder": decoder}}, *batch)).mean()

        return jax.grad(loss)(embedding)

    embedding = params["decoder"]["embedding"]
    expected = gradient(embedding, dequantize(params))
    assert np.abs(expected).max() > 1e-3
    assert difference(gradient(embedding, params), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_kernel_has_no_gradient(kind):
    kernel = kernels(quantize(network()[1], kind))["decoder/layers_0/mlp/up_proj/kernel"]
    loss = lambda kernel: quantized_matmul(jnp.ones((2, 128)), kernel, ("embed", "mlp"), "float32").sum()  # noqa: E731
    gradient = jax.grad(loss, allow_int=True)(kernel)
    assert not np.asarray(gradient.scale).any()
    assert gradient.qvalue.dtype == jax.dtypes.float0


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_bfloat16_are_summed_in_float32(kind):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((4096, 8)), jnp.float32)
    kernel = quantize({"up_proj": {"kernel": kernel}}, kind)["up_proj"]["kernel"]
    x = jnp.asarray(rng.standard_normal((64, 4096)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(kernel), np.float64)
    actual = np.asarray(quantized_matmul(x, kernel, ("embed", "mlp"), "float32"))
    # int8 is exact in bfloat16; a scale of int4 and its products with integers are each rounded to 8 bits
    assert np.abs(actual - exact).max() < {"int8": 1e-5, "int4": 4e-3}[kind] * np.abs(exact).max()


def test_casts_of_matrices_leave_integers_and_scales_alone():
    params = quantize(network()[1], "int8")
    cast = cast_matrices(params, "bfloat16")
    assert cast["decoder"]["embedding"].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), kernels(cast), kernels(params))


def test_a_quantised_base_cannot_be_trained():
    _, params = network()
    require_unquantized(params)
    place = "decoder/layers_0/attention/k_proj/kernel"
    with pytest.raises(ModelError, match=f"a quantised base cannot be trained: {place} is int4") as caught:
        require_unquantized(quantize(params, "int4"))
    assert "\n" not in str(caught.value)


# --- Devices ----------------------------------------------------------------------------------------------------------


def sharded(module, params, mesh):
    return jax.device_put(params, named_shardings(boxed_variables(module)["params"], mesh))


@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 8, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_hold_and_compute_what_one_does(kind, shape, batch):
    module, params = network(scan_layers=True)
    mesh = make_mesh(shape)
    expected, actual = quantize(params, kind), quantize(sharded(module, params, mesh), kind)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    with jax.set_mesh(mesh):
        logits = apply(module, {"params": actual}, *batch)
    assert difference(logits, apply(module, {"params": expected}, *batch)) < 1e-5


def test_integers_and_scales_are_sharded_as_the_kernel():
    module, params = network(scan_layers=True)
    mesh = make_mesh((1, 2, 2), jax.devices()[:4])
    params = sharded(module, params, mesh)
    scales = {}
    for kind in KINDS:
        for path, leaf in kernels(quantize(params, kind)).items():
            assert leaf.qvalue.sharding == kernels(params)[path].sharding
            scales[kind, path.split("/")[-2]] = leaf.scale
    expected = {
        ("int8", "up_proj"): (None, None, "mlp"),
        ("int8", "o_proj"): (None, None, None, "embed"),
        ("int4", "up_proj"): (None, "embed", "mlp"),
        ("int4", "o_proj"): (None, "heads", None, "embed"),
    }
    for key, names in expected.items():
        named = NamedSharding(mesh, partition_spec(names))
        assert scales[key].sharding.is_equivalent_to(named, scales[key].ndim), key


def test_the_scale_of_a_block_on_several_devices_is_on_all_of_them():
    mesh = make_mesh((1, 8, 1))
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((128, 16)), jnp.float32)
    split = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    array = quantize({"up_proj": {"kernel": split}}, "int4")["up_proj"]["kernel"]
    assert array.qvalue.sharding.spec[0] == "fsdp"
    assert array.scale.sharding.is_fully_replicated


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_quantised_as_arrays(kind):
    module, params = network(scan_layers=True)
    boxed = boxed_variables(module)["params"]
    mesh = make_mesh((1, 4, 2))
    shapes = quantize(with_shardings(nn.unbox(boxed), named_shardings(boxed, mesh)), kind)
    arrays = quantize(sharded(module, params, mesh), kind)
    same = lambda a, b: (  # noqa: E731
        (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    )
    assert all(jax.tree.leaves(jax.tree.map(same, shapes, arrays)))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))


# --- Programs ---------------------------------------------------------------------------------------------------------

LAYERS, WIDTH, MLP = 6, 512, 1024


def compiled(devices, shape, kind, gradient=False):
    """The compiled program of hidden states, or of their gradient to the embedding; instructions that are executed."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_layers": LAYERS,
        "head_dim": 128,
        "num_kv_heads": 4,
    }
    module = CausalLM(tiny_config(**sizes, scan_layers=True, dtype="bfloat16", tie_embeddings=True))
    mesh = make_mesh(shape, devices[: math.prod(shape)])
    boxed = boxed_variables(module)["params"]
    params = with_shardings(nn.unbox(boxed), named_shardings(boxed, mesh))
    params = quantize(params, kind)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    tokens, mask = (jax.ShapeDtypeStruct((8, 32), dtype, sharding=rows) for dtype in (jnp.int32, jnp.bool_))

    def hidden(embedding, params, tokens, mask):
        params = params | {"decoder": params["decoder"] | {"embedding": embedding}}
        return module.apply({"params": params}, tokens, mask, method="hidden").astype(jnp.float32).mean()

    function = jax.grad(hidden) if gradient else hidden
    with jax.set_mesh(mesh):
        program = jax.jit(function).lower(params["decoder"]["embedding"], params, tokens, mask).compile()
    return [executed.instruction for executed in Module(program.as_text()).walk()]


def floats(instructions):
    """Shapes of the float arrays that are written."""
    named = ("parameter", "get-tuple-element", "tuple", "while", "bitcast")
    arrays = [array for i in instructions if i.opcode not in named for array in i.arrays]
    return [array.shape for array in arrays if array.dtype in ("f32", "bf16")]


@pytest.mark.parametrize("gradient", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantised_stack_of_layers_is_in_memory(kind, gradient):
    written = floats(compiled(jax.devices(), (1, 1, 1), kind, gradient))
    assert len(written) > 10
    assert max(math.prod(shape) for shape in written) < LAYERS * WIDTH * MLP


def gathered(instructions):
    """Types of the large arrays that are gathered."""
    arrays = [array for i in instructions if i.opcode.startswith("all-gather") for array in i.arrays]
    return {array.dtype for array in arrays if math.prod(array.shape) >= WIDTH * WIDTH}


@pytest.mark.parametrize("gradient", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("kind", KINDS)
def test_devices_send_each_other_integers(kind, gradient):
    assert gathered(compiled(jax.devices(), (1, 4, 1), kind, gradient)) == {"s8"}  # a CPU has no 4-bit integers


@pytest.mark.tpu
@pytest.mark.parametrize("gradient", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tpu_reads_and_sends_integers(kind, gradient):
    instructions = compiled(topology_devices("v6e:2x2", 1), (1, 4, 1), kind, gradient)
    written = floats(instructions)
    assert max(math.prod(shape) for shape in written) < LAYERS * WIDTH * MLP
    if kind == "int8":  # not even one layer's: what is multiplied are the integers
        assert not [shape for shape in written if math.prod(shape) == WIDTH * MLP]
    assert gathered(instructions) == {"s8" if kind == "int8" else "s4"}


# --- Error ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_language_model_is_that_of_its_logits(kind, batch):
    module, params = network()
    found = error(module, params, quantize(params, kind), *batch)
    expected, actual = (
        np.asarray(apply(module, {"params": p}, *batch), np.float64)[np.asarray(batch[1])]
        for p in (params, quantize(params, kind))
    )
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (expected, actual))
    assert found.relative == pytest.approx(np.linalg.norm(actual - expected) / np.linalg.norm(expected), rel=1e-3)
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-2)
    assert found.kind == kind


def test_a_small_network_loses_little_in_eight_bits(batch):
    module, params = network(initializer_range=0.05)
    found = {kind: error(module, params, quantize(params, kind), *batch) for kind in KINDS}
    assert found["int8"].relative < 0.03
    assert found["int8"].kl < 1e-3
    assert 5 < found["int4"].relative / found["int8"].relative < 50


def test_the_error_of_a_scorer_is_that_of_its_scores(batch):
    module, variables = make_scorer("cost", tiny_config(**CONFIG), normalize=True)
    found = error(module, variables["params"], quantize(variables["params"], "int8"), *batch)
    assert 0 < found.relative < 0.2
    assert found.kl is None
    assert re.fullmatch(r"base int8: relative error of the scores \S+, size \S+ of \S+ GiB", str(found))


def test_padding_and_unused_rows_are_no_part_of_the_error(batch):
    tokens, mask = batch
    module, params = network()
    found = error(module, params, quantize(params, "int8"), tokens, mask)
    junk = error(module, params, quantize(params, "int8"), jnp.where(mask, tokens, 50), mask)
    unused, _ = network(unused_rows=((90, 96),))
    without = error(unused, params, quantize(params, "int8"), tokens, mask)
    assert junk.relative == pytest.approx(found.relative, rel=1e-5)
    assert 0.2 * found.relative < without.relative < 5 * found.relative
    assert 0 < without.kl < 5 * found.kl


@pytest.mark.slow
def test_a_real_model_stays_what_it_is_in_eight_bits(tmp_path):
    """The folder is made by ../shared/tools/real_model.py from a package that carries the weights."""
    if not SCRIPT.is_file():
        pytest.skip(f"{SCRIPT.name} is not here")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    process = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=600)
    if process.returncode:
        pytest.skip(f"the model cannot be had: {process.stderr.strip().splitlines()[-1]}")
    found = real_model_errors(tmp_path)
    assert found["int8"].relative < 0.1
    assert found["int8"].kl < 0.02
    assert found["int4"].kl < 1.0


TEXTS = [
    "The Nile is the longest river in Africa. It flows north through eleven countries to the Mediterranean Sea, and "
    "its water has fed the fields of Egypt for more than five thousand years.",
    "To boil an egg, bring a pot of water to a rolling boil, lower the egg in with a spoon, and wait eight minutes. "
    "Cool it in cold water before you peel it.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of France is "
    "Paris. It lies on the Seine, in the north of the country.<|im_end|>\n",
]


def real_model_errors(folder):
    """{format: error} of a model in a folder, in bfloat16 as decoding and scoring read it."""
    from tokenizers import Tokenizer

    rows = [encoding.ids for encoding in Tokenizer.from_file(f"{folder}/tokenizer.json").encode_batch(TEXTS)]
    length = max(map(len, rows))
    tokens = jnp.asarray([row + [0] * (length - len(row)) for row in rows], jnp.int32)
    mask = jnp.asarray([[i < len(row) for i in range(length)] for row in rows])
    module, variables = hf.load(folder)
    module = module.clone(config=dataclasses.replace(module.config, dtype="bfloat16"))
    params = cast_matrices(variables["params"], "bfloat16")
    return {kind: error(module, params, quantize(params, kind), tokens, mask) for kind in KINDS}
