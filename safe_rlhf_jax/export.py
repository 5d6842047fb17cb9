"""Command line: `python -m safe_rlhf_jax.export --config FILE STAGE --out FOLDER` writes a model from a checkpoint.

Checkpoints are only read, so the run may be going on.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safe_rlhf_jax.cli import CONFIG_HELP, exit_status, prog

if TYPE_CHECKING:
    from safe_rlhf_jax import storage
    from safe_rlhf_jax.config import RunConfig, TrainingStage
    from safe_rlhf_jax.stages.common import Run
    from safe_rlhf_jax.stages.trained import Trained

LOGGER = logging.getLogger("safe_rlhf_jax.export")  # also if it is run as `__main__`


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; needs no JAX, so that `--help` starts no accelerator."""
    parser = argparse.ArgumentParser(
        prog=prog("export"),
        description="Writes a Hugging Face folder from a checkpoint of a stage, finished or not. The run may be going "
        "on: nothing of it is changed. Where it holds the accelerator of this machine, set JAX_PLATFORMS=cpu.",
        epilog="Example: python -m safe_rlhf_jax.export --config configs/quickstart.yaml ppo_lag --step 100 "
        "--out ppo_lag_100",
    )
    parser.add_argument("stage", metavar="STAGE", help="name of the stage")
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest readable)")
    parser.add_argument(
        "--network", metavar="NAME", help="network of an rl stage: policy (default), reward_critic, cost_critic, …"
    )
    parser.add_argument(
        "--form",
        choices=("merged", "peft"),
        default="merged",
        help="of a network with adapters: merged into its base (default), or a PEFT folder of the adapter",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="overrides; stages by index or name; values are YAML"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a model from a checkpoint; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: export(options))


def export(options: argparse.Namespace) -> int:
    """Writes a model from a checkpoint; returns the exit status.

    Raises:
        UserError: Names the option or the folder, and the fix.
    """
    import jax

    from safe_rlhf_jax import storage
    from safe_rlhf_jax.config import Mesh, load_config
    from safe_rlhf_jax.errors import ConfigError
    from safe_rlhf_jax.sharding import make_mesh
    from safe_rlhf_jax.stages.bases import bases_now, check_bases
    from safe_rlhf_jax.stages.common import Run, save_adapter, save_merged
    from safe_rlhf_jax.stages.kinds import networks_of

    config = load_config(options.config, options.overrides)
    stage, out = stage_of(config, options.stage), storage.path(storage.expanded(options.out))
    check_out(out, [storage.path(config.workdir) / other.name for other in config.stages])
    if options.form == "peft" and stage.lora is None:
        raise ConfigError(f"--form peft: stage {stage.name!r} has no lora; it trains the whole network, leave it out")
    folder = storage.path(config.workdir) / stage.name
    checkpoints, steps = checkpoints_of(folder)
    if options.step is not None and options.step not in steps:
        raise ConfigError(f"--step {options.step}: not in {checkpoints}; there are {', '.join(map(str, steps))}")
    check_settings(config, stage, folder / "config.yaml")
    run = Run(config.model_copy(update={"mesh": Mesh()}), options.config)
    networks = networks_of(run, stage)
    name = options.network or next(iter(networks))
    if name not in networks:
        raise ConfigError(f"--network {name}: stage {stage.name!r} trains {', '.join(networks)}")
    bases = bases_now(run, stage)
    if bases:
        check_bases(stage.name, folder, {name: bases[name]})
    # Whatever the run's mesh is: every device that is here holds a share of each parameter.
    shards = math.gcd(run.networks.config(networks[name].start).hidden_size, len(jax.devices()))
    run.mesh = make_mesh((-1, shards, 1))
    with jax.set_mesh(run.mesh):
        wanted = steps[::-1] if options.step is None else [options.step]
        module, variables, step = restored(run, stage, networks[name], checkpoints, wanted)
        if options.form == "peft":
            save_adapter(run, networks[name].start, out, module, variables)
        else:
            save_merged(run, out, module, variables, networks[name].layout)
    LOGGER.info(f"{stage.name}: the {name} of step {step} in {checkpoints} is written to {out}")
    return 0


def stage_of(config: "RunConfig", name: str) -> "TrainingStage":
    """Returns the training stage of a name.

    Raises:
        ConfigError: If there is none.
    """
    from safe_rlhf_jax.config import ConfigError, TrainingStage
    from safe_rlhf_jax.config.messages import did_you_mean

    stages = {stage.name: stage for stage in config.stages}
    if name not in stages:
        raise ConfigError(
            f"stage {name!r}: not in this config; there are {', '.join(stages)}{did_you_mean(name, stages)}"
        )
    stage = stages[name]
    if not isinstance(stage, TrainingStage):
        there = ", ".join(name for name, stage in stages.items() if isinstance(stage, TrainingStage))
        raise ConfigError(f"stage {name!r}: kind {stage.kind} trains nothing, so it has no checkpoints; {there} do")
    return stage


def check_out(out: "storage.Path", stages: Sequence["storage.Path"]) -> None:
    """Checks that a folder is free to be written.

    Args:
        out: The folder.
        stages: Folders of the run's stages, which belong to the run.

    Raises:
        ConfigError: If it holds anything, is a file, or is inside a stage's folder.
    """
    from safe_rlhf_jax import storage
    from safe_rlhf_jax.errors import ConfigError

    where = storage.absolute(out)
    for folder in map(storage.absolute, stages):
        if folder in (where, *where.parents):
            raise ConfigError(f"--out {out}: is inside {folder}, the folder of a stage; name one outside of it")
    if storage.is_file(out):
        raise ConfigError(f"--out {out}: is a file; name a new or empty folder")
    if storage.is_folder(out) and (found := [path.name for path in storage.matching(out, "*")]):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(f"--out {out}: holds {', '.join(found[:3])}{more}; name a new or empty folder")


def checkpoints_of(folder: "storage.Path") -> tuple["storage.Path", list[int]]:
    """Returns the folder of a stage's checkpoints, and their steps.

    Raises:
        ConfigError: If there are none yet.
    """
    from safe_rlhf_jax.checkpoint import complete_steps
    from safe_rlhf_jax.errors import ConfigError

    if steps := complete_steps(folder / "checkpoints"):
        return folder / "checkpoints", steps
    raise ConfigError(
        f"stage {folder.name!r}: no checkpoint in {folder} yet; the first is written after checkpoint_every steps"
    )


def check_settings(config: "RunConfig", stage: "TrainingStage", file: "storage.Path") -> None:
    """Checks that a config describes the networks in a stage's checkpoints: its settings are those of the run.

    Models may be elsewhere than they were; of those, bases are compared by contents.

    Raises:
        ConfigError: Names the setting.
    """
    from flax.traverse_util import flatten_dict

    from safe_rlhf_jax.config import load_config
    from safe_rlhf_jax.errors import ConfigError
    from safe_rlhf_jax.stages.hashing import hashed

    def settings(config: "RunConfig") -> dict[str, Any]:
        (one,) = (other for other in config.stages if other.name == stage.name)
        return flatten_dict({"execution": hashed(config.execution), f"stages.{stage.name}": hashed(one)}, sep=".")  # type: ignore[no-any-return]

    models = {f"stages.{stage.name}.{field}" for field in stage.models()}
    then, now = settings(load_config(file)), settings(config)
    for name in sorted({*then, *now} - models):
        if then.get(name) != now.get(name):
            raise ConfigError(
                f"{name} {now.get(name)!r}: the stage was run with {then.get(name)!r}; give the overrides of the run, "
                f"or --config {file}"
            )


def restored(
    run: "Run", stage: "TrainingStage", network: "Trained", checkpoints: "storage.Path", steps: Sequence[int]
) -> tuple[Any, dict[str, Any], int]:
    """Returns a network with its variables in the first readable checkpoint of `steps`, and the step.

    Raises:
        FileError: If none can be read.
    """
    import jax

    from safe_rlhf_jax.checkpoint import read_part
    from safe_rlhf_jax.errors import FileError
    from safe_rlhf_jax.models.adapters import trained, whole

    module, variables = network.at_start(run, stage)
    base = variables["params"].get("base")
    start = variables | {"params": trained(variables["params"])}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), start)
    jax.tree.map(lambda x: x.delete(), start)  # makes room
    problems: list[str] = []
    for step in steps:
        try:
            found = read_part(checkpoints, step, network.place, like)
        except FileError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            LOGGER.warning(f"{checkpoints}: {problem}; step {step} is taken")
        return module, found | {"params": whole(found["params"], base)}, step
    raise FileError(f"{checkpoints}: no checkpoint can be read: {'; '.join(problems)}")


if __name__ == "__main__":
    sys.exit(main())
