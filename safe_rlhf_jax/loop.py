"""The one training loop: restore, step, log, evaluate, save; stop on non-finite numbers or preemption. Knows no RL."""

import dataclasses
import functools
import itertools
import logging
import math
import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp

from safe_rlhf_jax import storage
from safe_rlhf_jax.checkpoint import Checkpoints
from safe_rlhf_jax.errors import NonFiniteError, UserError
from safe_rlhf_jax.host_memory import MOST_KEPT, return_freed_memory
from safe_rlhf_jax.metrics import ProgressBar, make_writers, read_jsonl
from safe_rlhf_jax.performance import Performance, Profiler
from safe_rlhf_jax.processes import any_process, is_main

LOGGER = logging.getLogger(__name__)
PREEMPTED = 143  # exit status: a launcher should start the same command again
MAY_OVERFLOW = ("train/perplexity",)  # e to the power of a loss that is itself finite: shown, and never stops a run


@dataclasses.dataclass(frozen=True)
class TrainLoop:
    """A training stage, in the one shape that the loop knows."""

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
    warning: Callable[[dict[str, float]], str | None] = lambda _: None  # metrics -> a warning, printed once
    shown: tuple[str, ...] = ("train/loss",)  # metrics beside the progress bar
    keep_best: str | None = None  # metric whose best checkpoint is kept as well, see `Checkpoints`
    patience: int | None = None  # evaluations without a better `keep_best`, after which the stage ends
    flops: float | None = None  # model FLOPs of a token
    profile: range = range(0)  # steps to profile, counted from 1
    phases: tuple[str, ...] = ()  # named scopes of `step`, a jitted program, whose seconds a profile tells

    def is_due(self, done: int) -> bool:
        """Says whether an evaluation after `done` steps is due."""
        return self.eval_every is not None and done % self.eval_every == 0 and done < self.total_steps

    def evaluates(self, done: int, saves: bool) -> bool:
        """Says whether to evaluate the state after `done` steps: when it is due, or to rank a checkpoint."""
        return self.is_due(done) or (saves and (self.keep_best or "").removeprefix("-").startswith("eval/"))


def fit(stage: TrainLoop, folder: storage.Path, *, writers: tuple[str, ...] = ("jsonl", "tensorboard")) -> Any:
    """Trains to the end, from the newest checkpoint or from the start.

    Step t is dispatched before the metrics of step t − 1 are downloaded, so that the device never waits for the host.

    Args:
        stage: What to train.
        folder: Holds `checkpoints/` and `metrics.jsonl`.
        writers: Receive the metrics.

    Returns:
        The final state.

    Raises:
        NonFiniteError: At the first metric that is not finite, naming it, the step and the last checkpoint.
        SystemExit: After SIGTERM, with status `PREEMPTED`, once the state is saved.
    """
    checkpoints = Checkpoints(folder / "checkpoints", keep=stage.keep_checkpoints, best=stage.keep_best)
    state, start = checkpoints.restore(stage.init())
    if start:
        LOGGER.info(f"{stage.name}: continuing from step {start}")
    log, patience = Log(stage, folder, checkpoints, start, writers if is_main() else ()), Patience(stage, folder, start)
    key = jax.random.key(stage.seed)
    with Preemption() as preemption, Profiler(folder / "profile", stage.profile, start) as profiler:
        for step in itertools.takewhile(lambda _: not patience.is_over, range(start, stage.total_steps)):
            batch, waited = log.performance.waited_for(functools.partial(stage.batch, step), log.is_idle)
            asked = preemption.agreed()
            profiler.before(step + 1, state)
            return_freed_memory(above=MOST_KEPT)
            try:
                state, metrics = stage.step(state, stage.frozen, batch, jax.random.fold_in(key, step))
            except UserError as error:  # a signal from the host failed; the state is as it was
                log.keep(step, state)
                raise resumable(error, step) from error
            done = step + 1
            if profiler.after(done, state) and stage.phases:
                program: Any = stage.step
                text = program.lower(state, stage.frozen, batch, key).compile().as_text()
                profiler.tell_phases(text, stage.phases, stage.tokens({k: float(v) for k, v in metrics.items()}))
                log.performance.throughput.skip()
            log.push(done, metrics, waited)
            stop = asked()
            save = done % stage.checkpoint_every == 0 or done == stage.total_steps or stop
            if stage.evaluates(done, save):
                log.flush(lambda: stage.evaluate(state))  # noqa: B023 called before the next step
                patience.push(done, log.newest)
            if save or patience.is_over:
                log.flush()  # raises before a state that is not finite is saved
                log.refuse(done, not_finite(state))
                checkpoints.save(done, state, log.newest)
                log.performance.throughput.skip()
            if stop:
                checkpoints.close()
                log.close()
                LOGGER.info(f"{stage.name}: preempted; step {done} is saved, the same command continues")
                raise SystemExit(PREEMPTED)
    checkpoints.close()
    log.close()
    return state


class Patience:
    """Says when a stage has gone on for long enough without a better `keep_best`.

    It counts the evaluations that are due, in `metrics.jsonl`, and no others: a run that was stopped ends at the same
    step as one that was not.
    """

    def __init__(self, stage: TrainLoop, folder: storage.Path, start: int):
        self.stage, self.is_over = stage, False
        self.ranks: list[float] = []  # of the evaluations so far, higher is better
        if stage.patience is None:
            return
        file = folder / "metrics.jsonl"
        for row in read_jsonl(file) if is_main() and storage.is_file(file) else ():
            if row["step"] <= start and stage.is_due(row["step"]):
                self.ranks.append(self.rank(row))
        self.decide()

    def rank(self, metrics: Mapping[str, float]) -> float:
        """Returns the rank of an evaluation, as that of a checkpoint: the lowest without a finite number."""
        best = self.stage.keep_best or ""
        value = metrics.get(best.removeprefix("-"), math.nan) * (-1 if best.startswith("-") else 1)
        return value if math.isfinite(value) else -math.inf

    def push(self, done: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of an evaluation after `done` steps."""
        if self.stage.patience is None or not self.stage.is_due(done):
            return
        self.ranks.append(self.rank(metrics))
        self.decide()
        if self.is_over:
            LOGGER.info(
                f"{self.stage.name}: no better {self.stage.keep_best} in {self.stage.patience} evaluations; ends at "
                f"step {done} of {self.stage.total_steps}"
            )

    def decide(self) -> None:
        """Decides, in the process that writes, for all."""
        since = len(self.ranks) - 1 - self.ranks.index(max(self.ranks)) if self.ranks else 0
        self.is_over = bool(any_process(is_main() and since >= (self.stage.patience or math.inf)))


class Log:
    """Metrics of steps: downloaded one step late, checked, written, shown."""

    def __init__(
        self, stage: TrainLoop, folder: storage.Path, checkpoints: Checkpoints, start: int, writers: tuple[str, ...]
    ):
        self.stage, self.checkpoints = stage, checkpoints
        self.writers = make_writers(folder, resume_step=start, names=writers)
        self.bar = ProgressBar(stage.name, stage.total_steps, start=start, keys=stage.shown)
        self.performance = Performance(folder, start, stage.flops)
        self.pending: tuple[int, dict[str, jax.Array], float] | None = None
        self.newest: dict[str, float] = {}  # metrics of the newest reported step
        self.warned = False

    def is_idle(self) -> bool:
        """Says whether the devices are done with all steps; does not wait for them."""
        newest: Any = {} if self.pending is None else self.pending[1]
        return all(value.is_ready() for value in newest.values())

    def push(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Takes the metrics of a dispatched step, with the wait for its batch, and reports the step before it."""
        self.flush()
        self.pending = step, metrics, waited

    def flush(self, evaluate: Callable[[], dict[str, float]] = dict) -> None:
        """Reports the pending step, together with the metrics of `evaluate` after it."""
        if self.pending is None:
            return
        step, metrics, waited = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        fatal = {name: value for name, value in values.items() if name not in MAY_OVERFLOW}
        bad = [f"{name} is {value}" for name, value in fatal.items() if not math.isfinite(value)]
        self.refuse(step, bad[0] if bad else None)
        values |= self.performance.update(self.stage.tokens(values), waited)
        message = None if self.warned else self.stage.warning(values)
        if message:
            self.warned = True
            LOGGER.warning(f"{self.stage.name}: warning at step {step}: {message}")
        try:
            measured = evaluate()
        except UserError as error:  # a judge or a signal from the host failed
            last = self.checkpoints.latest()
            self.checkpoints.close()
            self.close()
            raise resumable(error, last) from error
        if measured:
            self.performance.throughput.skip()
        self.newest = values | measured
        self.writers.write(step, self.newest)
        self.bar.write(step, self.newest)

    def refuse(self, step: int, problem: str | None) -> None:
        """Stops a run at a non-finite number, before its state is saved."""
        if problem is None:
            return
        self.pending = None
        last = self.checkpoints.latest()
        self.checkpoints.close()
        self.close()
        where = f"step {last} in {self.checkpoints.folder}" if last else "none yet"
        raise NonFiniteError(
            f"{self.stage.name}: {problem} at step {step}; last good checkpoint: {where}. "
            "Lower the learning rate or max_grad_norm, or look at the data of this step."
        )

    def keep(self, done: int, state: Any) -> None:
        """Saves the state of a run that cannot go on, without an evaluation of it."""
        self.flush()
        self.refuse(done, not_finite(state))
        if done:
            unranked = {} if self.stage.keep_best is None else {self.stage.keep_best.removeprefix("-"): math.nan}
            self.checkpoints.save(done, state, unranked | self.newest)
        self.checkpoints.close()
        self.close()

    def close(self) -> None:
        """Reports the pending step and closes the files."""
        self.flush()
        self.bar.close()
        self.writers.close()


def resumable(error: UserError, saved: int | None) -> UserError:
    """Returns an error that says from where the same command continues."""
    kept = f"step {saved} is saved, the same command continues" if saved else "the same command starts again"
    return type(error)(f"{error}; {kept}")


@jax.jit
def is_finite(array: jax.Array) -> jax.Array:
    """Returns bool[]: True if all numbers of an array are finite."""
    return jnp.isfinite(array).all()


def not_finite(state: Any) -> str | None:
    """Returns a description of the first non-finite array of a state, or None.

    Arrays of one shape, of all stages, share a program: one for a whole state takes seconds to compile in every stage.
    One program at a time: on a CPU that simulates a mesh, several with collectives in flight can each hold threads that
    another needs, until XLA gives up.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(is_finite(leaf)):
            return f"state{jax.tree_util.keystr(path)} is not finite"
    return None


class Preemption:
    """Records SIGTERM, so that the loop can save at the next step boundary: the same one in every process."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Preemption":
        def remember(_signal: int, _frame: FrameType | None) -> None:
            self.asked = True

        self.previous = signal.signal(signal.SIGTERM, remember)
        return self

    def agreed(self) -> Callable[[], bool]:
        """Returns asked(): True if this process, or any other at the time of this call, has been told to stop.

        With several processes, call this before a step is dispatched and `asked` after it: the answer then arrives
        from the devices when the previous step is done, and nobody waits for it.
        """
        if jax.process_count() == 1:
            return lambda: self.asked
        anyone = any_process(self.asked)
        return lambda: bool(anyone)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)
