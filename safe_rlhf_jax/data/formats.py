"""Step 1 of the line, second half: published formats, and the one kind of record that they all become.

A record is a dictionary with whichever of these fields its file can give; one record can serve several stages:

    messages                                   a conversation; SFT trains every turn of the assistant
    prompt                                     text, or the turns up to the one to respond to; all RL needs
    response                                   a demonstration; with `is_safe` it is one half of a safety pair
    response_0, response_1                     two responses to the prompt
    better_response_id                         0 or 1: which is more helpful         (reward, DPO; SFT trains on it)
    safer_response_id, is_response_{0,1}_safe  which is less harmful, and labels     (cost)

Every other field stays as it is: harm categories, severity, sources, groups.
"""

import dataclasses
import os.path
import re
from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]
Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}; checked when it is encoded

UNUSABLE = "unusable"  # field that holds why a record of a known format could not be read
PART = "mixture_part"  # field that holds which part of a weighted mixture a record is of
LOOKED_AT = 100  # records whose contents tell formats with equal columns apart
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system",
}  # fmt: skip


class Unusable(Exception):
    """A record that a stage cannot use; the message is the reason it is counted under."""


def as_it_is(record: Record) -> Record:
    """Returns the fields of a record that has the project's own names."""
    return record


@dataclasses.dataclass(frozen=True)
class Format:
    """How the records of a published data set are recognised, and read."""

    needs: tuple[str, ...]  # columns
    convert: Callable[[Record], Record] = as_it_is  # raises Unusable
    also: tuple[str, ...] = ()  # columns that `convert` reads where they exist
    fits: Callable[[Record], bool] = lambda record: True  # tells formats with equal columns apart

    def read(self, raw: Record) -> Record:
        """Returns the record; one that cannot be read keeps its fields and says why."""
        if self.convert is as_it_is:
            return raw
        try:
            rest = {name: value for name, value in raw.items() if name not in (*self.needs, *self.also)}
            return rest | self.convert(raw)
        except Unusable as reason:
            return raw | {UNUSABLE: str(reason)}


def text_of(record: Record, field: str) -> str:
    """Returns a field that must be text."""
    if not isinstance(record.get(field), str):
        raise Unusable(f"{field} is missing or no text")
    text: str = record[field]
    return text


def turns_of(value: Any, what: str) -> list[Message]:
    """Returns turns [{role, content}], also from ShareGPT's [{from, value}]."""
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"{what} is no list of turns")
    if "from" not in turns[0]:
        return turns
    unknown = [turn.get("from") for turn in turns if turn.get("from") not in ROLES]
    if unknown:
        raise Unusable(f"a turn is from {unknown[0]!r}, neither human, gpt nor system")
    return [{"role": ROLES[turn["from"]], "content": turn.get("value")} for turn in turns]


def transcript_turns(text: str) -> list[Message]:
    r"""Returns the turns of a transcript, `\n\nHuman: … \n\nAssistant: …`."""
    before, *rest = TURN.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not rest:
        raise Unusable("no transcript of Human and Assistant turns")
    speakers, contents = rest[::2], rest[1::2]
    return [
        {"role": ROLES["human" if speaker == "Human" else "gpt"], "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]


def prompt_and(turns: Sequence[Message], **fields: Any) -> Record:
    """Returns a record whose prompt is text where one turn of the user is all of it, else the turns."""
    plain = len(turns) == 1 and turns[0].get("role") == "user"
    return {"prompt": turns[0].get("content") if plain else list(turns), **fields}


def preference(turns: Sequence[Message], chosen: Any, rejected: Any) -> Record:
    """Returns a pair in which the first response is the better one."""
    return prompt_and(turns, response_0=chosen, response_1=rejected, better_response_id=0)


def dialogue_pair(chosen: Sequence[Message], rejected: Sequence[Message]) -> Record:
    """Returns the pair of two conversations that differ in their last turn."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected part before the last turn")
    if any(turns[-1].get("role") != "assistant" for turns in (chosen, rejected)) or len(chosen) < 2:
        raise Unusable("the last turn is not the assistant's")
    return preference(chosen[:-1], chosen[-1].get("content"), rejected[-1].get("content"))


def from_transcripts(record: Record) -> Record:
    """Anthropic HH: two transcripts; what they share is the prompt."""
    return dialogue_pair(*(transcript_turns(text_of(record, side)) for side in ("chosen", "rejected")))


def is_transcript(record: Record) -> bool:
    """Tells HH from TRL's implicit prompts."""
    return isinstance(record.get("chosen"), str) and "\n\nAssistant:" in record["chosen"]


def from_red_team(record: Record) -> Record:
    """Anthropic red-team attempts: the attack's opening is a prompt; the transcript and its ratings stay."""
    return record | {"prompt": transcript_turns(text_of(record, "transcript"))[0]["content"]}


def from_alpaca(record: Record) -> Record:
    """Alpaca: the input follows the instruction after a space, as in the reference."""
    given = text_of(record, "input") if record.get("input") else ""
    prompt = " ".join(filter(None, (text_of(record, "instruction"), given)))
    return {"prompt": prompt, "response": text_of(record, "output")}


def from_sharegpt(record: Record) -> Record:
    """ShareGPT: conversations, with `chosen` and `rejected` where it is a preference."""
    turns = turns_of(record.get("conversations"), "conversations")
    if record.get("system"):
        turns = [{"role": "system", "content": text_of(record, "system")}, *turns]
    if "chosen" not in record:
        return {"messages": turns}
    return dialogue_pair(*([*turns, *turns_of(record.get(side), side)] for side in ("chosen", "rejected")))


def from_trl(record: Record) -> Record:
    """TRL preferences: text or turns, the prompt beside the responses or inside both."""
    prompt, chosen, rejected = (record.get(field) for field in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return {"prompt": prompt, "response_0": chosen, "response_1": rejected, "better_response_id": 0}
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 of texts, no paths
        cut = max(shared.rfind(" "), shared.rfind("\n")) + 1  # no word is cut in two
        return preference([{"role": "user", "content": shared[:cut].strip()}], chosen[cut:], rejected[cut:])
    sides = [turns_of(value, name) for name, value in (("chosen", chosen), ("rejected", rejected))]
    if sides[0][0].get("role") == "assistant":  # otherwise each side is a whole conversation
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else turns_of(prompt, "prompt")
        sides = [[*asked, *side] for side in sides]
    return dialogue_pair(*sides)


def from_completion(record: Record) -> Record:
    """TRL demonstrations: the completion is trained, the prompt is not."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(completion, str):
        return {"prompt": prompt, "response": completion}
    turns = [*turns_of(prompt, "prompt"), *turns_of(completion, "completion")]
    if turns[-1].get("role") != "assistant":
        raise Unusable("the last turn is not the assistant's")
    return prompt_and(turns[:-1], response=turns[-1].get("content"))


def from_ultrafeedback(record: Record) -> Record:
    """UltraFeedback: the completion with the best score against the one with the worst.

    The mean of the aspects' ratings (`fine-grained_score`) counts where there is one: `overall_score` is known to
    mistake some of the worst for the best (argilla/ultrafeedback-binarized-preferences).
    """
    completions = record.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        raise Unusable("fewer than two completions")
    scores = []
    for completion in completions:
        found = [completion.get(name) for name in ("fine-grained_score", "overall_score", "score")]
        try:
            scores.append(float(next(score for score in found if score is not None)))
        except (StopIteration, TypeError, ValueError):
            raise Unusable("a completion without a score") from None
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise Unusable("all completions have one score")
    sides = [text_of(completions[i], "response") for i in (best, worst)]
    return preference([{"role": "user", "content": text_of(record, "instruction")}], *sides)


# The first that fits is taken, so those that need more stand before those that need less.
FORMATS: dict[str, Format] = {
    "pku": Format(("prompt", "response_0", "response_1")),
    "qa": Format(("prompt", "response", "is_safe")),
    "hh_red_team": Format(("transcript", "min_harmlessness_score_transcript"), from_red_team),
    "sharegpt": Format(("conversations",), from_sharegpt, also=("chosen", "rejected", "system")),
    "ultrafeedback": Format(("instruction", "completions"), from_ultrafeedback),
    "alpaca": Format(("instruction", "output"), from_alpaca, also=("input",)),
    "trl_preference": Format(("prompt", "chosen", "rejected"), from_trl),
    "hh": Format(("chosen", "rejected"), from_transcripts, fits=is_transcript),
    "trl_implicit": Format(("chosen", "rejected"), from_trl),
    "trl_completion": Format(("prompt", "completion"), from_completion, fits=lambda record: "label" not in record),
    "messages": Format(("messages",)),
    "demonstrations": Format(("prompt", "response")),
    "prompts": Format(("prompt",)),
}


def recognise(raw: Sequence[Record], name: str | None, where: str) -> str:
    """Returns which format records have.

    Args:
        raw: As read.
        name: Of the format; None recognises it by its columns.
        where: Names the data in errors.

    Raises:
        ValueError: If the columns fit no format, or not the one that is named; lists both.
    """
    columns = {column for record in raw for column in record}
    known = "; ".join(f"{key} ({', '.join(format_.needs)})" for key, format_ in FORMATS.items())
    if name is not None and name not in FORMATS:
        raise ValueError(f"{where}: format {name!r} is unknown. Formats: {known}")
    for key in FORMATS if name is None else (name,):
        fits = name is not None or any(FORMATS[key].fits(record) for record in raw[:LOOKED_AT])
        if fits and columns.issuperset(FORMATS[key].needs):
            return key
    if name is not None:
        needs = list(FORMATS[name].needs)
        raise ValueError(f"{where}: format {name!r} needs the columns {needs}; there are {sorted(columns)}")
    raise ValueError(
        f"{where}: the columns {sorted(columns)} fit no known format; rename them with `fields`, such as "
        f"{{prompt: question}}. Formats: {known}"
    )
