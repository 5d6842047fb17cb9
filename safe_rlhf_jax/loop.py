"""The one training loop: restore, step, log, evaluate, save; stop on non-finite numbers or preemption. Knows no RL."""

import dataclasses
import math
import pathlib
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax

from safe_rlhf_jax.checkpoint import Checkpoints
from safe_rlhf_jax.metrics import ProgressBar, Throughput, make_writers

PREEMPTED = 143  # exit status: a launcher should start the same command again


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that trains, in the one shape the loop knows."""

    name: str
    total_steps: int
    init: Callable[[], Any]  # the state before the first step
    step: Callable[[Any, Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]  # (state, frozen, batch, key); jitted
    batch: Callable[[int], Any]  # step -> batch on the devices
    frozen: Any  # parameters that no step changes
    seed: int
    checkpoint_every: int
    keep_checkpoints: int
    eval_every: int | None
    evaluate: Callable[[Any], dict[str, float]]  # state -> metrics
    tokens: Callable[[dict[str, float]], float]  # metrics of a step -> tokens it processed
    warning: Callable[[dict[str, float]], str | None] = lambda _: None  # metrics -> something worth saying once
    shown: tuple[str, ...] = ("train/loss",)  # metrics beside the progress bar


def fit(stage: Stage, folder: pathlib.Path, *, writers: tuple[str, ...] = ("jsonl", "tensorboard")) -> Any:
    """Trains from the newest checkpoint, or from the start, to the end.

    Step t is dispatched before the metrics of step t − 1 are downloaded, so that the device never waits for the host.

    Args:
        stage: What to train.
        folder: Where `checkpoints/` and `metrics.jsonl` are.
        writers: Where metrics go.

    Returns:
        The final state.

    Raises:
        FloatingPointError: At the first metric that is not finite, naming it, the step and the last checkpoint.
        SystemExit: With status `PREEMPTED` after SIGTERM, when the state is saved.
    """
    checkpoints = Checkpoints(folder / "checkpoints", keep=stage.keep_checkpoints)
    state, start = stage.init(), checkpoints.latest() or 0
    if start:
        state = checkpoints.restore(start, state)
        print(f"{stage.name}: continuing from step {start}")
    log = Log(stage, folder, checkpoints, start, writers)
    key = jax.random.key(stage.seed)
    with Preemption() as preemption:
        for step in range(start, stage.total_steps):
            state, metrics = stage.step(state, stage.frozen, stage.batch(step), jax.random.fold_in(key, step))
            done = step + 1
            log.push(done, metrics)
            if stage.eval_every and done % stage.eval_every == 0 and done < stage.total_steps:
                log.flush()
                log.write(done, stage.evaluate(state))
            if done % stage.checkpoint_every == 0 or done == stage.total_steps or preemption.asked:
                log.flush()  # raises before a state that is not finite is saved
                checkpoints.save(done, state)
                log.throughput.skip()
            if preemption.asked and done < stage.total_steps:
                checkpoints.close()
                log.close()
                print(f"{stage.name}: preempted; step {done} is saved, the same command continues")
                raise SystemExit(PREEMPTED)
    checkpoints.close()
    log.close()
    return state


class Log:
    """Metrics of steps: downloaded one step late, checked, written, shown."""

    def __init__(
        self, stage: Stage, folder: pathlib.Path, checkpoints: Checkpoints, start: int, writers: tuple[str, ...]
    ):
        self.stage, self.checkpoints = stage, checkpoints
        self.writers = make_writers(folder, resume_step=start, names=writers)
        self.bar = ProgressBar(stage.name, stage.total_steps, start=start, keys=stage.shown)
        self.throughput = Throughput()
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.warned = False

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was dispatched, and reports the step before it."""
        self.flush()
        self.pending = step, metrics

    def flush(self) -> None:
        """Reports the pending step."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            last = self.checkpoints.latest()
            where = f"step {last} in {self.checkpoints.folder}" if last else "none yet"
            self.close()
            raise FloatingPointError(
                f"{self.stage.name}: {bad[0]} is {values[bad[0]]} at step {step}; last good checkpoint: {where}. "
                "Lower the learning rate or max_grad_norm, or look at the data of this step."
            )
        values |= self.throughput.update(self.stage.tokens(values))
        message = None if self.warned else self.stage.warning(values)
        if message:
            self.warned = True
            print(f"{self.stage.name}: warning at step {step}: {message}")
        self.write(step, values)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics and moves the progress bar."""
        self.writers.write(step, metrics)
        self.bar.write(step, metrics)

    def close(self) -> None:
        """Reports what is pending and closes the files."""
        self.flush()
        self.bar.close()
        self.writers.close()


class Preemption:
    """Remembers SIGTERM, so that the loop can save at the next step boundary."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Preemption":
        def remember(_signal: int, _frame: FrameType | None) -> None:
            self.asked = True

        self.previous = signal.signal(signal.SIGTERM, remember)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)
