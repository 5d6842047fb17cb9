"""What benchmarks/device.sh does when a step fails, hangs or finds no time, and what it installs."""

import argparse
import inspect
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import device, wheels
from benchmarks.device import STEPS, Session, Step

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs steps that are lines of Python, which write to `out`; returns the file's contents and its name."""

    def start(programs, *, budget=100.0, jobs=1, limit=60.0, alone=()):
        def command(step, *_):
            prelude = f"out = open({str(tmp_path / step.name)!r} + '.jsonl', 'a', buffering=1)\n"
            return [sys.executable, "-c", prelude + programs[step.name]]

        monkeypatch.setattr(device, "command", command)
        steps = tuple(Step(name, limit, "", alone=name in alone) for name in programs)
        options = argparse.Namespace(budget=budget, out=tmp_path, work=tmp_path, jobs=jobs, small=False)
        Session(options, steps).run_all()
        (path,) = tmp_path.glob("device_*.json")
        return json.loads(path.read_text())["steps"], path.name

    return start


def test_a_step_that_fails_is_reported_with_its_output_and_the_rest_goes_on(run):
    steps, name = run({
        "facts": 'print(\'{"device": "NVIDIA H100 80GB HBM3"}\', file=out)',
        "bad": 'print(\'{"seconds": 1}\', file=out); raise ValueError("no such kernel")',
        "good": 'print(\'{"rate": 2, "summary": "two"}\', file=out)',
    })  # fmt: skip
    assert name == "device_nvidia_h100_80gb_hbm3.json"
    assert [step["status"] for step in steps.values()] == ["passed", "failed", "passed"]
    assert steps["bad"]["found"] == {"seconds": 1}  # of its own
    assert steps["bad"]["seconds"] != 1
    assert "ValueError: no such kernel" in steps["bad"]["output"]
    assert steps["good"]["found"] == {"rate": 2, "summary": "two"}


def test_a_step_is_stopped_at_its_limit_and_keeps_what_it_said(run, monkeypatch):
    monkeypatch.setattr(device, "LEAST", 0.0)
    steps, _ = run({"hangs": "print('{\"rate\": 1}', file=out)\nimport time\ntime.sleep(600)", "next": ""}, limit=2.0)
    assert steps["hangs"]["status"] == "stopped"
    assert steps["hangs"]["found"] == {"rate": 1}
    assert steps["next"]["status"] == "passed"


def test_steps_beyond_the_budget_are_skipped(run):
    steps, name = run({"one": "", "two": ""}, budget=device.LEAST / 2)
    assert name == "device_unknown_device.json"
    assert [step["status"] for step in steps.values()] == ["skipped"] * 2
    assert "of the budget" in steps["one"]["reason"]


def test_a_step_that_cannot_run_here_is_skipped_with_its_reason(run):
    steps, _ = run({"one": 'print(\'{"skip": "needs a GPU"}\', file=out)'})
    assert (steps["one"]["status"], steps["one"]["reason"]) == ("skipped", "needs a GPU")


def test_nothing_runs_beside_a_step_that_is_alone(run, tmp_path):
    """Two steps wait for each other, so they run side by side; the second goes on when the first has ended."""
    beside = f"""import pathlib, time
folder, name = pathlib.Path({str(tmp_path)!r}), {{name!r}}
(folder / name).with_suffix(".began").touch()
while len(list(folder.glob("*.began"))) < 2: time.sleep(0.01)
time.sleep({{seconds}})
(folder / name).with_suffix(".ended").touch()
"""
    programs = {name: beside.format(name=name, seconds=seconds) for name, seconds in (("first", 0), ("second", 2))}
    programs["alone"] = f"import pathlib\nassert len(list(pathlib.Path({str(tmp_path)!r}).glob('*.ended'))) == 2"
    steps, _ = run(programs, jobs=2, alone=("alone",))
    assert [step["status"] for step in steps.values()] == ["passed"] * 3


def test_every_step_is_a_function_that_takes_its_arguments():
    from benchmarks import device_steps

    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        signature = inspect.signature(getattr(device_steps, step.function))
        signature.bind(argparse.Namespace(), **step.arguments)
        if step.function == "rl":
            assert device_steps.spec_of(step.arguments["config"], small=False)["model"]
    asked = {"facts", "parity", "attention", "sampler_gap", "rl", "quickstart", "machinery", "resume", "chat"}
    assert asked <= {step.function for step in STEPS}


def test_tests_that_are_steps_exist():
    from benchmarks.device_steps import MACHINERY

    for file, chosen in MACHINERY.items():
        text = (ROOT / file).read_text()
        words = set(chosen.replace("(", " ").replace(")", " ").split()) - {"or", "and"}
        assert all(word in text for word in words), (file, words)


def test_comparisons_are_measured_and_counted_instead_of_raised():
    from benchmarks.device_steps import Comparisons

    plugin = Comparisons(None)
    plugin.test = "a"
    plugin.assert_allclose(np.ones(4), np.ones(4) + 1e-6, rtol=1e-5, atol=1e-5)
    plugin.assert_allclose([2.0], [1.0], rtol=1e-5)
    row = plugin.found["a"]
    assert (row["largest"], row["relative"], row["comparisons"], row["beyond"]) == (1.0, 1.0, 2, 1)
    plugin.assert_allclose([np.nan], [1.0])
    assert plugin.found["a"]["beyond"] == 2
    assert np.isnan(plugin.found["a"]["largest"])
    coarse = Comparisons(0.1)
    coarse.assert_allclose([1.05], [1.0], rtol=1e-5)
    coarse.assert_allclose([np.inf], [1.0])
    assert coarse.found[""]["beyond"] == 1


# --- installing -------------------------------------------------------------------------------------------------------


def write_wheel(folder, name, version, requires=()):
    info = f"{name}-{version}.dist-info"
    metadata = "".join(f"{line}\n" for line in ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}",
                                                *(f"Requires-Dist: {one}" for one in requires)))  # fmt: skip
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)


def installed(site):
    return {path.stem for path in site.glob("*.py")}


def test_what_is_missing_is_installed_and_the_jax_that_is_found_stays(tmp_path):
    write_wheel(tmp_path, "absent", "2.0", requires=["jax>=0.1", "needed"])
    write_wheel(tmp_path, "needed", "1.0")
    write_wheel(tmp_path, "numpy", "99.0")  # there is one already
    write_wheel(tmp_path, "jax", "99.0")
    (tmp_path / "requirements.txt").write_text("absent>=2\nnumpy>=1\n")
    result = device.install(tmp_path, tmp_path / "site")
    assert result["status"] == "passed", result
    assert result["found"]["packages"] == ["absent", "needed"]
    assert installed(tmp_path / "site") == {"absent", "needed"}


def test_what_pip_cannot_resolve_is_said_and_what_is_absent_is_installed_all_the_same(tmp_path):
    write_wheel(tmp_path, "absent", "2.0", requires=["nowhere"])
    write_wheel(tmp_path, "numpy", "99.0")
    (tmp_path / "requirements.txt").write_text("absent>=2\n")
    result = device.install(tmp_path, tmp_path / "site")
    assert result["status"] == "failed"
    assert "nowhere" in result["output"]
    assert installed(tmp_path / "site") == {"absent"}


def test_help_is_said_from_any_folder():
    script = ROOT / "benchmarks" / "device.sh"
    process = subprocess.run(
        ["bash", script, "--help"], capture_output=True, text=True, cwd="/", env=os.environ | {"PYTHON": sys.executable}
    )
    assert process.returncode == 0, process.stderr
    assert "--budget" in process.stdout


def test_script_passes_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the extra `dev`
    process = subprocess.run([shellcheck, ROOT / "benchmarks" / "device.sh"], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_packages_that_travel_are_locked_for_the_python_there_and_leave_jax_out(tmp_path):
    markers = wheels.target("3.12")
    names = wheels.needed([*wheels.roots().values()], {}, markers)
    assert {"flax", "pydantic-core", "grain", "pytest"} <= names
    assert not names & (wheels.FOUND | wheels.UNREAD)
    lock = wheels.locked(names, markers)
    lines = [line for line in lock.splitlines() if not line.startswith("    --hash=sha256:")]
    assert len(lines) == len(names)
    assert not any(";" in line for line in lines)
    assert "zipp" in names  # of an extra: etils[epath]
    assert "flax==0.12.8 " in wheels.locked(names, wheels.target("3.11"))
    assert "flax==0.12.8 " not in lock  # 3.11 has its own


def test_packages_that_are_there_stay_here_unless_they_are_too_old(tmp_path):
    (tmp_path / "present.txt").write_text("Orbax_Checkpoint==0.12.0\nflax==0.1\nrich  # any\n")
    there = wheels.present(tmp_path / "present.txt")
    assert there == {"orbax-checkpoint": "0.12.0", "flax": "0.1", "rich": ""}
    names = wheels.needed([*wheels.roots().values()], there, wheels.target("3.12"))
    assert "flax" in names
    assert not names & {"orbax-checkpoint", "rich"}
