"""Signals of an RL stage that functions and endpoints give: asked once for each text, in time, and again after errors.

They run on the host between `collect` and `learn`, and in evaluations. The first process asks, for all of them. Answers
are kept, so that a run that is killed before `learn` continues with the same scores.
"""

import hashlib
import json
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.config.signals import PLACES
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.formats import Message, Record
from safe_rlhf_jax.data.texts import shown
from safe_rlhf_jax.endpoints import Endpoint
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.processes import of_first
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.host_signals import FunctionSignal, HostSignal
from safe_rlhf_jax.stages.judge_labeller import ASKED, CLASSIFY, Verdicts, endpoint_options, read_constitution
from safe_rlhf_jax.stages.partial import keep_batch, kept_batches

PAUSE_S = 1.0  # before the second try of a function; doubled before each further one
HARM = {"harmful": 1.0, "harmless": -1.0}  # answers to `CLASSIFY`


class PatientFunction:
    """A function with a limit of time and several tries.

    A call that takes too long goes on in a thread of its own until it ends: Python has no means to stop it.

    Args:
        settings: The function and its limits.
    """

    def __init__(self, settings: cfg.FunctionSignal):
        self.function = FunctionSignal(settings.reference)
        self.timeout_s, self.retries = settings.timeout_s, settings.retries
        self.reads_records = self.function.reads_records

    def __call__(self, *rows: Any) -> np.ndarray:
        """Returns the scores, f32[B].

        Raises:
            UserError: If the last try fails; at the first one if the function returns anything but a finite number for
                each response.
        """
        for number in range(self.retries + 1):
            time.sleep(PAUSE_S * 2 ** (number - 1) if number else 0)
            try:
                return in_time(lambda: self.function(*rows), self.timeout_s)
            except UserError:
                raise
            except Exception as error:
                failure = error
        tries = f"in {self.retries + 1} tries" if self.retries else "in one try"
        if isinstance(failure, TooLate):
            raise UserError(
                f"{self.function.reference} has not answered within timeout_s {self.timeout_s:g} {tries}; raise it, or "
                "look at what the function waits for"
            ) from failure
        *_, place = traceback.extract_tb(failure.__traceback__)
        said = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
        raise UserError(
            f"{self.function.reference} raised {said} {tries} ({place.filename}:{place.lineno}); mend the function"
        ) from failure


class TooLate(Exception):
    """A call that has not returned in time."""


def in_time(call: Callable[[], np.ndarray], seconds: float) -> np.ndarray:
    """Returns the result of a call, or raises what it raises.

    Raises:
        TooLate: If it takes longer.
    """
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(call())
        except BaseException as error:
            results.put(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon: the end of the program does not wait for it
    try:
        found = results.get(timeout=seconds)
    except queue.Empty:
        raise TooLate from None
    if isinstance(found, BaseException):
        raise found
    return np.asarray(found)


class ScoredAnswers:
    """A judge or a guard model behind an endpoint, whose answers have scores.

    An answer that is none of them counts as the worst one: the highest cost, or the lowest reward.

    Args:
        run: The run.
        where: The setting, for errors.
        settings: The endpoint, and what it is asked.
        is_cost: The scores are costs.
    """

    reads_records = False

    def __init__(self, run: Run, where: str, settings: cfg.EndpointSignal, is_cost: bool):
        self.endpoint = Endpoint(**endpoint_options(run, settings))
        self.question, answers = settings.question, settings.answers or HARM
        if not settings.answers:
            self.question = CLASSIFY.replace("{principles}", read_constitution(settings.constitution)["safety"])
        self.words, self.scores = list(answers), list(answers.values())
        self.worst = max(self.scores) if is_cost else min(self.scores)
        self.verdicts = Verdicts(where, settings.model, run.config.max_bad_records)

    def __call__(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str], ended: Sequence[bool],
        records: Sequence[Record] = (),
    ) -> np.ndarray:  # fmt: skip
        """Returns the score of each response, f32[B].

        Raises:
            EndpointError: If the endpoint fails.
            DataError: If too many answers have no score.
        """
        del ended, records
        asked = [self.messages(*row) for row in zip(conversations, responses, strict=True)]
        found = self.verdicts(self.endpoint.answers(asked, **ASKED), [self.words] * len(asked))
        return np.array([self.worst if i is None else self.scores[i] for i in found], np.float32)

    def messages(self, conversation: Sequence[Message], response: str) -> list[dict[str, Any]]:
        """Returns the question on a response; without one, the conversation with it."""
        if self.question is None:
            return [*map(dict, conversation), {"role": "assistant", "content": response}]
        texts = {"conversation": shown(conversation), "response": response}
        return [{"role": "user", "content": PLACES.sub(lambda place: texts[place[1]], self.question)}]


class Asked:
    """A signal that is asked once for each text, by the first process.

    Args:
        where: The setting, for errors.
        score: The function or endpoint.
        file: Keeps its answers; None: they are not kept.
    """

    def __init__(self, where: str, score: PatientFunction | ScoredAnswers, file: storage.Path | None):
        self.where, self.score, self.file = where, score, file
        self.known: dict[str, float] = {}
        for answers in kept_batches(file) if file is not None else ():
            self.known |= answers

    def __call__(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str], ended: Sequence[bool],
        records: Sequence[Record],
    ) -> np.ndarray:  # fmt: skip
        """Returns the score of each response, f32[B]. All processes call it.

        Raises:
            UserError: If it cannot be had; names the setting.
        """
        rows = list(zip(conversations, responses, ended, records, strict=True))
        return of_first(lambda: self.answers(rows), np.zeros(len(rows), np.float32))

    def answers(self, rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
        """Returns the score of each row, f32[B]; asks for those that are not known."""
        names = [self.name(*row) for row in rows]
        missing = {name: row for name, row in zip(names, rows, strict=True) if name not in self.known}
        if missing:
            try:
                scores = self.score(*map(list, zip(*missing.values(), strict=True)))
            except UserError as error:
                raise type(error)(f"{self.where}: {error}") from error
            found = dict(zip(missing, scores.tolist(), strict=True))
            if self.file is not None:
                keep_batch(self.file, found)
            self.known |= found
        return np.array([self.known[name] for name in names], np.float32)

    def name(self, conversation: Sequence[Message], response: str, ended: bool, record: Record) -> str:
        """Returns the name of an answer: a hash of what it depends on."""
        read = (list(conversation), response, bool(ended), record if self.score.reads_records else None)
        return hashlib.sha256(json.dumps(read, sort_keys=True, default=str).encode()).hexdigest()[:32]


def open_signals(run: Run, stage: cfg.RLStage, folder: storage.Path | None = None) -> Mapping[str, HostSignal]:
    """Opens the functions and endpoints of a stage, by signal.

    Args:
        run: The run.
        stage: The stage.
        folder: Of the stage, where answers are kept; a changed function or question has another one.

    Raises:
        ConfigError: If a function, or the key of an endpoint, is missing.
    """
    found = {}
    for signal, settings in stage.signals.items():
        where = f"{stage.name}: signals.{signal}"
        score: PatientFunction | ScoredAnswers
        try:
            if isinstance(settings, cfg.FunctionSignal):
                score = PatientFunction(settings)
            else:
                score = ScoredAnswers(run, where, settings, signal != "reward")
        except UserError as error:
            raise type(error)(f"{where}: {error}") from error
        found[signal] = Asked(where, score, folder and folder / f"answers_{signal.replace('/', '_')}.jsonl")
    return found


def check_signals(run: Run, stage: cfg.RLStage, prompts: Examples) -> None:
    """Asks every function and endpoint of a stage for the scores of two responses to its own prompts.

    Raises:
        UserError: Names the signal, what is wrong and the fix.
    """
    rows = [(prompts.turns[i], text, True, prompts.records[i]) for i, text in ((0, "Hello!"), (-1, "Goodbye!"))]
    for ask in open_signals(run, stage).values():
        ask(*zip(*rows, strict=True))
