"""What a machine with one GPU and a few minutes can tell of this project; `benchmarks/device.sh` starts it.

Every step is a process of its own with a limit in seconds. One that fails is reported with the end of its output, and
the rest goes on; one for which no time is left is skipped. The JSON file is written anew whenever a step says
something, so that a kill loses nothing. Needs nothing but Python; the steps themselves are benchmarks/device_steps.py.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any
from urllib.parse import unquote

ROOT = pathlib.Path(__file__).parent.parent
LEAST = 10.0  # seconds; with less left no step is started
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
PATIENCE = 4  # times the limit of a step that a CPU has, where a GPU's machine has more and faster cores
TAIL = 3000  # characters of the output of a step that failed
TRUE_FLOAT32 = {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}


@dataclasses.dataclass(frozen=True)
class Step:
    """Something to find out."""

    name: str
    seconds: float  # after which it is stopped
    function: str  # of benchmarks/device_steps.py
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    alone: bool = False  # it measures time or memory: nothing else runs meanwhile


# The most valuable first. What need not be alone mostly compiles, on a few cores each: several run side by side.
# Limits are about twice what an H100 with 16 cores took, where it was seen: a GPU's compiler tries many kernels.
STEPS = (
    Step("facts", 60, "facts", alone=True),
    Step("rl_135m", 180, "rl", {"config": "rl_step_135m", "repeats": 5}, alone=True),
    Step("rl_1b", 240, "rl", {"config": "rl_step_1b", "repeats": 3}, alone=True),
    Step("parity_float32", 240, "parity", {"dtype": "float32"}, TRUE_FLOAT32),
    Step("parity_bfloat16", 240, "parity", {"dtype": "bfloat16"}),
    Step("machinery", 400, "machinery", {}, TRUE_FLOAT32),
    Step("resume", 300, "resume"),
    Step("quickstart", 300, "quickstart", {"fresh": True}),
    Step("sampler_gap", 200, "sampler_gap"),
    Step("chat", 100, "chat"),
    Step("attention", 180, "attention", alone=True),
    Step("rl_0.9m", 240, "rl", {"config": "rl_step_tiny", "repeats": 10}, alone=True),
    Step("quickstart_rest", 400, "quickstart", {"fresh": False}),  # where it stopped for time
    Step("parity_as_trained", 240, "parity", {"dtype": "float32"}),  # products as JAX computes them by default
    Step("compile_local", 180, "compile_local"),
    Step("resume_deterministic", 300, "resume", {"only_gpu": True}, {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}),
)


def command(step: Step, limit: float, options: argparse.Namespace) -> list[str]:
    """The process of a step, which writes an object of JSON per line to NAME.jsonl in the folder of work."""
    small = ["--small"] if options.small else []
    return [sys.executable, "-u", "-m", "benchmarks.device_steps", step.name, "--work", str(options.work),
            "--seconds", f"{limit:.0f}", *small]  # fmt: skip


class Session:
    """Steps that are done and that run, and the file that says so."""

    def __init__(self, options: argparse.Namespace, steps: tuple[Step, ...]):
        self.options, self.steps = options, steps
        self.started = time.monotonic()
        self.results: dict[str, dict[str, Any]] = {}
        self.running: dict[str, subprocess.Popen] = {}
        self.lock = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.options.budget - (time.monotonic() - self.started)

    @property
    def facts(self) -> dict[str, Any]:
        """What the step of that name has found so far."""
        return self.results.get("facts", {}).get("found", {})

    @property
    def path(self) -> pathlib.Path:
        """The file, named after the device as soon as that is known."""
        kind = self.facts.get("device", "unknown device")
        return self.options.out / f"device_{re.sub(r'[^a-z0-9]+', '_', kind.lower())}.json"

    def report(self, name: str, **result: Any) -> None:
        """Adds to the result of a step, and writes the file."""
        with self.lock:
            unnamed = self.path
            self.results.setdefault(name, {}).update(result)
            order = [name for name in ("install", *(step.name for step in self.steps)) if name in self.results]
            content = {
                "commit": self.facts.get("commit"),
                "device": self.facts.get("device"),
                "small": self.options.small,
                "budget_seconds": self.options.budget,
                "seconds": time.monotonic() - self.started,
                "steps": {name: self.results[name] for name in order},
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.path.with_suffix(".tmp")
            scratch.write_text(json.dumps(content, indent=1) + "\n")
            scratch.replace(self.path)
            if unnamed != self.path:
                unnamed.unlink(missing_ok=True)

    def install(self, wheels: pathlib.Path) -> None:
        """Installs what is missing, for this process and those it starts."""
        started, site = time.monotonic(), self.options.work / "site"
        result = install(wheels, site)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        self.report("install", **result, seconds=time.monotonic() - started)
        print(row("install", self.results["install"]), flush=True)

    def run(self, step: Step) -> None:
        """Runs a step to its end or its limit."""
        limit = min(step.seconds * (PATIENCE if self.options.small else 1), self.left)
        if limit < LEAST:
            self.report(step.name, status="skipped", reason=f"{max(self.left, 0):.0f} s of the budget were left")
            return
        work = self.options.work
        work.mkdir(parents=True, exist_ok=True)
        out, log = work / f"{step.name}.jsonl", work / f"{step.name}.log"
        out.write_text("")
        self.report(step.name, status="running")
        # Several processes share the device's memory; one alone may have nearly all of it.
        memory = {"MEM_FRACTION": "0.92"} if step.alone else {"PREALLOCATE": "false"}
        environment = os.environ | {f"XLA_PYTHON_CLIENT_{k}": v for k, v in memory.items()} | step.environment
        started, stopped = time.monotonic(), False
        with log.open("w") as file:
            process = subprocess.Popen(
                command(step, limit, self.options), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=ROOT, env=environment, process_group=0,
            )  # fmt: skip
            self.running[step.name] = process
            said = ""
            while process.poll() is None:
                time.sleep(0.2)
                if (now := out.read_text()) != said:
                    said = now
                    self.report(step.name, found=parsed(said))
                if not stopped and time.monotonic() - started > limit:
                    stopped = True
                    end(process)
            del self.running[step.name]
        found = parsed(out.read_text())
        result: dict[str, Any] = {"status": "passed"}
        if stopped:
            result = {"status": "stopped", "reason": f"after {limit:.0f} s", "output": tail(log)}
        elif process.returncode:
            result = {"status": "failed", "exit_status": process.returncode, "output": tail(log)}
        elif "skip" in found:
            result = {"status": "skipped", "reason": found["skip"]}
        self.report(step.name, **result, seconds=time.monotonic() - started, found=found)
        print(row(step.name, self.results[step.name]), flush=True)

    def run_all(self) -> None:
        """Runs the steps in their order, side by side where they may."""
        for alone, steps in itertools.groupby(self.steps, key=lambda step: step.alone):
            with concurrent.futures.ThreadPoolExecutor(1 if alone else self.options.jobs) as pool:
                list(pool.map(self.run, steps))

    def terminate(self, *_: Any) -> None:
        """Ends what runs, and this process."""
        for process in list(self.running.values()):
            end(process)
        os._exit(143)


def install(wheels: pathlib.Path, site: pathlib.Path) -> dict[str, Any]:
    """Installs into a folder those wheels that are missing or too old beside what is installed; JAX stays as it is.

    pip says which they are; where it finds no answer, those are taken of which there is no version.

    Returns:
        The result of a step: its `status`, and as `found` the names of the `packages`.
    """
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-index"]
    installed = {canonical(one.name): one.version for one in importlib.metadata.distributions()}
    found, report = site / "found.txt", site / "report.json"
    found.write_text("".join(f"{name}=={installed[name]}\n" for name in ("jax", "jaxlib") if name in installed))
    asked = subprocess.run(
        [*pip, "--dry-run", f"--find-links={wheels}", f"--constraint={found}", f"--report={report}",
         f"--requirement={wheels / 'requirements.txt'}"], capture_output=True, text=True,
    )  # fmt: skip
    if asked.returncode == 0:
        chosen = [one["download_info"]["url"] for one in json.loads(report.read_text())["install"]]
        files = [wheels / unquote(url.rpartition("/")[2]) for url in chosen]
    else:
        files = [path for path in wheels.glob("*.whl") if canonical(path.name.split("-")[0]) not in installed]
    put = [*pip, "--quiet", "--no-deps", "--no-compile", f"--target={site}", *map(str, files)]
    failed = [asked] * (asked.returncode != 0)
    if files and (done := subprocess.run(put, capture_output=True, text=True)).returncode:
        failed.append(done)
    names = sorted(path.name.split("-")[0] for path in files)
    result = {"status": "passed", "found": {"packages": names, "summary": f"{len(names)} packages"}}
    return result | ({"status": "failed", "output": "".join(one.stderr for one in failed)[-TAIL:]} if failed else {})


def canonical(name: str) -> str:
    """A package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def end(process: subprocess.Popen) -> None:
    """Stops a process and what it started: asks first."""
    for how, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, how)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def parsed(lines: str) -> dict[str, Any]:
    """What the complete lines of a step say, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for line in lines.splitlines(keepends=True):
        if line.endswith("\n"):
            result |= json.loads(line)
    return result


def tail(log: pathlib.Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-TAIL:]


def row(name: str, result: dict[str, Any]) -> str:
    """A step in one line."""
    seconds = f"{result['seconds']:6.0f} s" if "seconds" in result else " " * 8
    said = result.get("reason") or result.get("found", {}).get("summary", "")
    return f"{name:22s} {result['status']:8s} {seconds}  {said}"


def folder(text: str) -> pathlib.Path:
    """A folder of the command line; steps run in another one."""
    return pathlib.Path(text).resolve()


def main() -> int:
    """Command line."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="benchmarks/device.sh", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--wheels", type=folder, metavar="FOLDER", help="packages of `make wheels`: what is "
                        "missing here is installed into the folder of work, without network")  # fmt: skip
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (default %(default)s)")
    parser.add_argument("--out", type=folder, default=ROOT / "benchmarks" / "results", help="folder of the JSON "
                        "file, which is named after the device (default benchmarks/results)")  # fmt: skip
    parser.add_argument("--work", type=folder, default=ROOT / "build" / "device", help="folder of logs and runs "
                        "(default build/device)")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="small sizes and more patience: a rehearsal on "
                        "a CPU")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=names, default=names, help=", ".join(names))
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=max(1, min(6, cores // 2 - 1)), help="steps side by side where "
                        "nothing is timed (default: by cores, here %(default)s)")  # fmt: skip
    options = parser.parse_args()
    session = Session(options, tuple(step for step in STEPS if step.name in options.only))
    signal.signal(signal.SIGTERM, session.terminate)
    signal.signal(signal.SIGINT, session.terminate)
    if options.wheels:
        session.install(options.wheels)
    session.run_all()
    print(f"\n{session.path}: {time.monotonic() - session.started:.0f} s")
    for name, result in session.results.items():
        print(row(name, result))
    return int(any(result["status"] in ("failed", "stopped") for result in session.results.values()))


if __name__ == "__main__":
    sys.exit(main())
