"""Policies against each other by judges: win rates, and Elo of helpfulness and of harmlessness."""

import logging
from typing import Any

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.evaluation import comparison_page
from safe_rlhf_jax.evaluation.comparisons import (
    compared,
    leading,
    order_effects,
    won_by_scores,
    won_in_both_orders,
)
from safe_rlhf_jax.evaluation.statistics import kinds_of_prompts
from safe_rlhf_jax.metrics import write_jsonl
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.answers import Answered, answer_prompts, provenance_of, write_samples
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.judges import warn_of_judges
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.pair_judges import firsts, pair_judges, signal_kind, won_by_votes

LOGGER = logging.getLogger(__name__)

EVERY = "all prompts"


def run_judge(run: Run, stage: cfg.JudgeStage, folder: storage.Path) -> dict[str, Any]:
    """Runs a judge stage: samples, verdicts, win rates, Elo, report."""
    answered = answer_prompts(run, stage)
    responses = [[sample["response"] for sample in samples] for samples in answered.policies.values()]
    judges = pair_judges(run, stage)
    verdicts = {
        signal: firsts(judge, answered.conversations, responses, stage.batch_size) for signal, judge in judges.items()
    }
    took = {signal: said for signal, judge in judges.items() if (said := judge.said())}
    people = [signal for signal, judge in stage.pair_judges.items() if judge == cfg.PEOPLE]
    votes, answers = won_by_votes(folder, answered.conversations, responses, run.seed(stage)) if people else ({}, {})
    won = {signal: won_by_scores(scores_of(answered, signal)) for signal in stage.judges}
    won |= {signal: won_in_both_orders(found) for signal, found in verdicts.items()}
    won |= {signal: votes[signal_kind(signal)] for signal in people}
    rows = compared(won, stage.policies, kinds(answered))
    orders = {signal: order_effects(found) for signal, found in verdicts.items()}
    metrics = {
        f"{policy}/{axis}_elo": rating["elo"]
        for axis, row in leading(rows).items()
        for policy, rating in row["elo"].items()
    }
    for axis, row in leading(rows).items():
        LOGGER.info(f"{stage.name}: {axis} by {row['judge']}: {comparison_page.line(row)}")
    for signal, effects in orders.items():
        LOGGER.info(f"{stage.name}: {signal}: {comparison_page.order_line(effects)}")
    for signal, said in took.items():
        LOGGER.info(f"{stage.name}: {signal}: {', '.join(f'{name} {value:g}' for name, value in said.items())}")
    if is_main():
        write_samples(folder, answered.policies)
        write_verdicts(folder, stage, verdicts)
        page = comparison_page.page(
            rows, orders, title=f"{run.config.title}: {stage.name}", warnings=run.warnings.get(stage.name, []),
            provenance=provenance_of(run, stage) | described_judges(stage),
        )  # fmt: skip
        LOGGER.info(f"{stage.name}: report at {page.write(folder)}")
    found = {"comparisons": rows, "order_effects": orders, "metrics": metrics}
    return found | ({"endpoints": took} if took else {}) | ({"people": answers} if people else {})


def described_judges(stage: cfg.JudgeStage) -> dict[str, str]:
    """Returns the judges of two responses, as {item: value} of the provenance."""
    return {
        f"judge {signal}": judge if isinstance(judge, str) else f"{judge.model} at {judge.base_url}"
        for signal, judge in stage.pair_judges.items()
    }


def check_judges(run: Run, stage: cfg.JudgeStage, _: Any) -> None:
    """Warns of judges that are none from outside, and opens those of two responses.

    Raises:
        ConfigError: If one cannot be opened: its function, its constitution or its key is missing.
    """
    warn_of_judges(run, stage)
    pair_judges(run, stage)


def scores_of(answered: Answered, signal: str) -> np.ndarray:
    """Returns a judge's scores of the responses, higher is better, f64[P, K]."""
    sign = 1.0 if signal.startswith("reward/") else -1.0
    by_policy = [[sign * sample["judged"][signal] for sample in samples] for samples in answered.policies.values()]
    return np.array(by_policy, np.float64).T


def kinds(answered: Answered) -> dict[str, np.ndarray]:
    """Returns the prompts of each kind, bool[P]: all of them, and if there are several kinds, each."""
    samples = next(iter(answered.policies.values()))
    found = {
        kind: np.array([s["split"] == split and (groups is None or s["group"] in groups) for s in samples], bool)
        for kind, (split, groups) in kinds_of_prompts(samples).items()
    }
    every = np.ones(len(samples), bool)
    return {EVERY: every} | (found if len(found) > 1 else {})


def write_verdicts(folder: storage.Path, stage: cfg.JudgeStage, verdicts: dict[str, np.ndarray]) -> None:
    """Writes `verdicts.jsonl`, a line for every question to a judge of two responses.

    `prompt` is the number of the prompt in `samples.jsonl`, `for_first` 1, ½ or 0.
    """
    lines = [
        {"judge": signal, "prompt": p, "first": first, "second": second, "for_first": float(found[p, i, j])}
        for signal, found in verdicts.items()
        for p in range(len(found))
        for i, first in enumerate(stage.policies)
        for j, second in enumerate(stage.policies)
        if i != j
    ]
    write_jsonl(folder / "verdicts.jsonl", lines)


JUDGE = Kind(cfg.JudgeStage, run_judge, check=check_judges, shows_metrics=False)
