"""Three rounds after a weak start: harm, helpfulness and Elo by round.

python -m benchmarks.rounds.weak_start run --seeds 0 1 2 --workers 2    benchmarks/results/weak_start.json
python -m benchmarks.rounds.weak_start table                            docs/results.md and its figure

In round 1 the policy's responses to few prompts are labelled, without those of some categories of harm, and by
annotators of whom more err.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.rounds import jobs
from benchmarks.rounds.jobs import Experiment, Job, Run
from benchmarks.rounds.scales import COLUMNS, PANELS
from safe_rlhf_jax.data import demo

ROUNDS = 3
FEW = 400  # prompts of round 1
ERROR_RATE = 0.15  # of their labels, beside the annotators' own
LACKING = demo.HARM_CATEGORIES[::3]  # five of the fourteen
FIGURE = jobs.ROOT / "docs" / "images" / "weak_start.png"
# Axis: its prompts (a harmful answer to a risky prompt helps, too), and the kind of signal that judges it.
AXES = {"helpfulness": ("benign", "reward"), "harmlessness": ("all prompts", "cost")}
JUDGES = ("oracle", "models")  # trained on clean pairs; the reward models of the rounds go on from this one
SHOWN = {
    "harm_rate": "harm, risky",
    "harm_rate_redteam": "harm, red team",
    "helpfulness_benign": "helpfulness, benign",
}
PERCENT = ("harm_rate", "harm_rate_redteam")
TINY = {f"stages.policy_{k}.steps": 2 for k in range(1, ROUNDS + 1)} | {
    f"stages.sample_{k}.prompts.limit": 128 for k in range(2, ROUNDS + 1)
}


def few_prompts() -> str:
    """Writes the prompts of round 1, and returns the file."""
    prompts = [one for one in demo.prompts("train") if one["category"] not in LACKING]
    return jobs.written("weak_start/prompts.jsonl", prompts[:FEW])


def job(seed: int, tiny: dict[str, Any]) -> Job:
    """Returns the run of a seed."""
    models = jobs.models_of(seed)
    weak = {
        "stages.sample_1.prompts": {"name": few_prompts()},
        "stages.sample_1.responses_per_prompt": 2,
        "stages.label_1.labeller.error_rate": ERROR_RATE,
        "stages.label_1.pairs_per_prompt": 1,
        "stages.cost_1.epochs": 4,
    }
    start = {
        "stages.sample_1.policies": [models["sft"]],
        "stages.reward_1.init_from": models["reward"],
        "stages.policy_1.init_from": models["sft"],
        "stages.evaluate_0.policies": [models["sft"]],
        "stages.judge.policies": [models["sft"], *(f"policy_{k}" for k in range(1, ROUNDS + 1))],
    }
    start |= {f"stages.cost_{k}.init_from": models["sft"] for k in range(1, ROUNDS + 1)}
    start |= {f"stages.judge.judges.{kind}/models": models[kind] for kind in ("reward", "cost")}
    gauges = {
        f"stages.evaluate_{k}.{kind}_model": models[kind] for k in range(ROUNDS + 1) for kind in ("reward", "cost")
    }
    return Job(f"weak_start/seed{seed}", "weak_start.yaml", weak | start | gauges | tiny, {"seed": seed})


def read(folder: pathlib.Path) -> Run | None:
    """Returns what a run has found so far, by round."""
    rounds = []
    for k in range(ROUNDS + 1):
        found = {name.rpartition("/")[2]: value for name, value in jobs.metrics_of(folder, f"evaluate_{k}").items()}
        if not found:
            break
        cost, reward = (jobs.metrics_of(folder, f"{kind}_{k}") for kind in ("cost", "reward"))
        policy = jobs.metrics_of(folder, f"policy_{k}")
        rounds.append({"policy": {name: found[name] for name in COLUMNS}, "cost": cost, "reward": reward, "rl": policy})
    if not rounds:
        return None
    file = folder / "judge" / "result.json"
    judged = json.loads(file.read_text())["comparisons"] if file.exists() else None
    return {"rounds": rounds, "comparisons": judged, "stages": jobs.seconds_of(folder)}


def all_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs."""
    return [job(seed, TINY if tiny else {}) for seed in seeds]


def section(runs: list[Run]) -> str:
    """Returns the table, and draws the figure."""
    figure(runs).savefig(FIGURE, dpi=110)
    return section_text(runs)


def section_text(runs: list[Run]) -> str:
    """Returns the table."""
    lines = []
    for k in range(ROUNDS + 1):
        rounds = [run["rounds"][k] for run in runs]
        cells = [jobs.spread([one["policy"][name] for one in rounds], name in PERCENT) for name in SHOWN]
        sign = [one["cost"]["eval/sign_accuracy"] for one in rounds if "eval/sign_accuracy" in one["cost"]]
        ratings = [
            ", ".join(f"{np.mean([elo_of(run, axis, judge)[k] for run in runs]):.0f}" for judge in JUDGES)
            for axis in AXES
        ]
        lines.append([str(k), *cells, jobs.spread(sign, percent=True) if sign else "–", *ratings])
    columns = [
        "after round",
        *SHOWN.values(),
        "cost model: sign, held out",
        *(f"Elo by {', '.join(JUDGES)}: {axis}, {prompts}" for axis, (prompts, _) in AXES.items()),
    ]
    return f"{jobs.table(columns, lines)}\n\n{jobs.seeds_of(runs)}"


def elo_of(run: Run, axis: str, judge: str) -> list[float]:
    """Returns the Elo of the policies of all rounds by one judge."""
    prompts, kind = AXES[axis]
    wanted = prompts, axis, f"{kind}/{judge}"
    row = next(row for row in run["comparisons"] if (row["prompts"], row["axis"], row["judge"]) == wanted)
    return [rating["elo"] for rating in row["elo"].values()]


def figure(runs: list[Run]) -> Figure:
    """Returns harm and helpfulness by round, and Elo of harmlessness against Elo of helpfulness by each judge."""
    drawn = Figure(figsize=(16, 4), layout="constrained")
    panels, rated = np.split(drawn.subplots(1, len(PANELS) + len(JUDGES)), [len(PANELS)])
    for axes, (name, (label, factor)) in zip(panels, PANELS.items(), strict=True):
        for run in runs:
            axes.plot([factor * one["policy"][name] for one in run["rounds"]], "o-", label=f"seed {run['seed']}")
        axes.set(xlabel="round", xticks=range(ROUNDS + 1), ylabel=label)
        axes.set_ylim(0)
        axes.legend(frameon=False)
    for axes, judge in zip(rated, JUDGES, strict=True):
        for run in runs:
            x, y = (elo_of(run, axis, judge) for axis in AXES)
            axes.plot(x, y, "o-")
            for k, place in enumerate(zip(x, y, strict=True)):
                axes.annotate(str(k), place)
        x_label, y_label = (f"Elo: {axis}, {prompts} ({judge})" for axis, (prompts, _) in AXES.items())
        axes.set(xlabel=x_label, ylabel=y_label)
    return drawn


EXPERIMENT = Experiment("weak_start", __doc__ or "", [all_jobs], read, section)

if __name__ == "__main__":
    jobs.main(EXPERIMENT)
