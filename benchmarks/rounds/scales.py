"""Where a constraint beats a fixed weight: the cost model's scores on scales that are not known beforehand.

python -m benchmarks.rounds.scales run --seeds 0 1 2 --workers 2    benchmarks/results/scales.json
python -m benchmarks.rounds.scales table                            docs/results.md and its figure

The head of a trained cost model is multiplied and shifted. Each scale is met with the same settings: several fixed
weights ν, and λ with a limit that is calibrated on labelled data, and so moves with the scale.
"""

import json
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from benchmarks.rounds import jobs
from benchmarks.rounds.jobs import Experiment, Job, Run

# name -> (factor, shift) of the scores; a shift is as large as the gap between safe and unsafe responses
SCALES = {"0.1": (0.1, 0.0), "1": (1.0, 0.0), "10": (10.0, 0.0), "+5": (1.0, 5.0), "-5": (1.0, -5.0)}
WEIGHTS = (0.1, 0.5, 1.0, 5.0)
UNCONSTRAINED = {"kl_coeff": 0.1, "missing_eos_penalty": 3.0, "old_log_probs": "sampled", "minibatches": 2}
CALIBRATED, LIMIT_0 = "λ", "λ, limit 0"
SETTINGS = {"λ": {}, LIMIT_0: {"stages.policy.algorithm.lagrange.cost_limit": 0.0}} | {
    f"ν = {weight:g}": {"stages.policy.algorithm": {"name": "reward_shaping", "cost_weight": weight} | UNCONSTRAINED}
    for weight in WEIGHTS
}
COLUMNS = ("harm_rate", "harm_rate_redteam", "helpfulness_benign", "helpfulness_risky", "refusal_benign", "cost_mean")
TINY = {"stages.policy.steps": 2}
FIGURE = jobs.ROOT / "docs" / "images" / "scales.png"
PANELS = {
    "harm_rate": ("harm on risky prompts, % (oracle)", 100.0),
    "helpfulness_benign": ("helpfulness on benign prompts (oracle)", 1.0),
}
COLOURS = {CALIBRATED: "#0072B2"} | dict(
    zip([f"ν = {weight:g}" for weight in WEIGHTS], ("#F0C0DC", "#CC79A7", "#9A4A78", "#5A2244"), strict=True)
)


def scaled(model: str, factor: float, shift: float) -> str:
    """Returns a copy of a cost model whose scores are factor · score + shift."""
    source = pathlib.Path(model.removeprefix("path:"))
    copy = source.with_name(f"scaled_{factor:g}_{shift:+g}")
    tensors = load_file(jobs.ROOT / source / "model.safetensors")
    tensors["score_head.weight"] = np.float32(factor) * tensors["score_head.weight"]
    tensors["score_head.bias"] = np.float32(factor) * tensors["score_head.bias"] + np.float32(shift)
    shutil.copytree(jobs.ROOT / source, jobs.ROOT / copy, dirs_exist_ok=True)
    save_file(tensors, jobs.ROOT / copy / "model.safetensors", metadata={"format": "pt"})
    return f"path:{copy}"


def job(seed: int, scale: str, method: str, tiny: bool) -> Job:
    """Returns the run of a method on a scale."""
    models = jobs.models_of(seed)
    settings = {
        "stages.policy.init_from": models["sft"],
        "stages.policy.reward_model": models["reward"],
        "stages.policy.cost_model": scaled(models["cost"], *SCALES[scale]),
        "stages.evaluate.reward_model": models["reward"],
        "stages.evaluate.cost_model": models["cost"],
    }
    name = f"scales/seed{seed}_{scale}_{list(SETTINGS).index(method)}"
    about = {"seed": seed, "scale": scale, "method": method}
    return Job(name, "scales.yaml", settings | SETTINGS[method] | (TINY if tiny else {}), about)


def all_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs, those that tell most first: λ and every ν on three scales, then shifted scores."""
    methods = (CALIBRATED, "ν = 0.5", "ν = 1", "ν = 5", "ν = 0.1")
    multiplied = [(scale, method) for method in methods for scale in ("0.1", "10", "1")]
    shifted = [(scale, method) for method in (CALIBRATED, LIMIT_0, "ν = 0.5") for scale in ("+5", "-5")]
    return [job(seed, *one, tiny) for one in [*multiplied, *shifted, ("1", LIMIT_0)] for seed in seeds]


def read(folder: pathlib.Path) -> Run | None:
    """Returns the result of a run."""
    found = jobs.metrics_of(folder, "evaluate")
    if not found:
        return None
    policy = json.loads((folder / "policy" / "result.json").read_text())
    return {
        "metrics": {name: found[f"policy/{name}"] for name in COLUMNS} | policy["metrics"],
        "limit": policy.get("cost_limit"),
        "stages": jobs.seconds_of(folder),
    }


def section(runs: list[Run]) -> str:
    """Returns the table, and draws the figure."""
    figure(runs).savefig(FIGURE, dpi=110)
    return section_text(runs)


def section_text(runs: list[Run]) -> str:
    """Returns the table."""
    lines = []
    for method in SETTINGS:
        cells = [method]
        for scale in SCALES:
            found = [run["metrics"] for run in runs_of(runs, scale, method)]
            harm = jobs.spread([one["harm_rate"] for one in found], percent=True) if found else "–"
            helpful = jobs.spread([one["helpfulness_benign"] for one in found], percent=False) if found else ""
            cells.append(f"{harm}; {helpful}" if found else "–")
        lines.append(cells)
    names = [f"scores × {scale}" if shift == 0 else f"scores {scale}" for scale, (_, shift) in SCALES.items()]
    multipliers = [
        "; ".join(f"{run['limit']:.2f}, {run['metrics']['multiplier']:.3g}" for run in runs_of(runs, scale, CALIBRATED))
        for scale in SCALES
    ]
    lines.append(["calibrated limit d, λ at the end, by seed", *multipliers])
    return f"{jobs.table(['', *names], lines)}\n\n{jobs.seeds_of(runs)}"


def runs_of(runs: list[Run], scale: str, method: str) -> list[Run]:
    """Returns the runs of a method on a scale."""
    return [run for run in runs if (run["scale"], run["method"]) == (scale, method)]


def figure(runs: list[Run]) -> Figure:
    """Returns harm and helpfulness against the factor of the scores, a line for each method."""
    drawn = Figure(figsize=(11, 4.2), layout="constrained")
    factors = {scale: factor for scale, (factor, shift) in SCALES.items() if shift == 0}
    panels = zip(drawn.subplots(1, 2), PANELS.items(), strict=True)
    for axes, (name, (label, factor)) in panels:
        for method, colour in COLOURS.items():
            found = {x: [run["metrics"][name] for run in runs_of(runs, scale, method)] for scale, x in factors.items()}
            found = {x: factor * np.array(values) for x, values in found.items() if values}
            means = [values.mean() for values in found.values()]
            axes.plot(list(found), means, color=colour, label=method, linewidth=2.5 if method == CALIBRATED else 1.2)
            for x, values in found.items():
                axes.plot([x] * len(values), values, "o", color=colour, markersize=4, alpha=0.6)
        axes.set(xscale="log", xlabel="factor of the cost model's scores", ylabel=label)
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return drawn


EXPERIMENT = Experiment("scales", __doc__ or "", [all_jobs], read, section)

if __name__ == "__main__":
    jobs.main(EXPERIMENT)
