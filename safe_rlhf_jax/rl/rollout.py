"""Step 5 of the line: log-probabilities, scores and values of a rollout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from safe_rlhf_jax.ops import response_log_probs, response_values, sequence_scores
from safe_rlhf_jax.optim import split
from safe_rlhf_jax.types import Frozen, RLState, Rollout, ScoredRollout


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules and optimizers of an RL run; parameters are passed as arguments."""

    policy: Any  # a CausalLM, or a module with its methods
    scorers: dict[str, Any]  # ScoreModels, by signal
    critics: dict[str, Any]
    actor_optimizer: optax.GradientTransformation
    critic_optimizers: dict[str, optax.GradientTransformation]


def map_slices(function: Callable[[Any], Any], batch: Any, slices: int) -> Any:
    """Applies a row-wise function to a batch slice by slice: less memory, the same result."""
    if slices == 1:
        return function(batch)
    out = jax.lax.map(function, split(batch, slices))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)


@jax.named_scope("scoring")
def score_rollout(
    networks: Networks,
    state: RLState,
    frozen: Frozen,
    rollout: Rollout,
    *,
    prompt_length: int,
    temperature: float,
    recompute_log_probs: bool,
    slices: int,
) -> ScoredRollout:
    """Runs actor, reference, scorers and critics over a rollout.

    Args:
        networks: Modules.
        state: Actor and critics.
        frozen: Reference (unless it moves and is in the state) and scorers.
        rollout: B sequences.
        prompt_length: S.
        temperature: Of the sampler; divides the logits of both actor and reference.
        recompute_log_probs: Compute the actor's log-probs in the learner's own graph, so that the first ratio is
            exactly 1; else take the sampler's, one forward pass fewer.
        slices: Number of parts of the batch to score; with the learner's microbatch size the arithmetic is the same.

    Returns:
        A `ScoredRollout`; a signal has scores if it has a scorer, and values if it has a critic.
    """
    reference = frozen.reference if state.reference is None else state.reference.params

    def score(part: Rollout) -> ScoredRollout:
        def log_probs(params: Any) -> jax.Array:
            return response_log_probs(
                networks.policy, params, part.tokens, part.mask, prompt_length=prompt_length, temperature=temperature
            )

        def end_score(signal: str) -> jax.Array:
            module, variables = networks.scorers[signal], frozen.scorers[signal]
            return sequence_scores(module, variables, part.tokens, part.mask, first=prompt_length - 1)

        return ScoredRollout(
            rollout=part,
            log_probs=log_probs(state.actor.params) if recompute_log_probs else part.sampler_log_probs,
            ref_log_probs=log_probs(reference),
            scores={signal: end_score(signal) for signal in networks.scorers},
            values={
                signal: response_values(
                    module, state.critics[signal].params, part.tokens, part.mask, prompt_length=prompt_length
                )
                for signal, module in networks.critics.items()
            },
        )

    return map_slices(score, rollout, slices)
