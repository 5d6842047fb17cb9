"""Step 7 of the line: constraints. Costs enter the windows, λ moves, every row gets its λ.

A constraint concerns one cost signal. It has one λ for all prompts that it names, or one per group of prompts; each λ
has a *slot*: a window and a multiplier of its own, moved by the costs of its own prompts only.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from safe_rlhf_jax.rl.lagrange import (
    LOG,
    Multiplier,
    filled,
    init_window,
    push_costs,
    t_quantiles,
    window_half_width,
    window_mean,
    window_quantile,
)
from safe_rlhf_jax.types import ConstraintState, CostWindow, Metrics, Signals

# The constrained quantity: what each of the costs counts as, f32[N], beside the costs in the window. J_C is its mean.
Measure = Callable[[Float[Array, " N"], CostWindow], Float[Array, " N"]]


def mean(costs: Float[Array, " N"], window: CostWindow) -> Float[Array, " N"]:
    """C itself."""
    return costs


def rectified(threshold: float) -> Measure:
    """{C − threshold}⁺: each response counts by its excess over the threshold, and none offsets another.

    Source: Peng et al. 2024 (RePO, arXiv 2410.19933), threshold 0.
    """
    return lambda costs, window: jnp.maximum(costs - threshold, 0.0)


def rate(threshold: float) -> Measure:
    """1[C > threshold]: J_C is the share of unsafe responses, whatever the scale of the cost.

    Source: Girgis et al. 2026 (Constrained GRPO, arXiv 2602.05863), indicator costs.
    """
    return lambda costs, window: (costs > threshold).astype(jnp.float32)


def tail(alpha: float) -> Measure:
    """CVaR_α, the mean of the worst 1 − α: E[η + {C − η}⁺/(1 − α)] with η the α-quantile. α = 0 is the mean.

    Source: Rockafellar and Uryasev 2000, Optimization of conditional value-at-risk.
    """

    def measure(costs: Float[Array, " N"], window: CostWindow) -> Float[Array, " N"]:
        level = window_quantile(window, alpha)
        return level + jnp.maximum(costs - level, 0.0) / (1.0 - alpha)

    return measure


def spectral(power: float) -> Measure:
    """Quantile-weighted cost ∫ F⁻¹(u)·k·u^{k−1} du: for a whole k the expected worst of k responses. k = 1 is the mean.

    A cost c counts as ∫^c k·F(t)^{k−1} dt + const, the influence of a response on the integral, so that its policy
    gradient is that of the integral. F is the distribution of the window.

    Source: Acerbi 2002, Spectral measures of risk. Chittepu et al. 2026 (RAD, arXiv 2603.10938) weight quantiles in
    this way; their constraint compares each quantile with the reference policy's, by optimal transport: not here.

    Args:
        power: k ≥ 1.
    """

    def measure(costs: Float[Array, " N"], window: CostWindow) -> Float[Array, " N"]:
        size = window.recent.shape[0]
        ascending = jnp.sort(jnp.where(filled(window), window.recent, jnp.inf))  # empty entries come last
        rank = jnp.arange(size + 1, dtype=jnp.float32)
        share = jnp.minimum(rank / jnp.maximum(window.count, 1), 1.0)  # F below the first cost, up to the second, …
        slope = power * share ** (power - 1.0)

        def influence(cost: Float[Array, ""]) -> Float[Array, ""]:
            above = jnp.clip(cost - ascending, 0.0, jnp.append(ascending[1:], jnp.inf) - ascending)
            below = jnp.minimum(cost - ascending[0], 0.0)
            return slope[0] * below + jnp.where(ascending < jnp.inf, slope[1:] * above, 0.0).sum()

        integral = jnp.where(ascending < jnp.inf, ascending * jnp.diff(share**power), 0.0).sum()
        own = window_mean(CostWindow(recent=jax.vmap(influence)(window.recent), count=window.count))
        counted = jax.vmap(influence)(costs) + integral - own
        return jnp.where(window.count > 0, counted, costs)

    return measure


@dataclasses.dataclass(frozen=True)
class Constraint:
    """measure(score) ≤ or ≥ limit on the prompts it names; scalars as in the config, which has their sources."""

    limit: Float[Array, " G"] | tuple[float, ...] = (0.0,)  # d of each slot
    lr: optax.Schedule = dataclasses.field(default_factory=lambda: optax.constant_schedule(0.1))
    multiplier: Multiplier = LOG
    measure: Measure = mean
    delta: float | None = None  # λ follows the bound of J_C with confidence 1 − δ; None: J_C
    sign: int = +1  # −1: measure(score) ≥ limit
    of: str | None = None  # signal whose scores it limits; None: its own
    slots: tuple[int, ...] | None = None  # slot by prompt group, −1 where the constraint does not apply; None: all in 0
    names: tuple[str, ...] = ("",)  # of the slots, in metrics
    every: str = "rollout"  # or "minibatch"
    delay: int = 0  # iterations before λ moves
    max_multiplier: float | None = None
    min_multiplier: float = 0.0


def init_constraint(constraint: Constraint, *, multiplier: float | Float[Array, ""], window: int) -> ConstraintState:
    """Returns empty windows of `window` costs and λ = `multiplier`, one of each per slot."""
    slots = len(constraint.names)
    windows = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), init_window(window))
    state = constraint.multiplier.init(jnp.full((slots,), multiplier, jnp.float32))
    # Copies, because the state is donated: no two of its arrays may share a buffer.
    return ConstraintState(window=windows, multiplier=jax.tree.map(jnp.copy, state))


def row_slots(constraint: Constraint, group: Int[Array, " B"]) -> Int[Array, " B"]:
    """Slot of each row, i32[B]; −1 where the constraint does not apply."""
    if constraint.slots is None:
        return jnp.zeros_like(group)
    return jnp.asarray(constraint.slots, jnp.int32)[group]


def named_rows(constraint: Constraint, group: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Rows whose prompt the constraint names, bool[B]."""
    return row_slots(constraint, group) >= 0


def push_all(
    constraint: Constraint, state: ConstraintState, costs: Float[Array, " B"], group: Int[Array, " B"]
) -> ConstraintState:
    """Pushes each cost into the window of its row's slot."""
    slot = jnp.arange(len(constraint.names), dtype=jnp.int32)
    counted = row_slots(constraint, group)[None] == slot[:, None]
    window = jax.vmap(push_costs, in_axes=(0, None, 0))(state.window, costs, counted)
    return ConstraintState(window=window, multiplier=state.multiplier)


def mean_costs(constraint: Constraint, state: ConstraintState) -> Float[Array, " G"]:
    """J_C of each slot: the mean of the measured costs in its window."""
    return jax.vmap(lambda window: window_mean(measured_window(constraint, window)))(state.window)


def measured_window(constraint: Constraint, window: CostWindow) -> CostWindow:
    """The window of a slot with what each of its costs counts for."""
    return CostWindow(recent=constraint.measure(window.recent, window), count=window.count)


def pessimistic_costs(constraint: Constraint, state: ConstraintState) -> Float[Array, " G"]:
    """What the multiplier of each slot holds against its limit: J_C, or its confidence bound where δ is given.

    The upper bound for J_C ≤ d, the lower one for J_C ≥ d.
    """
    if constraint.delta is None:
        return mean_costs(constraint, state)
    quantiles = jnp.asarray(t_quantiles(constraint.delta, state.window.recent.shape[-1]))

    def bound(window: CostWindow) -> jax.Array:
        measured = measured_window(constraint, window)
        return window_mean(measured) + constraint.sign * window_half_width(measured, quantiles)

    return jax.vmap(bound)(state.window)


def measured_costs(
    constraint: Constraint, state: ConstraintState, costs: Float[Array, " B"], group: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Measured cost of each row, f32[B], for the cost critic and the advantages: more of it is worse."""
    by_slot = jax.vmap(constraint.measure, in_axes=(None, 0))(costs, state.window)
    slot = jnp.maximum(row_slots(constraint, group), 0)[None]
    return constraint.sign * jnp.take_along_axis(by_slot, slot, axis=0)[0]


def move_multiplier(
    constraint: Constraint, state: ConstraintState, group: Int[Array, " B"], step: Int[Array, ""]
) -> ConstraintState:
    """Moves the λ of every slot with rows in `group`, once the delay is over; the others keep theirs."""
    moved = constraint.multiplier.move(
        state.multiplier,
        constraint.sign * pessimistic_costs(constraint, state),
        cost_limit=constraint.sign * jnp.asarray(constraint.limit, jnp.float32),
        lr=constraint.lr(step),
        max_multiplier=constraint.max_multiplier,
        min_multiplier=constraint.min_multiplier,
    )
    slot = jnp.arange(len(constraint.names), dtype=jnp.int32)
    seen = (row_slots(constraint, group)[None] == slot[:, None]).any(-1) & (step >= constraint.delay)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(seen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return ConstraintState(window=state.window, multiplier=jax.tree.map(choose, moved, state.multiplier))


def row_multipliers(
    constraints: dict[str, Constraint], states: dict[str, ConstraintState], group: Int[Array, " B"]
) -> Signals:
    """λ_k of each row, f32[B, 1] by cost signal; 0 where the constraint does not apply."""
    rows = {}
    for signal, constraint in constraints.items():
        multiplier, slot = constraint.multiplier.read(states[signal].multiplier), row_slots(constraint, group)
        rows[signal] = jnp.where(slot >= 0, multiplier[jnp.maximum(slot, 0)], 0.0)[:, None]
    return rows


def slot_metrics(signal: str, name: str, constraint: Constraint, values: Float[Array, " G"]) -> Metrics:
    """One metric per slot: `name`, `name/<constraint>`, `name/<group>`."""
    suffix = signal.removeprefix("cost")
    return {f"{name}{suffix}{slot and '/' + slot}": value for slot, value in zip(constraint.names, values, strict=True)}


def multiplier_metrics(constraints: dict[str, Constraint], states: dict[str, ConstraintState]) -> Metrics:
    """λ of every constraint and slot."""
    metrics: Metrics = {}
    for signal, constraint in constraints.items():
        metrics |= slot_metrics(signal, "multiplier", constraint, constraint.multiplier.read(states[signal].multiplier))
    return metrics


def by_group(groups: tuple[str, ...], named: tuple[str, ...] | None, *, separate: bool) -> tuple[int, ...] | None:
    """Returns the slot of each group of prompts: one shared by all named groups, or one each.

    Args:
        groups: Names of the prompt groups, by index.
        named: Those that the constraint names; None: all.
        separate: Each named group has a slot of its own, in the order of `named`.
    """
    if named is None:
        return None
    return tuple((named.index(name) if separate else 0) if name in named else -1 for name in groups)
