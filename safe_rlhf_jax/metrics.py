"""Outputs of metrics on the host: files, a progress bar, and throughput.

The last step of the line. Nothing here touches a device; metrics arrive as plain numbers. Only the first process of a
multi-host run should hold writers.
"""

import contextlib
import json
import math
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, TextIO, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from safe_rlhf_jax import log, storage

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# Metrics of the progress bar, where present.
KEY_METRICS = ("train/loss", "train/accuracy", "train/reward", "train/cost", "train/multiplier", "train/kl")


@runtime_checkable
class Writer(Protocol):
    """Any receiver of the metrics of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step."""

    def close(self) -> None:
        """Flushes pending output."""


class JsonlWriter:
    """One JSON object per line, `{"step": 3, "train/reward": 0.5, …}`, on disk as soon as it is written.

    JSON has no NaN and no infinity: they become the strings "NaN", "Infinity" and "-Infinity", which `read_jsonl` turns
    back.

    Args:
        path: the file; appended to where it exists, less a last line that an interrupted run left unfinished.
        resume_step: the step the run continues from; lines of later steps are dropped, so that no step occurs twice.
    """

    def __init__(self, path: storage.Place, *, resume_step: int | None = None) -> None:
        self._path = storage.path(path)
        storage.make_folder(self._path.parent)
        with contextlib.suppress(FileNotFoundError):
            lines = storage.read_lines(self._path)
            kept = [line for line in lines if resume_step is None or json.loads(line)["step"] <= resume_step]
            storage.write_lines(self._path, kept)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line."""
        record: dict[str, Any] = {"step": int(step)}
        record |= {name: _jsonable(float(value)) for name, value in metrics.items()}
        storage.append_lines(self._path, [json.dumps(record, allow_nan=False)])

    def close(self) -> None:
        """Does nothing: each line is written at once."""


def read_jsonl(path: storage.Place) -> list[dict[str, Any]]:
    """Returns the records of a file of `JsonlWriter`, in the order of their lines."""
    return [{k: _number(v) for k, v in json.loads(line).items()} for line in storage.read_lines(path) if line]


def write_jsonl(path: storage.Place, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as a whole file, a line each."""
    storage.write(path, "".join(f"{json.dumps(record)}\n" for record in records))


def _jsonable(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


class TensorBoardWriter:
    """Scalars as TensorBoard event files.

    Args:
        folder: the log directory.
        resume_step: the step the run continues from; TensorBoard hides earlier events of later steps.
    """

    def __init__(self, folder: storage.Place, *, resume_step: int | None = None) -> None:
        from tensorboardX import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class WandbWriter:
    """Metrics to Weights & Biases (extra `wandb`).

    Args:
        folder: the run's folder; its name is the run's name, and it keeps the run's id, so that a resumed run goes on.
        project: the project, by default the one in `WANDB_PROJECT`.
        resume_step: accepted for `make_writers`; W&B itself ignores steps it has already seen.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: storage.Place, *, project: str | None = None, resume_step: int | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            message = "The writer 'wandb' needs the package wandb: pip install 'safe_rlhf_jax[wandb]'"
            raise ImportError(message) from error

        del resume_step
        folder = storage.path(folder)
        id_file = folder / "wandb_id"
        if not storage.is_file(id_file):
            storage.write(id_file, uuid.uuid4().hex)
        run_id = storage.read_text(id_file).strip()
        self._run = wandb.init(project=project, name=folder.name, id=run_id, dir=str(folder), resume="allow")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Passes the metrics to each writer."""
        for writer in self._writers:
            writer.write(step, metrics)

    def close(self) -> None:
        """Closes each writer."""
        for writer in self._writers:
            writer.close()


WRITERS: dict[str, Callable[[storage.Path, int | None], Writer]] = {
    "jsonl": lambda folder, resume_step: JsonlWriter(folder / "metrics.jsonl", resume_step=resume_step),
    "tensorboard": lambda folder, resume_step: TensorBoardWriter(folder / "tensorboard", resume_step=resume_step),
    "wandb": lambda folder, resume_step: WandbWriter(folder, resume_step=resume_step),
}


def make_writers(
    folder: storage.Place, *, resume_step: int | None, names: Sequence[str] = ("jsonl", "tensorboard")
) -> Writers:
    """The named writers, as one.

    Args:
        folder: the stage's folder, for `metrics.jsonl` and `tensorboard/`.
        resume_step: the step the run continues from, None for a run that starts.
        names: keys of `WRITERS`.

    Returns:
        A writer that passes the metrics to all of them.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = [name for name in names if name not in WRITERS]
    if unknown:
        raise ValueError(f"Unknown metric writers {unknown}; there are {sorted(WRITERS)}")
    return Writers([WRITERS[name](storage.path(folder), resume_step) for name in names])


class ProgressBar:
    """Progress of a run: bar, M of N, time left, steps per second and a few key metrics, on one line.

    If the stream is not a terminal, it prints a plain line about every ten seconds, and one at the end. Only the first
    process shows it.

    Args:
        description: usually the stage's name.
        total: number of steps of the run.
        start: steps done by the run that this one resumes.
        keys: metrics to show, where present.
        stream: the output; standard output by default.
        interval: seconds between two plain lines.
        clock: seconds, from anywhere.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        start: int = 0,
        keys: Sequence[str] = KEY_METRICS,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description, self._total, self._keys = description, total, tuple(keys)
        self._stream = sys.stdout if stream is None else stream
        self._interval, self._clock = interval, clock
        self._step = start
        self._shown: dict[str, float] = {}
        self._first: tuple[int, float] | None = None  # step and time of the first write, after compilation
        self._printed_at = -math.inf
        self._printed_step: int | None = None
        self._bar = self._live_bar() if self._stream.isatty() and log.speaks() else None

    def _live_bar(self) -> Progress:
        status = TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
        console = Console(file=self._stream)
        columns = (name, BarColumn(16), MofNCompleteColumn(), status)
        bar = Progress(*columns, console=console, expand=True, refresh_per_second=4)
        self._task = bar.add_task(self._description, total=self._total, completed=self._step, status="")
        bar.start()
        return bar

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves to `step` and shows the key metrics among `metrics`."""
        if not log.speaks():
            return
        now = self._clock()
        self._first = self._first or (step, now)
        self._step = step
        self._shown |= {key: float(metrics[key]) for key in self._keys if key in metrics}
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=self._status(now))
        elif now - self._printed_at >= self._interval:
            self._print(now)

    def close(self) -> None:
        """Shows the final step."""
        if self._bar is not None:
            self._bar.stop()
        elif self._first is not None and self._printed_step != self._step:
            self._print(self._clock())

    def _print(self, now: float) -> None:
        self._printed_at, self._printed_step = now, self._step
        parts = [f"{self._description} {self._step}/{self._total}", self._status(now)]
        print(" · ".join(part for part in parts if part), file=self._stream, flush=True)

    def _status(self, now: float) -> str:
        first_step, first_time = self._first or (self._step, now)
        parts = []
        if self._step > first_step and now > first_time:
            rate = (self._step - first_step) / (now - first_time)
            left = timedelta(seconds=round(max(self._total - self._step, 0) / rate))
            parts += [f"{left} left", f"{rate:.3g} steps/s"]
        parts += [f"{key.rpartition('/')[2]} {value:.3g}" for key, value in self._shown.items()]
        return " · ".join(parts)


class Throughput:
    """Tokens per second and seconds per step over the newest steps. The first step, which compiles, does not count.

    Args:
        window: number of steps to average over.
        clock: seconds, from anywhere.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)  # seconds, tokens
        self._clock = clock
        self._last: float | None = None
        self.total = 0.0  # seconds of all steps that counted

    def update(self, tokens: float) -> dict[str, float]:
        """Counts a finished step.

        Args:
            tokens: tokens the step processed.

        Returns:
            `perf/tokens_per_second` and `perf/seconds_per_step`; nothing after the first step.
        """
        now = self._clock()
        if self._last is not None:
            self._steps.append((now - self._last, float(tokens)))
            self.total += now - self._last
        self._last = now
        seconds = sum(step[0] for step in self._steps)
        if seconds <= 0:
            return {}
        return {
            "perf/tokens_per_second": sum(step[1] for step in self._steps) / seconds,
            "perf/seconds_per_step": seconds / len(self._steps),
        }

    def skip(self) -> None:
        """Excludes the time since the last step (an evaluation, a checkpoint)."""
        if self._last is not None:
            self._last = self._clock()
