"""Command line: `safe-rlhf-jax train|data|chat|serve|export|compile`, and shared parts of the command lines."""

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from safe_rlhf_jax import log
from safe_rlhf_jax.errors import UserError

SCRIPT = "safe-rlhf-jax"
# Command: the module with its `main`, and a description.
COMMANDS = {
    "train": ("train", "run the stages of a config in order"),
    "data": ("inspect_data", "show what the stages of a config, or one stage, would read"),
    "chat": ("chat", "talk to one policy, or to two side by side"),
    "serve": ("serve", "answer requests over HTTP, as OpenAI's chat completions"),
    "export": ("export", "write a model folder from any checkpoint of a stage"),
    "compile": ("compile", "say what a run needs on devices that need not be here"),
}
CONFIG_HELP = "a YAML file, or the name of a config that comes with the package, such as quickstart"
# Silences libraries: no PyTorch is needed, tokenizers work in one process.
LIBRARIES = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    from safe_rlhf_jax import __version__

    parser = argparse.ArgumentParser(
        prog=SCRIPT,
        description="Safe RLHF on JAX: maximise reward subject to a constraint on expected cost.",
        epilog="Commands:\n"
        + "".join(f"  {command:<9} {does}\n" for command, (_, does) in COMMANDS.items())
        + f"\n'{SCRIPT} COMMAND --help' lists the options of one.\nExample: {SCRIPT} train --config quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{SCRIPT} {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=f"one of {', '.join(COMMANDS)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="arguments of the command")
    options = parser.parse_args(arguments)
    module, _ = COMMANDS[options.command]
    status: int = importlib.import_module(f"safe_rlhf_jax.{module}").main(options.arguments)
    return status


def prog(command: str) -> str:
    """Returns the name under which a command was called, for its usage."""
    called = os.path.basename(sys.argv[0]) == SCRIPT
    return f"{SCRIPT} {command}" if called else f"python -m safe_rlhf_jax.{command}"


def exit_status(work: Callable[[], int]) -> int:
    """Returns the exit status of a command: its own, or that of an error its user can act on, printed in one line.

    Any other error leaves its traceback.
    """
    log.show()
    collect_garbage_rarely()
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)
    try:
        return work()
    except (UserError, OSError) as error:
        if not is_told(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.status if isinstance(error, UserError) else 1


def collect_garbage_rarely() -> None:
    """Raises the thresholds of the collector: what JAX traces stays, and walks through it were a tenth of a start."""
    gc.set_threshold(20_000, 50, 10)


def is_told(error: BaseException) -> bool:
    """Says whether an error's message is enough for a user, without a traceback.

    True for an intended error, and for a system error that names a file, or has a message without a number.
    """
    if isinstance(error, OSError):
        return error.filename is not None or error.errno is None
    return isinstance(error, UserError)


if __name__ == "__main__":
    sys.exit(main())
