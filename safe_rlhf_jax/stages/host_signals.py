"""Host signals, outside of the compiled step: from conversations and responses to a score each.

Used for scorers with another encoding than the policy and for signals of functions and endpoints (`stages.asked`), all
of which run between `collect` and `learn`, and for judges that are Python functions, which run in evaluations only.
"""

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.config.messages import did_you_mean
from safe_rlhf_jax.data.conversations import Text, written
from safe_rlhf_jax.data.examples import Examples, pad_right
from safe_rlhf_jax.data.formats import Message, Record
from safe_rlhf_jax.errors import ConfigError, NonFiniteError
from safe_rlhf_jax.evaluation.evaluate import make_score
from safe_rlhf_jax.evaluation.judges import JUDGE
from safe_rlhf_jax.inference.stream import columns
from safe_rlhf_jax.models.config import Lora
from safe_rlhf_jax.processes import of_first
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.types import PromptBatch, Rollout, Sequences, Signals

LOGGER = logging.getLogger(__name__)

# (conversations [B], responses [B], whether each response has its end [B], records of the prompts [B]) -> f32[B]
HostSignal = Callable[[Sequence[Sequence[Message]], Sequence[str], Sequence[bool], Sequence[Record]], np.ndarray]


class ScorerSignal:
    """A reward or cost model with its own tokenizer or template.

    Responses are decoded, written in the model's own template, and scored by a separate program.

    Args:
        run: The run.
        reference: The model: `path:…` or `hf:…`.
        kind: "reward" or "cost".
    """

    def __init__(self, run: Run, reference: str, kind: Any):
        self.run, self.reference, self.encoding = run, reference, run.encoding(reference)
        self.module, self.variables = run.networks.read(reference, "score", score_type=kind)
        self.score = make_score(self.module)
        self.has_cut = False

    def __call__(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str], ended: Sequence[bool],
        records: Sequence[Record] = (),
    ) -> np.ndarray:  # fmt: skip
        """Returns the score of each response, f32[B].

        Raises:
            ValueError: If the template cannot write a conversation.
        """
        del records
        rows = [self.text(*row) for row in zip(conversations, responses, ended, strict=True)]
        width = columns(max(len(row.ids) for row in rows), self.module.config.max_positions)
        arrays = pad_right(rows, width, self.encoding.tokenizer.pad_id)
        texts = Sequences(arrays["tokens"], arrays["mask"], arrays["mask"])
        scores: np.ndarray = self.run.get(self.score(self.variables, self.run.put(texts)))
        return scores

    def text(self, conversation: Sequence[Message], response: str, ended: bool) -> Text:
        """Returns a conversation in the model's encoding; a truncated response has an end token if the run says so."""
        turns = [*conversation, {"role": "assistant", "content": response}]
        ids = written(turns, self.encoding.template, self.encoding.tokenizer, False).ids
        ids = ids if ended or self.run.config.end_truncated else ids[:-1]
        room = self.module.config.max_positions
        if len(ids) > room and not self.has_cut:
            self.has_cut = True
            LOGGER.warning(
                f"{self.reference}: warning: a text of {len(ids)} tokens, where the model has {room} positions; texts "
                "that are longer lose their beginning"
            )
        return Text(ids[-room:], [False] * min(len(ids), room))


class FunctionSignal:
    """A Python function of the user's: (conversations, responses, ended) -> a number for each.

    One with a parameter `records` receives the records of the prompts as well.

    Args:
        reference: `function:MODULE:NAME`.

    Raises:
        ConfigError: If there is no such module or function.
    """

    def __init__(self, reference: str):
        self.reference = reference
        _, module, name = reference.split(":", 2)
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"{reference} cannot be imported: {error}; Python looks for modules in PYTHONPATH, and with python -m "
                "in the current folder"
            ) from error
        if not hasattr(found, name):
            raise ConfigError(f"{reference}: {found.__name__} has no {name!r}{did_you_mean(name, vars(found))}")
        self.function = getattr(found, name)
        if not callable(self.function):
            raise ConfigError(f"{reference} is no function, but {type(self.function).__name__}")
        self.reads_records = "records" in parameters_of(self.function)

    def __call__(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str], ended: Sequence[bool],
        records: Sequence[Record] = (),
    ) -> np.ndarray:  # fmt: skip
        """Returns the score of each response, f32[B].

        Raises:
            ConfigError: If the function returns anything but a number for each response.
            NonFiniteError: If one of them is not finite.
        """
        named = {"records": records} if self.reads_records else {}
        return self.numbers(conversations, responses, ended, **named)

    def numbers(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str], others: Sequence[Any], **named: Any
    ) -> np.ndarray:
        """Returns what the function says of each row, f32[B]; raises as a call does."""
        returned = self.function(conversations, responses, others, **named)
        try:
            scores = np.asarray(returned).astype(np.float32, casting="same_kind")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.reference} returned no numbers, but {type(returned).__name__}") from error
        if scores.shape != (len(responses),):
            raise ConfigError(
                f"{self.reference} returned numbers of shape {scores.shape} for {len(responses)} responses; it has to "
                f"return one for each, of shape {(len(responses),)}"
            )
        for row in np.flatnonzero(~np.isfinite(scores))[:1]:
            raise NonFiniteError(f"{self.reference} returned {scores[row]} for the response {responses[row][:80]!r}")
        return scores


def parameters_of(function: Any) -> tuple[str, ...]:
    """Returns the names of a function's parameters; none of one whose signature is not known, such as a built-in."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


@dataclasses.dataclass(frozen=True)
class Scorers:
    """The scorers of a stage, by signal."""

    modules: dict[str, Any]  # that read the policy's tokens: part of the compiled step
    variables: dict[str, Any]  # of the modules
    host: dict[str, HostSignal]  # the others

    @property
    def signals(self) -> list[str]:
        """All signals, of models that score and of judges."""
        return [*self.modules, *self.host]

    def __or__(self, other: "Scorers") -> "Scorers":
        """Returns both, whose signals differ."""
        return Scorers(self.modules | other.modules, self.variables | other.variables, self.host | other.host)


def called_once(function: HostSignal) -> HostSignal:
    """Returns a function as a signal that all processes ask together: the first one calls it."""
    return lambda conversations, responses, ended, records: of_first(
        lambda: function(conversations, responses, ended, records), np.zeros(len(responses), np.float32)
    )


def host_signal(run: Run, reference: str, kind: Any) -> HostSignal:
    """Opens a function, or a reward or cost model that reads texts."""
    if reference.startswith("function:"):
        return called_once(FunctionSignal(reference))
    return ScorerSignal(run, reference, kind)


def open_scorers(run: Run, scorers: Mapping[str, str], lora: Lora | None = None) -> Scorers:
    """Opens scorers and judges, given as {signal: model}.

    Args:
        run: The run.
        scorers: By signal; those of judges begin with `JUDGE`.
        lora: Form of the adapters; each is then a frozen base with such an adapter.
    """
    modules, variables = {}, {}
    host: dict[str, HostSignal] = {}
    with run.networks.reading_once():
        for signal, reference in scorers.items():
            kind: Any = signal.removeprefix(JUDGE).partition("/")[0]
            if reference.startswith("function:") or reference in run.own:
                host[signal] = host_signal(run, reference, kind)
            else:
                modules[signal], variables[signal] = run.networks.read(reference, "score", score_type=kind, lora=lora)
    return Scorers(modules, variables, host)


def host_scores(
    run: Run,
    host: Mapping[str, HostSignal],
    prompts: Examples,
    rows: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns the scores of responses by the signals of the host, f32[B] each.

    Args:
        run: The run.
        host: By signal.
        prompts: The data set of the prompts.
        rows: i32[B], the prompt's row of each response.
        tokens: i32[B, T], responses.
        lengths: i32[B], their tokens.
    """
    if not host:
        return {}
    responses = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    records = [prompts.records[row] for row in rows]
    return text_scores(run, host, [prompts.turns[row] for row in rows], responses, records)


def text_scores(
    run: Run,
    host: Mapping[str, HostSignal],
    conversations: Sequence[Sequence[Message]],
    responses: Sequence[np.ndarray],
    records: Sequence[Record],
) -> dict[str, np.ndarray]:
    """Returns the scores of responses, i32[tokens] with their end, by the signals of the host, f32[B] each."""
    ended = [run.has_end(row) for row in responses]
    texts = [run.tokenizer.decode(row) for row in responses]
    return {signal: score(conversations, texts, ended, records) for signal, score in host.items()}


def given_scores(
    run: Run, host: Mapping[str, HostSignal], prompts: Examples, num_responses: int
) -> Callable[[Rollout, PromptBatch], Signals] | None:
    """Returns given(rollout, batch): scores of the host's signals on the devices; None without host signals."""
    if not host:
        return None

    def given(rollout: Rollout, batch: PromptBatch) -> Signals:
        tokens, lengths, rows = run.get((rollout.tokens, rollout.mask[:, rollout.prompt_length :].sum(-1), batch.row))
        rows = np.repeat(rows, num_responses)
        scores: Signals = run.put(host_scores(run, host, prompts, rows, tokens[:, rollout.prompt_length :], lengths))
        return scores

    return given
