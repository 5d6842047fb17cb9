"""Host signals, outside of the compiled step: from conversations and responses to a score each.

Used for scorers with another encoding than the policy. They run between `collect` and `learn`.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.data.conversations import Text, written
from safe_rlhf_jax.data.examples import Examples, pad_right
from safe_rlhf_jax.data.formats import Message
from safe_rlhf_jax.evaluation.evaluate import make_score
from safe_rlhf_jax.inference.stream import columns
from safe_rlhf_jax.models.config import Lora
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.types import Sequences

LOGGER = logging.getLogger(__name__)

# (conversations [B], responses [B], whether each response has its end [B]) -> f32[B]
HostSignal = Callable[[Sequence[Sequence[Message]], Sequence[str], Sequence[bool]], np.ndarray]


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
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str], ended: Sequence[bool]
    ) -> np.ndarray:
        """Returns the score of each response, f32[B].

        Raises:
            ValueError: If the template cannot write a conversation.
        """
        rows = [self.text(*row) for row in zip(conversations, responses, ended, strict=True)]
        width = columns(max(len(row.ids) for row in rows), self.module.config.max_positions)
        arrays = pad_right(rows, width, self.encoding.tokenizer.pad_id)
        texts = Sequences(arrays["tokens"], arrays["mask"], arrays["mask"])
        scores: np.ndarray = self.run.get(self.score(self.variables, self.run.put(texts)))
        return scores

    def text(self, conversation: Sequence[Message], response: str, ended: bool) -> Text:
        """Returns a conversation in the model's encoding; a truncated response has no end token here either."""
        turns = [*conversation, {"role": "assistant", "content": response}]
        ids = written(turns, self.encoding.template, self.encoding.tokenizer, False).ids
        ids = ids if ended else ids[:-1]
        room = self.module.config.max_positions
        if len(ids) > room and not self.has_cut:
            self.has_cut = True
            LOGGER.warning(
                f"{self.reference}: warning: a text of {len(ids)} tokens, where the model has {room} positions; texts "
                "that are longer lose their beginning"
            )
        return Text(ids[-room:], [False] * min(len(ids), room))


@dataclasses.dataclass(frozen=True)
class Scorers:
    """The scorers of a stage, by signal."""

    modules: dict[str, Any]  # that read the policy's tokens: part of the compiled step
    variables: dict[str, Any]  # of the modules
    host: dict[str, HostSignal]  # the others


def open_scorers(run: Run, scorers: Mapping[str, str], lora: Lora | None = None) -> Scorers:
    """Opens scorers, given as {signal: model}; with `lora`, each as a frozen base with an adapter of that form."""
    modules, variables = {}, {}
    host: dict[str, HostSignal] = {}
    with run.networks.reading_once():
        for signal, reference in scorers.items():
            kind: Any = signal.partition("/")[0]
            if reference in run.own:
                host[signal] = ScorerSignal(run, reference, kind)
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
    ended = [len(row) > 0 and int(row[-1]) in run.ends for row in responses]
    texts = [run.tokenizer.decode(row) for row in responses]
    conversations = [prompts.turns[row] for row in rows]
    return {signal: score(conversations, texts, ended) for signal, score in host.items()}
