"""Command line: `python -m safe_rlhf_jax.train --config FILE [dotted.key=value …]` runs a config's stages in order."""

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safe_rlhf_jax.cli import CONFIG_HELP, exit_status, prog
from safe_rlhf_jax.host_memory import is_cpu_alone, keep_freed_memory, return_freed_memory

if TYPE_CHECKING:
    from safe_rlhf_jax import storage
    from safe_rlhf_jax.config import RunConfig


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; needs no JAX, so that `--help` starts no accelerator."""
    parser = argparse.ArgumentParser(
        prog=prog("train"),
        description="Runs the stages of a config in order: SFT, reward model, cost model, PPO-Lagrangian, evaluation. "
        "Finished stages whose config is unchanged are skipped; a stage that was killed continues from its last "
        "checkpoint.",
        epilog="Example: python -m safe_rlhf_jax.train --config configs/quickstart.yaml seed=1 workdir=runs/seed1 "
        "stages.ppo_lag.algorithm.lagrange.lr=0.05",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="overrides; stages by index or name; values are YAML"
    )
    return parser.parse_args(arguments)


@dataclasses.dataclass(frozen=True)
class StageResult:
    """The result of a finished stage.

    Attributes:
        name: Of the stage.
        kind: Of the stage, such as "sft" or "rl".
        folder: Its folder, with all outputs.
        export: The network, for `load_policy` or `load_scorer`; None if the stage makes none.
        metrics: Its final metrics.
        warnings: Known problems of the stage.
    """

    name: str
    kind: str
    folder: "storage.Path"
    export: "storage.Path | None"
    metrics: Mapping[str, float]
    warnings: tuple[str, ...]


def run(config: "RunConfig | storage.Place", overrides: Sequence[str] = ()) -> dict[str, StageResult]:
    """Runs the stages of a config in order; skips those that are finished with an unchanged config.

    With several processes, as set by the environment, each of them calls this, before it uses JAX.

    Args:
        config: A YAML file, the name of a config in the package, or the result of `load_config`.
        overrides: Such as `stages.sft.epochs=1`, for a file or a name.

    Returns:
        The results by the names of the stages; with several processes, only in the first one, which writes them.

    Raises:
        UserError: If the config cannot run, naming the field, the value and the fix; or if data, a model folder or the
            numbers of a stage are wrong; `NotCertifiedError` if a certify stage finds no safe policy.
        SystemExit: After SIGTERM, with status 143, once the state is saved: the same call resumes.
    """
    from safe_rlhf_jax import processes
    from safe_rlhf_jax.config import ConfigError, RunConfig, load_config

    if not isinstance(config, RunConfig):
        said, config = " ".join([str(config), *overrides]), load_config(config, overrides)
    elif overrides:
        raise ConfigError(f"overrides {list(overrides)}: give them to load_config, which made this config")
    else:
        said = "FILE"
    processes.start()
    return run_stages(config, said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a config; returns the exit status.

    0, 1 after an error, 3 where a policy is not certified, 75 while people label, 143 after SIGTERM (after these two,
    start the same command again).
    """
    options = parse_arguments(arguments)

    def work() -> int:
        if is_cpu_alone():
            keep_freed_memory()
        from safe_rlhf_jax.config import load_config

        config = load_config(options.config, options.overrides)
        import jax

        from safe_rlhf_jax import processes

        processes.start()
        if jax.default_backend() == "cpu":  # beside plugins for accelerators; now it keeps less
            keep_freed_memory()
        run_stages(config, " ".join([options.config, *options.overrides]))
        return 0

    try:
        status = exit_status(work)
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        from safe_rlhf_jax import processes

        processes.stop(status)
    return status


def run_stages(config: "RunConfig", said: str) -> dict[str, StageResult]:
    """Runs the stages of a config, named `said` in messages, and returns their results."""
    from safe_rlhf_jax import processes, stages
    from safe_rlhf_jax.compile_cache import kept_programs
    from safe_rlhf_jax.stages.common import Run

    run = Run(config, said)
    stages.check_run(run)
    with processes.claimed(config.workdir), kept_programs(config.workdir):
        if processes.is_main():
            run.digests.save()
        for stage in config.stages:
            stages.run_stage(run, stage)
            return_freed_memory()
    return {stage.name: result_of(run, stage) for stage in config.stages if processes.is_main()}


def result_of(run: Any, stage: Any) -> StageResult:
    """Returns the result of a finished stage."""
    from safe_rlhf_jax import storage

    folder, result = run.folder(stage.name), run.result(stage.name)
    export = folder / "export"
    metrics, warnings = result["metrics"], tuple(result.get("warnings", ()))
    return StageResult(stage.name, stage.kind, folder, export if storage.is_folder(export) else None, metrics, warnings)


if __name__ == "__main__":
    sys.exit(main())
