"""Outside judges of a stage's responses, and their agreement with human labels."""

from typing import Any

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.examples import Examples, sides_of
from safe_rlhf_jax.data.loader import in_order, in_rows
from safe_rlhf_jax.evaluation.evaluate import make_score, measured_pairs
from safe_rlhf_jax.evaluation.judges import AVERAGE, JUDGE, OWN, mean_reward, mean_unsafe
from safe_rlhf_jax.stages.common import Run, described, report_data
from safe_rlhf_jax.stages.datasets import take
from safe_rlhf_jax.stages.held_out import lineage
from safe_rlhf_jax.stages.host_signals import HostSignal, Scorers, text_scores

Assessment = cfg.EvaluateStage | cfg.CertifyStage | cfg.JudgeStage
Sides = tuple[np.ndarray, np.ndarray]  # f64[n] each: of the response that the label prefers, and of the other


def judge_signals(stage: Any) -> dict[str, str]:
    """Returns {signal: model} of a stage's judges, beside those of its scorers."""
    return {f"{JUDGE}{signal}": model for signal, model in getattr(stage, "judges", {}).items()}


def warn_of_judges(run: Run, stage: Assessment) -> None:
    """Warns of judges that took part in the training of a policy that they are to judge."""
    made = {other.name: other for other in run.config.stages}
    for signal, model in stage.judges.items():
        trained = [name for name in stage.policies if name in made and model in trained_by(run, made[name])]
        if trained:
            run.warn(
                stage.name,
                f"judges.{signal} names {model!r}, which took part in the training of {', '.join(trained)}: there it "
                "is no outside judge",
            )


def trained_by(run: Run, policy: cfg.StageBase) -> set[str]:
    """Returns the models that score in the training of a policy, and of all that it is built on."""
    uses = [use for one in lineage(run.config.stages, policy) for use in one.models().values()]
    return {use.reference for use in uses if use.scores is not None and not use.judge}


def agreement(
    run: Run, stage: cfg.EvaluateStage, scorers: Scorers, units: dict[str, float]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the agreement of a stage's models and judges with human labels.

    All of them read the same rows, cut at the same length, and are measured in the same way.

    Args:
        run: The run.
        stage: Its `pairs` have the labels.
        scorers: The stage's models, and its judges.
        units: Of the reward judges (see `evaluation.judges`).

    Returns:
        {"reward" or "cost": {`OWN`, judge, or `AVERAGE` of several: result of `measured_pairs`}}.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in stage.pairs:
        data = take(run, stage, f"pairs.{kind}")
        report_data(f"{stage.name}: {described(stage.pairs[kind])}", data)
        scores = of_pairs(run, scorers, kind, data)
        judged = {signal.removeprefix(JUDGE): scores[signal] for signal in scores if signal != kind}
        scores = {OWN: scores[kind]} | judged
        scores |= {AVERAGE: averaged(judged, kind, units)} if len(judged) > 1 else {}
        chosen, rejected = sides_of(data.arrays)
        lengths = chosen.response_mask.sum(-1), rejected.response_mask.sum(-1)
        labels = np.stack([data.arrays.safer_is_safe, data.arrays.unsafer_is_safe]) if kind == "cost" else None
        found[kind] = {name: measured_pairs(sides, lengths, labels, data.records) for name, sides in scores.items()}
    return found


def averaged(judged: dict[str, Sides], kind: str, units: dict[str, float]) -> Sides:
    """Returns the average of several judges: of rewards in standard deviations, of costs as the logit of "unsafe"."""

    def average(i: int) -> np.ndarray:
        side = {signal: sides[i] for signal, sides in judged.items()}
        if kind == "reward":
            return np.asarray(mean_reward(side, units))
        probability = np.clip(mean_unsafe(side), 1e-12, 1 - 1e-12)
        return np.asarray(np.log(probability) - np.log1p(-probability))

    return average(0), average(1)


def of_pairs(run: Run, scorers: Scorers, kind: str, data: Examples) -> dict[str, Sides]:
    """Returns the scores of pairs by all models and judges of a kind, by signal."""
    found: dict[str, Sides] = {}
    wanted = [signal for signal in scorers.signals if signal.removeprefix(JUDGE).partition("/")[0] == kind]
    for signal in sorted(wanted, key=lambda signal: signal.startswith(JUDGE)):
        if signal in scorers.host:
            found[signal] = by_text(run, scorers.host[signal], data)
        else:
            found[signal] = by_tokens(run, scorers.modules[signal], scorers.variables[signal], data)
    return found


def by_tokens(run: Run, module: Any, variables: Any, data: Examples) -> Sides:
    """Returns the scores of pairs by a model that reads the policy's tokens."""
    score, batches = make_score(module), in_order(data, run.rows(data))
    parts = [[run.get(score(variables, run.put(side))) for side in sides_of(batch)] for batch, _ in batches]
    first, second = (in_rows(side, batches).astype(np.float64) for side in zip(*parts, strict=True))
    return first, second


def by_text(run: Run, signal: HostSignal, data: Examples) -> Sides:
    """Returns the scores of pairs by a signal of the host, which reads what is left of a text that is cut."""
    rows, sides = run.rows(data), sides_of(data.arrays)
    found = []
    for i, side in enumerate(sides):
        parts = []
        for start in range(0, len(data), rows):
            which = np.arange(start, start + rows) % len(data)  # the last batch is filled from the beginning
            conversations = [data.turns[2 * row + i][:-1] for row in which]
            responses = [side.tokens[row][side.response_mask[row]] for row in which]
            records = [data.records[row] for row in which]
            parts.append(text_scores(run, {"": signal}, conversations, responses, records)[""])
        found.append(np.concatenate(parts)[: len(data)].astype(np.float64))
    return found[0], found[1]
