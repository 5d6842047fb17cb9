"""Report on a data set as a stage reads it: counts, lengths, labels, harm categories, records with their loss mask."""

import itertools
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text as Styled

from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.formats import OWN
from safe_rlhf_jax.data.records import (
    LABELS,
    RESERVED,
    SHARES,
    UNUSABLE,
    VOTES,
    Record,
    Unusable,
    columns_of,
    holds,
    is_true,
    label_of,
    printable,
    share_of,
)
from safe_rlhf_jax.data.sources import prompt_key, record_key
from safe_rlhf_jax.data.tokenizer import Tokenizer

BINS = 10  # of the histogram
BAR = 40  # characters of its longest bar
SHOWN_CATEGORIES = 20
SHOWN_REASONS = 20
SHOWN_LABELS = 3  # reasons why a label cannot be read
SIDES = ("chosen", "rejected", "safer", "unsafer")


def show(
    console: Console,
    title: str,
    records: Sequence[Record],
    data: Examples,
    *,
    tokenizer: Tokenizer,
    max_length: int,
    shown: int = 2,
) -> None:
    """Prints the report on a data set of a stage.

    Args:
        console: The output; colours on a terminal, brackets elsewhere.
        title: Names the stage and the data.
        records: As read.
        data: The examples made of them.
        tokenizer: Of the run.
        max_length: Maximum tokens of a text.
        shown: Number of records to print.
    """
    lines = [Styled(title, "bold")]
    facts = [*counts(records, data), *unread(records, data.skipped)]
    facts += [*lengths(data, max_length), *unknown(data, tokenizer), *labels(data)]
    lines += [Styled(f"  {line}") for line in facts]
    for i in range(min(shown, len(data))):
        for name, tokens, mask, trained in rows_of(data, i):
            lines += [Styled(f"  record {i + 1}, {name}:", "bold")]
            lines += [written(tokens[mask], trained[mask], tokenizer, brackets=not console.is_terminal)]
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print()


def counts(records: Sequence[Record], data: Examples) -> list[str]:
    """Returns the numbers of all, usable, skipped and repeated records."""
    total = len(data) + sum(data.skipped.values()) + sum(data.left_out.values())
    out = [f"{total} records, {len(data)} can be used"]
    for how, reasons in (("skipped", data.skipped), ("left out", data.left_out)):
        for reason, count in Counter(reasons).most_common(SHOWN_REASONS):
            first = f" (first: {data.places[reason]})" if reason in data.places else ""
            out.append(f"  {how} {count}: {reason}{first}")
        if len(reasons) > SHOWN_REASONS:
            out.append(f"  {how} for {len(reasons) - SHOWN_REASONS} more reasons")
    read = [record for record in records if UNUSABLE not in record]
    repeats, prompts = (len(read) - len({key(record) for record in read}) for key in (record_key, prompt_key))
    return [*out, f"duplicates: {repeats} records, {prompts} prompts"]


def unread(records: Sequence[Record], told: Container[str]) -> list[str]:
    """Returns unreadable labels that no reason covers, and columns that no stage reads."""
    out = []
    for field in LABELS:
        reasons = (reason for record in records if (reason := label_problem(record, field)))
        bad = Counter(reason for reason in reasons if reason not in told)
        out += [f"  {reason}: {count}" for reason, count in bad.most_common(SHOWN_LABELS)]
    others = {name for name in columns_of(records) if name not in (*OWN, *RESERVED)}
    return [*out, f"other columns: {printable(', '.join(sorted(others)))}"] if others else out


def label_problem(record: Record, field: str) -> str | None:
    """Returns why a present label cannot be read, or None."""
    value = record.get(field)
    if UNUSABLE in record or not holds(value) or not str(value).strip():
        return None
    try:
        label_of(record, field)
    except Unusable as problem:
        return str(problem)
    return None


def lengths(data: Examples, max_length: int) -> list[str]:
    """Returns a histogram of the texts' lengths in tokens, before truncation."""
    values = np.array(data.lengths)
    low, middle, high = (int(np.quantile(values, q)) for q in (0.05, 0.5, 0.95))
    out = [f"tokens of a text: mean {values.mean():.0f}, 5 % {low}, median {middle}, 95 % {high}, most {values.max()}"]
    size = -(-int(values.max() + 1) // BINS)
    numbers = np.bincount(values // size, minlength=BINS)
    for i, number in enumerate(numbers):
        bar = "█" * -(-BAR * int(number) // int(numbers.max()))
        out.append(f"  {i * size:>6} to {(i + 1) * size - 1:<6} {number:>8} {bar}")
    cut = f"cut to {max_length} tokens: {data.truncated} of {len(values)} texts ({data.truncated / len(values):.1%})"
    apart = f"prompt and response would share a token, and are tokenised apart: {data.apart} texts"
    return [*out, cut, *([apart] if data.apart else [])]


def unknown(data: Examples, tokenizer: Tokenizer) -> list[str]:
    """Returns a line with the share of unknown tokens, if there are any."""
    sides = [getattr(data.arrays, name) for name in SIDES if hasattr(data.arrays, name)] or [data.arrays]
    tokens = np.concatenate([side.tokens[side.mask] for side in sides])
    found = float((tokens == tokenizer.hf.unk_token_id).mean())
    is_told = found and tokenizer.hf.unk_token_id != tokenizer.eos_id  # as in GPT-2, whose every text ends with it
    return [f"unknown to the tokenizer: {found:.1%} of the tokens"] if is_told else []


def labels(data: Examples) -> list[str]:
    """Returns the distribution of labels, harm categories and severities over the usable records."""
    out = []
    if hasattr(data.arrays, "chosen"):
        second = sum(share_of(record, "better_response_id") > 0.5 for record in data.records)
        out.append(f"better response: {share(len(data) - second, len(data))} the first")
        out += divided(data, "better_response_id")
    if hasattr(data.arrays, "safer"):
        safe = np.stack([data.arrays.safer_is_safe, data.arrays.unsafer_is_safe])
        out.append(f"labelled safe: {share(int(safe.sum()), safe.size)} of the responses")
        kinds = {"both": safe.all(0), "only the safer": safe[0] & ~safe[1], "neither": ~safe.any(0)}
        out.append("safe in a pair: " + ", ".join(f"{k} {share(int(v.sum()), v.size)}" for k, v in kinds.items()))
        out += divided(data, "safer_response_id")
    for what in ("category", "severity", "prompt_source"):
        found = Counter(value for record in data.records for value in values_of(record, what))
        if found:
            named = ", ".join(f"{value} {count}" for value, count in found.most_common(SHOWN_CATEGORIES))
            more = f", and {len(found) - SHOWN_CATEGORIES} more" if len(found) > SHOWN_CATEGORIES else ""
            out.append(f"{what}: {named}{more}")
    return out


def divided(data: Examples, label: str) -> list[str]:
    """Returns a line with the share of records on whose label several annotators are divided, if any has several."""
    if not any(VOTES[label] in record or SHARES[label] in record for record in data.records):
        return []
    split = sum(0 < share_of(record, label) < 1 for record in data.records)
    return [f"annotators divided on it: {share(split, len(data))} of the pairs"]


def values_of(record: Record, what: str) -> list[str]:
    """Returns the values of the fields whose name contains a word; of {category: bool}, the true categories."""
    out: list[str] = []
    for field, value in record.items():
        if what in field and isinstance(value, dict):
            out += [str(name) for name, holds in value.items() if is_true(holds)]
        elif what in field and isinstance(value, str | int):
            out.append(str(value))
    return list(map(printable, out))


def share(part: int, whole: int) -> str:
    """Returns a share in per cent."""
    return f"{part / max(whole, 1):.1%}"


def rows_of(data: Examples, i: int) -> list[tuple[str, Any, Any, Any]]:
    """Returns (name, tokens, mask, trained) of the texts of a row."""
    sides = [(name, getattr(data.arrays, name, None)) for name in SIDES]
    rows = [(name, side.tokens[i], side.mask[i], side.response_mask[i]) for name, side in sides if side is not None]
    if rows:
        return rows
    trained = getattr(data.arrays, "loss_mask", np.zeros_like(data.arrays.mask))
    name = "demonstration" if hasattr(data.arrays, "loss_mask") else "prompt"
    return [(name, data.arrays.tokens[i], data.arrays.mask[i], trained[i])]


def written(tokens: Any, trained: Any, tokenizer: Tokenizer, *, brackets: bool) -> Styled:
    """Returns a row as the model sees it, with trained tokens in green, or in [[ ]]."""
    out = Styled("  ")
    starts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    for start, end in itertools.pairwise(starts):
        text = tokenizer.hf.decode(tokens[start:end].tolist(), clean_up_tokenization_spaces=False)
        opened, closed = ("[[", "]]") if brackets and trained[start] else ("", "")
        out.append(f"{opened}{text}{closed}", style="green" if trained[start] else "")
    return out
