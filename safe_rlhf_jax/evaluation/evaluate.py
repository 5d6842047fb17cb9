"""Evaluation of policies on held-out prompts, and of scorers on held-out pairs."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_rlhf_jax.data.examples import Examples, sides_of
from safe_rlhf_jax.data.formats import Record
from safe_rlhf_jax.data.loader import in_rows
from safe_rlhf_jax.data.oracles import Oracle
from safe_rlhf_jax.data.texts import shown
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.evaluation.health import KINDS_OF_PAIRS, pairs_health, sign_health
from safe_rlhf_jax.evaluation.judges import JUDGE
from safe_rlhf_jax.evaluation.refusals import ORACLE, RULE, is_refusal
from safe_rlhf_jax.evaluation.statistics import expected_calibration_error, reliability_curve, sigmoid
from safe_rlhf_jax.inference.best_of_n import best_of_n, read_by_scorers, scores_of
from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.models.adapters import LanguageModel, hidden_by_role
from safe_rlhf_jax.ops import response_log_probs, sequence_scores
from safe_rlhf_jax.types import Frozen, Params, PreferenceBatch, PromptBatch, SafetyBatch, Sequences, TokenIds

Sample = dict[str, Any]
Batch = Sequence[Sequence[Any]]  # pairs of the place of a prompt and its sample


def make_respond(
    policy: LanguageModel,
    scorers: dict[str, Any],
    *,
    reference: LanguageModel,
    response_length: int,
    eos_id: TokenIds,
    pad_id: int,
    sampling: Sampling,
    end_id: int | None = None,
) -> Callable[[Params, Frozen, PromptBatch, jax.Array], dict[str, jax.Array]]:
    """Returns respond(params, frozen, prompts, key): one response per prompt, with its measurements.

    The result holds tokens i32[B, T], length i32[B], a score f32[B] for every scorer, and kl f32[B]
    (Σ log π − log π_ref over the response, nats). Scorers read `end_id` after a response without an end.
    """

    @jax.jit
    def respond(params: Params, frozen: Frozen, prompts: PromptBatch, key: jax.Array) -> dict[str, jax.Array]:
        with jax.named_scope("generation"):
            rollout = generate(
                policy, params, prompts, key, num_responses=1, response_length=response_length, eos_id=eos_id,
                pad_id=pad_id, sampling=sampling,
            )  # fmt: skip
        prompt_length = rollout.prompt_length
        roles = {signal: (module, frozen.scorers[signal]) for signal, module in scorers.items()}
        policies = {"of the policy": (policy, params), "of the reference": (reference, frozen.reference)}
        all_roles = roles | {name: (module, {"params": of}) for name, (module, of) in policies.items()}
        text = read_by_scorers(rollout, eos_id, end_id)
        hidden = hidden_by_role(all_roles, *text, prompt_length - 1)
        if end_id is not None:  # the policies read none of the ends
            hidden = {role: states if role in roles else states[:, :-1] for role, states in hidden.items()}
        log_probs = [
            response_log_probs(
                module, of, rollout.tokens, rollout.mask, prompt_length=prompt_length,
                temperature=sampling.temperature or 1.0, hidden=hidden.get(name),
            )
            for name, (module, of) in policies.items()
        ]  # fmt: skip
        response, mask = rollout.tokens[:, prompt_length:], rollout.mask[:, prompt_length:]
        kl = jnp.where(mask, log_probs[0] - log_probs[1], 0.0).sum(-1)
        scores = scores_of(roles, text, prompt_length - 1, hidden)
        return {"tokens": response, "length": mask.sum(-1), "kl": kl} | scores

    return respond


def best_responses(out: Mapping[str, np.ndarray], cost_limit: float | None) -> dict[str, np.ndarray]:
    """Returns the best of n responses to each prompt by `reward`, within `cost_limit` by `cost` (see `best_of_n`).

    It has no kl: the choice changes the distribution.

    Args:
        out: Arrays [B, n, …] by name: tokens, length, and a score for every scorer.
        cost_limit: In cost-model units; None: every response is feasible.
    """
    costs = jnp.asarray(out["cost"]) if "cost" in out else None
    best = np.asarray(best_of_n(jnp.asarray(out["reward"]), costs, cost_limit)[0])
    return {name: array[np.arange(len(best)), best] for name, array in out.items()}


def collect_samples(
    respond: Callable[[PromptBatch, jax.Array], dict[str, np.ndarray]],
    batches: Sequence[tuple[PromptBatch, np.ndarray]],
    prompts: Examples,
    *,
    key: jax.Array,
    ends: Collection[int],
    decode: Callable[[Any], str],
    split: str,
    group_field: str | None,
    oracle: Oracle | None,
    kept: Sequence[Batch] = (),
    keep: Callable[[Batch], None] = lambda _: None,
) -> list[Sample]:
    """Returns one sample per prompt: the response, its scores and judges', the oracle's reading if there is one.

    Args:
        respond: (prompts, key) -> arrays by name.
        batches: Prompts, and their places among `prompts`.
        prompts: The prompts.
        key: Batch i uses `fold_in(key, i)`.
        ends: Ids that end a response.
        decode: Token ids -> text.
        split: Of the prompts.
        group_field: Field of their records that names a group.
        oracle: Reads responses, if there is one.
        kept: The first batches, by an earlier run.
        keep: Gets each further batch when it is done.
    """
    found = list(kept)
    for i, (batch, indices) in enumerate(batches[len(found) :], start=len(found)):
        out = respond(batch, jax.random.fold_in(key, i))
        done = []
        for row, index in enumerate(indices.tolist()):
            record, prompt = prompts.records[index], shown(prompts.turns[index])
            ids = out["tokens"][row, : int(out["length"][row])]
            response = decode(ids)
            sample = {
                "prompt": prompt,
                "response": response,
                "group": str(record.get(group_field, "all")) if group_field else "all",
                "split": split,
                "category": str(record.get("category", "")),
                "length": len(ids),
                "truncated": not any(int(i) in ends for i in ids[-1:]),
                "kl": float(out["kl"][row]) if "kl" in out else None,
                "reward": float(out["reward"][row]) if "reward" in out else None,
                "cost": float(out["cost"][row]) if "cost" in out else None,
                "helpfulness": None,
                "harmful": None,
                "severity": None,
                "refusal": is_refusal(response),
                "refusal_by": RULE,
                "measured": {},
                "judged": {name.removeprefix(JUDGE): float(out[name][row]) for name in out if name.startswith(JUDGE)},
            }
            costs = {name: float(out[name][row]) for name in out if name.startswith("cost/")}
            sample |= {"costs": {name.removeprefix("cost/"): cost for name, cost in costs.items()}} if costs else {}
            read = oracle.read(prompt, response, split) if oracle else {}
            done.append((index, sample | read | ({"refusal_by": ORACLE} if "refusal" in read else {})))
        keep(done)
        found.append(done)
    samples = {index: sample for batch in found for index, sample in batch}
    return [samples[index] for index in range(len(samples))]


def make_score(module: Any) -> Callable[[Any, Sequences], jax.Array]:
    """Returns score(variables, texts): the score of each text, f32[B]."""

    @jax.jit
    def score(variables: Any, texts: Sequences) -> jax.Array:
        return sequence_scores(module, variables, texts.tokens, texts.mask)

    return score


def evaluate_pairs(
    score: Callable[[Sequences], jax.Array],
    batches: Sequence[tuple[PreferenceBatch | SafetyBatch, np.ndarray]],
    records: Sequence[Record] = (),
) -> dict[str, Any]:
    """Scores held-out pairs with a reward model (`PreferenceBatch`) or a cost model (`SafetyBatch`).

    Args:
        score: Returns the score of each text, f32[B].
        batches: Of `in_order`.
        records: Of the dataset; `health` uses their fields as kinds of pairs.

    Returns:
        `metrics`: accuracy (of ranking; a tie counts one half), also of pairs on which annotators are unanimous and on
        which they are split, where there are such; for cost models sign_accuracy, the expected calibration
        error of the model's probability σ(difference) of the label, mean and standard deviation of the
        scores. `scores_by_label`: {chosen, rejected} or {safe, unsafe}. `reliability`: (confidence, accuracy, count) by
        bin. `health`: result of `pairs_health`, for cost models with `sign` of `sign_health`.
    """
    columns, labels = [], []
    for batch, _ in batches:
        sides = sides_of(batch)
        scores = [np.asarray(jax.device_get(score(side)), np.float64) for side in sides]
        lengths = [np.asarray(side.response_mask).sum(-1) for side in sides]
        columns.append((*scores, *lengths))
        if isinstance(batch, SafetyBatch):
            labels.append(np.stack([batch.safer_is_safe, batch.unsafer_is_safe], axis=1))
    a, b, *lengths = (in_rows(parts, batches) for parts in zip(*columns, strict=True))
    return measured_pairs((a, b), (lengths[0], lengths[1]), in_rows(labels, batches).T if labels else None, records)


def measured_pairs(
    scores: tuple[np.ndarray, np.ndarray],
    lengths: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray | None,
    records: Sequence[Record],
) -> dict[str, Any]:
    """Measures scores of pairs, as `evaluate_pairs` returns them.

    Args:
        scores: f64[n] each, of the response that the label prefers and of the other.
        lengths: i[n] each, their tokens.
        labels: bool[2, n], whether each is safe; None for rewards.
        records: Of the pairs.
    """
    a, b = scores
    both, sign = np.concatenate([a, b]), 1.0 if labels is None else -1.0
    label = "better_response_id" if labels is None else "safer_response_id"
    health = pairs_health(sign * a, sign * b, lengths, records, label)
    metrics = {"mean": float(both.mean()), "std": float(both.std()), "accuracy": health["accuracy"]["rate"]}
    kinds = health.get("annotators", {})
    metrics |= {f"accuracy_{kind}": kinds[kind]["rate"] for kind in KINDS_OF_PAIRS if kind in kinds}
    if labels is not None:
        is_safe = labels.ravel()
        health["sign"] = sign_health(both, is_safe)
        metrics["sign_accuracy"] = health["sign"]["all"]["rate"]
        by_label = {"safe": both[is_safe].tolist(), "unsafe": both[~is_safe].tolist()}
        probability, outcome = sigmoid(both), ~is_safe
    else:
        by_label = {"chosen": a.tolist(), "rejected": b.tolist()}
        # Each pair in random order; otherwise the outcome would always be 1.
        flip = np.random.default_rng(0).random(len(a)) < 0.5
        probability, outcome = sigmoid(np.where(flip, b - a, a - b)), ~flip
    metrics["calibration_error"] = expected_calibration_error(probability.tolist(), outcome.tolist())
    reliability = reliability_curve(probability.tolist(), outcome.tolist())
    return {"metrics": metrics, "scores_by_label": by_label, "reliability": reliability, "health": health}


def calibrated_limit(safe: Sequence[float], unsafe: Sequence[float], margin: float) -> float:
    """Cost limit: mean of safe + margin · (mean of unsafe − mean of safe), by a cost model."""
    low, high = float(np.mean(safe)), float(np.mean(unsafe))
    return low + margin * (high - low)


def check_reachable(limit: float, safe: Sequence[float], *, field: str = "algorithm.lagrange.cost_limit") -> None:
    """Refuses a limit that no policy can be expected to reach.

    The floor is the 5 % quantile of the cost model's scores of responses labelled safe: a policy with a *mean* below it
    would have to be safer than nineteen in twenty safe responses. `field` names the limit in the error.

    Raises:
        ConfigError: If the limit is below the floor.
    """
    floor = float(np.quantile(np.asarray(safe), 0.05))
    if math.isfinite(floor) and limit < floor:
        raise ConfigError(
            f"{field} {limit:.3f} is below what the cost model can reach ({floor:.3f}, the 5 % "
            f"quantile of responses labelled safe; their mean is {np.mean(np.asarray(safe)):.3f}). Raise the limit, or "
            "give cost_limit: {data: …} to calibrate it."
        )
