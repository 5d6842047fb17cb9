"""Step 3 of the line, second half: texts become rows of arrays.

Unusable records are counted by reason, and fatal above a limit.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.data.formats import PART, UNUSABLE, Record, Unusable
from safe_rlhf_jax.data.templates import AnyTemplate
from safe_rlhf_jax.data.texts import (
    Text,
    paired,
    preference_example,
    prompt_example,
    safety_example,
    safety_labels,
    shown,
    supervised_example,
)
from safe_rlhf_jax.data.tokenizer import Tokenizer
from safe_rlhf_jax.types import PreferenceBatch, PromptBatch, SafetyBatch, Sequences, SupervisedBatch

MAX_SHOWN = 300  # characters of a bad record in an error
SHOWN_REASONS = 3  # of which an error shows the first bad record
ROUND = 8  # columns: widths are rounded up to a multiple
ALIKE = "responses that are identical within max_length"
FIXES = {  # what most records are left out for -> what it means
    ALIKE: "What tells the responses apart is cut off: raise max_length",
    "the prompt fills max_length": "There is no room for the response: raise max_length",
    "longer than max_prompt_length": "Raise max_prompt_length, or set long_prompts: truncate_left",
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """A whole dataset as arrays: a batch type with N rows, the records behind them, and what was left out."""

    arrays: Any
    records: list[Record]
    skipped: dict[str, int]  # reason -> records
    truncated: int  # texts
    lengths: tuple[int, ...] = ()  # tokens of every text before it was cut; of pairs, both sides

    def __len__(self) -> int:
        return len(self.records)

    @property
    def masks(self) -> list[np.ndarray]:
        """The masks of all sides, bool[N, width] each."""
        sides = [getattr(self.arrays, name, None) for name in ("chosen", "rejected", "safer", "unsafer")]
        return [side.mask for side in sides if side is not None] or [self.arrays.mask]

    @property
    def parts(self) -> np.ndarray:
        """Which part of a weighted mixture each row is of, i64[N]."""
        return np.array([record.get(PART, 0) for record in self.records], np.int64)

    @property
    def width(self) -> int:
        """Columns, in tokens."""
        return int(self.masks[0].shape[1])

    @property
    def mean_tokens(self) -> float:
        """Real tokens of a record, both sides of a pair together."""
        return float(sum(mask.sum() for mask in self.masks) / len(self))


def convert(
    records: Sequence[Record],
    example: Callable[[Record], tuple[Text, ...]],
    *,
    where: str,
    max_bad: float,
    unfit: Callable[[tuple[Text, ...]], str | None] = lambda texts: None,
) -> tuple[list[tuple[Text, ...]], list[Record], dict[str, int]]:
    """Converts every record, counting the unusable ones by reason.

    Args:
        records: The records.
        example: A record's texts; raises `Unusable`.
        where: Names the data in errors.
        max_bad: Share of records that may be unusable.
        unfit: Why texts cannot be used at this length, or None.

    Raises:
        ValueError: If more than the share `max_bad` is unusable, with the counts and a first example.
    """
    texts, kept, skipped = [], [], Counter[str]()
    first: dict[str, Record] = {}
    for record in records:
        try:
            if UNUSABLE in record:
                raise Unusable(record[UNUSABLE])
            converted = example(record)
            if problem := unfit(converted):
                raise Unusable(problem)
        except Unusable as reason:
            skipped[str(reason)] += 1
            first.setdefault(str(reason), record)
            continue
        texts.append(converted)
        kept.append(record)
    bad = sum(skipped.values())
    if not kept or bad > max_bad * len(records):
        ranked = skipped.most_common()
        reasons = "; ".join(f"{reason}: {count}" for reason, count in ranked)
        shown = "; ".join(excerpt(first[reason]) for reason, _ in ranked[:SHOWN_REASONS])
        raise ValueError(
            f"{where}: {bad} of {len(records)} records cannot be used ({reasons}). First: {shown}. "
            + (f"Mend the data, or raise max_bad_records ({max_bad})." if kept else "None is left.")
            + meaning(skipped)
        )
    return texts, kept, dict(skipped)


def meaning(skipped: Counter[str]) -> str:
    """Returns what it means that most records are left out for a reason, where that is known."""
    return "".join(f" {FIXES[reason]}." for reason, _ in skipped.most_common(1) if reason in FIXES)


def excerpt(record: Record) -> str:
    """Returns the beginning of a record."""
    text = json.dumps(record, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " …"


def unfit_texts(texts: tuple[Text, ...], max_length: int) -> str | None:
    """Returns why texts of prompt and response teach nothing when cut to `max_length`, or None."""
    if not all(any(text.trained[:max_length]) for text in texts):
        return "the prompt fills max_length"
    if len(texts) > 1 and texts[0].ids[:max_length] == texts[1].ids[:max_length]:
        return ALIKE
    return None


def pad_right(texts: Sequence[Text], width: int, pad_id: int) -> dict[str, Any]:
    """Returns tokens, mask and trained [N, width]; longer texts lose their end."""
    tokens = np.full((len(texts), width), pad_id, np.int32)
    mask, trained = np.zeros((len(texts), width), bool), np.zeros((len(texts), width), bool)
    for i, text in enumerate(texts):
        size = min(len(text.ids), width)
        tokens[i, :size], mask[i, :size], trained[i, :size] = text.ids[:size], True, text.trained[:size]
    return {"tokens": tokens, "mask": mask, "trained": trained}


def common_width(texts: Sequence[Text], max_length: int) -> int:
    """Returns the columns that hold every text, at most `max_length`, rounded up to a multiple of 8."""
    longest = min(max(len(text.ids) for text in texts), max_length)
    return min(-(-longest // ROUND) * ROUND, max_length)


def finished(
    arrays: Any, records: list[Record], skipped: dict[str, int], texts: Sequence[Text], max_length: int
) -> Examples:
    """Returns examples with the lengths of their texts."""
    lengths = tuple(len(text.ids) for text in texts)
    return Examples(arrays, records, skipped, sum(length > max_length for length in lengths), lengths)


def load_supervised(
    records: Sequence[Record],
    template: AnyTemplate,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    where: str,
    max_bad: float,
) -> Examples:
    """Returns a `SupervisedBatch` of all records."""
    texts, kept, skipped = convert(
        records,
        lambda r: supervised_example(r, template, tokenizer),
        where=where,
        max_bad=max_bad,
        unfit=lambda t: unfit_texts(t, max_length),
    )
    rows = [text for (text,) in texts]
    padded = pad_right(rows, common_width(rows, max_length), tokenizer.pad_id)
    batch = SupervisedBatch(padded["tokens"], padded["mask"], padded["trained"])
    return finished(batch, kept, skipped, rows, max_length)


def load_sampled(rows: Sequence[Record], *, width: int, pad_id: int) -> Examples:
    """Returns a `SupervisedBatch` of tokens that a policy sampled; nothing is decoded and read again.

    Args:
        rows: With `prompt_ids` and `response_ids`.
        width: Columns.
        pad_id: Fills the columns behind a text.
    """
    parts = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    texts = [Text(prompt + ids, [False] * len(prompt) + [True] * len(ids)) for prompt, ids in parts]
    padded = pad_right(texts, width, pad_id)
    batch = SupervisedBatch(padded["tokens"], padded["mask"], padded["trained"])
    return finished(batch, list(rows), {}, texts, width)


def load_pairs(
    records: Sequence[Record],
    template: AnyTemplate,
    tokenizer: Tokenizer,
    *,
    safety: bool,
    max_length: int,
    where: str,
    max_bad: float,
) -> Examples:
    """Returns a `SafetyBatch` or a `PreferenceBatch` of all records; both sides have one width."""
    example = safety_example if safety else preference_example
    texts, kept, skipped = convert(
        paired(records) if safety else records,
        lambda r: example(r, template, tokenizer),
        where=where,
        max_bad=max_bad,
        unfit=lambda t: unfit_texts(t, max_length),
    )
    flat = [text for pair_ in texts for text in pair_]
    width = common_width(flat, max_length)

    def side(i: int) -> Sequences:
        padded = pad_right([pair_[i] for pair_ in texts], width, tokenizer.pad_id)
        return Sequences(padded["tokens"], padded["mask"], padded["trained"])

    batch: SafetyBatch | PreferenceBatch
    if safety:
        safer = np.array([record["safer_response_id"] for record in kept], np.int64)
        labels: Any = np.array([safety_labels(record) for record in kept], bool)
        rows = np.arange(len(kept))
        batch = SafetyBatch(side(0), side(1), labels[rows, safer], labels[rows, 1 - safer])
    else:
        batch = PreferenceBatch(side(0), side(1))
    return finished(batch, kept, skipped, flat, max_length)


def load_prompts(
    records: Sequence[Record],
    template: AnyTemplate,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    where: str,
    max_bad: float,
    long_prompts: str = "drop",
    group_field: str | None = None,
    groups: Sequence[str] | None = None,
) -> Examples:
    """Returns a `PromptBatch` of all records, left-padded; a prompt that is too long is dropped or loses its start.

    Args:
        records: The records.
        template: Of the run.
        tokenizer: Of the run.
        max_length: Tokens of a prompt.
        where: Names the data in errors.
        max_bad: Share of records that may be unusable.
        long_prompts: "drop", or "truncate_left".
        group_field: Field that names the group, if any.
        groups: Names by index of the values of `group_field`.

    Raises:
        ValueError: If a record lacks `group_field`.
    """
    drop = long_prompts == "drop"
    texts, kept, skipped = convert(
        records,
        lambda r: prompt_example(r, template, tokenizer),
        where=where,
        max_bad=max_bad,
        unfit=lambda t: "longer than max_prompt_length" if drop and len(t[0].ids) > max_length else None,
    )
    rows = [text for (text,) in texts]
    width = common_width(rows, max_length)
    tokens: Any = np.full((len(rows), width), tokenizer.pad_id, np.int32)
    mask: Any = np.zeros((len(rows), width), bool)
    for i, text in enumerate(rows):
        start = (
            len(tokenizer.prefix) if tuple(text.ids[: len(tokenizer.prefix)]) == tokenizer.prefix else 0
        )  # BOS stays
        ids = text.ids[:start] + text.ids[start:][start - width :]
        tokens[i, width - len(ids) :], mask[i, width - len(ids) :] = ids, True
    group: Any = np.zeros(len(rows), np.int32)
    if group_field is not None:
        if any(group_field not in record for record in kept):
            keys = sorted(kept[0])
            raise ValueError(f"{where}: group_field {group_field!r} is missing from records; the first has {keys}")
        names = list(groups or group_names(kept, group_field))
        group = np.array([names.index(str(record[group_field])) for record in kept], np.int32)
    kept = [record if isinstance(record.get("prompt"), str) else record | {"prompt": shown(record)} for record in kept]
    return finished(PromptBatch(tokens, mask, group), kept, skipped, rows, width)


def group_names(records: Sequence[Record], field: str | None) -> tuple[str, ...]:
    """Returns the values of a field, sorted; ("all",) without one."""
    return ("all",) if field is None else tuple(sorted({str(record.get(field)) for record in records}))
