"""Do cost models give safe answers positive costs? By ranking alone, with sign terms, and as a classifier.

python -m benchmarks.rounds.signs run --seeds 0 1 2    benchmarks/results/signs.json
python -m benchmarks.rounds.signs table                docs/results.md

CS-RLHF (arXiv 2510.03520) claims that the pairwise term of a cost model drowns its labels of safety, the more the
larger the data set, so that safe answers get positive costs. The oracle of the embedded world says what is safe.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.rounds import jobs
from benchmarks.rounds.jobs import Experiment, Job, Run
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.pipeline import load_scorer

SIZES = (500, 4000)  # pairs
RANKING = "ranking"  # Bradley–Terry alone: a reward model of the safer response, whose cost is −reward
LOSSES = (RANKING, "ranking and signs", "signs")
COLUMNS = {
    "safe_above": "safe answers with cost > 0",
    "safe_pair_above": "of them in pairs of two safe ones",
    "unsafe_below": "unsafe answers with cost ≤ 0",
    "order": "unsafe above safe",
}


def stage_name(loss: str, size: int) -> str:
    """Returns the name of a stage."""
    return f"{loss.replace(' ', '_')}_{size}"


def pairs_file() -> str:
    """Writes the pairs, the safer response of each the better one too, and returns the file."""
    pairs = demo.preference("train")[: max(SIZES)]
    return jobs.written(
        "signs/pairs.jsonl", (pair | {"better_response_id": pair["safer_response_id"]} for pair in pairs)
    )


def job(seed: int, pairs: str, tiny: bool) -> Job:
    """Returns the run of a seed, with a stage for each loss and number of pairs."""
    names = [stage_name(loss, size) for size in SIZES for loss in LOSSES]
    settings: dict[str, Any] = {f"stages.{name}.data.name": pairs for name in names}
    if tiny:
        settings |= {f"stages.{name}.data.limit": 64 for name in ("sft", *names)}
    return Job(f"signs/seed{seed}", "signs.yaml", settings, {"seed": seed})


def all_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs."""
    pairs = pairs_file()
    return [job(seed, pairs, tiny) for seed in seeds]


def read(folder: pathlib.Path) -> Run | None:
    """Returns the signs of the costs of test pairs by every model of a finished run."""
    names = {(loss, size): stage_name(loss, size) for size in SIZES for loss in LOSSES}
    if not all((folder / name / "result.json").exists() for name in names.values()):
        return None
    pairs = demo.preference("test")
    unsafe = np.array([[demo.harm(pair[f"response_{i}"]).is_harmful for i in (0, 1)] for pair in pairs])
    found = []
    for (loss, size), name in names.items():
        score = load_scorer(str(folder / name / "export"), template="plain")
        sign = -1.0 if loss == RANKING else 1.0
        sides = [score([pair["prompt"] for pair in pairs], [pair[f"response_{i}"] for pair in pairs]) for i in (0, 1)]
        found.append({"loss": loss, "pairs": size} | signs(sign * np.stack(sides, axis=1), unsafe))
    return {"models": found, "stages": jobs.seconds_of(folder)}


def signs(costs: np.ndarray, unsafe: np.ndarray) -> dict[str, float]:
    """Returns the shares of `COLUMNS`, of costs f[n, 2] of pairs; `order` counts a safe and an unsafe answer each."""
    safe_pair = ~unsafe.any(1)
    above = np.searchsorted(np.sort(costs[~unsafe]), costs[unsafe])  # safe answers below each unsafe one
    return {
        "safe_above": float((costs[~unsafe] > 0).mean()),
        "safe_pair_above": float((costs[safe_pair] > 0).mean()),
        "unsafe_below": float((costs[unsafe] <= 0).mean()),
        "order": float(above.mean() / (~unsafe).sum()),
    }


def section(runs: list[Run]) -> str:
    """Returns the table."""
    lines = []
    for size in SIZES:
        for loss in LOSSES:
            of = [one for run in runs for one in run["models"] if (one["loss"], one["pairs"]) == (loss, size)]
            if of:
                cells = (jobs.spread([one[name] for one in of], percent=True) for name in COLUMNS)
                lines.append([str(size), loss, *cells])
    return f"{jobs.table(['pairs', 'loss', *COLUMNS.values()], lines)}\n\n{jobs.seeds_of(runs)}"


EXPERIMENT = Experiment("signs", __doc__ or "", [all_jobs], read, section, from_models=False)

if __name__ == "__main__":
    jobs.main(EXPERIMENT)
