"""What a stage makes of its devices: `perf/` metrics, and profiles of steps. Only a profile waits for a device."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax

from safe_rlhf_jax import storage
from safe_rlhf_jax.aot.chips import chip_of
from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.metrics import Throughput, read_jsonl
from safe_rlhf_jax.processes import is_main

LOGGER = logging.getLogger(__name__)
BEGAN = "began"  # in a stage's folder: when it was started for the first time, in seconds since 1970
IN_STEPS = "perf/seconds_in_steps"
Made = TypeVar("Made")


class Performance:
    """The `perf/` metrics of the steps of a stage; each only where it can be known.

    Args:
        folder: Of the stage, whose `metrics.jsonl` has the steps before this start.
        start: Steps done before this start.
        flops: Model FLOPs of a token; None if they are not known.
        clock: Seconds, from anywhere.
        now: Seconds since 1970.
    """

    def __init__(
        self, folder: storage.Path, start: int, flops: float | None = None, *,
        clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.throughput, self.clock, self.now = Throughput(clock=clock), clock, now
        self.began = began(folder, now())
        self.earlier = seconds_in_steps(folder, start)
        chip = chip_of(jax.devices()[0])
        # Seconds that a token would take if every device computed at its peak rate.
        self.least = None if chip is None or flops is None else flops / (chip.flops * jax.device_count())

    def update(self, tokens: float, waited: float) -> dict[str, float]:
        """Returns the metrics of a finished step, of `tokens` real tokens, for whose batch the devices `waited`."""
        found = self.throughput.update(tokens)
        if self.least is not None and found:
            found["perf/mfu"] = self.least * found["perf/tokens_per_second"]
        memories: list[dict[str, int]] = [device.memory_stats() or {} for device in jax.local_devices()]
        if peaks := [memory["peak_bytes_in_use"] for memory in memories if "peak_bytes_in_use" in memory]:
            found["perf/hbm_peak_bytes"] = float(max(peaks))
        counted = self.earlier + self.throughput.total
        found |= {"perf/seconds_waiting_for_data": waited, IN_STEPS: counted}
        if (since := self.now() - self.began) > 0:
            found["perf/goodput"] = min(counted / since, 1.0)
        return found

    def waited_for(self, make: Callable[[], Made], is_idle: Callable[[], bool]) -> tuple[Made, float]:
        """Returns a batch, and the seconds that the devices waited for it, at most: 0 if they are still at work."""
        start = self.clock()
        made = make()
        return made, self.clock() - start if is_idle() else 0.0


def began(folder: storage.Path, now: float) -> float:
    """Returns when a stage was started for the first time, in seconds since 1970; notes it if that is `now`."""
    if not is_main():
        return now
    if not storage.is_file(folder / BEGAN):
        storage.make_folder(folder)
        storage.write(folder / BEGAN, repr(now))
    return float(storage.read_text(folder / BEGAN))


def seconds_in_steps(folder: storage.Path, start: int) -> float:
    """Returns the seconds of the first `start` steps of a stage, as it wrote them."""
    file = folder / "metrics.jsonl"
    rows = read_jsonl(file) if start and is_main() and storage.is_file(file) else []
    return max((row.get(IN_STEPS, 0.0) for row in rows if row["step"] <= start), default=0.0)


class Profiler:
    """Writes an XLA profile of some steps, on the devices of the first process; nothing for no steps.

    Args:
        folder: Receives the profile.
        steps: The steps, counted from 1.
        start: Steps done before this start.
    """

    def __init__(self, folder: storage.Path, steps: range, start: int) -> None:
        self.folder, self.steps, self.is_on = folder, steps if is_main() else range(0), False
        if self.steps and start >= self.steps[0]:
            LOGGER.warning(f"profile of steps {said(steps)}: not written; the run continues from step {start}")

    def __enter__(self) -> "Profiler":
        return self

    def before(self, step: int, state: Any) -> None:
        """Begins the profile if this step, which is about to start from a state, is its first."""
        if self.steps and step == self.steps[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.is_on = True

    def after(self, step: int, state: Any) -> bool:
        """Ends the profile if this step, which ends with a state, is its last; says whether it was."""
        if not self.is_on or step != self.steps[-1]:
            return False
        jax.block_until_ready(state)
        self.end()
        LOGGER.info(f"profile of steps {said(self.steps)}: {self.folder}")
        return True

    def tell_phases(self, program: str, phases: Sequence[str], tokens: float) -> None:
        """Writes `phases.json`, the seconds of each phase of a profiled step, and logs them.

        Args:
            program: Text of the compiled step.
            phases: Its named scopes.
            tokens: Real tokens of the last of these steps.
        """
        try:
            newest = max(one for one in storage.below(self.folder) if one.name.endswith(".xplane.pb"))  # by its time
            events = events_of(jax.profiler.ProfileData.from_serialized_xspace(storage.read_bytes(newest)))
            found = {phase: s / len(self.steps) for phase, s in phase_seconds(events, program, phases).items()}
        except (ValueError, RuntimeError, KeyError) as error:
            LOGGER.warning(f"the phases of the profile cannot be told: {error}")
            return
        if not found:
            LOGGER.warning("the phases of the profile cannot be told: it names no operation of the step's program")
            return
        rates = {phase: tokens / seconds for phase, seconds in found.items()}
        about = {"steps": list(self.steps), "seconds": found, "tokens_per_second": rates}
        storage.write(self.folder / "phases.json", json.dumps(about, indent=1) + "\n")
        each = (f"{phase} {seconds:.3g} s ({rates[phase]:,.0f} tokens/s)" for phase, seconds in found.items())
        LOGGER.info(f"a profiled step: {', '.join(each)}")

    def end(self) -> None:
        """Writes what there is of the profile."""
        if self.is_on:
            self.is_on = False
            jax.profiler.stop_trace()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()


class Event(NamedTuple):
    """An operation that ran on a device."""

    device: str
    name: str
    program: str | None  # None where the profile does not say it
    first: float  # nanoseconds
    last: float


def events_of(profile: Any) -> Iterator[Event]:
    """Yields the operations of a profile; on a TPU or GPU those that have no `hlo_op` are named by the event itself."""
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats or plane.name.startswith("/device:"):
                    name = str(stats.get("hlo_op", event.name)).lstrip("%").partition(" ")[0]
                    yield Event(plane.name, name, stats.get("hlo_module"), event.start_ns, event.end_ns)


def phase_seconds(events: Iterable[Event], program: str, phases: Sequence[str]) -> dict[str, float]:
    """Returns {phase: seconds in which at least one of its operations runs}, on the device where they are most.

    Args:
        events: Of a profile.
        program: Text of the compiled program, whose operations know the named scope that they were traced in.
        phases: The named scopes.
    """
    loops = ("while", "call", "conditional")  # last as long as what they run, which is counted itself
    name = program.partition(",")[0].split()[1]
    executed = Module(program).walk(tuple(phases), counts=False)
    phase_of = {e.instruction.name: e.phase for e in executed if e.phase and e.instruction.opcode not in loops}
    spans: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.name in phase_of and event.program in (None, name):
            spans[phase_of[event.name], event.device].append((event.first, event.last))
    seconds: dict[str, float] = defaultdict(float)
    for (phase, _), own in spans.items():
        seconds[phase] = max(seconds[phase], covered(own) / 1e9)
    return {phase: seconds[phase] for phase in phases if seconds.get(phase)}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def said(steps: range) -> str:
    """Describes steps, such as `10 to 12`."""
    return f"{steps[0]} to {steps[-1]}"
