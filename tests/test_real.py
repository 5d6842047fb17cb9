"""The run of docs/real.md in small: a few steps of every stage of its configs, on the real model and the real data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
CONFIGS = ROOT / "configs" / "smollm2_135m"
FEW = {"batch_size": 4, "limit": 12, "eval_limit": 8, "steps": 2, "max_length": 192, "max_response_length": 8}

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


def command(folder, module, *arguments):
    """Runs a module of this repository in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/real/{model,data}; skips where the packages with the weights cannot be had."""
    if not (SHARED / "tools" / "real_model.py").is_file():
        pytest.skip("../shared/tools/real_model.py is not here")
    folder = tmp_path_factory.mktemp("real")
    prepared = command(folder, "benchmarks.real.prepare", "--shared", SHARED)
    if prepared.returncode:
        pytest.skip(f"the model cannot be had: {prepared.stderr.strip().splitlines()[-1]}")
    return folder


def cut(stage):
    """Returns a stage with few records, few steps and short texts."""
    stage = dict(stage)
    for field in ("batch_size", "steps", "max_length", "max_response_length"):
        if field in stage:
            stage[field] = FEW[field]
    for field in ("data", "prompts", "eval_data", "eval_prompts", "demonstrations"):
        parts = stage.get(field)
        limit = {"limit": FEW["eval_limit" if field.startswith("eval") else "limit"]}
        if parts is not None:
            stage[field] = [part | limit for part in parts] if isinstance(parts, list) else parts | limit
    if "lagrange" in stage.get("algorithm", {}):  # a cost model of a few steps reaches no limit of a trained one
        lagrange = stage["algorithm"]["lagrange"] | {"cost_limit": 0.0}
        stage["algorithm"] = stage["algorithm"] | {"lagrange": lagrange}
    if "pairs" in stage:
        stage["pairs"] = {kind: data | {"limit": FEW["limit"]} for kind, data in stage["pairs"].items()}
    return stage | ({"eval_every": 1} if "eval_every" in stage else {}) | ({"epochs": 1} if "epochs" in stage else {})


def run(folder, name):
    """Runs a config in small; returns {stage: result}."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config["stages"] = [cut(stage) for stage in config["stages"]]
    config["max_bad_records"] = 0.9  # most texts do not fit into so few tokens
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    process = command(folder, "safe_rlhf_jax.train", "--config", f"{name}.yaml")
    assert process.returncode == 0, process.stderr[-3000:]
    workdir = folder / config["workdir"]
    return {
        stage["name"]: json.loads((workdir / stage["name"] / "result.json").read_text()) for stage in config["stages"]
    }


def test_every_stage_of_the_run_goes_through_on_the_real_model(folder):
    judges = run(folder, "judge")
    assert judges.keys() == {"cost", "reward"}
    fitted = command(folder, "benchmarks.real.judge", "fit")
    assert fitted.returncode == 0, fitted.stderr[-3000:]
    results = run(folder, "safe_rlhf")
    metrics = results["evaluate"]["metrics"]
    assert any(name.endswith("/cost_mean") for name in metrics)
    assert (folder / "runs/real/run/evaluate/report.html").stat().st_size > 10_000
