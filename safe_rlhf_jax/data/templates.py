"""Step 2 of the line: conversations as text. One template serves every stage of a run."""

import dataclasses
from collections.abc import Sequence

Message = dict[str, str]  # {"role": "user" | "assistant", "content": …}


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are written; `{content}` is replaced by the text of the turn."""

    user: str
    assistant: str = "{content}"
    begin: str = ""


TEMPLATES: dict[str, Template] = {
    "plain": Template(user="{content}\n"),
    # Source: PKU-Alignment/safe-rlhf@82743cc constants; no space after `ASSISTANT:`.
    "beaver": Template(user="USER: {content} ASSISTANT:", begin="BEGINNING OF CONVERSATION: "),
    "alpaca": Template(
        user="### Instruction:\n{content}\n\n### Response:\n",
        begin="Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n",
    ),
}


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of text; the loss of SFT falls on `trained` ones, and each of those is followed by EOS."""

    text: str
    trained: bool


def format_dialogue(messages: Sequence[Message], template: Template) -> list[Segment]:
    """Cuts a conversation into segments, users' turns untrained and the assistant's trained.

    Raises:
        ValueError: If roles do not alternate from the user on.
    """
    segments = []
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        if message.get("role") != role:
            raise ValueError(f"message {i} has role {message.get('role')!r}; turns must alternate, user first")
        text = getattr(template, role).replace("{content}", message["content"])
        segments.append(Segment((template.begin if i == 0 else "") + text, trained=role == "assistant"))
    return segments


def format_prompt(prompt: str, template: Template) -> str:
    """Returns the text that a response follows directly."""
    return "".join(segment.text for segment in format_dialogue([{"role": "user", "content": prompt}], template))
