"""Best-of-n: sample and score n responses per prompt, select the best feasible one, estimate the gain from larger n."""

from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.models.adapters import LanguageModel, hidden_by_role
from safe_rlhf_jax.ops import sequence_scores, with_ends
from safe_rlhf_jax.types import Params, PromptBatch, Rollout, Signals, TokenIds

Table = np.ndarray  # [prompts, n]


def best_of_n(
    rewards: Float[Array, "B n"], costs: Float[Array, "B n"] | None, cost_limit: float | None
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Index of the highest reward among responses with cost ≤ limit; if there are none, of the lowest cost.

    Source: Touvron et al. 2023 (arXiv 2307.09288) section 3.2.3, rejection sampling; the cost as a filter is ours.

    Args:
        rewards: f32[B, n].
        costs: f32[B, n]; None without a cost model.
        cost_limit: In cost-model units; None: every response is feasible.

    Returns:
        i32[B], and bool[B]: some response to the prompt is feasible.
    """
    if costs is None or cost_limit is None:
        return jnp.argmax(rewards, axis=-1).astype(jnp.int32), jnp.ones(rewards.shape[:1], bool)
    feasible = costs <= cost_limit
    possible = feasible.any(axis=-1)
    best = jnp.argmax(jnp.where(feasible, rewards, -jnp.inf), axis=-1)
    return jnp.where(possible, best, jnp.argmin(costs, axis=-1)).astype(jnp.int32), possible


def scores_of(
    scorers: Mapping[str, tuple[Any, Any]], text: tuple[jax.Array, jax.Array], first: int,
    hidden: Mapping[str, jax.Array],
) -> Signals:  # fmt: skip
    """Returns the scores of responses, f32[B] by signal.

    Args:
        scorers: {signal: score model and its variables}.
        text: Tokens and mask of B prompts with their responses, as `read_by_scorers` returns them.
        first: The prompts' last column.
        hidden: Hidden states by signal, where `hidden_by_role` has computed them, from that column on.
    """
    return {
        signal: sequence_scores(*scorer, *text, first=first, hidden=hidden.get(signal))
        for signal, scorer in scorers.items()
    }


def read_by_scorers(rollout: Rollout, eos_id: TokenIds, end_id: int | None) -> tuple[jax.Array, jax.Array]:
    """Returns tokens and mask of a rollout, with `end_id`, if there is one, after responses without an end."""
    text = rollout.tokens, rollout.mask
    return text if end_id is None else with_ends(*text, eos_id, end_id)


def make_sampler(
    policy: LanguageModel, scorers: Mapping[str, Any], *, num_responses: int, end_id: int | None = None, **sampler: Any
) -> Callable[[Params, Mapping[str, Any], PromptBatch, jax.Array], dict[str, jax.Array]]:
    """Returns sample(params, scorer variables, prompts, key): n scored responses to each prompt, compiled.

    The result holds tokens i32[B, n, T], length i32[B, n] and a score f32[B, n] for every scorer, which reads `end_id`
    after a response without an end; the other arguments are as in `generate`.
    """

    @jax.jit
    def sample(
        params: Params, variables: Mapping[str, Any], prompts: PromptBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        with jax.named_scope("generation"):
            rollout = generate(policy, params, prompts, key, num_responses=num_responses, **sampler)
        with jax.named_scope("scoring"):
            roles = {signal: (module, variables[signal]) for signal, module in scorers.items()}
            text, first = read_by_scorers(rollout, sampler["eos_id"], end_id), rollout.prompt_length - 1
            scores = scores_of(roles, text, first, hidden_by_role(roles, *text, first))
        rows, prompt_length = prompts.tokens.shape
        response = {"tokens": rollout.tokens[:, prompt_length:], "length": rollout.mask[:, prompt_length:].sum(-1)}
        return {
            name: array.reshape(rows, num_responses, *array.shape[1:]) for name, array in (response | scores).items()
        }

    return sample


def order_statistic_weights(n: int, k: int, rank: int) -> Table:
    """Probability that the `rank`-th smallest of k out of n, drawn without replacement, is the i-th smallest, f64[n].

    P(i) = C(i − 1, rank − 1)·C(n − i, k − rank)/C(n, k), i and rank from 1.
    """
    chances = [comb(i - 1, rank - 1) * comb(n - i, k - rank) / comb(n, k) for i in range(1, n + 1)]
    return np.array(chances, np.float64)


def numbers_up_to(n: int) -> list[int]:
    """1, 2, 4, … and n itself."""
    return sorted({n, *(2**i for i in range(n.bit_length()))})


def gain_by_number(rewards: Table, feasible: Table) -> list[dict[str, float]]:
    """Expected rewards of k out of the n samples of each prompt, for k = 1, 2, 4, …, n.

    Unbiased: the mean over all subsets of k samples, from order statistics, then over prompts.

    Source: the quantities of Touvron et al. 2023 (arXiv 2307.09288) figure 7; the estimator is ours.

    Args:
        rewards: f[prompts, n].
        feasible: bool[prompts, n].

    Returns:
        A row for each k: `number`; `reward_max` and `reward_median`, the expected maximum and median of k rewards;
        `feasible_share` of the prompts have a feasible response among k, and the best of these has on average
        `reward_selected` (absent where no response at all is feasible).
    """
    n = rewards.shape[1]
    ascending = np.sort(np.asarray(rewards, np.float64), axis=1)
    infeasible = n - feasible.sum(axis=1)
    best_first = -np.sort(np.where(feasible, -np.asarray(rewards, np.float64), np.inf), axis=1)  # feasible ones lead
    leading = np.arange(n) < feasible.sum(axis=1, keepdims=True)
    rows = []
    for k in numbers_up_to(n):
        middle = [order_statistic_weights(n, k, rank) for rank in ((k + 1) // 2, k // 2 + 1)]
        none = np.array([comb(int(count), k) / comb(n, k) for count in infeasible], np.float64)
        # Response i of `best_first` is chosen from a subset that holds it and none of the i better ones.
        chosen = np.array([comb(n - 1 - i, k - 1) / comb(n, k) for i in range(n)], np.float64)
        selected = float((np.where(leading, best_first, 0.0) @ chosen).sum())
        possible = float((1.0 - none).sum())
        rows.append(
            {
                "number": float(k),
                "reward_max": float((ascending @ order_statistic_weights(n, k, k)).mean()),
                "reward_median": float((ascending @ (sum(middle) / 2)).mean()),
                "feasible_share": float(1.0 - none.mean()),
            }
            | ({"reward_selected": selected / possible} if feasible.any() else {})
        )
    return rows


def described_gain(rows: Sequence[Mapping[str, float]]) -> str:
    """Describes the last row of `gain_by_number`."""
    last = rows[-1]
    return (
        f"of {last['number']:.0f} responses the best has reward {last['reward_max']:.3f}, the median "
        f"{last['reward_median']:.3f}, the best feasible {last['reward_selected']:.3f}; {last['feasible_share']:.1%} "
        "of the prompts have a feasible one"
    )
