"""Command line: `python -m safe_rlhf_jax.train --config FILE [dotted.key=value …]` runs a config's stages in order."""

import argparse
import ctypes
import os
import sys
import traceback
from collections.abc import Sequence


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; needs no JAX, so that `--help` starts no accelerator."""
    parser = argparse.ArgumentParser(
        prog="python -m safe_rlhf_jax.train",
        description="Runs the stages of a config in order: SFT, reward model, cost model, PPO-Lagrangian, evaluation. "
        "Finished stages whose config is unchanged are skipped; a stage that was killed continues from its last "
        "checkpoint.",
        epilog="Example: python -m safe_rlhf_jax.train --config configs/quickstart.yaml seed=1 workdir=runs/seed1 "
        "stages.ppo_lag.algorithm.lagrange.lr=0.05",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML config, such as configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="overrides; stages by index or name; values are YAML"
    )
    return parser.parse_args(arguments)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, in one arena, instead of giving it back.

    On CPU every step allocates the same large buffers; with fresh pages each time, a third of a step's time goes to
    page faults (measured, see benchmarks/README.md). Numbers from malloc.h.
    """
    options = {
        "M_MMAP_MAX": (-4, 0),
        "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
        "M_TOP_PAD": (-2, 2**28),
        "M_ARENA_MAX": (-8, 1),
    }
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in options.values():
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        pass  # not glibc: nothing to tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a config; returns the exit status: 0, 1 after an error, 143 after SIGTERM (start the same command again)."""
    options = parse_arguments(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it only reads text here and needs no PyTorch
    try:
        run_config(options.config, options.overrides)
    except Exception as error:
        from safe_rlhf_jax import processes

        if isinstance(error, ValueError | OSError | FloatingPointError):  # they say what is wrong and what to do
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        return processes.stop(1)
    return 0


def run_config(path: str, overrides: Sequence[str]) -> None:
    """Runs the stages of a config in order, together with the other processes of the run where there are any."""
    from safe_rlhf_jax.config import load_config

    config = load_config(path, overrides)
    import jax

    from safe_rlhf_jax import processes

    processes.start()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    from safe_rlhf_jax import stages
    from safe_rlhf_jax.stages.common import Run

    run = Run(config, " ".join([path, *overrides]))
    stages.check_run(run)
    with processes.claimed(config.workdir):
        if processes.is_main():
            run.digests.save()
        for stage in config.stages:
            stages.run_stage(run, stage)


if __name__ == "__main__":
    sys.exit(main())
