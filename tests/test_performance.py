"""`perf/` metrics and profiles: what can be known without waiting for a device, and nothing else."""

import json

import jax
import jax.numpy as jnp
import pytest

from safe_rlhf_jax import performance
from safe_rlhf_jax.aot.chips import CHIPS
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.loop import fit
from safe_rlhf_jax.metrics import JsonlWriter, read_jsonl
from safe_rlhf_jax.performance import Event, Performance, Profiler
from tests.test_loop import counter
from tests.test_metrics import Clock


def stepped(clock, measured, seconds, tokens=100.0, waited=0.0):
    clock.now += seconds
    return measured.update(tokens, waited)


def at(clock, folder, start=0, flops=None):
    return Performance(folder, start, flops, clock=clock, now=clock)


def test_goodput_counts_steps_and_neither_compiling_evaluations_nor_the_time_between_two_starts(tmp_path):
    clock = Clock()
    measured = at(clock, tmp_path)
    first = stepped(clock, measured, 10.0)
    assert (first["perf/seconds_in_steps"], first["perf/goodput"]) == (0.0, 0.0), "it compiled"
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in (2, 3):
        writer.write(step, stepped(clock, measured, 5.0))
    clock.now += 20.0
    measured.throughput.skip()  # an evaluation
    row = stepped(clock, measured, 10.0)
    writer.write(4, row)
    assert (row["perf/seconds_in_steps"], row["perf/goodput"]) == (20.0, 20.0 / 50.0)

    clock.now += 40.0  # it was killed; step 4 is lost, and counts no more
    measured = at(clock, tmp_path, start=3)
    stepped(clock, measured, 10.0)
    row = stepped(clock, measured, 10.0)
    assert (row["perf/seconds_in_steps"], row["perf/goodput"]) == (20.0, 20.0 / 110.0)


def test_run_that_breaks_and_continues_goes_on_counting(tmp_path):
    taken, failures = counter(8).step, [5]

    def step(state, *others):
        if int(state["count"]) in failures:
            failures.clear()
            raise UserError("the judge is down")
        return taken(state, *others)

    with pytest.raises(UserError, match="step 5 is saved"):
        fit(counter(8, step=step), tmp_path, writers=("jsonl",))
    began, before = (tmp_path / "began").read_text(), read_jsonl(tmp_path / "metrics.jsonl")
    fit(counter(8, step=step), tmp_path, writers=("jsonl",))
    after = read_jsonl(tmp_path / "metrics.jsonl")
    assert after[:5] == before
    counted = [row["perf/seconds_in_steps"] for row in after]
    assert counted == sorted(counted)
    assert counted[5] == counted[4] > 0.0, "the first step after a start compiles"
    assert all(0.0 <= row["perf/goodput"] <= 1.0 for row in after)
    assert (tmp_path / "began").read_text() == began


def test_mfu_is_of_all_devices_of_a_known_chip(tmp_path, monkeypatch):
    chip = CHIPS["TPU v5p"]
    monkeypatch.setattr(performance, "chip_of", lambda device: chip)
    clock = Clock()
    measured = at(clock, tmp_path, flops=chip.flops * jax.device_count() / 400.0)
    assert "perf/mfu" not in stepped(clock, measured, 1.0)
    assert stepped(clock, measured, 0.5)["perf/mfu"] == pytest.approx(100.0 / 0.5 / 400.0)


def test_cpu_has_neither_mfu_nor_hbm(tmp_path):
    clock = Clock()
    measured = at(clock, tmp_path, flops=1e9)
    stepped(clock, measured, 1.0)
    found = stepped(clock, measured, 1.0, waited=0.25)
    assert set(found) == {
        "perf/tokens_per_second", "perf/seconds_per_step", "perf/seconds_in_steps", "perf/goodput",
        "perf/seconds_waiting_for_data",
    }  # fmt: skip
    assert found["perf/seconds_waiting_for_data"] == 0.25


def test_peak_of_hbm_is_that_of_the_fullest_device(tmp_path, monkeypatch):
    class Device:
        device_kind = "a chip of tomorrow"

        def __init__(self, peak):
            self.memory_stats = lambda: {"bytes_in_use": 1, "peak_bytes_in_use": peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(7)])
    assert stepped(clock := Clock(), at(clock, tmp_path), 1.0)["perf/hbm_peak_bytes"] == 7.0


def test_devices_that_are_still_at_work_do_not_wait_for_a_batch(tmp_path):
    clock = Clock()

    def batch():
        clock.now += 3.0
        return "batch"

    measured = at(clock, tmp_path)
    assert measured.waited_for(batch, lambda: False) == ("batch", 0.0)
    assert measured.waited_for(batch, lambda: True) == ("batch", 3.0)


def traced(monkeypatch):
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("end"))
    return found


def test_profile_begins_before_its_first_step_and_ends_after_its_last(tmp_path, monkeypatch):
    found, taken = traced(monkeypatch), counter().step

    def step(*arguments):
        found.append("step")
        return taken(*arguments)

    fit(counter(5, step=step, profile=range(2, 4)), tmp_path, writers=("jsonl",))
    assert found == ["step", str(tmp_path / "profile"), "step", "step", "end", "step", "step"]


def test_profile_of_a_stage_that_breaks_is_ended(tmp_path, monkeypatch):
    found = traced(monkeypatch)
    with pytest.raises(FloatingPointError):
        fit(counter(5, profile=range(2, 6), bad_metric=3), tmp_path, writers=("jsonl",))
    assert found == [str(tmp_path / "profile"), "end"]


def test_profile_that_a_resumed_run_is_beyond_is_not_written_and_this_is_said(tmp_path, monkeypatch, capsys):
    found = traced(monkeypatch)
    Profiler(tmp_path, range(2, 4), start=2).before(3, None)
    assert found == []
    assert "profile of steps 2 to 3: not written; the run continues from step 2" in capsys.readouterr().out


PROGRAM = """HloModule jit_step, is_scheduled=true

body {
  p = f32[4] parameter(0)
  ROOT inner.1 = f32[4] tanh(p), metadata={op_name="jit(step)/generation/while/body/tanh"}
}

condition {
  q = f32[4] parameter(0)
  bound = s32[] constant(3)
  ROOT less.1 = pred[] compare(bound, bound), direction=LT
}

ENTRY main {
  x = f32[4] parameter(0)
  while.1 = f32[4] while(x), condition=%condition, body=%body, metadata={op_name="jit(step)/generation/while"}
  ROOT add.1 = f32[4] add(while.1, x), metadata={op_name="jit(step)/update/add"}
}
"""


def test_seconds_of_a_phase_are_those_in_which_one_of_its_operations_runs():
    second = 1e9
    events = [
        ("TPU:0", "inner.1", "jit_step", 1, 3),
        ("TPU:0", "inner.1", "jit_step", 2, 4),  # on another core of the device at the same time
        ("TPU:1", "inner.1", "jit_step", 1, 2),
        ("TPU:0", "while.1", "jit_step", 0, 9),  # what it runs is counted
        ("TPU:0", "add.1", None, 5, 6),
        ("TPU:0", "inner.1", "jit_evaluate", 6, 9),
        ("TPU:0", "elsewhere.1", "jit_step", 6, 9),
    ]
    events = [Event(*named, first * second, last * second) for *named, first, last in events]
    found = performance.phase_seconds(events, PROGRAM, ("generation", "scoring", "update"))
    assert found == {"generation": 3.0, "update": 1.0}


def test_profile_of_a_program_tells_the_seconds_of_its_phases(tmp_path, capsys):
    plain = counter()

    @jax.jit
    def step(state, frozen, batch, key):
        with jax.named_scope("generation"):
            x = jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), jnp.ones((64, 64)))
        with jax.named_scope("update"):
            total = jnp.sin(x).sum() * 0.0
        state, metrics = plain.step(state, frozen, batch, key)
        return state, metrics | {"train/total": total}

    fit(counter(5, step=step, profile=range(2, 4), phases=("generation", "update")), tmp_path, writers=("jsonl",))
    found = json.loads((tmp_path / "profile" / "phases.json").read_text())
    assert found["steps"] == [2, 3]
    assert found["seconds"]["generation"] > found["seconds"]["update"] > 0
    tokens = {phase: rate * found["seconds"][phase] for phase, rate in found["tokens_per_second"].items()}
    assert tokens == pytest.approx(dict.fromkeys(("generation", "update"), counter().tokens({})))
    assert "a profiled step: generation" in capsys.readouterr().out


def test_profile_whose_operations_have_other_names_is_a_warning(tmp_path, caplog):
    profiler = Profiler(tmp_path, range(2, 4), start=0)
    profiler.tell_phases(PROGRAM, ("generation",), 1.0)
    assert "the phases of the profile cannot be told" in caplog.text
    assert not (tmp_path / "phases.json").exists()
