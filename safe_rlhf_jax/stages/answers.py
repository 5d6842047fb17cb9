"""Answers of finished policies to prompts, scored: what stages that assess policies begin with."""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.evaluation.provenance import code_version, machine
from safe_rlhf_jax.inference.best_of_n import make_sampler
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.metrics import ProgressBar, write_jsonl
from safe_rlhf_jax.models.adapters import LanguageModel
from safe_rlhf_jax.models.config import Lora
from safe_rlhf_jax.stages.common import Run, described, report_data
from safe_rlhf_jax.stages.datasets import take
from safe_rlhf_jax.stages.host_signals import Scorers, host_scores, open_scorers
from safe_rlhf_jax.stages.judges import Assessment, judge_signals
from safe_rlhf_jax.stages.partial import keep_batch, kept_batches
from safe_rlhf_jax.stages.sampling import scores_of_several, warn_of_truncation
from safe_rlhf_jax.types import Frozen, PromptBatch

LOGGER = logging.getLogger(__name__)

Measure = Callable[[LanguageModel, Any], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Answered:
    """Samples by row of the report, further numbers by policy, the models that scored, and each prompt in turns."""

    policies: dict[str, list[evaluate.Sample]]
    capability: dict[str, dict[str, float]]
    scorers: Scorers
    conversations: list[Any]


def answer_prompts(run: Run, stage: Assessment, **options: Any) -> Answered:
    """Samples from every policy of a stage and scores the responses; options as in `sample_policies`."""
    lora = next(filter(None, map(run.networks.form, stage.policies)), None)
    with contextlib.nullcontext() if lora is None else run.networks.reading_once():  # one base for all of them
        scorers = open_scorers(run, stage.scorers | judge_signals(stage))
        return sample_policies(run, stage, scorers, lora, **options)


def sample_policies(
    run: Run,
    stage: Assessment,
    scorers: Scorers,
    lora: Lora | None = None,
    *,
    cost_limit: float | None = None,
    measure: Measure = lambda *_: {},
    apart: bool = False,
) -> Answered:
    """Samples from every policy on every set of prompts; batches that a killed run has finished are kept.

    Args:
        run: The run.
        stage: The stage.
        scorers: Its models and judges.
        lora: Form of the policies' adapters, if they have any.
        cost_limit: Of the best of several responses to a prompt, where a policy gives several.
        measure: (policy, its params) -> {name: number}.
        apart: Random numbers of its own for each set of prompts, so that all responses are independent.
    """
    seed = run.config.seed if stage.seed is None else stage.seed
    baseline, *_ = stage.policies
    start, reference = open_policy(run, baseline, lora)
    frozen = Frozen(reference=reference, scorers=scorers.variables)
    sampler: dict[str, Any] = {
        "response_length": stage.max_response_length,
        "eos_id": run.ends,
        "pad_id": run.tokenizer.pad_id,
        "end_id": run.end_id,
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
        return evaluate.best_responses(out, cost_limit)

    folder = run.folder(stage.name) / "sampled"
    attacks = {other.name for other in run.config.stages if isinstance(other, cfg.RedTeamStage)}
    out: dict[str, list[evaluate.Sample]] = {}
    capability: dict[str, dict[str, float]] = {}
    for name in stage.policies:
        module, params = (start, reference) if name == baseline else open_policy(run, name, lora)
        file = folder / f"{len(capability)}.jsonl"
        if not (known := kept_batches(file)):
            known = [measure(module, params)]
            keep_batch(file, known[0])
        (capability[name],) = known
        for row, number in stage.responses(name).items():
            out[row] = []
            for i, (data, prompts) in enumerate(prompt_sets):
                batches = in_order(prompts, run.rows(prompts, stage.batch_size))
                file = folder / f"{len(out)}_{i}.jsonl"
                kept = kept_batches(file)
                bar = ProgressBar(f"{stage.name}: {row}, prompts {i + 1} of {len(prompt_sets)}", len(batches), keys=())
                out[row] += evaluate.collect_samples(
                    functools.partial(answer, module, params, number, prompts),
                    batches,
                    prompts,
                    key=jax.random.fold_in(jax.random.key(seed), i) if apart else jax.random.key(seed),
                    ends=run.ends,
                    decode=run.tokenizer.decode,
                    split="redteam" if data.split == "redteam" or data.maker in attacks else "test",
                    group_field=stage.group_field,
                    oracle=run.oracle(data),
                    kept=kept,
                    keep=functools.partial(keep, file, bar, itertools.count(len(kept) + 1)),
                )
                bar.close()
            warn_of_truncation(run, stage, out[row])
            LOGGER.info(f"{stage.name}: {row}: {len(out[row])} responses")
        del params  # before the next one is opened
    turns = [conversation for _, prompts in prompt_sets for conversation in prompts.turns]
    return Answered(out, capability, scorers, turns)


def keep(file: storage.Path, bar: ProgressBar, number: Iterator[int], batch: evaluate.Batch) -> None:
    """Keeps one more batch of samples, and shows its number."""
    keep_batch(file, batch)
    bar.write(next(number), {})


def open_policy(run: Run, name: str, lora: Lora | None) -> tuple[Any, Any]:
    """Opens a policy for sampling only: the network, and its parameters in the compute dtype.

    An adapter keeps its form. A policy without one is opened as a frozen base in the form of the others, which share
    passes over the base with it and with scorers.
    """
    module, variables = run.networks.read(name, "lm", lora=run.networks.form(name) or lora)
    return module, variables["params"]


def write_samples(folder: storage.Path, policies: Mapping[str, Sequence[evaluate.Sample]]) -> None:
    """Writes `samples.jsonl`, a line for every response."""
    rows = ({"policy": name} | sample for name, samples in policies.items() for sample in samples)
    write_jsonl(folder / "samples.jsonl", rows)


def provenance_of(run: Run, stage: Assessment) -> dict[str, str]:
    """Returns the provenance of the prompts, the models, the sampling and the code, as {item: value}."""
    made = {other.name: other for other in run.config.stages}
    models = [("policy", name) for name in stage.policies]
    models += [(f"{signal} model", model) for signal, model in stage.scorers.items()]
    models += [(f"judge {signal}", model) for signal, model in stage.judges.items()]
    sampling = ("temperature", "top_k", "top_p", "repetition_penalty", "max_prompt_length", "max_response_length")
    return {
        "prompts": "; ".join(described(data) for data in stage.prompts),
        **{field: described(use.data) for field, use in stage.datasets().items() if use.reads != "prompts"},
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
    signals = getattr(stage, "signals", {}).items()
    models += [
        f"signals.{s} {one.model} at {one.base_url}" for s, one in signals if isinstance(one, cfg.EndpointSignal)
    ]
    data = [described(use.data) for use in stage.datasets().values() if use.role == "train"]
    return "; ".join([f"{stage.kind} stage", *models, *data])
