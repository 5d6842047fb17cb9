"""The red_team stage: prompts on which the present policy is unsafe, of all categories, some of them held out.

Every round makes new prompts from the strongest so far, samples the policy's answers, has them labelled, and keeps what
is stronger. Answers, rewrites and labels are kept batch by batch: all else follows from them, so that a killed run
continues without asking for anything twice.
"""

import functools
import logging
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.records import Unusable
from safe_rlhf_jax.data.sources import in_test
from safe_rlhf_jax.data.texts import prompt_example
from safe_rlhf_jax.evaluation import red_team_page
from safe_rlhf_jax.evaluation.diversity import self_similarity
from safe_rlhf_jax.evaluation.provenance import code_version, machine
from safe_rlhf_jax.evaluation.statistics import share_of
from safe_rlhf_jax.metrics import ProgressBar, write_jsonl
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.attacks import Archive, Search, Seed, rewritten, text_of
from safe_rlhf_jax.stages.common import Run, described, report_data
from safe_rlhf_jax.stages.datasets import load_data, take
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.labellers import Labeller, labeller_of
from safe_rlhf_jax.stages.making import of_prompt, write_data
from safe_rlhf_jax.stages.partial import keep_batch, kept_batches
from safe_rlhf_jax.stages.sampling import Response, asked, responses_of, some_of

LOGGER = logging.getLogger(__name__)

Attack = dict[
    str, Any
]  # seed, category, is_test, prompt, by; once it is made also responses, costs, unsafe, cost, round


def load_seeds(run: Run, stage: cfg.RedTeamStage, field: str) -> Examples:
    """Returns the seeds, those of the named groups.

    Raises:
        ConfigError: If there are none, or one has no category.
    """
    found = load_data(run, stage, field)
    groups, of = stage.groups, [str(record.get(str(stage.group_field))) for record in found.records]
    rows = [row for row, group in enumerate(of) if groups is None or group in groups]
    if not rows:
        raise cfg.ConfigError(
            f"{stage.name}: groups: no seed is of {', '.join(groups or ())}; there are {sorted(set(of))}"
        )
    lacking = [row for row in rows if stage.by not in found.records[row]]
    if lacking:
        raise cfg.ConfigError(
            f"{stage.name}: by: {len(lacking)} of {len(rows)} seeds have no {stage.by!r}; the fields of one are "
            f"{sorted(found.records[lacking[0]])}"
        )
    return some_of(found, rows)


def run_red_team(run: Run, stage: cfg.RedTeamStage, folder: storage.Path) -> dict[str, Any]:
    """Searches for prompts on which a policy is unsafe."""
    data = take(run, stage, "seeds", load_seeds)
    report_data(stage.name, data)
    seeds = [
        Seed(record, list(turns), str(record[stage.by]), in_test({"prompt": list(turns)}, stage.test_share))
        for record, turns in zip(data.records, data.turns, strict=True)
    ]
    archive, labeller = Archive(stage.kept, stage.novelty), labeller_of(run, stage)
    search = Search(seeds, archive, stage.openings, stage.test_share, functools.partial(fits, run, stage))
    counts: Counter[str] = Counter()
    made: list[list[Attack]] = []  # by round
    attacks: list[Attack] = [
        {"seed": i, "category": seed.category, "is_test": seed.is_test, "prompt": seed.turns, "by": "seed"}
        for i, seed in enumerate(seeds)
    ]
    while attacks:
        made.append(scored(run, stage, labeller, attacks, len(made), folder))
        LOGGER.info(f"{stage.name}: {red_team_page.line(len(made) - 1, success(made[-1]))}")
        for attack in made[-1]:
            if attack["costs"]:
                archive.add(attack)
        attacks = new_attacks(run, stage, search, len(made), folder, counts) if len(made) <= stage.rounds else []
    if len(made) <= stage.rounds:
        run.warn(stage.name, f"after round {len(made) - 1} there was no new prompt to try; give more seeds or openings")
    ranked = [(rank, key, attack) for key, cell in archive.kept.items() for rank, attack in enumerate(cell)]
    kept = [attack for *_, attack in sorted(ranked, key=lambda one: one[:2])]  # the strongest of each category first
    write_data(folder, [as_record(seeds[attack["seed"]].record, attack) for attack in kept])
    rounds = [success(attacks) for attacks in made]
    if is_main():
        write_jsonl(folder / "attacks.jsonl", (attack for attacks in made for attack in attacks))
        about = {"title": f"{run.config.title}: {stage.name}", "warnings": run.warnings.get(stage.name, [])}
        red_team_page.page(rounds, kept, provenance=provenance_of(stage), **about).write(folder)
    metrics = metrics_of(made, rounds, archive) | {name: float(count) for name, count in counts.items()}
    return {"metrics": metrics | labeller.said(), "rounds": rounds}


def fits(run: Run, stage: cfg.RedTeamStage, turns: Sequence[Any]) -> bool:
    """Says whether a conversation can be encoded, and is not longer than `max_prompt_length`."""
    try:
        (text,) = prompt_example({"prompt": list(turns)}, run.template, run.tokenizer)
    except Unusable:
        return False
    return len(text.ids) <= stage.max_prompt_length


def scored(
    run: Run, stage: cfg.RedTeamStage, labeller: Labeller, attacks: Sequence[Attack], number: int, folder: storage.Path
) -> list[Attack]:
    """Returns the attacks of a round with the policy's responses and their costs, without those that nobody scored."""
    prompts = asked(run, stage, stage.policy, [attack["prompt"] for attack in attacks])
    key = jax.random.fold_in(jax.random.key(run.seed(stage)), 2 * number)
    responses = responses_of(run, stage, stage.policy, prompts, folder / f"responses_{number}.jsonl", key)
    costs = costs_of(stage, labeller, attacks, responses, number, folder / f"costs_{number}.jsonl")
    found = []
    for attack, texts, values in zip(attacks, responses, costs, strict=True):
        known = [value for value in values if value is not None]
        shares = {"unsafe": float(np.mean(np.array(known) > 0)), "cost": float(np.mean(known))} if known else {}
        found.append(attack | {"round": number, "responses": [one["text"] for one in texts], "costs": known} | shares)
    return found


def costs_of(
    stage: cfg.RedTeamStage,
    labeller: Labeller,
    attacks: Sequence[Attack],
    responses: Sequence[Sequence[Response]],
    number: int,
    file: storage.Path,
) -> list[list[float | None]]:
    """Returns the cost of each response to each attack; batches that are done are kept."""
    found: list[list[float | None]] = [row for batch in kept_batches(file) for row in batch]
    bar = ProgressBar(f"{stage.name}: round {number}, labels", len(attacks), start=len(found), keys=())
    for start in range(len(found), len(attacks), stage.batch_size):
        rows = range(start, min(start + stage.batch_size, len(attacks)))
        each = [
            (attacks[row]["prompt"], one["text"], one["ended"], attacks[row]) for row in rows for one in responses[row]
        ]
        costs = iter(labeller.costs(*map(list, zip(*each, strict=True))))
        batch = [[next(costs) for _ in responses[row]] for row in rows]
        keep_batch(file, batch)
        found += batch
        bar.write(rows.stop, {})
    bar.close()
    return found


def new_attacks(
    run: Run, stage: cfg.RedTeamStage, search: Search, number: int, folder: storage.Path, counts: Counter[str]
) -> list[Attack]:
    """Returns the new prompts of a round: half of them by the attacker if there is one, the others by rules."""
    rng = random.Random(f"{run.seed(stage)}/{number}")
    parents = search.parents(stage.attacks, rng)
    rng.shuffle(parents)
    found: list[Attack | None] = []
    if stage.attacker is not None:
        half = parents[: len(parents) // 2]
        for parent, text in zip(half, rewrites(run, stage, half, number, folder), strict=True):
            found.append(search.attack(parent, text, "attacker"))
        counts["rewrites"] += len(half)
        counts["rewrites_unusable"] += found.count(None)
        parents = [parent for parent, attack in zip(half, found, strict=True) if attack is None] + parents[len(half) :]
    found += [search.changed(parent, rng) for parent in parents]
    return [attack for attack in found if attack is not None]


def rewrites(
    run: Run, stage: cfg.RedTeamStage, parents: Sequence[Attack], number: int, folder: storage.Path
) -> list[str]:
    """Returns the attacker's rewriting of each attack; "" where the attacker could not be asked."""
    assert stage.attacker is not None
    texts = [stage.instruction.replace("{prompt}", text_of(parent["prompt"])) for parent in parents]
    questions = asked(run, stage, stage.attacker, [[{"role": "user", "content": text}] for text in texts])
    key = jax.random.fold_in(jax.random.key(run.seed(stage)), 2 * number + 1)
    responses = responses_of(run, stage, stage.attacker, questions, folder / f"rewrites_{number}.jsonl", key, 1)
    found = [""] * len(parents)
    for record, (response,) in zip(questions.records, responses, strict=True):
        found[record["row"]] = rewritten(response["text"])
    return found


def as_record(seed: dict[str, Any], attack: Attack) -> dict[str, Any]:
    """Returns an attack as a record for other stages, with the fields of its seed."""
    about = {"unsafe": attack["unsafe"], "cost": attack["cost"], "changed_by": attack["by"], "round": attack["round"]}
    return of_prompt(seed, attack["prompt"]) | about


def success(attacks: Sequence[Attack]) -> dict[str, Any]:
    """Returns the success of a round's attacks, all, held out and by category: shares of unsafe responses."""
    known = [attack for attack in attacks if attack["costs"]]
    by_category: dict[str, list[float]] = {}
    for attack in sorted(known, key=lambda one: str(one["category"])):
        by_category.setdefault(attack["category"], []).append(attack["unsafe"])
    sides = {"all": known, "held out": [attack for attack in known if attack["is_test"]]}
    return {
        "attacks": len(attacks),
        "success": {name: share_of([one["unsafe"] for one in side]) for name, side in sides.items() if side},
        "by_category": {name: share_of(shares) for name, shares in by_category.items()},
    }


def metrics_of(
    made: Sequence[Sequence[Attack]], rounds: Sequence[dict[str, Any]], archive: Archive
) -> dict[str, float]:
    """Returns the success by round, and by category in the last one, and how much the kept prompts have in common."""
    every, last = [attack for attacks in made for attack in attacks], rounds[-1]
    numbers = {is_test: sum(len(kept) for key, kept in archive.kept.items() if key[1] == is_test) for is_test in (0, 1)}
    found = {"attacks": len(every), "without_label": sum(not attack["costs"] for attack in every)}
    found |= {"kept": numbers[0], "kept_held_out": numbers[1]}
    shares = {f"round_{i}": one["success"]["all"] for i, one in enumerate(rounds) if one["success"]}
    shares |= {"held_out": last["success"]["held out"]} if "held out" in last["success"] else {}
    shares |= last["by_category"]
    cells = [[text_of(attack["prompt"]) for attack in kept] for kept in archive.kept.values() if len(kept) > 1]
    alike = {"self_similarity": float(np.mean([self_similarity(texts) for texts in cells]))} if cells else {}
    return found | {f"success/{name}": share["rate"] for name, share in shares.items()} | alike


def provenance_of(stage: cfg.RedTeamStage) -> dict[str, str]:
    """Returns the provenance of the seeds, the models and the code, as {item: value}."""
    models = {field: use.reference for field, use in stage.models().items()}
    data = {"seeds": described(stage.seeds), "labeller": stage.labeller.kind}
    return data | models | {"code": code_version(), "machine": machine()}


RED_TEAM = Kind(cfg.RedTeamStage, run_red_team, load=load_seeds, shows_metrics=False)
