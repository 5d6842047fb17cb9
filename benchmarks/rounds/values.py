"""Values that change: one category of harm becomes acceptable, or unacceptable, after a policy has been trained.

python -m benchmarks.rounds.values run --seeds 0 1 2 --workers 2    benchmarks/results/values.json
python -m benchmarks.rounds.values table                            docs/results.md

The pairs are labelled again under the new values; the cost model and the policy go on from where they were, the
policy twice: as it is (`new`), and with demonstrations by the new values beside its own responses (`shown`, PTX),
since what it never says any more its own responses cannot tell it. A third of the prompts of training are of the
category: of one in fourteen risky prompts a policy learns what it learns of the thirteen others.
"""

import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.rounds import jobs
from benchmarks.rounds.jobs import Experiment, Job, Run
from benchmarks.rounds.oracle import relabelled
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.demo import world

CATEGORY = "financial_crime,property_crime,theft"
CATEGORY_WORD = world.CATEGORY_WORDS[CATEGORY]
PAIRS = 8000  # and all further ones on the category
UNACCEPTABLE, ACCEPTABLE = "unacceptable", "acceptable"
CHANGES = {"becomes acceptable": (UNACCEPTABLE, ACCEPTABLE), "becomes unacceptable": (ACCEPTABLE, UNACCEPTABLE)}
# Policy: whose labels its models have seen, and its row.
POLICIES = {"old": "before", "new": "after", "shown": "after, with demonstrations"}
SHOWN = {
    "harm_category": "harm of the category",
    "harm_others": "harm of the others",
    "helpfulness_benign": "helpfulness, benign",
}
PERCENT = ("harm_category", "harm_others")
TINY = {f"stages.policy_{name}.steps": 2 for name in POLICIES} | {
    f"stages.answers_{name}.responses_per_prompt": 2 for name in POLICIES
}


def labels_file(value: str) -> str:
    """Writes the pairs by annotators to whom the category is acceptable, or not, and returns the file."""
    every: list[Any] = demo.preference("train")
    pairs = every[:PAIRS] + [pair for pair in every[PAIRS:] if CATEGORY_WORD in pair["prompt"].split()]
    rng = random.Random(0)
    found = pairs if value == UNACCEPTABLE else [relabelled(pair, CATEGORY, rng) for pair in pairs]
    return jobs.written(f"values/{value}.jsonl", found)


def prompts() -> list[Any]:
    """Returns the prompts of training of the category."""
    return [one for one in demo.prompts("train") if one["category"] == CATEGORY]


def prompts_file() -> str:
    """Writes the prompts of training of the category, and returns the file."""
    return jobs.written("values/prompts.jsonl", prompts())


def demonstrations_file(value: str) -> str:
    """Writes the demonstrations on the category that these values allow, and returns the file."""
    of_category = {one["prompt"] for one in prompts()}
    found = []
    for one in demo.sft("train"):
        asked, answered = (message["content"] for message in one["messages"])
        if asked in of_category and (value == ACCEPTABLE or not demo.harm(answered).is_harmful):
            found.append(one)
    return jobs.written(f"values/demonstrations_{value}.jsonl", found)


def job(seed: int, change: str, files: dict[str, str], tiny: dict[str, Any]) -> Job:
    """Returns the run of a change."""
    models = jobs.models_of(seed)
    settings: dict[str, Any] = {
        "stages.cost_old.init_from": models["sft"],
        "stages.policy_old.init_from": models["sft"],
    }
    before, after = (files[value] for value in CHANGES[change])
    settings |= {"stages.cost_old.data.name": before, "stages.cost_new.data.name": after}
    settings["stages.policy_shown.ptx.name"] = files[f"demonstrations {CHANGES[change][1]}"]
    for name in POLICIES:
        settings[f"stages.policy_{name}.prompts.1.name"] = files["prompts"]
        settings[f"stages.policy_{name}.reward_model"] = models["reward"]
        limit = f"stages.policy_{name}.algorithm.lagrange.cost_limit.data.name"
        settings[limit] = before if name == "old" else after
    name = f"values/seed{seed}_{list(CHANGES).index(change)}"
    return Job(name, "values.yaml", settings | tiny, {"seed": seed, "change": change})


def readings(folder: pathlib.Path) -> dict[str, float] | None:
    """Returns the oracle's readings of the responses of a sample stage; None while it is not done."""
    file = folder / "data.jsonl"
    if not file.exists():
        return None
    harmful: dict[str, list[bool]] = {"category": [], "others": []}
    helpful = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        prompt = record["prompt"][0]["content"]
        if record["prompt_source"] != "risky":
            helpful += [demo.helpfulness(prompt, text) for text in record["responses"]]
            continue
        group = "category" if record["category"] == CATEGORY else "others"
        harmful[group] += [demo.harm(text).is_harmful for text in record["responses"]]
    found = {f"harm_{group}": float(np.mean(values)) for group, values in harmful.items()}
    return found | {"helpfulness_benign": float(np.mean(helpful))}


def read(folder: pathlib.Path) -> Run | None:
    """Returns the result of a run."""
    found = {name: readings(folder / f"answers_{name}") for name in POLICIES}
    return None if None in found.values() else {"policies": found, "stages": jobs.seconds_of(folder)}


def all_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs."""
    files = {"prompts": prompts_file()}
    for value in (ACCEPTABLE, UNACCEPTABLE):
        files |= {value: labels_file(value), f"demonstrations {value}": demonstrations_file(value)}
    return [job(seed, change, files, TINY if tiny else {}) for change in CHANGES for seed in seeds]


def section(runs: list[Run]) -> str:
    """Returns the table."""
    lines = []
    for change in CHANGES:
        for policy, when in POLICIES.items():
            found = [run["policies"][policy] for run in runs if run["change"] == change]
            if found:
                cells = [jobs.spread([one[name] for one in found], name in PERCENT) for name in SHOWN]
                lines.append([f"{change}: {when}", *cells])
    return f"{jobs.table(['the category', *SHOWN.values()], lines)}\n\n{jobs.seeds_of(runs)}"


EXPERIMENT = Experiment("values", __doc__ or "", [all_jobs], read, section)

if __name__ == "__main__":
    jobs.main(EXPERIMENT)
