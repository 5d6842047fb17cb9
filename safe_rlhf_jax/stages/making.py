"""Stages that make data: `sample`, responses of policies, and `label`, labels of pairs of them.

Both write `data.jsonl`, which later stages read as `stage:NAME`; until it is whole, `batches*.jsonl` keep what is done.
"""

import datetime
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.formats import OWN, Record
from safe_rlhf_jax.data.records import RESERVED
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.evaluation.diversity import diversity
from safe_rlhf_jax.metrics import ProgressBar, write_jsonl
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.common import MADE_DATA, Run, report_data
from safe_rlhf_jax.stages.datasets import load_data, take
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.labellers import Pair, consistent, labeller_of
from safe_rlhf_jax.stages.partial import keep_batch, kept_batches
from safe_rlhf_jax.stages.people import near_chance
from safe_rlhf_jax.stages.sampling import Response, asked, responses_of
from safe_rlhf_jax.stages.verbalized import Answer, answers_in, instructed

LABELLED = ("better_response_id", "better_votes", "safer_response_id", "safer_votes")  # any of these is a label


NOT_OF_PROMPT = (  # fields that are made anew
    "responses", "policies", "probabilities", "labelled_by", "better_margin", "safer_margin", *RESERVED,
)  # fmt: skip


def run_sample(run: Run, stage: cfg.SampleStage, folder: storage.Path) -> dict[str, Any]:
    """Samples responses of every policy to every prompt."""
    prompts = take(run, stage, "prompts")
    report_data(stage.name, prompts)
    direct: list[list[Response]] = []  # of the first policy to every prompt, then of the second
    stated: list[list[Answer]] = []
    failures: Counter[str] = Counter()
    for number, name in enumerate(stage.policies):
        key = jax.random.fold_in(jax.random.key(run.seed(stage)), number)
        direct += responses_of(run, stage, name, prompts, folder / f"batches_{number}.jsonl", key)
        if stage.verbalized is not None:
            for answers, failed in verbalized(run, stage, name, prompts, folder / f"verbalized_{number}.jsonl", key):
                stated.append(answers)
                failures += failed
    records = []
    for row, (record, turns) in enumerate(zip(prompts.records, prompts.turns, strict=True)):
        own = [(name, place * len(prompts) + row) for place, name in enumerate(stage.policies)]
        texts: list[tuple[str, str, float | None]] = [(name, one["text"], None) for name, i in own for one in direct[i]]
        texts += [(name, *answer) for name, i in own for answer in (stated[i] if stated else ())]
        names, answers, probabilities = map(list, zip(*texts, strict=True))
        made = {"responses": answers, "policies": names} | ({"probabilities": probabilities} if stated else {})
        records.append(of_prompt(record, turns) | made)
    write_data(folder, records)
    responses = [record["responses"] for record in records]
    metrics = {
        "prompts": float(len(records)),
        "responses": float(sum(map(len, responses))),
        "truncated": 1 - float(np.mean([response["ended"] for group in direct for response in group])),
        "different_responses": float(np.mean([len(set(texts)) for texts in responses])),
    }
    metrics |= diversity([[response["text"] for response in group] for group in direct])
    return {"metrics": metrics | (both_ways(stage, direct, stated, failures) if stated else {})}


def verbalized(
    run: Run, stage: cfg.SampleStage, policy: str, prompts: Examples, file: storage.Path, key: jax.Array
) -> list[tuple[list[Answer], Counter[str]]]:
    """Returns the answers that a policy states in one response to each prompt, and why others are none."""
    assert stage.verbalized is not None
    questions = asked(run, stage, policy, [instructed(turns, stage.verbalized) for turns in prompts.turns])
    found: list[tuple[list[Answer], Counter[str]]] = [([], Counter({"prompt too long": 1})) for _ in prompts.turns]
    responses = responses_of(run, stage, policy, questions, file, jax.random.fold_in(key, 1), 1)
    for record, (response,) in zip(questions.records, responses, strict=True):
        found[record["row"]] = answers_in(response["text"])
    return found


def both_ways(
    stage: cfg.SampleStage, direct: Sequence[Sequence[Response]], stated: Sequence[Sequence[Answer]],
    failures: Counter[str],
) -> dict[str, float]:  # fmt: skip
    """Returns the diversity of as many direct and stated answers to each prompt, and what became of those asked for."""
    assert stage.verbalized is not None
    both = [(list(a)[: len(b)], list(b)[: len(a)]) for a, b in zip(direct, stated, strict=True)]
    ways = {
        "direct": diversity([[response["text"] for response in one] for one, _ in both]),
        "verbalized": diversity([[answer.text for answer in other] for _, other in both]),
    }
    metrics = {f"{way}/{name}": value for way, found in ways.items() for name, value in found.items()}
    mass = [sum(answer.probability for answer in answers) for answers in stated if answers]
    return (
        metrics
        | {"verbalized/found": float(np.mean([len(answers) / stage.verbalized for answers in stated]))}
        | ({"verbalized/mass": float(np.mean(mass))} if mass else {})
        | {f"verbalized/{reason.replace(' ', '_')}": float(count) for reason, count in failures.items()}
    )


def of_prompt(record: Record, turns: Sequence[Any]) -> Record:
    """Returns what a record says of its prompt: the turns, and fields that no stage reads, such as categories."""
    return {"prompt": list(turns)} | {n: value for n, value in record.items() if n not in (*OWN, *NOT_OF_PROMPT)}


def write_data(folder: storage.Path, records: Sequence[Record]) -> None:
    """Writes the records that a stage has made."""
    if is_main():
        write_jsonl(folder / MADE_DATA, records)


def load_samples(run: Run, stage: cfg.LabelStage, field: str) -> Examples:
    """Returns prompts with responses.

    Raises:
        ConfigError: If they have none.
    """
    found = load_data(run, stage, field)
    if not any(len(responses_in(record)) > 1 for record in found.records):
        raise cfg.ConfigError(
            f"{stage.name}: samples: no record has two different texts in `responses`, or in response_0 and response_1"
        )
    return found


def responses_in(record: Record) -> list[str]:
    """Returns the different responses of a record."""
    given = record.get("responses")
    listed = given if isinstance(given, list) else [record.get("response_0"), record.get("response_1")]
    return list(dict.fromkeys(text for text in listed if isinstance(text, str) and text.strip()))


def pairs_of(stage: cfg.LabelStage, samples: Examples, seed: int) -> Iterator[Pair]:
    """Yields the pairs to label: drawn from the different responses to a prompt, in random order."""
    for record, turns in zip(samples.records, samples.turns, strict=True):
        responses = responses_in(record)
        rng = random.Random(f"{seed}/{turns}/{responses}")
        every = list(itertools.combinations(responses, 2))
        for pair in rng.sample(every, min(stage.pairs_per_prompt, len(every))):
            first, second = rng.sample(pair, 2)
            yield Pair(list(turns), first, second, record)


def run_label(run: Run, stage: cfg.LabelStage, folder: storage.Path) -> dict[str, Any]:
    """Labels pairs of responses.

    Raises:
        UserError: If no pair has a label.
    """
    samples = take(run, stage, "samples", load_samples)
    report_data(stage.name, samples)
    pairs = list(pairs_of(stage, samples, run.seed(stage)))
    labelled, said, about = label_all(run, stage, pairs, folder)
    usable = [record for record in labelled if not record.keys().isdisjoint(LABELLED)]
    if not usable:
        raise UserError(f"{stage.name}: none of {len(pairs)} pairs has a label")
    write_data(folder, usable)
    counts = {"pairs": float(len(usable)), "without_label": float(len(labelled) - len(usable))}
    return {"metrics": counts | shares(usable) | said} | ({"people": about} if about else {})


def label_all(
    run: Run, stage: cfg.Labelling, pairs: Sequence[Pair], folder: storage.Path
) -> tuple[list[Record], dict[str, float], dict[str, Any]]:
    """Returns pairs as records with their labels, what these took, and what there is to say of several annotators.

    Batches that are done are kept.
    """
    file = folder / "batches.jsonl"
    labelled: list[Record] = [record for batch in kept_batches(file) for record in batch]
    labeller = labeller_of(run, stage)
    size = len(pairs) if stage.labeller.kind == "people" else stage.batch_size
    bar = ProgressBar(f"{stage.name}: pairs", len(pairs), start=len(labelled), keys=())
    for start in range(len(labelled), len(pairs), size):
        batch = pairs[start : start + size]
        labels = labeller.label(batch, start)
        by = labeller.identity | {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        found = [
            as_record(pair) | {"labelled_by": by} | consistent(one) for pair, one in zip(batch, labels, strict=True)
        ]
        keep_batch(file, found)
        labelled += found
        bar.write(start + len(batch), {})
    bar.close()
    about = labeller.about(pairs)
    for warning in near_chance(about):
        run.warn(stage.name, warning)
    alphas = {f"alpha/{question}": one["alpha"] for question, one in about.get("agreement", {}).items()}
    return labelled, labeller.said() | alphas, about


def as_record(pair: Pair) -> Record:
    """Returns a pair in the fields of a record, without labels."""
    extra = {name: value for name, value in pair.record.items() if name not in (*OWN, *NOT_OF_PROMPT)}
    whose = dict(zip(pair.record.get("responses", ()), pair.record.get("policies", ()), strict=False))
    makers = {f"policy_{i}": whose[text] for i, text in enumerate(pair.responses) if text in whose}
    return {"prompt": pair.turns, "response_0": pair.first, "response_1": pair.second} | extra | makers


def shares(records: Sequence[Record]) -> dict[str, float]:
    """Returns shares: of responses labelled safe, of labels at odds, of verdicts that flip with the order."""
    safe = [record[f"is_response_{i}_safe"] for record in records for i in (0, 1) if f"is_response_{i}_safe" in record]
    both = [r for r in records if "better_response_id" in r and "safer_response_id" in r]
    found = {"labelled_safe": safe, "at_odds": [r["better_response_id"] != r["safer_response_id"] for r in both]}
    judged = [record for record in records if record["labelled_by"]["labeller"] == "judge"]
    for name in ("better", "safer"):
        votes = [record[f"{name}_votes"] for record in judged if f"{name}_votes" in record]
        found[f"{name}_flipped"] = [one != other for one, other in votes]
        found[f"{name}_first"] = [side for one, other in votes for side in (one == 0, other == 1)]  # 0.5: no bias
    return {name: float(np.mean(values)) for name, values in found.items() if values}


SAMPLE = Kind(cfg.SampleStage, run_sample)
LABEL = Kind(cfg.LabelStage, run_label, load=load_samples)
