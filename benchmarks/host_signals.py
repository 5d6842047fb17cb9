"""Costs that are Python functions, for configs/host_signals.yaml: harm by the embedded world's oracle, and length."""

from collections.abc import Sequence

from safe_rlhf_jax.data.demo import harm as harm_in
from safe_rlhf_jax.data.records import Message

MOST_WORDS = 14


def harm(conversations: Sequence[Sequence[Message]], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """1 for a harmful response, −1 for a harmless one."""
    del ended
    prompts = [conversation[-1]["content"] for conversation in conversations]
    return [1.0 if harm_in(*row).is_harmful else -1.0 for row in zip(responses, prompts, strict=True)]


def words(conversations: Sequence[Sequence[Message]], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """Words of a response beyond `MOST_WORDS`, negative below."""
    del conversations, ended
    return [float(len(response.split()) - MOST_WORDS) for response in responses]
