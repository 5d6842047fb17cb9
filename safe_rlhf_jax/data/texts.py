"""Step 3 of the line, first half: a record becomes token ids, and which of them are trained."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from safe_rlhf_jax.data.formats import Record, Unusable, text_of
from safe_rlhf_jax.data.templates import AnyTemplate
from safe_rlhf_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, and which of them are the assistant's (EOS included)."""

    ids: list[int]
    trained: list[bool]


def check_turns(messages: Any) -> None:
    """Checks that turns alternate from the user on, after at most one system message, and that all have text."""
    if not isinstance(messages, list) or not messages:
        raise Unusable("messages is no list of turns")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    start = 1 if roles[0] == "system" else 0
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or (not content.strip() and i >= start):
            raise Unusable("no response" if (i - start) % 2 else "no prompt")
    if not roles[start:] or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles[start:])):
        raise Unusable("turns that do not alternate between user and assistant")


def prompt_turns(record: Record) -> list[Any]:
    """Returns the conversation that a response of a record follows."""
    prompt = record.get("prompt")
    if prompt is None and isinstance(record.get("messages"), list):
        messages: list[Any] = record["messages"]
        complete = messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
        return messages[:-1] if complete else messages
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": text_of(record, "prompt")}]


def answered(prompt: list[Any], response: str) -> list[Any]:
    """Returns a conversation that ends with a response."""
    return [*prompt, {"role": "assistant", "content": response}]


def encode(messages: list[Any], template: AnyTemplate, tokenizer: Tokenizer, *, train_all: bool = False) -> Text:
    """Tokenises a conversation segment by segment, as generation will see it; EOS follows every response.

    Args:
        messages: The turns.
        template: Of the run.
        tokenizer: Of the run.
        train_all: Trains every response, not only the last one.
    """
    check_turns(messages)
    prefix = () if template.adds_prefix else tokenizer.prefix
    ids, trained = list(prefix), [False] * len(prefix)
    try:
        segments = template.segments(messages)
    except ValueError as error:
        raise Unusable(str(error)) from error
    for i, segment in enumerate(segments):
        tokens = tokenizer.encode(segment.text) + ([tokenizer.eos_id] if segment.is_response else [])
        ids += tokens
        trained += [segment.is_response and (train_all or i == len(segments) - 1)] * len(tokens)
    return Text(ids, trained)


def supervised_example(record: Record, template: AnyTemplate, tokenizer: Tokenizer) -> tuple[Text]:
    """Returns the text of a demonstration: of a conversation all responses are trained, after a prompt the response."""
    if "messages" in record:
        messages = record["messages"]
        check_turns(messages)
        if messages[-1]["role"] != "assistant":
            raise Unusable("the last turn is not the assistant's")
        return (encode(messages, template, tokenizer, train_all=True),)
    if "response" in record:
        if record.get("is_safe") is not None and not record["is_safe"]:
            raise Unusable("the response is labelled unsafe")
        return (encode(answered(prompt_turns(record), text_of(record, "response")), template, tokenizer),)
    if "better_response_id" not in record:
        raise Unusable("no messages, prompt + response, or pair with better_response_id")
    better, prompt, *responses = two_responses(record, "better_response_id")
    return (encode(answered(prompt, responses[better]), template, tokenizer),)


def two_responses(record: Record, label: str) -> tuple[int, list[Any], str, str]:
    """Returns the label's value (0 or 1), the prompt and both responses."""
    prompt, *responses = prompt_turns(record), text_of(record, "response_0"), text_of(record, "response_1")
    if record.get(label) is None:
        raise Unusable(f"missing {label}")
    if record[label] not in (0, 1):
        raise Unusable(f"{label} is neither 0 nor 1")
    if responses[0] == responses[1]:
        raise Unusable("identical responses")
    return int(record[label]), prompt, responses[0], responses[1]


def preference_example(record: Record, template: AnyTemplate, tokenizer: Tokenizer) -> tuple[Text, Text]:
    """Returns chosen and rejected."""
    better, prompt, *responses = two_responses(record, "better_response_id")
    texts = [encode(answered(prompt, response), template, tokenizer) for response in responses]
    return texts[better], texts[1 - better]


def safety_example(record: Record, template: AnyTemplate, tokenizer: Tokenizer) -> tuple[Text, Text]:
    """Returns the safer and the less safe response."""
    safer, prompt, *responses = two_responses(record, "safer_response_id")
    safe = safety_labels(record)
    if safe[1 - safer] and not safe[safer]:
        raise Unusable("the safer response is labelled unsafe, the other safe")
    texts = [encode(answered(prompt, response), template, tokenizer) for response in responses]
    return texts[safer], texts[1 - safer]


def paired(records: Sequence[Record]) -> list[Record]:
    """Returns safety pairs for the labelled single responses (PKU-SafeRLHF-QA, BeaverTails) among records.

    Under each prompt, the first safe response is paired with the first unsafe one, the second with the second, and so
    on; responses that find no partner are left as they are. Records that are pairs already stay.
    """
    by_prompt: dict[str, dict[bool, list[Record]]] = {}
    out = []
    for record in records:
        if record.get("is_safe") not in (True, False) or "response" not in record:
            out.append(record)
            continue
        sides = by_prompt.setdefault(str(record.get("prompt")), {True: [], False: []})
        sides[bool(record["is_safe"])].append(record)
    for sides in by_prompt.values():
        for safe, unsafe in zip(sides[True], sides[False], strict=False):
            labels = {"safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}
            out.append(safe | {"response_0": safe["response"], "response_1": unsafe["response"]} | labels)
        both = min(len(sides[True]), len(sides[False]))
        out += sides[True][both:] + sides[False][both:]
    return out


def safety_labels(record: Record) -> tuple[bool, bool]:
    """Returns is_response_0_safe, is_response_1_safe."""
    labels = [record.get(f"is_response_{i}_safe") for i in (0, 1)]
    if any(label not in (True, False) for label in labels):
        raise Unusable("is_response_0_safe or is_response_1_safe missing or not a truth value")
    return bool(labels[0]), bool(labels[1])


def prompt_example(record: Record, template: AnyTemplate, tokenizer: Tokenizer) -> tuple[Text]:
    """Returns the prompt of a record."""
    prompt = prompt_turns(record)
    check_turns(prompt)
    if prompt[-1]["role"] != "user":
        raise Unusable("the prompt does not end with the user's turn")
    return (encode(prompt, template, tokenizer),)


def shown(record: Record) -> str:
    """Returns a prompt of several turns as text, for people."""
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt_turns(record))
