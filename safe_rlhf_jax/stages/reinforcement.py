"""On-policy training: prompts, networks, constraints, one program per iteration."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.evaluation.statistics import summarize
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.loop import Stage, fit
from safe_rlhf_jax.optim import schedule
from safe_rlhf_jax.rl.algorithms import ALGORITHMS, Algorithm
from safe_rlhf_jax.rl.constraints import init_constraint, multiplier_metrics
from safe_rlhf_jax.rl.kl import KL_LOSSES, KLControl, start_reference
from safe_rlhf_jax.rl.rollout import Networks
from safe_rlhf_jax.rl.step import Hyperparameters, collect, learn, make_step
from safe_rlhf_jax.stages.common import (
    Run,
    described,
    export,
    handed_on,
    jit_step,
    only_read,
    open_model,
    optimizer_of,
    oracle_for,
    replicate,
    report_data,
    start_state,
    weights,
    writers,
)
from safe_rlhf_jax.stages.constraints import (
    check_groups,
    compensation_warning,
    constraint_of,
    constraints_of,
    cost_limits,
    initial_multiplier,
)
from safe_rlhf_jax.types import Frozen, MovingReference, PromptBatch, RLState


def run_reinforcement(run: Run, stage: cfg.RLStage, folder: pathlib.Path) -> dict[str, Any]:
    """Runs an RL stage."""
    prompts = load_prompts(run, stage, stage.prompts)
    report_data(stage.name, prompts)
    groups = examples.group_names(prompts.records, stage.group_field)
    limits = {signal: cost_limits(run, stage, signal) for signal in constraints_of(stage)}
    hp = hyperparameters(run, stage, prompts.width, {signal: values for signal, (values, _) in limits.items()}, groups)
    networks, state, frozen = build_networks(run, stage, hp)
    algorithm = ALGORITHMS[stage.algorithm.name]
    step = compile_step(run, stage, networks, algorithm, hp, state)
    seed = run.seed(stage)
    evaluate_policy = make_evaluate(run, stage, networks.policy, networks.scorers, frozen)
    rows = stage.batch_size * stage.responses_per_prompt
    prompt_tokens = prompts.mean_tokens
    final: RLState = fit(
        Stage(
            name=stage.name,
            total_steps=stage.steps,
            init=lambda: state,
            step=step,
            batch=prompt_batches(run, stage, prompts, seed),
            frozen=frozen,
            seed=seed,
            checkpoint_every=stage.checkpoint_every,
            keep_checkpoints=stage.keep_checkpoints,
            keep_best=stage.keep_best,
            eval_every=stage.eval_every,
            evaluate=lambda s: evaluate_policy(s.actor.params),
            tokens=lambda metrics: rows * (prompt_tokens + metrics["train/response_length"]),
            warning=compensation_warning(stage, limits),
            shown=("train/reward", "train/cost", "train/multiplier", "train/kl"),
        ),
        folder,
        writers=writers(run),
    )
    export(run, folder, networks.policy, final.actor)
    result: dict[str, Any] = {"metrics": evaluate_policy(final.actor.params)}
    result["metrics"] |= {k: float(v) for k, v in multiplier_metrics(hp.constraints, final.constraints).items()}
    if "cost" in limits:  # the constraint that the report draws
        (limit, *others), source = limits["cost"]
        result |= {} if others else {"cost_limit": limit, "cost_limit_source": source}
    return result


@handed_on
def load_prompts(run: Run, stage: Any, data: cfg.Mixture) -> examples.Examples:
    """Returns the prompts of a stage."""
    return examples.load_prompts(
        run.records(data),
        run.template,
        run.tokenizer,
        max_length=stage.max_prompt_length,
        where=f"{stage.name}: {described(data)}",
        max_bad=run.config.max_bad_records,
        long_prompts=getattr(stage, "long_prompts", "drop"),
        group_field=stage.group_field,
    )


def prompt_batches(run: Run, stage: cfg.RLStage, prompts: examples.Examples, seed: int) -> Callable[[int], PromptBatch]:
    """Returns batch(step): prompts, with demonstrations for PTX where they are mixed in, on the devices."""
    batches = run.batches(prompts, stage.batch_size, seed, weights(stage.prompts))
    if stage.ptx is None or stage.algorithm.ptx_coeff == 0:
        return batches
    texts = load_ptx(run, stage, stage.ptx)
    report_data(f"{stage.name}: ptx", texts)
    ptx = run.batches(texts, stage.batch_size * stage.responses_per_prompt, seed + 1, weights(stage.ptx))
    return lambda step: batches(step).replace(ptx=ptx(step))


@handed_on
def load_ptx(run: Run, stage: cfg.RLStage, data: cfg.Mixture) -> examples.Examples:
    """Returns the demonstrations that are mixed in."""
    return examples.load_supervised(
        run.records(data),
        run.template,
        run.tokenizer,
        max_length=stage.max_prompt_length + stage.max_response_length,
        where=f"{stage.name}: ptx {described(data)}",
        max_bad=run.config.max_bad_records,
    )


def build_networks(run: Run, stage: cfg.RLStage, hp: Hyperparameters) -> tuple[Networks, RLState, Frozen]:
    """Opens actor, reference, scorers and critics; critics start from their scorers."""
    updates = stage.steps * stage.algorithm.epochs * stage.algorithm.minibatches
    actor_optimizer, critic_optimizer = optimizer_of(stage.actor, updates), optimizer_of(stage.critic, updates)
    algorithm = ALGORITHMS[stage.algorithm.name]
    policy, variables = open_model(run, stage.init_from, "lm", seed=run.seed(stage))
    scorers, scorer_variables, critics, critic_states = {}, {}, {}, {}
    for signal, model in stage.scorers.items():
        kind: Any = signal.partition("/")[0]
        scorers[signal], scorer_variables[signal] = open_model(run, model, "score", score_type=kind)
        if algorithm.baseline is None and signal in hp.signals:
            critics[signal], critic_variables = open_model(run, model, "score", score_type="critic")
            critic_states[signal] = start_state(run, critics[signal], critic_variables, critic_optimizer)

    initial = {signal: initial_multiplier(run, stage.limits[signal]) for signal in hp.constraints}

    def small() -> Any:
        constraints = {
            signal: init_constraint(constraint, multiplier=initial[signal], window=stage.limits[signal].window)
            for signal, constraint in hp.constraints.items()
        }
        return jnp.zeros((), jnp.int32), constraints, None if hp.kl.target is None else jnp.float32(hp.kl_coeff)

    step, constraints, kl_coeff = replicate(run, small)
    actor = start_state(run, policy, variables, actor_optimizer)
    reference = moving_reference(run, actor.params) if hp.kl.moves_reference else None
    state = RLState(
        step=step, actor=actor, critics=critic_states, constraints=constraints, kl_coeff=kl_coeff, reference=reference
    )
    networks = Networks(policy, scorers, critics, actor_optimizer, dict.fromkeys(critics, critic_optimizer))
    scorer_variables = {s: v | {"params": only_read(run, v["params"])} for s, v in scorer_variables.items()}
    return networks, state, Frozen(reference=only_read(run, variables["params"]), scorers=scorer_variables)


def moving_reference(run: Run, params: Any) -> MovingReference:
    """Returns a reference that may move, at the actor's parameters."""
    age = replicate(run, lambda: jnp.zeros((), jnp.float32))
    return MovingReference(params if run.abstract else start_reference(params).params, age)


def kl_control(stage: cfg.RLStage) -> KLControl:
    """Returns how the policy is held near the reference."""
    kl = stage.algorithm.kl
    fixed = kl.schedule == "constant"
    return KLControl(
        loss=KL_LOSSES.get(kl.place),
        schedule=None if fixed else schedule(kl.schedule, lr=1.0, warmup_ratio=0.0, total_steps=stage.steps),
        target=kl.target,
        gain=kl.gain,
        refresh_every=kl.refresh_every,
        average=kl.average,
    )


def hyperparameters(
    run: Run, stage: cfg.RLStage, prompt_length: int, limits: dict[str, tuple[float, ...]], groups: tuple[str, ...]
) -> Hyperparameters:
    """Returns the scalars of an iteration."""
    a = stage.algorithm
    check_groups(stage, groups)
    same = (
        "kl_coeff", "gamma", "gae_lambda", "clip_range_ratio", "clip_range_score", "clip_range_value", "dual_clip",
        "whiten", "entropy_coeff", "missing_eos_penalty", "cost_weight", "ptx_coeff", "epochs", "minibatches",
        "stop_kl", "critic_warmup",
    )  # fmt: skip
    return Hyperparameters(
        prompt_length=prompt_length,
        response_length=stage.max_response_length,
        eos_id=run.ends,
        pad_id=run.tokenizer.pad_id,
        num_responses=stage.responses_per_prompt,
        temperature=stage.temperature,
        recompute_log_probs=a.old_log_probs == "recomputed",
        kl=kl_control(stage),
        microbatches=stage.microbatches,
        constraints={s: constraint_of(stage, stage.limits[s], limit, groups) for s, limit in limits.items()},
        groups=groups,
        **{name: getattr(a, name) for name in same},
    )


def jit_programs(
    run: Run, stage: cfg.RLStage, networks: Networks, algorithm: Algorithm, hp: Hyperparameters, state: RLState
) -> dict[str, Callable[..., Any]]:
    """Returns the jitted programs of an iteration by name: `iteration`, or where `fuse` is off two.

    `iteration`(state, frozen, batch, key), `generation`(actor's params, batch, key),
    `learning`(state, frozen, rollout, ptx, key).
    """
    if stage.fuse:
        return {"iteration": jit_step(make_step(networks, algorithm, hp), state, run.mesh)}

    def generate(params: Any, batch: PromptBatch, key: jax.Array) -> Any:
        return collect(networks, hp, params, batch, key)

    def learn_from(state: RLState, frozen: Frozen, rollout: Any, ptx: Any, key: jax.Array) -> Any:
        return learn(networks, algorithm, hp, state, frozen, rollout, ptx, key)

    return {"generation": jax.jit(generate), "learning": jit_step(learn_from, state, run.mesh)}


def compile_step(
    run: Run, stage: cfg.RLStage, networks: Networks, algorithm: Algorithm, hp: Hyperparameters, state: RLState
) -> Callable[..., Any]:
    """Returns step(state, frozen, batch, key), one program, or two where `fuse` is off."""
    programs = jit_programs(run, stage, networks, algorithm, hp, state)
    if stage.fuse:
        return programs["iteration"]

    def step(state: RLState, frozen: Frozen, batch: PromptBatch, key: jax.Array) -> Any:
        sample_key, learn_key = jax.random.split(key)
        rollout = programs["generation"](state.actor.params, batch, sample_key)
        return programs["learning"](state, frozen, rollout, batch.ptx, learn_key)

    return step


def make_evaluate(
    run: Run, stage: Any, policy: Any, scorers: dict[str, Any], frozen: Frozen
) -> Callable[[Any], dict[str, float]]:
    """Returns evaluate(the policy's params): it answers `eval_prompts`, sampled as in training."""
    if stage.eval_prompts is None:
        return lambda _: {}
    prompts, oracle = load_prompts(run, stage, stage.eval_prompts), oracle_for(stage.eval_prompts)
    report_data(f"{stage.name}: eval_prompts", prompts)
    respond = evaluate.make_respond(
        policy,
        scorers,
        response_length=stage.max_response_length,
        eos_id=run.ends,
        pad_id=run.tokenizer.pad_id,
        sampling=Sampling(temperature=stage.temperature),
    )

    def evaluate_policy(params: Any) -> dict[str, float]:
        samples = evaluate.collect_samples(
            lambda batch, key: run.get(respond(params, frozen, run.put(batch), key)),
            in_order(prompts, run.eval_batch),
            prompts.records,
            key=jax.random.key(run.seed(stage)),
            decode=run.tokenizer.decode,
            split="test",
            group_field=stage.group_field,
            oracle=oracle,
        )
        summary = summarize(samples)
        return {f"eval/{k}": v for k, v in summary.items() if "/" not in k and not k.endswith(("_low", "_high"))}

    return evaluate_policy
