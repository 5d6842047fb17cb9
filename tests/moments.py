"""Moments at which a test breaks a run, none of which depends on the clock; for code in front of a command line.

A run has no hooks for this, so functions of the package are wrapped by name, all of them here. A name that is gone is
an error before the run starts, which `checked` shows.
"""

import importlib
import itertools
import os
import pathlib
import resource
import signal
import time

GONE = "tests/moments.py wraps what is no longer there: "


def wrap(place, make):
    """Replaces `module:name` or `module:Class.name` of the package by make(original)."""
    module, _, path = place.partition(":")
    *way, name = path.split(".")
    try:
        owner = importlib.import_module(f"safe_rlhf_jax.{module}")
        for part in way:
            owner = getattr(owner, part)
        original = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{GONE}{place}") from error
    setattr(owner, name, make(original))


def checked(process):
    """Returns a finished process, and fails where a name was gone."""
    assert GONE not in process.stderr, process.stderr
    return process


def before(place, action):
    """Calls action(arguments) before a function."""
    wrap(place, lambda original: lambda *arguments: (action(*arguments), original(*arguments))[1])


def after(place, action):
    """Calls action(arguments) after a function."""
    wrap(place, lambda original: lambda *arguments: (original(*arguments), action(*arguments))[0])


def before_batch(action):
    """Calls action(step) before the RL stage gets the batch of a step."""

    def make(prompt_batches):
        def wrapped(*arguments):
            batches = prompt_batches(*arguments)
            return lambda step: (action(step), batches(step))[1]

        return wrapped

    wrap("stages.reinforcement:prompt_batches", make)


def before_log(action):
    """Calls action(stage's name, step) before the metrics of a step are written."""
    before("loop:Log.push", lambda log, step, *_: action(log.stage.name, step))


def after_log(action):
    """Calls action(stage's name, step) after the metrics of a step are written."""
    after("loop:Log.push", lambda log, step, *_: action(log.stage.name, step))


def wait_for_checkpoint(folder, step):
    """Waits until the checkpoint of a step is whole: it gets its name last."""
    while not any(pathlib.Path(folder).glob(f"{step}/*")):
        time.sleep(0.05)


def die(name="SIGKILL"):
    os.kill(os.getpid(), getattr(signal, name))


def death_at(call):
    """Returns an action that kills the process when it is called for the nth time."""
    calls = itertools.count(1)
    return lambda *_: die() if next(calls) == call else None


def fill_disk(size=1_000_000):
    """From here on no file grows beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
