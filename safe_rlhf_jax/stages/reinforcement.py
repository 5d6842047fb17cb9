"""On-policy training: prompts, networks, constraints, one program per iteration."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.aot.floors import iteration_reads
from safe_rlhf_jax.aot.flops import iteration_flops
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.evaluation.judges import add_averages, reward_units
from safe_rlhf_jax.evaluation.statistics import summarize
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.loop import TrainLoop, fit
from safe_rlhf_jax.models.adapters import Adapted, bases_of, trained, whole
from safe_rlhf_jax.optim import schedule
from safe_rlhf_jax.rl.algorithms import ALGORITHMS, Algorithm
from safe_rlhf_jax.rl.constraints import init_constraint, multiplier_metrics
from safe_rlhf_jax.rl.kl import KL_LOSSES, KLControl
from safe_rlhf_jax.rl.rollout import Networks
from safe_rlhf_jax.rl.step import Hyperparameters, collect, learn, make_step
from safe_rlhf_jax.stages.algorithm import check_rl, idle_beside_algorithm
from safe_rlhf_jax.stages.asked import open_signals
from safe_rlhf_jax.stages.common import Run, export, profiled, report_data, weights, writers
from safe_rlhf_jax.stages.constraints import (
    check_groups,
    compensation_warning,
    constraint_of,
    constraints_of,
    cost_limits,
    initial_multiplier,
)
from safe_rlhf_jax.stages.datasets import take
from safe_rlhf_jax.stages.host_signals import HostSignal, Scorers, given_scores, host_scores, open_scorers
from safe_rlhf_jax.stages.judges import judge_signals
from safe_rlhf_jax.stages.kind import Kind, Training
from safe_rlhf_jax.stages.networks import jit_step, optimizer_of, with_adapters
from safe_rlhf_jax.stages.programs import PHASES, Program, array, put, random_key, texts
from safe_rlhf_jax.stages.sampling import warn_of_truncation
from safe_rlhf_jax.stages.trained import critic_starts, policy_and_critics
from safe_rlhf_jax.types import (
    Frozen,
    MovingReference,
    Params,
    PromptBatch,
    RLState,
    Rollout,
    Signals,
    SupervisedBatch,
)


def run_reinforcement(run: Run, stage: cfg.RLStage, folder: storage.Path) -> dict[str, Any]:
    """Runs an RL stage."""
    prompts = take(run, stage, "prompts")
    report_data(stage.name, prompts)
    groups = examples.group_names(prompts.records, stage.group_field)
    asked = open_signals(run, stage, folder)
    limits = {signal: cost_limits(run, stage, signal, asked) for signal in constraints_of(stage)}
    hp = hyperparameters(run, stage, {signal: values for signal, (values, _) in limits.items()}, groups)
    with run.networks.reading_once():
        networks, state, frozen, host = build_networks(run, stage, hp)
        host |= asked
        judges = open_scorers(run, judge_signals(stage))  # for evaluations; no step sees them
    algorithm = ALGORITHMS[stage.algorithm.name]
    step = compile_step(run, stage, networks, algorithm, hp, state, given_scores(run, host, prompts, hp.num_responses))
    seed = run.seed(stage)
    base = frozen.bases.get(networks.policy.base) if isinstance(networks.policy, Adapted) else None
    readable = on_bases(networks, frozen)
    scorers = Scorers(networks.scorers, readable.scorers, host) | judges
    evaluate_policy = make_evaluate(run, stage, networks.policy, readable.reference, scorers)
    start = evaluate_policy(whole(state.actor.params, base)) if stage.judges else {}
    prompt_tokens = prompts.mean_tokens
    final: RLState = fit(
        TrainLoop(
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
            patience=stage.patience,
            evaluate=lambda s: evaluate_policy(whole(s.actor.params, base)),
            tokens=lambda metrics: stage.rows * (prompt_tokens + metrics["train/response_length"]),
            warning=compensation_warning(stage, limits),
            shown=("train/reward", "train/cost", "train/multiplier", "train/kl"),
            flops=sum(reinforcement_flops(run, stage, 1.0).values()) / full_tokens(stage),
            profile=profiled(stage),
            phases=PHASES["iteration"] if is_fused(stage, networks) else (),
        ),
        folder,
        writers=writers(run),
    )
    export(run, stage, folder, networks.policy, final.actor, base)
    result: dict[str, Any] = {"metrics": evaluate_policy(whole(final.actor.params, base))}
    result |= {"start": start} if start else {}
    result["metrics"] |= {k: float(v) for k, v in multiplier_metrics(hp.constraints, final.constraints).items()}
    if "cost" in limits:  # the constraint drawn in the report
        (limit, *others), source = limits["cost"]
        result |= {} if others else {"cost_limit": limit, "cost_limit_source": source}
    return result


def full_tokens(stage: cfg.RLStage) -> int:
    """Returns the tokens of a step at their full lengths."""
    return stage.rows * (stage.max_prompt_length + stage.max_response_length)


def prompt_batches(run: Run, stage: cfg.RLStage, prompts: examples.Examples, seed: int) -> Callable[[int], PromptBatch]:
    """Returns batch(step): prompts on the devices, with demonstrations for PTX if configured."""
    batches = run.batches(prompts, stage.batch_size, seed, weights(stage.prompts))
    if stage.ptx is None or stage.algorithm.ptx_coeff == 0:
        return batches
    demonstrations = take(run, stage, "ptx")
    report_data(f"{stage.name}: ptx", demonstrations)
    ptx = run.batches(demonstrations, stage.rows, seed + 1, weights(stage.ptx))
    return lambda step: batches(step).replace(ptx=ptx(step))


def build_networks(
    run: Run, stage: cfg.RLStage, hp: Hyperparameters
) -> tuple[Networks, RLState, Frozen, dict[str, HostSignal]]:
    """Opens actor, reference, scorers and critics."""
    updates = stage.steps * stage.algorithm.epochs * stage.algorithm.minibatches
    actor_optimizer, critic_optimizer = optimizer_of(stage.actor, updates), optimizer_of(stage.critic, updates)
    critics, critic_states = {}, {}
    opened: list[tuple[Any, Params]] = []
    with run.networks.reading_once():
        policy, variables = run.networks.to_train(stage, stage.init_from, "lm")
        scorers = open_scorers(run, stage.scorers, stage.adapters)
        for signal, start in critic_starts(run, stage).items():
            critics[signal], begin = run.networks.to_train(stage, start, "score", score_type="critic")
            critic_states[signal] = run.networks.start(critics[signal], begin, critic_optimizer)
            opened.append((critics[signal], begin["params"]))
    opened += [(module, scorers.variables[signal]["params"]) for signal, module in scorers.modules.items()]
    bases = bases_of((policy, variables["params"]), *opened)

    initial = {signal: initial_multiplier(run, stage.limits[signal]) for signal in hp.constraints}

    def small() -> Any:
        constraints = {
            signal: init_constraint(constraint, multiplier=initial[signal], window=stage.limits[signal].window)
            for signal, constraint in hp.constraints.items()
        }
        return jnp.zeros((), jnp.int32), constraints, None if hp.kl.target is None else jnp.float32(hp.kl_coeff)

    step, constraints, kl_coeff = run.networks.everywhere(small)
    actor = run.networks.start(policy, variables, actor_optimizer)
    reference = moving_reference(run, actor.params) if hp.kl.moves_reference else None
    state = RLState(
        step=step, actor=actor, critics=critic_states, constraints=constraints, kl_coeff=kl_coeff, reference=reference
    )
    networks = Networks(policy, scorers.modules, critics, actor_optimizer, dict.fromkeys(critics, critic_optimizer))
    read = {s: v | {"params": trained(v["params"])} for s, v in scorers.variables.items()}
    frozen = Frozen(run.networks.reference_of(stage, policy, variables["params"]), read, bases)
    return networks, state, frozen, scorers.host


def on_bases(networks: Networks, frozen: Frozen) -> Frozen:
    """Returns the frozen parameters each with its base, for programs that evaluate."""

    def with_base(module: Any, params: Params) -> Params:
        return whole(params, frozen.bases[module.base]) if isinstance(module, Adapted) else params

    scorers = {
        signal: variables | {"params": with_base(networks.scorers[signal], variables["params"])}
        for signal, variables in frozen.scorers.items()
    }
    return Frozen(with_base(networks.policy, frozen.reference), scorers)


def moving_reference(run: Run, params: Any) -> MovingReference:
    """Returns a moving reference, initialised from the actor."""
    age = run.networks.everywhere(lambda: jnp.zeros((), jnp.float32))
    return MovingReference(run.networks.reference(params), age)


def kl_control(stage: cfg.RLStage) -> KLControl:
    """Returns the KL settings of a stage."""
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
    run: Run, stage: cfg.RLStage, limits: dict[str, tuple[float, ...]], groups: tuple[str, ...]
) -> Hyperparameters:
    """Returns the scalars of an iteration."""
    a = stage.algorithm
    check_groups(stage, groups)
    same = (
        "kl_coeff", "gamma", "gae_lambda", "clip_range_ratio", "clip_range_score", "clip_range_value", "dual_clip",
        "whiten", "entropy_coeff", "missing_eos_penalty", "cost_weight", "ptx_coeff", "epochs", "minibatches",
        "stop_kl", "critic_warmup", "max_sampler_weight",
    )  # fmt: skip
    return Hyperparameters(
        response_length=stage.max_response_length,
        eos_id=run.ends,
        pad_id=run.tokenizer.pad_id,
        end_id=run.end_id,
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
    """Returns the jitted programs of an iteration by name: `iteration`, or two if it is not `is_fused`.

    `iteration`(state, frozen, batch, key), `generation`(actor's params, bases, batch, key),
    `learning`(state, frozen, rollout, ptx, key, given scores).
    """
    if is_fused(stage, networks):
        return {"iteration": jit_step(make_step(networks, algorithm, hp), state, run.mesh)}

    def generate(params: Any, bases: Any, batch: PromptBatch, key: jax.Array) -> Any:
        return collect(networks.on(bases), hp, params, batch, key)

    def learn_from(state: RLState, frozen: Frozen, rollout: Any, ptx: Any, key: jax.Array, given: Signals) -> Any:
        return learn(networks, algorithm, hp, state, frozen, rollout, ptx, key, given)

    return {"generation": jax.jit(generate), "learning": jit_step(learn_from, state, run.mesh)}


def is_fused(stage: cfg.RLStage, networks: Networks) -> bool:
    """Says whether an iteration is one program: `fuse` is set and every signal is computed on the devices."""
    return stage.fuse and networks.scorers.keys() == set(stage.scored)


def compile_step(
    run: Run, stage: cfg.RLStage, networks: Networks, algorithm: Algorithm, hp: Hyperparameters, state: RLState,
    given: Callable[[Rollout, PromptBatch], Signals] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Returns step(state, frozen, batch, key): one program, or two with the scores that are `given` between them."""
    programs = jit_programs(run, stage, networks, algorithm, hp, state)
    if is_fused(stage, networks):
        return programs["iteration"]

    def step(state: RLState, frozen: Frozen, batch: PromptBatch, key: jax.Array) -> Any:
        sample_key, learn_key = jax.random.split(key)
        rollout = programs["generation"](state.actor.params, frozen.bases, batch, sample_key)
        scores = {} if given is None else given(rollout, batch)
        return programs["learning"](state, frozen, rollout, batch.ptx, learn_key, scores)

    return step


def make_evaluate(
    run: Run, stage: cfg.RLStage | cfg.RejectionStage, policy: Any, reference: Any, scorers: Scorers
) -> Callable[[Any], dict[str, float]]:
    """Returns evaluate(policy's params): metrics of responses to `eval_prompts`, sampled as in training.

    Rewards of judges are in standard deviations over the responses of the first call, on the policy of the start.
    """
    if stage.eval_prompts is None:
        return lambda _: {}
    prompts, oracle = take(run, stage, "eval_prompts"), run.oracle(stage.eval_prompts)
    report_data(f"{stage.name}: eval_prompts", prompts)
    respond = evaluate.make_respond(
        policy, scorers.modules, reference=policy, response_length=stage.max_response_length, eos_id=run.ends,
        pad_id=run.tokenizer.pad_id, sampling=Sampling(temperature=stage.temperature), end_id=run.end_id,
    )  # fmt: skip

    frozen, units = Frozen(reference=reference, scorers=scorers.variables), dict[str, float]()

    def answer(params: Any, batch: PromptBatch, key: jax.Array) -> dict[str, Any]:
        out: dict[str, Any] = run.get(respond(params, frozen, run.put(batch), key))
        return out | host_scores(run, scorers.host, prompts, batch.row, out["tokens"], out["length"])

    def evaluate_policy(params: Any) -> dict[str, float]:
        samples = evaluate.collect_samples(
            functools.partial(answer, params),
            in_order(prompts, run.rows(prompts)),
            prompts,
            key=jax.random.key(run.seed(stage)),
            ends=run.ends,
            decode=run.tokenizer.decode,
            split="test",
            group_field=stage.group_field,
            oracle=oracle,
        )
        warn_of_truncation(run, stage, samples)
        units.update(units or reward_units(samples))
        add_averages(samples, units)
        return {f"eval/{name}": value for name, value in curves(summarize(samples)).items()}

    return evaluate_policy


def curves(summary: Mapping[str, float]) -> dict[str, float]:
    """Returns the numbers of a summary to follow along training: no intervals, and no parts but the named costs."""
    whole = {name: value for name, value in summary.items() if not name.endswith(("_low", "_high"))}
    named = ("cost_mean/", "unsafe_share/")
    return {name: value for name, value in whole.items() if "/" not in name or name.startswith(named)}


def measured_on_prompts(
    run: Run, stage: cfg.RLStage | cfg.RejectionStage, loaded: Mapping[str, examples.Examples]
) -> set[str]:
    """Returns the names of the metrics on `eval_prompts`, from an empty response to every prompt."""
    prompts, (data,) = loaded["eval_prompts"], cfg.parts_of(stage.eval_prompts)

    def respond(batch: Any, key: jax.Array) -> dict[str, Any]:
        del key
        rows = len(batch.tokens)
        numbers = ("kl", *getattr(stage, "scored", stage.scorers), *judge_signals(stage))
        return {"tokens": batch.tokens, "length": np.zeros(rows)} | dict.fromkeys(numbers, np.zeros(rows))

    samples = evaluate.collect_samples(
        respond, in_order(prompts, run.rows(prompts)), prompts, key=jax.random.key(0), ends=(), decode=lambda _: "",
        split="test", group_field=stage.group_field, oracle=run.oracle(data),
    )  # fmt: skip
    add_averages(samples, reward_units(samples))
    return set(curves(summarize(samples)))


def reinforcement_programs(run: Run, stage: cfg.RLStage) -> Iterator[Program]:
    """Yields the program, or with `fuse: false` the two programs, of an iteration."""
    limits = {signal: (0.0,) * len(one.group_limits or [0]) for signal, one in constraints_of(stage).items()}
    groups = tuple(sorted({name for one in constraints_of(stage).values() for name in one.named or ()})) or ("all",)
    hp = hyperparameters(run, stage, limits, groups)
    networks, state, frozen, _ = build_networks(run, stage, hp)
    jitted = jit_programs(run, stage, networks, ALGORITHMS[stage.algorithm.name], hp, state)
    rows, length = stage.rows, stage.max_prompt_length + hp.response_length
    ptx = None
    if stage.ptx is not None and stage.algorithm.ptx_coeff > 0:
        ptx = SupervisedBatch(**texts(rows, length), loss_mask=array(rows, length))
    group = array(stage.batch_size, dtype=jnp.int32)
    batch = put(run, PromptBatch(**texts(stage.batch_size, stage.max_prompt_length), group=group, row=group, ptx=ptx))
    key = random_key()
    reads = iteration_reads(networks.policy, hp, state, frozen, rows, stage.max_prompt_length, run.mesh.shape)
    if is_fused(stage, networks):
        yield Program("iteration", jitted["iteration"], (state, frozen, batch, key), reads)
        return
    generation = Program("generation", jitted["generation"], (state.actor.params, frozen.bases, batch, key), reads)
    yield generation
    rollout = put(run, jax.eval_shape(generation.function, *generation.arguments))
    given = {signal: put(run, array(rows, dtype=jnp.float32)) for signal in set(stage.scored) - networks.scorers.keys()}
    yield Program("learning", jitted["learning"], (state, frozen, rollout, batch.ptx, key, given), reads)


def reinforcement_flops(run: Run, stage: cfg.RLStage, again: float) -> dict[str, float]:
    """Returns the FLOPs of an iteration, by phase."""
    algorithm = ALGORITHMS[stage.algorithm.name]
    return iteration_flops(
        with_adapters(run.networks.config(stage.init_from), stage.adapters),
        stage.rows,
        stage.max_prompt_length,
        stage.max_response_length,
        stage.algorithm.old_log_probs == "recomputed",
        critics=0 if algorithm.baseline else 1 + len(constraints_of(stage)),
        scorers=len(stage.scorers),
        epochs=stage.algorithm.epochs,
        ptx=stage.ptx is not None and stage.algorithm.ptx_coeff > 0,
        again=again,
    )


RL = Kind(
    cfg.RLStage,
    run_reinforcement,
    check=check_rl,
    idle=idle_beside_algorithm,
    training=Training(
        reinforcement_programs,
        reinforcement_flops,
        tokens=full_tokens,
        steps=lambda stage, _: stage.steps,
        measured=measured_on_prompts,
        networks=policy_and_critics,
        groups=lambda stage, loaded: examples.group_names(loaded["prompts"].records, stage.group_field),
    ),
)
