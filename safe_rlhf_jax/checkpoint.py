"""Step 10 of the line: the whole state of a stage, saved and restored by Orbax."""

import contextlib
import functools
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from safe_rlhf_jax import processes, storage
from safe_rlhf_jax.errors import ConfigError, FileError

LOGGER = logging.getLogger(__name__)


def complete_steps(folder: storage.Place) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, sorted; looks only, so a run may be writing there."""
    where = storage.absolute(folder)
    return sorted(ocp.utils.checkpoint_steps(where)) if storage.is_folder(where) else []


def read_part(folder: storage.Place, step: int, place: Sequence[str], like: dict[str, Any]) -> dict[str, Any]:
    """Returns a part of the state in a checkpoint; nothing else of it is read, and nothing is changed.

    Args:
        folder: Of the checkpoints.
        step: Of the checkpoint.
        place: Keys that lead from the state to the part's parent.
        like: {key of the parent: shapes, dtypes and shardings}.

    Raises:
        FileError: If the checkpoint cannot be read, or holds other arrays.
    """
    hush_writers()
    where = storage.absolute(folder) / str(step) / "default"
    try:
        handler = ocp.PyTreeCheckpointHandler()
        parent: Any = functools.reduce(lambda tree, key: tree[key], place, handler.metadata(where).tree)
        stored = {key: jax.tree.map(shape_of, parent[key]) for key in like}
        if stored != (asked := jax.tree.map(shape_of, like)):
            raise ValueError(first_difference(stored, asked))
        item = functools.reduce(lambda tree, key: {key: tree}, reversed(place), like)
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        found: dict[str, Any] = functools.reduce(lambda tree, key: tree[key], place, handler.restore(where, args=args))
    except Exception as error:  # whatever a broken file makes Orbax raise
        raise FileError(f"step {step}: {type(error).__name__}: {error}".splitlines()[0][:300]) from error
    return found


def shape_of(array: Any) -> str:
    """Returns shape and dtype of an array, or of its description."""
    return f"{array.dtype}{list(array.shape)}"


def first_difference(stored: Any, asked: Any) -> str:
    """Describes the first array in which two trees of `shape_of` differ."""
    trees = [{jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(t)} for t in (stored, asked)]
    path = min(path for path in {*trees[0], *trees[1]} if trees[0].get(path) != trees[1].get(path))
    has, asks = (tree.get(path, "no such array") for tree in trees)
    return f"state{path} is {has}; the network of this config has {asks}"


@functools.cache
def hush_writers() -> None:
    """Keeps threads from printing a traceback for every array that they could not write, or read.

    `Checkpoints.write_errors` reports it once, with the fix; hundreds of lines at the end of a log would hide it.
    """
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    logging.getLogger("asyncio").addFilter(lambda record: not re.search("tensorstore|OCDBT", record.getMessage()))
    show = sys.unraisablehook

    def unraisablehook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # seen by TensorStore's threads after a failure
            show(unraisable)

    sys.unraisablehook = unraisablehook


class Checkpoints:
    """The checkpoints of one stage; each is written beside the others and becomes visible when it is complete.

    Args:
        folder: Their folder, visible to every process.
        keep: Number of newest checkpoints to keep.
        best: Metric whose best checkpoint is kept as well: highest value, or lowest with a leading "-".
    """

    def __init__(self, folder: storage.Place, *, keep: int = 2, best: str | None = None):
        self.folder = storage.absolute(folder)
        self.best = best
        hush_writers()
        if best is not None:  # the manager would fail at the first metrics that it cannot read
            self.set_aside(self.broken_metrics())
        rank = (lambda metrics: metrics["rank"]) if best else None
        policies = [LatestN(keep), *([BestN(get_metric_fn=rank, n=1)] if rank else [])]
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=rank,  # without it, Orbax does not store metrics
                cleanup_tmp_directories=True,
            ),
        )

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        step: int | None = self.manager.latest_step()
        return step

    def save(self, step: int, state: Any, metrics: Mapping[str, float]) -> None:
        """Copies the state off the devices and writes it in the background.

        A metric that is not finite, or missing, ranks behind all others: no state is lost for lack of a number.

        Raises:
            FileError: If the previous checkpoint, or the start of this one, could not be written.
            ConfigError: If there is no such metric; the checkpoint is written.
        """
        if step in self.manager.all_steps():
            return
        rank, name = None, (self.best or "").removeprefix("-")
        if self.best is not None:
            value = metrics.get(name, math.nan) * (-1 if self.best.startswith("-") else 1)
            rank = {"rank": value if math.isfinite(value) else -sys.float_info.max}
        with self.write_errors():
            self.manager.save(step, metrics=rank, args=ocp.args.StandardSave(state))
        if rank is not None and name not in metrics:
            self.close()
            raise ConfigError(
                f"keep_best: {name!r} is not among the metrics of this stage: {', '.join(metrics)}; step {step} is "
                "saved all the same"
            )

    def restore(self, like: Any) -> tuple[Any, int]:
        """Returns the state of the newest readable checkpoint, in the shardings of `like`, and its step.

        Newer, unreadable ones are moved to `checkpoints.unreadable/`. Without any checkpoint: `like` and 0.

        Raises:
            FileError: If there are checkpoints, but none is readable; they stay where they are.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        found = sorted(self.manager.all_steps(), reverse=True)
        if found:
            jax.tree.map(lambda x: x.delete(), like)  # a step would donate it; here it makes room
        problems: dict[int, str] = {}
        for step in found:
            problem = None
            try:
                # The handler alone: the manager would wait for a process that has met a broken file.
                path = self.manager.directory / str(step) / "default"
                state = ocp.StandardCheckpointHandler().restore(path, args=ocp.args.StandardRestore(abstract))
            except Exception as error:  # whatever a broken file makes Orbax raise
                problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if not processes.any_process(problem is not None):
                self.set_aside(problems)
                self.manager.reload()
                return state, step
            problems[step] = problem or "another process could not read it"
        if found:
            reasons = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise FileError(f"{self.folder}: none of the checkpoints {found} can be read: {reasons}")
        return like, 0

    def broken_metrics(self) -> dict[int, str]:
        """Returns {step: error} of the checkpoints whose metrics cannot be read.

        Raises:
            FileError: If none can be read; they stay where they are.
        """
        steps = sorted(ocp.utils.checkpoint_steps(self.folder)) if storage.is_folder(self.folder) else []
        problems: dict[int, str] = {}
        for step in steps:
            file = self.folder / str(step) / "metrics" / "metrics"
            try:
                if storage.is_file(file):
                    float(json.loads(storage.read_text(file))["rank"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems[step] = f"{file}: {type(error).__name__}: {error}"
        processes.barrier("metrics of the checkpoints are read")
        if steps and len(problems) == len(steps):
            reasons = "; ".join(problems.values())
            raise FileError(f"{self.folder}: none of the checkpoints {steps[::-1]} can be read: {reasons}")
        return problems

    def set_aside(self, problems: Mapping[int, str]) -> None:
        """Moves checkpoints {step: error} out of the way, and reports it."""
        aside = self.folder.with_name(f"{self.folder.name}.unreadable")
        for step, problem in problems.items():
            LOGGER.warning(f"checkpoint of step {step} cannot be read ({problem}); it is kept in {aside}")
            if processes.is_main():
                storage.make_folder(aside)
                storage.remove(aside / str(step))
                storage.move(self.folder / str(step), aside / str(step))
        processes.barrier("unreadable checkpoints are set aside")

    def close(self) -> None:
        """Waits for the checkpoint that is being written.

        Raises:
            FileError: If it could not be written.
        """
        with self.write_errors():
            self.manager.wait_until_finished()
            self.manager.close()

    @contextlib.contextmanager
    def write_errors(self) -> Iterator[None]:
        """Turns any error of Orbax in writing into one clear error."""
        try:
            yield
        except Exception as error:
            reason = str(error).strip().splitlines()
            kept = max((step for step in ocp.utils.checkpoint_steps(self.folder)), default=None)
            last = f"step {kept}" if kept else "none yet"
            raise FileError(
                f"{self.folder}: a checkpoint could not be written: {reason[0][:300] if reason else error!r}. "
                f"Last good checkpoint: {last}. Make room if the disk is full, then run the same command again."
            ) from error
