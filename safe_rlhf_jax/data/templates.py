"""Step 2 of the line: conversations as text. One template serves every stage of a run.

A conversation becomes segments. Those of the assistant end with EOS, which the tokeniser adds: what is trained is what
generation produces, and generation reads the earlier turns as training does.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from safe_rlhf_jax.data.formats import Message
from safe_rlhf_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of text; responses are followed by EOS."""

    text: str
    is_response: bool


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are written; `{content}` is replaced by the text of the turn."""

    user: str
    assistant: str = "{content}"
    begin: str = ""
    system: str | None = None  # stands in the place of `begin`; None: there is no place for a system message
    adds_prefix = False  # the tokeniser opens the text, with BOS for instance

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """Cuts a conversation, whose turns alternate after at most one system message, into segments.

        Raises:
            ValueError: If there is no place for a system message.
        """
        out, opening = [], self.begin
        for message in messages:
            written = getattr(self, message["role"])
            if written is None:
                raise ValueError("a system message, for which the template has no place")
            text = written.replace("{content}", message["content"])
            if message["role"] == "system":
                opening = text
            else:
                out.append(Segment(opening + text, message["role"] == "assistant"))
                opening = ""
        return out


TEMPLATES: dict[str, Template] = {
    "plain": Template(user="{content}\n", system="{content}\n"),
    # Source: PKU-Alignment/safe-rlhf@82743cc constants; no space after `ASSISTANT:`.
    "beaver": Template(user="USER: {content} ASSISTANT:", begin="BEGINNING OF CONVERSATION: "),
    "alpaca": Template(
        user="### Instruction:\n{content}\n\n### Response:\n",
        begin="Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n",
        system="{content}\n\n",
    ),
}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja, of a tokenizer or a file.

    A response is what follows the generation prompt, up to the end of the turn's text. EOS stands in the place of
    what the template writes at the end of the last turn, and after every other one.
    """

    render: Callable[[Sequence[Message], bool], str]  # (turns, with the generation prompt) -> text
    eos: str  # text of the EOS token: where the template writes it after a response, it is not written twice
    adds_prefix = True  # the template writes BOS where there should be one

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """Cuts a conversation into segments.

        Raises:
            ValueError: If the template refuses the turns, writes no assistant's turn, or a generation prompt that is
                not what stands before the response.
        """
        turns = [m | {"content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages]
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        marks = {i: f"[[response {i}]]" for i in places}
        marked = [turn | {"content": marks[i]} if i in marks else turn for i, turn in enumerate(turns)]
        rest, done, out = self.render(marked, turns[-1]["role"] == "user"), "", []
        for i in places:
            before, found, rest = rest.partition(marks[i])
            if not found:
                raise ValueError("the template does not write the assistant's turn")
            done += before
            asked = self.render(turns[:i], True)
            if not done.startswith(asked):
                raise ValueError("the template's generation prompt is not the beginning of the conversation")
            opened = len(done) - len(asked)  # what the template writes between the generation prompt and the turn
            if opened > len(before):
                raise ValueError("the template's generation prompt ends before the turn that it asks to follow")
            response = before[len(before) - opened :] + turns[i]["content"]
            out += [Segment(before[: len(before) - opened], False), Segment(response, True)]
            done += turns[i]["content"]
            if rest.lstrip().startswith(self.eos):
                done += rest[: rest.index(self.eos) + len(self.eos)]
                rest = rest[rest.index(self.eos) + len(self.eos) :]
        return out if places and places[-1] == len(turns) - 1 else [*out, Segment(rest, False)]


AnyTemplate = Template | ChatTemplate


def load_template(name: str, tokenizer: Tokenizer) -> AnyTemplate:
    """Returns a template: a key of `TEMPLATES`, "tokenizer" for the tokenizer's own, or the path of a Jinja file.

    Raises:
        ValueError: If there is none, or it has no turn of the assistant to train.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    source = None
    if name == "tokenizer":
        if tokenizer.hf.chat_template is None:
            raise ValueError(
                f"template 'tokenizer': the tokenizer has no chat template; name a .jinja file, or one of "
                f"{', '.join(TEMPLATES)}"
            )
    else:
        try:
            source = pathlib.Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"template {name!r}: cannot be read: {error}") from error

    def render(turns: Sequence[Message], ask: bool) -> str:
        try:
            text: str = tokenizer.hf.apply_chat_template(
                list(turns), chat_template=source, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the template refuses: {error}") from error
        return text

    template = ChatTemplate(render, tokenizer.hf.eos_token)
    try:
        template.segments([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}])
    except ValueError as error:
        raise ValueError(f"template {name!r}: {error}") from error
    return template


def format_prompt(prompt: str, template: AnyTemplate) -> str:
    """Returns the text that a response follows directly."""
    return "".join(segment.text for segment in template.segments([{"role": "user", "content": prompt}]))
