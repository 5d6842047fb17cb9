"""Command line: `python -m safe_rlhf_jax.serve POLICY` answers requests over HTTP, as OpenAI's chat completions."""

import argparse
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from safe_rlhf_jax.cli import exit_status, prog
from safe_rlhf_jax.errors import ConfigError

LOGGER = logging.getLogger("safe_rlhf_jax.serve")  # also if it is run as `__main__`


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; needs no JAX, so that `--help` starts no accelerator."""
    parser = argparse.ArgumentParser(
        prog=prog("serve"),
        description="Answers requests over HTTP as OpenAI's chat completions: batched on the device, streamed if asked "
        "for, with the scores of reward and cost models beside the answers. SIGTERM or Ctrl-C answers what is waiting, "
        "then ends.",
        epilog="Examples: python -m safe_rlhf_jax.serve --config configs/quickstart.yaml ppo_lag --scorer cost=cost\n"
        "          python -m safe_rlhf_jax.serve path/to/policy --port 8001 --key-env SERVE_KEY",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", metavar="POLICY", help="a stage of --config, a folder, or a hub id; clients ask for "
                        "the model of this name")  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="config of a finished run: its stages may be named, its "
                        "template is used")  # fmt: skip
    parser.add_argument("--scorer", metavar="SIGNAL=MODEL", action="append", default=[], type=scorer_option,
                        help="reward=MODEL or cost=MODEL, named as the policy is: scores every answer")  # fmt: skip
    parser.add_argument(
        "--template",
        help="plain, beaver, alpaca, tokenizer or a .jinja file (default: that of --config, else the tokenizer's own, "
        "else plain)",
    )
    parser.add_argument("--dtype", default="float32", help="of the networks (default %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    parser.add_argument("--key-env", metavar="NAME", help="environment variable with the key that requests must carry")
    parser.add_argument("--without-key", action="store_true", help="allow an address that others can reach, and no key")
    parser.add_argument("--max-prompt", type=positive, metavar="TOKENS", help="of a request (default: 1024, or what "
                        "the model's positions leave)")  # fmt: skip
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="TOKENS", help="of a response (default "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=16, help="answers at once (default %(default)s)")
    parser.add_argument("--queue", type=positive, default=64, help="requests that wait; further ones are told to come "
                        "again (default %(default)s)")  # fmt: skip
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """Parses a number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return int(text)


def scorer_option(text: str) -> tuple[str, str]:
    """Parses `SIGNAL=MODEL`."""
    signal_name, _, model = text.partition("=")
    if signal_name not in ("reward", "cost") or not model:
        raise argparse.ArgumentTypeError(f"{text}: write reward=MODEL or cost=MODEL")
    return signal_name, model


def key_of(options: argparse.Namespace) -> str | None:
    """Returns the key that requests must carry.

    Raises:
        ConfigError: If it is not in the environment, or others could reach the server without one.
    """
    if options.key_env is not None:
        if not os.environ.get(options.key_env):
            raise ConfigError(f"--key-env {options.key_env}: no such environment variable, or it is empty")
        return os.environ[options.key_env]
    if not is_loopback(options.host) and not options.without_key:
        raise ConfigError(
            f"--host {options.host}: others can reach it; name a variable with a key by --key-env, or allow it by "
            "--without-key"
        )
    return None


def is_loopback(host: str) -> bool:
    """Says whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket at an address that does not listen yet.

    Raises:
        ConfigError: If the address cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(f"--host {host} --port {port}: {error}; choose another (0 takes a free port)") from error
    return bound


def load_engine(options: argparse.Namespace) -> Any:
    """Opens the networks of a command line; returns the engine over them, not started."""
    from safe_rlhf_jax.named_models import NamedModels
    from safe_rlhf_jax.serving.engine import Engine, fitting_limits

    models = NamedModels(options.config, options.template, options.dtype)
    policy = models.policy(options.policy)
    scorers = {name: models.scorer(model, name) for name, model in options.scorer}
    limits = fitting_limits(policy, scorers, options.max_prompt, options.max_tokens, options.batch, options.queue)
    return Engine(policy, scorers, limits)


def serve(options: argparse.Namespace) -> int:
    """Serves until a signal; returns the exit status.

    Raises:
        ConfigError: If the options do not fit together.
    """
    key = key_of(options)
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        raise ConfigError("serve needs starlette and uvicorn: pip install 'safe_rlhf_jax[serve]'")
    bound = bound_socket(options.host, options.port)

    import uvicorn

    from safe_rlhf_jax.serving.app import make_app

    engine = load_engine(options)
    engine.start()
    app = make_app(engine, options.policy, key)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False))
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after an orderly end
        signal.signal(number, lambda *_: None)
    host = f"[{options.host}]" if ":" in options.host else options.host
    LOGGER.info(f"serving {options.policy} at http://{host}:{bound.getsockname()[1]}/v1; Ctrl-C ends")
    try:
        server.run(sockets=[bound])
    finally:
        engine.close()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the server; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: serve(options))


if __name__ == "__main__":
    sys.exit(main())
