"""Where the cost model of the real run stops: accuracy on held-out pairs over data, epochs, adapted layers and rank.

    python -m benchmarks.real.curves run      benchmarks/results/real_curves.json; needs runs/real/{model,data}
    python -m benchmarks.real.curves table    docs/real.md

Each run trains a cost model as configs/smollm2_135m/safe_rlhf.yaml does, but on PKU-SafeRLHF pairs of the part "run"
alone, and is tested on those of the part "test", beside a bag of words from the same pairs. They say where it stops; no
setting is chosen by them.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.preferences import Pairs, bag_of_words
from benchmarks.rounds import jobs
from benchmarks.rounds.jobs import Experiment, Job, Run
from safe_rlhf_jax.data.sources import read_records

ROOT = jobs.ROOT
DATA = "runs/real/data"
CONFIG = str(ROOT / "benchmarks" / "real" / "curves.yaml")
ALL = 1384  # pairs of the part "run"
HALF = 700  # pairs of the runs that change a setting
RANKED = [{"name": f"{DATA}/safety_run.jsonl"}, {"name": f"{DATA}/ranked_run.jsonl"}]
# Pairs, and what is changed in the stage: two epochs, adapters of rank 16 in the last 10 of 30 layers.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "175 pairs": (175, {}),
    "350 pairs": (350, {}),
    "700 pairs": (HALF, {}),
    "1,384 pairs": (ALL, {}),
    "and 815 ranked harmless pairs": (ALL, {"data": RANKED}),
    "700 pairs, 4 epochs": (HALF, {"epochs": 4}),
    "700 pairs, 5 of 30 layers": (HALF, {"lora.layers": 5}),
    "700 pairs, 20 of 30 layers": (HALF, {"lora.layers": 20}),
    "700 pairs, rank 4": (HALF, {"lora.rank": 4, "lora.alpha": 8}),
}
TINY = {"epochs": 1, "data": {"name": f"{DATA}/safety_run.jsonl", "limit": 8}, "eval_data.limit": 8, "batch_size": 4}


def all_jobs(seeds: Sequence[int], tiny: bool) -> list[Job]:
    """Returns the runs."""
    found = []
    for seed in seeds:
        for number, (kind, (pairs, changes)) in enumerate(RUNS.items()):
            limit = {} if "data" in changes else {"data.limit": pairs}
            settings = changes | TINY if tiny else limit | changes
            named = {f"stages.cost.{name}": value for name, value in settings.items()}
            about = {"seed": seed, "kind": kind, "pairs": pairs}
            found.append(Job(f"real_curves/seed{seed}_{number}", CONFIG, named, about))
    return found


def read(folder: pathlib.Path) -> Run | None:
    """Returns the result of a run: accuracies with 95 % intervals."""
    file = folder / "cost" / "scores.json"
    if not file.exists() or not (folder / "cost" / "result.json").exists():
        return None
    health = json.loads(file.read_text())["health"]
    return {"ranking": health["accuracy"], "sign": health["sign"]["all"], "stages": jobs.seconds_of(folder)}


def words(pairs: int) -> list[str]:
    """Returns the accuracies of a bag of words from as many pairs, ranking and sign, as text."""
    train = list(read_records(str(ROOT / DATA / "safety_run.jsonl")))[:pairs]
    found = bag_of_words(Pairs(train), Pairs(read_records(str(ROOT / DATA / "safety_test.jsonl"))))
    return [jobs.with_interval(found[name]["accuracy"], *found[name]["interval"]) for name in ("ranking", "sign")]


def section(runs: list[Run]) -> str:
    """Returns the table."""
    rows = []
    for kind, (pairs, changes) in RUNS.items():
        found = [run for run in runs if run["kind"] == kind]
        beside = words(pairs) if found and not changes else ["", ""]
        for run in found:
            shares = (jobs.with_interval(one["rate"], one["low"], one["high"]) for one in (run["ranking"], run["sign"]))
            rows.append([kind, str(run["seed"]), *shares, *beside])
    columns = ["trained on", "seed", "ranking", "sign", "bag of words: ranking", "bag of words: sign"]
    return f"{jobs.table(columns, rows)}\n\n{jobs.seeds_of(runs)}"


EXPERIMENT = Experiment(
    "real_curves", __doc__ or "", [all_jobs], read, section, from_models=False, page=ROOT / "docs" / "real.md"
)

if __name__ == "__main__":
    jobs.main(EXPERIMENT)
