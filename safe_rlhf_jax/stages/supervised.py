"""SFT, reward model, cost model."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
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
    open_model,
    optimizer_of,
    report_data,
    start_state,
    weights,
    writers,
)
from safe_rlhf_jax.types import TrainState


@handed_on
def load_examples(run: Run, stage: Any, data: cfg.Mixture) -> examples.Examples:
    """Returns the examples of a supervised stage."""
    shared: dict[str, Any] = {
        "max_length": stage.max_length,
        "where": f"{stage.name}: {described(data)}",
        "max_bad": run.config.max_bad_records,
    }
    records = run.records(data)
    if stage.kind == "sft":
        return examples.load_supervised(records, run.template, run.tokenizer, **shared)
    return examples.load_pairs(records, run.template, run.tokenizer, safety=stage.kind == "cost", **shared)


def run_supervised(run: Run, stage: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Runs an SFT, reward or cost stage."""
    data = load_examples(run, stage, stage.data)
    report_data(stage.name, data)
    total = max(int(stage.epochs * len(data)) // stage.batch_size, 1)
    seed = run.seed(stage)
    module, state, step = build_supervised(run, stage, total)
    held_out = load_examples(run, stage, stage.eval_data) if stage.eval_data else None
    if held_out:
        report_data(f"{stage.name}: eval_data", held_out)
    evaluator = sft_evaluate if stage.kind == "sft" else pairs_evaluate
    evaluate_state = evaluator(run, module, held_out) if held_out else (lambda _: {})
    tokens_per_step = stage.batch_size * data.mean_tokens
    final: TrainState = fit(
        Stage(
            name=stage.name, total_steps=total, init=lambda: state, step=step,
            batch=run.batches(data, stage.batch_size, seed, weights(stage.data)), frozen=None, seed=seed,
            checkpoint_every=stage.checkpoint_every, keep_checkpoints=stage.keep_checkpoints,
            keep_best=stage.keep_best, eval_every=stage.eval_every,
            evaluate=lambda s: flat(evaluate_state(s)), tokens=lambda _: tokens_per_step,
            shown=("train/loss", "train/accuracy", "train/sign_accuracy"),
        ),
        folder, writers=writers(run),
    )  # fmt: skip
    evaluation = evaluate_state(final)
    if stage.kind != "sft" and is_main():
        (folder / "scores.json").write_text(json.dumps(evaluation))
    export(run, folder, module, final, None if stage.kind == "sft" else stage.export_layout)
    return {"metrics": flat(evaluation)}


def build_supervised(run: Run, stage: Any, total_steps: int) -> tuple[Any, TrainState, Callable[..., Any]]:
    """Opens the network of an SFT, reward or cost stage; returns it, its state and the jitted step."""
    optimizer = optimizer_of(stage.optimizer, total_steps)
    score = None
    if stage.kind != "sft":
        other = stage.export_layout == "sequence_classification"  # no bias, score at the last token but for padding
        pad_id = run.tokenizer.pad_id if other else None
        momentum = stage.normalizer_momentum
        score = ScoreConfig(stage.kind, bias=not other, normalize=stage.normalize, momentum=momentum, pad_id=pad_id)
    head: Literal["lm", "score"] = "lm" if stage.kind == "sft" else "score"
    module, variables = open_model(run, stage.init_from, head, score=score, seed=run.seed(stage))
    state = start_state(run, module, variables, optimizer)
    step = (sft_step if stage.kind == "sft" else pairs_step)(stage, module, optimizer)
    return module, state, jit_step(step, state, run.mesh)


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
        return state, {f"train/{name}": value for name, value in metrics.items()}

    return step


def pairs_step(
    stage: cfg.PreferenceStage, module: ScoreModel, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """Returns the step of a reward or cost model."""
    loss_of = objectives.reward_loss if module.score.score_type == "reward" else objectives.cost_loss

    def step(state: TrainState, frozen: None, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        del frozen, key

        def loss(params: Any, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            options: dict[str, Any] = {"token_wise": stage.token_wise, "regularization": stage.regularization}
            return loss_of(module, params, state.stats, part, **options)

        state, metrics = gradient_step(loss, state, batch, optimizer, microbatches=stage.microbatches)
        mean, square = metrics["score_mean"], metrics.pop("score_square")
        stats = objectives.update_normalizer(state.stats, mean, square, 2 * stage.batch_size, module.score)
        return dataclasses.replace(state, stats=stats), {f"train/{name}": value for name, value in metrics.items()}

    return step


def sft_evaluate(run: Run, module: CausalLM, data: examples.Examples) -> Callable[[TrainState], dict[str, Any]]:
    """Returns evaluate(state): loss in nats per response token, and its perplexity."""
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
        return {"metrics": {"loss": loss, "perplexity": float(jnp.exp(loss))}}

    return evaluate_state


def pairs_evaluate(run: Run, module: ScoreModel, data: examples.Examples) -> Callable[[TrainState], dict[str, Any]]:
    """Returns evaluate(state): ranking and sign accuracy, calibration, and score distributions on held-out pairs."""
    batches, score = in_order(data, run.eval_batch), evaluate.make_score(module)

    def evaluate_state(state: TrainState) -> dict[str, Any]:
        variables = {"params": state.params, "stats": state.stats}
        return evaluate.evaluate_pairs(lambda texts: run.get(score(variables, run.put(texts))), batches)

    return evaluate_state
