"""Programs that scale: properties of the compiled training programs, and that each can be seen to break.

On eight simulated CPU devices, and on the program for eight TPU chips (marker `tpu`, needs libtpu but no TPU) or GPUs
(marker `gpu_aot`, needs the extra of that name but no GPU).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import ops, sharding
from safe_rlhf_jax.aot import properties
from safe_rlhf_jax.aot.collectives import find_collectives
from safe_rlhf_jax.aot.compile import training_of
from safe_rlhf_jax.aot.gpus import compiler_options
from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.aot.run import AbstractRun
from safe_rlhf_jax.compile import topology_devices
from safe_rlhf_jax.models import layers, products
from safe_rlhf_jax.models.config import PRESETS
from safe_rlhf_jax.sharding import make_mesh, replicated
from safe_rlhf_jax.stages import networks

VOCAB, WIDTH, MLP, LAYERS, ROWS, PROMPT, RESPONSE = 4096, 256, 640, 12, 8, 128, 256
PROBE = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": MLP, "num_layers": LAYERS, "num_heads": 8,
    "num_kv_heads": 8, "head_dim": 32, "max_positions": 1024,
}  # fmt: skip
MATRIX = WIDTH * 8 * 32  # elements of the smallest matrix of a layer
LARGEST = WIDTH * VOCAB // 2  # of the largest matrix, over tensor = 2; all layers together have more
SFT = {
    "name": "sft", "kind": "sft", "init_from": "preset:probe", "data": {"name": "none"}, "batch_size": ROWS,
    "max_length": PROMPT + RESPONSE,
}  # fmt: skip
PPO_LAG = {
    "name": "ppo_lag", "kind": "rl", "init_from": "preset:probe", "reward_model": "path:none",
    "cost_model": "path:none", "prompts": {"name": "none"}, "batch_size": ROWS, "max_prompt_length": PROMPT,
    "max_response_length": RESPONSE,
}  # fmt: skip
STAGES = {"sft": SFT, "ppo_lag": PPO_LAG}


@dataclasses.dataclass(frozen=True)
class Compiled:
    module: Module
    collectives: list
    memory: object
    state_bytes: int  # per device


TOPOLOGIES = [pytest.param("v5e:2x4", marks=pytest.mark.tpu), pytest.param("h100:8", marks=pytest.mark.gpu_aot)]


@pytest.fixture(scope="module", params=["local", *TOPOLOGIES])
def devices(request):
    return topology_devices(request.param, 1)


@pytest.fixture(scope="module")
def compile_for(devices):
    """Compiles a stage on a mesh; `change` may replace the jitted function. One result per set of arguments.

    `tag` names what a test has replaced in the package.
    """
    PRESETS["probe"] = PROBE
    done = {}

    def build(stage="sft", mesh=(1, 4, 2), change=None, tag="", topology=None, dtype="bfloat16", **model):
        key = stage, mesh, change, tag, topology, dtype, *model.items()
        if key not in done:
            PRESETS["probe"] = PROBE | model
            tree = {"workdir": "runs/probe", "assume": "probe", "stages": [STAGES[stage]]}
            tree["execution"] = {"dtype": dtype, "remat": "full"}
            config = cfg.RunConfig.model_validate(tree)
            run = AbstractRun(config, make_mesh(mesh, topology_devices(topology, 1) if topology else devices))
            with jax.set_mesh(run.mesh):
                (program,) = training_of(config.stages[0]).programs(run, config.stages[0])
                function = change(program.function, run.mesh) if change else program.function
                compiled = function.lower(*program.arguments).compile(compiler_options(devices[0]))
            module = Module(compiled.as_text())
            leaves = jax.tree.leaves(program.arguments[0])
            size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
            collectives = find_collectives(module, run.mesh.shape)
            done[key] = Compiled(module, collectives, compiled.memory_analysis(), size)
        return done[key]

    yield build
    del PRESETS["probe"]


@pytest.fixture(scope="module", params=["sft", pytest.param("ppo_lag", marks=pytest.mark.slow)])
def sound(request, compile_for):
    """A program as training compiles it."""
    return compile_for(request.param)


# --- Broken on purpose


def calling_the_host(function, mesh):
    def step(state, frozen, batch, key):
        jax.debug.callback(lambda x: None, batch.tokens.sum())
        return function.__wrapped__(state, frozen, batch, key)

    return jax.jit(step, donate_argnums=0)


def gathering_first(function, mesh):
    def step(state, frozen, batch, key):
        params = jax.lax.with_sharding_constraint(state.params, replicated(mesh))
        return function.__wrapped__(state.replace(params=params), frozen, batch, key)

    return jax.jit(step, donate_argnums=0)


def keeping_the_state(function, mesh):
    return jax.jit(lambda *arguments: function.__wrapped__(*arguments))


# --- Properties


def test_nothing_waits_for_the_host(sound):
    assert not properties.host_transfers(sound.module)


def test_a_callback_would_be_seen(compile_for, devices):
    if devices[0].platform != "cpu":
        pytest.skip("host callbacks cannot be compiled ahead of time")
    assert properties.host_transfers(compile_for(change=calling_the_host).module)


def logits_in_memory(compiled):
    return properties.float32_logits(compiled.module, VOCAB // 2, ROWS // 4 * RESPONSE)  # one device's share


def test_logits_of_a_whole_batch_never_stand_in_memory(sound):
    assert not logits_in_memory(sound)


def test_logits_that_are_not_chunked_would_be_seen(compile_for, monkeypatch):
    monkeypatch.setattr(ops, "LOGITS_CHUNK", 10**6)
    assert logits_in_memory(compile_for(tag="unchunked"))


def test_parameters_are_gathered_layer_by_layer(sound):
    assert not properties.gathered(sound.collectives, LARGEST)
    gathers = [c for c in sound.collectives if c.kind == "all-gather" and c.axes == ("fsdp",)]
    assert max(c.times for c in gathers) >= LAYERS


def test_rows_of_other_devices_are_never_gathered(compile_for):
    """Nor their gradients; with `data` and `tensor` beside `fsdp`, where the compiler has a choice."""
    assert ROWS * (PROMPT + RESPONSE) * WIDTH > LARGEST
    assert not properties.gathered(compile_for(mesh=(2, 2, 2)).collectives, LARGEST)


def test_parameters_gathered_at_once_would_be_seen(compile_for):
    assert properties.gathered(compile_for(change=gathering_first).collectives, LARGEST)


def test_memory_grows_with_depth_by_saved_activations_only(compile_for):
    few, many = (compile_for(num_layers=n).memory.temp_size_in_bytes for n in (4, 8))
    saved = 4 * (ROWS // 4) * (PROMPT + RESPONSE) * WIDTH * 2  # the residual stream of four layers, bfloat16
    gradients = 4 * (4 * WIDTH * 256 + 3 * WIDTH * MLP) // 8 * 4  # of four layers, float32, one device's share
    assert many - few < 2 * (saved + gradients)


WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 128}


def gradients_given_whole(compiled):
    return properties.reduced_whole(compiled.collectives, "fsdp", 1024 * 1024 // 16)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "mesh"), [("v5e:4x4", (1, 4, 4)), ("v5p:2x2x4", (1, 2, 8)), ("v5e:2x4", (1, 8, 1))]
)
def test_gradients_are_scattered_not_all_reduced(compile_for, devices, topology, mesh):
    """Over one axis of a torus or two; XLA's CPU compiler all-reduces."""
    only_for_tpu(devices)
    assert not gradients_given_whole(compile_for(mesh=mesh, topology=topology, **WIDE))


def rings():
    """Permutes that pass a parameter around, in a step with one large product beside a `tensor` axis."""
    mesh = make_mesh((1, 4, 4), topology_devices("v5e:4x4", 1))
    shaped = lambda size, *names: jax.ShapeDtypeStruct(  # noqa: E731
        (size, 4096), jnp.bfloat16, sharding=jax.NamedSharding(mesh, sharding.partition_spec(names))
    )
    matrix = shaped(8192, "mlp", "embed")

    def step(matrix, rows):
        return matrix, sharding.constrain(rows @ matrix.T, "batch", "mlp").astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        program = networks.jit_step(step, matrix, mesh).lower(matrix, shaped(65536, "batch", None)).compile()
    found = find_collectives(Module(program.as_text()), mesh.shape)
    return properties.permuted(found, "fsdp", 8192 // 4 * 4096 // 4)


@pytest.mark.tpu
def test_parameters_are_gathered_not_passed_around_in_rings(devices):
    only_for_tpu(devices)
    assert not rings()


@pytest.mark.tpu
def test_rings_would_be_seen(devices, monkeypatch):
    only_for_tpu(devices)
    monkeypatch.setattr(networks, "tpu_options", lambda mesh: None)
    assert rings()


@pytest.mark.tpu
def test_over_a_square_torus_libtpu_all_reduces_what_is_to_be_scattered(devices):
    """Even an explicit reduce-scatter. Should this fail one day, the mesh (1, 16, 1) belongs into the test above."""
    only_for_tpu(devices)
    mesh = make_mesh((1, 16, 1), topology_devices("v5e:4x4", 1))
    spec = jax.sharding.PartitionSpec("fsdp")
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True)
    function = jax.shard_map(scatter, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((16 * 1024, 1024), jax.numpy.bfloat16, sharding=jax.NamedSharding(mesh, spec))
    module = Module(jax.jit(function).lower(x).compile().as_text())
    assert properties.reduced_whole(find_collectives(module, mesh.shape), "fsdp", MATRIX)


@pytest.mark.tpu
def test_gradients_that_the_compiler_reduces_as_it_likes_would_be_seen(compile_for, devices, monkeypatch):
    only_for_tpu(devices)
    monkeypatch.setattr(products, "scattered", lambda x, names: x)
    assert gradients_given_whole(compile_for(mesh=(1, 2, 8), topology="v5p:2x2x4", tag="as it likes", **WIDE))


def only_for_tpu(devices):
    if devices[0].platform != "tpu":
        pytest.skip("a property of the TPU program")


@pytest.mark.gpu_aot
def test_between_gpus_gradients_are_scattered_and_attention_is_plain(compile_for, devices):
    """Plain, because cuDNN's cannot be compiled without a GPU."""
    if devices[0].platform != "gpu":
        pytest.skip("a property of the GPU program")
    compiled = compile_for(mesh=(1, 8, 1), **WIDE)
    assert not gradients_given_whole(compiled)
    assert "__cudnn" not in compiled.module.text


def test_gradients_that_are_all_reduced_would_be_seen(compile_for):
    assert properties.reduced_whole(compile_for(mesh=(8, 1, 1)).collectives, "data", MATRIX)


def test_what_is_summed_over_batches_of_devices_is_float32(sound):
    """CPU: XLA's compiler for it widens such sums itself, so that only the TPU's program can be broken."""
    assert not properties.summed_in(sound.collectives, "bf16", ("data", "fsdp"), WIDTH)


@pytest.mark.tpu
def test_gradients_summed_in_bfloat16_would_be_seen(compile_for, devices, monkeypatch):
    only_for_tpu(devices)
    rounded = lambda x, matrix, names, dtype: jnp.matmul(x, matrix.astype(x.dtype))  # noqa: E731
    monkeypatch.setattr(layers, "matmul", rounded)
    assert properties.summed_in(compile_for(tag="in bfloat16").collectives, "bf16", ("data", "fsdp"), WIDTH)


@pytest.mark.tpu
def test_products_of_a_float32_network_are_whole_on_a_tpu(compile_for, devices):
    only_for_tpu(devices)
    assert not properties.rounded_products(compile_for(dtype="float32").module)


@pytest.mark.tpu
def test_products_of_float32_that_a_tpu_rounds_would_be_seen(compile_for, devices, monkeypatch):
    only_for_tpu(devices)
    monkeypatch.setattr(products, "precision_of", lambda x: None)
    assert properties.rounded_products(compile_for(dtype="float32", tag="as the backend likes").module)


def test_no_collective_has_the_whole_vocabulary(sound):
    assert not properties.with_dimension(sound.collectives, VOCAB)


def test_a_collective_with_the_whole_vocabulary_would_be_seen(compile_for, monkeypatch):
    monkeypatch.setitem(sharding.LOGICAL_RULES, "vocab", ())
    assert properties.with_dimension(compile_for(tag="whole vocabulary").collectives, VOCAB)


def test_the_state_is_donated(sound):
    assert sound.memory.alias_size_in_bytes > 0.99 * sound.state_bytes


def test_a_state_that_is_kept_would_be_seen(compile_for):
    kept = compile_for(change=keeping_the_state)
    assert kept.memory.alias_size_in_bytes < 0.01 * kept.state_bytes
