"""Schemas of the on-policy algorithms: constraints, KL, the clipped update.

Sources: [ref] PKU-Alignment/safe-rlhf@82743cc scripts; [paper] Dai et al. 2023, arXiv 2310.12773; [omnisafe] its
`PIDLagrangian` defaults; [RePO] arXiv 2410.19933; [RAD] 2603.10938; [CS-RLHF] 2510.03520; [CGRPO] 2602.05863.
"""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from safe_rlhf_jax.config.data import Delta, Schema, Share, Single

ScheduleName = Literal["constant", "linear", "cosine", "hold_linear"]


class CalibratedLimit(Schema):
    """Sets d from the cost model's own scores of labelled data instead of guessing it.

    d = mean cost of responses labelled safe + margin · (mean of unsafe − mean of safe), over prompts that the
    constraint names. (With E[C] ≤ 0 over mixed prompts, very negative costs of benign prompts pay for harm elsewhere.)
    """

    data: Single
    margin: Share = 0.03


class PIDConfig(Schema):
    """λ = [K_p·P + I + K_d·D]⁺; the gain of the integral I is `lr`."""

    proportional: NonNegativeFloat = 0.1  # K_p [omnisafe]
    derivative: NonNegativeFloat = 0.01  # K_d [omnisafe]
    smoothing: Share = 0.95  # of the averages behind P and D [omnisafe]
    delay: PositiveInt = 10  # moves over which the slope is taken [omnisafe]


NOT_OF_PENALTY = ("lr", "schedule", "max_multiplier", "min_multiplier")


class Lagrange(Schema):
    """The constraint J_C ≤ d and its multiplier λ."""

    added: ClassVar[frozenset[str]] = frozenset({"bound", "of", "power", "delta"})
    cost_limit: float | CalibratedLimit = 0.0  # d, cost-model units [ref]; a share in [0, 1) for `rate`
    bound: Literal["at_most", "at_least"] = "at_most"  # J_C ≤ d [ref], or J_C ≥ d
    of: Literal["cost", "reward"] = "cost"  # limited score; the reward by `constraints.NAME` without a cost model
    # J_C: the mean of C [ref], of {C − threshold}⁺ [RePO], of 1[C > threshold] [CGRPO], of the worst costs, or of
    # quantiles with weights [RAD].
    measure: Literal["mean", "rectified", "rate", "cvar", "spectral"] = "mean"
    threshold: float = 0.0  # of `rectified` and `rate`, cost-model units [RePO]
    tail: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9  # α of `cvar`: the mean of the worst 1 − α
    power: Annotated[float, Field(ge=1.0)] = 2.0  # k of `spectral`: the expected worst of k responses
    # Gradient ascent in log λ [ref], in λ, PID control, or without a dual: λ is `init` where J_C > d, else 0 [CS-RLHF].
    multiplier: Literal["log", "projected", "pid", "penalty"] = "log"
    init: float | str = 1.0  # initial λ [ref], or λ of `penalty`; or the name of an earlier dual stage that finds it
    lr: PositiveFloat = 0.1  # of log λ [ref]; of λ; K_i of PID
    schedule: ScheduleName = "constant"
    pid: PIDConfig = PIDConfig()
    max_multiplier: PositiveFloat | None = 5.0  # [ref]
    min_multiplier: PositiveFloat | None = None
    # δ: λ follows the upper bound of J_C that holds with confidence 1 − δ by the window's spread, not J_C itself; null:
    # J_C [ref; HC-RLHF]
    delta: Delta | None = None
    every: Literal["rollout", "minibatch"] = "rollout"  # [ref: minibatch]
    delay: NonNegativeInt = 0  # iterations before λ moves [ref]
    window: PositiveInt = 128  # newest costs that J_C averages over, all devices together [ref: per process]
    constrained_groups: tuple[str, ...] | None = None  # values of `group_field` the constraint names; null: all prompts
    group_limits: dict[str, float] | None = None  # d by value of `group_field`, each with a λ and a window of its own
    warn_unsafe_share: Share = 0.1  # warn when J_C ≤ d while a larger share of constrained responses costs more than 0

    @pydantic.field_validator("init")
    @classmethod
    def start_is_possible(cls, value: float | str, info: Any) -> float | str:
        """Checks that log λ exists, and λ is never negative."""
        if isinstance(value, str):
            return value
        if info.data.get("multiplier") == "log" and value <= 0:
            raise ValueError("must be > 0: λ is learned as log λ and never leaves 0; use algorithm.name: ppo for λ ≡ 0")
        if value < 0:
            raise ValueError("must be ≥ 0: a negative λ would reward cost")
        return value

    def idle(self) -> dict[str, str]:
        """Settings of another measure or multiplier, or of a single limit if there are several."""
        reasons: dict[str, str] = {}
        if self.group_limits is not None:
            reasons |= dict.fromkeys(("cost_limit", "warn_unsafe_share"), "each group has its limit in group_limits")
        if self.measure not in ("rectified", "rate"):
            reasons["threshold"] = f"it is of measure 'rectified' or 'rate', and measure is {self.measure!r}"
        for name, measure in {"tail": "cvar", "power": "spectral"}.items():
            if self.measure != measure:
                reasons[name] = f"it is of measure {measure!r}, and measure is {self.measure!r}"
        if self.measure == "rate":
            reasons["warn_unsafe_share"] = "measure 'rate' limits that share itself"
        if self.multiplier == "penalty":
            reasons |= dict.fromkeys(NOT_OF_PENALTY, "λ of multiplier 'penalty' is init or 0, and never moves between")
        if self.multiplier != "pid":
            reasons["pid"] = f"its gains are of multiplier 'pid', and multiplier is {self.multiplier!r}"
        return reasons

    @pydantic.model_validator(mode="after")
    def bounds_and_measure_fit(self) -> "Lagrange":
        """Checks that the multiplier starts between its bounds, and the limit fits the measure."""
        low, high = self.min_multiplier or 0.0, self.max_multiplier or float("inf")
        bounded = self.multiplier != "penalty" and not isinstance(self.init, str)
        if bounded and not low <= self.init <= high:  # type: ignore[operator]
            raise ValueError(f"init {self.init} must lie between min_multiplier {low} and max_multiplier {high}")
        if self.group_limits is not None and self.constrained_groups is not None:
            raise ValueError("group_limits names its groups itself; leave out constrained_groups")
        limits = [self.cost_limit] if self.group_limits is None else list(self.group_limits.values())
        if self.delta is not None and self.window < 2:
            raise ValueError(f"delta {self.delta} needs the spread of at least two costs, but window is {self.window}")
        if self.measure == "rectified" and any(isinstance(d, CalibratedLimit) or d < 0 for d in limits):
            raise ValueError("measure 'rectified' is never negative: cost_limit must be a number ≥ 0")
        if self.measure == "rate" and any(isinstance(d, CalibratedLimit) or not 0 <= d < 1 for d in limits):
            raise ValueError("measure 'rate' is a share of responses: cost_limit must be a number in [0, 1)")
        calibrated = isinstance(self.cost_limit, CalibratedLimit)
        if calibrated and (self.of == "reward" or self.bound == "at_least"):
            raise ValueError("a calibrated limit bounds a cost from above; give cost_limit as a number")
        return self

    @property
    def in_cost_units(self) -> bool:
        """The limit is an upper one of costs: it can be held against a cost model's scores of labelled responses."""
        return self.of == "cost" and self.bound == "at_most" and self.measure not in ("rectified", "rate")

    @property
    def named(self) -> tuple[str, ...] | None:
        """Groups of prompts that the constraint names; None: all prompts."""
        return self.constrained_groups if self.group_limits is None else tuple(self.group_limits)


class KLConfig(Schema):
    """KL regularisation towards the reference, beside `kl_coeff`."""

    place: Literal["signals", "k2", "k3"] = "signals"  # in rewards and costs [ref], or a loss with this estimator
    schedule: ScheduleName = "constant"  # of kl_coeff, by iteration
    target: PositiveFloat | None = None  # nats per response; target of a controller of kl_coeff
    gain: PositiveFloat = 0.1  # of the controller, per iteration [Ziegler et al. 2019]
    refresh_every: PositiveInt | None = None  # iterations after which the reference becomes the actor
    average: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # share of the actor in the reference, per iteration

    def idle(self) -> dict[str, str]:
        """The gain of a controller without a target."""
        without_target = {"gain": "it is of the controller that keeps to target, which is not set"}
        return without_target if self.target is None else {}

    @pydantic.model_validator(mode="after")
    def one_schedule_and_one_reference(self) -> "KLConfig":
        """Checks that at most one setting moves β, and one the reference."""
        if self.target is not None and self.schedule != "constant":
            raise ValueError(f"target {self.target} and schedule {self.schedule!r} both move kl_coeff; choose one")
        if self.refresh_every is not None and self.average is not None:
            raise ValueError("refresh_every and average both move the reference; choose one")
        return self


class AlgorithmConfig(Schema):
    """The on-policy algorithm and its scalars."""

    added: ClassVar[frozenset[str]] = frozenset({"max_sampler_weight"})
    name: Literal[
        "ppo",
        "ppo_lag",
        "repo",
        "cgpo",
        "reward_shaping",
        "rloo_lag",
        "grpo_lag",
        "p3o",
        "p3o_lag",
        "p3o_separate",
        "p3o_separate_lag",
    ] = "ppo_lag"
    kl_coeff: NonNegativeFloat = 0.01  # β, score per nat [ref ppo-lag]; in rewards and in costs
    kl: KLConfig = KLConfig()
    gamma: Share = 1.0  # [ref]
    gae_lambda: Share = 0.95  # [ref]
    clip_range_ratio: PositiveFloat = 0.2  # [ref]
    clip_range_score: PositiveFloat = 50.0  # [ref]
    clip_range_value: PositiveFloat = 5.0  # [ref]
    dual_clip: Annotated[float, Field(gt=1.0)] | None = (
        None  # bound on ρ where the advantage is negative; 3 in 1912.09729
    )
    whiten: bool = False  # advantages of a minibatch to mean 0 and variance 1
    entropy_coeff: NonNegativeFloat = 0.0  # score per nat and token
    epochs: PositiveInt = 1  # passes over a rollout [ref: update_iters]
    minibatches: PositiveInt = 1  # optimizer steps per pass
    stop_kl: PositiveFloat | None = None  # early stopping of a rollout's updates: nats per token from the sampler
    critic_warmup: NonNegativeInt = 0  # iterations in which only the critics (and λ) move
    old_log_probs: Literal["recomputed", "sampled"] = "recomputed"  # by the learner's graph, or the sampler's own
    max_sampler_weight: Annotated[float, Field(ge=1.0)] | None = None  # importance weights of tokens for the rounding
    missing_eos_penalty: NonNegativeFloat = 0.0  # subtracted from the reward of a truncated response
    ptx_coeff: NonNegativeFloat = 0.0  # weight of the language-modelling loss on `ptx` [ref scripts: 16]
    cost_weight: NonNegativeFloat = 1.0  # ν of `reward_shaping` [ref]
    lagrange: Lagrange = Lagrange()  # of `cost_model`
    constraints: dict[str, Lagrange] = Field(default_factory=dict)  # of `cost_models`, or of the reward, by name

    def idle(self) -> dict[str, str]:
        """Settings that move a coefficient fixed at 0; `stages.algorithm` has those that an algorithm ignores."""
        moves = ["kl.target"] + (["kl.schedule"] if self.kl.schedule != "constant" else [])
        idle = dict.fromkeys(moves if self.kl_coeff == 0 else (), "it moves kl_coeff, which is 0 and stays 0")
        if self.old_log_probs == "sampled":
            idle["max_sampler_weight"] = "old_log_probs 'sampled' has the sampler's log-probs in the ratio itself"
        return idle
