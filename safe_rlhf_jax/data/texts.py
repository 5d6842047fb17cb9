"""Step 3 of the line, first half: a record becomes token ids, and which of them are trained."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from safe_rlhf_jax.data.formats import Record, Unusable, text_of
from safe_rlhf_jax.data.templates import Template
from safe_rlhf_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, and which of them are the assistant's (the end of the turn included)."""

    ids: list[int]
    trained: list[bool]
    turns: Sequence[Any] = ()  # that were written
    merged: bool = False  # a response's first characters share a token with what stands before it, which is not trained


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


def encode(messages: list[Any], template: Template, tokenizer: Tokenizer, *, train_all: bool = False) -> Text:
    """Tokenises a conversation as the template writes it, and marks what the assistant says.

    A response goes from the end of the generation prompt to the first token that ends a turn. Behind the last one
    nothing is kept. Where the template ends it with no token, EOS does; and EOS stands in the place of a token that
    neither the tokenizer nor the model names as an end, since nothing else would stop there.

    Args:
        messages: The turns.
        template: Of the run.
        tokenizer: Of the run.
        train_all: Trains every response, not only the last one.

    Raises:
        Unusable: If the turns cannot be written so, or hold a token that a model has no row for.
    """
    check_turns(messages)
    try:
        text = written(messages, template, tokenizer, train_all)
    except ValueError as error:
        raise Unusable(str(error)) from error
    unknown = next((i for i in text.ids if tokenizer.rows is not None and i >= tokenizer.rows), None)
    if unknown is not None:
        raise Unusable(f"token {tokenizer.quoted([unknown])}, for which a model has no row")
    return text


def written(messages: list[Any], template: Template, tokenizer: Tokenizer, train_all: bool) -> Text:
    """Returns the text of a conversation."""
    if messages[-1]["role"] == "user":
        ids = template.ids(tokenizer, messages, True)
        return Text(ids, [False] * len(ids), messages)
    ids = template.ids(tokenizer, messages, False)
    trained, merged = [False] * len(ids), False
    ends = template.ends(tokenizer)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in places if train_all else places[-1:]:
        asked = template.ids(tokenizer, messages[:i], True)
        start = common(asked, ids)
        if start < len(asked):
            start, merged = first_whole_token(messages, i, ids, template, tokenizer), True
        last = i == places[-1]
        # Behind an earlier response the conversation goes on otherwise than one that ends there.
        stop = len(ids) if last else common(template.ids(tokenizer, messages[: i + 1], False), ids)
        stop = stop if stop > start else len(ids)
        end = next((j + 1 for j in range(start, stop) if ids[j] in ends), None)
        if last and end is None:
            ids, trained, end = [*ids, tokenizer.eos_id], [*trained, False], len(ids) + 1
        elif last and ids[end - 1] not in tokenizer.ends:
            ids[end - 1] = tokenizer.eos_id
        end = end or stop
        trained[start:end] = [True] * (end - start)
    return Text(ids[:end], trained[:end], messages, merged)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many tokens two texts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def first_whole_token(messages: list[Any], i: int, ids: Sequence[int], template: Template, tokenizer: Tokenizer) -> int:
    """Returns the index of the first token that lies whole in response i, whose beginning shares one with the prompt.

    Raises:
        ValueError: If the conversation does not begin with the generation prompt, or has control tokens as text.
    """
    asked, text = template.render(tokenizer, messages[:i], True), template.render(tokenizer, messages, False)
    if not text.startswith(asked):
        raise ValueError("the template's generation prompt is not the beginning of the conversation")
    if not tokenizer.hf.is_fast or template.marked(tokenizer, messages) != messages:
        raise ValueError("a response that shares its first token with the prompt")
    encoding = tokenizer.hf.backend_tokenizer.encode(text, add_special_tokens=False)
    opening = len(ids) - len(encoding.ids)
    starts = (j for j, (start, _) in enumerate(encoding.offsets) if start >= len(asked))
    return opening + next(starts, len(encoding.ids))


def supervised_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text]:
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


def preference_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text, Text]:
    """Returns chosen and rejected."""
    better, prompt, *responses = two_responses(record, "better_response_id")
    texts = [encode(answered(prompt, response), template, tokenizer) for response in responses]
    return texts[better], texts[1 - better]


def safety_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text, Text]:
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


def prompt_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text]:
    """Returns the prompt of a record."""
    prompt = prompt_turns(record)
    check_turns(prompt)
    if prompt[-1]["role"] != "user":
        raise Unusable("the prompt does not end with the user's turn")
    return (encode(prompt, template, tokenizer),)


def shown(turns: Sequence[Any]) -> str:
    """Returns a prompt for people: the text of the user, or several turns one below the other."""
    if len(turns) == 1:
        text: str = turns[0]["content"]
        return text
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
