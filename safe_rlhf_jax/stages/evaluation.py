"""The evaluation of finished policies side by side, and the report."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.evaluation.judges import add_averages, reward_units, views
from safe_rlhf_jax.evaluation.provenance import code_version, machine
from safe_rlhf_jax.evaluation.report import Report, summary_table, write_report
from safe_rlhf_jax.evaluation.statistics import summarize
from safe_rlhf_jax.inference.best_of_n import make_sampler
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models.adapters import LanguageModel
from safe_rlhf_jax.models.config import Lora
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.common import Run, described, oracle_for, report_data
from safe_rlhf_jax.stages.datasets import take
from safe_rlhf_jax.stages.host_signals import Scorers, host_scores, open_scorers
from safe_rlhf_jax.stages.judges import agreement, judge_signals, warn_of_judges
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.sampling import scores_of_several
from safe_rlhf_jax.stages.supervised import demonstrations_evaluate
from safe_rlhf_jax.types import Frozen, PromptBatch

LOGGER = logging.getLogger(__name__)


def run_evaluation(run: Run, stage: cfg.EvaluateStage, folder: storage.Path) -> dict[str, Any]:
    """Runs an evaluate stage: samples from every policy, scores, oracle, table, report."""
    lora = next(filter(None, map(run.networks.form, stage.policies)), None)
    with contextlib.nullcontext() if lora is None else run.networks.reading_once():  # one base for all of them
        scorers = open_scorers(run, stage.scorers | judge_signals(stage))
        policies, capability = sample_policies(run, stage, scorers, lora)
    everything = [sample for samples in policies.values() for sample in samples]
    units = reward_units(everything)
    add_averages(everything, units)
    agreed, judged = agreement(run, stage, scorers, units), views(policies) if stage.judges else []
    if is_main():
        lines = (json.dumps({"policy": name} | sample) for name, samples in policies.items() for sample in samples)
        storage.write(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
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


def sample_policies(
    run: Run, stage: cfg.EvaluateStage, scorers: Scorers, lora: Lora | None = None
) -> tuple[dict[str, list[evaluate.Sample]], dict[str, dict[str, float]]]:
    """Returns the samples of every policy on every set of prompts, and {policy: {"perplexity": of demonstrations}}.

    Args:
        run: The run.
        stage: The stage.
        scorers: Its models and judges.
        lora: Form of the policies' adapters, if they have any.
    """
    seed = run.config.seed if stage.seed is None else stage.seed
    baseline, *_ = stage.policies
    start, reference = open_policy(run, baseline, lora)
    frozen = Frozen(reference=reference, scorers=scorers.variables)
    sampler: dict[str, Any] = {
        "response_length": stage.max_response_length,
        "eos_id": run.ends,
        "pad_id": run.tokenizer.pad_id,
        "sampling": Sampling(stage.temperature, stage.top_k, stage.top_p, stage.repetition_penalty),
    }

    @functools.cache  # policies of one network share a program
    def respond(module: LanguageModel) -> Callable[..., Any]:
        return evaluate.make_respond(module, scorers.modules, reference=start, **sampler)

    @functools.cache
    def sample(module: LanguageModel, number: int) -> Callable[..., Any]:
        return make_sampler(module, scorers.modules, num_responses=number, **sampler)

    prompt_sets = [(data, take(run, stage, f"prompts.{i}")) for i, data in enumerate(stage.prompts)]
    for data, prompts in prompt_sets:
        report_data(f"{stage.name}: {described(data)}", prompts)

    def answer(
        module: LanguageModel, params: Any, number: int, prompts: Examples, batch: PromptBatch, key: jax.Array
    ) -> dict[str, Any]:
        if number == 1:
            out: dict[str, Any] = run.get(respond(module)(params, frozen, run.put(batch), key))
            return out | host_scores(run, scorers.host, prompts, batch.row, out["tokens"], out["length"])
        out = run.get(sample(module, number)(params, scorers.variables, run.put(batch), key))
        out |= scores_of_several(run, scorers.host, prompts, batch.row, out)
        return evaluate.best_responses(out, stage.best_of_cost_limit)

    measure = perplexity_of(run, stage)
    out: dict[str, list[evaluate.Sample]] = {}
    capability: dict[str, dict[str, float]] = {}
    for name in stage.policies:
        module, params = (start, reference) if name == baseline else open_policy(run, name, lora)
        capability[name] = measure(module, params)
        for row, number in rows_of(stage, name).items():
            out[row] = []
            for data, prompts in prompt_sets:
                out[row] += evaluate.collect_samples(
                    functools.partial(answer, module, params, number, prompts),
                    in_order(prompts, run.rows(prompts, stage.batch_size)),
                    prompts,
                    key=jax.random.key(seed),
                    ends=run.ends,
                    decode=run.tokenizer.decode,
                    split="redteam" if data.split == "redteam" else "test",
                    group_field=stage.group_field,
                    oracle=oracle_for(data),
                )
            LOGGER.info(f"{stage.name}: {row}: {len(out[row])} responses")
        del params  # before the next one is opened
    return out, capability


def perplexity_of(run: Run, stage: cfg.EvaluateStage) -> Callable[[LanguageModel, Any], dict[str, float]]:
    """Returns measure(policy, its params): {"perplexity": of demonstrations, by response token}; {} without any."""
    if stage.demonstrations is None:
        return lambda *_: {}
    data = take(run, stage, "demonstrations")
    report_data(f"{stage.name}: {described(stage.demonstrations)}", data)
    evaluate_params = functools.cache(lambda policy: demonstrations_evaluate(run, policy, data))
    return lambda policy, params: {"perplexity": evaluate_params(policy)(params)["perplexity"]}


def open_policy(run: Run, name: str, lora: Lora | None) -> tuple[Any, Any]:
    """Opens a policy for sampling only: the network, and its parameters in the compute dtype.

    An adapter keeps its form. A policy without one is opened as a frozen base in the form of the others, which share
    passes over the base with it and with scorers.
    """
    module, variables = run.networks.read(name, "lm", lora=run.networks.form(name) or lora)
    return module, variables["params"]


def rows_of(stage: cfg.EvaluateStage, policy: str) -> dict[str, int]:
    """Returns {row of the report: responses per prompt} of a policy."""
    number = stage.best_of.get(policy)
    return {policy: 1} | ({f"{policy}, best of {number}": number} if number else {})


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
    oracles = [oracle for data in stage.prompts if (oracle := oracle_for(data))]
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


def provenance_of(run: Run, stage: cfg.EvaluateStage) -> dict[str, str]:
    """Returns the provenance of the prompts, the models, the sampling and the code, as {item: value}."""
    made = {other.name: other for other in run.config.stages}
    models = [("policy", name) for name in stage.policies]
    models += [("reward model", stage.reward_model), ("cost model", stage.cost_model)]
    models += [(f"judge {signal}", model) for signal, model in stage.judges.items()]
    sampling = ("temperature", "top_k", "top_p", "repetition_penalty", "max_prompt_length", "max_response_length")
    return {
        "prompts": "; ".join(described(data) for data in stage.prompts),
        **({"demonstrations": described(stage.demonstrations)} if stage.demonstrations is not None else {}),
        **{f"{kind} pairs": described(data) for kind, data in stage.pairs.items()},
        **{f"{role} {name}": origin(made.get(name)) for role, name in models},
        "sampling": ", ".join(f"{name} {getattr(stage, name)}" for name in sampling),
        "tokenizer": run.config.tokenizer,
        "code": code_version(),
        "machine": machine(),
    }


def origin(stage: cfg.StageBase | None) -> str:
    """Describes the origin of a model: a stage of this run, or elsewhere."""
    if stage is None:
        return "as it is"
    models = [f"{field} {use.reference}" for field, use in stage.models().items()]
    data = [described(use.data) for use in stage.datasets().values() if use.role == "train"]
    return "; ".join([f"{stage.kind} stage", *models, *data])


EVALUATE = Kind(
    cfg.EvaluateStage, run_evaluation, check=lambda run, stage, _: warn_of_judges(run, stage), shows_metrics=False
)
