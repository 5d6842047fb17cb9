import builtins
import io
import json
import math
import re

import pytest

from safe_rlhf_jax.metrics import (
    JsonlWriter,
    ProgressBar,
    TensorBoardWriter,
    Throughput,
    WandbWriter,
    make_writers,
    read_jsonl,
)


class Clock:
    """A clock that only the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def write_steps(path, steps, *, value=0.0, resume_step=None):
    writer = JsonlWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"train/reward": value})
    writer.close()


def steps_of(path):
    return [record["step"] for record in read_jsonl(path)]


def test_jsonl_returns_what_was_written(tmp_path):
    write_steps(tmp_path / "deep" / "metrics.jsonl", [1, 2], value=0.25)
    assert read_jsonl(tmp_path / "deep" / "metrics.jsonl") == [
        {"step": 1, "train/reward": 0.25},
        {"step": 2, "train/reward": 0.25},
    ]


def test_jsonl_is_on_disk_before_close(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"a": 1.0})
    assert steps_of(tmp_path / "m.jsonl") == [1]
    writer.close()


def test_jsonl_lines_stay_valid_json_where_metrics_are_not_finite(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    writer.close()

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=no_constants)
    (record,) = read_jsonl(path)
    assert math.isnan(record["nan"])
    assert (record["up"], record["down"]) == (math.inf, -math.inf)


def test_jsonl_has_no_step_twice_after_resuming(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, range(1, 8), value=0.0)
    write_steps(path, range(5, 10), value=1.0, resume_step=4)
    assert steps_of(path) == list(range(1, 10))
    assert [record["train/reward"] for record in read_jsonl(path)] == [0.0] * 4 + [1.0] * 5
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("resume_step", [None, 2])
def test_jsonl_drops_a_line_that_was_never_finished(tmp_path, resume_step):
    path = tmp_path / "m.jsonl"
    write_steps(path, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 3, "train/rew')
    write_steps(path, [3], resume_step=resume_step)
    assert steps_of(path) == [1, 2, 3]


def test_jsonl_without_resume_step_appends(tmp_path):
    write_steps(tmp_path / "m.jsonl", [1])
    write_steps(tmp_path / "m.jsonl", [2])
    assert steps_of(tmp_path / "m.jsonl") == [1, 2]


def test_tensorboard_writes_an_event_file(tmp_path):
    writer = TensorBoardWriter(tmp_path, resume_step=3)
    writer.write(4, {"train/reward": 1.0})
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"train/reward" in events.read_bytes()


def test_make_writers_puts_each_file_in_its_place(tmp_path):
    writers = make_writers(tmp_path, resume_step=None)
    writers.write(1, {"train/kl": 0.5})
    writers.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    assert list((tmp_path / "tensorboard").iterdir())


def test_make_writers_names_the_writers_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"\['jsnol'\].*'jsonl', 'tensorboard', 'wandb'"):
        make_writers(tmp_path, resume_step=None, names=("jsnol",))
    assert not list(tmp_path.iterdir())


def test_wandb_says_how_to_install_it(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(ImportError, match=r"pip install 'safe_rlhf_jax\[wandb\]'"):
        WandbWriter(tmp_path)


def test_progress_prints_a_line_per_interval_where_there_is_no_terminal():
    clock, stream = Clock(), io.StringIO()
    progress = ProgressBar("actor", 100, stream=stream, clock=clock)
    for step in range(1, 26):
        progress.write(step, {"train/reward": step / 2, "train/other": 7.0})
        clock.now += 1.0
    progress.close()
    assert stream.getvalue().splitlines() == [
        "actor 1/100 · reward 0.5",
        "actor 11/100 · 0:01:29 left · 1 steps/s · reward 5.5",
        "actor 21/100 · 0:01:19 left · 1 steps/s · reward 10.5",
        "actor 25/100 · 0:01:18 left · 0.96 steps/s · reward 12.5",
    ]


def test_progress_prints_the_last_step_once():
    stream = io.StringIO()
    progress = ProgressBar("actor", 1, stream=stream, clock=Clock())
    progress.write(1, {})
    progress.close()
    assert stream.getvalue() == "actor 1/1\n"


def test_progress_draws_one_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = Clock(), Terminal()
    progress = ProgressBar("actor [lora]", 4, stream=stream, clock=clock, start=1)
    for step in (2, 3, 4):
        progress.write(step, {"train/reward": 0.5, "train/cost": -1.0, "train/kl": 0.01})
        clock.now += 0.5
    progress.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    last = drawn.rstrip().rpartition("\r")[2]
    assert "actor [lora]" in last
    assert "4/4 0:00:00 left · 2 steps/s · reward 0.5 · cost -1 · kl 0.01" in last
    assert drawn.count("\n") == 1


def test_throughput_leaves_out_the_first_step():
    clock = Clock()
    throughput = Throughput(clock=clock)
    clock.now += 60.0  # compiles
    assert throughput.update(1000) == {}
    for _ in range(3):
        clock.now += 0.5
        metrics = throughput.update(1000)
    assert metrics == {"perf/tokens_per_second": 2000.0, "perf/seconds_per_step": 0.5}


def test_throughput_forgets_steps_before_the_window():
    clock = Clock()
    throughput = Throughput(window=2, clock=clock)
    throughput.update(0)
    for seconds in (8.0, 1.0, 1.0):
        clock.now += seconds
        metrics = throughput.update(10)
    assert metrics["perf/tokens_per_second"] == 10.0


def test_throughput_skips_an_evaluation():
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.update(10)
    clock.now += 30.0
    throughput.skip()
    clock.now += 2.0
    assert throughput.update(10) == {"perf/tokens_per_second": 5.0, "perf/seconds_per_step": 2.0}
