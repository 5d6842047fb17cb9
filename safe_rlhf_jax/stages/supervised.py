"""Stages that train on records: SFT, reward model, cost model, DPO. `TASKS` holds what tells them apart."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import objectives
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.loop import Stage, fit
from safe_rlhf_jax.models.config import ScoreConfig
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.optim import gradient_step
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.common import (
    Run,
    described,
    export,
    flat,
    handed_on,
    jit_step,
    only_read,
    open_model,
    optimizer_of,
    report_data,
    start_state,
    weights,
    writers,
)
from safe_rlhf_jax.stages.direct import direct_evaluate, direct_step, load_direct, rank_by_models
from safe_rlhf_jax.stages.health import warn_of_model
from safe_rlhf_jax.types import TrainState


@handed_on
def load_examples(run: Run, stage: Any, data: cfg.Mixture) -> examples.Examples:
    """Returns the examples of a supervised stage."""
    shared: dict[str, Any] = {
        "max_length": stage.max_length,
        "where": f"{stage.name}: {described(data)}",
        "max_bad": run.config.max_bad_records,
    }
    return TASKS[stage.kind].load(run, stage, data, shared)


def ready_examples(run: Run, stage: Any, name: str, data: cfg.Mixture) -> examples.Examples:
    """Returns the examples of a data set as they are trained on, and says under `name` what was left out."""
    loaded = load_examples(run, stage, data)
    report_data(name, loaded)
    if stage.kind == "dpo" and stage.preference == "lagrangian":
        return rank_by_models(run, stage, loaded)
    return loaded


def run_supervised(run: Run, stage: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Runs an SFT, reward, cost or DPO stage."""
    data = ready_examples(run, stage, stage.name, stage.data)
    held_out = ready_examples(run, stage, f"{stage.name}: eval_data", stage.eval_data) if stage.eval_data else None
    total = max(int(stage.epochs * len(data)) // stage.batch_size, 1)
    seed = run.seed(stage)
    module, state, frozen, step = build_supervised(run, stage, total)
    no_evaluation: Callable[[TrainState], dict[str, Any]] = lambda _: {}  # noqa: E731
    evaluator = TASKS[stage.kind].evaluator
    evaluate_state = evaluator(run, stage, module, frozen, held_out) if held_out else no_evaluation
    tokens_per_step = stage.batch_size * data.mean_tokens
    final: TrainState = fit(
        Stage(
            name=stage.name, total_steps=total, init=lambda: state, step=step,
            batch=run.batches(data, stage.batch_size, seed, weights(stage.data)), frozen=frozen, seed=seed,
            checkpoint_every=stage.checkpoint_every, keep_checkpoints=stage.keep_checkpoints,
            keep_best=stage.keep_best, eval_every=stage.eval_every,
            evaluate=lambda s: flat(evaluate_state(s)), tokens=lambda _: tokens_per_step,
            shown=("train/loss", "train/accuracy", "train/sign_accuracy"),
        ),
        folder, writers=writers(run),
    )  # fmt: skip
    evaluation = evaluate_state(final)
    scores = TASKS[stage.kind].head == "score"
    if scores and evaluation and is_main():
        (folder / "scores.json").write_text(json.dumps(evaluation))
    export(run, folder, module, final, stage.export_layout if scores else None)
    result: dict[str, Any] = {"metrics": flat(evaluation)}
    if scores:
        result["health"] = evaluation.get("health")
        warn_of_model(stage.name, result["health"])
    return result


def build_supervised(run: Run, stage: Any, total_steps: int) -> tuple[Any, TrainState, Any, Callable[..., Any]]:
    """Opens the networks of a supervised stage.

    Returns:
        The network, its state, parameters that no step changes (None but for DPO's reference), and the jitted step.
    """
    task, optimizer, score = TASKS[stage.kind], optimizer_of(stage.optimizer, total_steps), None
    if task.head == "score":
        other = stage.export_layout == "sequence_classification"  # no bias, score at the last token but for padding
        pad_id = run.tokenizer.pad_id if other else None
        momentum = stage.normalizer_momentum
        score = ScoreConfig(stage.kind, bias=not other, normalize=stage.normalize, momentum=momentum, pad_id=pad_id)
    module, variables = open_model(run, stage.init_from, task.head, score=score, seed=run.seed(stage))
    state = start_state(run, module, variables, optimizer)
    frozen = None
    if stage.kind == "dpo":
        other_reference = stage.reference not in (None, stage.init_from)
        reference = open_model(run, stage.reference, "lm")[1] if other_reference else variables
        frozen = only_read(run, reference["params"])
    return module, state, frozen, jit_step(task.step(stage, module, optimizer), state, run.mesh)


def sft_step(
    stage: cfg.SFTStage | cfg.RejectionStage, module: CausalLM, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """Returns the step of fine-tuning on texts."""

    def step(state: TrainState, frozen: None, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        del frozen, key
        rows = batch, objectives.token_weights(batch.loss_mask)
        state, metrics = gradient_step(
            lambda params, part: objectives.lm_loss(module, params, *part), state, rows, optimizer,
            microbatches=stage.microbatches,
        )  # fmt: skip
        metrics["perplexity"] = jnp.exp(metrics["loss"])
        return state, {f"train/{name}": value for name, value in metrics.items()}

    return step


def pairs_step(
    stage: cfg.PreferenceStage, module: ScoreModel, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """Returns the step of a reward or cost model."""
    options: dict[str, Any] = {"token_wise": stage.token_wise, "regularization": stage.regularization}
    loss_of: Callable[..., Any] = objectives.reward_loss
    if isinstance(stage, cfg.CostStage):
        loss_of, options = objectives.cost_loss, options | {"ranking_weight": stage.ranking_weight}

    def step(state: TrainState, frozen: None, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        del frozen, key

        def loss(params: Any, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss_of(module, params, state.stats, part, **options)

        state, metrics = gradient_step(loss, state, batch, optimizer, microbatches=stage.microbatches)
        stats = objectives.update_normalizer(state.stats, metrics.pop("scores"), module.score)
        return dataclasses.replace(state, stats=stats), {f"train/{name}": value for name, value in metrics.items()}

    return step


def sft_evaluate(
    run: Run, stage: cfg.SFTStage, module: CausalLM, frozen: None, data: examples.Examples
) -> Callable[[TrainState], dict[str, Any]]:
    """Returns evaluate(state): loss in nats per response token, and its perplexity."""
    del stage, frozen
    rows = run.eval_batch
    batches = in_order(data, rows)

    @jax.jit
    def sums(params: Any, batch: Any, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        real = batch.loss_mask & (jnp.arange(rows) < valid)[:, None]
        loss, _ = objectives.lm_loss(module, params, batch, real.astype(jnp.float32))
        return loss * rows, real.sum()

    def evaluate_state(state: TrainState) -> dict[str, Any]:
        parts = [run.get(sums(state.params, run.put(batch), valid)) for batch, valid in batches]
        loss = float(sum(part[0] for part in parts) / sum(part[1] for part in parts))
        return {"metrics": {"loss": loss, "perplexity": float(np.exp(np.float64(loss)))}}

    return evaluate_state


def pairs_evaluate(
    run: Run, stage: cfg.PreferenceStage, module: ScoreModel, frozen: None, data: examples.Examples
) -> Callable[[TrainState], dict[str, Any]]:
    """Returns evaluate(state): ranking and sign accuracy, calibration, health and score distributions, held out."""
    del stage, frozen
    batches, score = in_order(data, run.eval_batch), evaluate.make_score(module)

    def evaluate_state(state: TrainState) -> dict[str, Any]:
        variables = {"params": state.params, "stats": state.stats}
        return evaluate.evaluate_pairs(lambda texts: run.get(score(variables, run.put(texts))), batches, data.records)

    return evaluate_state


def load_sft(run: Run, stage: cfg.SFTStage, data: cfg.Mixture, shared: dict[str, Any]) -> examples.Examples:
    """Returns the demonstrations of an SFT stage."""
    return examples.load_supervised(run.records(data), run.template, run.tokenizer, **shared)


def load_scored(run: Run, stage: cfg.PreferenceStage, data: cfg.Mixture, shared: dict[str, Any]) -> examples.Examples:
    """Returns the pairs of a reward or cost stage."""
    safety = isinstance(stage, cfg.CostStage)
    return examples.load_pairs(run.records(data), run.template, run.tokenizer, safety=safety, **shared)


@dataclasses.dataclass(frozen=True)
class Task:
    """What tells one kind of supervised stage from another."""

    head: Literal["lm", "score"]
    load: Callable[..., examples.Examples]  # (run, stage, data, options) -> examples
    step: Callable[..., Callable[..., Any]]  # (stage, module, optimizer) -> step(state, frozen, batch, key)
    evaluator: Callable[..., Callable[[TrainState], dict[str, Any]]]  # (run, stage, module, frozen, examples)


TASKS = {
    "sft": Task("lm", load_sft, sft_step, sft_evaluate),
    "reward": Task("score", load_scored, pairs_step, pairs_evaluate),
    "cost": Task("score", load_scored, pairs_step, pairs_evaluate),
    "dpo": Task("lm", load_direct, direct_step, direct_evaluate),
}
