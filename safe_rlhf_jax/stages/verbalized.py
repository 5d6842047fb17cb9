"""Verbalized sampling: several answers with stated probabilities in one response, asked for and read.

Source: Zhang et al. 2025, arXiv 2510.01171.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

INSTRUCTION = (
    "Give {number} different answers to what stands above, each with the probability that you would have given it. "
    "Write every answer in this form, and nothing else:\n"
    "<response><text>the answer</text><probability>0.2</probability></response>"
)
ANSWER = re.compile(r"<response>(.*?)(</response>|(?=<response>)|\Z)", re.DOTALL | re.IGNORECASE)
TEXT = re.compile(r"<text>(.*?)</text>", re.DOTALL | re.IGNORECASE)
PROBABILITY = re.compile(r"<probability>\s*(\d*\.?\d+)\s*(%?)\s*</probability>", re.IGNORECASE)


class Answer(NamedTuple):
    """One of several answers in a response."""

    text: str
    probability: float  # as stated


def instructed(turns: Sequence[Any], number: int) -> list[Any]:
    """Returns a conversation whose last turn asks for several answers."""
    *before, last = turns
    text = f"{last['content']}\n\n{INSTRUCTION.format(number=number)}"
    return [*before, last | {"content": text}]


def answers_in(response: str) -> tuple[list[Answer], Counter[str]]:
    """Returns the different answers in a response, and why others are none.

    Args:
        response: The text of a policy.

    Returns:
        The answers in their order, and {reason: number}: "no answer" for a response without any.
    """
    found: dict[str, float] = {}
    failures: Counter[str] = Counter()
    for part in ANSWER.finditer(response):
        text, stated = TEXT.search(part[1]), PROBABILITY.search(part[1])
        written = text[1].strip() if text else ""
        probability = float(stated[1]) / (100 if stated[2] else 1) if stated else None
        if not part[2]:
            failures["unfinished"] += 1
        elif not written:
            failures["no text"] += 1
        elif probability is None:
            failures["no probability"] += 1
        elif probability > 1:
            failures["probability above 1"] += 1
        elif written in found:
            failures["repeated"] += 1
        else:
            found[written] = probability
    if not found and not failures:
        failures["no answer"] += 1
    return [Answer(*pair) for pair in found.items()], failures
