"""Settings that an algorithm requires of an RL stage or does not use: checked before the first stage trains."""

from collections.abc import Mapping

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.rl.algorithms import ALGORITHMS, shaped_reward
from safe_rlhf_jax.rl.lagrange import combine_signals
from safe_rlhf_jax.stages.asked import check_signals
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.constraints import check_constraints


def check_rl(run: Run, stage: cfg.RLStage, loaded: Mapping[str, Examples]) -> None:
    """Checks algorithm, constraints and the start of λ.

    Raises:
        ConfigError: Names the field and the fix.
    """
    check_algorithm(stage)
    check_targets(run, stage)
    check_constraints(run, stage, loaded)
    check_signals(run, stage, loaded["prompts"])


def idle_beside_algorithm(stage: cfg.RLStage) -> dict[str, str]:
    """Returns {setting of an RL stage that its algorithm does not use: reason}."""
    algorithm, name = ALGORITHMS[stage.algorithm.name], stage.algorithm.name
    unused: dict[str, tuple[str, ...]] = {}
    if not algorithm.constrained:
        unused["has no constraint"] = ("algorithm.lagrange", "algorithm.constraints")
    if algorithm.baseline is not None:
        fields = ("gamma", "gae_lambda", "clip_range_value")
        unused["has no critics"] = ("critic", "critics", *(f"algorithm.{field}" for field in fields))
    if algorithm.shape is not shaped_reward:
        unused["takes no fixed weight of the cost off the reward"] = ("algorithm.cost_weight",)
    if algorithm.paired:
        unused["clips pairs"] = ("algorithm.dual_clip", "algorithm.max_sampler_weight")
    return {field: f"algorithm {name!r} {reason}" for reason, fields in unused.items() for field in fields}


def check_algorithm(stage: cfg.RLStage) -> None:
    """Checks that an algorithm has its models, responses and KL term, and no unused setting.

    Raises:
        ConfigError: Names the field and the fix.
    """
    a, algorithm, where = stage.algorithm, ALGORITHMS[stage.algorithm.name], f"{stage.name}: algorithm"
    rows, parts = stage.batch_size * stage.responses_per_prompt, stage.algorithm.minibatches * stage.microbatches
    if algorithm.constrained and not stage.limits:
        raise ConfigError(f"{where}.name {a.name!r} needs cost_model or signals.cost; name a cost stage, or use 'ppo'")
    if algorithm.needs_cost and "cost" not in stage.scored:
        raise ConfigError(
            f"{where}.name {a.name!r} weighs a cost, and needs cost_model or signals.cost; name a cost stage"
        )
    averaged = [signal for signal, one in stage.limits.items() if one.measure not in ("rectified", "rate")]
    if algorithm.split and averaged:
        raise ConfigError(
            f"{where}.name {a.name!r} tells responses that violate their limit from those that do not: set "
            f"{stage.limit_field(averaged[0], 'measure')} to 'rectified' or 'rate'"
        )
    if algorithm.paired and stage.responses_per_prompt != 2:
        raise ConfigError(
            f"{where}.name {a.name!r} compares the two responses to a prompt: responses_per_prompt is "
            f"{stage.responses_per_prompt}, must be 2"
        )
    if algorithm.baseline is not None and stage.responses_per_prompt < 2:
        raise ConfigError(
            f"{where}.name {a.name!r} compares responses to one prompt: responses_per_prompt is "
            f"{stage.responses_per_prompt}, must be 2 or more"
        )
    if algorithm.paired and rows // 2 % parts:
        raise ConfigError(
            f"{where}.name {a.name!r}: {rows // 2} pairs do not divide into minibatches·microbatches = {parts}"
        )
    if algorithm.kl_as_loss and a.kl.place == "signals" and a.kl_coeff > 0:
        raise ConfigError(
            f"{where}.name {a.name!r} divides each signal by its spread, which would scale the KL term away; set "
            f"{where.partition(' ')[2]}.kl.place: k2"
        )


def check_targets(run: Run, stage: cfg.RLStage) -> None:
    """Checks that a dual stage that initialises λ solves for this algorithm's optimum."""
    target = "safe_rlhf" if ALGORITHMS[stage.algorithm.name].combine is combine_signals else "plain"
    targets = {other.name: getattr(other, "target", target) for other in run.config.stages}
    for field, name in stage.multipliers().items():
        if targets[name] != target:
            raise ConfigError(
                f"{stage.name}: {field} names {name!r}, whose target is {targets[name]!r}; algorithm.name "
                f"{stage.algorithm.name!r} ends at that of {target!r}"
            )
