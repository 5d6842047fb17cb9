"""The same seed and the same batches give the same run, on however many devices and processes."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.steps import STEPS, take_steps

SAVING = (8, 1, 1)  # the mesh that writes the checkpoint
TWO = "2 processes × 4 devices"
elsewhere = [pytest.param(mesh, marks=pytest.mark.distributed) for mesh in [(1, 8, 1), (1, 1, 8), (2, 2, 2)]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_on(models, start_processes, tmp_path_factory):
    """What `take_steps` returns, by mesh; all but the first take their sixth step from the first one's checkpoint."""
    folder = tmp_path_factory.mktemp("meshes")

    @functools.cache
    def run(where):
        if where != TWO:
            return take_steps(where, folder / "checkpoints", models)
        command = Path(__file__).parent / "steps.py", "2,2,2", folder / "checkpoints", folder / "two.json", *models
        for process in start_processes(2, *command, devices=4):
            output, _ = process.communicate(timeout=800)
            assert process.returncode == 0, output
        return json.loads((folder / "two.json").read_text())

    run(SAVING)
    return run


@pytest.mark.parametrize("where", [(1, 1, 1), (1, 2, 1, 4), TWO, *elsewhere], ids=str)
def test_steps_sample_the_same_tokens_and_measure_the_same(run_on, where):
    ours, theirs = run_on(where), run_on(SAVING)
    assert ours["tokens"][:STEPS] == theirs["tokens"][:STEPS]
    for i in range(STEPS):
        assert_same(ours["metrics"][i], theirs["metrics"][i])


@pytest.mark.parametrize("where", [(1, 1, 1), (1, 2, 1, 4), TWO, *elsewhere], ids=str)
def test_checkpoint_continues_on_another_mesh(run_on, where):
    assert_same(run_on(where)["metrics"][STEPS], run_on(SAVING)["metrics"][STEPS])


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_run_moves_so_that_equality_says_something(run_on):
    metrics, tokens = run_on(SAVING)["metrics"], run_on(SAVING)["tokens"]
    assert metrics[0]["train/multiplier"] != pytest.approx(metrics[STEPS]["train/multiplier"], rel=1e-2)
    assert abs(metrics[STEPS]["train/kl"]) > 1e-3
    assert tokens[0] != tokens[1]
