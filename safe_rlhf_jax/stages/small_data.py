"""Warnings, before a stage starts, about data sets that are too small or too uniform for their use.

None of this makes training impossible, so none of it ends a run.
"""

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.examples import ALIKE, Examples
from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.errors import DataError

FEW = 30  # evaluation records, or responses with a label: below, a share is known to ± 18 points at best
SEVERAL = 8  # records with one label; fewer may have it by chance
MANY = 0.05  # share of pairs that look alike


def data_warnings(stage: cfg.StageBase, field: str, use: cfg.DataUse, data: Examples) -> list[str]:
    """Returns warnings about a data set in its use by a stage, each with a fix.

    Args:
        stage: The config of the stage.
        field: The setting of the data: `data`, `eval_data`, `prompts`, `prompts.0`, `cost_limit.data` …
        use: Its use.
        data: Its usable examples.
    """
    notes = [fewer_than_a_batch(field, use, data), few_to_measure(field, use, data)]
    notes += [alike_when_cut(stage, field, data), *one_label(field, use, data)]
    return [note for note in notes if note is not None]


def fewer_than_a_batch(field: str, use: cfg.DataUse, data: Examples) -> str | None:
    """Warns if a step draws more rows than there are records, so that it holds copies."""
    available = min(use.at_most or len(data), len(data))
    if use.rows is None or available >= use.rows:
        return None
    much = f"{field} has {available} records that can be used, fewer than {use.rows_are} {use.rows}: a step takes each "
    much += f"{use.rows / available:.1f} times"
    if use.passes is not None:
        steps = max(int(use.passes * available) // use.rows, 1)
        much += f", and epochs: {use.passes:g} makes {steps} of them"
    return f"{much}. Lower batch_size to {max(available // use.factor, 1)} or less, or add records"


def few_to_measure(field: str, use: cfg.DataUse, data: Examples) -> str | None:
    """Warns of shares measured on few records, which are imprecise."""
    if use.role != "evaluate" or len(data) >= FEW:
        return None
    points = 196 * 0.5 / np.sqrt(len(data))
    return (
        f"{field} has {len(data)} records: a share that is measured on them, such as an accuracy, is known to "
        f"± {points:.0f} points at best (95 %). Hold out more, some hundreds"
    )


def alike_when_cut(stage: cfg.StageBase, field: str, data: Examples) -> str | None:
    """Warns of dropped pairs, which differ only beyond the maximum length."""
    left_out, total = data.skipped.get(ALIKE, 0), len(data) + sum(data.skipped.values())
    if left_out <= MANY * total:
        return None
    setting = "max_length" if hasattr(stage, "max_length") else "max_response_length"
    return (
        f"{field}: {left_out} of {total} pairs are left out, whose responses are identical where {setting} "
        f"{getattr(stage, setting)} cuts them: what tells them apart is gone. Raise {setting}"
    )


def one_label(field: str, use: cfg.DataUse, data: Examples) -> list[str]:
    """Warns of labels that are equal in all records: one side of a cost is not learned, or the labels were lost."""
    notes = []
    if hasattr(data.arrays, "safer_is_safe"):
        safe = np.concatenate([data.arrays.safer_is_safe, data.arrays.unsafer_is_safe])
        counts = {"safe": int(safe.sum()), "unsafe": int((~safe).sum())}
        missing = [name for name, count in counts.items() if not count]
        if missing and use.role == "train":
            there = "unsafe" if missing == ["safe"] else "safe"
            notes.append(
                f"{field}: all {len(safe)} responses are labelled {there}: the cost model learns to call every "
                f"response {there}, and the sign of its costs says nothing. Add {missing[0]} ones"
            )
        elif missing:
            notes.append(f"{field}: no response is labelled {missing[0]}: of such responses nothing is measured")
        if use.role == "calibrate":
            few = [f"{count} responses labelled {name}" for name, count in counts.items() if count < FEW]
            notes += [f"{field}: the limit is calibrated on only {' and '.join(few)}. Add some"] if few else []
    return [*notes, *constant_choice(field, use, data)]


def constant_choice(field: str, use: cfg.DataUse, data: Examples) -> list[str]:
    """Warns if the preferred response has the same position in all records of a labelled file."""
    labels = {"cost": "safer_response_id", "reward": "better_response_id"}
    label = labels.get(use.reads, "")
    ranked = use.reads in labels and use.role != "calibrate" and len(data) >= SEVERAL
    values = {str(record.get(label)) for record in data.records}
    if not ranked or len(values) > 1 or values == {"None"} or not all(map(has_labels, cfg.parts_of(use.data))):
        return []
    return [
        f"{field}: {label} is {values.pop()} in all {len(data)} records: right if the preferred response always stands "
        "there; if not, the labels have been lost, and what is learned is the order of the file"
    ]


def has_labels(part: cfg.Data) -> bool:
    """Says whether a data set holds pairs with labels.

    Other formats put the chosen response first by construction, and pairs made of single answers the safe one.
    """
    try:
        read_records(**part.model_dump(exclude={"weight", "format"}), format="pku")
    except DataError:  # other columns
        return False
    return True
