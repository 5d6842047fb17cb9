"""Step 2 of the line: the conversations of a record, for each kind of stage."""

from collections.abc import Sequence
from typing import Any

from safe_rlhf_jax.data.conversations import Text, check_turns, encode
from safe_rlhf_jax.data.labels import Read
from safe_rlhf_jax.data.records import LEFT_OUT, UNUSABLE, VOTES, LeftOut, Record, Unusable, label_of, text_of
from safe_rlhf_jax.data.templates import Template
from safe_rlhf_jax.data.tokenizer import Tokenizer


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


def supervised_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text]:
    """Returns the text of a demonstration: a conversation with all responses trained, or a prompt with its response."""
    if LEFT_OUT in record:
        raise LeftOut(record[LEFT_OUT])
    if "messages" in record:
        messages = record["messages"]
        check_turns(messages)
        if messages[-1]["role"] != "assistant":
            raise Unusable("the last turn is not the assistant's")
        if any(turn["role"] == "assistant" and turn.get("weight") == 0 for turn in messages):
            raise Unusable("a turn with weight 0, while all turns of the assistant are trained")
        return (encode(messages, template, tokenizer, train_all=True),)
    if "response" in record:
        if "is_safe" in record and not label_of(record, "is_safe"):
            raise LeftOut("the response is labelled unsafe")
        return (encode(answered(prompt_turns(record), text_of(record, "response")), template, tokenizer),)
    if not record.keys() & {"better_response_id", "better_votes", "better_share"}:
        raise Unusable("no messages, prompt + response, or pair with better_response_id")
    better, prompt, *responses = two_responses(record, "better_response_id")
    return (encode(answered(prompt, responses[better]), template, tokenizer),)


def two_responses(record: Record, label: str, read: Read = label_of) -> tuple[int, list[Any], str, str]:
    """Returns the label's value (0 or 1), the prompt and both responses."""
    if LEFT_OUT in record:
        raise LeftOut(record[LEFT_OUT])
    prompt, *responses = prompt_turns(record), text_of(record, "response_0"), text_of(record, "response_1")
    labelled = int(read(record, label) > 0.5)
    if responses[0] == responses[1]:
        raise Unusable("identical responses")
    return labelled, prompt, responses[0], responses[1]


def preference_example(
    record: Record, template: Template, tokenizer: Tokenizer, read: Read = label_of
) -> tuple[Text, Text]:
    """Returns chosen and rejected."""
    better, prompt, *responses = two_responses(record, "better_response_id", read)
    texts = [encode(answered(prompt, response), template, tokenizer) for response in responses]
    return texts[better], texts[1 - better]


def safety_example(
    record: Record, template: Template, tokenizer: Tokenizer, read: Read = label_of
) -> tuple[Text, Text]:
    """Returns the safer and the less safe response."""
    safer, prompt, *responses = two_responses(record, "safer_response_id", read)
    safe = [read(record, f"is_response_{i}_safe") for i in (0, 1)]
    if safe[1 - safer] - safe[safer] == 1:  # two shares need not agree
        raise Unusable("the safer response is labelled unsafe, the other safe")
    texts = [encode(answered(prompt, response), template, tokenizer) for response in responses]
    return texts[safer], texts[1 - safer]


def paired(records: Sequence[Record]) -> list[Record]:
    """Returns safety pairs for the labelled single responses (PKU-SafeRLHF-QA, BeaverTails) among records.

    For each prompt, the first safe response is paired with the first unsafe one, the second with the second, and so on;
    unpaired responses are left out. Of several annotators' labels of one response the majority counts, and the pair has
    their votes. Records that are already pairs stay.
    """
    out = []
    labelled: dict[str, dict[str, list[tuple[Record, int]]]] = {}  # prompt -> response -> its labels
    for record in records:
        if record.keys() & {UNUSABLE, LEFT_OUT} or not record.keys() >= {"prompt", "response", "is_safe"}:
            out.append(record)
            continue
        try:
            label = label_of(record, "is_safe")
        except Unusable as reason:
            out.append(record | {UNUSABLE: str(reason)})
            continue
        labelled.setdefault(str(record["prompt"]), {}).setdefault(str(record["response"]), []).append((record, label))
    for responses in labelled.values():
        sides: tuple[list[tuple[Record, list[int]]], ...] = ([], [])  # unsafe, safe: responses with their votes
        for given in responses.values():
            safe, whole = sum(label for _, label in given), len(given)
            if 2 * safe != whole:
                sides[2 * safe > whole].append((given[0][0], [label for _, label in given]))
            repeats = given if 2 * safe == whole else given[1:]
            out += [record | {LEFT_OUT: "one of several labels of a response"} for record, _ in repeats]
        for (unsafe, against), (safe_, votes) in zip(*sides, strict=False):
            labels = {"safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}
            several = {VOTES[f"is_response_{i}_safe"]: v for i, v in enumerate((votes, against)) if len(v) > 1}
            out.append(safe_ | {"response_0": safe_["response"], "response_1": unsafe["response"]} | labels | several)
        both = min(map(len, sides))
        alone = "no response with the other label to the same prompt"
        out += [record | {LEFT_OUT: alone} for side in sides for record, _ in side[both:]]
    return out


def safety_labels(record: Record) -> tuple[bool, bool]:
    """Returns is_response_0_safe, is_response_1_safe."""
    return bool(label_of(record, "is_response_0_safe")), bool(label_of(record, "is_response_1_safe"))


def prompt_example(record: Record, template: Template, tokenizer: Tokenizer) -> tuple[Text]:
    """Returns the prompt of a record."""
    prompt = prompt_turns(record)
    check_turns(prompt)
    if prompt[-1]["role"] != "user":
        raise Unusable("the prompt does not end with the user's turn")
    return (encode(prompt, template, tokenizer),)


def shown(turns: Sequence[Any]) -> str:
    """Returns a prompt for display: the text of the user, or several turns one below the other."""
    if len(turns) == 1:
        text: str = turns[0]["content"]
        return text
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
