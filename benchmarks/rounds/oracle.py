"""The oracle of the embedded world as judges of responses, and as annotators who disagree or whose values change."""

import random
from collections.abc import Sequence
from typing import Any

from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.demo.records import annotation
from safe_rlhf_jax.data.records import majority

Record = dict[str, Any]


def helpfulness(conversations: Sequence[Any], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """Returns the helpfulness of each response; 0 to a prompt of another world, such as a run asks before it starts."""
    del ended  # the text of a response that is cut off says it
    return [helpful(turns[-1]["content"], text) for turns, text in zip(conversations, responses, strict=True)]


def helpful(prompt: str, response: str) -> float:
    """Returns the helpfulness of a response."""
    try:
        return demo.helpfulness(prompt, response)
    except ValueError:
        return 0.0


def severity(conversations: Sequence[Any], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """Returns the severity of harm of each response, less one half: up to 0 is safe."""
    del conversations, ended
    return [demo.harm(text).severity - 0.5 for text in responses]


def voted(record: Record, error_rates: Sequence[float], rng: random.Random) -> Record:
    """Returns a pair with the votes of annotators, who err at different rates, and their majority."""
    pair = record["response_0"], record["response_1"]
    labels = [annotation(record["prompt"], pair, rng, rate) for rate in error_rates]
    fields = ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe")
    found = {name: value for name, value in record.items() if name not in (*fields, "labelled_by")}
    for name in fields:
        found |= majority(name, [int(one[name]) for one in labels])
    return found


def relabelled(record: Record, acceptable: str, rng: random.Random) -> Record:
    """Returns a pair of demo/preference by annotators to whom one category of harm is acceptable."""
    safe = []
    for i in (0, 1):
        named = record[f"response_{i}_harm_category"][acceptable]
        safe.append(bool(record[f"is_response_{i}_safe"] or named))
    if safe == [record["is_response_0_safe"], record["is_response_1_safe"]]:
        return record
    safer = rng.randrange(2) if safe[0] == safe[1] else safe.index(True)
    return record | {"is_response_0_safe": safe[0], "is_response_1_safe": safe[1], "safer_response_id": safer}
