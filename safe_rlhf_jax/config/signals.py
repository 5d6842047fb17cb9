"""Schemas of signals from the host: rewards and costs in RL that no network of the step computes."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import (
    Discriminator,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)

from safe_rlhf_jax.config.data import Schema

NAME = re.compile(r"reward|cost(/[A-Za-z0-9_\-]+)?")
PLACES = re.compile(r"\{(conversation|response)\}")  # of a question, where texts are put in


class EndpointFields(Schema):
    """A model behind an OpenAI-compatible endpoint."""

    unhashed: ClassVar[frozenset[str]] = frozenset(
        {"key_env", "timeout_s", "retries", "requests_per_minute", "concurrency", "price"}
    )
    base_url: str  # such as http://127.0.0.1:8000/v1
    model: str
    key_env: str | None = None  # environment variable with the key
    timeout_s: PositiveFloat = 60.0  # of one request
    retries: NonNegativeInt = 4
    requests_per_minute: PositiveFloat | None = None
    concurrency: PositiveInt = 8  # requests at once
    price: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 0.0)  # of a million tokens of prompts, and of answers


class EndpointJudge(EndpointFields):
    """A language model behind an endpoint that judges by the principles of a constitution."""

    constitution: str | None = None  # a YAML file, as docs/rounds.md says; null: the package's own


class FunctionSignal(Schema):
    """A Python function: (conversations, responses, ended[, records]) -> a number for each response."""

    unhashed: ClassVar[frozenset[str]] = frozenset({"timeout_s", "retries"})
    function: str  # MODULE:NAME
    timeout_s: PositiveFloat = 60.0  # of one call, with the responses of an iteration
    retries: NonNegativeInt = 2  # after an error or a timeout

    @pydantic.field_validator("function")
    @classmethod
    def names_a_function(cls, value: str) -> str:
        """Checks that it is MODULE:NAME."""
        if not re.fullmatch(r"[^:\s]+:[^:\s]+", value):
            raise ValueError("names no function; write MODULE:NAME")
        return value

    @property
    def reference(self) -> str:
        """The function, as a judge would name it."""
        return f"function:{self.function}"


class EndpointSignal(EndpointJudge):
    """A judge or a guard model behind an endpoint: a score for each answer that it may give.

    It is asked `question`. With `answers` alone it reads the conversation with the response as its last turn, as guard
    models do; with neither it is asked by the constitution whether the response is harmful: 1, or harmless: −1.
    """

    question: str | None = None  # a text with {response}, and perhaps {conversation}
    answers: dict[str, FiniteFloat] = Field(default_factory=dict)  # {word: score}: {unsafe: 1, safe: -1}

    @pydantic.field_validator("answers", mode="before")
    @classmethod
    def answers_are_words(cls, value: Any) -> Any:
        """Numbers as words; refuses what YAML has read as true or false."""
        if isinstance(value, Mapping) and any(isinstance(word, bool) for word in value):
            raise ValueError("YAML reads yes and no as true and false; write them in quotes")
        return {str(word): score for word, score in value.items()} if isinstance(value, Mapping) else value

    def idle(self) -> dict[str, str]:
        """The constitution of another question."""
        return {"constitution": "answers are those to another question"} if self.answers else {}

    @pydantic.model_validator(mode="after")
    def question_has_answers(self) -> "EndpointSignal":
        """Checks that the response stands in the question, and that answers differ."""
        if self.question is not None and "{response}" not in self.question:
            raise ValueError(f"question {self.question[:60]!r} has no place for the text; write {{response}} into it")
        if self.question is not None and not self.answers:
            raise ValueError("question needs answers, the score of each word that may answer it: {rude: 1, polite: -1}")
        if self.answers and len(set(self.answers.values())) < 2:
            raise ValueError(f"answers {self.answers} need two different scores")
        for word in self.answers:
            if not re.fullmatch("[A-Za-z0-9]+", word):
                raise ValueError(f"answers names {word!r}; an answer is recognised by one word of letters and digits")
        return self


def sort_of(value: Any) -> str:
    """Returns the schema of a signal, which its keys decide."""
    keys = value if isinstance(value, Mapping) else type(value).model_fields if isinstance(value, Schema) else ()
    return "EndpointSignal" if "base_url" in keys or "model" in keys else "FunctionSignal"


HostSignal = Annotated[
    Annotated[FunctionSignal, Tag("FunctionSignal")] | Annotated[EndpointSignal, Tag("EndpointSignal")],
    Discriminator(sort_of),
]


def are_rewards_or_costs(value: dict[str, Any]) -> dict[str, Any]:
    """Checks the names of signals, and that a reward is not asked for by a question about harm."""
    for signal, one in value.items():
        if not NAME.fullmatch(signal):
            raise ValueError(f"{signal!r} is no signal; write reward, cost or cost/NAME")
        if signal == "reward" and isinstance(one, EndpointSignal) and not one.answers:
            raise ValueError("reward: without a question and answers, a judge says whether a response is harmful")
    return value


HostSignals = Annotated[dict[str, HostSignal], pydantic.AfterValidator(are_rewards_or_costs)]
