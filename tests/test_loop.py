"""The loop: a run that is stopped continues as if it had not been; a run that breaks says so and saves nothing bad."""

import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from safe_rlhf_jax import loop
from safe_rlhf_jax.checkpoint import Checkpoints
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.loop import PREEMPTED, TrainLoop, fit, not_finite
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.processes import claimed

ROOT = Path(__file__).parent.parent

STEPS = 6  # of the stage ppo_lag in mini.yaml, which saves every second one

# Stops the RL stage from inside, when it asks for the batch of a step, once the checkpoint of another is saved.
INTERRUPT = """
from tests import moments
def stop(step):
    if step == {step}:
        if {saved}:
            moments.wait_for_checkpoint({checkpoints!r}, {saved})
        moments.die("{signal}")
moments.before_batch(stop)
"""


@pytest.fixture(scope="module")
def interrupted(mini_run, train_process, tmp_path_factory):
    """The RL stage of the mini run again: terminated, then killed, then left to finish."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    for name in ("sft", "reward", "cost"):
        shutil.copytree(mini_run[0] / name, workdir / name)
    # Starts from the config that the stage left in its folder.
    command = {"config": mini_run[0] / "ppo_lag" / "config.yaml"}
    where = {"checkpoints": str(workdir / "ppo_lag" / "checkpoints")}
    stops = ({"step": 2, "saved": 0, "signal": "SIGTERM"}, {"step": 5, "saved": 4, "signal": "SIGKILL"})
    processes = [
        train_process(f"workdir={workdir}", prelude=INTERRUPT.format(**stop, **where), **command) for stop in stops
    ]
    steps = [record["step"] for record in read_jsonl(workdir / "ppo_lag" / "metrics.jsonl")]
    processes.append(train_process(f"workdir={workdir}", **command))
    return workdir / "ppo_lag", processes, steps


def state_of(folder, step):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoints" / str(step) / "default")


def test_termination_saves_at_the_next_step_boundary_and_says_so(interrupted):
    terminated = interrupted[1][0]
    assert terminated.returncode == PREEMPTED == 143
    assert "preempted; step 3 is saved" in terminated.stdout


def test_interrupted_run_continues_where_it_was(interrupted):
    _, (_, killed, finished), steps = interrupted
    assert killed.returncode == -9
    assert "continuing from step 3" in killed.stdout
    assert finished.returncode == 0, finished.stderr
    assert "continuing from step 4" in finished.stdout
    assert "sft: finished, config unchanged; skipped" in finished.stdout
    assert steps == [1, 2, 3, 4], "the step that the kill interrupted was written"


def test_resume_is_bit_exact(interrupted, mini_run):
    folder, straight = interrupted[0], mini_run[0] / "ppo_lag"
    ours, theirs = state_of(folder, STEPS), state_of(straight, STEPS)
    assert {"actor", "critics", "constraints", "step"} <= set(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    constraint = theirs["constraints"]["cost"]
    assert float(constraint["multiplier"]["log"][0]) != 0.0, "λ has not moved: the test shows nothing"
    assert int(constraint["window"]["count"][0]) > 0
    assert (folder / "export" / "model.safetensors").read_bytes() == (
        straight / "export" / "model.safetensors"
    ).read_bytes()


def test_metrics_have_each_step_once_and_are_those_of_a_straight_run(interrupted, mini_run):
    def metrics(folder):
        records = read_jsonl(folder / "metrics.jsonl")
        return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records]

    ours = metrics(interrupted[0])
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    assert ours == metrics(mini_run[0] / "ppo_lag")
    assert all("train/mean_cost" in record and "train/multiplier" in record for record in ours)


def test_checkpoints_beyond_the_newest_are_removed(mini_run):
    assert sorted(path.name for path in (mini_run[0] / "ppo_lag" / "checkpoints").iterdir()) == ["4", "6"]


def test_run_whose_numbers_break_names_step_metric_and_checkpoint(mini_run, train_process, tmp_path):
    for name in ("sft", "reward", "cost"):
        shutil.copytree(mini_run[0] / name, tmp_path / name)
    # Float32 overflows in the forward pass that follows the second update of an absurd size.
    process = train_process(
        f"workdir={tmp_path}", "stages.ppo_lag.actor.lr=1e30", "stages.ppo_lag.actor.schedule=constant",
        "stages.ppo_lag.actor.warmup_ratio=0", "stages.ppo_lag.checkpoint_every=1",
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("error: ppo_lag: ")
    assert "Traceback" not in process.stderr
    assert "last good checkpoint: none yet" in process.stderr
    assert "at step 1" in process.stderr
    assert not list((tmp_path / "ppo_lag" / "checkpoints").glob("[0-9]*"))
    assert not (tmp_path / "ppo_lag" / "result.json").exists()


# --- The loop alone


def counter(total=10, *, bad_metric=None, bad_state=None, **options):
    """A stage whose state counts."""

    @jax.jit
    def step(state, frozen, batch, key):
        count = state["count"] + batch
        loss = jax.numpy.where(count == bad_metric, jax.numpy.nan, 1.0 * count) if bad_metric else 1.0 * count
        value = jax.numpy.where(count == bad_state, jax.numpy.inf, 0.5) if bad_state else state["value"]
        return {"count": count, "value": value}, {"train/loss": loss}

    defaults = {
        "name": "count", "total_steps": total,
        "init": lambda: {"count": jax.numpy.int32(0), "value": jax.numpy.float32(0)},
        "step": step, "batch": lambda _: 1, "frozen": None, "seed": 0, "checkpoint_every": 2, "keep_checkpoints": 2,
        "eval_every": None, "evaluate": lambda _: {}, "tokens": lambda _: 1.0,
    }  # fmt: skip
    return TrainLoop(**(defaults | options))


def test_loop_takes_every_step_once_and_evaluates_when_told(tmp_path):
    stage = counter(7, eval_every=3, evaluate=lambda state: {"eval/count": float(state["count"])})
    assert int(fit(stage, tmp_path, writers=("jsonl",))["count"]) == 7
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 8))
    assert {r["step"]: r["eval/count"] for r in records if "eval/count" in r} == {3: 3.0, 6: 6.0}


def failing_at(moment, failures):
    """Raises, at the moments named, what a signal from the host raises."""
    if moment in failures:
        failures.remove(moment)
        raise UserError("the judge is down")


@pytest.mark.parametrize("best", [None, "-eval/count"])
def test_step_that_a_signal_ends_saves_the_state_before_it(tmp_path, best):
    whole, failures = counter(7, checkpoint_every=4, keep_best=best, evaluate=lambda _: {"eval/count": 1.0}), [1, 3]

    def step(state, *others):
        failing_at(int(state["count"]) + 1, failures)
        return whole.step(state, *others)

    stage = dataclasses.replace(whole, step=step)
    with pytest.raises(UserError, match=r"^the judge is down; the same command starts again$"):
        fit(stage, tmp_path, writers=("jsonl",))
    with pytest.raises(UserError, match=r"^the judge is down; step 2 is saved, the same command continues$"):
        fit(stage, tmp_path, writers=("jsonl",))
    assert Checkpoints(tmp_path / "checkpoints").latest() == 2
    assert int(fit(stage, tmp_path, writers=("jsonl",))["count"]) == 7
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_evaluation_that_a_signal_ends_is_made_up_for_from_the_last_checkpoint(tmp_path):
    failures = [3]

    def evaluate(state):
        failing_at(int(state["count"]), failures)
        return {"eval/count": float(state["count"])}

    stage = counter(5, eval_every=3, evaluate=evaluate)
    with pytest.raises(UserError, match=r"^the judge is down; step 2 is saved, the same command continues$"):
        fit(stage, tmp_path, writers=("jsonl",))
    fit(stage, tmp_path, writers=("jsonl",))
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 6))
    assert [record["step"] for record in records if "eval/count" in record] == [3]


def test_freed_memory_may_go_back_before_every_step(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "return_freed_memory", lambda above: asked.append(above))
    fit(counter(3), tmp_path, writers=("jsonl",))
    assert asked == [loop.MOST_KEPT] * 3


def test_finished_loop_takes_no_step(tmp_path):
    fit(counter(4), tmp_path, writers=("jsonl",))
    broken = counter(4, batch=lambda _: 1 / 0)
    assert int(fit(broken, tmp_path, writers=("jsonl",))["count"]) == 4


def test_metric_that_is_not_finite_stops_the_run_and_its_state_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"train/loss is nan at step 6; last good checkpoint: step 4 in"):
        fit(counter(bad_metric=6), tmp_path, writers=("jsonl",))
    assert Checkpoints(tmp_path / "checkpoints").latest() == 4
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_perplexity_that_overflows_stops_no_run_whose_loss_is_finite(tmp_path):
    def step(state, frozen, batch, key):
        loss = jax.numpy.float32(100.0)
        return state, {"train/loss": loss, "train/perplexity": jax.numpy.exp(loss)}

    fit(counter(3, step=step, keep_best="-train/perplexity"), tmp_path, writers=("jsonl", "tensorboard"))
    assert [record["train/perplexity"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [float("inf")] * 3


def test_state_that_is_not_finite_is_not_saved_even_where_the_metrics_are(tmp_path):
    with pytest.raises(FloatingPointError, match=r"count: state\['value'\] is not finite at step 6; .* step 4 in"):
        fit(counter(bad_state=6), tmp_path, writers=("jsonl",))
    assert Checkpoints(tmp_path / "checkpoints").latest() == 4


def test_termination_at_the_last_step_stops_before_the_next_stage(tmp_path):
    def batch(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1

    with pytest.raises(SystemExit) as stop:
        fit(counter(4, batch=batch), tmp_path, writers=("jsonl",))
    assert stop.value.code == PREEMPTED
    assert int(fit(counter(4), tmp_path, writers=("jsonl",))["count"]) == 4


# --- Checkpoints that break


def wide(total=6, **options):
    """A stage whose state takes 80 kB on disk and depends on every step before."""
    noise = np.random.default_rng(0).normal(size=(100, 200)).astype(np.float32)

    @jax.jit
    def step(state, frozen, batch, key):
        value = state["value"] * 0.5 + jax.random.normal(key, state["value"].shape, jax.numpy.float32)
        return {"value": value}, {"train/loss": value.sum(), "train/step": 1.0 * batch}

    defaults = {"step": step, "batch": lambda step: step, "init": lambda: {"value": jax.numpy.asarray(noise)}}
    return counter(total, **(defaults | options))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4, and the state after step 6."""
    folder = tmp_path_factory.mktemp("unbroken")
    fit(wide(4), folder, writers=("jsonl",))
    final = fit(wide(), tmp_path_factory.mktemp("final"), writers=("jsonl",))
    return folder, np.asarray(final["value"])


def files_of_newest(folder):
    newest = folder / "checkpoints" / "4"
    return [path.relative_to(folder) for path in sorted(newest.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("how", ["truncated", "deleted"])
def test_run_falls_back_from_a_broken_checkpoint_says_so_and_loses_nothing_else(unbroken, tmp_path, capsys, how):
    folder, final = unbroken
    fell_back = 0
    for i, file in enumerate(files_of_newest(folder)):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        os.truncate(copy / file, (copy / file).stat().st_size // 2) if how == "truncated" else (copy / file).unlink()
        state = fit(wide(), copy, writers=("jsonl",))
        np.testing.assert_array_equal(state["value"], final, err_msg=str(file))
        assert [record["step"] for record in read_jsonl(copy / "metrics.jsonl")] == list(range(1, 7)), file
        assert Checkpoints(copy / "checkpoints").latest() == 6
        out = capsys.readouterr().out
        aside = (copy / "checkpoints.unreadable" / "4").exists()
        assert ("checkpoint of step 4 cannot be read" in out) == ("continuing from step 2" in out) == aside, (file, out)
        assert aside or "continuing from step 4" in out, (file, out)
        fell_back += aside
    assert fell_back >= 3, "hardly any file matters: the test shows little"


def test_run_without_a_readable_checkpoint_stops_instead_of_starting_anew(unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").rglob("d/*"):
        file.unlink()
    for _ in range(2):
        with pytest.raises(OSError, match=r"none of the checkpoints \[4, 2\] can be read"):
            fit(wide(), tmp_path / "run", writers=("jsonl",))


def test_full_disk_is_a_clear_error_and_the_last_good_checkpoint_continues(unbroken, tmp_path):
    """The kernel refuses to write more than 20 kB into a file, from the fifth step on."""
    shutil.copytree(unbroken[0], tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batch(step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return step

    try:
        with pytest.raises(OSError, match=r"checkpoint could not be written: .*Last good checkpoint: step 4"):
            fit(wide(batch=batch), tmp_path / "run", writers=("jsonl",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state = fit(wide(), tmp_path / "run", writers=("jsonl",))
    np.testing.assert_array_equal(state["value"], unbroken[1])


MOMENTS = "from tests import moments\n"
CHECKPOINT = MOMENTS + "moments.before_log(lambda *_: moments.fill_disk())"
EXPORT = MOMENTS + "moments.before('stages.supervised:export', lambda *_: moments.fill_disk())"


@pytest.mark.parametrize(
    ("prelude", "said"),
    [
        (CHECKPOINT, r"error: .*/sft/checkpoints: a checkpoint could not be written: .* Make room if the disk is full"),
        (EXPORT, r"error: .*/sft/export/model\.safetensors could not be written: File too large\. Make room"),
    ],
    ids=["checkpoint", "export"],
)
def test_error_of_a_full_disk_names_the_file_and_ends_the_log_without_tracebacks(
    train_process, tmp_path, prelude, said
):
    process = train_process(f"workdir={tmp_path}", "stages.sft.checkpoint_every=1", prelude=prelude)
    assert process.returncode == 1
    assert re.match(said, process.stderr.strip().splitlines()[-1])
    assert "Traceback" not in process.stderr + process.stdout
    assert "Event loop is closed" not in process.stderr


@pytest.mark.parametrize(("best", "kept"), [("train/loss", [3, 6]), ("-eval/distance", [2, 6]), (None, [6])])
def test_best_checkpoint_is_kept_beside_the_newest(tmp_path, best, kept):
    losses, distances = jax.numpy.asarray([0.0, 1.0, 5.0, 2.0, 3.0, 4.0]), [None, 2.0, 1.0, 3.0, 4.0, 5.0, 6.0]

    def step(state, frozen, batch, key):
        return {"count": state["count"] + 1}, {"train/loss": losses[batch]}

    stage = counter(
        6, step=step, batch=lambda step: step, init=lambda: {"count": jax.numpy.int32(0)}, checkpoint_every=1,
        keep_checkpoints=1, keep_best=best, evaluate=lambda state: {"eval/distance": distances[int(state["count"])]},
    )  # fmt: skip
    fit(stage, tmp_path, writers=("jsonl",))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept


def impatient(**options):
    """A stage that is evaluated after every second step, best after the fourth, and that also evaluates checkpoints."""
    due = {2: 1.0, 4: 3.0, 6: 2.0, 8: 3.0, 10: 1.0}
    options = {"eval_every": 2, "checkpoint_every": 3, "keep_best": "eval/x", "patience": 2} | options
    return counter(12, evaluate=lambda state: {"eval/x": due.get(int(state["count"]), 9.0)}, **options)


@pytest.mark.parametrize(
    ("options", "last"),
    [({}, 8), ({"patience": 3}, 10), ({"patience": 5}, 12), ({"keep_best": "-eval/x"}, 6), ({"patience": None}, 12)],
)
def test_run_ends_after_so_many_evaluations_without_a_better_one_and_saves_its_state(tmp_path, options, last):
    assert int(fit(impatient(**options), tmp_path, writers=("jsonl",))["count"]) == last
    assert Checkpoints(tmp_path / "checkpoints").latest() == last
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == last


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("stopped_at", [2, 5, 7, 8])
def test_run_that_was_stopped_ends_where_it_would_have_ended(tmp_path, stopped_at, lost):
    def batch(step):
        if step + 1 == stopped_at:
            signal.raise_signal(signal.SIGTERM)
        return 1

    with pytest.raises(SystemExit):
        fit(impatient(batch=batch), tmp_path, writers=("jsonl",))
    if lost:  # as if it had been killed before the state was saved
        shutil.rmtree(tmp_path / "checkpoints" / str(stopped_at))
    for _ in range(2):  # the second time there is nothing left to do
        assert int(fit(impatient(), tmp_path, writers=("jsonl",))["count"]) == 8
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_best_by_a_metric_that_is_not_measured_is_refused_by_name_and_loses_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"keep_best: 'train/los' is not among .*train/loss.*step 2 is saved"):
        fit(counter(keep_best="train/los"), tmp_path, writers=("jsonl",))
    assert Checkpoints(tmp_path / "checkpoints").latest() == 2
    assert int(fit(counter(), tmp_path, writers=("jsonl",))["count"]) == 10


def test_metric_that_is_not_finite_ranks_behind_all_others(tmp_path):
    values = [1.0, float("inf"), 2.0, float("nan"), 1.0, 1.0]
    stage = counter(
        6, checkpoint_every=1, keep_checkpoints=1, keep_best="eval/x",
        evaluate=lambda state: {"eval/x": values[int(state["count"]) - 1]},
    )  # fmt: skip
    fit(stage, tmp_path, writers=("jsonl",))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 6]


@pytest.mark.parametrize("content", ["", '{"rank": ', "{}", '{"rank": null}'])
def test_run_falls_back_from_broken_metrics_of_a_checkpoint_and_names_the_file(tmp_path, capsys, content):
    fit(wide(4, keep_best="-train/loss"), tmp_path, writers=("jsonl",))
    capsys.readouterr()
    file = tmp_path / "checkpoints" / "4" / "metrics" / "metrics"
    file.write_text(content)
    fit(wide(keep_best="-train/loss"), tmp_path, writers=("jsonl",))
    out = capsys.readouterr().out
    assert f"checkpoint of step 4 cannot be read ({file}: " in out
    assert "continuing from step 2" in out
    assert (tmp_path / "checkpoints.unreadable" / "4").is_dir()
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 7))


def test_run_without_readable_metrics_of_any_checkpoint_stops_and_leaves_them(tmp_path):
    fit(wide(4, keep_best="-train/loss"), tmp_path, writers=("jsonl",))
    for file in (tmp_path / "checkpoints").glob("*/metrics/metrics"):
        file.write_text("")
    for _ in range(2):
        with pytest.raises(OSError, match=r"none of the checkpoints \[4, 2\] can be read: .*metrics/metrics: JSON"):
            fit(wide(keep_best="-train/loss"), tmp_path, writers=("jsonl",))


# --- Two runs in one folder


def test_folder_of_a_live_run_is_refused_and_free_when_it_is_gone(tmp_path, train_process):
    with claimed(tmp_path):
        process = train_process(f"workdir={tmp_path}")
        assert process.returncode == 1
        assert f"workdir {tmp_path} is in use by process {os.getpid()} on" in process.stderr
        assert not (tmp_path / "sft").exists()
    code = (
        "import os, signal; from safe_rlhf_jax.processes import claimed\n"
        f"with claimed({str(tmp_path)!r}): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    assert "process" in (tmp_path / ".lock").read_text(), "the run that was killed has left its lock file"
    with claimed(tmp_path):
        pass


def test_warning_is_printed_once(tmp_path, capsys):
    fit(
        counter(5, warning=lambda metrics: "careful" if metrics["train/loss"] > 2 else None),
        tmp_path,
        writers=("jsonl",),
    )
    assert [line for line in capsys.readouterr().out.splitlines() if "careful" in line] == [
        "count: warning at step 3: careful"
    ]


def test_numbers_that_are_not_finite_are_looked_for_by_one_program_at_a_time(monkeypatch):
    running = []

    class Found:
        def __bool__(self):
            running.clear()
            return True

    def is_finite(array):
        assert not running, "two programs with collectives in flight, which a simulated mesh can die of"
        running.append(array)
        return Found()

    monkeypatch.setattr(loop, "is_finite", is_finite)
    assert not_finite({"a": np.zeros(2), "b": np.zeros(3), "steps": np.zeros((), np.int32)}) is None


def test_not_finite_names_the_leaf():
    assert not_finite({"a": np.zeros(3), "b": np.arange(2)}) is None
    assert not_finite({"a": np.zeros(3), "b": [np.array([0.0, np.nan])]}) == "state['b'][0] is not finite"
