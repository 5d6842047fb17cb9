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
RANKED = [{"name": f"{DATA}/safety_run.jsonl"}, {"name": f"{DATA}/ranked_run.jsonl"}]
# Pairs, and what is changed in the stage: two epochs, adapters of rank 16 in the last 10 of 30 layers.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "175 pairs": (175, {}),
    "350 pairs": (350, {}),
    "700 pairs": (700, {}),
    "1,384 pairs": (ALL, {}),
    "and 815 ranked harmless pairs": (ALL, {"data": RANKED}),
    "4 epochs": (ALL, {"epochs": 4}),
    "5 of 30 layers": (ALL, {"lora.layers": 5}),
    "20 of 30 layers": (ALL, {"lora.layers": 20}),
    "rank 4": (ALL, {"lora.rank": 4, "lora.alpha": 8}),
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


def cell(share: dict[str, Any]) -> str:
    """A share with its interval."""
    return f"{share['rate']:.3f} ({share['low']:.3f} to {share['high']:.3f})"


def words(pairs: int) -> list[str]:
    """Returns the accuracies of a bag of words from as many pairs, ranking and sign, as text."""
    train = list(read_records(str(ROOT / DATA / "safety_run.jsonl")))[:pairs]
    found = bag_of_words(Pairs(train), Pairs(read_records(str(ROOT / DATA / "safety_test.jsonl"))))
    shares = ((found[name]["accuracy"], *found[name]["interval"]) for name in ("ranking", "sign"))
    return [cell(dict(zip(("rate", "low", "high"), share, strict=True))) for share in shares]


def section(runs: list[Run]) -> str:
    """Returns the table."""
    rows = []
    for kind, (pairs, changes) in RUNS.items():
        found = [run for run in runs if run["kind"] == kind]
        beside = words(pairs) if found and not changes else ["", ""]
        rows += [[kind, str(run["seed"]), cell(run["ranking"]), cell(run["sign"]), *beside] for run in found]
    columns = ["trained on", "seed", "ranking", "sign", "bag of words: ranking", "bag of words: sign"]
    return f"{jobs.table(columns, rows)}\n\n{jobs.seeds_of(runs)}"


EXPERIMENT = Experiment(
    "real_curves", __doc__ or "", [all_jobs], read, section, from_models=False, page=ROOT / "docs" / "real.md"
)

if __name__ == "__main__":
    jobs.main(EXPERIMENT)
