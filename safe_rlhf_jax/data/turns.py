"""Parsing of prompts and responses: turns in several spellings, content parts, transcripts."""

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from safe_rlhf_jax.data.records import TRUTHS, VOTES, Message, Record, Unusable, brief

# Fields that hold a list.
LISTS = ("messages", "conversations", "completions", "turns", "history", *VOTES.values())
WRITTEN_LIST = re.compile(r"\s*(array\()?[\[{]")
WRITTEN_TURN = re.compile(r"""\s*(array\()?\[?\s*\{\s*['"](role|from|content|value)['"]\s*:""")
SPEAKER_KEY = re.compile(r"""['"](role|from)['"]\s*:""")
SPEAKER, SPOKEN = ("role", "from"), ("content", "value")  # keys of a turn
TRAINED = ("weight", "train", "training", "loss")  # keys of a turn: false where it is not trained
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # keys of a turn

TURN = re.compile(r"\r?\n\r?\n(Human|Assistant):")
ASKED = re.compile(r"\s*Human:.*\n\s*Assistant:|\r?\n\r?\n\s*Human:", re.DOTALL)  # beginning of a transcript
OPEN = re.compile(  # end of a prompt formatted for a model
    r"(\bassistant:|### ?(response|assistant):|\[/INST\]|<\|assistant\|>|<\|im_start\|>assistant|<start_of_turn>model"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>)\s*$",
    re.IGNORECASE,
)
INNER = re.compile(r"^\s*(Human|Assistant):", re.MULTILINE)
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
SPOKEN_ROLE = re.compile(rf"""(role|from)['"]\s*:\s*['"]({"|".join(ROLES)})['"]""", re.IGNORECASE)


def read_lists(record: Record, fields: Iterable[str]) -> Record:
    """Returns a record with turns and other lists parsed from text, as in CSV."""
    written = {name: record[name] for name in fields if isinstance(record.get(name), str)}
    return record | {name: list_in(text, name) for name, text in written.items()}


def list_in(text: str, field: str) -> Any:
    """Parses a list or turns from text; returns any other text unchanged."""
    is_list = field in LISTS
    if not WRITTEN_LIST.match(text) or not (is_list or SPEAKER_KEY.search(text)):
        return text
    value = literal(text)
    if value is not None:
        return value if is_list or are_turns(value) else text
    if is_list or (WRITTEN_TURN.match(text) and SPOKEN_ROLE.search(text)):
        raise Unusable(f"{field} is a list written as text that cannot be read")
    return text


def literal(text: str) -> Any:
    """Parses a text as JSON or a Python literal, or returns None; nothing is executed."""
    failures = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(*failures), warnings.catch_warnings(action="ignore"):  # about escapes
            return read(text)
    return None


def are_turns(value: Any) -> bool:
    """Says whether a value is a turn, or a list with a turn in it."""
    return any(isinstance(turn, dict) and is_turn(turn) for turn in (value if isinstance(value, list) else [value]))


def is_turn(value: Message) -> bool:
    """Says whether an object is a turn: it has a speaker, perhaps with an empty text."""
    speakers = {str(value.get(name)).strip().lower() for name in SPEAKER}
    return bool(speakers & ROLES.keys()) or {"role", "content"} <= value.keys()


def turns_of(value: Any, what: str) -> list[Message]:
    """Returns turns [{role, content}], also from ShareGPT's [{from, value}]."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise Unusable(f"{what} is no list of turns")
    return [turn_of(turn) for turn in value]


def turn_of(turn: Message) -> Message:
    """Returns a turn with a canonical role, its text in one piece, and its other keys."""
    speakers = [turn[name] for name in SPEAKER if turn.get(name) is not None]
    if len(speakers) > 1:
        raise Unusable("a turn has both role and from")
    role = ROLES.get(str(speakers[0]).strip().lower()) if speakers else None
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("a turn that calls tools")
    if media := [name for name in MEDIA if turn.get(name)]:
        raise Unusable(f"a turn with {media[0]}, and only text can be read")
    if role is None:
        raise Unusable(f"a turn is from {brief(speakers[0]) if speakers else 'nobody'}, neither human, gpt nor system")
    spoken = [turn[name] for name in SPOKEN if turn.get(name) is not None]
    if len(spoken) > 1:
        raise Unusable("a turn has both content and value")
    read = (*SPEAKER, *SPOKEN)
    more = {str(name): value for name, value in turn.items() if name not in read and value not in (None, [], {})}
    return more | weight_of(turn) | {"role": role, "content": joined(spoken[0] if spoken else None)}


def weight_of(turn: Message) -> Message:
    """Returns the weight of a turn, 0 or 1: 0 if it is not trained, in any spelling."""
    told = {name: TRUTHS.get(str(turn[name]).strip().lower()) for name in TRAINED if turn.get(name) is not None}
    if "weight" in told and told["weight"] is None:
        raise Unusable(f"a turn with weight {brief(turn['weight'])}, neither 0 nor 1")
    return {"weight": 0} if 0 in told.values() else {}


def joined(content: Any) -> Any:
    """Returns the text of a content that is a list of text parts; any other content unchanged."""
    if not isinstance(content, list) or not content or any(part_problem(part) for part in content):
        return content
    return "".join(part["text"] for part in content)


def part_problem(part: Any) -> str | None:
    """Returns why a part of a content is no text, or None."""
    if not isinstance(part, dict):
        return f"content is a list, with {brief(part)} for a part"
    if part.get("type") != "text":
        return f"content has a part of type {brief(part.get('type'))}, and only text can be read"
    return None if isinstance(part.get("text"), str) else "content has a part of type text without a text"


def content_problem(message: Message) -> str | None:
    """Returns why a turn has no text, if there is a more specific reason than its absence."""
    content = message.get("content")
    if isinstance(content, list):
        return next(filter(None, map(part_problem, content)), None)
    if content is None or isinstance(content, str):
        return None
    return f"content is no text, but {brief(content)}"


def prompt_of(value: Any) -> Any:
    """Returns a prompt of several turns as turns, from turns or a transcript; any other prompt unchanged."""
    if isinstance(value, list | dict):
        return plain(turns_of([value] if isinstance(value, dict) else value, "prompt"))
    if not isinstance(value, str) or not is_transcript(value):
        return value
    try:
        turns = transcript_turns(value)
    except Unusable:
        raise Unusable("prompt ends with the opening of a response, and is no transcript that can be read") from None
    if turns[-1] == {"role": "assistant", "content": ""}:  # `Assistant:`, where the response goes
        turns = turns[:-1]
    if not turns or any(INNER.search(turn["content"]) for turn in turns):
        raise Unusable("prompt is a transcript whose turns are not divided by an empty line")
    return plain(turns)


def plain(turns: Sequence[Message]) -> Any:
    """Returns the text of a prompt that is one turn of the user, else the turns."""
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else list(turns)


def response_of(value: Any, prompt: Any, field: str) -> Any:
    r"""Returns a response as text: one turn of the assistant, or the text after a transcript's last `Assistant:`."""
    if isinstance(value, list | dict):
        turns = turns_of([value] if isinstance(value, dict) else value, field)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise Unusable(f"{field} is not one turn of the assistant")
        return turns[0]["content"]
    if not isinstance(value, str) or not isinstance(prompt, str) or not is_transcript(prompt):
        return value
    text = value.strip().removeprefix("Assistant:").strip()
    if TURN.search(text):
        raise Unusable(f"{field} goes on with further turns of the transcript")
    return text


def is_transcript(text: str) -> bool:
    """Says whether a prompt is a transcript, or ends with a template's opening of a response."""
    return bool(ASKED.match(text) or OPEN.search(text))


def transcript_turns(text: str) -> list[Message]:
    r"""Returns the turns of a transcript, `\n\nHuman: … \n\nAssistant: …`."""
    before, *rest = TURN.split("\n\n" + text.lstrip("\r\n"))
    if before.strip() or not rest:
        raise Unusable("no transcript of Human and Assistant turns")
    speakers, contents = rest[::2], rest[1::2]
    return [
        {"role": ROLES["human" if speaker == "Human" else "gpt"], "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]
