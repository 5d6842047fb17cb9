"""Fused attention equals plain attention on real tokens; which platform and which shapes get which kernel."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from safe_rlhf_jax.compile import topology_devices
from safe_rlhf_jax.models import fused_attention
from safe_rlhf_jax.models.attention import attend, causal_mask
from safe_rlhf_jax.models.fused_attention import cudnn, kernel_for, splash
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.sharding import MESH_AXES, make_mesh, platform, replicated
from tests.helpers import make_lm, tiny_config

ROOT = Path(__file__).parent.parent.parent
BATCH, HEADS, KV_HEADS, SIZE, SCALE = 3, 4, 2, 128, 0.1
KERNELS = {
    "splash": functools.partial(splash, interpret=True),
    "cudnn": lambda *arrays, cap, **rest: cudnn(*arrays, implementation="xla", **rest),
}
PADDING = {"none": (0, 0, 0), "left": (100, 1, 0), "right": (0, 7, 130)}  # columns of each row


def texts(length, padding):
    """Queries, keys, values and which columns are real."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(BATCH, heads, length, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    column = np.arange(length)[None]
    if padding == "packed":  # several texts in a row, by number
        return *arrays, jnp.asarray(np.minimum(column // np.array([[40], [90], [64]]) + 1, 3) * (column < length - 9))
    absent = np.array(PADDING[padding])[:, None]
    real = column < length - absent if padding == "right" else column >= absent
    return *arrays, jnp.asarray(real)


def visible(real, window):
    near = np.arange(real.shape[1])[:, None] - np.arange(real.shape[1])[None] < (window or real.shape[1])
    return causal_mask(real) & near[None]


@pytest.mark.parametrize(
    ("kernel", "length", "padding", "window", "cap"),
    [
        ("splash", 256, "left", None, None),
        ("splash", 256, "right", 50, None),
        ("splash", 200, "left", 130, 5.0),  # not a multiple of the block: padded
        ("splash", 128, "none", None, 5.0),
        ("cudnn", 200, "left", None, None),
        ("cudnn", 200, "right", 50, None),
        ("splash", 256, "packed", 50, None),
        ("cudnn", 200, "packed", None, None),
    ],
)
def test_real_tokens_see_the_same_as_in_plain_attention_forwards_and_backwards(kernel, length, padding, window, cap):
    *arrays, real = texts(length, padding)
    wanted = jax.random.normal(jax.random.key(1), arrays[0].shape) * real[:, None, :, None]

    def loss(attended, arrays):
        out = attended(*arrays)
        return (out * wanted).sum(), out

    plain = functools.partial(attend, visible=visible(real, window), scale=SCALE, cap=cap)
    fused = functools.partial(KERNELS[kernel], real=real, scale=SCALE, window=window, cap=cap)
    results = [jax.jit(jax.value_and_grad(functools.partial(loss, f), has_aux=True))(arrays) for f in (plain, fused)]
    ((_, out), gradients), ((_, fused_out), fused_gradients) = results
    np.testing.assert_allclose(fused_out * real[:, None, :, None], out * real[:, None, :, None], rtol=2e-5, atol=2e-5)
    assert np.isfinite(fused_out).all()
    for gradient, fused_gradient in zip(gradients, fused_gradients, strict=True):
        np.testing.assert_allclose(fused_gradient, gradient, rtol=2e-4, atol=2e-4)


def test_what_padding_asks_for_stays_finite_in_gradients_too():
    *arrays, real = texts(128, "left")
    gradients = jax.jit(jax.grad(lambda a: splash(*a, real, scale=SCALE, window=None, cap=None, interpret=True).sum()))
    assert all(np.isfinite(gradient).all() for gradient in gradients(arrays))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("windows", "scan_layers"), [((40, 40), True), ((40, None), True), ((40, None), False)],
    ids=["a window, scanned", "two kinds, scanned", "two kinds, unrolled"],
)  # fmt: skip
def test_a_model_on_a_mesh_is_the_same_with_the_kernel(monkeypatch, scan_layers, windows):
    """Each device runs the kernel on its own rows and heads, layers are rematerialised, in a gradient."""
    config = tiny_config(
        num_heads=4, num_kv_heads=2, head_dim=SIZE, scan_layers=scan_layers, remat="full", windows=windows,
        vocab_size=96, attention_softcap=20.0,
    )  # fmt: skip
    module = CausalLM(config)
    tokens = jax.random.randint(jax.random.key(0), (4, 130), 0, 96)
    mask = jnp.arange(130)[None] >= jnp.array([0, 3, 60, 129])[:, None]
    calls = []

    def interpreted(*arrays, **rest):
        calls.append(arrays[0].shape)
        return splash(*arrays, **rest, interpret=True)

    def loss(params):
        logits = module.apply({"params": params}, tokens, mask)
        return (jax.nn.log_softmax(logits)[..., 0] * mask).sum() / mask.sum()

    with jax.set_mesh(make_mesh((2, 2, 2))):
        _, variables = make_lm(config)
        plain = jax.jit(jax.value_and_grad(loss))(variables["params"])
        monkeypatch.setattr(fused_attention, "platform", lambda: "tpu")
        monkeypatch.setattr(fused_attention, "ACTIVATION_BYTES", 4)  # interpreted, its float32 is float32
        monkeypatch.setattr(fused_attention, "splash", interpreted)
        fused = jax.jit(jax.value_and_grad(lambda params: loss(params)))(variables["params"])
    mixed = len(set(windows)) > 1
    assert set(calls) == (set() if mixed and scan_layers else {(1, 2, 130, SIZE)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, fused)


def arrays(*, batch=8, heads=8, kv_heads=4, length=256, columns=None, size=128, dtype=jnp.bfloat16):
    queries = jax.ShapeDtypeStruct((batch, heads, length, size), dtype)
    return queries, jax.ShapeDtypeStruct((batch, kv_heads, columns or length, size), dtype)


class Chosen:
    """What a program traced for a mesh of some platform chooses, by way of tracing it."""

    def __init__(self, platform, sizes=(1, 2, 1, 4)):
        device = AbstractDevice(device_kind="any", num_cores=1, platform=platform)
        types = (AxisType.Auto,) * len(MESH_AXES)
        self.mesh = AbstractMesh(sizes, MESH_AXES, axis_types=types, abstract_device=device)

    def __call__(self, *, cap=None, biased=False, **shape):
        found = []

        def trace(queries, keys):
            found.append(kernel_for(queries, keys, cap=cap, biased=biased))

        with jax.sharding.use_abstract_mesh(self.mesh):
            jax.eval_shape(trace, *arrays(**shape))
        return found[0]


def test_a_tpu_gets_splash_where_every_column_asks():
    chosen = Chosen("tpu")
    assert chosen() == "splash"
    assert chosen(length=300, cap=30.0) == "splash"
    assert chosen(dtype=jnp.float32) is None  # whose products it would round
    assert chosen(length=1, columns=256) is None  # a step of decoding
    assert chosen(length=64) is None
    assert chosen(size=64) is None
    assert chosen(biased=True) is None
    assert chosen(batch=3) is None  # two devices share the rows
    assert chosen(kv_heads=2) is None  # four the heads


def test_a_gpu_gets_cudnn_where_every_column_asks_in_16_bits(monkeypatch):
    chosen = Chosen("gpu")
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"compute_capability": "8.0"})])
    assert chosen() == "cudnn"
    assert chosen(size=64) == "cudnn"
    assert chosen(dtype=jnp.float32) is None
    assert chosen(cap=30.0) is None
    assert chosen(size=256) is None
    assert chosen(length=255) is None
    assert chosen(length=1, columns=256) is None
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"compute_capability": "7.5"})])
    assert chosen() is None


def test_a_cpu_gets_the_plain_one_and_so_do_many_devices_without_a_mesh(monkeypatch):
    assert Chosen("cpu")() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert platform() == "cpu"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert platform() == "tpu"


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a GPU")
def test_cudnn_on_a_gpu_equals_plain_attention():
    """In a process of its own: here jax has been told to use the CPU."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    code = f"from {__name__} import compare_on_gpu; compare_on_gpu()"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, timeout=300)


def compare_on_gpu():
    assert jax.default_backend() == "gpu"
    *whole, real = texts(200, "left")
    halves = [array.astype(jnp.bfloat16) for array in whole]
    read = real[:, None, :, None]

    def gradients(attended):
        return jax.jit(jax.grad(lambda arrays: (jnp.float32(attended(*arrays)) * read).sum()))(halves)

    for window in (None, 50):
        fused = functools.partial(cudnn, real=real, scale=SCALE, window=window)
        plain = functools.partial(attend, visible=visible(real, window), scale=SCALE)
        pairs = [(fused(*halves) * read, plain(*halves) * read), *zip(gradients(fused), gradients(plain), strict=True)]
        for actual, expected in pairs:
            np.testing.assert_allclose(jnp.float32(actual), jnp.float32(expected), rtol=5e-2, atol=5e-2)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:8x8", "v5p:2x2x4", "v6e:8x8"])
def test_the_kernel_compiles_for_a_tpu_on_a_mesh_forwards_and_backwards(topology):
    mesh = make_mesh((-1, 2, 4), topology_devices(topology, 1))
    config = tiny_config(num_heads=8, num_kv_heads=4, head_dim=SIZE, vocab_size=512, remat="full", dtype="bfloat16")
    module, variables = make_lm(config)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    tokens, mask = (jax.ShapeDtypeStruct((mesh.size, 256), dtype, sharding=rows) for dtype in (jnp.int32, jnp.bool_))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), variables)

    def loss(variables, tokens, mask):
        return module.apply(variables, tokens, mask).mean()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, tokens, mask).compile().as_text()
    assert text.count("tpu_custom_call") >= 3  # forwards, and backwards to queries and to keys with values
