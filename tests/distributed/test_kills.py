"""A run that is killed, wherever it is, ends with the parameters of a run that was not."""

import os
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import moments
from tests.distributed.conftest import ROOT

CONFIG, STEPS = ROOT / "tests" / "configs" / "rl.yaml", 8
MANY = ("compile", "step", "save", "step", "export")
CHAINS = [(("step", "save", "export"), 0), *((MANY, seed) for seed in (1, 2, 3, 4))]
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]

# A thread waits for the moment, then a little longer, then kills its process, which never gets beyond its export.
KILL = """
import pathlib, threading, time
from tests import moments
folder, asked = pathlib.Path({folder!r}), []
def lines():
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count(chr(10)) if metrics.exists() else 0
when = {{
    "compile": lambda: asked,
    "step": lambda: lines() >= {step},
    "save": lambda: list(folder.glob("checkpoints/*tmp*")),
    "export": lambda: (folder / "export").exists(),
}}
def watch():
    while not when[{moment!r}]():
        time.sleep(0.001)
    time.sleep({delay})
    moments.die()
moments.before_batch(asked.append)
moments.after("stages.reinforcement:export", lambda *_: time.sleep(60))
threading.Thread(target=watch, daemon=True).start()
"""


@pytest.fixture(scope="module")
def train(models, tmp_path_factory):
    """Trains rl.yaml in a process of its own, with one device."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }

    def run(workdir, prelude="", **more):
        code = f"{prelude}\nimport sys\nfrom safe_rlhf_jax.train import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, "--config", CONFIG, f"workdir={workdir}", *models]
        options = {"capture_output": True, "text": True, "timeout": 600}
        return moments.checked(subprocess.run(command, env=environment | more, **options))

    return run


def results(workdir):
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(workdir / "ppo_lag" / "checkpoints" / str(STEPS) / "default")
    return state, (workdir / "ppo_lag" / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    process = train(workdir)
    assert process.returncode == 0, process.stderr
    return results(workdir)


@pytest.mark.parametrize(("moments", "seed"), CHAINS)
def test_run_killed_at_random_moments_ends_bit_identical(train, straight, tmp_path, moments, seed):
    choice, folder, steps = random.Random(seed), tmp_path / "ppo_lag", [2, 5]
    for moment in moments:
        shutil.rmtree(folder / "export", ignore_errors=True)
        # The one that is killed while it compiles must not find the program compiled.
        cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if moment == "compile" else {}
        delay = choice.uniform(0, 2.0 if moment == "compile" else 0.1)
        step = steps.pop(0) + choice.randrange(2) if moment == "step" else 0
        process = train(tmp_path, KILL.format(folder=str(folder), moment=moment, step=step, delay=delay), **cache)
        assert process.returncode == -9, f"{moment} after {delay} s: {process.stdout}{process.stderr}"
        assert not (folder / "result.json").exists()
    finished = train(tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"continuing from step {STEPS}" in finished.stdout
    (state, export), (expected_state, expected_export) = results(tmp_path), straight
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    assert export == expected_export
