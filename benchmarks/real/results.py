"""What the RL stages of a run on the real model came to: curves in one JSON file, a table and a figure from it.

    python -m benchmarks.real.results collect FOLDER    FOLDER is the run's workdir, such as runs/real/rl
    python -m benchmarks.real.results table             docs/real.md and its figure

A run that was trained on another machine is collected with the facts of that machine:
--trained-on "NVIDIA H100 80GB HBM3, JAX 0.11.2".
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.rl_step import environment
from benchmarks.rounds.jobs import table, write_section
from safe_rlhf_jax.metrics import read_jsonl

ROOT = pathlib.Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "real_rl.json"
PAGE = ROOT / "docs" / "real.md"
FIGURE = ROOT / "docs" / "images" / "real_training.png"
FOLLOWED = ("reward", "cost", "kl", "multiplier", "unsafe_share/risky")  # train/… of each step
MEASURED = {
    "reward_mean": "own reward",
    "cost_mean": "own cost",
    "judge_reward_mean": "MiniLM: reward",
    "judge_unsafe_share": "MiniLM: unsafe",
    "kl_mean": "KL, nats",
    "length_mean": "tokens",
    "distinct_2": "distinct-2",
    "refusal_rate": "refusals",
}
PERCENT = ("judge_unsafe_share", "refusal_rate")
COLOURS = {"ppo": "#D55E00", "shaping": "#CC79A7", "ppo_lag": "#0072B2", "calibrated": "#56B4E9"}
LABELS = {
    "ppo": "PPO, no constraint", "shaping": "reward − cost", "ppo_lag": "PPO-Lagrangian, d = −1",
    "calibrated": "PPO-Lagrangian, calibrated d",
}  # fmt: skip


def collected(folder: pathlib.Path, trained_on: str | None) -> dict[str, Any]:
    """Returns {environment, trained_on, runs} of a workdir; runs are its rl stages by name."""
    runs = {}
    for file in sorted(folder.glob("*/result.json")):
        result = json.loads(file.read_text())
        if result["kind"] != "rl":
            continue
        rows = read_jsonl(file.parent / "metrics.jsonl")
        steps = {name: [round(row[f"train/{name}"], 4) for row in rows if f"train/{name}" in row] for name in FOLLOWED}
        between = {row["step"]: row for row in rows if "eval/reward_mean" in row}
        stops = {0: result["start"], **between, rows[-1]["step"]: result["metrics"]}
        evaluations = [
            {"step": step} | {name: round(found[f"eval/{name}"], 4) for name in MEASURED}
            for step, found in stops.items()
        ]
        facts = {name: result[name] for name in ("seconds", "cost_limit") if name in result}
        runs[file.parent.name] = facts | {"evaluations": evaluations, "steps": {k: v for k, v in steps.items() if v}}
    about = {"environment": environment()} | ({"trained_on": trained_on} if trained_on else {})
    return about | {"runs": runs}


def training_table(runs: dict[str, Any]) -> str:
    """Returns the start and the end of every run on held-out prompts."""
    lines = []
    for name, run in runs.items():
        for one in (run["evaluations"][0], run["evaluations"][-1]):
            cells = [f"{100 * one[k]:.1f} %" if k in PERCENT else f"{one[k]:.2f}" for k in MEASURED]
            lines.append([name, str(one["step"]), *cells])
    return table(["stage", "step", *MEASURED.values()], lines)


def figure(runs: dict[str, Any]) -> Figure:
    """Returns own reward and own cost along training, and the judge's reward against KL."""
    drawn = Figure(figsize=(12, 3.8), layout="constrained")
    *panels, last = drawn.subplots(1, 3)
    for axes, name in zip(panels, ("reward", "cost"), strict=True):
        for run, one in runs.items():
            kind = run.removesuffix("_1")
            smooth = np.convolve(one["steps"][name], np.ones(5) / 5, mode="valid")
            axes.plot(
                np.arange(len(smooth)) + 3, smooth, color=COLOURS[kind], label=LABELS[kind] if run == kind else None
            )
        axes.set(xlabel="iteration", ylabel=f"own {name}, mean of five")
    for run, one in runs.items():
        found = one["evaluations"]
        roots = [max(at["kl_mean"], 0) ** 0.5 for at in found]
        last.plot(roots, [at["judge_reward_mean"] for at in found], "o-", color=COLOURS[run.removesuffix("_1")])
    last.set(xlabel="√KL, √nats", ylabel="reward by the MiniLM judge")
    for axes in (*panels, last):
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


def correlation(run: dict[str, Any]) -> float:
    """Returns the correlation of own reward and own cost over the iterations of a run."""
    return float(np.corrcoef(run["steps"]["reward"], run["steps"]["cost"])[0, 1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, metavar="FILE")
    commands = parser.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect", help="write the JSON file from a finished run")
    collect.add_argument("folder", type=pathlib.Path, help="the run's workdir")
    collect.add_argument("--trained-on", metavar="MACHINE", help="where it was trained, if not here")
    commands.add_parser("table", help="write docs/real.md and its figure from the JSON file")
    options = parser.parse_args()
    if options.command == "collect":
        found = collected(options.folder, options.trained_on)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{options.json}: {len(found['runs'])} runs")
        return
    found = json.loads(options.json.read_text())
    figure(found["runs"]).savefig(FIGURE, dpi=100)
    related = "; ".join(f"{name} {correlation(run):.2f}" for name, run in found["runs"].items())
    text = f"{training_table(found['runs'])}\n\nCorrelation of own reward and own cost over the iterations: {related}."
    write_section("training", text, PAGE)


if __name__ == "__main__":
    main()
