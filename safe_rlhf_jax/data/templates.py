"""Step 2 of the line: conversations as token ids. One template serves every stage of a run.

A template is Jinja, rendered by transformers, so training, generation and scoring read the output of
`apply_chat_template`. `conversations.encode` finds the tokens of the responses.
"""

import dataclasses
import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.records import Message
from safe_rlhf_jax.data.tokenizer import Tokenizer
from safe_rlhf_jax.errors import DataError

DATE = "2024-07-26"  # default date of Llama 3.1's template
REMEMBERED = 4096  # prompts whose tokens are cached
PROBE: list[Message] = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]


@dataclasses.dataclass(frozen=True)
class Template:
    """The text format of conversations."""

    source: str | None  # Jinja; None: the tokenizer's own chat template
    opens: bool = True  # it writes BOS itself, if there is one; else the tokenizer opens the text
    end: int | None = None  # the token with which it ends a turn, if any
    options: tuple[tuple[str, Any], ...] = ()  # variables of the template, such as enable_thinking
    date: str = DATE  # result of `strftime_now`, in ISO format
    control_tokens: Literal["text", "tokens"] = "text"  # treatment of control tokens in a message

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Returns the end tokens of a response: those of tokenizer and model, and the template's."""
        return tuple(sorted({*tokenizer.ends, *([] if self.end is None else [self.end])}))

    def render(self, tokenizer: Tokenizer, turns: Sequence[Message], ask: bool) -> str:
        """Returns the text of a conversation, with the generation prompt if `ask`; else without trailing space.

        Raises:
            DataError: If the template refuses the turns.
        """
        try:
            text: str = tokenizer.hf.apply_chat_template(list(turns), tokenize=False, **self.arguments(tokenizer, ask))
        except Exception as error:  # templates may raise anything
            raise DataError(f"the template refuses: {error}") from error
        return text if ask else text.rstrip()

    def ids(self, tokenizer: Tokenizer, turns: Sequence[Message], ask: bool) -> list[int]:
        """Returns the token ids of a conversation; control tokens in a message are text.

        Raises:
            DataError: If the template refuses the turns.
        """
        given = self.marked(tokenizer, turns)
        opening = [] if self.opens else list(tokenizer.prefix)
        return opening + encoder(tokenizer, marked=given != list(turns))(self.render(tokenizer, given, ask))

    def asked_ids(self, tokenizer: Tokenizer, turns: Sequence[Message]) -> list[int]:
        """Returns the ids of a prompt, cached if turns are text only: both sides of a pair, and more, share it.

        Raises:
            ValueError: If the template refuses the turns.
        """
        if any(turn.keys() != {"role", "content"} for turn in turns):
            return self.ids(tokenizer, turns, True)
        return remembered_ids(self, tokenizer, tuple((turn["role"], turn["content"]) for turn in turns))

    def theirs(self, tokenizer: Tokenizer, turns: Sequence[Message], ask: bool) -> list[int]:
        """Returns transformers' own token ids of a conversation, including control tokens."""
        ids: list[int] = tokenizer.hf.apply_chat_template(
            list(turns), return_dict=False, **self.arguments(tokenizer, ask)
        )
        return ids

    def arguments(self, tokenizer: Tokenizer, ask: bool) -> dict[str, Any]:
        """Returns the arguments of `apply_chat_template`."""
        source: str = self.source or tokenizer.hf.get_chat_template()
        if "strftime_now" in source:
            source = fixed_clock(self.date) + source
        return {"chat_template": source, "add_generation_prompt": ask} | dict(self.options)

    def marked(self, tokenizer: Tokenizer, turns: Sequence[Message]) -> list[Message]:
        """Returns turns in which control tokens are marked as text."""
        if self.control_tokens == "tokens":
            return list(turns)
        patterns = control_patterns(self, tokenizer)
        found = [patterns[turn["role"] == "assistant"].search(turn["content"]) for turn in turns]
        if not any(found):
            return list(turns)
        return [
            turn | {"content": mark_control_tokens(turn["content"], patterns[turn["role"] == "assistant"])}
            for turn in turns
        ]


def encoder(tokenizer: Tokenizer, *, marked: bool) -> Callable[[str], list[int]]:
    """Returns text -> token ids, for texts with marked control tokens or without any."""
    return functools.partial(encode_marked_chat, tokenizer.hf) if marked else tokenizer.encode


@functools.lru_cache(maxsize=REMEMBERED)
def remembered_ids(template: Template, tokenizer: Tokenizer, turns: tuple[tuple[str, str], ...]) -> list[int]:
    """Returns the token ids of (role, content) turns with the generation prompt; callers must not modify them."""
    return template.ids(tokenizer, [{"role": role, "content": content} for role, content in turns], True)


@functools.cache
def fixed_clock(date: str) -> str:
    """Returns Jinja that defines `strftime_now` for a fixed day, at midnight: transformers' own reads the clock."""
    day = datetime.datetime.fromisoformat(date)
    codes = [f"%{flag}{code}" for code in "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZ" for flag in ("", "-")]
    given = [("%%", "\0"), *((code, day.strftime(code)) for code in codes), ("\0", "%")]
    replaced = "".join(f" | replace({code!r}, {value!r})" for code, value in given)
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{replaced} }}}}{{%- endmacro -%}}"


@functools.lru_cache
def control_patterns(template: Template, tokenizer: Tokenizer) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Returns patterns of the control tokens in a text of the user, and in one of the assistant.

    Control tokens are special tokens and those of the template. An assistant may write some of them, such as those
    around a thought: the template's tokens beside those that open and end turns.
    """
    added = {
        str(token): token.special for token in tokenizer.hf.added_tokens_decoder.values() if not str(token).isspace()
    }
    source = template.source or tokenizer.hf.get_chat_template()
    asked = template.render(tokenizer, PROBE[:1], True)
    known = source + asked + template.render(tokenizer, PROBE, False)  # a source may concatenate tokens: '<|' + role
    of_turns = {tokenizer.texts.get(i) for i in (*template.ends(tokenizer), tokenizer.pad_id, *tokenizer.prefix)}
    user = [token for token, special in added.items() if special or token in known]
    own = [token for token in added if token in source and token not in asked and token not in of_turns]
    assistant = [token for token in user if token not in own]
    return pattern_of(user), pattern_of(assistant)


def pattern_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern of any of the tokens, the longest first; it matches nothing without tokens."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


TEMPLATES: dict[str, Template] = {
    "plain": Template(
        "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}",
        opens=False,
    ),
    # Source: PKU-Alignment/safe-rlhf@82743cc constants; no space after `ASSISTANT:`.
    "beaver": Template(
        "{{ 'BEGINNING OF CONVERSATION: ' }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% else %}{{ raise_exception('it has no place for a system message') }}{% endif %}{% endfor %}",
        opens=False,
    ),
    "alpaca": Template(
        "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% else %}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.'"
        " + '\n\n' }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n### Response:\n' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        opens=False,
    ),
}


def default_template(tokenizer: Tokenizer) -> str:
    """Returns the name of a tokenizer's default template: its own, if it has one."""
    return "tokenizer" if tokenizer.hf.chat_template else "plain"


def load_template(
    name: str,
    tokenizer: Tokenizer,
    *,
    options: Mapping[str, Any] | None = None,
    date: str = DATE,
    control_tokens: Literal["text", "tokens"] = "text",
) -> Template:
    """Returns a template.

    Args:
        name: A key of `TEMPLATES`, "tokenizer" for the tokenizer's own, or the path of a Jinja file.
        tokenizer: Of the run.
        options: Variables of the template, such as {"enable_thinking": False}.
        date: Current date for templates that write it, in ISO format.
        control_tokens: Treats control tokens in a message as text, or as the tokens.

    Raises:
        DataError: If there is none, or it has no turn of the assistant to train; with the two differing texts.
    """
    if name in TEMPLATES:
        return dataclasses.replace(TEMPLATES[name], control_tokens=control_tokens)
    source = None
    if name == "tokenizer":
        try:
            tokenizer.hf.get_chat_template()
        except ValueError as error:
            reason = "the tokenizer has no chat template" if tokenizer.hf.chat_template is None else str(error)
            raise DataError(
                f"template 'tokenizer': {reason}; name a .jinja file, or one of {', '.join(TEMPLATES)}"
            ) from error
    else:
        try:
            source = storage.read_text(storage.expanded(name))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"template {name!r}: cannot be read: {error}") from error
    given = tuple(sorted((options or {}).items()))
    template = Template(source, options=given, date=date, control_tokens=control_tokens)
    try:
        return dataclasses.replace(template, end=turn_end(template, tokenizer))
    except DataError as error:
        raise DataError(f"template {name!r}: {error}") from error


def turn_end(template: Template, tokenizer: Tokenizer) -> int | None:
    """Returns the token with which a template ends a turn of the assistant, None if it writes none.

    Raises:
        DataError: If it writes no such turn, or one that does not continue its own generation prompt.
    """
    asked, text = template.render(tokenizer, PROBE[:1], True), template.render(tokenizer, PROBE, False)
    if "Hello!" not in text:
        raise DataError(f"it does not write the assistant's turn: {text!r}")
    if not text.startswith(asked):
        raise DataError(
            "its generation prompt is not the beginning of the conversation that it writes, so nothing says where a "
            f"response begins: {asked!r}, and {text!r}"
        )
    header = text[len(asked) :].rpartition("Hello!")[0].strip()
    if header and asked.rstrip() == template.render(tokenizer, PROBE[:1], False):
        raise DataError(
            f"it writes {header!r} in front of a response, but no generation prompt, so responses begin with it: "
            f"{asked!r}, and {text!r}; give it one behind the turns: {{% if add_generation_prompt %}}…{{% endif %}}"
        )
    rest = text.rpartition("Hello!")[2].lstrip()
    tokens = {str(token): i for i, token in tokenizer.hf.added_tokens_decoder.items()}
    found = [token for token in tokens if token and rest.startswith(token)]
    return tokens[max(found, key=len)] if found else None
