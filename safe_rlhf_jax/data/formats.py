"""Step 1 of the line, second half: published formats, and their conversion to one kind of record.

A record is a dictionary with those of these fields that its file has; one record can serve several stages:

    messages                                   a conversation; SFT trains every turn of the assistant
    prompt                                     text, or the turns up to the one to respond to; all RL needs
    response                                   a demonstration; with `is_safe` it is one half of a safety pair
    response_0, response_1                     two responses to the prompt
    better_response_id                         0 or 1: which is more helpful         (reward, DPO; SFT trains on it)
    safer_response_id, is_response_{0,1}_safe  which is less harmful, and labels     (cost)
    better_votes, safer_votes,                 of several annotators, 0 or 1 each; the majority is the label
    response_{0,1}_safe_votes
    better_share, … (`SHARES`)                 the share of annotators for 1, where the votes are not there

Every other field is kept unchanged: harm categories, severity, sources, groups.
"""

import dataclasses
import math
import os.path
import re
from collections.abc import Callable, Sequence
from typing import Any

from safe_rlhf_jax.data.records import (
    LABELS,
    LEFT_OUT,
    SHARES,
    VOTES,
    brief,
    columns_of,
    holds,
    label_of,
    labels_in,
    like,
    majority,
    text_of,
    voted,
)
from safe_rlhf_jax.data.records import PART as PART  # found here too
from safe_rlhf_jax.data.records import UNUSABLE as UNUSABLE
from safe_rlhf_jax.data.records import Message as Message
from safe_rlhf_jax.data.records import Record as Record
from safe_rlhf_jax.data.records import Unusable as Unusable
from safe_rlhf_jax.data.turns import (
    ASKED,
    TURN,
    plain,
    prompt_of,
    read_lists,
    response_of,
    transcript_turns,
    turns_of,
)
from safe_rlhf_jax.errors import DataError

LOOKED_AT = 100  # records used to distinguish formats with equal columns
RESPONSES = ("response", "response_0", "response_1")
OWN = ("messages", "prompt", *RESPONSES, *LABELS, *VOTES.values(), *SHARES.values())  # fields that stages read
RATINGS = ("fine-grained_score", "overall_score", "score")  # of a completion, the most trusted first
NO_INPUT = "<noinput>"  # as Alpaca's own code takes it
ALPACA = ("input", "system", "history")  # columns beside `instruction`
ASKED_IN = ("input", "query", "question")  # columns that hold a prompt under another name
ANNOTATOR = re.compile(r"annotator\d+")


def from_own(record: Record) -> Record:
    """The project's own fields, as far as present: turns, texts and labels in one spelling."""
    found = dict(record)
    if not holds(found.get("messages")):
        found.pop("messages", None)
    else:
        found["messages"] = turns_of(found["messages"], "messages")
    if "prompt" in found:
        found["prompt"] = prompt_of(record["prompt"])
    for field in found.keys() & set(RESPONSES):
        found[field] = response_of(record[field], record.get("prompt"), field)
    return found | voted(record)


@dataclasses.dataclass(frozen=True)
class Format:
    """A published format: the columns that identify it, and its conversion."""

    needs: tuple[str, ...]  # columns
    convert: Callable[[Record], Record] = from_own  # raises Unusable
    also: tuple[str, ...] = ()  # columns that `convert` reads where they exist
    without: tuple[str, ...] = ()  # columns with information that it would ignore
    fits: Callable[[Record], bool] = lambda record: True  # distinguishes formats with equal columns

    def read(self, raw: Record) -> Record:
        """Returns the record; an unreadable one keeps its fields, with the reason.

        Empty fields are absent. Of the fields that stages read, a record has only those of its format.
        """
        if UNUSABLE in raw:
            return raw
        given = dict.fromkeys(self.needs) | {name: value for name, value in raw.items() if holds(value)}
        read = OWN if self.convert is from_own else (*self.needs, *self.also)
        rest = {name: value for name, value in given.items() if name not in (*read, *OWN)}
        try:
            found = self.convert(read_lists(given, read))
            found |= labelled(given, found)
        except Unusable as reason:
            return raw | {UNUSABLE: str(reason)}
        return like(raw, rest | found | labels_in(found))


def labelled(given: Record, found: Record) -> Record:
    """Returns the `is_safe` label of an answer, in any format."""
    if "is_safe" not in given or found.keys().isdisjoint(("response", "messages")):
        return {}
    if "response" not in found and "response_0" not in found and not label_of(given, "is_safe"):
        return {LEFT_OUT: "the response is labelled unsafe"}
    return {"is_safe": given["is_safe"]}


def preference(turns: Sequence[Message], chosen: Any, rejected: Any) -> Record:
    """Returns a pair in which the first response is the better one."""
    return {"prompt": plain(turns), "response_0": chosen, "response_1": rejected, "better_response_id": 0}


def dialogue_pair(chosen: Sequence[Message], rejected: Sequence[Message]) -> Record:
    """Returns the pair of two conversations that differ in their last turn."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected part before the last turn")
    if any(turns[-1].get("role") != "assistant" for turns in (chosen, rejected)) or len(chosen) < 2:
        raise Unusable("the last turn is not the assistant's")
    return preference(chosen[:-1], chosen[-1].get("content"), rejected[-1].get("content"))


def from_transcripts(record: Record) -> Record:
    """Anthropic HH: two transcripts; their common part is the prompt."""
    return dialogue_pair(*(transcript_turns(text_of(record, side)) for side in ("chosen", "rejected")))


def are_transcripts(record: Record) -> bool:
    """Distinguishes HH from TRL's implicit prompts."""
    sides = (record.get("chosen"), record.get("rejected"))
    return all(isinstance(side, str) and "Assistant" in TURN.findall(side) for side in sides)


def from_red_team(record: Record) -> Record:
    """Anthropic red-team attempts: the attack's opening is a prompt; the transcript and its ratings stay."""
    ratings = {name: value for name, value in record.items() if name not in OWN}
    return ratings | {"prompt": transcript_turns(text_of(record, "transcript"))[0]["content"]}


def optional_text(record: Record, field: str) -> str:
    """Returns an optional text: "" if it is missing or blank."""
    value = text_of(record, field) if holds(record.get(field)) else ""
    return value if value.strip() else ""


def system_turns(record: Record) -> list[Message]:
    """Returns the system message of a record as turns, none if it has none."""
    system = optional_text(record, "system")
    return [{"role": "system", "content": system}] if system else []


def instruction_of(record: Record) -> str:
    """Returns Alpaca's prompt: the input follows the instruction after a space, as in the reference."""
    given = optional_text(record, "input")
    given = "" if given.strip().lower() == NO_INPUT else given
    return " ".join(filter(None, (text_of(record, "instruction"), given)))


def alpaca_turns(record: Record) -> list[Message]:
    """Returns Alpaca's prompt, after the system message and the earlier turns of LLaMA-Factory."""
    turns = system_turns(record)
    earlier = record.get("history") or []
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise Unusable("history is no list of pairs of texts")
    for asked, answered in earlier:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*turns, {"role": "user", "content": instruction_of(record)}]


def from_alpaca(record: Record) -> Record:
    """Alpaca, also with LLaMA-Factory's additions."""
    return {"prompt": plain(alpaca_turns(record)), "response": text_of(record, "output")}


def are_texts(record: Record) -> bool:
    """Says whether chosen and rejected are texts, not conversations that include the prompt."""
    return isinstance(record.get("chosen"), str) and isinstance(record.get("rejected"), str)


def from_alpaca_preference(record: Record) -> Record:
    """LLaMA-Factory's preferences: Alpaca's prompt with two texts."""
    return preference(alpaca_turns(record), text_of(record, "chosen"), text_of(record, "rejected"))


def compared(record: Record, first: str, second: str, label: Record) -> Record:
    """Returns a pair of two models' responses to an instruction; a pair with an empty one is left out."""
    responses = [text_of(record, field) for field in (first, second)]
    empty = {} if all(map(str.strip, responses)) else {LEFT_OUT: "a model's response is empty"}
    pair = {"prompt": instruction_of(record), "response_0": responses[0], "response_1": responses[1]}
    return pair | label | empty


def from_pandalm(record: Record) -> Record:
    """PandaLM: each annotator prefers the first response (1), the second (2) or neither (0)."""
    choices = [record[name] for name in sorted(record) if ANNOTATOR.fullmatch(name) and holds(record[name])]
    for choice in choices:
        if number(choice) not in (0, 1, 2):
            raise Unusable(f"an annotator's choice is none of 0, 1 and 2, but {brief(choice)}")
    votes = [int(float(choice)) - 1 for choice in choices if float(choice)]
    return compared(record, "response1", "response2", majority("better_response_id", votes))


def from_alpaca_eval(record: Record) -> Record:
    """AlpacaEval: the first output (1), the second (2), or between them with a weight; 0 and 1.5 are draws."""
    preferred = number(record["preference"])
    if preferred is None or not (preferred == 0 or 1 <= preferred <= 2):
        raise Unusable(f"preference is neither 0, 1 nor 2, but {brief(record['preference'])}")
    draw = preferred in (0, 1.5)
    label: Record = {"better_votes": []} if draw else {"better_response_id": int(preferred > 1.5)}
    return compared(record, "output_1", "output_2", label)


def from_questions(record: Record) -> Record:
    """MT-bench and Vicuna's questions: the first turn; the second asks about a missing answer."""
    turns = record["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise Unusable("turns is no list of texts")
    return {"prompt": turns[0]}


def from_safety_tests(record: Record) -> Record:
    """SimpleSafetyTests."""
    return {"prompt": text_of(record, "prompts_final")}


def from_sharegpt(record: Record) -> Record:
    """ShareGPT: conversations, with `chosen` and `rejected` where it is a preference."""
    turns = [*system_turns(record), *turns_of(record.get("conversations"), "conversations")]
    if "chosen" not in record and "rejected" not in record:
        return {"messages": turns}
    return dialogue_pair(*([*turns, *side_of(record, side)] for side in ("chosen", "rejected")))


def side_of(record: Record, side: str) -> list[Message]:
    """Returns the turns of a preference's side, which may be a single one."""
    value = record.get(side)
    if not holds(value):
        raise Unusable(f"{side} is missing")
    return turns_of([value] if isinstance(value, dict) else value, side)


def asked_turns(prompt: Any) -> list[Message]:
    """Returns the turns of a prompt."""
    asked = prompt_of(prompt)
    return asked if isinstance(asked, list) else [{"role": "user", "content": text_of({"prompt": asked}, "prompt")}]


def from_trl(record: Record) -> Record:
    """TRL preferences: text or turns, the prompt beside the responses."""
    prompt, chosen, rejected = (record.get(field) for field in ("prompt", "chosen", "rejected"))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        sides = [side_of(record, side) for side in ("chosen", "rejected")]
        if sides[0][0]["role"] == "assistant":  # otherwise each side is a whole conversation
            asked = asked_turns(prompt)
            sides = [[*asked, *side] for side in sides]
        elif holds(prompt) and not all(turn in sides[0] for turn in asked_turns(prompt)):
            raise Unusable("chosen is a conversation in which the prompt does not stand")
        return dialogue_pair(*sides)
    if all(ASKED.match(side) for side in (chosen, rejected)):  # each side is a whole transcript
        if not isinstance(prompt, str) or prompt.strip() not in chosen:
            raise Unusable("chosen is a transcript in which the prompt does not stand")
        return from_transcripts(record)
    sides = [response_of(side, prompt, name) for name, side in (("chosen", chosen), ("rejected", rejected))]
    return {"prompt": prompt_of(prompt), "response_0": sides[0], "response_1": sides[1], "better_response_id": 0}


def from_implicit(record: Record) -> Record:
    """TRL preferences with the prompt inside both sides."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return dialogue_pair(*(side_of(record, side) for side in ("chosen", "rejected")))
    if asked := [name for name in ASKED_IN if holds(record.get(name))]:
        raise Unusable(f"chosen and rejected beside {asked[0]!r}, which `fields` should name if it is the prompt")
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 of texts, no paths
    cut = max(shared.rfind(" "), shared.rfind("\n")) + 1  # no word is cut in two
    return preference(asked_turns(shared[:cut].strip()), chosen[cut:], rejected[cut:])


def from_completion(record: Record) -> Record:
    """TRL demonstrations: the completion is trained, the prompt is not."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(completion, str):
        return {"prompt": prompt_of(prompt), "response": response_of(completion, prompt, "completion")}
    turns = [*asked_turns(prompt), *side_of(record, "completion")]
    if turns[-1]["role"] != "assistant":
        raise Unusable("the last turn is not the assistant's")
    return {"prompt": plain(turns[:-1]), "response": turns[-1]["content"]}


def number(value: Any) -> float | None:
    """Returns a finite number, also one that is written as text; None for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def from_ultrafeedback(record: Record) -> Record:
    """UltraFeedback: the completion with the best score against the one with the worst.

    The mean of the aspects' ratings (`fine-grained_score`) counts where there is one: `overall_score` is known to
    mistake some of the worst for the best (argilla/ultrafeedback-binarized-preferences).
    """
    completions = record.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        raise Unusable("fewer than two completions")
    if not all(isinstance(completion, dict) for completion in completions):
        raise Unusable("a completion is no object with a response and a score")
    rating = next((name for name in RATINGS if any(completion.get(name) is not None for completion in completions)), "")
    scores = [score for completion in completions if (score := number(completion.get(rating))) is not None]
    if len(scores) < len(completions):
        raise Unusable("a completion without a score")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise Unusable("all completions have one score")
    sides = [text_of(completions[i], "response") for i in (best, worst)]
    return preference([{"role": "user", "content": text_of(record, "instruction")}], *sides)


# The first match is taken, so formats that need more columns come first.
FORMATS: dict[str, Format] = {
    "pku": Format(("prompt", "response_0", "response_1")),
    "qa": Format(("prompt", "response", "is_safe")),
    "hh_red_team": Format(("transcript", "min_harmlessness_score_transcript"), from_red_team),
    "sharegpt": Format(("conversations",), from_sharegpt, also=("chosen", "rejected", "system")),
    "ultrafeedback": Format(("instruction", "completions"), from_ultrafeedback),
    "pandalm": Format(("instruction", "response1", "response2", "annotator1"), from_pandalm, also=("input",)),
    "alpaca_eval": Format(("instruction", "output_1", "output_2", "preference"), from_alpaca_eval, also=("input",)),
    "alpaca": Format(("instruction", "output"), from_alpaca, also=ALPACA),
    "trl_preference": Format(("prompt", "chosen", "rejected"), from_trl),
    "alpaca_preference": Format(
        ("instruction", "chosen", "rejected"), from_alpaca_preference, also=ALPACA, fits=are_texts
    ),
    "hh": Format(("chosen", "rejected"), from_transcripts, fits=are_transcripts),
    "trl_implicit": Format(("chosen", "rejected"), from_implicit),
    "trl_completion": Format(("prompt", "completion"), from_completion, without=("label",)),
    "messages": Format(("messages",)),
    "demonstrations": Format(("prompt", "response")),
    "prompts": Format(("prompt",)),
    "questions": Format(("question_id", "turns"), from_questions),
    "safety_tests": Format(("prompts_final",), from_safety_tests),
}


def recognise(raw: Sequence[Record], name: str | None, where: str) -> str:
    """Returns the format of records.

    Args:
        raw: As read.
        name: Of the format; None recognises it by the non-empty columns.
        where: Names the data in errors.

    Raises:
        DataError: If the columns fit no format, or not the named one; lists both.
    """
    columns = columns_of(raw)
    known = "; ".join(f"{key} ({', '.join(format_.needs)})" for key, format_ in FORMATS.items())
    if name is not None and name not in FORMATS:
        raise DataError(f"{where}: format {name!r} is unknown. Formats: {known}")
    for key in FORMATS if name is None else (name,):
        fits = columns.isdisjoint(FORMATS[key].without) and any(map(FORMATS[key].fits, raw[:LOOKED_AT]))
        if (fits or name is not None) and columns.issuperset(FORMATS[key].needs):
            return key
    if name is not None:
        needs = list(FORMATS[name].needs)
        raise DataError(f"{where}: format {name!r} needs the columns {needs}; there are {sorted(columns)}")
    raise DataError(
        f"{where}: the columns {sorted(columns)} fit no known format; rename them with `fields`, such as "
        f"{{prompt: question}}. Formats: {known}"
    )


def other_formats(raw: Sequence[Record], key: str) -> list[str]:
    """Returns the formats that records also fit, by columns that the recognised one does not read."""
    columns, own = columns_of(raw), FORMATS[key].convert is from_own
    read = OWN if own else (*FORMATS[key].needs, *FORMATS[key].also)
    return [
        other
        for other, format_ in FORMATS.items()
        if columns.issuperset(format_.needs) and not set(read).issuperset(format_.needs)
    ]
