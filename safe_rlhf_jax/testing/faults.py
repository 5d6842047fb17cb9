"""Faults planted in `ppo_lag`, each of which has to keep it from the known optimum."""

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from safe_rlhf_jax.rl import step, update
from safe_rlhf_jax.rl.advantages import token_scores
from safe_rlhf_jax.rl.algorithms import ALGORITHMS, Algorithm
from safe_rlhf_jax.rl.rollout import score_rollout
from safe_rlhf_jax.rl.update import response_mask
from safe_rlhf_jax.testing.optimum import CASES, ITERATIONS, run_case
from safe_rlhf_jax.testing.worlds import LENGTH
from safe_rlhf_jax.types import Rollout


def swapped_critics(*args: Any, **kwargs: Any) -> Any:
    """Swaps the critics' values."""
    scored = score_rollout(*args, **kwargs)
    values = {"reward": scored.values["cost"], "cost": scored.values["reward"]}
    return dataclasses.replace(scored, values=values)


def early_score(score: jax.Array, log_ratio: jax.Array, mask: jax.Array, **scalars: Any) -> jax.Array:
    """Places the score one token before the last."""
    early = jnp.arange(LENGTH)[None] == LENGTH - 2
    return token_scores(0.0 * score, log_ratio, mask, **scalars) + jnp.where(early, score[:, None], 0.0)


def without_last(rollout: Rollout) -> jax.Array:
    """Masks the last response token."""
    return response_mask(rollout) & (jnp.arange(LENGTH) < LENGTH - 1)[None]


# Replacements: (module, name, new value), or a field of the algorithm.
FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "critics swapped": [(step, "score_rollout", swapped_critics)],
    "KL left out of the cost stream": [(Algorithm, "cost_kl_sign", 0)],
    "KL of the cost stream with the wrong sign": [(Algorithm, "cost_kl_sign", -1)],
    "score one token early": [(step, "token_scores", early_score)],
    "last token masked": [
        (step, "response_mask", without_last),
        (update, "response_mask", without_last),
    ],
}


def run_fault(name: str, seeds: range, iterations: int = ITERATIONS) -> list[dict[str, Any]]:
    """`ppo_lag` with a fault planted."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in FAULTS[name]:
            if owner is Algorithm:
                record = dataclasses.replace(ALGORITHMS["ppo_lag"], **{attribute: value})
                stack.enter_context(mock.patch.dict(ALGORITHMS, {"ppo_lag": record}))
            else:
                stack.enter_context(mock.patch.object(owner, attribute, value))
        return run_case(dataclasses.replace(CASES["ppo_lag"], starts=(1.0,)), seeds, iterations)
