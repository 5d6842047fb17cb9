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
    init_window,
    push_costs,
    t_quantiles,
    window_half_width,
    window_mean,
    window_quantile,
)
from safe_rlhf_jax.types import ConstraintState, CostWindow, Metrics, Signals


@dataclasses.dataclass(frozen=True)
class Measure:
    """The constrained quantity: the mean of `cost(C, level)`, with the level computed from the window."""

    level: Callable[[CostWindow], Float[Array, ""]]
    cost: Callable[[Float[Array, "*N"], Float[Array, "*N"]], Float[Array, "*N"]]


MEAN = Measure(level=lambda window: jnp.zeros_like(window.recent[0]), cost=lambda costs, level: costs)


def rectified(threshold: float) -> Measure:
    """{C − threshold}⁺: each response counts by its excess over the threshold, and none offsets another.

    Source: Peng et al. 2024 (RePO, arXiv 2410.19933), threshold 0.
    """
    return Measure(level=MEAN.level, cost=lambda costs, level: jnp.maximum(costs - threshold, 0.0))


def tail(alpha: float) -> Measure:
    """CVaR_α, the mean of the worst 1 − α: E[η + {C − η}⁺/(1 − α)] with η the α-quantile. α = 0 is the mean.

    Source: Rockafellar and Uryasev 2000, Optimization of conditional value-at-risk.
    """
    return Measure(
        level=lambda window: window_quantile(window, alpha),
        cost=lambda costs, level: level + jnp.maximum(costs - level, 0.0) / (1.0 - alpha),
    )


@dataclasses.dataclass(frozen=True)
class Constraint:
    """measure(cost) ≤ limit on the prompts it names; scalars as in the config, which has their sources."""

    limit: Float[Array, " G"] | tuple[float, ...] = (0.0,)  # d of each slot
    lr: optax.Schedule = dataclasses.field(default_factory=lambda: optax.constant_schedule(0.1))
    multiplier: Multiplier = LOG
    measure: Measure = MEAN
    delta: float | None = None  # λ follows the upper bound of J_C with confidence 1 − δ; None: J_C
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
    level = constraint.measure.level(window)
    costs = constraint.measure.cost(window.recent, jnp.broadcast_to(level, window.recent.shape))
    return CostWindow(recent=costs, count=window.count)


def pessimistic_costs(constraint: Constraint, state: ConstraintState) -> Float[Array, " G"]:
    """What the multiplier of each slot holds against its limit: J_C, or its upper confidence bound where δ is given."""
    if constraint.delta is None:
        return mean_costs(constraint, state)
    quantiles = jnp.asarray(t_quantiles(constraint.delta, state.window.recent.shape[-1]))

    def bound(window: CostWindow) -> jax.Array:
        measured = measured_window(constraint, window)
        return window_mean(measured) + window_half_width(measured, quantiles)

    return jax.vmap(bound)(state.window)


def measured_costs(
    constraint: Constraint, state: ConstraintState, costs: Float[Array, " B"], group: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Measured cost of each row, f32[B], for the cost critic and the advantages."""
    levels = jax.vmap(constraint.measure.level)(state.window)
    return constraint.measure.cost(costs, levels[jnp.maximum(row_slots(constraint, group), 0)])


def move_multiplier(
    constraint: Constraint, state: ConstraintState, group: Int[Array, " B"], step: Int[Array, ""]
) -> ConstraintState:
    """Moves the λ of every slot with rows in `group`, once the delay is over; the others keep theirs."""
    moved = constraint.multiplier.move(
        state.multiplier,
        pessimistic_costs(constraint, state),
        cost_limit=jnp.asarray(constraint.limit, jnp.float32),
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
