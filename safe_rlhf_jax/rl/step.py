"""One iteration of Safe RLHF: generate → score → estimate advantages → update constraint → update networks.

`collect` is the first verb, `learn` the other four; `make_step` composes them into one function for one `jit`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.objectives import lm_loss, token_weights
from safe_rlhf_jax.ops import masked_mean, response_log_probs, response_values
from safe_rlhf_jax.optim import gradient_step, split
from safe_rlhf_jax.rl.advantages import gae, token_scores
from safe_rlhf_jax.rl.algorithms import KL_SIGN, Algorithm
from safe_rlhf_jax.rl.lagrange import ascend_log_multiplier, push_costs, share_above_zero, window_mean
from safe_rlhf_jax.rl.losses import clip_fraction, clipped_value_loss, explained_variance, policy_ratio
from safe_rlhf_jax.rl.rollout import Networks, score_rollout
from safe_rlhf_jax.types import (
    Experience,
    Frozen,
    LagrangeState,
    Metrics,
    PromptBatch,
    RLState,
    Rollout,
    ScoredRollout,
    Signals,
    SupervisedBatch,
)

DEFAULT_MULTIPLIER_LR = optax.constant_schedule(0.1)


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The scalars of an iteration; names and units as in the config, where their sources stand."""

    prompt_length: int  # S, tokens
    response_length: int  # T, tokens
    eos_id: int
    pad_id: int
    num_responses: int = 1
    temperature: float = 1.0
    recompute_log_probs: bool = True
    kl_coeff: float = 0.01
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range_ratio: float = 0.2
    clip_range_score: float = 50.0
    clip_range_value: float = 5.0
    missing_eos_penalty: float = 0.0
    ptx_coeff: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    microbatches: int = 1
    cost_limit: float = 0.0
    multiplier_lr: optax.Schedule = DEFAULT_MULTIPLIER_LR
    multiplier_every: str = "rollout"  # or "minibatch"
    multiplier_delay: int = 0  # iterations before λ moves
    max_multiplier: float | None = None
    min_multiplier: float | None = None
    groups: tuple[str, ...] = ("all",)  # names of the prompt groups, by index
    constrained: tuple[int, ...] | None = None  # groups the constraint names; None: all


Step = Callable[[RLState, Frozen, PromptBatch, jax.Array], tuple[RLState, Metrics]]


def make_step(networks: Networks, algorithm: Algorithm, hp: Hyperparameters) -> Step:
    """Returns step(state, frozen, batch, key) -> (state, metrics), a pure function."""

    def step(state: RLState, frozen: Frozen, batch: PromptBatch, key: jax.Array) -> tuple[RLState, Metrics]:
        sample_key, learn_key = jax.random.split(key)
        rollout = collect(networks, hp, state.actor.params, batch, sample_key)
        return learn(networks, algorithm, hp, state, frozen, rollout, batch.ptx, learn_key)

    return step


def collect(networks: Networks, hp: Hyperparameters, params: Any, prompts: PromptBatch, key: jax.Array) -> Rollout:
    """Generates: samples `num_responses` responses to each prompt from the actor."""
    return generate(
        networks.policy,
        params,
        prompts,
        key,
        response_length=hp.response_length,
        eos_id=hp.eos_id,
        pad_id=hp.pad_id,
        sampling=Sampling(temperature=hp.temperature),
        num_responses=hp.num_responses,
    )


def learn(
    networks: Networks,
    algorithm: Algorithm,
    hp: Hyperparameters,
    state: RLState,
    frozen: Frozen,
    rollout: Rollout,
    ptx: SupervisedBatch | None,
    key: jax.Array,
) -> tuple[RLState, Metrics]:
    """Scores a rollout, estimates advantages, moves λ, then updates actor and critics."""
    scored = score_rollout(
        networks,
        state,
        frozen,
        rollout,
        prompt_length=hp.prompt_length,
        temperature=hp.temperature,
        recompute_log_probs=hp.recompute_log_probs,
        slices=hp.minibatches * hp.microbatches,
    )
    experience, metrics = estimate_advantages(algorithm, hp, scored)
    state, constraint_metrics = update_constraint(algorithm, hp, state, scored)
    state, update_metrics = update_networks(networks, algorithm, hp, state, experience, ptx, key)
    metrics |= rollout_metrics(hp, scored) | constraint_metrics | update_metrics
    if state.lagrange is not None:
        metrics["multiplier"] = jnp.exp(state.lagrange.log_multiplier)
    return dataclasses.replace(state, step=state.step + 1), {f"train/{name}": value for name, value in metrics.items()}


def response_mask(hp: Hyperparameters, rollout: Rollout) -> jax.Array:
    """Response tokens, bool[B, T]."""
    return rollout.mask[:, hp.prompt_length :]


def constrained_rows(hp: Hyperparameters, rollout: Rollout) -> jax.Array:
    """Sequences whose prompt the constraint names, bool[B]."""
    if hp.constrained is None:
        return jnp.ones_like(rollout.group, dtype=bool)
    return jnp.isin(rollout.group, jnp.asarray(hp.constrained, jnp.int32))


def is_truncated(hp: Hyperparameters, rollout: Rollout) -> jax.Array:
    """Responses without EOS, which ran into the length limit, bool[B]."""
    length = response_mask(hp, rollout).sum(-1)
    response = rollout.tokens[:, hp.prompt_length :]
    return jnp.take_along_axis(response, jnp.maximum(length - 1, 0)[:, None], 1)[:, 0] != hp.eos_id


def estimate_advantages(algorithm: Algorithm, hp: Hyperparameters, scored: ScoredRollout) -> tuple[Experience, Metrics]:
    """Token scores and GAE, once per signal."""
    mask = response_mask(hp, scored.rollout)
    log_ratio = scored.log_probs - scored.ref_log_probs
    advantages: Signals = {}
    returns: Signals = {}
    metrics: Metrics = {}
    # A truncated response is scored as it stands; only its reward may be lowered, its cost never.
    penalties = {"reward": hp.missing_eos_penalty * is_truncated(hp, scored.rollout)}
    for signal in algorithm.signals:
        scores = token_scores(
            scored.scores[signal] - penalties.get(signal, 0.0),
            log_ratio,
            mask,
            kl_coeff=hp.kl_coeff,
            kl_sign=KL_SIGN[signal],
            clip_range_score=hp.clip_range_score,
        )
        advantages[signal], returns[signal] = gae(
            scores, scored.values[signal], mask, gamma=hp.gamma, gae_lambda=hp.gae_lambda
        )
        metrics |= {
            f"{signal}_advantage": masked_mean(advantages[signal], mask),
            f"{signal}_return": masked_mean(returns[signal], mask),
            f"{signal}_value": masked_mean(scored.values[signal], mask),
            f"{signal}_explained_variance": explained_variance(scored.values[signal], returns[signal], mask),
        }
    experience = Experience(
        rollout=scored.rollout,
        log_probs=scored.log_probs,
        values={signal: scored.values[signal] for signal in algorithm.signals},
        advantages=advantages,
        returns=returns,
    )
    return experience, metrics


def update_constraint(
    algorithm: Algorithm, hp: Hyperparameters, state: RLState, scored: ScoredRollout
) -> tuple[RLState, Metrics]:
    """Pushes the rollout's costs into the window and moves λ, before the policy moves."""
    if state.cost_window is None or state.lagrange is None:
        return state, {}
    counted = constrained_rows(hp, scored.rollout)
    window = push_costs(state.cost_window, scored.scores["cost"], counted)
    lagrange = state.lagrange
    if hp.multiplier_every == "rollout":
        lagrange = update_multiplier(hp, lagrange, window_mean(window), state.step)
    return dataclasses.replace(state, cost_window=window, lagrange=lagrange), {"mean_cost": window_mean(window)}


def update_multiplier(
    hp: Hyperparameters, lagrange: LagrangeState, mean_cost: jax.Array, step: jax.Array
) -> LagrangeState:
    """One ascent step on log λ, held for the first `multiplier_delay` iterations and kept above `min_multiplier`."""
    moved = ascend_log_multiplier(
        lagrange.log_multiplier,
        mean_cost,
        cost_limit=hp.cost_limit,
        lr=hp.multiplier_lr(step),
        max_multiplier=hp.max_multiplier,
    )
    if hp.min_multiplier is not None:
        moved = jnp.maximum(moved, jnp.log(jnp.float32(hp.min_multiplier)))
    return LagrangeState(log_multiplier=jnp.where(step >= hp.multiplier_delay, moved, lagrange.log_multiplier))


def update_networks(
    networks: Networks,
    algorithm: Algorithm,
    hp: Hyperparameters,
    state: RLState,
    experience: Experience,
    ptx: SupervisedBatch | None,
    key: jax.Array,
) -> tuple[RLState, Metrics]:
    """PPO: `epochs` passes over the rollout in `minibatches`, each one optimizer step of actor and critics."""
    batch = experience, ptx
    rows = experience.log_probs.shape[0]

    def epoch(state: RLState, key: jax.Array) -> tuple[RLState, Metrics]:
        shuffled = batch
        if hp.minibatches > 1:
            order = jax.random.permutation(key, rows)
            shuffled = jax.tree.map(lambda x: x[order], batch)
        return jax.lax.scan(minibatch, state, split(shuffled, hp.minibatches))

    def minibatch(state: RLState, part: Any) -> tuple[RLState, Metrics]:
        return update_minibatch(networks, algorithm, hp, state, *part)

    state, metrics = jax.lax.scan(epoch, state, jax.random.split(key, hp.epochs))
    # Everything is a mean over the updates, but the ratio's gap, which is that of the very first one.
    first = {"first_ratio_gap": metrics.pop("ratio_gap")[0, 0]}
    return state, jax.tree.map(jnp.mean, metrics) | first


def update_minibatch(
    networks: Networks,
    algorithm: Algorithm,
    hp: Hyperparameters,
    state: RLState,
    experience: Experience,
    ptx: SupervisedBatch | None,
) -> tuple[RLState, Metrics]:
    """One optimizer step of the actor and of each critic."""
    multiplier, lagrange = jnp.float32(0.0), state.lagrange
    if lagrange is not None and state.cost_window is not None:
        if hp.multiplier_every == "minibatch":
            mean_cost = window_mean(state.cost_window)
            lagrange = update_multiplier(hp, lagrange, mean_cost, state.step)
        multiplier = jnp.exp(lagrange.log_multiplier)

    def policy_loss(params: Any, part: tuple[Experience, SupervisedBatch | None, jax.Array]) -> tuple[Any, Metrics]:
        part_experience, part_ptx, part_weights = part
        rollout, mask = part_experience.rollout, response_mask(hp, part_experience.rollout)
        log_probs = response_log_probs(
            networks.policy,
            params,
            rollout.tokens,
            rollout.mask,
            prompt_length=hp.prompt_length,
            temperature=hp.temperature,
        )
        ratio = policy_ratio(log_probs, part_experience.log_probs, mask)
        row_multiplier = jnp.where(constrained_rows(hp, rollout), multiplier, 0.0)[:, None]
        advantages = algorithm.combine(part_experience.advantages, row_multiplier)
        loss = algorithm.policy_loss(ratio, advantages, mask, clip_range_ratio=hp.clip_range_ratio)
        metrics = {
            "actor_loss": loss,
            "advantage": masked_mean(advantages, mask),
            "clip_fraction": clip_fraction(ratio, mask, clip_range_ratio=hp.clip_range_ratio),
            "approx_kl": masked_mean(ratio - 1.0 - jnp.log(ratio), mask),
            "ratio_gap": jnp.abs(ratio - 1.0).max(),
        }
        if part_ptx is not None:
            ptx_loss, _ = lm_loss(networks.policy, params, part_ptx, part_weights)
            loss, metrics["ptx_loss"] = loss + hp.ptx_coeff * ptx_loss, ptx_loss
        return loss, metrics

    def value_loss(signal: str) -> Callable[[Any, Experience], tuple[jax.Array, Metrics]]:
        def loss(params: Any, part: Experience) -> tuple[jax.Array, Metrics]:
            values = response_values(
                networks.critics[signal],
                params,
                part.rollout.tokens,
                part.rollout.mask,
                prompt_length=hp.prompt_length,
            )
            mask = response_mask(hp, part.rollout)
            old_values, returns = part.values[signal], part.returns[signal]
            return clipped_value_loss(values, old_values, returns, mask, clip_range_value=hp.clip_range_value), {}

        return loss

    weights = jnp.zeros_like(experience.log_probs) if ptx is None else token_weights(ptx.loss_mask)
    actor, metrics = gradient_step(
        policy_loss, state.actor, (experience, ptx, weights), networks.actor_optimizer, microbatches=hp.microbatches
    )
    metrics["actor_grad_norm"] = metrics.pop("grad_norm")
    del metrics["loss"]
    critics = {}
    for signal in algorithm.signals:
        critics[signal], critic_metrics = gradient_step(
            value_loss(signal),
            state.critics[signal],
            experience,
            networks.critic_optimizers[signal],
            microbatches=hp.microbatches,
        )
        metrics[f"{signal}_critic_loss"] = critic_metrics["loss"]
        metrics[f"{signal}_critic_grad_norm"] = critic_metrics["grad_norm"]
    return dataclasses.replace(state, actor=actor, critics=critics, lagrange=lagrange), metrics


def rollout_metrics(hp: Hyperparameters, scored: ScoredRollout) -> Metrics:
    """Scores, KL, lengths, and the share of responses with cost above zero by group of prompts."""
    mask = response_mask(hp, scored.rollout)
    length = mask.sum(-1)
    log_ratio = jnp.where(mask, scored.log_probs - scored.ref_log_probs, 0.0)
    metrics = {signal: score.mean() for signal, score in scored.scores.items()}
    metrics |= {
        "kl": log_ratio.sum(-1).mean(),
        "entropy": -masked_mean(scored.log_probs, mask),
        "response_length": length.astype(jnp.float32).mean(),
        "max_response_length": length.astype(jnp.float32).max(),
        "truncation_rate": is_truncated(hp, scored.rollout).mean(),
        "sampler_gap": masked_mean(jnp.abs(scored.log_probs - scored.rollout.sampler_log_probs), mask),
    }
    if "cost" in scored.scores:
        cost, group = scored.scores["cost"], scored.rollout.group
        metrics["unsafe_share"] = share_above_zero(cost, constrained_rows(hp, scored.rollout))
        if len(hp.groups) > 1:
            metrics |= {f"unsafe_share/{name}": share_above_zero(cost, group == i) for i, name in enumerate(hp.groups)}
    return metrics
