"""Runs of an experiment side by side, each a process with cores of its own, and their results in one JSON file.

A run whose result is in the file is left out; one that was killed goes on where it was.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from benchmarks.rl_step import environment

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIGS = pathlib.Path(__file__).parent
RUNS = pathlib.Path("runs/experiments")  # from ROOT, in which runs are started
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
MODELS = ("sft", "reward", "cost")
POLL = 0.5  # seconds
Run = dict[str, Any]  # a result
# Threads are as many as the cores that JAX finds when it is imported.
PROGRAM = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv.pop(1).split(",")))
from safe_rlhf_jax.train import main
sys.exit(main())
"""


class Job(NamedTuple):
    """A run of a config."""

    name: str  # of its workdir in RUNS
    config: str  # file in CONFIGS
    settings: dict[str, Any]  # overrides
    about: dict[str, Any]  # what distinguishes it from other runs of the experiment

    @property
    def folder(self) -> pathlib.Path:
        """The workdir."""
        return ROOT / RUNS / self.name

    @property
    def arguments(self) -> list[str]:
        """Of `safe_rlhf_jax.train`."""
        config = (CONFIGS / self.config).relative_to(ROOT)
        settings = {"seed": self.about["seed"], "workdir": str(RUNS / self.name)} | self.settings
        return ["--config", str(config), *(f"{key}={flow(value)}" for key, value in settings.items())]

    def has_stage(self, name: str) -> bool:
        """Says whether a stage is finished."""
        return (self.folder / name / "result.json").exists()

    def start(self, cores: Sequence[int]) -> subprocess.Popen[bytes]:
        """Starts the run on some cores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        shared = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / RUNS / "compiled"), "PYTHONPATH": path}
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", PROGRAM, ",".join(map(str, cores)), *self.arguments],
                cwd=ROOT, env=os.environ | shared, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip


def flow(value: Any) -> str:
    """Returns a value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def written(name: str, records: Iterable[Any]) -> str:
    """Writes records for runs, and returns the file as configs name it."""
    file = ROOT / RUNS / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(RUNS / name)


def core_sets(workers: int) -> list[list[int]]:
    """Returns the cores of each worker; workers share them where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::workers] or [cores[i % len(cores)]] for i in range(workers)]


def models_of(seed: int) -> dict[str, str]:
    """Returns {sft, reward, cost: reference} of a seed."""
    return {name: f"path:{RUNS / 'models' / f'seed{seed}' / name / 'export'}" for name in MODELS}


def model_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs that make the models of seeds, which all experiments share; none where they are made."""
    limits = {f"stages.{name}.data.limit": 256 for name in MODELS} if tiny else {}
    jobs = [Job(f"models/seed{seed}", "models.yaml", limits, {"seed": seed}) for seed in seeds]
    return [job for job in jobs if not all(map(job.has_stage, MODELS))]


class Running(NamedTuple):
    """A run in progress."""

    job: Job
    process: subprocess.Popen[bytes]
    cores: list[int]
    start: float

    def spent(self, *, wait: bool) -> dict[str, float] | None:
        """Returns the seconds by the wall and on cores; None while it is running."""
        pid, status, usage = os.wait4(self.process.pid, 0 if wait else os.WNOHANG)
        if not pid:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return {"wall": round(time.time() - self.start), "cpu": round(usage.ru_utime + usage.ru_stime)}


class Results:
    """The results of an experiment by the names of its runs, in a file that is written after each of their stages.

    Args:
        file: The JSON file.
        read: Returns the result of a run, from its folder; None while there is none.
    """

    def __init__(self, file: pathlib.Path, read: Callable[[pathlib.Path], Run | None]):
        self.file, self.read, self.environment = file, read, environment()
        self.found: dict[str, Run] = json.loads(file.read_text()) if file.exists() else {}

    def has(self, job: Job) -> bool:
        """Says whether there is a whole result of this run with these settings."""
        known = self.found.get(job.name, {})
        return bool(known.get("finished")) and known["arguments"] == job.arguments

    def add(self, job: Job, spent: dict[str, float], *, finished: bool) -> None:
        """Adds what a run has found so far."""
        if (result := self.read(job.folder)) is None:
            return
        head = job.about | {"arguments": job.arguments, "environment": self.environment}
        self.found[job.name] = head | {"finished": finished, "seconds": spent} | result
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps(dict(sorted(self.found.items())), indent=1) + "\n")
        draft.replace(self.file)


def run_all(jobs: Sequence[Job], workers: int, until: float, results: Results | None = None) -> bool:
    """Runs jobs side by side, the first ones first; says whether all of them succeeded.

    Args:
        jobs: The runs.
        workers: Processes at once.
        until: Time at which runs are stopped as by a kill; they can be continued.
        results: Where their results go; runs that are there already are left out.
    """
    waiting = [job for job in jobs if results is None or not results.has(job)]
    free, failed = core_sets(max(1, min(workers, len(waiting)))), 0
    running: dict[str, Running] = {}
    stages: dict[str, int] = {}  # finished ones, when the results of a run were read last
    print(f"{len(waiting)} of {len(jobs)} runs to do", flush=True)
    try:
        while (waiting or running) and time.time() < until:
            while waiting and free:
                cores, job = free.pop(0), waiting.pop(0)
                running[job.name] = Running(job, job.start(cores), cores, time.time())
            time.sleep(POLL)
            for one in list(running.values()):
                if (spent := one.spent(wait=False)) is None:
                    if results is not None and len(seconds_of(one.job.folder)) > stages.get(one.job.name, 0):
                        stages[one.job.name] = len(seconds_of(one.job.folder))
                        results.add(one.job, {"wall": round(time.time() - one.start)}, finished=False)
                    continue
                del running[one.job.name]
                free.append(one.cores)
                status = one.process.returncode
                failed += status != 0
                said = f"status {status}, see {one.job.folder}/log.txt" if status else "done"
                print(f"{one.job.name}: {said}; {spent} s; {len(waiting)} to come", flush=True)
                if results is not None:
                    results.add(one.job, spent, finished=status == 0)
    finally:
        for one in running.values():
            os.kill(one.process.pid, signal.SIGTERM)  # Popen.terminate would reap one that has just ended
        for one in running.values():
            spent = one.spent(wait=True)
            if results is not None and spent is not None:
                results.add(one.job, spent, finished=False)
    return not (failed or waiting or running)


def metrics_of(folder: pathlib.Path, stage: str) -> dict[str, float]:
    """Returns the metrics of a finished stage; none of another."""
    file = folder / stage / "result.json"
    return json.loads(file.read_text())["metrics"] if file.exists() else {}


def seconds_of(folder: pathlib.Path) -> dict[str, float]:
    """Returns the seconds of the finished stages."""
    return {file.parent.name: json.loads(file.read_text())["seconds"] for file in sorted(folder.glob("*/result.json"))}


def spread(values: Sequence[float], percent: bool) -> str:
    """Returns mean ± standard deviation over seeds as text."""
    factor, digits, unit = (100, 1, " %") if percent else (1, 2, "")
    deviation = f" ± {factor * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * np.mean(values):.{digits}f}{deviation}{unit}"


def with_interval(rate: float, low: float, high: float, *, percent: bool = False) -> str:
    """Returns a share with the ends of its interval as text."""
    if percent:
        return f"{100 * rate:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
    return f"{rate:.3f} ({low:.3f} to {high:.3f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    head = [columns, ["---"] * len(columns)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*head, *rows])


def seeds_of(runs: Sequence[Run]) -> str:
    """Returns the seeds of runs, and their seconds on cores, as a sentence."""
    hours = sum(run["seconds"]["cpu"] for run in runs) / 3600
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    return f"Seeds {seeds}; {len(runs)} runs, {hours:.1f} core-hours."


def write_section(name: str, text: str, place: pathlib.Path = PAGE) -> None:
    """Writes a section of a page of the docs, between its two comments."""
    page = place.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in page or end not in page:
        raise SystemExit(f"{place}: put {start.strip()} and {end} on lines of their own where the section belongs")
    before, _, rest = page.partition(start)
    place.write_text(before + start + text + "\n" + end + rest.partition(end)[2], encoding="utf-8")
    print(text)


class Experiment(NamedTuple):
    """What an experiment runs and shows."""

    name: str
    description: str
    phases: Sequence[Callable[[Sequence[int], bool], list[Job]]]  # (seeds, tiny) -> runs; the last ones have results
    read: Callable[[pathlib.Path], Run | None]  # the result of a run, from its folder; None while there is none
    section: Callable[[list[Run]], str]  # of finished runs, for the page
    from_models: bool = True  # its runs start from the models of the seeds
    page: pathlib.Path = PAGE


def main(experiment: Experiment) -> None:
    """Command line of an experiment."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(
        description=experiment.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"], help="train and evaluate, or write the page of the docs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at once; they share the cores")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="S", help="stop after them; to be continued")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / f"{experiment.name}.json", metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: few steps, results of no worth")
    options = parser.parse_args()
    results = Results(options.json, experiment.read)
    if options.command == "table":
        finished = [run for run in results.found.values() if run["finished"]]
        write_section(experiment.name, experiment.section(finished), experiment.page)
        return
    until = time.time() + options.seconds
    *before, last = [*([model_jobs] if experiment.from_models else []), *experiment.phases]
    for phase in before:
        if not run_all(phase(options.seeds, options.tiny), options.workers, until):
            raise SystemExit(1)
    raise SystemExit(not run_all(last(options.seeds, options.tiny), options.workers, until, results))
