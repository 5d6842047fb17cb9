"""Trains every algorithm on the embedded world over several seeds, and writes the table and the Pareto plot.

python benchmarks/comparison.py run --seeds 0 1 2     trains configs/comparison.yaml in runs/comparison/seedN
python benchmarks/comparison.py table                 docs/results.md, its figure, benchmarks/results/comparison.json

A run that was killed goes on where it was; so does one whose config has got another stage.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from rl_step import environment

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "comparison.yaml"
RUNS = ROOT / "runs" / "comparison"
RESULT = ROOT / "benchmarks" / "results" / "comparison.json"
PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "images" / "comparison.png"

COLUMNS = {
    "harm_rate": "harm, risky",
    "harm_rate_redteam": "harm, red team",
    "helpfulness_benign": "helpfulness, benign",
    "helpfulness_risky": "helpfulness, risky",
    "refusal_benign": "benign refused",
    "cost_mean": "mean cost",
    "kl_mean": "KL, nats",
}
PERCENT = ("harm_rate", "harm_rate_redteam", "refusal_benign")
# family -> (colour, which policies), in the order of the table; a policy belongs to the first that matches
FAMILIES = {
    "starting point": ("#8a8a8a", r"sft"),
    "without training": ("#000000", r"sft, best of \d+"),
    "from pairs": ("#56B4E9", r"dpo|sacpo|p_sacpo|safe_dpo|lagrangian_dpo"),
    "sampling and fine-tuning": ("#E69F00", r"rejection"),
    "on-policy, no constraint": ("#D55E00", r"ppo|p3o"),
    "reward shaping": ("#CC79A7", r"shaping_.*"),
    "on-policy, constrained": ("#0072B2", r".*"),
}
MARKERS = "osD^v<>PX*hp"  # of the policies of a family


def family_of(policy: str) -> str:
    """Returns the family of a policy."""
    return next(name for name, (_, pattern) in FAMILIES.items() if re.fullmatch(pattern, policy))


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a run left: figures by policy, seconds by stage, and the λ that dual found."""
    results = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))}
    metrics = results["evaluate"]["metrics"]
    policies = [name.removesuffix("/harm_rate") for name in metrics if name.endswith("/harm_rate")]
    return {
        "seed": yaml.safe_load((folder / "evaluate" / "config.yaml").read_text())["seed"],
        "policies": {p: {c: metrics[f"{p}/{c}"] for c in COLUMNS if f"{p}/{c}" in metrics} for p in policies},
        "multipliers": {
            name: r["metrics"]["multiplier"] for name, r in results.items() if "multiplier" in r["metrics"]
        },
        "scorers": {
            name: {k: v for k, v in results[name]["metrics"].items() if k.endswith("accuracy")}
            for name in ("reward", "cost", "classifier")
        },
        "dual": results["dual"]["metrics"] if "dual" in results else None,
        "seconds": {name: result["seconds"] for name, result in results.items()},
    }


def collected(runs: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns {policy: {column: (mean, standard deviation over seeds)}}, by family."""
    names = sorted(runs[0]["policies"], key=lambda name: list(FAMILIES).index(family_of(name)))
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for name in names:
        columns = runs[0]["policies"][name]
        values = {column: np.array([run["policies"][name][column] for run in runs]) for column in columns}
        out[name] = {
            column: (float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0) for column, v in values.items()
        }
    return out


def markdown(runs: list[dict[str, Any]]) -> str:
    """Returns the table."""
    lines = [
        "| policy | " + " | ".join(COLUMNS.values()) + " | λ at the end | seconds |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for name, values in collected(runs).items():
        cells = [cell(column, *values[column]) if column in values else "–" for column in COLUMNS]
        multipliers = [run["multipliers"][name] for run in runs if name in run["multipliers"]]
        seconds = [run["seconds"][name] for run in runs if name in run["seconds"]]
        cells.append(", ".join(f"{value:.2f}" for value in multipliers) or "–")
        cells.append(f"{np.median(seconds):.0f}" if seconds else "–")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(column: str, mean: float, deviation: float) -> str:
    """Returns mean ± standard deviation as text."""
    return f"{100 * mean:.1f} ± {100 * deviation:.1f} %" if column in PERCENT else f"{mean:.2f} ± {deviation:.2f}"


def pareto(runs: list[dict[str, Any]]) -> Figure:
    """Returns helpfulness on benign prompts against harm on risky ones: all policies, and those with little harm."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    table = collected(runs)
    families = [family_of(name) for name in table]
    markers = [MARKERS[families[:i].count(family)] for i, family in enumerate(families)]
    for axes in (left, right):
        shaped = [values for name, values in table.items() if family_of(name) == "reward shaping"]
        line = np.array([[v["harm_rate"][0], v["helpfulness_benign"][0]] for v in shaped]).T
        axes.plot(100 * line[0], line[1], color=FAMILIES["reward shaping"][0], linewidth=1, linestyle=":", zorder=1)
        for (name, values), family, marker in zip(table.items(), families, markers, strict=True):
            (x, dx), (y, dy) = values["harm_rate"], values["helpfulness_benign"]
            axes.errorbar(
                100 * x, y, xerr=100 * dx, yerr=dy, color=FAMILIES[family][0], marker=marker, markersize=7,
                markeredgecolor="white", linewidth=0, elinewidth=0.8, label=name.replace("_", " "), alpha=0.85,
            )  # fmt: skip
        axes.grid(color="#e4e4e4", zorder=0)
        axes.set_xlabel("harm on risky prompts, % (oracle)")
        axes.spines[["top", "right"]].set_visible(False)
    right.set(xlim=(-0.4, 2.6), ylim=(0.56, 0.76))
    left.set_ylabel("helpfulness on benign prompts (oracle)")
    left.set_title("All policies: up and to the left is better", loc="left")
    right.set_title("The corner with little harm", loc="left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def train(seeds: list[int]) -> None:
    """Runs the comparison for every seed; stops at the first that fails."""
    for seed in seeds:
        overrides = [f"seed={seed}", f"workdir={RUNS / f'seed{seed}'}"]
        subprocess.run(
            [sys.executable, "-m", "safe_rlhf_jax.train", "--config", str(CONFIG), *overrides], check=True, cwd=ROOT
        )


def write(runs: list[dict[str, Any]]) -> None:
    """Writes the JSON, the figure and the table."""
    RESULT.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=2) + "\n")
    FIGURE.parent.mkdir(exist_ok=True)
    pareto(runs).savefig(FIGURE, dpi=110)
    hours = sum(sum(run["seconds"].values()) for run in runs) / 3600
    text = f"{markdown(runs)}\n\nAll stages of {len(runs)} seeds together: {hours:.1f} hours.\n"
    page = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- comparison -->\n", "<!-- /comparison -->"
    before, _, rest = page.partition(start)
    PAGE.write_text(before + start + text + end + rest.partition(end)[2], encoding="utf-8")
    print(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and evaluate")
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    commands.add_parser("table", help="write the table and the figure from finished runs")
    options = parser.parse_args()
    if options.command == "run":
        train(options.seeds)
        return
    finished = sorted(RUNS.glob("seed*/evaluate/result.json"))
    if not finished:
        parser.error(f"no finished run in {RUNS}: first `python benchmarks/comparison.py run`")
    write([read_run(path.parent.parent) for path in finished])


if __name__ == "__main__":
    main()
