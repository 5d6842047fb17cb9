"""PPO and PPO-Lagrangian: prompts, six networks, the constraint, one program per iteration."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.loader import Batches, in_order
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.evaluation.statistics import summarize
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.loop import Stage, fit
from safe_rlhf_jax.optim import schedule
from safe_rlhf_jax.rl.algorithms import ALGORITHMS, Algorithm
from safe_rlhf_jax.rl.lagrange import init_multiplier, init_window
from safe_rlhf_jax.rl.rollout import Networks
from safe_rlhf_jax.rl.step import Hyperparameters, collect, learn, make_step
from safe_rlhf_jax.sharding import replicated
from safe_rlhf_jax.stages.common import (
    Run,
    export,
    jit_step,
    open_model,
    optimizer_of,
    oracle_for,
    report_data,
    start_state,
    writers,
)
from safe_rlhf_jax.types import Frozen, PromptBatch, RLState


def run_reinforcement(run: Run, stage: cfg.RLStage, folder: pathlib.Path) -> dict[str, Any]:
    """Runs an RL stage."""
    prompts = load_prompts(run, stage, stage.prompts)
    report_data(stage.name, prompts)
    groups = examples.group_names(prompts.records, stage.group_field)
    limit, limit_source = cost_limit(run, stage)
    networks, state, frozen = build_networks(run, stage)
    hp = hyperparameters(run, stage, prompts.width, limit, groups)
    algorithm = ALGORITHMS[stage.algorithm.name]
    step = compile_step(run, stage, networks, algorithm, hp, state)
    seed, lagrange = run.seed(stage), stage.algorithm.lagrange
    evaluate_state = make_evaluate(run, stage, networks, frozen, hp, seed)

    def warning(metrics: dict[str, float]) -> str | None:
        share, mean = metrics.get("train/unsafe_share", 0.0), metrics.get("train/mean_cost")
        if not algorithm.constrained or mean is None or mean > limit or share <= lagrange.warn_unsafe_share:
            return None
        return (
            f"the mean cost {mean:.3f} is within the limit {limit:.3f}, yet {share:.0%} of the constrained responses "
            "cost more than 0: very safe responses pay for unsafe ones. Name the prompts the constraint is about "
            "(algorithm.lagrange.constrained_groups), or lower the limit."
        )

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
            eval_every=stage.eval_every,
            evaluate=evaluate_state,
            tokens=lambda metrics: rows * (prompt_tokens + metrics["train/response_length"]),
            warning=warning,
            shown=("train/reward", "train/cost", "train/multiplier", "train/kl"),
        ),
        folder,
        writers=writers(run),
    )
    export(run, folder, networks.policy, final.actor)
    result: dict[str, Any] = {"metrics": evaluate_state(final)}
    if final.lagrange is not None:
        result |= {"cost_limit": limit, "cost_limit_source": limit_source}
        result["metrics"]["multiplier"] = float(jnp.exp(final.lagrange.log_multiplier))
    return result


def load_prompts(run: Run, stage: Any, data: cfg.Data, groups: Any = None) -> examples.Examples:
    """Returns the prompts of a stage."""
    return examples.load_prompts(
        run.records(data),
        run.template,
        run.tokenizer,
        max_length=stage.max_prompt_length,
        where=f"{stage.name}: data {data.name} ({data.split})",
        max_bad=run.config.max_bad_records,
        long_prompts=getattr(stage, "long_prompts", "drop"),
        group_field=stage.group_field,
        groups=groups,
    )


def prompt_batches(run: Run, stage: cfg.RLStage, prompts: examples.Examples, seed: int) -> Callable[[int], PromptBatch]:
    """Returns batch(step): prompts, with demonstrations for PTX where they are mixed in, on the devices."""
    batches = Batches(prompts, batch_size=stage.batch_size, seed=seed)
    if stage.ptx is None or stage.algorithm.ptx_coeff == 0:
        return lambda step: run.put(batches(step))
    texts = examples.load_supervised(
        run.records(stage.ptx),
        run.template,
        run.tokenizer,
        max_length=stage.max_prompt_length + stage.max_response_length,
        where=f"{stage.name}: ptx {stage.ptx.name}",
        max_bad=run.config.max_bad_records,
    )
    report_data(f"{stage.name}: ptx", texts)
    ptx = Batches(texts, batch_size=stage.batch_size * stage.responses_per_prompt, seed=seed + 1)
    return lambda step: run.put(batches(step).replace(ptx=ptx(step)))


def cost_limit(run: Run, stage: cfg.RLStage) -> tuple[float, str]:
    """Returns d and how it was chosen; a limit below what the cost model can reach is refused before training.

    Raises:
        ValueError: For an unreachable limit, naming the floor.
    """
    setting = stage.algorithm.lagrange.cost_limit
    if not ALGORITHMS[stage.algorithm.name].constrained:
        return 0.0, "unused"
    if isinstance(setting, float):
        stage_of_cost = next((s for s in run.config.stages if s.name == stage.cost_model), None)
        data = getattr(stage_of_cost, "eval_data", None)
        if data is not None:
            evaluate.check_reachable(setting, labelled_costs(run, stage, data)["safe"])
        return setting, "as configured"
    costs = labelled_costs(run, stage, setting.data)
    limit = evaluate.calibrated_limit(costs["safe"], costs["unsafe"], setting.margin)
    evaluate.check_reachable(limit, costs["safe"])
    groups = stage.algorithm.lagrange.constrained_groups
    filtered = len(constrained_records(run, stage, setting.data)) < len(run.records(setting.data))
    where = f" to {', '.join(groups)} prompts" if groups and filtered else ""
    source = (
        f"mean cost of {len(costs['safe'])} responses{where} labelled safe, plus {setting.margin:.0%} of the gap to "
        f"the {len(costs['unsafe'])} labelled unsafe, by the cost model"
    )
    print(f"{stage.name}: cost limit {limit:.3f} ({source})")
    return limit, source


def labelled_costs(run: Run, stage: cfg.RLStage, data: cfg.Data) -> dict[str, list[float]]:
    """Returns the cost model's scores of labelled responses, {safe, unsafe}, on prompts the constraint names."""
    pairs = examples.load_pairs(
        constrained_records(run, stage, data),
        run.template,
        run.tokenizer,
        safety=True,
        max_length=stage.max_prompt_length + stage.max_response_length,
        where=f"{stage.name}: cost_limit data {data.name}",
        max_bad=run.config.max_bad_records,
    )
    module, variables = open_model(run, str(stage.cost_model), "score", score_type="cost")
    score = evaluate.make_score(module)
    out = evaluate.evaluate_pairs(lambda texts: score(variables, run.put(texts)), in_order(pairs, run.eval_batch))
    by_label: dict[str, list[float]] = out["scores_by_label"]
    return by_label


def constrained_records(run: Run, stage: cfg.RLStage, data: cfg.Data) -> list[Any]:
    """Returns labelled pairs on prompts that the constraint names; on all prompts where the data knows no groups.

    Raises:
        ConfigError: If no response is labelled safe, or none unsafe.
    """
    records, field = run.records(data), str(stage.group_field)
    groups = stage.algorithm.lagrange.constrained_groups
    if groups and any(field in record for record in records):
        records = [record for record in records if str(record.get(field)) in groups]
    labels = {record.get(f"is_response_{i}_safe") for record in records for i in (0, 1)}
    if not {True, False} <= labels:
        on = f" on {', '.join(groups)} prompts" if groups else ""
        raise cfg.ConfigError(
            f"{stage.name}: algorithm.lagrange.cost_limit: data {data.name} ({data.split}) needs responses labelled "
            f"safe and responses labelled unsafe{on}; is_response_0_safe and is_response_1_safe hold "
            f"{sorted(map(str, labels))}"
        )
    return records


def build_networks(run: Run, stage: cfg.RLStage) -> tuple[Networks, RLState, Frozen]:
    """Opens actor, reference, scorers and critics; critics start from their scorers."""
    updates = stage.steps * stage.algorithm.epochs * stage.algorithm.minibatches
    actor_optimizer, critic_optimizer = optimizer_of(stage.actor, updates), optimizer_of(stage.critic, updates)
    algorithm = ALGORITHMS[stage.algorithm.name]
    policy, variables = open_model(run, stage.init_from, "lm", seed=run.seed(stage))
    models = {"reward": stage.reward_model} | ({"cost": stage.cost_model} if stage.cost_model else {})
    scorers, scorer_variables, critics, critic_states = {}, {}, {}, {}
    for signal, reference in models.items():
        scorers[signal], scorer_variables[signal] = open_model(run, reference, "score", score_type=signal)  # type: ignore[arg-type]
        if signal in algorithm.signals:
            critics[signal], critic_variables = open_model(run, reference, "score", score_type="critic")
            critic_states[signal] = start_state(run, critics[signal], critic_variables, critic_optimizer)
    lagrange = stage.algorithm.lagrange
    window, multiplier = None, None
    if algorithm.constrained:
        start = init_window(lagrange.window), init_multiplier(lagrange.init)
        window, multiplier = jax.device_put(start, replicated(run.mesh))
    state = RLState(
        step=jax.device_put(jnp.zeros((), jnp.int32), replicated(run.mesh)),
        actor=start_state(run, policy, variables, actor_optimizer),
        critics=critic_states,
        cost_window=window,
        lagrange=multiplier,
    )
    networks = Networks(policy, scorers, critics, actor_optimizer, dict.fromkeys(critics, critic_optimizer))
    return networks, state, Frozen(reference=variables["params"], scorers=scorer_variables)


def check_groups(stage: cfg.RLStage, groups: tuple[str, ...]) -> None:
    """The prompts have the groups that the constraint names.

    Raises:
        ConfigError: With the groups there are.
    """
    constrained = ALGORITHMS[stage.algorithm.name].constrained
    named = stage.algorithm.lagrange.constrained_groups if constrained else None
    unknown = [name for name in named or () if name not in groups]
    if unknown:
        raise cfg.ConfigError(
            f"{stage.name}: algorithm.lagrange.constrained_groups names {unknown}, but {stage.group_field!r} of the "
            f"prompts has {list(groups)}"
        )


def hyperparameters(
    run: Run, stage: cfg.RLStage, prompt_length: int, limit: float, groups: tuple[str, ...]
) -> Hyperparameters:
    """Returns the scalars of an iteration."""
    a, lagrange = stage.algorithm, stage.algorithm.lagrange
    names = lagrange.constrained_groups if ALGORITHMS[a.name].constrained else None
    check_groups(stage, groups)
    return Hyperparameters(
        prompt_length=prompt_length,
        response_length=stage.max_response_length,
        eos_id=run.tokenizer.eos_id,
        pad_id=run.tokenizer.pad_id,
        num_responses=stage.responses_per_prompt,
        temperature=stage.temperature,
        recompute_log_probs=a.old_log_probs == "recomputed",
        kl_coeff=a.kl_coeff,
        gamma=a.gamma,
        gae_lambda=a.gae_lambda,
        clip_range_ratio=a.clip_range_ratio,
        clip_range_score=a.clip_range_score,
        clip_range_value=a.clip_range_value,
        missing_eos_penalty=a.missing_eos_penalty,
        ptx_coeff=a.ptx_coeff,
        epochs=a.epochs,
        minibatches=a.minibatches,
        microbatches=stage.microbatches,
        cost_limit=limit,
        multiplier_lr=schedule(lagrange.schedule, lr=lagrange.lr, warmup_ratio=0.0, total_steps=stage.steps),
        multiplier_every=lagrange.every,
        multiplier_delay=lagrange.delay,
        max_multiplier=lagrange.max_multiplier,
        min_multiplier=lagrange.min_multiplier,
        groups=groups,
        constrained=None if names is None else tuple(groups.index(name) for name in names),
    )


def compile_step(
    run: Run, stage: cfg.RLStage, networks: Networks, algorithm: Algorithm, hp: Hyperparameters, state: RLState
) -> Callable[..., Any]:
    """Returns step(state, frozen, batch, key), one program, or two where `fuse` is off."""
    if stage.fuse:
        return jit_step(make_step(networks, algorithm, hp), state, run.mesh)

    @jax.jit
    def generate(params: Any, batch: PromptBatch, key: jax.Array) -> Any:
        return collect(networks, hp, params, batch, key)

    def learn_from(state: RLState, frozen: Frozen, rollout: Any, ptx: Any, key: jax.Array) -> Any:
        return learn(networks, algorithm, hp, state, frozen, rollout, ptx, key)

    update = jit_step(learn_from, state, run.mesh)

    def step(state: RLState, frozen: Frozen, batch: PromptBatch, key: jax.Array) -> Any:
        sample_key, learn_key = jax.random.split(key)
        return update(state, frozen, generate(state.actor.params, batch, sample_key), batch.ptx, learn_key)

    return step


def make_evaluate(
    run: Run, stage: cfg.RLStage, networks: Networks, frozen: Frozen, hp: Hyperparameters, seed: int
) -> Callable[[RLState], dict[str, float]]:
    """Returns evaluate(state): the policy on `eval_prompts`, sampled as in training."""
    if stage.eval_prompts is None:
        return lambda _: {}
    prompts, oracle = load_prompts(run, stage, stage.eval_prompts), oracle_for(stage.eval_prompts)
    respond = evaluate.make_respond(
        networks.policy,
        networks.scorers,
        response_length=hp.response_length,
        eos_id=hp.eos_id,
        pad_id=hp.pad_id,
        sampling=Sampling(temperature=stage.temperature),
    )

    def evaluate_state(state: RLState) -> dict[str, float]:
        samples = evaluate.collect_samples(
            lambda batch, key: respond(state.actor.params, frozen, run.put(batch), key),
            in_order(prompts, run.eval_batch),
            prompts.records,
            key=jax.random.key(seed),
            decode=run.tokenizer.decode,
            split="test",
            group_field=stage.group_field,
            oracle=oracle,
        )
        summary = summarize(samples)
        return {f"eval/{k}": v for k, v in summary.items() if "/" not in k and not k.endswith(("_low", "_high"))}

    return evaluate_state
