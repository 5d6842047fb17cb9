"""What the quality of labels does to harm and helpfulness: wrong labels, and annotators who disagree.

python -m benchmarks.rounds.labels run --seeds 0 1 2 --workers 2    benchmarks/results/labels.json
python -m benchmarks.rounds.labels table                            docs/results.md

The same pairs of responses of the SFT policy are labelled by annotators who flip a share of their labels, and by groups
of five annotators who flip different shares; their votes count as a majority or as shares (soft labels). Of some
labels a share is audited: replaced by those of an annotator who flips none.
"""

import json
import pathlib
import random
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.rounds import jobs
from benchmarks.rounds.jobs import Experiment, Job, Run
from benchmarks.rounds.oracle import voted
from benchmarks.rounds.scales import COLUMNS, TINY
from benchmarks.rounds.weak_start import PERCENT, SHOWN

ERROR_RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
# Two annotators of five err seldom, one at times, and two are near chance.
GROUP = (0.05, 0.05, 0.2, 0.4, 0.45)
AUDITED = (0.1, 0.3)  # of labels 30 % of which are wrong


class Labels(NamedTuple):
    """How pairs are labelled, and how the labels are counted."""

    rates: tuple[float, ...]  # share of its labels that each annotator of a pair flips
    audited: float = 0.0  # share of the pairs that are labelled by an annotator who flips none instead
    shares: bool = False  # the votes count as shares, not as a majority

    @property
    def settings(self) -> dict[str, str]:
        """Of the run."""
        return {f"stages.{name}.labels": "shares" for name in ("reward", "cost") if self.shares}


LABELS = (
    {f"{rate:.0%} wrong": Labels((rate,)) for rate in ERROR_RATES}
    | {f"30% wrong, {share:.0%} audited": Labels((0.3,), share) for share in AUDITED}
    | {
        "five, majority": Labels(GROUP),
        "five, shares": Labels(GROUP, shares=True),
    }
)


def sample_job(seed: int, tiny: bool) -> Job:
    """Returns the run that samples the responses of a seed."""
    settings = {"stages.sample.policies": [jobs.models_of(seed)["sft"]]}
    limit = {"stages.sample.prompts.limit": 128} if tiny else {}
    return Job(f"labels/seed{seed}_samples", "samples.yaml", settings | limit, {"seed": seed})


def labels_file(samples: Job, labels: Labels) -> str:
    """Writes the pairs of a run that samples as annotators label them, and returns the file."""
    rates, audited = labels.rates, labels.audited
    rng, drawn = random.Random(f"{samples.name}/{rates}"), random.Random(f"{samples.name}/{audited}")
    pairs = map(json.loads, (samples.folder / "label" / "data.jsonl").read_text().splitlines())
    asked = (pair | {"prompt": pair["prompt"][0]["content"]} for pair in pairs)
    name = f"{samples.name}/labels_{'_'.join(map(str, rates))}_audited_{audited:g}.jsonl"
    return jobs.written(name, (voted(pair, (0.0,) if drawn.random() < audited else rates, rng) for pair in asked))


def job(seed: int, kind: str, tiny: bool) -> Job:
    """Returns the run with one kind of labels."""
    labels = LABELS[kind]
    file = labels_file(sample_job(seed, tiny), labels)
    models = jobs.models_of(seed)
    settings = {f"stages.{name}.init_from": models["sft"] for name in ("reward", "cost", "policy")}
    settings |= {f"stages.{name}.data.name": file for name in ("reward", "cost")}
    settings |= {"stages.policy.algorithm.lagrange.cost_limit.data.name": file}
    settings |= {f"stages.evaluate.{name}_model": models[name] for name in ("reward", "cost")}
    name = f"labels/seed{seed}_{list(LABELS).index(kind)}"
    return Job(name, "labels.yaml", settings | labels.settings | (TINY if tiny else {}), {"seed": seed, "labels": kind})


def read(folder: pathlib.Path) -> Run | None:
    """Returns the result of a run."""
    found = jobs.metrics_of(folder, "evaluate")
    if not found:
        return None
    models = {name: jobs.metrics_of(folder, name) for name in ("reward", "cost")}
    return {
        "metrics": {name: found[f"policy/{name}"] for name in COLUMNS} | jobs.metrics_of(folder, "policy"),
        "models": models,
        "stages": jobs.seconds_of(folder),
    }


def sample_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs that sample the responses; none where they are made."""
    return [one for seed in seeds if not (one := sample_job(seed, tiny)).has_stage("label")]


def all_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs."""
    return [job(seed, kind, tiny) for kind in LABELS for seed in seeds]


def section(runs: list[Run]) -> str:
    """Returns the table."""
    lines = []
    for kind in LABELS:
        found = [run for run in runs if run["labels"] == kind]
        if not found:
            continue
        cells = [jobs.spread([run["metrics"][name] for run in found], name in PERCENT) for name in SHOWN]
        accuracies = [
            jobs.spread([run["models"][model][f"eval/{name}"] for run in found], percent=True)
            for model, name in (("reward", "accuracy"), ("cost", "sign_accuracy"))
        ]
        lines.append([kind, *cells, *accuracies])
    columns = ["labels", *SHOWN.values(), "reward model: ranking, held out", "cost model: sign, held out"]
    return f"{jobs.table(columns, lines)}\n\n{jobs.seeds_of(runs)}"


EXPERIMENT = Experiment("labels", __doc__ or "", [sample_jobs, all_jobs], read, section)

if __name__ == "__main__":
    jobs.main(EXPERIMENT)
