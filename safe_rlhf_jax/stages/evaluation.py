"""The evaluation of finished policies side by side, and the report."""

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

from rich.console import Console

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.evaluation.judges import add_averages, reward_units, views
from safe_rlhf_jax.evaluation.report import Report, summary_table, write_report
from safe_rlhf_jax.evaluation.statistics import summarize
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models.adapters import LanguageModel
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.answers import answer_prompts, provenance_of, write_samples
from safe_rlhf_jax.stages.common import Run, described, report_data
from safe_rlhf_jax.stages.datasets import take
from safe_rlhf_jax.stages.judges import agreement, warn_of_judges
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.supervised import demonstrations_evaluate

LOGGER = logging.getLogger(__name__)


def run_evaluation(run: Run, stage: cfg.EvaluateStage, folder: storage.Path) -> dict[str, Any]:
    """Runs an evaluate stage: samples from every policy, scores, oracle, table, report."""
    answered = answer_prompts(run, stage, cost_limit=stage.best_of_cost_limit, measure=perplexity_of(run, stage))
    policies, capability, scorers = answered.policies, answered.capability, answered.scorers
    everything = [sample for samples in policies.values() for sample in samples]
    units = reward_units(everything)
    add_averages(everything, units)
    agreed, judged = agreement(run, stage, scorers, units), views(policies) if stage.judges else []
    if is_main():
        write_samples(folder, policies)
        report = make_report(run, stage, policies, judged=judged, agreement=agreed, capability=capability)
        Console(width=None).print(summary_table(report))
        path = write_report(folder, report)
        LOGGER.info(f"{stage.name}: report at {path}")
    summaries = {name: summarize(samples) | capability.get(name, {}) for name, samples in policies.items()}
    result: dict[str, Any] = {
        "metrics": {f"{name}/{k}": v for name, found in summaries.items() for k, v in found.items()}
    }
    result |= {"judges": judged} if judged else {}
    shown = {kind: {name: one["health"] for name, one in found.items()} for kind, found in agreed.items()}
    return result | ({"agreement": shown} if shown else {})


def perplexity_of(run: Run, stage: cfg.EvaluateStage) -> Callable[[LanguageModel, Any], dict[str, float]]:
    """Returns measure(policy, its params): {"perplexity": of demonstrations, by response token}; {} without any."""
    if stage.demonstrations is None:
        return lambda *_: {}
    data = take(run, stage, "demonstrations")
    report_data(f"{stage.name}: {described(stage.demonstrations)}", data)
    evaluate_params = functools.cache(lambda policy: demonstrations_evaluate(run, policy, data))
    return lambda policy, params: {"perplexity": evaluate_params(policy)(params)["perplexity"]}


def make_report(
    run: Run, stage: cfg.EvaluateStage, policies: dict[str, list[evaluate.Sample]], **measured: Any
) -> Report:
    """Collects the results of the run's stages from their folders.

    Args:
        run: The run.
        stage: The stage.
        policies: Samples by policy.
        measured: Further fields of the report that the stage has measured.
    """
    scorers, history, seconds, facts = {}, {}, {}, [f"seed {run.config.seed}"]
    limit: float | None = None
    constrained: list[str] | None = None
    for other in run.config.stages:
        result = run.result(other.name)
        if result is None:
            continue
        seconds[other.name] = result["seconds"]
        facts += [f"{other.name}: {warning}" for warning in result.get("warnings", ())]
        scores, metrics = run.folder(other.name) / "scores.json", run.folder(other.name) / "metrics.jsonl"
        if other.name in (stage.reward_model, stage.cost_model):
            nothing_known: dict[str, Any] = {"scores_by_label": {}, "health": None}
            scorers[result["kind"]] = (
                json.loads(storage.read_text(scores)) if storage.is_file(scores) else nothing_known
            )
        if storage.is_file(metrics) and other.name in (*stage.policies, stage.reward_model, stage.cost_model):
            rows = read_jsonl(metrics)
            if "start" in result:  # of an rl stage with judges
                last = {"step": rows[-1]["step"]} | result["metrics"]
                rows = [{"step": 0} | result["start"], *rows, last]
            history[other.name] = rows
        if other.limits and other.makes == "policy" and "cost_limit" in result and limit is None:
            limit = result["cost_limit"]
            groups = other.limits["cost"].constrained_groups
            constrained = list(groups) if groups else None
            facts.append(f"cost limit d = {limit:.3f}: {result['cost_limit_source']}")
    facts += [f"{stage.name}: {warning}" for warning in run.warnings.get(stage.name, ())]
    oracles = [oracle for data in stage.prompts if (oracle := run.oracle(data))]
    written = run.folder(stage.name) / "config.yaml"
    return Report(
        title=run.config.title,
        command=f"python -m safe_rlhf_jax.train --config {run.config_path}",
        summary_lines=facts,
        policies=policies,
        scorers=scorers,
        history=history,
        cost_limit=limit,
        stage_seconds=seconds,
        constrained_groups=constrained,
        measures=tuple(dict.fromkeys(measure for oracle in oracles for measure in oracle.measures)),
        note=" ".join(dict.fromkeys(oracle.note for oracle in oracles)),
        provenance=provenance_of(run, stage),
        config=storage.read_text(written) if storage.is_file(written) else "",
        **measured,
    )


EVALUATE = Kind(
    cfg.EvaluateStage, run_evaluation, check=lambda run, stage, _: warn_of_judges(run, stage), shows_metrics=False
)
