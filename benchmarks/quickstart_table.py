"""Gathers finished quickstart runs into one JSON file and a Markdown table.

python benchmarks/quickstart_table.py --json benchmarks/results/quickstart.json runs/seed0 runs/seed1 runs/seed2
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
import yaml
from rl_step import environment

from safe_rlhf_jax.data import demo
from safe_rlhf_jax.metrics import read_jsonl

COLUMNS = {
    "harm_rate": "harm, risky",
    "harm_rate_redteam": "harm, red team",
    "helpfulness_benign": "helpfulness, benign",
    "helpfulness_risky": "helpfulness, risky",
    "refusal_benign": "benign refused",
    "reward_mean": "mean reward",
    "cost_mean": "mean cost",
    "kl_mean": "KL, nats",
    "truncation_rate": "truncated",
}


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a run left in its folders."""
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}
    metrics = results["evaluate"]["metrics"]
    steps = read_jsonl(folder / "ppo_lag" / "metrics.jsonl")
    multipliers = np.array([record["train/multiplier"] for record in steps if "train/multiplier" in record])
    last = multipliers[-len(multipliers) // 10 :]
    return {
        "seed": yaml.safe_load((folder / "evaluate" / "config.yaml").read_text())["seed"],
        "policies": {p: {c: metrics[f"{p}/{c}"] for c in COLUMNS} for p in ("sft", "ppo_lag", "ppo")},
        "reward_accuracy": results["reward"]["metrics"]["eval/accuracy"],
        "cost_accuracy": results["cost"]["metrics"]["eval/accuracy"],
        "cost_sign_accuracy": results["cost"]["metrics"]["eval/sign_accuracy"],
        "cost_limit": results["ppo_lag"]["cost_limit"],
        "cost_limit_source": results["ppo_lag"]["cost_limit_source"],
        "final_mean_cost": [r["train/mean_cost"] for r in steps if "train/mean_cost" in r][-1],
        "multiplier": {
            "highest": float(multipliers.max()),
            "final": float(multipliers[-1]),
            "variation_last_tenth": float(last.std() / last.mean()),
        },
        "seconds": {name: result["seconds"] for name, result in results.items()},
    }


def markdown(runs: list[dict[str, Any]]) -> str:
    """Returns the tables."""
    lines = ["| seed | policy | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for run in runs:
        for policy, values in run["policies"].items():
            cells = [f"{100 * v:.1f} %" if c in PERCENT else f"{v:.2f}" for c, v in values.items()]
            lines.append(f"| {run['seed']} | {policy} | " + " | ".join(cells) + " |")
    heads = (
        "seed",
        "reward ranking",
        "cost ranking",
        "cost sign",
        "limit d",
        "final J_C",
        "λ highest → final",
        "seconds",
    )
    lines += ["", "| " + " | ".join(heads) + " |"]
    lines.append("|---" * 8 + "|")
    for run in runs:
        m = run["multiplier"]
        lines.append(
            f"| {run['seed']} | {run['reward_accuracy']:.3f} | {run['cost_accuracy']:.3f} | "
            f"{run['cost_sign_accuracy']:.3f} | {run['cost_limit']:.3f} | {run['final_mean_cost']:.3f} | "
            f"{m['highest']:.2f} → {m['final']:.2f} | {sum(run['seconds'].values()):.0f} |"
        )
    return "\n".join(lines)


PERCENT = ("harm_rate", "harm_rate_redteam", "refusal_benign", "truncation_rate")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of finished runs")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    runs = sorted((read_run(folder) for folder in options.runs), key=lambda run: run["seed"])
    ceiling = demo.annotator_accuracy(demo.preference("test"))
    if options.json:
        result = {"environment": environment(), "annotators": ceiling, "runs": runs}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(runs))
    print(f"\nannotators: {json.dumps({k: round(v, 3) for k, v in ceiling.items()})}")


if __name__ == "__main__":
    main()
