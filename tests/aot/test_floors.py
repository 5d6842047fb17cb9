"""What a phase cannot go below, on the compiled program: the count is above it, and a broken count is reported."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.aot import hlo, roofline, traffic
from safe_rlhf_jax.aot.chips import CHIPS
from safe_rlhf_jax.aot.compile import compile_stage
from safe_rlhf_jax.aot.expectation import FACTORS, expected_seconds, factors
from safe_rlhf_jax.aot.floors import Reads, cache_bytes, decoding_reads, program_bytes, weight_bytes
from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.aot.roofline import analyse
from safe_rlhf_jax.aot.tables import remarks
from safe_rlhf_jax.compile import topology_devices
from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.models.attention import KVCache
from safe_rlhf_jax.models.config import PRESETS, ModelConfig
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.sharding import batch_sharding, make_mesh, named_shardings, replicated, with_shardings
from safe_rlhf_jax.types import PromptBatch
from tests.helpers import make_lm, tiny_config

ROOT = Path(__file__).parent.parent.parent
ROWS, PROMPT, RESPONSE = 4, 8, 16
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
CHIP = CHIPS["NVIDIA H100 80GB HBM3"]


@pytest.fixture(scope="module")
def generation():
    """A compiled generation, in its scope, and what it cannot go below."""
    module, variables = make_lm(tiny_config())
    group = jnp.zeros(ROWS, jnp.int32)
    prompts = PromptBatch(
        tokens=jnp.ones((ROWS, PROMPT), jnp.int32), mask=jnp.ones((ROWS, PROMPT), bool), group=group, row=group
    )
    make = functools.partial(generate, response_length=RESPONSE, eos_id=2, pad_id=0, sampling=Sampling())
    scoped = jax.named_scope("generation")(lambda *arguments: make(module, *arguments))
    compiled = jax.jit(scoped).lower(variables["params"], prompts, jax.random.key(0)).compile()
    reads = decoding_reads(module.config, variables["params"], rows=ROWS, prompt=PROMPT, response=RESPONSE, mesh=ONE)
    return compiled, {"decoding": reads}


def report(generation):
    compiled, reads = generation
    return analyse(
        compiled, mesh_shape=ONE, devices=jax.devices()[:1], chip=CHIP, flops={"generation": 1e6}, reads=reads
    )


def test_a_decoded_token_moves_at_least_its_weights_and_cache(generation):
    found = report(generation)
    assert found["implausible"] == []
    token = found["phases"]["generation"]["decoding"]
    assert 1 <= token["ratio"] < 30  # XLA's CPU compiler copies what a TPU does not
    assert any(line.startswith("a decoded token moves") for line in remarks(found))


@pytest.mark.parametrize(
    "break_count",
    [
        lambda patch: patch.setattr(hlo.Module, "trips", lambda *_: 1),  # loops counted once
        lambda patch: patch.setattr(traffic, "instruction_bytes", lambda *_: 1.0),  # calls of instructions only
        lambda patch: patch.setattr(traffic, "in_hbm", lambda arrays: 0),  # all of it thought to be on the core
    ],
)
def test_a_broken_count_is_reported_and_the_bound_takes_the_larger(generation, monkeypatch, break_count):
    sound = report(generation)["phases"]["generation"]
    break_count(monkeypatch)
    found = report(generation)
    assert any(line.startswith("decoding: ") for line in found["implausible"])
    row = found["phases"]["generation"]
    assert row["hbm_bytes"] < row["least_hbm_bytes"] == sound["least_hbm_bytes"]
    assert row["projected_seconds"]["hbm"] == row["least_hbm_bytes"] / CHIP.hbm_rate
    assert remarks(found)[0].startswith("implausible: decoding")


def test_bytes_that_are_counted_for_no_phase_are_missed_in_theirs(generation, monkeypatch):
    monkeypatch.setattr(roofline, "hbm_bytes", lambda *_: {"": 1e12})
    assert report(generation)["implausible"][0].startswith("decoding: 0 GB of HBM are counted")


def test_a_program_that_reads_less_than_its_arguments_is_implausible(generation):
    compiled, _ = generation
    assert program_bytes(Module(compiled.as_text())) > 0
    assert roofline.implausible({"step": 9e9}, {}, 1e10) == [
        "program: 9 GB of HBM are counted, less than the 10 GB of its arguments and results"
    ]
    assert roofline.implausible({"step": 9e9}, {"step": 8e9, "elsewhere": 1e12}, 1e9) == []


ENTRY = """\
HloModule entry

ENTRY %main (a: f32[64], b: f32[64], e: f32[9,64]) -> (f32[64], f32[64]) {
  %a = f32[64]{0} parameter(0), metadata={op_name="state.step"}
  %b = f32[64]{0} parameter(1), metadata={op_name="state.params[\\'kernel\\']"}
  %e = f32[9,64]{1,0} parameter(2), metadata={op_name="state.params[\\'decoder\\'][\\'embedding\\']"}
  %row = f32[64]{0} dynamic-slice(%e), dynamic_slice_sizes={1,64}
  %sum = f32[64]{0} add(%b, %row)
  ROOT %results = (f32[64]{0}, f32[64]{0}) tuple(%a, %sum)
}
"""


def test_a_program_need_not_read_what_it_returns_as_it_came_nor_all_of_an_embedding():
    assert program_bytes(Module(ENTRY)) == 2 * 64 * 4


# --- From shapes


def test_weights_of_a_pass_are_all_but_the_embedding_in_the_dtype_that_it_computes_in():
    config = tiny_config()
    params = make_lm(config)[1]["params"]
    sizes = {path[-1].key == "embedding": 0 for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sizes[path[-1].key == "embedding"] += leaf.size
    assert weight_bytes(params, "float32") == 4 * sizes[False]
    assert weight_bytes(params, "bfloat16") == 2 * sizes[False]
    assert weight_bytes(params, "float32", tied=True) == 4 * (sizes[False] + sizes[True])


@pytest.mark.parametrize(("embed", "parts"), [(("fsdp", "decode"), 8), ("fsdp", 4)])  # the latter: a whole base
def test_weights_that_were_gathered_are_split_over_the_other_axes_alone(embed, parts):
    mesh = make_mesh((1, 2, 2), decode=2)
    place = NamedSharding(mesh, PartitionSpec(embed, ("tensor",)))
    params = {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place)}
    assert weight_bytes(params, "float32") == 64 * 32 * 4 / parts
    assert weight_bytes(params, "float32", copied=True) == 64 * 32 * 4 / 4


def test_the_cache_of_a_token_has_the_tokens_before_it_as_far_as_its_window_reaches():
    config = tiny_config(num_layers=2, num_kv_heads=2, dtype="bfloat16")
    one = 2 * 2 * config.head_dim * 2  # keys and values of a token in a layer
    assert cache_bytes(config, 3, 8, 4, 1) == 3 * 2 * one * (9 + 10 + 11 + 12) / 4
    windowed = tiny_config(num_layers=2, num_kv_heads=2, dtype="bfloat16", windows=(4, None))
    assert cache_bytes(windowed, 3, 8, 4, 1) == 3 * one * (4 + (9 + 10 + 11 + 12) / 4)
    assert cache_bytes(config, 3, 8, 4, 2) == cache_bytes(config, 3, 8, 4, 1) / 2


def test_what_stays_on_the_core_is_read_once_less():
    assert Reads(10.0, 3).least(0) == 30
    assert Reads(10.0, 3).least(4) == 18
    assert Reads(10.0, 3).least(11) == 0
    assert CHIP.fast == 0
    assert CHIPS["TPU v5 lite"].fast == 128 * 2**20


# --- The expectation


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_need_of_every_chip_has_a_factor_with_its_source(chip):
    for phase in ("generation", "scoring", "update", "step"):
        found = factors(phase, chip)
        assert {"compute", "hbm", "interconnect"} <= found.keys()
        assert all(0 < factor.share <= 1 and factor.source for factor in found.values())


def test_sources_of_our_own_are_committed():
    own = {factor.source for factor in FACTORS if factor.source.startswith("benchmarks/")}
    assert own
    assert all((ROOT / source).exists() for source in own)


def test_the_expectation_is_the_slowest_need_at_its_measured_share():
    """8B on v6e with tensor 8 and 8 rows: weights and cache of 2048 to 2176 tokens, measured at 5.3 ms a token."""
    chip = CHIPS["TPU v6 lite"]
    token = 16.4e9 / 8 + 8 * 2112 * 36 * 2 * 8 * 128 * 2 / 8
    row = {
        "projected_seconds": {"compute": 0.0001, "hbm": token / chip.hbm_rate, "interconnect": 0.0001, "phase": 0.0},
        "least_hbm_bytes": token,
    }
    found = expected_seconds("generation", row, chip)
    assert found["expected_from"]["need"] == "decoding"
    assert found["expected_seconds"] == pytest.approx(0.0053, rel=0.03)
    assert expected_seconds("scoring", row, chip)["expected_from"]["need"] == "hbm"
    assert math.isclose(expected_seconds("scoring", row, chip)["expected_seconds"], token / chip.hbm_rate / 0.86)


def read(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_shares_of_phases_on_an_h100_are_those_of_our_own_run():
    phases = read("expectation_135m_h100")["phases"]
    own = {f.phases[0]: f.share for f in FACTORS if f.chips == "NVIDIA" and f.phases}
    assert own == {phase: round(row["share"], 2) for phase, row in phases.items()}
    measured = read("device_nvidia_h100_80gb_hbm3")["steps"]["rl_135m"]["found"]["seconds"]
    assert {phase: row["measured_seconds"] for phase, row in phases.items()}.items() <= measured.items()


def test_the_expectation_of_8b_is_near_the_iteration_that_was_measured_and_its_bound_is_below():
    """It has no part in the factors."""
    projected = read("expectation_8b_h100")["stages"][0]["projected"]
    measured = read("rl_step_8b_lora_h100")["seconds"]["iteration"]
    assert projected["step_seconds"] < measured
    assert projected["expected_seconds"] == pytest.approx(measured, rel=0.1)


# --- Compiled for TPUs and GPUs

WIDE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 8, "num_heads": 32,
    "num_kv_heads": 32, "head_dim": 128, "max_positions": 1024,
}  # fmt: skip
TOPOLOGIES = [  # of docs/scaling.md, and others
    *(pytest.param(t, marks=pytest.mark.tpu) for t in ("v5e:8x8", "v5e:8x16", "v5p:2x2x4", "v6e:8x8", "v5e:4x4")),
    *(pytest.param(t, marks=pytest.mark.gpu_aot) for t in ("h100:8", "h100:1", "a100-80:4")),
]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_no_phase_of_an_iteration_is_counted_below_what_it_cannot_go_below(topology, monkeypatch):
    """Of 7B's layers, fewer of them, where weights do not stay in the memory of a core."""
    monkeypatch.setitem(PRESETS, "wide", WIDE)
    devices = topology_devices(topology, 1)
    tensor = math.gcd(len(devices), 8)
    models = dict.fromkeys(("reward_model", "cost_model"), "path:none")
    stage = {"name": "rl", "kind": "rl", "init_from": "preset:wide", "prompts": {"name": "none"}, "batch_size": 32}
    stage |= {"max_prompt_length": 128, "max_response_length": 64} | models
    execution = {"dtype": "bfloat16", "remat": "full", "gather_to_decode": True}
    tree = {"workdir": "runs/wide", "assume": "wide", "stages": [stage], "execution": execution}
    config = cfg.RunConfig.model_validate(tree | {"mesh": {"data": 1, "fsdp": -1, "tensor": tensor}})
    (program,) = compile_stage(config, config.stages[0], devices)["programs"]
    assert program["implausible"] == []
    assert all(row["hbm_bytes"] >= row["least_hbm_bytes"] > 0 for row in program["phases"].values())
    token, chip = program["phases"]["generation"]["decoding"], CHIPS[devices[0].device_kind]
    assert token["token_bytes"] + chip.fast >= token["least_token_bytes"]  # a few layers stay in the memory of the core


def token_ratio(topology="v5e:8x8", batch=128):
    """Bytes that a decoded token moves on TPUs, over those of weights and cache: a 7B, layers scanned."""
    prompt = response = 256
    module = CausalLM(
        ModelConfig(**WIDE | {"num_layers": 32}, dtype="bfloat16", scan_layers=True, gather_to_decode=True)
    )
    tokens, key = jnp.zeros((1, 4), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(module.init, key, tokens, tokens == 0)
    mesh = make_mesh((1, -1, 2), topology_devices(topology, 1), decode=4)
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    params = with_shardings(nn.unbox(boxed), named_shardings(boxed, mesh))["params"]
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=rows)  # noqa: E731
    prompts = PromptBatch(tokens=shaped(jnp.int32, prompt), mask=shaped(bool, prompt), group=shaped(jnp.int32))
    make = functools.partial(generate, response_length=response, eos_id=2, pad_id=0, sampling=Sampling())
    with jax.set_mesh(mesh):
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
        program = jax.jit(lambda *arguments: make(module, *arguments)).lower(params, prompts, key).compile()
    moved = traffic.hbm_bytes(Module(program.as_text()), (roofline.DECODING,))[roofline.DECODING]
    sizes = {"rows": batch, "prompt": prompt, "response": response, "mesh": mesh.shape}
    return roofline.decoding(moved, decoding_reads(module.config, params, **sizes))["ratio"]


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "batch"), [("v5e:8x8", 128), ("v5e:8x8", 512), ("v5p:2x2x4", 128)])
def test_a_decoded_token_reads_weights_and_cache_once(topology, batch):
    assert 0.9 <= token_ratio(topology, batch) <= 1.15  # a little stays in the memory of the core


@pytest.mark.tpu
def test_a_cache_that_is_copied_would_be_seen(monkeypatch):
    def write(self, keys, values, slot):
        old = jax.lax.optimization_barrier(self.read())
        new = [jax.lax.dynamic_update_slice(x, y, (0, 0, slot, 0)) for x, y in zip(old, (keys, values), strict=True)]
        every = self.keys, self.values
        return KVCache(
            *(jax.lax.dynamic_update_index_in_dim(x, y, self.layer, 0) for x, y in zip(every, new, strict=True)),
            self.layer,
        )

    monkeypatch.setattr(KVCache, "write", write)
    assert token_ratio() > 1.15
