"""Stages that make data: `sample`, responses of policies, and `label`, labels of pairs of them.

Both write `data.jsonl`, which later stages read as `stage:NAME`; until it is whole, `batches*.jsonl` keep what is done.
"""

import datetime
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.formats import OWN, Record
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.evaluation.statistics import distinct_n
from safe_rlhf_jax.metrics import ProgressBar, write_jsonl
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.common import MADE_DATA, Run, report_data
from safe_rlhf_jax.stages.datasets import load_data, take
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.labellers import Pair, consistent, labeller_of
from safe_rlhf_jax.stages.partial import keep_batch, kept_batches
from safe_rlhf_jax.stages.sampling import sampled, sampler_of

LABELLED = ("better_response_id", "better_votes", "safer_response_id", "safer_votes")  # any of these is a label


NOT_OF_PROMPT = ("responses", "policies", "labelled_by", "better_margin", "safer_margin")  # fields that are made anew


def run_sample(run: Run, stage: cfg.SampleStage, folder: storage.Path) -> dict[str, Any]:
    """Samples responses of every policy to every prompt."""
    prompts = take(run, stage, "prompts")
    report_data(stage.name, prompts)
    texts: list[list[str]] = [[] for _ in prompts.records]  # by prompt
    makers: list[str] = []
    ended: list[bool] = []
    for number, name in enumerate(stage.policies):
        for row, responses in enumerate(responses_of(run, stage, prompts, number, folder)):
            texts[row] += [response["text"] for response in responses]
            ended += [response["ended"] for response in responses]
        makers += [name] * stage.responses_per_prompt
    records = [
        of_prompt(record, turns) | {"responses": row, "policies": makers}
        for record, turns, row in zip(prompts.records, prompts.turns, texts, strict=True)
    ]
    write_data(folder, records)
    flat = list(itertools.chain.from_iterable(texts))
    metrics = {"prompts": float(len(records)), "responses": float(len(flat)), "truncated": 1 - float(np.mean(ended))}
    metrics |= {f"distinct_{n}": distinct_n(flat, n) for n in (1, 2)}
    return {"metrics": metrics | {"different_responses": float(np.mean([len(set(row)) for row in texts]))}}


def responses_of(
    run: Run, stage: cfg.SampleStage, prompts: Examples, number: int, folder: storage.Path
) -> list[list[dict[str, Any]]]:
    """Returns the responses of one policy, by prompt, each its text and whether it has an end."""
    file = folder / f"batches_{number}.jsonl"
    found: list[list[dict[str, Any]]] = [row for batch in kept_batches(file) for row in batch]
    key = jax.random.fold_in(jax.random.key(run.seed(stage)), number)
    name = f"{stage.name}: {stage.policies[number]}"
    start = -(-len(found) // stage.batch_size)
    if len(found) < len(prompts):
        module, variables = run.networks.read(stage.policies[number], "lm")
        sample = sampler_of(run, stage, module, {})
        respond = functools.partial(sample, variables["params"], {})
        for _, out in sampled(run, respond, prompts, stage.batch_size, key, name, host={}, start=start):
            rows = [
                [text_of(run, out["tokens"][i, j, : out["length"][i, j]]) for j in range(stage.responses_per_prompt)]
                for i in range(len(out["length"]))
            ]
            keep_batch(file, rows)
            found += rows
    return found


def text_of(run: Run, ids: np.ndarray) -> dict[str, Any]:
    """Returns a sampled response as text, and whether it has an end."""
    return {"text": run.tokenizer.decode(ids), "ended": run.has_end(ids)}


def of_prompt(record: Record, turns: Sequence[Any]) -> Record:
    """Returns what a record says of its prompt: the turns, and fields that no stage reads, such as categories."""
    return {"prompt": list(turns)} | {name: value for name, value in record.items() if name not in OWN}


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
    labelled, said = label_all(run, stage, pairs, folder)
    usable = [record for record in labelled if not record.keys().isdisjoint(LABELLED)]
    if not usable:
        raise UserError(f"{stage.name}: none of {len(pairs)} pairs has a label")
    write_data(folder, usable)
    counts = {"pairs": float(len(usable)), "without_label": float(len(labelled) - len(usable))}
    return {"metrics": counts | shares(usable) | said}


def label_all(
    run: Run, stage: cfg.Labelling, pairs: Sequence[Pair], folder: storage.Path
) -> tuple[list[Record], dict[str, float]]:
    """Returns pairs as records with their labels, and what the labels took; batches that are done are kept."""
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
    return labelled, labeller.said()


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
