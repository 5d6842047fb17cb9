"""Step 3 of the line: a record becomes rows of arrays.

Unusable records are counted by reason, and fatal above a limit.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.data.sources import Record
from safe_rlhf_jax.data.templates import Message, Template, format_dialogue
from safe_rlhf_jax.data.tokenizer import Tokenizer
from safe_rlhf_jax.types import PreferenceBatch, PromptBatch, SafetyBatch, Sequences, SupervisedBatch

MAX_SHOWN = 300  # characters of a bad record in an error
ROUND = 8  # columns: widths are rounded up to a multiple


class Unusable(Exception):
    """A record that a stage cannot use; the message is the reason it is counted under."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, and which of them are the assistant's (EOS included)."""

    ids: list[int]
    trained: list[bool]


@dataclasses.dataclass(frozen=True)
class Examples:
    """A whole dataset as arrays: a batch type with N rows, the records behind them, and what was left out."""

    arrays: Any
    records: list[Record]
    skipped: dict[str, int]
    truncated: int

    def __len__(self) -> int:
        return len(self.records)

    @property
    def masks(self) -> list[np.ndarray]:
        """The masks of all sides, bool[N, width] each."""
        sides = [getattr(self.arrays, name, None) for name in ("chosen", "rejected", "safer", "unsafer")]
        return [side.mask for side in sides if side is not None] or [self.arrays.mask]

    @property
    def width(self) -> int:
        """Columns, in tokens."""
        return int(self.masks[0].shape[1])

    @property
    def mean_tokens(self) -> float:
        """Real tokens of a record, both sides of a pair together."""
        return float(sum(mask.sum() for mask in self.masks) / len(self))


def messages_of(record: Record) -> list[Message]:
    """Returns the conversation of a supervised record, whichever of the known formats it has."""
    if "messages" in record:
        if not isinstance(record["messages"], list) or not record["messages"]:
            raise Unusable("messages is no list of turns")
        return record["messages"]
    if "instruction" in record and "output" in record:
        given = text_of(record, "input") if record.get("input") else ""
        return pair(" ".join(filter(None, (text_of(record, "instruction"), given))), text_of(record, "output"))
    if "prompt" in record and "response" in record:
        return pair(text_of(record, "prompt"), text_of(record, "response"))
    raise Unusable("no messages, prompt + response, or instruction + output")


def text_of(record: Record, field: str) -> str:
    """Returns a field that must be text."""
    if not isinstance(record.get(field), str):
        raise Unusable(f"{field} is missing or no text")
    text: str = record[field]
    return text


def pair(prompt: str, response: str) -> list[Message]:
    """Returns a conversation of one prompt and one response."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def encode(messages: Sequence[Message], template: Template, tokenizer: Tokenizer) -> Text:
    """Tokenises a conversation segment by segment, as generation will see it; EOS follows every response."""
    ids, trained = list(tokenizer.prefix), [False] * len(tokenizer.prefix)
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not content.strip():
            raise Unusable("no response" if i % 2 else "no prompt")
    try:
        segments = format_dialogue(messages, template)
    except ValueError as error:
        raise Unusable("turns that do not alternate between user and assistant") from error
    for segment in segments:
        tokens = tokenizer.encode(segment.text) + ([tokenizer.eos_id] if segment.trained else [])
        ids += tokens
        trained += [segment.trained] * len(tokens)
    return Text(ids, trained)


def supervised_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text]:
    """Returns the text of a demonstration."""
    messages = messages_of(record)
    if len(messages) % 2:
        raise Unusable("the last turn is not the assistant's")
    return (encode(messages, template, tokenizer),)


def two_responses(record: Record, label: str) -> tuple[int, str, str, str]:
    """Returns the label's value (0 or 1), the prompt and both responses."""
    prompt, *responses = (text_of(record, field) for field in ("prompt", "response_0", "response_1"))
    if record.get(label) is None:
        raise Unusable(f"missing {label}")
    if record[label] not in (0, 1):
        raise Unusable(f"{label} is neither 0 nor 1")
    if responses[0] == responses[1]:
        raise Unusable("identical responses")
    return int(record[label]), prompt, responses[0], responses[1]


def preference_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text, Text]:
    """Returns chosen and rejected."""
    better, prompt, *responses = two_responses(record, "better_response_id")
    texts = [encode(pair(prompt, response), template, tokenizer) for response in responses]
    return texts[better], texts[1 - better]


def safety_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text, Text]:
    """Returns the safer and the less safe response."""
    safer, prompt, *responses = two_responses(record, "safer_response_id")
    safe = safety_labels(record)
    if safe[1 - safer] and not safe[safer]:
        raise Unusable("the safer response is labelled unsafe, the other safe")
    texts = [encode(pair(prompt, response), template, tokenizer) for response in responses]
    return texts[safer], texts[1 - safer]


def safety_labels(record: Record) -> tuple[bool, bool]:
    """Returns is_response_0_safe, is_response_1_safe."""
    labels = [record.get(f"is_response_{i}_safe") for i in (0, 1)]
    if any(label not in (True, False) for label in labels):
        raise Unusable("is_response_0_safe or is_response_1_safe missing or not a truth value")
    return bool(labels[0]), bool(labels[1])


def prompt_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text]:
    """Returns the prompt of a record."""
    return (encode([{"role": "user", "content": text_of(record, "prompt")}], template, tokenizer),)


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
    first_bad: Record | None = None
    for record in records:
        try:
            converted = example(record)
            if problem := unfit(converted):
                raise Unusable(problem)
        except Unusable as reason:
            skipped[str(reason)] += 1
            first_bad = first_bad or record
            continue
        texts.append(converted)
        kept.append(record)
    bad = sum(skipped.values())
    if not kept or bad > max_bad * len(records):
        reasons = "; ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
        shown = json.dumps(first_bad, ensure_ascii=False, default=str)
        shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + " …"
        raise ValueError(
            f"{where}: {bad} of {len(records)} records cannot be used ({reasons}). First: {shown}. "
            + (f"Mend the data, or raise max_bad_records ({max_bad})." if kept else "None is left.")
        )
    return texts, kept, dict(skipped)


def unfit_texts(texts: tuple[Text, ...], max_length: int) -> str | None:
    """Returns why texts of prompt and response teach nothing when cut to `max_length`, or None."""
    if not all(any(text.trained[:max_length]) for text in texts):
        return "the prompt fills max_length"
    if len(texts) > 1 and texts[0].ids[:max_length] == texts[1].ids[:max_length]:
        return "responses that are identical within max_length"
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


def load_supervised(
    records: Sequence[Record], template: Template, tokenizer: Tokenizer, *, max_length: int, where: str, max_bad: float
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
    return Examples(batch, kept, skipped, sum(len(text.ids) > max_length for text in rows))


def load_pairs(
    records: Sequence[Record],
    template: Template,
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
        records,
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
    return Examples(batch, kept, skipped, sum(len(text.ids) > max_length for text in flat))


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
        start = len(tokenizer.prefix)  # BOS stays
        ids = text.ids[:start] + text.ids[start:][start - width :]
        tokens[i, width - len(ids) :], mask[i, width - len(ids) :] = ids, True
    group: Any = np.zeros(len(rows), np.int32)
    if group_field is not None:
        if any(group_field not in record for record in kept):
            keys = sorted(kept[0])
            raise ValueError(f"{where}: group_field {group_field!r} is missing from records; the first has {keys}")
        names = list(groups or group_names(kept, group_field))
        group = np.array([names.index(str(record[group_field])) for record in kept], np.int32)
    return Examples(PromptBatch(tokens, mask, group), kept, skipped, sum(len(text.ids) > width for text in rows))


def group_names(records: Sequence[Record], field: str | None) -> tuple[str, ...]:
    """Returns the values of a field, sorted; ("all",) without one."""
    return ("all",) if field is None else tuple(sorted({str(record.get(field)) for record in records}))
