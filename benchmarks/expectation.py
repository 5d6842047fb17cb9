"""Shares of an H100's memory rate that our own run reached, of the bytes that `compile` counts for it.

python benchmarks/expectation.py     compiles the run's shapes for h100:1 (needs the extra gpu-aot) and writes
                                     benchmarks/results/expectation_135m_h100.json; `safe_rlhf_jax.aot.expectation` has
                                     the shares
"""

import json
import os
import pathlib
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).parent.parent
SIZES = "benchmarks/configs/rl_step_135m.yaml"
MEASURED = "benchmarks/results/device_nvidia_h100_80gb_hbm3.json"
RESULT = ROOT / "benchmarks/results/expectation_135m_h100.json"


def run_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """The tree of a config whose iteration has these sizes."""
    stage = {
        "name": "ppo_lag", "kind": "rl", "init_from": "preset:measured", "reward_model": "path:none",
        "cost_model": "path:none", "prompts": {"name": "none"}, "batch_size": sizes["batch_size"],
        "max_prompt_length": sizes["prompt_length"], "max_response_length": sizes["response_length"],
        "microbatches": sizes["microbatches"], "algorithm": {"minibatches": sizes["minibatches"]},
    }  # fmt: skip
    execution = {name: sizes["model"][name] for name in ("dtype", "scan_layers")}
    return {"workdir": "runs/measured", "assume": "measured", "execution": execution, "stages": [stage]}


def main() -> None:
    """Writes the shares."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from safe_rlhf_jax import config as cfg
    from safe_rlhf_jax.aot.compile import compile_stage
    from safe_rlhf_jax.compile import environment, topology_devices
    from safe_rlhf_jax.models.config import PRESETS

    sizes = yaml.safe_load((ROOT / SIZES).read_text())
    PRESETS["measured"] = {k: v for k, v in sizes["model"].items() if k not in ("dtype", "scan_layers")}
    config, devices = cfg.RunConfig.model_validate(run_config(sizes)), topology_devices("h100:1", 1)
    (program,) = compile_stage(config, config.stages[0], devices)["programs"]
    seconds = json.loads((ROOT / MEASURED).read_text())["steps"]["rl_135m"]["found"]["seconds"]
    phases = {
        phase: {
            "hbm_bytes": row["hbm_bytes"],
            "bound_seconds": row["projected_seconds"]["hbm"],
            "measured_seconds": seconds[phase],
            "share": row["projected_seconds"]["hbm"] / seconds[phase],
        }
        for phase, row in program["phases"].items()
    }
    found = {"sizes": SIZES, "measured": MEASURED, "topology": "h100:1", "environment": environment(devices)}
    RESULT.write_text(json.dumps(found | {"phases": phases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
