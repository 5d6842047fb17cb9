"""Step 3 of the line, second half: texts become rows of arrays.

Unusable records are counted by reason, and fatal above a limit.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.data.conversations import Text, check_rendered, encode
from safe_rlhf_jax.data.labels import check_weight, label_reader, preference_batch, safety_batch, weights_of
from safe_rlhf_jax.data.records import (
    PART,
    RESERVED,
    UNUSABLE,
    LeftOut,
    Message,
    Record,
    Unusable,
    place_of,
    printable,
)
from safe_rlhf_jax.data.templates import PROBE, Template
from safe_rlhf_jax.data.texts import (
    paired,
    preference_example,
    prompt_example,
    safety_example,
    supervised_example,
)
from safe_rlhf_jax.data.tokenizer import Tokenizer
from safe_rlhf_jax.errors import DataError
from safe_rlhf_jax.types import PromptBatch, Sequences, SupervisedBatch

MAX_SHOWN = 300  # characters of a bad record in an error
SHOWN_REASONS = 3  # reasons for which an error shows the first bad record
LISTED_REASONS = 8  # that an error lists
ROUND = 8  # columns: widths are rounded up to a multiple
ALIKE = "responses that are identical within max_length"
FIXES = {  # reason for which most records are left out -> its meaning
    ALIKE: "What tells the responses apart is cut off: raise max_length",
    "the prompt fills max_length": "There is no room for the response: raise max_length",
    "longer than max_prompt_length": "Raise max_prompt_length, or set long_prompts: truncate_left",
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """A whole dataset as arrays: a batch type with N rows, their records, and counts of the unused records."""

    arrays: Any
    records: list[Record]
    skipped: dict[str, int]  # reason -> records that cannot be used
    truncated: int  # texts
    lengths: tuple[int, ...] = ()  # tokens of every text before truncation; of pairs, both sides
    turns: tuple[Sequence[Message], ...] = ()  # the conversation of every text; of pairs, both sides
    apart: int = 0  # texts whose prompt and response would share a token, and were tokenised apart
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)  # reason -> valid records without use
    places: dict[str, str] = dataclasses.field(default_factory=dict)  # reason -> where its first record was read

    def __len__(self) -> int:
        return len(self.records)

    @property
    def masks(self) -> list[np.ndarray]:
        """The masks of all sides, bool[N, width] each."""
        return [side.mask for side in sides_of(self.arrays)]

    @property
    def parts(self) -> np.ndarray:
        """Part of a weighted mixture that each row belongs to, i64[N]."""
        return np.array([record.get(PART, 0) for record in self.records], np.int64)

    @property
    def width(self) -> int:
        """Columns, in tokens."""
        return int(self.masks[0].shape[1])

    @property
    def mean_tokens(self) -> float:
        """Real tokens of a record, both sides of a pair together."""
        return float(sum(mask.sum() for mask in self.masks) / len(self))


def sides_of(arrays: Any) -> list[Any]:
    """Returns the texts of a batch type: both sides of a pair, or the batch itself."""
    named = [getattr(arrays, name, None) for name in ("chosen", "rejected", "safer", "unsafer")]
    return [side for side in named if side is not None] or [arrays]


@dataclasses.dataclass(frozen=True)
class Converted:
    """The texts of records, and counts of those not converted."""

    texts: list[tuple[Text, ...]]
    records: list[Record]  # behind the texts
    skipped: dict[str, int]  # as in `Examples`
    left_out: dict[str, int]
    places: dict[str, str]


def convert(
    records: Sequence[Record],
    example: Callable[[Record], tuple[Text, ...]],
    *,
    where: str,
    max_bad: float,
    unfit: Callable[[tuple[Text, ...]], str | None] = lambda texts: None,
) -> Converted:
    """Converts every record; counts unusable and left-out ones by reason.

    Args:
        records: The records.
        example: A record's texts; raises `Unusable`.
        where: Names the data in errors.
        max_bad: Share of records that may be unusable; left-out ones do not count.
        unfit: Returns why texts cannot be used at this length, or None.

    Raises:
        DataError: If more than the share `max_bad` is unusable, or none is left, with the counts and the first ones.
    """
    texts, kept, skipped, left_out = [], [], Counter[str](), Counter[str]()
    first: dict[str, tuple[Record, str]] = {}
    for record in records:
        try:
            if UNUSABLE in record:
                raise Unusable(record[UNUSABLE])
            converted = example(record)
            if problem := unfit(converted):
                raise Unusable(problem)
        except Unusable as reason:
            (left_out if isinstance(reason, LeftOut) else skipped)[str(reason)] += 1
            first.setdefault(str(reason), (record, reason.detail))
            continue
        texts.append(converted)
        kept.append(record)
    bad = sum(skipped.values())
    if not kept or bad > max_bad * len(records):
        without = f"; {sum(left_out.values())} are left out ({listed(left_out)})" if left_out else ""
        shown = "; ".join(
            place_of(record) + excerpt(record) + (f" ({detail})" if detail else "")
            for record, detail in (first[reason] for reason in most(skipped or left_out))
        )
        raise DataError(
            f"{where}: {bad} of {len(records)} records cannot be used ({listed(skipped)}){without}. First: {shown}. "
            + (f"Fix the data, or raise max_bad_records ({max_bad})." if kept else "None is left.")
            + meaning(skipped)
        )
    places = {reason: place for reason, (record, _) in first.items() if (place := place_of(record).removesuffix(": "))}
    return Converted(texts, kept, dict(skipped), dict(left_out), places)


def most(reasons: Counter[str]) -> list[str]:
    """Returns the most frequent reasons."""
    return [reason for reason, _ in reasons.most_common(SHOWN_REASONS)]


def listed(reasons: Counter[str]) -> str:
    """Returns reasons with their counts, the first few of many."""
    found = [f"{reason}: {count}" for reason, count in reasons.most_common(LISTED_REASONS)]
    more = [f"{len(reasons) - len(found)} more reasons"] if len(reasons) > len(found) else []
    return "; ".join(found + more)


def meaning(skipped: Counter[str]) -> str:
    """Explains, if known, why most records are left out for a reason."""
    return "".join(f" {FIXES[reason]}." for reason, _ in skipped.most_common(1) if reason in FIXES)


def excerpt(record: Record) -> str:
    """Returns the beginning of a record."""
    read = {name: value for name, value in record.items() if name not in RESERVED}
    text = printable(json.dumps(read, ensure_ascii=False, default=str))
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " …"


def unfit_texts(texts: tuple[Text, ...], max_length: int) -> str | None:
    """Returns why texts of prompt and response are useless when truncated to `max_length`, or None."""
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


def finished(arrays: Any, made: Converted, texts: Sequence[Text], max_length: int) -> Examples:
    """Returns examples with the lengths of their texts."""
    lengths, turns = tuple(len(text.ids) for text in texts), tuple(text.turns for text in texts)
    cut, apart = sum(length > max_length for length in lengths), sum(text.apart for text in texts)
    return Examples(arrays, made.records, made.skipped, cut, lengths, turns, apart, made.left_out, made.places)


def load_supervised(
    records: Sequence[Record],
    template: Template,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    where: str,
    max_bad: float,
) -> Examples:
    """Returns a `SupervisedBatch` of all records."""
    made = convert(
        records,
        lambda r: supervised_example(r, template, tokenizer),
        where=where,
        max_bad=max_bad,
        unfit=lambda t: unfit_texts(t, max_length),
    )
    rows = [text for (text,) in made.texts]
    check_rendered(rows, template, tokenizer, where)
    padded = pad_right(rows, common_width(rows, max_length), tokenizer.pad_id)
    batch = SupervisedBatch(padded["tokens"], padded["mask"], padded["trained"])
    return finished(batch, made, rows, max_length)


def load_sampled(rows: Sequence[Record], *, width: int, pad_id: int) -> Examples:
    """Returns a `SupervisedBatch` of a policy's sampled tokens, without decoding and encoding them again.

    Args:
        rows: With `prompt_ids` and `response_ids`.
        width: Columns.
        pad_id: Fills the columns after a text.
    """
    parts = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    texts = [Text(prompt + ids, [False] * len(prompt) + [True] * len(ids)) for prompt, ids in parts]
    padded = pad_right(texts, width, pad_id)
    batch = SupervisedBatch(padded["tokens"], padded["mask"], padded["trained"])
    return finished(batch, Converted([], list(rows), {}, {}, {}), texts, width)


def load_pairs(
    records: Sequence[Record],
    template: Template,
    tokenizer: Tokenizer,
    *,
    safety: bool,
    max_length: int,
    where: str,
    max_bad: float,
    shares: bool = False,
    weight_field: str | None = None,
) -> Examples:
    """Returns a `SafetyBatch` or a `PreferenceBatch` of all records; both sides have one width.

    Args:
        records: The records.
        template: Of the run.
        tokenizer: Of the run.
        safety: Makes a `SafetyBatch`.
        max_length: Tokens of a text.
        where: Names the data in errors.
        max_bad: As in `convert`.
        shares: The batch has the shares of annotators for its labels, and records with tied votes are used.
        weight_field: Field with a record's weight, if any.

    Raises:
        DataError: As in `convert`, or if all weights are 0.
    """
    read, texts_of = label_reader(shares=shares), safety_example if safety else preference_example

    def example(record: Record) -> tuple[Text, ...]:
        if weight_field is not None:
            check_weight(record, weight_field)
        return texts_of(record, template, tokenizer, read)

    made = convert(
        paired(records) if safety else records,
        example,
        where=where,
        max_bad=max_bad,
        unfit=lambda t: unfit_texts(t, max_length),
    )
    flat = [text for pair_ in made.texts for text in pair_]
    check_rendered(flat, template, tokenizer, where)
    width = common_width(flat, max_length)

    def side(i: int) -> Sequences:
        padded = pad_right([pair_[i] for pair_ in made.texts], width, tokenizer.pad_id)
        return Sequences(padded["tokens"], padded["mask"], padded["trained"])

    weight = None if weight_field is None else weights_of(made.records, weight_field, where)
    batch = safety_batch if safety else preference_batch
    return finished(batch(side(0), side(1), made.records, weight, shares=shares), made, flat, max_length)


def load_prompts(
    records: Sequence[Record],
    template: Template,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    where: str,
    max_bad: float,
    long_prompts: str = "drop",
    group_field: str | None = None,
    groups: Sequence[str] | None = None,
    readers: Mapping[str, tuple[Template, Tokenizer]] | None = None,
) -> Examples:
    """Returns a `PromptBatch` of all records, left-padded; a too long prompt is dropped or loses its start.

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
        readers: {name: template and tokenizer} of others that have to read a prompt with its response.

    Raises:
        DataError: If a record lacks `group_field`.
    """
    drop = long_prompts == "drop"

    def example(record: Record) -> tuple[Text]:
        (text,) = prompt_example(record, template, tokenizer)
        for name, reader in (readers or {}).items():
            try:
                encode([*text.turns, PROBE[-1]], *reader)
            except Unusable as reason:
                raise Unusable(f"{name}: {reason}", reason.detail) from reason
        return (text,)

    made = convert(
        records,
        example,
        where=where,
        max_bad=max_bad,
        unfit=lambda t: "longer than max_prompt_length" if drop and len(t[0].ids) > max_length else None,
    )
    rows, kept = [text for (text,) in made.texts], made.records
    check_rendered(rows, template, tokenizer, where)
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
            raise DataError(f"{where}: group_field {group_field!r} is missing from records; the first has {keys}")
        names = list(groups or group_names(kept, group_field))
        group = np.array([names.index(str(record[group_field])) for record in kept], np.int32)
    row: Any = np.arange(len(rows), dtype=np.int32)
    return finished(PromptBatch(tokens, mask, group, row), made, rows, width)


def group_names(records: Sequence[Record], field: str | None) -> tuple[str, ...]:
    """Returns the values of a field, sorted; ("all",) without one."""
    return ("all",) if field is None else tuple(sorted({str(record.get(field)) for record in records}))
