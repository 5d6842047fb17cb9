"""One-shot dual: the multiplier from samples of the reference alone."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.rl.dual import solve_dual
from safe_rlhf_jax.stages.common import Run, report_data
from safe_rlhf_jax.stages.constraints import check_constraints, cost_limits
from safe_rlhf_jax.stages.datasets import take
from safe_rlhf_jax.stages.host_signals import open_scorers
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.sampling import is_limited, sampled, sampler_of, some_of

LOGGER = logging.getLogger(__name__)

FEW = 2.0  # effective samples per prompt below which λ* says little about the optimum


def run_dual(run: Run, stage: cfg.DualStage, folder: storage.Path) -> dict[str, Any]:
    """Runs a dual stage; its result holds the multiplier and the expectations there."""
    del folder  # the result is the only output
    prompts = take(run, stage, "prompts")
    report_data(stage.name, prompts)
    prompts = some_of(prompts, np.flatnonzero(is_limited(stage, prompts)).tolist())
    (limit,), source = cost_limits(run, stage, "cost")
    policy, variables = run.networks.read(stage.init_from, "lm", seed=run.seed(stage))
    params = variables["params"]
    scorers = open_scorers(run, stage.scorers)
    sample = sampler_of(run, stage, policy, scorers.modules)
    batches = list(
        sampled(
            run, lambda batch, key: sample(params, scorers.variables, batch, key), prompts, stage.batch_size,
            jax.random.key(run.seed(stage)), stage.name, host=scorers.host,
        )
    )  # fmt: skip
    rewards, costs = (np.concatenate([out[signal] for _, out in batches]) for signal in ("reward", "cost"))
    solution = solve_dual(
        rewards,
        costs,
        cost_limit=limit,
        kl_coeff=stage.kl_coeff,
        divided=stage.target == "safe_rlhf",
        max_multiplier=stage.max_multiplier,
    )
    for problem in doubts(stage, solution.effective_sample_size, solution.capped):
        LOGGER.warning(f"{stage.name}: warning: {problem}")
    found = dataclasses.asdict(solution)
    numbers = {f"dual/{name}": float(value) for name, value in found.items()}
    numbers |= {"dual/reference_cost": float(costs.mean()), "dual/reference_reward": float(rewards.mean())}
    return found | {"metrics": numbers, "cost_limit": limit, "cost_limit_source": source, "prompts": len(prompts)}


def doubts(stage: cfg.DualStage, effective: float, capped: bool) -> list[str]:
    """Returns the reasons not to trust the multiplier."""
    notes = []
    if effective < FEW:
        notes.append(
            f"only {effective:.1f} of {stage.responses_per_prompt} samples of a prompt count at kl_coeff "
            f"{stage.kl_coeff}: the multiplier is that of choosing the best of them, not that of the optimum"
        )
    if capped:
        notes.append(f"the multiplier lies beyond max_multiplier {stage.max_multiplier} and is cut off there")
    return notes


DUAL = Kind(cfg.DualStage, run_dual, check=check_constraints)
