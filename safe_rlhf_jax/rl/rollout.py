"""Step 5 of the line: log-probabilities, scores and values of a rollout."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from safe_rlhf_jax.inference.best_of_n import read_by_scorers
from safe_rlhf_jax.models.adapters import Adapted, hidden_by_role, on, output_of_trunk
from safe_rlhf_jax.ops import response_log_probs, response_values, sequence_scores
from safe_rlhf_jax.optim import split
from safe_rlhf_jax.types import Frozen, Params, RLState, Rollout, ScoredRollout, TokenIds


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules and optimizers of an RL run; parameters are passed as arguments."""

    policy: Any  # a CausalLM, or a module with its methods
    scorers: dict[str, Any]  # ScoreModels, by signal
    critics: dict[str, Any]
    actor_optimizer: optax.GradientTransformation
    critic_optimizers: dict[str, optax.GradientTransformation]

    def on(self, bases: Mapping[str, Params]) -> "Networks":
        """Returns the networks with those that have adapters on their bases."""
        scorers, critics = ({s: on(m, bases) for s, m in each.items()} for each in (self.scorers, self.critics))
        return dataclasses.replace(self, policy=on(self.policy, bases), scorers=scorers, critics=critics)


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
    temperature: float,
    recompute_log_probs: bool,
    slices: int,
    eos_id: TokenIds = (),
    end_id: int | None = None,
) -> ScoredRollout:
    """Runs actor, reference, scorers and critics over a rollout.

    Args:
        networks: Modules.
        state: Actor and critics.
        frozen: Reference (unless it moves and is in the state) and scorers.
        rollout: B sequences.
        temperature: Of the sampler; divides the logits of both actor and reference.
        recompute_log_probs: Compute the actor's log-probs in the learner's own graph, so that the first ratio is
            exactly 1; else take the sampler's, one forward pass fewer.
        slices: Number of parts of the batch to score; with the learner's microbatch size the arithmetic is the same.
        eos_id: Tokens that end a response.
        end_id: Scorers read this token after a response that has no end; None: they read such a response as it is.

    Networks with adapters that share a base read the rollout in one pass, all but the actor: its log-probs come from
    the graph that the learner differentiates.

    Returns:
        A `ScoredRollout`; a signal has scores if it has a scorer, and values if it has a critic.
    """
    reference = frozen.reference if state.reference is None else state.reference.params

    prompt_length = rollout.prompt_length
    first = prompt_length - 1
    roles = {"reference": (networks.policy, {"params": reference})}
    scores = {f"score of {s}": (module, frozen.scorers[s]) for s, module in networks.scorers.items()}
    roles |= scores
    roles |= {f"value of {s}": (module, {"params": state.critics[s].params}) for s, module in networks.critics.items()}

    def score(part: Rollout) -> ScoredRollout:
        text = read_by_scorers(part, eos_id, end_id)
        below = outputs_of_trunks((networks.policy, *networks.critics.values()), *text)
        hidden = hidden_by_role(roles, *text, first, below)
        if end_id is not None:  # the others read none of the ends
            below = {base: states[:, :-1] for base, states in below.items()}
            hidden = {role: x if role in scores else x[:, :-1] for role, x in hidden.items()}

        def log_probs(params: Any, hidden: jax.Array | None = None) -> jax.Array:
            return response_log_probs(
                networks.policy, params, part.tokens, part.mask, prompt_length=prompt_length, temperature=temperature,
                below=below_of(networks.policy, below), hidden=hidden,
            )  # fmt: skip

        def score_of(signal: str) -> jax.Array:
            role = f"score of {signal}"
            return sequence_scores(*roles[role], *text, first=first, hidden=hidden.get(role))

        def values_of(signal: str) -> jax.Array:
            return response_values(
                networks.critics[signal], state.critics[signal].params, part.tokens, part.mask,
                prompt_length=prompt_length, hidden=hidden.get(f"value of {signal}"),
            )  # fmt: skip

        return ScoredRollout(
            rollout=part,
            log_probs=log_probs(state.actor.params) if recompute_log_probs else part.sampler_log_probs,
            ref_log_probs=log_probs(reference, hidden.get("reference")),
            scores={signal: score_of(signal) for signal in networks.scorers},
            values={signal: values_of(signal) for signal in networks.critics},
            below=below,
        )

    return map_slices(score, rollout, slices)


def outputs_of_trunks(modules: Iterable[Any], tokens: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns the output of the trunk of each base that trained networks stand on, [B, L, D], by its name."""
    adapted = {module.base: module for module in modules if isinstance(module, Adapted) and module.config.trunk}
    return {base: output_of_trunk(module, tokens, mask) for base, module in adapted.items()}


def below_of(module: Any, below: Mapping[str, jax.Array]) -> jax.Array | None:
    """Returns the output of a network's trunk, if it has one."""
    return below.get(module.base) if isinstance(module, Adapted) else None
