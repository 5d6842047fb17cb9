"""GPUs that are not here: their names, what is assumed of them, and (marker `gpu_aot`) programs compiled for them."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safe_rlhf_jax import compile as compile_command
from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.aot import gpus, roofline, run, search
from safe_rlhf_jax.aot.chips import CHIPS, ring_rate
from safe_rlhf_jax.aot.floors import decoding_reads
from safe_rlhf_jax.aot.gpus import GPUS, assumptions, compiler_options, gpu_devices, target_config
from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.aot.roofline import DECODING
from safe_rlhf_jax.aot.traffic import hbm_bytes
from safe_rlhf_jax.config import ConfigError, load_config
from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.models.config import PRESETS, ModelConfig
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.sharding import MESH_AXES, make_mesh
from safe_rlhf_jax.types import PromptBatch

MINI = Path(__file__).parent.parent / "configs" / "mini.yaml"
H100 = CHIPS["NVIDIA H100 80GB HBM3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100", "GPUs are named h100:8, or hosts x GPUs on each: h100:2x8; those known are a100-80, b200, h100, h200"),
        ("h100:0", "GPUs are named"),
        ("h100:2x", "GPUs are named"),
        ("h100:2x8x8", "GPUs are named"),
        ("a100:8", "those known are a100-80"),
        ("h100:16", "at most 8 GPUs.*h100:2x8"),
        ("b200:3x9", "at most 8 GPUs"),
    ],
)
def test_a_name_that_is_no_topology_of_gpus_is_refused_with_those_that_are(name, message):
    with pytest.raises(ConfigError, match=f"--topology {name}: .*{message}"):
        compile_command.topology_devices(name, 1)


def test_slices_of_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"--slices 2: slices are of TPUs.*h100:2x8"):
        compile_command.topology_devices("h100:8", 2)


@pytest.mark.parametrize("missing", ["jax_cuda12_plugin", "nvidia", "nvidia.cuda_nvcc"])
def test_a_package_that_is_missing_is_named_with_the_fix(monkeypatch, missing):
    there = SimpleNamespace(submodule_search_locations=["somewhere"])
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None if name == missing else there)
    with pytest.raises(ConfigError, match=re.escape("pip install 'safe_rlhf_jax[gpu-aot]'")):
        gpu_devices("h100:8")


def test_help_names_the_gpus(capsys):
    with pytest.raises(SystemExit):
        compile_command.parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "GPUs (a100-80, b200, h100, h200)" in shown


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_target_has_the_memory_of_its_chip(gpu):
    text = target_config(gpu)
    assert f"device_memory_size: {CHIPS[gpu.kind].hbm}\n" in text
    assert text.count("{") == text.count("}") == 3


def gpu_like(count, on_each):
    """Stands for GPUs, of which so many are on each host."""
    places = [divmod(number, on_each) for number in range(count)]
    kind = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}
    return [SimpleNamespace(process_index=host, coords=[0, host, gpu], **kind) for host, gpu in places]


def test_in_float32_and_on_one_host_neither_attention_nor_a_network_is_assumed():
    assert [line.split(":")[0] for line in assumptions(gpu_like(1, 1)[0], "float32", 1)] == ["capacity", "kernels"]


@pytest.mark.parametrize(
    ("group", "rate"),
    [
        (range(8), H100.link_rate),
        ((0, 8), H100.network_rate),  # one on each host
        ((0, 1, 8, 9), 2 * H100.network_rate),
        (range(16), 8 * H100.network_rate),
    ],
)
def test_a_ring_of_gpus_is_as_fast_as_nvlink_or_as_the_network_that_all_of_a_host_have(group, rate):
    assert ring_rate(H100, gpu_like(16, 8), group) == rate


def test_a_ring_is_never_faster_than_nvlink():
    assert ring_rate(CHIPS["NVIDIA A100-SXM4-80GB"], gpu_like(32, 16), range(32)) == 300e9


def test_only_data_crosses_hosts(monkeypatch):
    """As where the GPUs are present: each host of them is a slice."""

    def grid(shape, devices, decode):
        return Mesh(np.asarray(jax.devices()).reshape(*shape[:2], decode, shape[2]), MESH_AXES)

    monkeypatch.setattr(run, "make_mesh", grid)
    assert run.mesh_over(cfg.Mesh(data=2, fsdp=4), gpu_like(8, 4)).shape["data"] == 2
    with pytest.raises(ConfigError, match=r"mesh: data 1 does not divide into the 2 hosts.*multiple of 2"):
        run.mesh_over(cfg.Mesh(data=1, fsdp=8), gpu_like(8, 4))


def test_a_search_leaves_out_meshes_that_the_hosts_do_not_divide_into(monkeypatch):
    def mesh_over(sizes, devices):
        if sizes.data % 2:
            raise ConfigError("does not divide into the hosts")
        return make_mesh((sizes.data, sizes.fsdp, sizes.tensor), devices)

    monkeypatch.setattr(search, "mesh_over", mesh_over)
    config = load_config(MINI)
    assert {mesh.data for mesh in search.meshes(config, config.stages[0], jax.devices())} == {2, 4, 8}


# --- Compiled for GPUs


def compiled_for(name, function, *shapes):
    devices = gpu_devices(name)
    place = NamedSharding(make_mesh((len(devices), 1, 1), devices), PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile(compiler_options(devices[0]))


@pytest.mark.gpu_aot
@pytest.mark.parametrize("name", GPUS)
def test_a_product_is_compiled_for_every_gpu(name):
    compiled = compiled_for(f"{name}:1", lambda a, b: jnp.exp(a @ b), (1024, 512), (512, 256))
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == (1024 * 512 + 512 * 256) * 2
    assert memory.output_size_in_bytes == 1024 * 256 * 2
    assert gpu_devices(f"{name}:1")[0].device_kind == GPUS[name].kind


@pytest.mark.gpu_aot
@pytest.mark.parametrize("rounds", [16, 32])
def test_traffic_of_a_loop_on_a_gpu_is_a_few_matrices_for_each_round(rounds):
    """The weights of a round are read, and may be copied first: 3; activations in and out, and what is reduced."""
    scan = lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]  # noqa: E731
    compiled = compiled_for("h100:1", scan, (rounds, 1024, 1024), (8, 1024))
    matrix = 1024 * 1024 * 2
    assert 1 <= hbm_bytes(Module(compiled.as_text()))[""] / rounds / matrix < 3.5


def decoded_bytes(**changes):
    """Bytes that a decoded token moves on one H100, over those of weights and cache: layers scanned."""
    config = ModelConfig(
        **PRESETS["tiny"] | {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 4096, "num_layers": 4}
    )
    module = CausalLM(dataclasses.replace(config, dtype="bfloat16", **changes))
    mesh = make_mesh((1, 1, 1), gpu_devices("h100:1"))
    place = NamedSharding(mesh, PartitionSpec())
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    prompts = PromptBatch(tokens=shaped(jnp.int32, 8, 32), mask=shaped(bool, 8, 32), group=shaped(jnp.int32, 8))
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(module.init, key, jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))["params"]
    params = jax.tree.map(lambda x: shaped(jnp.bfloat16, *x.shape), nn.unbox(params))
    make = functools.partial(generate, module, response_length=32, eos_id=2, pad_id=0, sampling=Sampling())
    with jax.set_mesh(mesh):
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=place)
        lowered = jax.jit(lambda *arguments: make(*arguments)).lower(params, prompts, key)
    compiled = lowered.compile(compiler_options(mesh.devices.flat[0]))
    moved = hbm_bytes(Module(compiled.as_text()), (DECODING,))[DECODING]
    sizes = {"rows": 8, "prompt": 32, "response": 32, "mesh": mesh.shape}
    return roofline.decoding(moved, decoding_reads(module.config, params, **sizes))["ratio"]


@pytest.mark.gpu_aot
def test_decoding_on_a_gpu_copies_no_weights_out_of_their_stack(monkeypatch):
    apart, unrolled = decoded_bytes(), decoded_bytes(merge_to_decode=False)
    monkeypatch.setattr("safe_rlhf_jax.inference.generate.platform", lambda: "cpu")
    scanned = decoded_bytes()
    assert apart < 0.75 * scanned
    assert unrolled < 0.85 * scanned


@pytest.mark.gpu_aot
def test_gpus_stand_by_host(compile_gpus):
    devices = gpu_devices("h100:2x8")
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8
    mesh = run.mesh_over(cfg.Mesh(data=2, fsdp=-1, tensor=2), devices)
    assert [{device.process_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    status, _, error, _ = compile_gpus("h100:2x8", "mesh.data=1", "mesh.fsdp=16")
    assert status == 1
    assert "data 1 does not divide into the 2 hosts" in error


@pytest.fixture
def compile_gpus(tmp_path, capfd):
    """Runs the command on the mini config for GPUs; returns exit status, output, error and the JSON."""

    def command(name, *arguments, stage="sft"):
        file = tmp_path / "report.json"
        options = ["--config", str(MINI), "--topology", name, "--stage", stage, "--json", str(file)]
        status = compile_command.main([*options, f"workdir={tmp_path}", *arguments])
        output = capfd.readouterr()
        return status, output.out, output.err, json.loads(file.read_text()) if file.exists() else None

    return command


@pytest.mark.gpu_aot
def test_the_report_on_gpus_has_all_that_one_on_tpus_has_and_says_what_is_assumed(compile_gpus):
    status, table, _, report = compile_gpus(
        "h100:2x4", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "execution.dtype=bfloat16"
    )
    assert status == 0
    (stage,) = report["stages"]
    (program,) = stage["programs"]
    assert program["memory"]["capacity"] == 80 * 10**9
    assert program["memory"]["total"] > program["memory"]["argument"] > 0
    assert {row["axes"] for row in program["collectives"]} >= {"data", "fsdp", "tensor"}
    assert 0 < stage["projected"]["mfu"] < 1
    assert report["environment"]["chip"] == "NVIDIA H100"
    assert report["environment"]["jax-cuda12-plugin"] == jax.__version__
    capacity, kernels, attention, network = report["assumptions"]
    assert "all of the 80 GB" in capacity
    assert "no autotuning" in kernels
    assert "stands in for cuDNN's" in attention
    assert "400 Gb/s for each GPU" in network
    assert attention in table


@pytest.mark.gpu_aot
def test_nothing_is_computed_on_a_single_gpu_that_is_not_here(compile_gpus):
    status, _, _, report = compile_gpus("h100:1")
    assert status == 0
    assert report["stages"][0]["fits"]


@pytest.mark.gpu_aot
def test_a_program_that_is_too_large_for_a_gpu_is_refused_with_advice_that_fits(compile_gpus):
    large = (
        "stages.sft.init_from=preset:small", "stages.sft.batch_size=8192", "stages.sft.max_length=1024",
        "execution.dtype=bfloat16", "execution.scan_layers=true",
    )  # fmt: skip
    status, table, _, report = compile_gpus("h100:2", *large)
    assert status == 1
    assert "does not fit" in table
    status, _, _, report = compile_gpus("h100:2", *large, *report["stages"][0]["advice"]["overrides"])
    assert status == 0
    assert report["stages"][0]["fits"]


@pytest.mark.gpu_aot
def test_a_search_on_gpus_lists_what_fits_best_first(compile_gpus):
    status, _, _, report = compile_gpus("h100:2x2", "--search", "--meshes=2")
    assert status == 0
    found = report["stages"][0]["feasible"]
    assert all(int(variant["overrides"][0].rpartition("=")[2]) % 2 == 0 for variant in found)
    seconds = np.asarray([variant["projected"]["step_seconds"] for variant in found])
    assert np.all(np.diff(seconds) >= 0)
