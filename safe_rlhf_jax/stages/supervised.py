"""Stages that train on records: SFT, reward model, cost model. A `Task` holds their differences."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import objectives, storage
from safe_rlhf_jax.aot.flops import forward_flops, trunk_flops, update_flops
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.evaluation.health import KINDS_OF_PAIRS, annotators_of
from safe_rlhf_jax.loop import TrainLoop, fit
from safe_rlhf_jax.models.adapters import Adapted, LanguageModel, Scorer, bases_of, on, whole
from safe_rlhf_jax.optim import gradient_step
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.common import Run, export, flat, profiled, report_data, weights, writers
from safe_rlhf_jax.stages.datasets import load_data, take
from safe_rlhf_jax.stages.health import warn_of_model
from safe_rlhf_jax.stages.kind import Kind, Training
from safe_rlhf_jax.stages.networks import jit_step, optimizer_of, with_adapters
from safe_rlhf_jax.stages.programs import TOTAL_STEPS, Program, array, one_side, packing, put, random_key, texts
from safe_rlhf_jax.stages.trained import Trained, one_policy, one_scorer
from safe_rlhf_jax.types import (
    Frozen,
    Params,
    PreferenceBatch,
    SafetyBatch,
    SafetyShares,
    SupervisedBatch,
    TrainState,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """The differences between kinds of stages that train on records.

    Attributes:
        head: Of the network.
        step: (stage, module, optimizer) -> step(state, frozen, batch, key).
        evaluator: (run, stage, module, frozen, examples) -> evaluate(state).
        batch: stage -> a batch at its full length, without contents.
        measured: Names of its held-out metrics.
        load: Reads a data set.
        prepare: (run, stage, examples) -> training examples.
        frozen: (run, stage, network, initial variables) -> parameters that no step changes, beside the base.
        networks: (run, stage) -> its network, by name.
        sides: Number of texts of an example.
        frozen_passes: Forward passes of `frozen` in a step.
    """

    head: Literal["lm", "score"]
    step: Callable[..., Callable[..., Any]]
    evaluator: Callable[..., Callable[[TrainState], dict[str, Any]]]
    batch: Callable[[Any], Any]
    measured: tuple[str, ...]
    load: Callable[[Run, Any, str], examples.Examples] = load_data
    prepare: Callable[[Run, Any, examples.Examples], examples.Examples] = lambda run, stage, loaded: loaded
    frozen: Callable[[Run, Any, Any, dict[str, Any]], Any] = lambda *_: None
    networks: Callable[[Run, Any], dict[str, Trained]] = one_policy
    sides: int = 1
    frozen_passes: int = 0


def run_supervised(task: Task, run: Run, stage: Any, folder: storage.Path) -> dict[str, Any]:
    """Runs a stage that trains on records."""

    def examples_of(field: str, name: str) -> examples.Examples:
        loaded = take(run, stage, field, task.load)
        report_data(name, loaded)
        return task.prepare(run, stage, loaded)

    data = examples_of("data", stage.name)
    held_out = examples_of("eval_data", f"{stage.name}: eval_data") if stage.eval_data else None
    total = total_steps(stage, data)
    seed = run.seed(stage)
    module, state, frozen, step = build_supervised(task, run, stage, total)
    no_evaluation: Callable[[TrainState], dict[str, Any]] = lambda _: {}  # noqa: E731
    base = frozen.bases.get(module.base) if isinstance(module, Adapted) else None
    evaluator = task.evaluator(run, stage, module, frozen, held_out) if held_out else no_evaluation

    def evaluate_state(state: TrainState) -> dict[str, Any]:
        return evaluator(dataclasses.replace(state, params=whole(state.params, base)))

    tokens_per_step = stage.batch_size * data.mean_tokens
    flops = supervised_flops(task, run, stage, 1.0)["step"] / full_tokens(task, stage)
    final: TrainState = fit(
        TrainLoop(
            name=stage.name, total_steps=total, init=lambda: state, step=step,
            batch=run.batches(
                data, stage.batch_size, seed, weights(stage.data), stage.group_by_length,
                stage.microbatches if stage.packing else None,
            ),
            frozen=frozen, seed=seed,
            checkpoint_every=stage.checkpoint_every, keep_checkpoints=stage.keep_checkpoints,
            keep_best=stage.keep_best, eval_every=stage.eval_every, patience=stage.patience,
            evaluate=lambda s: flat(evaluate_state(s)), tokens=lambda _: tokens_per_step,
            flops=flops, profile=profiled(stage),
            shown=("train/loss", "train/accuracy", "train/sign_accuracy"),
        ),
        folder, writers=writers(run),
    )  # fmt: skip
    evaluation = evaluate_state(final)
    scores = task.head == "score"
    if scores and evaluation and is_main():
        storage.write(folder / "scores.json", json.dumps(evaluation))
    export(run, stage, folder, module, final, base, stage.export_layout if scores else None)
    result: dict[str, Any] = {"metrics": flat(evaluation)}
    if scores:
        result["health"] = evaluation.get("health")
        warn_of_model(stage.name, result["health"])
    return result


def total_steps(stage: Any, data: examples.Examples) -> int:
    """Returns the steps of training on these examples."""
    return max(int(stage.epochs * len(data)) // stage.batch_size, 1)


def full_tokens(task: Task, stage: Any) -> int:
    """Returns the tokens of a step at their full length."""
    return int(task.sides * stage.batch_size * stage.max_length)


def build_supervised(
    task: Task, run: Run, stage: Any, total_steps: int
) -> tuple[Any, TrainState, Any, Callable[..., Any]]:
    """Opens the networks of a supervised stage.

    Returns:
        The network, its state, the frozen parameters (`Frozen`: DPO's reference, and the base), and the jitted step.
    """
    optimizer = optimizer_of(stage.optimizer, total_steps)
    with run.networks.reading_once():
        (network,) = task.networks(run, stage).values()
        module, variables = network.at_start(run, stage)
        frozen = Frozen(task.frozen(run, stage, module, variables), {}, bases_of((module, variables["params"])))
    state = run.networks.start(module, variables, optimizer)
    return module, state, frozen, jit_supervised(run, stage, task.step, module, optimizer, state)


def jit_supervised(
    run: Run, stage: Any, step_of: Callable[..., Callable[..., Any]], module: Any,
    optimizer: optax.GradientTransformation, state: TrainState,
) -> Callable[..., Any]:  # fmt: skip
    """Returns the jitted step(state, frozen, batch, key) of a network on its base, if it has one."""

    def step(state: TrainState, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        result: tuple[TrainState, dict[str, jax.Array]] = step_of(stage, on(module, frozen.bases, key), optimizer)(
            state, frozen.reference, batch, key
        )
        return result

    return jit_step(step, state, run.mesh)


def sft_step(
    stage: cfg.SFTStage | cfg.RejectionStage, module: LanguageModel, optimizer: optax.GradientTransformation
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


def reward_step(stage: cfg.RewardStage, module: Scorer, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns the step of a reward model."""
    return pairs_step(objectives.reward_loss, stage, module, optimizer)


def cost_step(stage: cfg.CostStage, module: Scorer, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns the step of a cost model."""
    return pairs_step(objectives.cost_loss, stage, module, optimizer, ranking_weight=stage.ranking_weight)


def pairs_step(
    loss_of: Callable[..., Any], stage: cfg.PreferenceStage, module: Scorer,
    optimizer: optax.GradientTransformation, **more: Any,
) -> Callable[..., Any]:  # fmt: skip
    """Returns the step of a model that is trained on pairs by a loss."""
    options = {"token_wise": stage.token_wise, "regularization": stage.regularization} | more

    def step(state: TrainState, frozen: None, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        del frozen, key

        def loss(params: Any, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss_of(module, params, state.stats, part, **options)

        state, metrics = gradient_step(loss, state, batch, optimizer, microbatches=stage.microbatches)
        stats = objectives.update_normalizer(state.stats, metrics.pop("scores"), module.score)
        return dataclasses.replace(state, stats=stats), {f"train/{name}": value for name, value in metrics.items()}

    return step


def sft_evaluate(
    run: Run, stage: cfg.SFTStage, module: LanguageModel, frozen: Frozen, data: examples.Examples
) -> Callable[[TrainState], dict[str, Any]]:
    """Returns evaluate(state): loss in nats per response token, and its perplexity."""
    del stage, frozen
    evaluate_params = demonstrations_evaluate(run, module, data)
    return lambda state: {"metrics": evaluate_params(state.params)}


def demonstrations_evaluate(
    run: Run, module: LanguageModel, data: examples.Examples
) -> Callable[[Params], dict[str, float]]:
    """Returns evaluate(params): loss in nats per response token, and its perplexity."""
    rows = run.rows(data)
    batches = in_order(data, rows)

    @jax.jit
    def sums(params: Any, batch: Any, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        real = batch.loss_mask & (jnp.arange(rows) < valid)[:, None]
        loss, _ = objectives.lm_loss(module, params, batch, real.astype(jnp.float32))
        return loss * rows, real.sum()

    def evaluate_params(params: Params) -> dict[str, float]:
        parts = [run.get(sums(params, run.put(batch), len(valid))) for batch, valid in batches]
        loss = float(sum(part[0] for part in parts) / sum(part[1] for part in parts))
        return {"loss": loss, "perplexity": float(np.exp(np.float64(loss)))}

    return evaluate_params


def pairs_evaluate(
    run: Run, stage: cfg.PreferenceStage, module: Scorer, frozen: Frozen, data: examples.Examples
) -> Callable[[TrainState], dict[str, Any]]:
    """Returns evaluate(state): ranking and sign accuracy, calibration, health and score distributions, held out."""
    del stage, frozen
    batches, score = in_order(data, run.rows(data)), evaluate.make_score(module)

    def evaluate_state(state: TrainState) -> dict[str, Any]:
        variables = {"params": state.params, "stats": state.stats}
        return evaluate.evaluate_pairs(lambda texts: run.get(score(variables, run.put(texts))), batches, data.records)

    return evaluate_state


def supervised_programs(task: Task, run: Run, stage: cfg.SupervisedStage) -> Iterator[Program]:
    """Yields the step of a stage that trains on records, at the full length of its texts."""
    _, state, frozen, step = build_supervised(task, run, stage, TOTAL_STEPS)
    yield Program("step", step, (state, frozen, put(run, task.batch(stage)), random_key()))


def supervised_flops(task: Task, run: Run, stage: cfg.SupervisedStage, again: float) -> dict[str, float]:
    """Returns the FLOPs of a step: a forward pass, a backward pass (counted as two), and passes of frozen networks."""
    rows, logits = task.sides * stage.batch_size, stage.max_length if task.head == "lm" else 0
    config = with_adapters(run.networks.config(stage.init_from), stage.adapters)
    frozen = task.frozen_passes * forward_flops(config, rows, stage.max_length, logits)
    trunk = trunk_flops(config, rows, stage.max_length)
    return {"step": trunk + update_flops(config, rows, stage.max_length, logits, again) + frozen}


def measured_on_held_out(task: Task, run: Run, stage: cfg.SupervisedStage, loaded: Any) -> tuple[str, ...]:
    """Returns the names of the metrics on `eval_data`; those of annotators where its records have several."""
    del run
    held_out = loaded.get(stage.held_out) if task.head == "score" else None
    if held_out is None:
        return task.measured
    label = "safer_response_id" if stage.reads == "cost" else "better_response_id"
    kinds = annotators_of(held_out.records, label, np.ones(len(held_out)))
    return (*task.measured, *(f"accuracy_{kind}" for kind in KINDS_OF_PAIRS if kind in kinds))


def supervised_kind(schema: type[cfg.SupervisedStage], task: Task) -> Kind:
    """Returns the record of a kind of stage that trains on records."""
    training = Training(
        programs=functools.partial(supervised_programs, task),
        flops=functools.partial(supervised_flops, task),
        tokens=functools.partial(full_tokens, task),
        steps=lambda stage, loaded: total_steps(stage, loaded["data"]),
        measured=functools.partial(measured_on_held_out, task),
        networks=task.networks,
    )
    return Kind(schema, functools.partial(run_supervised, task), load=task.load, training=training)


def sft_batch(stage: cfg.SFTStage) -> SupervisedBatch:
    """Returns a batch of demonstrations, without contents."""
    rows, length = stage.batch_size, stage.max_length
    return SupervisedBatch(**texts(rows, length), loss_mask=array(rows, length), packing=packing(stage, rows))


def reward_batch(stage: cfg.RewardStage) -> PreferenceBatch:
    """Returns a batch of preferences, without contents."""
    one, number = one_side(stage.batch_size, stage.max_length), array(stage.batch_size, dtype=jnp.float32)
    share, weight = number if stage.labels == "shares" else None, number if stage.weight_field else None
    return PreferenceBatch(one, one, None, share, weight, packing(stage, 2 * stage.batch_size))


def cost_batch(stage: cfg.CostStage) -> SafetyBatch:
    """Returns a batch of pairs with safety labels, without contents."""
    one, label = one_side(stage.batch_size, stage.max_length), array(stage.batch_size)
    number = array(stage.batch_size, dtype=jnp.float32)
    shares = SafetyShares(number, number, number) if stage.labels == "shares" else None
    weight = number if stage.weight_field else None
    return SafetyBatch(one, one, label, label, shares, weight, packing(stage, 2 * stage.batch_size))


SCORES = ("mean", "std", "accuracy", "calibration_error")
SFT = supervised_kind(cfg.SFTStage, Task("lm", sft_step, sft_evaluate, sft_batch, ("loss", "perplexity")))
REWARD = supervised_kind(
    cfg.RewardStage, Task("score", reward_step, pairs_evaluate, reward_batch, SCORES, networks=one_scorer, sides=2)
)
COST = supervised_kind(
    cfg.CostStage,
    Task("score", cost_step, pairs_evaluate, cost_batch, (*SCORES, "sign_accuracy"), networks=one_scorer, sides=2),
)
