"""Audits: a share of labels held against those of another labeller, before anything is trained on them."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.formats import Record
from safe_rlhf_jax.errors import ConfigError, UserError
from safe_rlhf_jax.evaluation.statistics import share_of
from safe_rlhf_jax.stages.common import Run, report_data
from safe_rlhf_jax.stages.datasets import load_data, take
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.labellers import Pair
from safe_rlhf_jax.stages.making import label_all, write_data
from safe_rlhf_jax.stages.people import LABELS

MARGINS = ("safer_margin", "better_margin")  # of a record, the first that it has


class AuditError(UserError):
    """Labels that another labeller does not share: nothing may be trained on them."""


def load_labels(run: Run, stage: cfg.AuditStage, field: str) -> Examples:
    """Returns labelled pairs.

    Raises:
        ConfigError: If they have no labels.
    """
    found = load_data(run, stage, field)
    labels = [label for names in LABELS.values() for label in names]
    if all(record.keys().isdisjoint(labels) for record in found.records):
        raise ConfigError(f"{stage.name}: labels: no record has one of {', '.join(labels)}")
    return found


def drawn(records: Sequence[Record], share: float, by: str, seed: int) -> list[int]:
    """Returns the rows to look at again: a share of every value of `by`, half of it with the smaller margins.

    Without margins all rows of a value are as likely. Every value has one row at least.
    """
    rows: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(str(record.get(by, "")), []).append(row)
    found: list[int] = []
    for value, of_value in rows.items():
        rng = random.Random(f"{seed}/{value}")
        rng.shuffle(of_value)
        of_value.sort(key=lambda row: margin(records[row]))
        count = max(1, round(share * len(of_value)))
        close, clear = of_value[: len(of_value) // 2], of_value[len(of_value) // 2 :]
        of_close = min(count // 2, len(close))
        found += rng.sample(close, of_close) + rng.sample(clear, min(count - of_close, len(clear)))
    return sorted(found)


def margin(record: Record) -> float:
    """Returns the difference of the scores behind a label; 0 where the labeller has none."""
    return next((float(record[name]) for name in MARGINS if name in record), 0.0)


def agreement(pairs: Sequence[tuple[Record, Record]]) -> dict[str, dict[str, Any]]:
    """Returns {question: share of equal labels, with its interval}, of the labels that both records have."""
    found = {}
    for question, labels in LABELS.items():
        equal = [
            one[label] == other[label] for one, other in pairs for label in labels if label in one and label in other
        ]
        if equal:
            found[question] = share_of(equal)
    return found


def run_audit(run: Run, stage: cfg.AuditStage, folder: storage.Path) -> dict[str, Any]:
    """Has a share of labels given again, and measures how often they are the same.

    Raises:
        AuditError: If no label was given a second time.
    """
    data = take(run, stage, "labels", load_labels)
    report_data(stage.name, data)
    rows = drawn(data.records, stage.share, stage.by, run.seed(stage))
    records = [data.records[row] for row in rows]
    pairs = [
        Pair(list(data.turns[row]), record["response_0"], record["response_1"], record)
        for row, record in zip(rows, records, strict=True)
    ]
    again, said, about = label_all(run, stage, pairs, folder)
    both = list(zip(records, again, strict=True))
    write_data(folder, again)
    found = agreement(both)
    if not found:
        raise AuditError(f"{stage.name}: none of {len(pairs)} pairs was labelled again")
    values = sorted({str(record.get(stage.by, "")) for record in records})
    parts = {v: agreement([pair for pair in both if str(pair[0].get(stage.by, "")) == v]) for v in values}
    metrics = {f"agreement/{question}": share["rate"] for question, share in found.items()}
    result = {"metrics": {"pairs": float(len(pairs))} | metrics | said, "agreement": found, f"by_{stage.by}": parts}
    return result | ({"people": about} if about else {})


def refusal(stage: cfg.AuditStage, result: Mapping[str, Any]) -> AuditError | None:
    """Returns why nothing may be trained on the labels, if too few were the same."""
    low = {q: s for q, s in result.get("agreement", {}).items() if s["rate"] < stage.minimum}
    if not low:
        return None
    said = ", ".join(f"{q} {s['rate']:.1%} ({s['low']:.1%} to {s['high']:.1%})" for q, s in low.items())
    return AuditError(
        f"{stage.name}: less than minimum {stage.minimum} of the labels are those of {stage.labeller.kind}: {said}; "
        "look at data.jsonl of the stage, mend the labeller or its instruction, or lower minimum"
    )


AUDIT = Kind(cfg.AuditStage, run_audit, load=load_labels, refusal=refusal)
