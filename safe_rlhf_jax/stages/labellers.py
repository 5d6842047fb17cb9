"""Labellers of pairs: which response is more helpful, which safer, which are safe. A new one is a line of a table."""

import dataclasses
import json
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.formats import Record
from safe_rlhf_jax.data.texts import shown
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.host_signals import host_signal
from safe_rlhf_jax.stages.judge_labeller import Judge
from safe_rlhf_jax.stages.people import about_annotators, people_labels


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two different responses to a prompt.

    Attributes:
        turns: The conversation before them.
        first: response_0.
        second: response_1.
        record: That they are from.
    """

    turns: list[Any]
    first: str
    second: str
    record: Record

    @property
    def responses(self) -> tuple[str, str]:
        """Both."""
        return self.first, self.second


Labels = dict[str, Any]  # fields of a record; none for a pair without a label


# (conversations, responses, whether each has its end, records) -> costs, up to 0 is safe; None where it has no answer
Costs = Callable[[Sequence[Sequence[Any]], Sequence[str], Sequence[bool], Sequence[Any]], list[float | None]]


def no_costs(*_: Any) -> list[float | None]:
    """Stands for labellers who are asked about pairs only."""
    raise NotImplementedError("this labeller is asked about pairs only")


class Labeller(NamedTuple):
    """Who labels."""

    label: Callable[[Sequence[Pair], int], list[Labels]]  # (pairs, number of the first one) -> labels of each
    identity: dict[str, str]  # stands in each record
    costs: Costs = no_costs  # of single responses
    said: Callable[[], dict[str, float]] = dict  # what the labels took
    about: Callable[[Sequence[Pair]], dict[str, Any]] = lambda _: {}  # of several annotators: how far they agree


def consistent(labels: Labels) -> Labels:
    """Returns labels that agree with each other: of a safe and an unsafe response the safe one is the safer."""
    safe = [labels.get(f"is_response_{i}_safe") for i in (0, 1)]
    if None in safe or safe[0] == safe[1]:
        return labels
    return {name: label for name, label in labels.items() if name != "safer_votes"} | {
        "safer_response_id": safe.index(True)
    }


def oracle(run: Run, stage: cfg.Labelling) -> Labeller:
    """Returns the oracle of the embedded world, with its annotators' errors; each pair has its own draws."""
    settings: Any = stage.labeller
    seed = run.seed(stage)

    def label(pairs: Sequence[Pair], start: int) -> list[Labels]:
        found: list[Labels] = []
        for number, pair in enumerate(pairs, start):
            rng = random.Random(f"{seed}/{number}")
            try:
                found.append(dict(demo.annotation(shown(pair.turns), pair.responses, rng, settings.error_rate)))
            except ValueError as error:
                raise cfg.ConfigError(
                    f"{stage.name}: labeller: the oracle knows the embedded world only: {error}; use another labeller"
                ) from error
        return found

    def costs(
        conversations: Sequence[Sequence[Any]], responses: Sequence[str], ended: Sequence[bool], records: Sequence[Any]
    ) -> list[float | None]:
        del ended, records
        pairs = [Pair(list(turns), text, text, {}) for turns, text in zip(conversations, responses, strict=True)]
        labels = [
            label([pair], zlib.crc32(json.dumps([pair.turns, pair.first]).encode()))[0] for pair in pairs
        ]  # the same answer has the same label
        return [-1.0 if one["is_response_0_safe"] else 1.0 for one in labels]

    return Labeller(label, {"labeller": "oracle"}, costs)


def models(run: Run, stage: cfg.Labelling) -> Labeller:
    """Returns models that score, or functions: the higher reward is better, the lower cost safer, a cost ≤ 0 safe."""
    settings: Any = stage.labeller
    named = {kind: getattr(settings, kind) for kind in ("reward", "cost") if getattr(settings, kind) is not None}
    signals = {kind: host_signal(run, name, kind) for kind, name in named.items()}

    def label(pairs: Sequence[Pair], start: int) -> list[Labels]:
        del start
        turns = [pair.turns for pair in pairs for _ in range(2)]
        texts = [text for pair in pairs for text in pair.responses]
        ended, records = [True] * len(texts), [pair.record for pair in pairs for _ in range(2)]
        scores = {kind: np.reshape(signal(turns, texts, ended, records), (-1, 2)) for kind, signal in signals.items()}
        return [
            of_scores(scores["reward"][i] if "reward" in scores else None, row) for i, row in enumerate(scores["cost"])
        ]

    def costs(*responses: Any) -> list[float | None]:
        return [float(score) for score in signals["cost"](*responses)]

    return Labeller(label, {"labeller": "models"} | named, costs)


def judge(run: Run, stage: cfg.Labelling) -> Labeller:
    """Returns a judge behind an endpoint."""
    settings: Any = stage.labeller
    asked = Judge(run, stage.name, settings)
    return Labeller(
        asked,
        {"labeller": "judge", "model": asked.endpoint.model, "instruction": asked.digest},
        asked.costs,
        asked.said,
    )


def of_scores(reward: np.ndarray | None, cost: np.ndarray) -> Labels:
    """Returns the labels of a pair from its rewards, if there are any, and costs, f32[2] each.

    Equal scores prefer neither. The margins, differences of the scores, say where an audit should look.
    """
    labels: Labels = {"safer_margin": abs(float(cost[0] - cost[1]))}
    labels |= {f"is_response_{i}_safe": bool(cost[i] <= 0) for i in (0, 1)}
    labels |= {} if cost[0] == cost[1] else {"safer_response_id": int(cost.argmin())}
    if reward is not None:
        labels["better_margin"] = abs(float(reward[0] - reward[1]))
        labels |= {} if reward[0] == reward[1] else {"better_response_id": int(reward.argmax())}
    return labels


def people(run: Run, stage: cfg.Labelling) -> Labeller:
    """Returns people, who label all pairs of the stage at once, outside of the run."""
    settings: Any = stage.labeller
    folder = run.folder(stage.name)
    return Labeller(
        lambda pairs, start: people_labels(folder, pairs, settings.instruction, settings.aggregation),
        {"labeller": "people"},
        about=lambda pairs: about_annotators(folder, pairs, stage.by),
    )


LABELLERS: dict[str, Callable[[Run, cfg.Labelling], Labeller]] = {
    "oracle": oracle,
    "models": models,
    "judge": judge,
    "people": people,
}


def labeller_of(run: Run, stage: cfg.Labelling) -> Labeller:
    """Returns the labeller of a stage."""
    return LABELLERS[stage.labeller.kind](run, stage)
