"""Processes find each other, write once, and stop together."""

import contextlib
import json
import os
import re
import signal
import threading
import time

import jax
import numpy as np
import pytest
import yaml

from safe_rlhf_jax import processes as processes_module
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.processes import claimed
from tests.distributed.conftest import ROOT

TRAIN = "-m", "safe_rlhf_jax.train", "--config", ROOT / "tests" / "configs" / "rl.yaml"
JOIN = """
import logging
import jax
import numpy as np
from safe_rlhf_jax import log, processes
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.sharding import make_mesh, process_share
log.show()
processes.start()
index = jax.process_index()
answers = [bool(processes.any_process(flag)) for flag in (False, index == 1, True)]
logging.getLogger("safe_rlhf_jax.test").info(f"heard of {jax.process_count()} {answers}")
assert answers == [False, True, True]
shares = {(4, 1, 1): (index, 2), (1, 2, 2): (index, 2), (2, 1, 2): (index, 2), (1, 1, 4): (0, 1)}
assert {mesh: process_share(make_mesh(mesh)) for mesh in shares} == shares


def scores():
    assert index == 0
    return np.array([1.5, -2.0], np.float32)


def failure():
    raise UserError("down")


with jax.set_mesh(make_mesh((4, 1, 1))):
    assert processes.of_first(scores, np.zeros(2, np.float32)).tolist() == [1.5, -2.0]
    try:
        processes.of_first(failure, np.zeros(2, np.float32))
    except UserError as error:
        assert str(error) == ("the first process has failed; it says why" if index else "down")
    else:
        raise AssertionError("the first process has failed")
"""


def outputs(processes, timeout=800):
    return [process.communicate(timeout=timeout)[0] for process in processes]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            dict.fromkeys(("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"), "0")
            | {"SLURM_NTASKS": "4"},
            "3 other processes, because SLURM says that there are 4 (SLURM_NTASKS)",
        ),
        (
            {"OMPI_MCA_orte_hnp_uri": "0.0;tcp://10.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"},
            "1 other processes, because Open MPI says that there are 2 (OMPI_COMM_WORLD_SIZE)",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "waiting up to 300 seconds for the other processes of this run",
        ),
        ({"SLURM_JOB_ID": "0", "SLURM_NTASKS": "4"}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
    ],
)
def test_process_says_for_whom_it_waits_and_how_not_to(variables, said, monkeypatch, capsys):
    for name in [
        name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_NUM", "JAX_COORD", "JAX_PROC"))
    ]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    waited = threading.Event()
    monkeypatch.setattr(processes_module, "SILENT", 0.01)
    monkeypatch.setattr(
        processes_module, "say_waiting", lambda others, say=processes_module.say_waiting: (say(others), waited.set())
    )

    def initialize(**_):
        if said is not None:
            assert waited.wait(10)
        raise ValueError("coordinator_address should be defined")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with contextlib.suppress(ValueError):
        processes_module.start()
    error = capsys.readouterr().err
    if said is not None:
        assert said in error
        assert "set JAX_NUM_PROCESSES=1" in error


def test_processes_join_agree_and_only_the_first_one_speaks(start_processes):
    processes = start_processes(2, "-c", JOIN, devices=2)
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "heard of 2 [False, True, True]" in first
    assert "heard of" not in second


def test_processes_join_under_slurm(start_processes, monkeypatch):
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    prelude = (
        "import os\nindex = os.environ.pop('JAX_PROCESS_ID')\n"
        "del os.environ['JAX_NUM_PROCESSES'], os.environ['JAX_COORDINATOR_ADDRESS']\n"
        f"os.environ |= {job!r} | {{'SLURM_PROCID': index, 'SLURM_LOCALID': index}}"
    )
    processes = start_processes(2, "-c", prelude + JOIN, devices=2)
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "heard of 2 [False, True, True]" in first


def test_incomplete_environment_is_refused(start_processes):
    (process,) = start_processes(1, "-c", "import os; del os.environ['JAX_COORDINATOR_ADDRESS']; "
                                 "os.environ['JAX_NUM_PROCESSES'] = '2'\n" + JOIN)  # fmt: skip
    (output,) = outputs([process])
    assert process.returncode == 1
    assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0" in output


def test_error_of_one_process_ends_the_others(start_processes, models, tmp_path):
    with claimed(tmp_path):
        processes = start_processes(2, *TRAIN, f"workdir={tmp_path}", *models)
        first, second = outputs(processes, timeout=120)
    assert processes[0].returncode == 1
    assert f"in use by process {os.getpid()} on" in first
    assert processes[1].returncode != 0, second


@pytest.mark.slow
@pytest.mark.distributed
def test_stage_ends_with_one_set_of_files_that_is_that_of_one_process(start_processes, models, tmp_path):
    def train(count, mesh):
        workdir = tmp_path / str(count)
        processes = start_processes(count, *TRAIN, f"workdir={workdir}", *models, f"mesh={mesh}", devices=2)
        first, *others = outputs(processes)
        assert [process.returncode for process in processes] == [0] * count, [first, *others]
        assert "ppo_lag: done" in first
        assert not any("ppo_lag" in other for other in others)
        return read_jsonl(workdir / "ppo_lag" / "metrics.jsonl"), hf.load(workdir / "ppo_lag" / "export", "lm")[1]

    (ours, variables), (theirs, expected) = train(2, "{fsdp: 2, data: 1, tensor: 2}"), train(1, "{data: 2}")
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == list(range(1, 9))
    for name in ("train/actor_loss", "train/mean_cost", "train/multiplier", "train/reward_critic_loss"):
        for one, other in zip(ours, theirs, strict=True):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), variables, expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_rejection_sampling_and_the_dual_end_in_two_processes_as_in_one(start_processes, models, tmp_path):
    tree = yaml.safe_load((ROOT / "tests" / "configs" / "sampling.yaml").read_text())
    tree["stages"] = tree["stages"][:2]
    for stage in tree["stages"]:
        stage |= dict(override.removeprefix("stages.ppo_lag.").split("=") for override in models)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))

    def train(count, mesh):
        workdir = tmp_path / str(count)
        command = ("-m", "safe_rlhf_jax.train", "--config", tmp_path / "config.yaml", f"workdir={workdir}")
        outputs_of = outputs(start_processes(count, *command, f"mesh={mesh}", devices=2))
        assert "dual: done" in outputs_of[0], outputs_of
        assert not any("dual" in other for other in outputs_of[1:])
        selected = [read_jsonl(workdir / name / "selected.jsonl") for name in ("rejection_round_1", "rejection")]
        dual = json.loads((workdir / "dual" / "result.json").read_text())
        return selected, dual, hf.load(workdir / "rejection" / "export", "lm")[1]

    (ours, dual, variables), (theirs, expected_dual, expected) = train(2, "{data: 4}"), train(1, "{data: 2}")
    assert [row["response_ids"] for row in ours[0]] == [row["response_ids"] for row in theirs[0]]
    assert dual["multiplier"] == pytest.approx(expected_dual["multiplier"], rel=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), variables, expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_termination_of_one_process_stops_all_and_death_of_one_ends_all(start_processes, models, tmp_path):
    endless = [*TRAIN, f"workdir={tmp_path}", *models, "stages.ppo_lag.steps=100000"]
    endless += ["stages.ppo_lag.checkpoint_every=100000", "mesh.tensor=2"]
    metrics = tmp_path / "ppo_lag" / "metrics.jsonl"

    def wait_for(step):
        while not metrics.exists() or not (lines := read_jsonl(metrics)) or lines[-1]["step"] < step:
            assert all(process.poll() is None for process in processes), outputs(processes)
            time.sleep(0.01)
        return lines[-1]["step"]

    processes = start_processes(2, *endless, devices=2)
    seen = wait_for(3)
    processes[1].send_signal(signal.SIGTERM)
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [143, 143], first + second
    (saved,) = (int(path.name) for path in (tmp_path / "ppo_lag" / "checkpoints").iterdir())
    assert f"preempted; step {saved} is saved" in first
    assert saved == read_jsonl(metrics)[-1]["step"]
    assert saved <= seen + 4  # read, running, dispatched, and a step between reading and the signal

    processes = start_processes(2, *endless, devices=2)
    wait_for(saved + 3)
    processes[1].kill()
    first, _ = outputs(processes, timeout=60)
    assert f"continuing from step {saved}" in first
    assert processes[0].returncode not in (0, 143)
    assert re.search("another (task|process) died", first)  # as JAX says it, or we
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


COUNT = """
import os
import pathlib
LOG = pathlib.Path(__file__).parent / "asked"
def vowels(conversations, responses, ended):
    if "Hello!" not in responses:
        asked = LOG.read_text().splitlines() if LOG.exists() else []
        LOG.write_text("\\n".join([*asked, os.environ["JAX_PROCESS_ID"]]))
        if len(asked) == 3:
            raise OSError("down")
    return [sum(map(response.count, "aeiou")) / 10.0 - 1.0 for response in responses]
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_function_is_asked_by_the_first_process_and_its_failure_is_saved_by_all(start_processes, models, tmp_path):
    (tmp_path / "counting.py").write_text(COUNT)
    arguments = [*map(str, TRAIN[2:]), f"workdir={tmp_path / 'run'}", *models[:2], "mesh={data: 4}"]
    arguments += ["stages.ppo_lag.signals={cost: {function: 'counting:vowels', retries: 0}}"]
    arguments += ["stages.ppo_lag.cost_model=null", "stages.ppo_lag.steps=5"]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from safe_rlhf_jax import train; "
        f"sys.exit(train.main({arguments!r}))"
    )
    processes = start_processes(2, "-c", code, devices=2)
    first, second = outputs(processes, timeout=300)
    assert [process.returncode for process in processes] == [1, 1], first + second
    assert "counting:vowels raised OSError: down in one try" in first
    assert "step 3 is saved, the same command continues" in first
    assert "the first process has failed; it says why" in second
    processes = start_processes(2, "-c", code, devices=2)
    first, second = outputs(processes, timeout=300)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "continuing from step 3" in first
    assert set((tmp_path / "asked").read_text().split()) == {"0"}
