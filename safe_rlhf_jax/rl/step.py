"""One iteration of Safe RLHF: generate → score → update constraints → estimate advantages → update networks.

`collect` is the first verb, `learn` the other four; `make_step` composes them into one function for one `jit`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.ops import ends_with, masked_mean
from safe_rlhf_jax.rl.advantages import gae, sequence_advantages, token_scores
from safe_rlhf_jax.rl.algorithms import Algorithm
from safe_rlhf_jax.rl.constraints import (
    mean_costs,
    measured_costs,
    move_multiplier,
    multiplier_metrics,
    named_rows,
    pessimistic_costs,
    push_all,
    slot_metrics,
)
from safe_rlhf_jax.rl.hyperparameters import Hyperparameters as Hyperparameters
from safe_rlhf_jax.rl.kl import adapt, move_reference
from safe_rlhf_jax.rl.lagrange import share_above_zero
from safe_rlhf_jax.rl.losses import explained_variance
from safe_rlhf_jax.rl.rollout import Networks, score_rollout
from safe_rlhf_jax.rl.update import kl_coefficient, response_mask, update_networks
from safe_rlhf_jax.types import (
    Experience,
    Frozen,
    Metrics,
    PromptBatch,
    RLState,
    Rollout,
    ScoredRollout,
    Signals,
    SupervisedBatch,
)

Step = Callable[[RLState, Frozen, PromptBatch, jax.Array], tuple[RLState, Metrics]]


def make_step(networks: Networks, algorithm: Algorithm, hp: Hyperparameters) -> Step:
    """Returns step(state, frozen, batch, key) -> (state, metrics), a pure function."""

    def step(state: RLState, frozen: Frozen, batch: PromptBatch, key: jax.Array) -> tuple[RLState, Metrics]:
        sample_key, learn_key = jax.random.split(key)
        rollout = collect(networks.on(frozen.bases), hp, state.actor.params, batch, sample_key)
        return learn(networks, algorithm, hp, state, frozen, rollout, batch.ptx, learn_key)

    return step


@jax.named_scope("generation")
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
    given: Signals | None = None,
) -> tuple[RLState, Metrics]:
    """Scores a rollout, moves λ, estimates advantages, then updates actor and critics.

    `given` holds scores f32[B] of signals that no network of the step computes.
    """
    networks = networks.on(frozen.bases)
    scored = score_rollout(
        networks,
        state,
        frozen,
        rollout,
        temperature=hp.temperature,
        recompute_log_probs=hp.recompute_log_probs,
        slices=hp.minibatches * hp.microbatches,
        eos_id=hp.eos_id,
        end_id=hp.end_id,
    )
    scored = dataclasses.replace(scored, scores=scored.scores | (given or {}))
    state, constraint_metrics = update_constraints(hp, state, scored)
    experience, metrics = estimate_advantages(algorithm, hp, state, scored)
    measured = rollout_metrics(hp, state, scored)
    state, update_metrics = update_networks(networks, algorithm, hp, state, experience, ptx, key)
    metrics |= measured | constraint_metrics | update_metrics | multiplier_metrics(hp.constraints, state.constraints)
    state = follow(hp, dataclasses.replace(state, step=state.step + 1), measured["kl"])
    return state, {f"train/{name}": value for name, value in metrics.items()}


def is_truncated(hp: Hyperparameters, rollout: Rollout) -> jax.Array:
    """Responses that reached the length limit without an end token, bool[B]."""
    return ~ends_with(rollout.tokens, rollout.mask, hp.eos_id)


def update_constraints(hp: Hyperparameters, state: RLState, scored: ScoredRollout) -> tuple[RLState, Metrics]:
    """Pushes the rollout's costs into the windows and moves every λ, before the policy moves."""
    constraints = {}
    metrics: Metrics = {}
    group = scored.rollout.group
    for signal, constraint in hp.constraints.items():
        updated = push_all(constraint, state.constraints[signal], scored.scores[constraint.of or signal], group)
        metrics |= slot_metrics(signal, "mean_cost", constraint, mean_costs(constraint, updated))
        if constraint.delta is not None:
            metrics |= slot_metrics(signal, "cost_bound", constraint, pessimistic_costs(constraint, updated))
        if constraint.every == "rollout":
            updated = move_multiplier(constraint, updated, group, state.step)
        constraints[signal] = updated
    return dataclasses.replace(state, constraints=constraints), metrics


def estimate_advantages(
    algorithm: Algorithm, hp: Hyperparameters, state: RLState, scored: ScoredRollout
) -> tuple[Experience, Metrics]:
    """Computes token scores and advantages per signal: GAE with critics, or a baseline of the other responses."""
    mask = response_mask(scored.rollout)
    log_ratio = scored.log_probs - scored.ref_log_probs
    kl_coeff = 0.0 if hp.kl.loss is not None else kl_coefficient(hp, state)
    advantages: Signals = {}
    returns: Signals = {}
    metrics: Metrics = {}
    signals = signal_scores(algorithm, hp, state, scored)
    for signal, score in signals.items():
        scores = token_scores(
            score,
            log_ratio,
            mask,
            kl_coeff=kl_coeff,
            kl_sign=-1 if signal == "reward" else algorithm.cost_kl_sign,
            clip_range_score=hp.clip_range_score,
        )
        if algorithm.baseline is None:
            values = scored.values[signal]
            advantages[signal], returns[signal] = gae(scores, values, mask, gamma=hp.gamma, gae_lambda=hp.gae_lambda)
            metrics |= {
                f"{signal}_return": masked_mean(returns[signal], mask),
                f"{signal}_value": masked_mean(values, mask),
                f"{signal}_explained_variance": explained_variance(values, returns[signal], mask),
            }
        else:
            advantages[signal] = sequence_advantages(scores, mask, algorithm.baseline, num_responses=hp.num_responses)
        metrics[f"{signal}_advantage"] = masked_mean(advantages[signal], mask)
    experience = Experience(
        rollout=scored.rollout,
        log_probs=scored.log_probs,
        ref_log_probs=scored.ref_log_probs,
        values={signal: scored.values[signal] for signal in returns},
        advantages=advantages,
        returns=returns,
        below=scored.below,
        violates={signal: signals[signal] > 0 for signal in hp.constraints} if algorithm.split else {},
    )
    return experience, metrics


def signal_scores(algorithm: Algorithm, hp: Hyperparameters, state: RLState, scored: ScoredRollout) -> Signals:
    """Score f32[B] of each signal that has an advantage: shaped rewards, measured costs, a penalty for truncation.

    The penalty applies to its reward, never to its cost.
    """
    scores = algorithm.shape(scored.scores, hp.cost_weight)
    out = {"reward": scores["reward"] - hp.missing_eos_penalty * is_truncated(hp, scored.rollout)}
    for signal, constraint in hp.constraints.items():
        limited = scored.scores[constraint.of or signal]
        out[signal] = measured_costs(constraint, state.constraints[signal], limited, scored.rollout.group)
    return out


def follow(hp: Hyperparameters, state: RLState, kl: jax.Array) -> RLState:
    """Updates, after the policy, β under a controller and a moving reference."""
    if state.kl_coeff is not None and hp.kl.target is not None:
        coeff = adapt(state.kl_coeff, kl, target=hp.kl.target, gain=hp.kl.gain)
        state = dataclasses.replace(state, kl_coeff=coeff)
    if state.reference is not None:
        moved = move_reference(hp.kl, state.reference, state.actor.params, state.step)
        state = dataclasses.replace(state, reference=moved)
    return state


def rollout_metrics(hp: Hyperparameters, state: RLState, scored: ScoredRollout) -> Metrics:
    """Scores, KL, lengths, and the share of responses with cost above zero by constraint and by group of prompts."""
    mask = response_mask(scored.rollout)
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
    if hp.kl.schedule is not None or state.kl_coeff is not None:
        metrics["kl_coeff"] = jnp.asarray(kl_coefficient(hp, state), jnp.float32)
    if state.reference is not None:
        metrics["reference_age"] = state.reference.age
    group = scored.rollout.group
    for signal in (s for s in scored.scores if s != "reward"):
        cost, suffix = scored.scores[signal], signal.removeprefix("cost")
        constraint = hp.constraints.get(signal)
        named = jnp.ones_like(cost, dtype=bool) if constraint is None else named_rows(constraint, group)
        metrics[f"unsafe_share{suffix}"] = share_above_zero(cost, named)
        if len(hp.groups) > 1:
            metrics |= {
                f"unsafe_share{suffix}/{name}": share_above_zero(cost, group == i) for i, name in enumerate(hp.groups)
            }
    return metrics
