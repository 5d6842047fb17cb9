"""Small models in folders, and the same program in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.models import hf
from tests.helpers import make_lm, make_scorer, tiny_config

ROOT = Path(__file__).parent.parent.parent


def saved_models(folder):
    """Overrides of rl.yaml: an actor, a reward and a cost model with eight heads, in folders."""
    tokenizer = load_tokenizer("demo")
    config = tiny_config(
        vocab_size=-(-tokenizer.vocab_size // 8) * 8, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=8,
        num_kv_heads=8, head_dim=4, max_positions=32,
    )  # fmt: skip
    made = {"init_from": make_lm(config, 0), "reward_model": make_scorer("reward", config, 1)}
    made["cost_model"] = make_scorer("cost", config, 2)
    for field, (module, variables) in made.items():
        hf.save(folder / field, module, variables, tokenizer.hf)
    return [f"stages.ppo_lag.{field}=path:{folder / field}" for field in made]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """What `saved_models` returns."""
    return saved_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def start_processes():
    """Starts a Python command line in several processes that find each other; returns them."""
    started = []

    def start(count, *command, devices=1):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        shared = os.environ | {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count), "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
        }  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, "-u", *map(str, command)], env=shared | {"JAX_PROCESS_ID": str(i)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for i in range(count)
        ]  # fmt: skip
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
