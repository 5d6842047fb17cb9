"""What the RL stages of runs on the real model came to: curves in one JSON file, a table and a figure from it.

    python -m benchmarks.real.results SECTION collect FOLDER …   workdirs of runs, finished or not, such as runs/real/rl
    python -m benchmarks.real.results SECTION table              docs/real.md and its figure

A SECTION of the page has a JSON file and a figure of its own. NAME=FOLDER gives the stage of a workdir another name.
A run that was trained on another machine is collected with the facts of that machine: --trained-on "NVIDIA H100 80GB
HBM3, JAX 0.11.2".
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
PAGE = ROOT / "docs" / "real.md"
# Of each section: the name of its JSON file in benchmarks/results, and of its figure in docs/images.
SECTIONS = {
    "training": ("real_rl", "real_training"),
    "two-cores": ("real_two_cores", "real_two_cores"),
    "bfloat16": ("real_bfloat16", "real_bfloat16"),
}
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
STYLES = {  # of runs whose names begin so: colour and label
    "ppo_lag_64": ("#009E73", "PPO-Lagrangian, d = −1.4, window 64"),
    "ppo_lag_2": ("#0072B2", "PPO-Lagrangian, d = −2"),
    "ppo_lag_1.4": ("#56B4E9", "PPO-Lagrangian, d = −1.4"),
    "low_first": ("#009E73", "PPO-Lagrangian, λ ≤ 2, then 5"),
    "ppo_lag_5": ("#0072B2", "PPO-Lagrangian, λ ≤ 5"),
    "ppo_lag": ("#0072B2", "PPO-Lagrangian, d = −1"),
    "calibrated": ("#56B4E9", "PPO-Lagrangian, calibrated d"),
    "ppo": ("#D55E00", "PPO, no constraint"),
    "shaping": ("#CC79A7", "reward − cost"),
}


def style(run: str) -> tuple[str, str]:
    """Returns the colour and the label of a run."""
    return next(found for name, found in STYLES.items() if run.startswith(name))


def collected(folders: list[str], trained_on: str | None) -> dict[str, Any]:
    """Returns {environment, trained_on, runs} of workdirs; runs are their rl stages by name."""
    runs = {}
    for named in folders:
        name, _, folder = named.rpartition("=")
        for file in sorted(pathlib.Path(folder).glob("*/metrics.jsonl")):
            rows = read_jsonl(file)
            if any("train/kl" in row for row in rows):
                runs[name or file.parent.name] = curves(rows, file.parent / "result.json")
    about = {"environment": environment()} | ({"trained_on": trained_on} if trained_on else {})
    return about | {"runs": runs}


def curves(rows: list[dict[str, Any]], result_file: pathlib.Path) -> dict[str, Any]:
    """Returns what a stage's steps and evaluations show; the first and the last evaluation are in a finished result."""
    steps = {name: [round(row[f"train/{name}"], 4) for row in rows if f"train/{name}" in row] for name in FOLLOWED}
    stops = {row["step"]: row for row in rows if "eval/reward_mean" in row}
    facts = {}
    if result_file.exists():
        result = json.loads(result_file.read_text())
        stops = {0: result["start"], **stops, rows[-1]["step"]: result["metrics"]}
        facts = {name: result[name] for name in ("seconds", "cost_limit") if name in result}
    evaluations = [
        {"step": step} | {name: round(found[f"eval/{name}"], 4) for name in MEASURED} for step, found in stops.items()
    ]
    return facts | {"evaluations": evaluations, "steps": {k: v for k, v in steps.items() if v}}


def training_table(runs: dict[str, Any]) -> str:
    """Returns every evaluation on held-out prompts; what several runs share is there once."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, run in runs.items():
        for one in run["evaluations"]:
            cells = [f"{100 * one[k]:.1f} %" if k in PERCENT else f"{one[k]:.2f}" for k in MEASURED]
            lines.setdefault((str(one["step"]), *cells), [name, str(one["step"]), *cells])
    return table(["stage", "step", *MEASURED.values()], list(lines.values()))


def figure(runs: dict[str, Any]) -> Figure:
    """Returns own reward and own cost along training, and the judge's view over the root of KL."""
    drawn = Figure(figsize=(14, 3.8), layout="constrained")
    panels = drawn.subplots(1, 4)
    for run, one in runs.items():
        colour, label = style(run)
        labelled = label in [line.get_label() for line in panels[0].lines]
        for axes, name in zip(panels, ("reward", "cost"), strict=False):
            smooth = np.convolve(one["steps"][name], np.ones(5) / 5, mode="valid")
            axes.plot(np.arange(len(smooth)) + 3, smooth, color=colour, label=None if labelled else label)
            axes.set(xlabel="iteration", ylabel=f"own {name}, mean of five")
        found = one["evaluations"]
        roots = [max(at["kl_mean"], 0) ** 0.5 for at in found]
        for axes, name in zip(panels[2:], ("judge_unsafe_share", "judge_reward_mean"), strict=True):
            axes.plot(roots, [at[name] for at in found], "o-", color=colour)
    panels[2].set(xlabel="√KL, √nats", ylabel="unsafe by the MiniLM judge", ylim=(0, None))
    panels[3].set(xlabel="√KL, √nats", ylabel="reward by the MiniLM judge")
    for axes in panels:
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
    parser.add_argument("section", choices=SECTIONS, help="of docs/real.md")
    commands = parser.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect", help="write the JSON file from runs")
    collect.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER", help="workdirs")
    collect.add_argument("--trained-on", metavar="MACHINE", help="where they were trained, if not here")
    commands.add_parser("table", help="write docs/real.md and its figure from the JSON file")
    options = parser.parse_args()
    results, drawn = SECTIONS[options.section]
    file = ROOT / "benchmarks" / "results" / f"{results}.json"
    if options.command == "collect":
        found = collected(options.folders, options.trained_on)
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{file}: {len(found['runs'])} runs")
        return
    found = json.loads(file.read_text())
    figure(found["runs"]).savefig(ROOT / "docs" / "images" / f"{drawn}.png", dpi=100)
    related = "; ".join(f"{name} {correlation(run):.2f}" for name, run in found["runs"].items())
    text = f"{training_table(found['runs'])}\n\nCorrelation of own reward and own cost over the iterations: {related}."
    write_section(options.section, text, PAGE)


if __name__ == "__main__":
    main()
