"""Several constraints at once: λ for each against a grid of fixed weights.

python -m benchmarks.rounds.several run --seeds 0 1 2 --workers 2    benchmarks/results/several.json
python -m benchmarks.rounds.several table                            docs/results.md

Two cost models know one half of the categories of harm each, and the scores of the second one are as trained, or ten
times as large, as those of a model from elsewhere may be. Every λ starts at 1 and follows its limit, calibrated on
labelled data; fixed weights are the same program with each λ held where it starts.
"""

import functools
import itertools
import json
import pathlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.rounds import jobs
from benchmarks.rounds.jobs import Experiment, Job, Run
from benchmarks.rounds.oracle import relabelled
from benchmarks.rounds.scales import scaled
from safe_rlhf_jax.data import demo

PAIRS = 8000
GROUPS = {"first": demo.HARM_CATEGORIES[:7], "second": demo.HARM_CATEGORIES[7:]}
SCALES = {"as trained": 1.0, "second × 10": 10.0}
WEIGHTS = (0.1, 1.0, 5.0)
CONSTRAINED = "λ"
METHODS: dict[str, tuple[float, float] | None] = {CONSTRAINED: None} | {
    f"ν = {first:g}, {second:g}": (first, second) for first, second in itertools.product(WEIGHTS, WEIGHTS)
}
HELD = 10**6  # iterations before a λ moves: more than there are
SHOWN = {"harm_first": True, "harm_second": True, "helpfulness_benign": False}  # name -> is a percentage
TINY = {"stages.policy.steps": 2, "stages.answers.responses_per_prompt": 1}


def labelled(pairs: Iterable[Any], group: str) -> Iterator[Any]:
    """Yields pairs by annotators to whom the other group's categories are acceptable."""
    rng = random.Random(f"several/{group}")
    acceptable = [category for other, categories in GROUPS.items() if other != group for category in categories]
    for pair in pairs:
        yield functools.reduce(lambda one, category: relabelled(one, category, rng), acceptable, pair)


def labels_file(group: str) -> str:
    """Writes the labels of a group, and returns the file."""
    return jobs.written(f"several/{group}.jsonl", labelled(demo.preference("train")[:PAIRS], group))


def cost_job(seed: int, files: dict[str, str], tiny: bool) -> Job:
    """Returns the run that trains the cost models of a seed."""
    settings: dict[str, Any] = {f"stages.{group}.init_from": jobs.models_of(seed)["sft"] for group in GROUPS}
    settings |= {f"stages.{group}.data.name": file for group, file in files.items()}
    settings |= {f"stages.{group}.data.limit": 256 for group in GROUPS if tiny}
    return Job(f"several/seed{seed}_costs", "several_costs.yaml", settings, {"seed": seed})


def job(seed: int, scale: str, method: str, files: dict[str, str], tiny: bool) -> Job:
    """Returns the run of a method on a scale."""
    models, costs = jobs.models_of(seed), cost_job(seed, files, tiny).name
    of = {group: f"path:{jobs.RUNS / costs / group / 'export'}" for group in GROUPS}
    settings: dict[str, Any] = {
        "stages.policy.init_from": models["sft"],
        "stages.policy.reward_model": models["reward"],
        "stages.policy.cost_models.first": of["first"],
        "stages.policy.cost_models.second": scaled(of["second"], SCALES[scale], 0.0),
    }
    limits = {group: f"stages.policy.algorithm.constraints.{group}" for group in GROUPS}
    settings |= {f"{limits[group]}.cost_limit.data.name": file for group, file in files.items()}
    for limit, weight in zip(limits.values(), METHODS[method] or (), strict=False):
        settings |= {f"{limit}.init": weight, f"{limit}.delay": HELD}
    name = f"several/seed{seed}_{list(SCALES).index(scale)}_{list(METHODS).index(method)}"
    return Job(
        name, "several.yaml", settings | (TINY if tiny else {}), {"seed": seed, "scale": scale, "method": method}
    )


def cost_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs that train the cost models; none where they are made."""
    files = {group: labels_file(group) for group in GROUPS}
    found = [cost_job(seed, files, tiny) for seed in seeds]
    return [one for one in found if not all(map(one.has_stage, GROUPS))]


def all_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs, those that tell most first: λ, then the same weight for both, then the rest of the grid."""
    files = {group: str(jobs.RUNS / f"several/{group}.jsonl") for group in GROUPS}
    methods = sorted(METHODS, key=lambda method: len(set(METHODS[method] or ())))
    return [job(seed, scale, method, files, tiny) for method in methods for scale in SCALES for seed in seeds]


def readings(folder: pathlib.Path) -> dict[str, float]:
    """Returns the oracle's readings of the responses of a sample stage."""
    harmful: dict[str, list[bool]] = {group: [] for group in GROUPS}
    helpful = []
    for line in (folder / "data.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["prompt_source"] == "benign":
            helpful += [demo.helpfulness(record["prompt"][0]["content"], text) for text in record["responses"]]
        for group, categories in GROUPS.items():
            if record["prompt_source"] == "risky" and record["category"] in categories:
                harmful[group] += [demo.harm(text).is_harmful for text in record["responses"]]
    found = {f"harm_{group}": float(np.mean(values)) for group, values in harmful.items()}
    return found | {"helpfulness_benign": float(np.mean(helpful))}


def read(folder: pathlib.Path) -> Run | None:
    """Returns the result of a run."""
    if not (folder / "answers" / "result.json").exists():
        return None
    metrics = readings(folder / "answers") | jobs.metrics_of(folder, "policy")
    return {"metrics": metrics, "stages": jobs.seconds_of(folder)}


def section(runs: list[Run]) -> str:
    """Returns the table."""
    lines = []
    for method in METHODS:
        cells = [method]
        for scale in SCALES:
            found = [run["metrics"] for run in runs if (run["scale"], run["method"]) == (scale, method)]
            shown = (jobs.spread([one[name] for one in found], percent) for name, percent in SHOWN.items() if found)
            cells.append("; ".join(shown) or "–")
        lines.append(cells)
    multipliers = [
        "; ".join(
            ", ".join(f"{run['metrics'][f'multiplier/{group}']:.3g}" for group in GROUPS)
            for run in runs
            if (run["scale"], run["method"]) == (scale, CONSTRAINED)
        )
        for scale in SCALES
    ]
    lines.append(["λ of both at the end, by seed", *multipliers])
    return f"{jobs.table(['', *SCALES], lines)}\n\n{jobs.seeds_of(runs)}"


EXPERIMENT = Experiment("several", __doc__ or "", [cost_jobs, all_jobs], read, section)

if __name__ == "__main__":
    jobs.main(EXPERIMENT)
