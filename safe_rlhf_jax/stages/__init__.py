"""Stages: build what the loop runs from a config. The only part that knows both config and code.

`KINDS` (kinds.py) has a record for each kind of stage; each stage leaves `result.json` in its folder, and those that
make a model leave `export/`.
"""

import itertools
import json
import logging
import time

import jax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.performance import began
from safe_rlhf_jax.processes import any_process, barrier, is_main
from safe_rlhf_jax.stages.bases import BASES, Bases, bases_now, check_bases
from safe_rlhf_jax.stages.check import check_data, check_run
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.health import warn_of_scorers
from safe_rlhf_jax.stages.kinds import KINDS, idle_settings, kind_of

LOGGER = logging.getLogger(__name__)

__all__ = ["KINDS", "Run", "check_run", "run_stage"]


def run_stage(run: Run, stage: cfg.StageBase) -> None:
    """Runs one stage, or skips it if it is finished with an unchanged config.

    A folder of the stage with another config is moved aside, never overwritten.
    """
    # The process that writes decides from the folder; the others wait for its answer.
    if any_process(is_main() and run.result(stage.name) is not None):
        LOGGER.info(f"{stage.name}: finished, config unchanged; skipped")
        check_result(run, stage)
        return
    if stage.name in run.unchecked:
        check_data(run, stage)
    folder, bases = run.folder(stage.name), bases_now(run, stage)
    if is_main():
        prepare(run, stage, folder, bases)
    barrier(f"{stage.name} begins")
    warn_of_scorers(run, stage)
    started = time.monotonic()
    with jax.set_mesh(run.mesh):
        result = kind_of(stage).run(run, stage, folder)
    seconds = time.monotonic() - started
    result |= {"config_hash": run.hashes[stage.name], "kind": stage.kind, "seconds": seconds}
    result |= {"warnings": run.warnings.get(stage.name, [])}
    if is_main():
        storage.write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    shown = result["metrics"] if kind_of(stage).shows_metrics else {}
    LOGGER.info(f"{stage.name}: done in {seconds:.0f} s" + "".join(f"; {k} {v:.4g}" for k, v in shown.items()))
    check_result(run, stage)


def check_result(run: Run, stage: cfg.StageBase) -> None:
    """Ends the run, in all processes, if the result of a finished stage says so.

    Raises:
        UserError: Its kind's `refusal`.
    """
    refusal = kind_of(stage).refusal(stage, run.result(stage.name) or {}) if is_main() else None
    if any_process(refusal is not None):
        raise refusal or UserError(f"{stage.name}: its result ends the run; the first process says why")


def prepare(run: Run, stage: cfg.StageBase, folder: storage.Path, bases: Bases) -> None:
    """Creates the folder of a stage with its config, hash and bases; moves a folder with another config aside.

    Raises:
        ConfigError: If the folder is of this config, but its adapters belong to other bases. The hash covers what a
            base is made from, and not an export that was written anew, nor the base of a PEFT folder.
    """
    mark = folder / "config_hash"
    if storage.is_file(mark) and (earlier := storage.read_text(mark)) != run.hashes[stage.name]:
        aside = unused(folder.with_name(f"{folder.name}.{earlier}"))
        storage.move(folder, aside)
        LOGGER.info(f"{stage.name}: the config has changed; the earlier result is kept in {aside}")
    if bases and storage.is_file(folder / BASES):
        check_bases(stage.name, folder, bases)
    elif bases:
        storage.write(folder / BASES, json.dumps(bases, indent=2) + "\n")
    began(folder, time.time())
    storage.write(mark, run.hashes[stage.name])
    storage.write(folder / "config.yaml", cfg.dump(run.config, stage, idle_settings))


def unused(path: storage.Path) -> storage.Path:
    """Returns the path if it is unused, else the first unused one of path.2, path.3, …."""
    candidates = itertools.chain([path], (path.with_name(f"{path.name}.{i}") for i in itertools.count(2)))
    return next(candidate for candidate in candidates if not storage.exists(candidate))
