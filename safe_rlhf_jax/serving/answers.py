"""The text of one answer while its tokens arrive: what can be sent, and where it ends."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from safe_rlhf_jax.data.formats import Message

UNFINISHED = "\ufffd"  # what the bytes of an unfinished character decode to


class Piece(NamedTuple):
    """A part of an answer; the last one has the reason of its end."""

    choice: int  # index among the answers to one request
    text: str
    finish: str | None = None  # "stop" or "length"
    tokens: int = 0  # of the whole answer, the end included
    scores: dict[str, float | None] | None = None


@dataclasses.dataclass
class Job:
    """A request for the device."""

    turns: list[Message]
    prompt: list[int]  # token ids
    deliver: Callable[[Piece | Exception], object]  # called from the device's thread
    max_tokens: int
    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    cancelled: bool = False  # nobody waits any longer


class Answer:
    """One of the answers to a request.

    Args:
        job: The request.
        choice: Index among its answers.
        decode: From token ids to text.
        ends: Tokens that end a response.
    """

    def __init__(self, job: Job, choice: int, decode: Callable[[Sequence[int]], str], ends: Collection[int]):
        self.job, self.choice, self.decode, self.ends = job, choice, decode, ends
        self.ids: list[int] = []
        self.text = ""  # so far, as far as it can be sent
        self.finish: str | None = None
        self.is_cut = False  # before a stop

    def take(self, tokens: Sequence[int]) -> str:
        """Adds tokens and returns the text that can be sent now.

        Withheld are an unfinished character and what may be the beginning of a stop.
        """
        known = len(self.ids)
        self.ids += tokens[: self.job.max_tokens - known]
        if self.ids and self.ids[-1] in self.ends:
            self.finish = "stop"
        elif len(self.ids) == self.job.max_tokens:
            self.finish = "length"
        text = self.decode(self.ids)
        if stop_in(text, self.job.stops) is not None:
            sizes = range(known + 1, len(self.ids) + 1)
            texts = ((size, self.decode(self.ids[:size])) for size in sizes)
            size, text = next(found for found in texts if stop_in(found[1], self.job.stops) is not None)
            del self.ids[size:]
            text, self.finish, self.is_cut = text[: stop_in(text, self.job.stops)], "stop", True
        elif self.finish is None:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - begun(text, self.job.stops)]
        new, self.text = text[len(self.text) :], text
        return new

    def piece(self, text: str, scores: dict[str, Any] | None = None) -> Piece:
        """Returns the next part."""
        return Piece(self.choice, text, self.finish, len(self.ids), scores)


def stop_in(text: str, stops: Sequence[str]) -> int | None:
    """Returns where the first stop in a text begins."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)


def begun(text: str, stops: Sequence[str]) -> int:
    """Returns how many characters at the end of a text may be the beginning of a stop."""
    starts = (stop[:size] for stop in stops for size in range(1, len(stop)))
    return max((len(start) for start in starts if text.endswith(start)), default=0)
