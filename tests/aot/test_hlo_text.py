"""The parser of compiled programs, on programs whose loops, collectives and bytes are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from safe_rlhf_jax.aot.collectives import axes_of, find_collectives, first_group
from safe_rlhf_jax.aot.gpus import compiler_options, gpu_devices
from safe_rlhf_jax.aot.hlo import Module, parse_instruction
from safe_rlhf_jax.aot.traffic import hbm_bytes
from safe_rlhf_jax.sharding import make_mesh

ROUNDS = 5


def compiled_text(function, *arguments, device=None):
    options = compiler_options(device or jax.devices()[0])
    return jax.jit(function).lower(*arguments).compile(options).as_text()


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu_aot)])
def mesh(request):
    return make_mesh((2, 4, 1), gpu_devices("h100:8") if request.param == "gpu" else None)


def collectives_in_a_loop(mesh, body, rounds=ROUNDS):
    """Compiles a loop over a collective of f32[8] per device, in the scope `inside`."""

    @jax.named_scope("inside")
    def local(x):
        return jax.lax.fori_loop(0, rounds, lambda _, x: body(x), x)

    spec = PartitionSpec(("data", "fsdp"))
    function = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, spec))
    return Module(compiled_text(function, x, device=mesh.devices.flat[0]))


@pytest.mark.parametrize(
    ("kind", "axis", "sent", "body"),
    [
        ("all-reduce", "fsdp", 2 * 3 / 4 * 32, lambda x: jax.lax.psum(x, "fsdp")),
        ("all-reduce", "data", 2 * 1 / 2 * 32, lambda x: jax.lax.psum(x, "data")),
        ("all-gather", "fsdp", 3 / 4 * 128, lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[8:16]),
        ("collective-permute", "fsdp", 32, lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])),
        ("all-to-all", "fsdp", 3 / 4 * 32, lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)),
    ],
)
def test_a_collective_is_found_with_its_axis_its_rounds_and_its_bytes(mesh, kind, axis, sent, body):
    (found,) = find_collectives(collectives_in_a_loop(mesh, body), mesh.shape, ("inside",))
    assert (found.kind, found.axes, found.times, found.phase) == (kind, (axis,), ROUNDS, "inside")
    assert found.bytes == pytest.approx(ROUNDS * sent)


def test_traffic_counts_a_loop_as_often_as_it_runs():
    def traffic(rounds):
        weights = jax.ShapeDtypeStruct((rounds, 64, 64), jnp.float32)
        x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
        text = compiled_text(lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], weights, x)
        return hbm_bytes(Module(text))[""]

    matrix = 64 * 64 * 4
    per_round = (traffic(40) - traffic(20)) / 20
    assert 3 * matrix <= per_round < 10 * matrix  # weights and x in, x out, and copies of these; not all 20 weights


NESTED = """\
HloModule nested

%slice (p0: f32[32,64], p1: s32[]) -> f32[1,64] {
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %p0 = f32[32,64] parameter(0)
  ROOT %row = f32[1,64] dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
}

%outer (weights: f32[32,64], x: f32[1,64], i: s32[]) -> f32[1,64] {
  %weights = f32[32,64] parameter(0)
  %i = s32[] parameter(2)
  %renamed = f32[32,64] bitcast(%weights)
  %inner = f32[1,64] fusion(%renamed, %i), kind=kLoop, calls=%slice
  %x = f32[1,64] parameter(1)
  ROOT %sum = f32[1,64] add(%inner, %x)
}

ENTRY %main (w: f32[32,64], y: f32[1,64], n: s32[]) -> f32[1,64] {
  %w = f32[32,64] parameter(0)
  %y = f32[1,64] parameter(1)
  %n = s32[] parameter(2)
  ROOT %out = f32[1,64] fusion(%w, %y, %n), kind=kOutput, calls=%outer
}
"""


def test_traffic_counts_what_a_fusion_inside_of_a_fusion_slices_off():
    row = 64 * 4
    assert hbm_bytes(Module(NESTED))[""] == 3 * row + 4  # a row of the weights, x, the result; the index
    whole = NESTED.replace("dynamic-slice(%p0, %p1, %zero)", "reduce(%p0, %zero)")
    assert hbm_bytes(Module(whole))[""] == (32 + 2) * row + 4


# As XLA writes it for eight GPUs; metadata is shortened.
ASYNCHRONOUS = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%body (state: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %state = (s32[], f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%state), index=1
  %norm = f32[16]{0} constant({...})
  %kernel = bf16[8,32]{1,0} constant({...})
  %all-gather-start = ((f32[16]{0}, bf16[8,32]{1,0}), (f32[128]{0}, bf16[64,32]{1,0})) all-gather-start(%norm, %kernel), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/update/while/body/(norm/mul:kernel/dot_general)"}
  %all-gather-done = (f32[128]{0}, bf16[64,32]{1,0}) all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((f32[64,8]{1,0}), f32[8,8]{1,0}) reduce-scatter-start(%x), channel_id=2, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, use_global_device_ids=true, dimensions={0}, to_apply=%add
  %reduce-scatter-done = f32[8,8]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %all-to-all-start = ((f32[64,8]{1,0}), f32[64,8]{1,0}) all-to-all-start(%x), channel_id=3, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}
  %all-to-all-done = f32[64,8]{1,0} all-to-all-done(%all-to-all-start)
  %all-reduce-start = f32[64,8]{1,0} all-reduce-start(%x), channel_id=4, replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global_device_ids=true, to_apply=%add
  %all-reduce-done = f32[64,8]{1,0} all-reduce-done(%all-reduce-start)
  %custom-call.1 = (f32[64,8]{1,0}, s8[33554432]{0}) custom-call(%x, %all-reduce-done), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/update/while/body/dot_general"}
  %product = f32[64,8]{1,0} get-tuple-element(%custom-call.1), index=0
  ROOT %next = (s32[], f32[64,8]{1,0}) tuple(%i, %product)
}

%condition (state: (s32[], f32[64,8])) -> pred[] {
  %state = (s32[], f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (start: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %start = (s32[], f32[64,8]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[64,8]{1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(step)/update/while"}
}
"""  # noqa: E501
WHOLE, SHARD, GATHERED = 64 * 8 * 4, 8 * 8 * 4, 128 * 4 + 64 * 32 * 2


def test_asynchronous_collectives_of_gpus_are_counted_with_all_of_their_results_and_no_operand():
    found = find_collectives(Module(ASYNCHRONOUS), {"data": 1, "fsdp": 8, "tensor": 1}, ("update",))
    assert {c.kind: c.bytes_each for c in found} == {
        "all-gather": 7 / 8 * GATHERED,
        "reduce-scatter": 7 / 8 * WHOLE,
        "all-to-all": 7 / 8 * WHOLE,
        "all-reduce": 2 * 7 / 8 * WHOLE,
    }
    assert {(c.axes, c.times, c.phase) for c in found} == {(("fsdp",), 5, "update")}


def test_traffic_of_gpus_is_operands_and_results_without_the_workspace_of_a_library():
    collectives = (GATHERED // 8 + GATHERED) + (WHOLE + SHARD) + 2 * WHOLE + 2 * WHOLE
    assert hbm_bytes(Module(ASYNCHRONOUS), ("update",))["update"] == 5 * (collectives + 3 * WHOLE)


STARTED = """\
HloModule started

ENTRY %main (p: f32[32,64]) -> f32[2,64] {
  %p = f32[32,64]{1,0} parameter(0)
  %copy-start = (f32[32,64]{1,0:S(1)}, f32[32,64]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[32,64]{1,0:S(1)} copy-done(%copy-start)
  %slice-start = ((f32[32,64]{1,0}), f32[2,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:2], [0:64]}
  %slice-done = f32[2,64]{1,0:S(1)} slice-done(%slice-start)
  ROOT %row = f32[2,64]{1,0} slice(%copy-done), slice={[0:2], [0:64]}
}
"""


def test_a_copy_or_slice_that_is_started_reads_once_what_it_moves():
    assert hbm_bytes(Module(STARTED))[""] == 32 * 64 * 4 + 2 * 64 * 4 + 2 * 64 * 4


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", (0, 2)),
        ("source_target_pairs={{0,0},{1,5},{5,1}}", (1, 5)),
        ("replica_groups={}, x", tuple(range(8))),
    ],
)
def test_groups_are_read_in_every_notation(attributes, group):
    assert first_group(attributes, 8) == group


def test_a_notation_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="not known"):
        first_group("replica_groups=new_notation", 8)


def test_a_group_lies_along_the_axes_on_which_its_devices_differ():
    shape = {"data": 2, "fsdp": 4, "tensor": 2}
    assert axes_of((0, 1), shape) == ("tensor",)
    assert axes_of((0, 2, 4, 6), shape) == ("fsdp",)
    assert axes_of((0, 9), shape) == ("data", "tensor")


def test_an_instruction_with_tuples_tiles_and_memory_spaces_is_read():
    line = (
        "  ROOT %f.1 = (bf16[2,4]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}) fusion(%a.2, s32[] %b), "
        'kind=kLoop, calls=%c.3, metadata={op_name="jit(step)/update/x"}'
    )
    read = parse_instruction(line)
    assert (read.name, read.opcode, read.operands, read.called) == ("f.1", "fusion", ("a.2", "b"), ("c.3",))
    assert [(a.dtype, a.shape, a.on_chip, a.bytes) for a in read.arrays] == [
        ("bf16", (2, 4), True, 16),
        ("f32", (), False, 4),
    ]
    assert read.is_root
    assert read.op_name == "jit(step)/update/x"
