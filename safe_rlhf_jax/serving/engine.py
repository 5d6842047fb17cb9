"""Requests wait in a bounded queue; one thread answers as many of them at once as fit into a batch."""

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.records import Unusable
from safe_rlhf_jax.errors import ConfigError, NonFiniteError
from safe_rlhf_jax.inference.row_stream import RowSettings, RowStream
from safe_rlhf_jax.pipeline import Policy, Scorer, pad
from safe_rlhf_jax.serving.answers import Answer, Job

LOGGER = logging.getLogger(__name__)
T = TypeVar("T")

GATHER_S = 0.005  # a batch waits this long for further requests
NARROWEST = 64  # tokens; the least width that prompts are padded to
STEP = 4  # from one batch size, or width, to the next


class FullError(Exception):
    """No room in the queue."""


def buckets(least: int, most: int) -> tuple[int, ...]:
    """Returns the sizes that are compiled: `least`, each `STEP` times the one before, and `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= STEP
    return (*sizes, most)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is compiled, and what is accepted."""

    prompt: int  # tokens
    response: int  # tokens
    batch: int  # answers at once
    queue: int  # requests that wait

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows of a batch."""
        return buckets(1, self.batch)

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of columns of its prompts."""
        return buckets(NARROWEST, self.prompt)


def fitting_limits(policy: Policy, scorers: Mapping[str, Scorer], prompt: int | None, response: int, batch: int,
                   queue: int) -> Limits:  # fmt: skip
    """Returns limits that fit the models' positions.

    Args:
        policy: The policy.
        scorers: Scorers; those that read as the policy does need as many positions.
        prompt: Most tokens of a prompt; by default 1024, or the positions that are left.
        response: Most tokens of a response.
        batch: Answers at once.
        queue: Requests that wait.

    Raises:
        ConfigError: If they do not fit.
    """
    rooms = {
        signal: scorer.module.config.max_positions for signal, scorer in scorers.items() if scorer.reads_as(policy)
    }
    rooms["the policy"] = policy.module.config.generated_length
    name, room = min(rooms.items(), key=lambda item: item[1])
    prompt = min(1024, room - response) if prompt is None else prompt
    if prompt < 1 or prompt + response > room:
        raise ConfigError(
            f"--max-tokens {response} and a prompt of {max(prompt, 1)} tokens exceed the {room} positions of {name}; "
            "make --max-tokens or --max-prompt smaller"
        )
    return Limits(prompt, response, batch, queue)


class Engine:
    """Answers requests in batches, in a thread of its own.

    Args:
        policy: The policy.
        scorers: By signal; they score every answer.
        limits: Sizes of batches, prompts, responses and the queue.
    """

    def __init__(self, policy: Policy, scorers: Mapping[str, Scorer], limits: Limits):
        self.policy, self.scorers, self.limits = policy, scorers, limits
        self.ends = policy.template.ends(policy.tokenizer)
        self.stream = RowStream(
            policy.module, policy.variables["params"], eos_id=self.ends, response_length=limits.response
        )
        self.reads_as = {signal: scorer.reads_as(policy) for signal, scorer in scorers.items()}
        self.waiting: collections.deque[Job] = collections.deque()
        self.changed = threading.Condition()
        self.closed = False
        self.seconds = 1.0  # of the last batch
        self.thread = threading.Thread(target=self.run, name="device")

    def start(self) -> None:
        """Compiles every shape, then starts the thread."""
        sizes, widths = self.limits.sizes, self.limits.widths
        LOGGER.info(f"compiling for batches of {listed(sizes)} answers and prompts of up to {listed(widths)} tokens")
        since = time.monotonic()
        for size in sizes:
            for width in widths:
                job = Job([], [0] * width, lambda piece: None, self.limits.response + 1, cancelled=True)
                self.generate([Answer(job, 0, lambda ids: "", ()) for _ in range(size)])  # their first tokens
            for signal, scorer in self.scorers.items():
                for width in self.scored_widths(scorer):
                    self.score(signal, [[0] * width] * size)
        LOGGER.info(f"compiled in {time.monotonic() - since:.0f} s")
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Queues a request.

        Raises:
            FullError: If the queue is full.
        """
        with self.changed:
            if len(self.waiting) >= self.limits.queue:
                raise FullError
            self.waiting.append(job)
            self.changed.notify()

    def close(self) -> None:
        """Answers what waits, then ends the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def run(self) -> None:
        """Answers batch after batch until the engine is closed."""
        while (jobs := self.next_batch()) is not None:
            since = time.monotonic()
            answers = [Answer(job, i, self.policy.tokenizer.decode, self.ends) for job in jobs for i in range(job.n)]
            try:
                self.generate(answers)
            except Exception as error:  # of the device: it concerns this batch only
                LOGGER.exception("a batch failed")
                for job in jobs:
                    job.deliver(error)
                continue
            self.seconds = time.monotonic() - since
            tokens = sum(len(answer.ids) for answer in answers)
            LOGGER.info(f"requests {len(jobs)}, answers {len(answers)}, tokens {tokens}, {self.seconds:.2f} s")

    def next_batch(self) -> list[Job] | None:
        """Waits for requests and returns those that fit into a batch; None if the engine is closed."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if not self.waiting:
                    return None
                self.changed.wait_for(self.is_worth_starting, timeout=GATHER_S)
                jobs: list[Job] = []
                while self.waiting and sum(job.n for job in [*jobs, self.waiting[0]]) <= self.limits.batch:
                    job = self.waiting.popleft()
                    jobs += [] if job.cancelled else [job]
                if jobs:
                    return jobs

    def is_worth_starting(self) -> bool:
        """Says whether no further request needs to be waited for."""
        return self.closed or sum(job.n for job in self.waiting) >= self.limits.batch

    def generate(self, answers: Sequence[Answer]) -> None:
        """Generates answers together and delivers them piece by piece."""
        size = at_least(len(answers), self.limits.sizes)
        width = at_least(max(len(answer.job.prompt) for answer in answers), self.limits.widths)
        rows = filled(answers, size)  # the last ones are computed for nobody
        prompts = pad([answer.job.prompt for answer in rows], width, left=True)
        settings = RowSettings(
            np.array([answer.job.seed for answer in rows], np.uint32),
            np.array([answer.choice for answer in rows], np.uint32),
            np.array([answer.job.temperature for answer in rows], np.float32),
            np.array([answer.job.top_p for answer in rows], np.float32),
        )
        alive = np.arange(size) < len(answers)
        for chunk, counts in self.stream(*prompts, settings, alive):
            ended = []
            for row in np.flatnonzero(alive).tolist():
                answer = answers[row]
                text = answer.take(chunk[row, : counts[row]].tolist())
                alive[row] = answer.finish is None and not answer.job.cancelled
                if answer.finish is not None:
                    ended.append((answer, text))
                elif text:
                    answer.job.deliver(answer.piece(text))
            scores = self.scores([answer for answer, _ in ended])
            for i, (answer, text) in enumerate(ended):
                own = {signal: values[i] for signal, values in scores.items()}
                answer.job.deliver(answer.piece(text, own or None))

    def scores(self, answers: Sequence[Answer]) -> dict[str, list[float | None]]:
        """Returns the scores of answers by signal; None where a scorer cannot read the text."""
        found: dict[str, list[float | None]] = {}
        for signal in self.scorers:
            texts = [self.scored_text(signal, answer) for answer in answers]
            values = iter(self.score(signal, [ids for ids in texts if ids is not None]).tolist())
            found[signal] = [None if ids is None else next(values) for ids in texts]
        return found

    def score(self, signal: str, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the scores of token ids, in one of the compiled shapes, f32[rows]."""
        if not rows:
            return np.zeros(0, np.float32)
        scorer, size = self.scorers[signal], at_least(len(rows), self.limits.sizes)
        width = at_least(max(map(len, rows)), self.scored_widths(scorer))
        tokens, mask = pad(filled(rows, size), width, left=False)
        scores = np.asarray(scorer.score(scorer.variables, tokens, mask))[: len(rows)]
        if not np.isfinite(scores).all():
            raise NonFiniteError(f"{signal}: a score is not finite; look at that model")
        return scores

    def scored_widths(self, scorer: Scorer) -> tuple[int, ...]:
        """Returns the numbers of columns of texts for a scorer."""
        widths = [min(width + self.limits.response, scorer.module.config.max_positions) for width in self.limits.widths]
        return tuple(widths)

    def scored_text(self, signal: str, answer: Answer) -> list[int] | None:
        """Returns what a scorer reads: the policy's own tokens, or if it has others or a stop cut them, the text."""
        if self.reads_as[signal] and not answer.is_cut:
            return [*answer.job.prompt, *answer.ids]
        scorer = self.scorers[signal]
        turns = [*answer.job.turns, {"role": "assistant", "content": answer.text}]
        try:
            ids = encode(turns, scorer.template, scorer.tokenizer).ids
        except Unusable as error:
            LOGGER.warning(f"{signal}: an answer without score: {error}")
            return None
        if len(ids) > self.scored_widths(scorer)[-1]:
            LOGGER.warning(f"{signal}: an answer without score: its text has {len(ids)} tokens")
            return None
        return ids

    @property
    def retry_after(self) -> int:
        """Seconds after which a full queue may have room."""
        return max(1, math.ceil(self.seconds))


def at_least(number: int, sizes: Sequence[int]) -> int:
    """Returns the first size that holds a number."""
    return next(size for size in sizes if size >= number)


def filled(rows: Sequence[T], size: int) -> list[T]:
    """Returns rows and, up to a size, copies of the first."""
    return [*rows, *[rows[0]] * (size - len(rows))]


def listed(numbers: Sequence[int]) -> str:
    """Returns `1, 4 or 16`."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
