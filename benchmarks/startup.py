"""Times the start of a run: from the command to the first step of each stage of the quickstart, at two commits in turn.

    python benchmarks/startup.py --before COMMIT [--after HEAD] --json build/startup.json

Every stage takes a few steps. Each commit runs the config in an empty workdir, and again in that workdir without the
results of the stages: what a run costs that starts again with other settings. CPU seconds beside the wall's, since
other programs slow only the latter.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/quickstart.yaml"
FEW_STEPS = (
    "stages.sft.epochs=0.02", "stages.reward.epochs=0.005", "stages.cost.epochs=0.02", "stages.ppo_lag.steps=2",
    "stages.ppo.steps=2",
)  # fmt: skip


def measured(arguments: list[str]) -> dict[str, Any]:
    """Runs `train` in this process; returns its times, by stage, and what was compiled."""
    begun = time.time(), time.process_time()
    import jax

    from safe_rlhf_jax import loop, stages, train

    marks: list[tuple[str, str, float, float]] = []
    compiled = {"programs": 0, "from_disk": 0, "seconds": 0.0}

    def mark(stage: str, what: str) -> None:
        marks.append((stage, what, time.time() - begun[0], time.process_time() - begun[1]))

    def count(event: str, **_: Any) -> None:
        compiled["from_disk"] += event == "/jax/compilation_cache/cache_hits"

    def add(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled["programs"] += 1
            compiled["seconds"] += seconds

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(add)
    push, run_stage = loop.Log.push, stages.run_stage

    def first_push(log: Any, step: int, metrics: Any, *rest: Any) -> None:
        if step == 1:
            jax.block_until_ready(metrics)
            mark(log.stage.name, "first step")
        push(log, step, metrics, *rest)

    def whole_stage(run: Any, stage: Any) -> None:
        mark(stage.name, "begins")
        run_stage(run, stage)
        mark(stage.name, "ends")

    loop.Log.push, stages.run_stage = first_push, whole_stage  # type: ignore[method-assign]
    mark("command", "imports")
    if train.main(arguments):
        raise SystemExit("the run failed")
    at = {(stage, what): (wall, cpu) for stage, what, wall, cpu in marks}
    first = marks[1]  # the first stage begins
    found: dict[str, Any] = {"command to imports": at["command", "imports"], "command to first stage": first[2:]}
    for stage, what in at:
        if what == "begins":
            end = (stage, "first step") if (stage, "first step") in at else (stage, "ends")
            found[f"{stage} to {end[1]}"] = tuple(b - a for a, b in zip(at[stage, what], at[end], strict=True))
    found["whole run"] = marks[-1][2:]
    times = {name: {"wall": round(wall, 1), "cpu": round(cpu, 1)} for name, (wall, cpu) in found.items()}
    compiled["seconds"] = round(compiled["seconds"], 1)
    return {"device": jax.devices()[0].device_kind, "seconds": times, "compiled": compiled}


def run_of(tree: pathlib.Path, workdir: pathlib.Path, config: str, few: list[str]) -> dict[str, Any]:
    """Runs the config of a checkout in a process of its own."""
    out = workdir.with_suffix(".json")
    command = [sys.executable, __file__, "--measure", str(out), "--config", str(tree / config)]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with open(workdir.with_suffix(".log"), "w") as log:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tree), environment.get("PYTHONPATH")]))
        subprocess.run([*command, f"workdir={workdir}", *few], env=environment, stdout=log, stderr=log, check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def machine() -> dict[str, Any]:
    """Returns versions and hardware, without a use of JAX, which would take the device from the runs."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return {"jax": importlib.metadata.version("jax"), "cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def checkout(given: str) -> tuple[str, bytes]:
    """Returns the name of a commit, and its files as a tar; on a machine without git, of COMMIT.tar."""
    if given.endswith(".tar"):
        return pathlib.Path(given).stem, pathlib.Path(given).read_bytes()
    name = subprocess.check_output(["git", "rev-parse", given], cwd=ROOT, text=True).strip()
    return name, subprocess.check_output(["git", "archive", name], cwd=ROOT)


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--measure"]:
        pathlib.Path(sys.argv[2]).write_text(json.dumps(measured(sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="COMMIT", help="or COMMIT.tar")
    parser.add_argument("--after", default="HEAD", metavar="COMMIT", help="or COMMIT.tar")
    parser.add_argument("--config", default=CONFIG, help="another config, whose stages are as short as it says")
    parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    few = list(FEW_STEPS) if options.config == CONFIG else []
    result: dict[str, Any] = {
        "machine": machine(),
        "config": options.config,
        "overrides": few,
        "commits": {},
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for side in ("before", "after"):
            result["commits"][side], tree = checkout(getattr(options, side))
            (folder / side).mkdir()
            subprocess.run(["tar", "x", "-C", str(folder / side)], input=tree, check=True)
        for turn in ("first", "again"):
            for side in ("before", "after"):
                workdir = folder / f"run_{side}"
                for stage in workdir.glob("*/result.json"):
                    shutil.rmtree(stage.parent)
                found = run_of(folder / side, workdir, options.config, few)
                result["runs"][f"{side}, {turn}"] = found
                print(f"{side}, {turn}:", json.dumps(found), flush=True)
                options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
