"""Several annotators of the same tasks: how far they agree, who is near chance, and what a model of their errors says.

Sources: Krippendorff 2004, "Content analysis", chapter 11, and Hayes and Krippendorff 2007, "Answering the call for a
standard reliability measure" (α, and its bootstrap over tasks); Dawid and Skene 1979, "Maximum likelihood estimation of
observer error-rates using the EM algorithm".
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.data.records import majority_of
from safe_rlhf_jax.errors import ConfigError

Votes = Mapping[str, int]  # on one task: {annotator: 0 or 1}

RESAMPLES = 1000
NEAR_CHANCE, ENOUGH = 0.2, 20  # α below which an annotator is named, and the least number of answers for that


def agreement(tasks: Sequence[Votes]) -> dict[str, Any] | None:
    """Returns Krippendorff's α of the votes on tasks, with a 95 % interval by a bootstrap over tasks.

    It is 1 where all agree and 0 where they agree as often as by chance, given how usual each answer is.

    Args:
        tasks: Votes on each; those with fewer than two say nothing of agreement.

    Returns:
        {'alpha', 'low', 'high', 'n'}, n tasks; None without such a task, or where every vote is the same.

    Raises:
        ConfigError: If the package krippendorff is missing.
    """
    counts = np.array([[list(votes.values()).count(side) for side in (0, 1)] for votes in tasks if len(votes) > 1])
    if not counts.size or not counts.sum(0).all():
        return None
    alpha = library("krippendorff", "krippendorff").alpha
    rng = np.random.default_rng(0)
    drawn = (counts[rng.integers(len(counts), size=len(counts))] for _ in range(RESAMPLES))
    several = [alpha(value_counts=rows, level_of_measurement="nominal") for rows in drawn if rows.sum(0).all()]
    low, high = np.quantile(several, [0.025, 0.975])
    found = alpha(value_counts=counts, level_of_measurement="nominal")
    return {"alpha": float(found), "low": float(low), "high": float(high), "n": len(counts)}


def agreement_with_others(tasks: Sequence[Votes]) -> dict[str, dict[str, Any]]:
    """Returns the agreement of each annotator with the majority of the others, as `agreement` does.

    A task on which the others are tied is left out; an annotator of whom nothing can be said is absent.
    """
    found = {}
    for name in sorted({name for votes in tasks for name in votes}):
        both = []
        for votes in tasks:
            most = majority_of([vote for other, vote in votes.items() if other != name])
            if name in votes and most is not None:
                both.append({"own": votes[name], "others": most})
        if agreed := agreement(both):
            found[name] = agreed
    return found


def is_near_chance(agreed: Mapping[str, Any]) -> bool:
    """Says whether enough answers agree with those of others hardly more often than by chance."""
    return bool(agreed["n"] >= ENOUGH and agreed["alpha"] < NEAR_CHANCE)


def majorities(tasks: Sequence[Votes]) -> list[int | None]:
    """Returns the answer of most annotators to each task; None for one without votes, and in a tie."""
    return [majority_of(list(votes.values())) for votes in tasks]


def dawid_skene(tasks: Sequence[Votes]) -> list[int | None]:
    """Returns the more probable answer to each task, given how often each annotator errs in which direction.

    Answers and errors are estimated together, by expectation maximisation.

    Args:
        tasks: Votes on each.

    Returns:
        0 or 1; None for a task without votes, and where both are as probable.

    Raises:
        ConfigError: If the package crowd-kit is missing.
    """
    rows = [(task, name, vote) for task, votes in enumerate(tasks) for name, vote in votes.items()]
    if not rows:
        return [None for _ in tasks]
    model = library("crowdkit.aggregation", "crowd-kit").DawidSkene()
    frame = library("pandas", "pandas").DataFrame(rows, columns=["task", "worker", "label"])
    probable = model.fit_predict_proba(frame).reindex(columns=[0, 1], fill_value=0.0)[1].round(3).to_dict()
    return [None if probable.get(task, 0.5) == 0.5 else int(probable[task] > 0.5) for task in range(len(tasks))]


AGGREGATIONS: dict[str, Callable[[Sequence[Votes]], list[int | None]]] = {
    "majority": majorities,
    "dawid_skene": dawid_skene,
}


def library(module: str, package: str) -> Any:
    """Returns a module of the extra `people`.

    Raises:
        ConfigError: If its package is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the answers of several annotators need the package {package}: pip install 'safe_rlhf_jax[people]'"
        ) from error
