"""Steps 8 and 9 of the line: the losses of a minibatch, and the optimizer steps of actor and critics."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from safe_rlhf_jax.objectives import lm_loss, token_weights
from safe_rlhf_jax.ops import masked_mean, response_log_probs, response_values, sequence_mean
from safe_rlhf_jax.optim import Loss, gradient_step, split
from safe_rlhf_jax.rl.advantages import whiten
from safe_rlhf_jax.rl.algorithms import Algorithm
from safe_rlhf_jax.rl.constraints import move_multiplier, row_multipliers
from safe_rlhf_jax.rl.hyperparameters import Hyperparameters
from safe_rlhf_jax.rl.kl import kl_loss
from safe_rlhf_jax.rl.losses import clip_fraction, clipped_value_loss, negative_entropy, policy_ratio, sampler_weights
from safe_rlhf_jax.rl.rollout import Networks, below_of, map_slices
from safe_rlhf_jax.types import Experience, Metrics, RLState, Rollout, SupervisedBatch


def response_mask(rollout: Rollout) -> jax.Array:
    """Response tokens, bool[B, T]."""
    return rollout.mask[:, rollout.prompt_length :]


def kl_coefficient(hp: Hyperparameters, state: RLState) -> jax.Array | float:
    """β of this iteration: from the controller, or from the config and its schedule."""
    if state.kl_coeff is not None:
        return state.kl_coeff
    return hp.kl_coeff if hp.kl.schedule is None else hp.kl_coeff * hp.kl.schedule(state.step)


@jax.named_scope("update")
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
    batch = in_pairs(algorithm, (experience, ptx))
    rows = jax.tree.leaves(batch)[0].shape[0]

    def epoch(carry: Any, key: jax.Array) -> Any:
        shuffled = batch
        if hp.minibatches > 1:
            order = jax.random.permutation(key, rows)
            shuffled = jax.tree.map(lambda x: x[order], batch)
        return jax.lax.scan(minibatch, carry, split(shuffled, hp.minibatches))

    def minibatch(state: RLState, part: Any) -> tuple[RLState, Metrics]:
        return update_minibatch(networks, algorithm, hp, state, *part)

    keys = jax.random.split(key, hp.epochs)
    stop_kl = hp.stop_kl
    if stop_kl is None:
        state, metrics = jax.lax.scan(epoch, state, keys)
        first = metrics.pop("ratio_gap")[0, 0]  # all others are means over the updates
        return state, jax.tree.map(jnp.mean, metrics) | {"first_ratio_gap": first}

    def near(state: RLState, part: Any) -> jax.Array:
        experience, _ = in_rows(algorithm, part)
        return sampler_distance(networks, hp, state.actor.params, experience) <= stop_kl

    minibatch = with_kl_early_stop(minibatch, near)
    (state, _), (metrics, tried, kept) = jax.lax.scan(epoch, (state, jnp.bool_(True)), keys)
    first = metrics.pop("ratio_gap")[0, 0]
    means = jax.tree.map(lambda x: (x * tried).sum() / tried.sum(), metrics)
    return state, means | {"first_ratio_gap": first, "updates": kept.sum()}


def with_kl_early_stop(
    minibatch: Callable[..., tuple[RLState, Metrics]], near: Callable[[RLState, Any], jax.Array]
) -> Callable[..., Any]:
    """Wraps a minibatch update with KL early stopping.

    The first update that ends at a state that is not `near` is reverted, and all later ones are skipped.
    Carry: (state, active). Output: (metrics, 1.0 if the update was tried, 1.0 if it was kept).
    """

    def update(carry: tuple[RLState, jax.Array], part: Any) -> Any:
        state, active = carry

        def attempt() -> tuple[RLState, Metrics, jax.Array]:
            new, metrics = minibatch(state, part)
            return new, metrics, near(new, part)

        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(attempt)[1])
        new, metrics, keep = jax.lax.cond(active, attempt, lambda: (state, none, jnp.bool_(False)))
        state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, state)
        return (state, keep), (metrics, active.astype(jnp.float32), keep.astype(jnp.float32))

    return update


def sampler_distance(networks: Networks, hp: Hyperparameters, params: Any, experience: Experience) -> jax.Array:
    """Approximate KL(sampler ‖ π) on a minibatch, f32[], nats per token: the mean of ρ − 1 − log ρ."""

    def distances(part: Experience) -> jax.Array:
        mask = response_mask(part.rollout)
        log_probs = rollout_log_probs(networks, hp, params, part.rollout, part.below)
        return distance_terms(policy_ratio(log_probs, part.log_probs, mask), mask)

    return map_slices(distances, experience, hp.microbatches).mean()


def distance_terms(ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of ρ − 1 − log ρ over the tokens of each response, f32[B]: an estimate of KL(sampler ‖ π) per token."""
    return sequence_mean(ratio - 1.0 - jnp.log(ratio), mask)


def rollout_log_probs(
    networks: Networks, hp: Hyperparameters, params: Any, rollout: Rollout, below: Mapping[str, jax.Array] | None = None
) -> jax.Array:
    """Log-probabilities of the response tokens by the policy with these parameters, f32[B, T].

    `below` holds the outputs of trunks, computed before.
    """
    return response_log_probs(
        networks.policy,
        params,
        rollout.tokens,
        rollout.mask,
        prompt_length=rollout.prompt_length,
        temperature=hp.temperature,
        below=below_of(networks.policy, below or {}),
    )


def in_pairs(algorithm: Algorithm, batch: Any) -> Any:
    """[B, …] as [B/2, 2, …] if the two responses to a prompt must stay together when rows are shuffled and split."""
    return jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), batch) if algorithm.paired else batch


def in_rows(algorithm: Algorithm, batch: Any) -> Any:
    """The inverse of `in_pairs`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch) if algorithm.paired else batch


def update_minibatch(
    networks: Networks,
    algorithm: Algorithm,
    hp: Hyperparameters,
    state: RLState,
    experience: Experience,
    ptx: SupervisedBatch | None,
) -> tuple[RLState, Metrics]:
    """One optimizer step of the actor and of each critic; the batch is `in_pairs`."""
    experience, ptx = in_rows(algorithm, (experience, ptx))
    group = experience.rollout.group
    constraints = state.constraints | {
        signal: move_multiplier(constraint, state.constraints[signal], group, state.step)
        for signal, constraint in hp.constraints.items()
        if constraint.every == "minibatch"
    }
    multipliers = row_multipliers(hp.constraints, constraints, group)
    for signal, violates in experience.violates.items():
        multipliers[signal] = jnp.where(violates[:, None], multipliers[signal], 0.0)
    combined = algorithm.combine(experience.advantages, multipliers)
    if hp.whiten:
        combined = whiten(combined, response_mask(experience.rollout))
    kl_coeff = kl_coefficient(hp, state)

    def policy_loss(params: Any, part: Any) -> tuple[Any, Metrics]:
        part_experience, advantages, part_ptx, part_weights = in_rows(algorithm, part)
        mask = response_mask(part_experience.rollout)
        log_probs = rollout_log_probs(networks, hp, params, part_experience.rollout, part_experience.below)
        ratio = policy_ratio(log_probs, part_experience.log_probs, mask)
        metrics: Metrics = {"advantage": masked_mean(advantages, mask)}
        if hp.max_sampler_weight is not None:
            sampled = part_experience.rollout.sampler_log_probs
            correction = sampler_weights(part_experience.log_probs, sampled, mask, maximum=hp.max_sampler_weight)
            metrics["sampler_weight"] = masked_mean(correction, mask)
            advantages = correction * advantages  # the surrogate is linear in them
        loss = algorithm.policy_loss(
            ratio, advantages, mask, clip_range_ratio=hp.clip_range_ratio, dual_clip=hp.dual_clip
        )
        metrics |= {
            "actor_loss": loss,
            "clip_fraction": clip_fraction(ratio, mask, clip_range_ratio=hp.clip_range_ratio),
            "approx_kl": distance_terms(ratio, mask).mean(),
            "ratio_gap": jnp.abs(ratio - 1.0).max(-1),
        }
        if hp.kl.loss is not None:
            metrics["kl_loss"] = kl_loss(hp.kl, log_probs, part_experience.ref_log_probs, mask)
            loss = loss + kl_coeff * metrics["kl_loss"]
        if hp.entropy_coeff:
            loss = loss + hp.entropy_coeff * negative_entropy(ratio, log_probs, mask)
        if part_ptx is not None:
            ptx_loss, _ = lm_loss(networks.policy, params, part_ptx, part_weights)
            loss, metrics["ptx_loss"] = loss + hp.ptx_coeff * ptx_loss, ptx_loss
        return loss, metrics

    weights = jnp.zeros_like(experience.log_probs) if ptx is None else token_weights(ptx.loss_mask)
    actor, metrics = gradient_step(
        policy_loss,
        state.actor,
        in_pairs(algorithm, (experience, combined, ptx, weights)),
        networks.actor_optimizer,
        microbatches=hp.microbatches,
    )
    if hp.critic_warmup:
        held = state.step < hp.critic_warmup
        actor = jax.tree.map(lambda new, old: jnp.where(held, old, new), actor, state.actor)
    metrics["ratio_gap"] = metrics["ratio_gap"].max()
    metrics["actor_grad_norm"] = metrics.pop("grad_norm")
    del metrics["loss"]
    critics = {}
    for signal in experience.returns:
        critics[signal], critic_metrics = gradient_step(
            value_loss(networks, hp, signal),
            state.critics[signal],
            experience,
            networks.critic_optimizers[signal],
            microbatches=hp.microbatches,
        )
        metrics[f"{signal}_critic_loss"] = critic_metrics["loss"]
        metrics[f"{signal}_critic_grad_norm"] = critic_metrics["grad_norm"]
    return dataclasses.replace(state, actor=actor, critics=critics, constraints=constraints), metrics


def value_loss(networks: Networks, hp: Hyperparameters, signal: str) -> Loss:
    """The loss of one signal's critic."""

    def loss(params: Any, part: Experience) -> tuple[jax.Array, Metrics]:
        rollout = part.rollout
        critic = networks.critics[signal]
        values = response_values(
            critic, params, rollout.tokens, rollout.mask, prompt_length=rollout.prompt_length,
            below=below_of(critic, part.below),
        )  # fmt: skip
        mask = response_mask(rollout)
        old_values, returns = part.values[signal], part.returns[signal]
        return clipped_value_loss(values, old_values, returns, mask, clip_range_value=hp.clip_range_value), {}

    return loss
