"""The count of HBM bytes, on instructions as XLA writes them for TPUs; metadata is left out."""

from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.aot.traffic import core_bytes, hbm_bytes

# A gather that runs beside two products. Each of their fusions names it again, and hands on its buffers.
CARRIED = """\
HloModule carried

%start (p: bf16[64,8]) -> (bf16[64,8], bf16[64,32], s32[2]) {
  %p = bf16[64,8]{1,0} parameter(0)
  %gather.0 = bf16[64,32]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}
  ROOT %begin = (bf16[64,8]{1,0}, bf16[64,32]{1,0}, s32[2]{0:S(4)}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%beside (p0: bf16[64,8], p1: bf16[64,32], p2: s32[2], p3: bf16[16,64], p4: bf16[64,64]) -> (bf16[16,64], bf16[64,8], bf16[64,32], bf16[64,32], s32[2]) {
  %p3 = bf16[16,64]{1,0} parameter(3)
  %p4 = bf16[64,64]{1,0} parameter(4)
  %product = bf16[16,64]{1,0} convolution(%p3, %p4), dim_labels=bf_io->bf
  %p0 = bf16[64,8]{1,0} parameter(0)
  %p1 = bf16[64,32]{1,0} parameter(1)
  %gather.1 = bf16[64,32]{1,0} all-gather(%p0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}
  %p2 = s32[2]{0:S(4)} parameter(2)
  ROOT %results = (bf16[16,64]{1,0}, bf16[64,8]{1,0}, bf16[64,32]{1,0}, bf16[64,32]{1,0}, s32[2]{0:S(4)}) tuple(%product, %p0, %p1, %gather.1, %p2)
}

%end (q0: bf16[64,8], q1: bf16[64,32], q2: s32[2]) -> bf16[64,32] {
  %q0 = bf16[64,8]{1,0} parameter(0)
  %q1 = bf16[64,32]{1,0} parameter(1)
  %gather.2 = bf16[64,32]{1,0} all-gather(%q0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}
  %q2 = s32[2]{0:S(4)} parameter(2)
  ROOT %finish = bf16[64,32]{1,0} custom-call(%q0, %q1, %gather.2, %q2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[64,8], x: bf16[16,64], k: bf16[64,64]) -> bf16[64,32] {
  %w = bf16[64,8]{1,0} parameter(0)
  %x = bf16[16,64]{1,0} parameter(1)
  %k = bf16[64,64]{1,0} parameter(2)
  %s = (bf16[64,8]{1,0}, bf16[64,32]{1,0}, s32[2]{0:S(4)}) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %s0 = bf16[64,8]{1,0} get-tuple-element(%s), index=0
  %s1 = bf16[64,32]{1,0} get-tuple-element(%s), index=1
  %s2 = s32[2]{0:S(4)} get-tuple-element(%s), index=2
  %f = (bf16[16,64]{1,0}, bf16[64,8]{1,0}, bf16[64,32]{1,0}, bf16[64,32]{1,0}, s32[2]{0:S(4)}) fusion(%s0, %s1, %s2, %x, %k), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (2, {})}, calls=%beside
  %f0 = bf16[64,8]{1,0} get-tuple-element(%f), index=1
  %f1 = bf16[64,32]{1,0} get-tuple-element(%f), index=2
  %f2 = s32[2]{0:S(4)} get-tuple-element(%f), index=4
  ROOT %done = bf16[64,32]{1,0} fusion(%f0, %f1, %f2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""  # noqa: E501
SHARD, WHOLE, PRODUCT = 64 * 8 * 2, 64 * 32 * 2, (16 * 64 + 64 * 64 + 16 * 64) * 2


def test_a_collective_that_runs_beside_fusions_moves_its_bytes_once():
    assert hbm_bytes(Module(CARRIED))[""] == SHARD + WHOLE + PRODUCT


def test_a_fusion_that_changes_its_operand_in_place_still_reads_and_writes_it():
    """Its result has the memory of an operand too, but is neither the operand nor a collective."""
    text = CARRIED.replace("%gather.1 = bf16[64,32]{1,0} all-gather(%p0)", "%gather.1 = bf16[64,32]{1,0} negate(%p1)")
    assert hbm_bytes(Module(text))[""] == SHARD + WHOLE + PRODUCT + 2 * WHOLE


UPDATED = """\
HloModule updated

%write (cache: bf16[32,64], new: bf16[1,64], i: s32[]) -> bf16[32,64] {
  %cache = bf16[32,64]{1,0} parameter(0)
  %new = bf16[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %changed = bf16[32,64]{1,0} dynamic-update-slice(%cache, %new, %i, %zero)
}

ENTRY %main (c: bf16[32,64], n: bf16[1,64], at: s32[]) -> bf16[32,64] {
  %c = bf16[32,64]{1,0} parameter(0)
  %n = bf16[1,64]{1,0} parameter(1)
  %at = s32[]{:S(2)} parameter(2)
  %zero.1 = s32[] constant(0)
  %first = bf16[32,64]{1,0} fusion(%c, %n, %at), kind=kLoop, calls=%write
  ROOT %second = bf16[32,64]{1,0} dynamic-update-slice(%first, %n, %at, %zero.1)
}
"""


def test_an_update_in_place_reads_what_is_written_and_writes_it_once():
    row = 64 * 2
    assert hbm_bytes(Module(UPDATED))[""] == 2 * (row + row)
    on_core = UPDATED.replace("%n = bf16[1,64]{1,0}", "%n = bf16[1,64]{1,0:S(1)}")
    assert hbm_bytes(Module(on_core))[""] == 2 * row


NAMED = """\
HloModule named

ENTRY %main (p: bf16[16,64]) -> bf16[2,16,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  %buffer = bf16[16,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %fast = bf16[16,64]{1,0:S(1)} copy(%p)
  ROOT %both = bf16[2,16,64]{2,1,0} custom-call(%buffer, %p), custom_call_target="ConcatBitcast"
}
"""


def test_what_only_names_memory_moves_nothing():
    assert hbm_bytes(Module(NAMED))[""] == 16 * 64 * 2  # of the copy


def test_bytes_that_stay_on_the_core_are_counted_apart():
    assert core_bytes(Module(NAMED))[""] == 16 * 64 * 2
