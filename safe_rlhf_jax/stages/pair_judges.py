"""Judges that see two responses at once: functions of the user's, and a door for others."""

from collections.abc import Callable, Sequence

import numpy as np

from safe_rlhf_jax.data.formats import Message
from safe_rlhf_jax.stages.host_signals import FunctionSignal

# (conversations [B], first responses [B], second ones [B]) -> f[B]: above 0 where the first is better, below 0 where
# the second is, 0 for a tie. "Better" is more helpful or safer, by the judge's signal.
PairJudge = Callable[[Sequence[Sequence[Message]], Sequence[str], Sequence[str]], np.ndarray]

# By what stands before the first colon of its reference. Another sort of judge is an entry here, and an allowed prefix
# in `config.assessing`.
PAIR_JUDGES: dict[str, Callable[[str], PairJudge]] = {"function": lambda reference: FunctionSignal(reference).numbers}


def open_pair_judge(reference: str) -> PairJudge:
    """Opens a judge of two responses.

    Raises:
        ConfigError: If there is no such module or function.
    """
    return PAIR_JUDGES[reference.partition(":")[0]](reference)


def firsts(
    judge: PairJudge, conversations: Sequence[Sequence[Message]], responses: Sequence[Sequence[str]], batch_size: int
) -> np.ndarray:
    """Returns the verdicts of a judge on every pair of policies in both orders, f64[P, K, K] (see `comparisons`).

    Args:
        judge: The judge.
        conversations: [P].
        responses: [K][P], by policy.
        batch_size: Pairs asked of at once.
    """
    prompts, policies = range(len(conversations)), range(len(responses))
    asked = [(p, i, j) for i in policies for j in policies if i != j for p in prompts]
    found = np.full((len(prompts), len(policies), len(policies)), 0.5)
    for start in range(0, len(asked), batch_size):
        rows = asked[start : start + batch_size]
        said = judge(
            [conversations[p] for p, _, _ in rows], [responses[i][p] for p, i, _ in rows],
            [responses[j][p] for p, _, j in rows],
        )  # fmt: skip
        for row, preference in zip(rows, said, strict=True):
            found[row] = (1.0 + np.sign(preference)) / 2.0
    return found
