"""Records with their place in a source, their labels, and reasons why one is unusable."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safe_rlhf_jax.errors import DataError

Record = dict[str, Any]
Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}; checked when it is encoded

UNUSABLE = "unusable"  # field with the reason why a record could not be read
LEFT_OUT = "left_out"  # field with the reason why no stage uses a readable record
PART = "mixture_part"  # field with a record's part of a weighted mixture
RESERVED = (UNUSABLE, LEFT_OUT, PART)

IDS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
TRUTHS = IDS | {"no": 0, "yes": 1, "unsafe": 0, "safe": 1}
# All spellings of a label; case and surrounding space do not count.
LABELS: dict[str, Mapping[str, int]] = {
    "better_response_id": IDS,
    "safer_response_id": IDS,
    "is_safe": TRUTHS,
    "is_response_0_safe": TRUTHS,
    "is_response_1_safe": TRUTHS,
}
VOTES = {  # of several annotators
    "better_response_id": "better_votes",
    "safer_response_id": "safer_votes",
    "is_response_0_safe": "response_0_safe_votes",
    "is_response_1_safe": "response_1_safe_votes",
}
SHARES = {label: votes.replace("votes", "share") for label, votes in VOTES.items()}  # of the annotators who say 1
TIES = {
    "better_response_id": "as many annotators prefer one response as the other",
    "safer_response_id": "as many annotators prefer one response as the other",
    "is_response_0_safe": "as many annotators call a response safe as unsafe",
    "is_response_1_safe": "as many annotators call a response safe as unsafe",
}
MISSING = ("nan", "NaN", "<NA>")  # texts that pandas writes for missing values
SHOWN_VALUE = 40  # characters of a value in a reason


class Unusable(Exception):
    """A record that a stage cannot use; the message is the reason it is counted under, the detail is this record's."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class LeftOut(Unusable):
    """A valid record without use for a stage: it does not count as a bad one."""


class Located(Record):
    """A record with its place in a source; equal to any other with the same fields."""

    __slots__ = ("number", "source")

    def __init__(self, fields: Mapping[str, Any], source: str, number: int):
        super().__init__(fields)
        self.source, self.number = source, number  # "pairs.jsonl:", 18

    def __or__(self, other: Mapping[str, Any]) -> "Located":  # type: ignore[override]
        return Located({**self, **other}, self.source, self.number)


def located(records: Sequence[Record], source: str) -> list[Record]:
    """Returns records with their numbers in a source.

    Raises:
        DataError: If one has a column of a reserved name.
    """
    for taken in RESERVED:
        if any(taken in record for record in records):
            raise DataError(f"data {source.rstrip()}: there is a column of the reserved name {taken!r}; rename it")
    return [Located(record, source, number) for number, record in enumerate(records, 1)]


def like(record: Record, fields: Record) -> Record:
    """Returns fields as a record with the place of another."""
    return Located(fields, record.source, record.number) if isinstance(record, Located) else fields


def place_of(record: Record) -> str:
    """Returns the place of a record, followed by a colon; empty if unknown."""
    return printable(f"{record.source}{record.number}: ") if isinstance(record, Located) else ""


def printable(text: str) -> str:
    """Returns a text that any terminal accepts: without lone surrogates, which file names may contain too."""
    return text.encode(errors="replace").decode()


def holds(value: Any) -> bool:
    """Says whether a column has a value in a record: neither null nor NaN, which pandas writes for null."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def columns_of(records: Sequence[Record]) -> set[str]:
    """Returns the non-empty columns of a readable record."""
    found: set[str] = set()
    for record in records:
        if UNUSABLE not in record:
            found.update(name for name, value in record.items() if name not in found and holds(value))
    return found


def brief(value: Any) -> str:
    """Returns a value for a reason or an error, truncated to fit a line."""
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else text[:SHOWN_VALUE] + "…"


def text_of(record: Record, field: str) -> str:
    """Returns a field that must be text."""
    value = record.get(field)
    if not isinstance(value, str):
        kind = "" if value is None else f" ({type(value).__name__})"
        raise Unusable(f"{field} is missing or no text{kind}")
    if value.strip() in MISSING:
        raise Unusable(f"{field} is {value.strip()!r}, as pandas writes what is missing")
    return value


def label_of(record: Record, field: str) -> int:
    """Returns the label in a field, 0 or 1, in any of the spellings in `LABELS`."""
    value = record.get(field)
    if not holds(value) or not str(value).strip():
        if field in TIES and (isinstance(record.get(VOTES[field]), list) or record.get(SHARES[field]) == 0.5):
            raise LeftOut(TIES[field])
        raise Unusable(f"missing {field}")
    label = LABELS[field].get(str(value).strip().lower())
    if label is None:
        allowed = "0 nor 1" if LABELS[field] is IDS else "true nor false"
        raise Unusable(f"{field} is neither {allowed}, but {brief(value)}")
    return label


def share_of(record: Record, label: str) -> float:
    """Returns the share of annotators for label 1: by their votes, else as given, else 0 or 1 by the label."""
    votes, share = record.get(VOTES[label]), record.get(SHARES[label])
    if votes:
        return float(sum(votes) / len(votes))
    return float(label_of(record, label) if share is None else share)


def number_in(record: Record, field: str, most: float, what: str) -> float:
    """Returns the number in a field, from 0 to `most`."""
    value: Any = record.get(field)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = math.nan if isinstance(value, bool) else float(value)
        if 0.0 <= number <= most and number < math.inf:
            return number
    raise Unusable(f"{field} is no {what}, but {brief(value)}" if holds(value) else f"missing {field}")


def labels_in(record: Record) -> Record:
    """Returns the readable labels of a record: ids as 0 and 1, the others as truth values."""
    found: Record = {}
    for field in LABELS.keys() & record.keys():
        with contextlib.suppress(Unusable):
            label = label_of(record, field)
            found[field] = label if LABELS[field] is IDS else bool(label)
    return found


def is_true(value: Any) -> bool:
    """Says whether a value is one of the spellings of true."""
    return TRUTHS.get(str(value).strip().lower()) == 1


def majority_of(votes: Sequence[int]) -> int | None:
    """Returns what most of the votes are, 0 or 1; None in a tie."""
    return None if 2 * sum(votes) == len(votes) else int(2 * sum(votes) > len(votes))


def majority(label: str, votes: Sequence[int]) -> Record:
    """Returns votes with their majority label; without one in a tie."""
    most = majority_of(votes)
    return {VOTES[label]: list(votes)} | ({} if most is None else {label: most})


def voted(record: Record) -> Record:
    """Returns the votes of a record as 0 and 1, shares as numbers, and their labels if it has none."""
    found: Record = {}
    for label, field in VOTES.items():
        votes = record.get(field)
        if not holds(votes):
            continue
        if not isinstance(votes, list):
            raise Unusable(f"{field} is no list of votes")
        found |= majority(label, [label_of({label: vote}, label) for vote in votes if holds(vote)])
        found |= {label: record[label]} if holds(record.get(label)) else {}
    for label, field in SHARES.items():
        if holds(record.get(field)):
            share = found[field] = number_in(record, field, 1.0, "share from 0 to 1")
            if share != 0.5 and not (holds(record.get(label)) or VOTES[label] in found):
                found[label] = int(share > 0.5)
    return found


def flaw(value: Any, deepest: int = 50) -> str | None:
    """Returns why a value as read is unusable, at any depth, or None."""
    level = [value]
    for _ in range(deepest):
        if not level:
            return None
        for item in level:
            if isinstance(item, Repeating):
                return f"the key {brief(item.key)} stands twice in an object"
            if isinstance(item, str) and not item.isascii() and not is_encodable(item):
                return "half a character (a lone surrogate)"
        level = [inner for item in level for inner in inside(item)]
    return f"nested more than {deepest} deep"


def one_line(error: Exception) -> str:
    """Returns the first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def inside(value: Any) -> Iterator[Any]:
    """Yields the members of a list or an object, keys included."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def is_encodable(text: str) -> bool:
    """Says whether a text has no lone surrogate, half of a character that needs two."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Repeating(Record):
    """An object of JSON with a duplicate key."""

    def __init__(self, fields: Record, key: str):
        super().__init__(fields)
        self.key = key
