"""Judges that see two responses at once: functions of the user's, language models behind an endpoint, and people."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.formats import Message
from safe_rlhf_jax.evaluation.comparisons import AXES
from safe_rlhf_jax.processes import of_first
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.host_signals import FunctionSignal
from safe_rlhf_jax.stages.judge_labeller import QUESTIONS, Judge
from safe_rlhf_jax.stages.labellers import Pair
from safe_rlhf_jax.stages.people import people_labels

QUESTION = dict(zip(AXES, QUESTIONS, strict=True))  # by kind of signal: what an endpoint is asked
VOTES = {"reward": "better_votes", "cost": "safer_votes"}  # by kind of signal: what people said
Responses = Sequence[Sequence[str]]  # [K][P], by policy


class PairJudge(NamedTuple):
    """Who is asked about two responses in both orders."""

    # (conversations [B], first responses [B], second ones [B]) -> f[B]: above 0 where the first is better, below 0
    # where the second is, 0 for a tie. "Better" is more helpful or safer, by the judge's signal.
    compare: Callable[[Sequence[Sequence[Message]], Sequence[str], Sequence[str]], np.ndarray]
    said: Callable[[], dict[str, float]] = dict  # what the verdicts took


def pair_judges(run: Run, stage: cfg.JudgeStage) -> dict[str, PairJudge]:
    """Opens the judges of a stage that are asked in both orders, by signal.

    Raises:
        ConfigError: If there is no such function, a constitution cannot be read, or an endpoint's key is missing.
    """
    found = {}
    for signal, judge in stage.pair_judges.items():
        if isinstance(judge, cfg.EndpointJudge):
            asked = Judge(run, f"{stage.name}: pair_judges.{signal}", judge)
            found[signal] = PairJudge(functools.partial(asked.preferences, QUESTION[signal_kind(signal)]), asked.said)
        elif judge != cfg.PEOPLE:
            found[signal] = PairJudge(FunctionSignal(judge).numbers)
    return found


def signal_kind(signal: str) -> str:
    """Returns "reward" or "cost"."""
    return signal.partition("/")[0]


def firsts(
    judge: PairJudge, conversations: Sequence[Sequence[Message]], responses: Responses, batch_size: int
) -> np.ndarray:
    """Returns the verdicts of a judge on every pair of policies in both orders, f64[P, K, K] (see `comparisons`).

    The first process asks, for all of them.

    Args:
        judge: The judge.
        conversations: [P].
        responses: [K][P], by policy.
        batch_size: Pairs asked of at once.
    """
    prompts, policies = range(len(conversations)), range(len(responses))
    asked = [(p, i, j) for i in policies for j in policies if i != j for p in prompts]

    def verdicts() -> np.ndarray:
        found = ties(prompts, policies)
        for start in range(0, len(asked), batch_size):
            rows = asked[start : start + batch_size]
            said = judge.compare(
                [conversations[p] for p, _, _ in rows], [responses[i][p] for p, i, _ in rows],
                [responses[j][p] for p, _, j in rows],
            )  # fmt: skip
            for row, preference in zip(rows, said, strict=True):
                found[row] = (1.0 + np.sign(preference)) / 2.0
        return found

    return of_first(verdicts, ties(prompts, policies))


def won_by_votes(
    folder: storage.Path, conversations: Sequence[Sequence[Message]], responses: Responses, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Returns the shares of people's votes that policies win over each other, and the number of pairs shown.

    Each pair is shown once, its sides in random order; equal responses are a tie and shown to nobody.

    Args:
        folder: Of the stage, for the tasks and their answers.
        conversations: [P].
        responses: [K][P], by policy.
        seed: Of the order of sides.

    Returns:
        {"reward" or "cost": f64[P, K, K]} (see `comparisons`), ½ where nobody answered; counts of pairs.

    Raises:
        WaitingForLabelsError: If they have not answered yet.
        DataError: If the answers are of other tasks, or no answers.
    """
    prompts, policies = range(len(conversations)), range(len(responses))
    shown = []
    for p in prompts:
        for i in policies:
            for j in policies[i + 1 :]:
                if responses[i][p] != responses[j][p]:
                    shown.append((p, *random.Random(f"{seed}/{p}/{i}/{j}").sample((i, j), 2)))
    pairs = [Pair(list(conversations[p]), responses[i][p], responses[j][p], {}) for p, i, j in shown]
    labels = people_labels(folder, pairs, cfg.PeopleLabeller(kind="people").instruction) if pairs else []
    won = {kind: ties(prompts, policies) for kind in VOTES}
    for (p, i, j), label in zip(shown, labels, strict=True):
        for kind, name in VOTES.items():
            second = np.mean(label.get(name, 0.5))
            won[kind][p, i, j], won[kind][p, j, i] = 1.0 - second, second
    unanswered = {f"without_{name}": sum(name not in label for label in labels) for name in VOTES.values()}
    return won, {"pairs": len(pairs)} | unanswered


def ties(prompts: Sequence[int], policies: Sequence[int]) -> np.ndarray:
    """Returns a tie for every prompt and pair of policies, f64[P, K, K]."""
    return np.full((len(prompts), len(policies), len(policies)), 0.5)
