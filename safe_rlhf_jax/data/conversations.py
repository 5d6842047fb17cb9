"""Step 3 of the line, first half: a conversation becomes token ids, and which of them are trained."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from safe_rlhf_jax.data.records import Unusable, is_encodable
from safe_rlhf_jax.data.templates import Template, encoder
from safe_rlhf_jax.data.tokenizer import Tokenizer
from safe_rlhf_jax.data.turns import content_problem
from safe_rlhf_jax.errors import DataError

CONTEXT = 40  # characters shown around the first difference of two texts
CHECKED = 16  # texts of a data set whose tokens are compared with transformers'


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, and which of them are the assistant's (the end of the turn included)."""

    ids: list[int]
    trained: list[bool]
    turns: Sequence[Any] = ()  # that were written
    apart: bool = False  # prompt and response would share a token, and were tokenised apart


def check_turns(messages: Any) -> None:
    """Checks that turns alternate, starting with the user after at most one system message, and that all have text."""
    if not isinstance(messages, list) or not messages:
        raise Unusable("messages is no list of turns")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    start = 1 if roles[0] == "system" else 0
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(message, dict) and (problem := content_problem(message)):
            raise Unusable(problem)
        if not isinstance(content, str) or (not content.strip() and i >= start):
            raise Unusable("no response" if (i - start) % 2 else "no prompt")
        if not is_encodable(content):
            raise Unusable("half a character (a lone surrogate)")
    if not roles[start:] or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles[start:])):
        raise Unusable("turns that do not alternate between user and assistant")


def encode(messages: list[Any], template: Template, tokenizer: Tokenizer, *, train_all: bool = False) -> Text:
    """Tokenises a conversation with the template, and marks the assistant's tokens.

    A response extends from the end of the generation prompt to the first token that ends a turn. Nothing after the last
    response is kept. If the template writes no end token, EOS is added; EOS also replaces an end token that neither the
    tokenizer nor the model names as one, since only the template would stop there.

    Args:
        messages: The turns.
        template: Of the run.
        tokenizer: Of the run.
        train_all: Trains every response, not only the last one.

    Raises:
        Unusable: If the template cannot write the turns, or a model has no row for a token.
    """
    check_turns(messages)
    try:
        text = written(messages, template, tokenizer, train_all)
    except DataError as error:
        raise Unusable(str(error)) from error
    if tokenizer.rows is not None and max(text.ids, default=0) >= tokenizer.rows:
        unknown = next(i for i in text.ids if i >= tokenizer.rows)
        raise Unusable(f"token {tokenizer.quoted([unknown])}, for which a model has no row")
    return text


def written(messages: list[Any], template: Template, tokenizer: Tokenizer, train_all: bool) -> Text:
    """Returns the text of a conversation."""
    if messages[-1]["role"] == "user":
        ids = template.ids(tokenizer, messages, True)
        return Text(ids, [False] * len(ids), messages)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    places = places if train_all else places[-1:]
    ids = template.ids(tokenizer, messages, False)
    asked = [template.asked_ids(tokenizer, messages[:i]) for i in places]
    apart = any(ids[: len(prompt)] != prompt for prompt in asked)
    if apart:
        ids, spans = tokenised_apart(messages, places, template, tokenizer)
    else:
        render = functools.partial(template.ids, tokenizer)
        starts = [len(prompt) for prompt in asked]
        spans = [(start, stop_of(i, start, render, messages, ids)) for i, start in zip(places, starts, strict=True)]
    ends, trained = template.ends(tokenizer), [False] * len(ids)
    for start, stop in spans:
        found = next((j for j in range(start, stop) if ids[j] in ends), stop - 1)
        trained[start : found + 1] = [True] * (found + 1 - start)
    stop = found + 1
    if ids[found] not in ends or not trained[found]:
        return Text([*ids, tokenizer.eos_id], [*trained, True], messages, apart)
    if ids[found] not in tokenizer.ends:
        ids[found] = tokenizer.eos_id
    return Text(ids[:stop], trained[:stop], messages, apart)


def tokenised_apart(
    messages: list[Any], places: Sequence[int], template: Template, tokenizer: Tokenizer
) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of a conversation, with prompts and responses tokenised apart, and the span of each response.

    If the generation prompt ends with a space, for example, most tokenizers join it with the response's first word. But
    generation continues from the tokens of the prompt, so these are used.

    Raises:
        Unusable: If the conversation does not begin with the generation prompt of a response.
    """
    given = template.marked(tokenizer, messages)
    encode = encoder(tokenizer, marked=given != messages)
    text = template.render(tokenizer, given, False)
    starts, stops = [], []
    for i in places:
        asked = template.render(tokenizer, given[:i], True)
        if not text.startswith(asked):
            around = slice(max(common(asked, text) - CONTEXT, 0), common(asked, text) + CONTEXT)
            raise Unusable(
                "the template's generation prompt is not the beginning of the conversation",
                f"{asked[around]!r} there, {text[around]!r} here",
            )
        starts.append(len(asked))
        stops.append(stop_of(i, len(asked), functools.partial(template.render, tokenizer), given, text))

    def ids(stop: int) -> list[int]:
        cuts = [0, *(start for start in starts if start < stop), stop]
        first, *others = (text[start:end] for start, end in itertools.pairwise(cuts))
        opening = [] if template.opens else list(tokenizer.prefix)
        return opening + encode(first) + [i for piece in others for i in tokenizer.continuation(piece, encode)]

    return ids(len(text)), [(len(ids(start)), len(ids(stop))) for start, stop in zip(starts, stops, strict=True)]


def stop_of(
    i: int, start: int, render: Callable[[list[Any], bool], Sequence[Any]], messages: list[Any], whole: Sequence[Any]
) -> int:
    """Returns an upper bound on the end of response i in a whole conversation: the index of a token or a character.

    After an earlier response the conversation continues differently from one that ends there. A template that writes
    the last response in another way is handled by adding another message.

    Args:
        i: Index of the response's turn.
        start: Index of its beginning.
        render: (turns, with the generation prompt) -> tokens, or text.
        messages: The turns.
        whole: `render` of them.
    """
    if i + 1 == len(messages):
        return len(whole)
    here = common(render(messages[: i + 1], False), whole)
    if here > start:
        return here
    other = "1" if messages[i + 1]["content"].startswith("0") else "0"
    return common(render([*messages[: i + 1], {"role": "user", "content": other}], False), whole)


def check_rendered(texts: Sequence[Text], template: Template, tokenizer: Tokenizer, where: str) -> None:
    """Checks that the tokens of the first texts equal those of transformers.

    The end of the last response is our choice, and control tokens in a message are text, so neither is compared.

    Raises:
        DataError: If they differ, with both texts.
    """
    opening = 0 if template.opens else len(tokenizer.prefix)
    for text in texts[:CHECKED]:
        turns = list(text.turns)
        if not turns or text.apart or template.marked(tokenizer, turns) != turns:
            continue
        ask = turns[-1]["role"] == "user"
        theirs, ours = template.theirs(tokenizer, turns, ask), text.ids[opening : None if ask else -1]
        if theirs[: len(ours)] != ours or (ask and len(theirs) != len(ours)):
            raise DataError(
                f"{where}: the tokens of a conversation are not those of the tokenizer's apply_chat_template: "
                f"{tokenizer.hf.decode(ours)!r}, and {tokenizer.hf.decode(theirs)!r}"
            )


def common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns the length of the common prefix of two texts, in tokens or characters."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
