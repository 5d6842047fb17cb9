"""Trains in a world whose constrained optimum is known, with the learner that trains language models, and compares.

    python benchmarks/constrained_optimum.py --json benchmarks/results/constrained_optimum.json

Four prompts, six tokens, responses of three tokens: 216 responses to each prompt. Reward and cost are random tables
with correlation 0.5, the reference is a random policy with full support. So the policy that an algorithm should end at
can be computed: for Safe RLHF it is π* ∝ π_ref·exp((r − λc)/((1 + λ)β)) with the λ at which E[c] = d.

What is replaced: networks are tables (or a small MLP), and responses are sampled from the policy's own logits instead
of by `generate`. Everything after sampling is `rl.step.learn`: scoring, windows and λ, advantages, updates.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from safe_rlhf_jax.ops import response_log_probs
from safe_rlhf_jax.optim import init_state, make_optimizer, schedule
from safe_rlhf_jax.rl import step as step_module
from safe_rlhf_jax.rl import update as update_module
from safe_rlhf_jax.rl.advantages import token_scores
from safe_rlhf_jax.rl.algorithms import ALGORITHMS, Algorithm
from safe_rlhf_jax.rl.constraints import Constraint, Measure, init_constraint, rectified, tail
from safe_rlhf_jax.rl.hyperparameters import Hyperparameters
from safe_rlhf_jax.rl.kl import KL_LOSSES, KLControl
from safe_rlhf_jax.rl.lagrange import LOG, PROJECTED, Multiplier, pid_multiplier
from safe_rlhf_jax.rl.rollout import Networks, score_rollout
from safe_rlhf_jax.rl.update import response_mask
from safe_rlhf_jax.types import Frozen, RLState, Rollout

PROMPTS, TOKENS, LENGTH = 4, 6, 3
RESPONSES = TOKENS**LENGTH
BETA = 0.5
OFFSETS = np.cumsum([0, *(PROMPTS * TOKENS**depth for depth in range(LENGTH + 1))])  # first node of each depth
Table = Any  # f64[PROMPTS, RESPONSES]


# --- Networks as tables: a node is a prompt and the tokens so far.


def nodes(tokens: jax.Array) -> jax.Array:
    """Node of every column, i32[B, L]."""
    code, columns = tokens[:, 0], []
    for depth in range(LENGTH + 1):
        code = code * TOKENS + tokens[:, depth] if depth else code
        columns.append(OFFSETS[depth] + code)
    return jnp.stack(columns, axis=1)


class TablePolicy(nn.Module):
    """Logits by node; the methods of a `CausalLM` that learning needs."""

    @nn.compact
    def hidden(self, tokens: jax.Array, mask: jax.Array, first: int = 0) -> jax.Array:
        """Logits, which `unembed` passes on."""
        table = self.param("table", nn.initializers.normal(1.0), (int(OFFSETS[LENGTH]), TOKENS))
        return table[jnp.minimum(nodes(tokens), OFFSETS[LENGTH] - 1)[:, first:]]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits f32[B, l, V]."""
        return hidden


class MLPPolicy(nn.Module):
    """Logits of a small network that reads prompt and tokens so far, so that nodes are not independent."""

    @nn.compact
    def hidden(self, tokens: jax.Array, mask: jax.Array, first: int = 0) -> jax.Array:
        """Logits, which `unembed` passes on."""
        seen = jnp.tril(jnp.ones((LENGTH + 1, LENGTH + 1), jnp.float32))
        features = jax.nn.one_hot(tokens, TOKENS)[:, None] * seen[None, :, :, None]  # [B, column, token, V]
        x = features.reshape(*features.shape[:2], -1)
        for _ in range(2):
            x = nn.tanh(nn.Dense(128)(x))
        return nn.Dense(TOKENS)(x)[:, first:]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits f32[B, l, V]."""
        return hidden


class TableScore(nn.Module):
    """A score by node: a scorer or a critic."""

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, first: int = 0) -> jax.Array:
        """Scores f32[B, L − first]."""
        return self.param("table", nn.initializers.zeros, (int(OFFSETS[-1]),))[nodes(tokens)[:, first:]]


# --- The world, and the policies that algorithms should end at


@dataclasses.dataclass(frozen=True)
class World:
    """Tables of one random world."""

    reward: Table
    costs: tuple[Table, Table]  # the second for cases with two constraints
    ref_params: Any
    reference: Table  # its probabilities


def make_world(seed: int, policy: nn.Module) -> World:
    """Unit-variance tables; each cost has correlation 0.5 with the reward: what helps tends to harm."""
    rng = np.random.default_rng(seed)
    reward, *noise = rng.normal(size=(3, PROMPTS, RESPONSES))
    costs = [0.5 * reward + np.sqrt(0.75) * n for n in noise]
    tokens = jnp.zeros((1, 1 + LENGTH), jnp.int32)
    params = policy.init(jax.random.key(seed), tokens, tokens == 0, method="hidden")["params"]
    return World(reward, (costs[0], costs[1]), params, probabilities(policy, params))


def all_sequences() -> jax.Array:
    """Every prompt with every response, i32[PROMPTS · RESPONSES, 1 + LENGTH]."""
    grid = np.indices((PROMPTS, *[TOKENS] * LENGTH)).reshape(1 + LENGTH, -1).T
    return jnp.asarray(grid, jnp.int32)


def probabilities(policy: nn.Module, params: Any) -> Table:
    """π(y | x) of every response."""
    sequences, params = all_sequences(), jax.tree.map(jnp.asarray, params)
    log_probs = response_log_probs(policy, params, sequences, jnp.ones_like(sequences, dtype=bool), prompt_length=1)
    return np.exp(np.asarray(log_probs, np.float64).sum(-1)).reshape(PROMPTS, RESPONSES)


def expectation(policy: Table, table: Table) -> float:
    """Mean over prompts of E[table]."""
    return float((policy * table).sum(1).mean())


def divergence(p: Table, q: Table) -> float:
    """Mean over prompts of KL(p ‖ q), nats."""
    return expectation(p, np.log(p) - np.log(q))


def tilted(reference: Table, score: Table) -> Table:
    """π ∝ π_ref·exp(score) for each prompt."""
    weight = np.log(reference) + score
    weight = np.exp(weight - weight.max(1, keepdims=True))
    return weight / weight.sum(1, keepdims=True)


def without_future_kl(reference: Table, score: Table) -> Table:
    """Where a per-token KL loss ends: π(a | s) ∝ π_ref(a | s)·exp(E_π[score | s, a]), no KL of later tokens."""
    shape = (PROMPTS, *[TOKENS] * LENGTH)
    joint, value, policy = reference.reshape(shape), score.reshape(shape), np.ones(shape)
    for depth in range(LENGTH, 0, -1):
        below = joint.reshape(*shape[: depth + 1], -1).sum(-1)
        conditional = below / below.sum(-1, keepdims=True)
        weight = conditional * np.exp(value - value.max(-1, keepdims=True))
        conditional = weight / weight.sum(-1, keepdims=True)
        policy = policy * conditional.reshape(*conditional.shape, *[1] * (LENGTH - depth))
        value = (conditional * value).sum(-1)
    return policy.reshape(PROMPTS, RESPONSES)


def bisect(excess: Callable[[float], float], low: float = 0.0, high: float = 1e3) -> float:
    """The root of a falling function, 0 where it starts below zero."""
    if excess(low) <= 0:
        return low
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Where an algorithm should end."""

    limits: Any  # f64[constraints, slots]
    multipliers: Any  # f64[constraints, slots]
    policy: Table


Tilt = Callable[[Table, Table], Table]  # (reference, score) -> policy
GROUPS = (0, 0, 1, 1)  # of the prompts, for the case with a λ per group


def combined_score(world: World, cost: Table, multiplier: float, *, divided: bool) -> Table:
    """(r − λc)/((1 + λ)β), or without the division by 1 + λ."""
    return (world.reward - multiplier * cost) / (BETA * (1.0 + multiplier if divided else 1.0))


def one_constraint(world: World, cost: Table, *, divided: bool = True, tilt: Tilt = tilted) -> Optimum:
    """The limit lies midway between the costs at λ = 0 and at λ → ∞ (of the divided form)."""
    free, bound = tilt(world.reference, world.reward / BETA), tilt(world.reference, -cost / BETA)
    limit = (expectation(free, cost) + expectation(bound, cost)) / 2

    def policy(multiplier: float) -> Table:
        return tilt(world.reference, combined_score(world, cost, multiplier, divided=divided))

    multiplier = bisect(lambda x: expectation(policy(x), cost) - limit)
    return Optimum(np.array([[limit]]), np.array([[multiplier]]), policy(multiplier))


def mean_cost(world: World) -> Optimum:
    """Safe RLHF: π ∝ π_ref·exp((r − λc)/((1 + λ)β))."""
    return one_constraint(world, world.costs[0])


def plain_lagrangian(world: World) -> Optimum:
    """π ∝ π_ref·exp((r − λc)/β)."""
    return one_constraint(world, world.costs[0], divided=False)


def token_kl(world: World) -> Optimum:
    """Safe RLHF with a per-token KL loss."""
    return one_constraint(world, world.costs[0], tilt=without_future_kl)


def rectified_cost(world: World) -> Optimum:
    """Safe RLHF on {c}⁺."""
    return one_constraint(world, np.maximum(world.costs[0], 0.0))


def unconstrained(world: World) -> Optimum:
    """PPO: π ∝ π_ref·exp(r/β)."""
    return Optimum(np.zeros((0, 1)), np.zeros((0, 1)), tilted(world.reference, world.reward / BETA))


def shaped(world: World) -> Optimum:
    """R − νC: π ∝ π_ref·exp((r − νc)/β)."""
    policy = tilted(world.reference, combined_score(world, world.costs[0], COST_WEIGHT, divided=False))
    return Optimum(np.zeros((0, 1)), np.zeros((0, 1)), policy)


def two_groups(world: World) -> Optimum:
    """A constraint for each group of prompts: two problems that share nothing."""
    parts = []
    for group in range(2):
        rows = np.array(GROUPS) == group
        part = World(world.reward[rows], (world.costs[0][rows], world.costs[1][rows]), None, world.reference[rows])
        parts.append(one_constraint(part, part.costs[0]))
    policy = np.concatenate([part.policy for part in parts])  # groups are in the order of the prompts
    limits, multipliers = (np.array([[getattr(p, n)[0, 0] for p in parts]]) for n in ("limits", "multipliers"))
    return Optimum(limits, multipliers, policy)


def two_constraints(world: World) -> Optimum:
    """π ∝ π_ref·exp((r − λ_1c_1 − λ_2c_2)/((1 + λ_1 + λ_2)β)); each limit midway between λ = 0 and λ_1 = λ_2 → ∞."""
    first, second = world.costs
    ends = [tilted(world.reference, x / BETA) for x in (world.reward, -(first + second) / 2)]
    limits = [np.mean([expectation(end, cost) for end in ends]) for cost in world.costs]

    def policy(a: float, b: float) -> Table:
        score = (world.reward - a * first - b * second) / (BETA * (1.0 + a + b))
        return tilted(world.reference, score)

    def inner(b: float) -> float:
        return bisect(lambda a: expectation(policy(a, b), first) - limits[0], high=50.0)

    b = bisect(lambda b: expectation(policy(inner(b), b), second) - limits[1], high=50.0)
    return Optimum(np.array(limits)[:, None], np.array([[inner(b)], [b]]), policy(inner(b), b))


def value_at_risk(policy: Table, cost: Table) -> tuple[float, float]:
    """VaR and CVaR of the cost at ALPHA, over all prompts."""
    order = np.argsort(cost, axis=None)
    mass = np.cumsum(policy.ravel()[order]) / PROMPTS
    level = float(cost.ravel()[order][np.searchsorted(mass, ALPHA)])
    return level, level + expectation(policy, np.maximum(cost - level, 0.0)) / (1.0 - ALPHA)


def worst_costs(world: World) -> Optimum:
    """CVaR ≤ d: Safe RLHF on η + {c − η}⁺/(1 − α), where η is the policy's own α-quantile: a fixed point."""
    cost = world.costs[0]
    ends = [tilted(world.reference, x / BETA) for x in (world.reward, -cost)]
    limit = float(np.mean([value_at_risk(end, cost)[1] for end in ends]))

    def given(level: float) -> tuple[float, Table]:
        measured = level + np.maximum(cost - level, 0.0) / (1.0 - ALPHA)

        def policy(multiplier: float) -> Table:
            return tilted(world.reference, combined_score(world, measured, multiplier, divided=True))

        multiplier = bisect(lambda x: expectation(policy(x), measured) - limit)
        return multiplier, policy(multiplier)

    level = bisect(lambda x: value_at_risk(given(x)[1], cost)[0] - x, low=float(cost.min()), high=float(cost.max()))
    multiplier, policy = given(level)
    return Optimum(np.array([[limit]]), np.array([[multiplier]]), policy)


def normalized_groups(world: World) -> Optimum:
    """Group-normalised: Safe RLHF with a KL loss on r/σ_r(x) and c/σ_c(x), σ under the policy itself: a fixed point."""
    cost = world.costs[0]
    limit = float(mean_cost(world).limits[0, 0])

    def policy(multiplier: float) -> Table:
        out = world.reference
        for _ in range(300):

            def scaled(table: Table, out: Table = out) -> Table:
                mean = (out * table).sum(1, keepdims=True)
                return table / np.sqrt((out * (table - mean) ** 2).sum(1, keepdims=True))

            score = (scaled(world.reward) - multiplier * scaled(cost)) / (BETA * (1.0 + multiplier))
            out = np.sqrt(out * without_future_kl(world.reference, score))
            out /= out.sum(1, keepdims=True)
        return out

    multiplier = bisect(lambda x: expectation(policy(x), cost) - limit, high=50.0)
    return Optimum(np.array([[limit]]), np.array([[multiplier]]), policy(multiplier))


# --- Cases


COST_WEIGHT = 1.0  # ν
ALPHA = 0.75
BATCH = 512  # responses per iteration
ITERATIONS = 800


def mean_of(world: World, policy: Table) -> Any:
    """E[c], f64[1, 1]."""
    return np.array([[expectation(policy, world.costs[0])]])


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm, where it should end, and how near it has to come."""

    algorithm: str
    optimum: Callable[[World], Optimum]
    starts: tuple[float, ...] = (1.0,)  # λ at the start
    measured: Callable[[World, Table], Any] = mean_of  # what is constrained, of a policy
    multiplier: Multiplier = LOG
    measure: Measure | None = None
    signals: tuple[str, ...] = ("cost",)
    slots: int = 1
    num_responses: int = 1
    policy: type[nn.Module] = TablePolicy
    lr: float = 0.1  # Adam's, of the policy
    window: int = BATCH
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    regret: float = 0.002
    violation: float = 0.02
    multiplier_error: float = 0.05
    oscillation: float = 0.03


CASES: dict[str, Case] = {
    "ppo_lag": Case("ppo_lag", mean_cost, starts=(0.3, 1.0, 5.0)),
    "ppo_lag, projected λ": Case("ppo_lag", mean_cost, starts=(0.01, 1.0), multiplier=PROJECTED),
    "ppo_lag, PID": Case(
        "ppo_lag",
        mean_cost,
        multiplier=pid_multiplier(proportional=0.1, derivative=0.01, smoothing=0.95, delay=10),
        multiplier_error=0.1,
        oscillation=0.05,
    ),
    "ppo_lag, MLP policy": Case("ppo_lag", mean_cost, policy=MLPPolicy, lr=0.01, regret=0.006),
    "ppo_lag, two constraints": Case(
        "ppo_lag",
        two_constraints,
        signals=("cost/a", "cost/b"),
        measured=lambda world, policy: np.array([[expectation(policy, cost)] for cost in world.costs]),
    ),
    "ppo_lag, a λ per group": Case(
        "ppo_lag",
        two_groups,
        slots=2,
        measured=lambda world, policy: (policy * world.costs[0]).sum(1).reshape(1, 2, 2).mean(-1),
    ),
    "ppo_lag, rectified cost": Case(
        "ppo_lag",
        rectified_cost,
        measure=rectified(0.0),
        measured=lambda world, policy: np.array([[expectation(policy, np.maximum(world.costs[0], 0.0))]]),
    ),
    "ppo_lag, CVaR": Case(
        "ppo_lag",
        worst_costs,
        measure=tail(ALPHA),
        measured=lambda world, policy: np.array([[value_at_risk(policy, world.costs[0])[1]]]),
        # The quantile of finitely many costs jumps between them, and the policy follows it back and forth.
        regret=0.01,
        violation=0.06,
        multiplier_error=0.15,
    ),
    "ppo_lag, k2 loss": Case(
        "ppo_lag",
        token_kl,
        settings={"kl": KLControl(loss=KL_LOSSES["k2"])},
        regret=0.005,  # its gradient is noisy at the optimum too, where those with KL in the signals vanish
    ),
    "rloo_lag": Case("rloo_lag", mean_cost, num_responses=8),
    "grpo_lag": Case(
        "grpo_lag",
        normalized_groups,
        num_responses=64,
        settings={"kl": KLControl(loss=KL_LOSSES["k2"])},
        regret=0.025,  # the spread is estimated from n responses: 5 % with 16
    ),
    "p3o_lag": Case("p3o_lag", plain_lagrangian, num_responses=2),
    "p3o_separate_lag": Case("p3o_separate_lag", plain_lagrangian, num_responses=2),
    "p3o": Case("p3o", unconstrained, num_responses=2, signals=()),
    "reward_shaping": Case("reward_shaping", shaped, signals=(), settings={"cost_weight": COST_WEIGHT}),
    "ppo": Case("ppo", unconstrained, signals=(), regret=0.003),
}


# --- Planted faults, each of which has to show


def swapped_critics(*args: Any, **kwargs: Any) -> Any:
    """The critics' values change places."""
    scored = score_rollout(*args, **kwargs)
    return scored.replace(values={"reward": scored.values["cost"], "cost": scored.values["reward"]})


def early_score(score: jax.Array, log_ratio: jax.Array, mask: jax.Array, **scalars: Any) -> jax.Array:
    """The score lands one token before the last."""
    early = jnp.arange(LENGTH)[None] == LENGTH - 2
    return token_scores(0.0 * score, log_ratio, mask, **scalars) + jnp.where(early, score[:, None], 0.0)


def without_last(hp: Hyperparameters, rollout: Rollout) -> jax.Array:
    """The last response token is masked."""
    return response_mask(hp, rollout) & (jnp.arange(LENGTH) < LENGTH - 1)[None]


# What each replaces: (module, name, by what), or a field of the algorithm.
FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "critics swapped": [(step_module, "score_rollout", swapped_critics)],
    "KL left out of the cost stream": [(Algorithm, "cost_kl_sign", 0)],
    "KL of the cost stream with the wrong sign": [(Algorithm, "cost_kl_sign", -1)],
    "score one token early": [(step_module, "token_scores", early_score)],
    "last token masked": [
        (step_module, "response_mask", without_last),
        (update_module, "response_mask", without_last),
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


# --- Training


def respond(policy: nn.Module, params: Any, case: Case, key: jax.Array) -> Rollout:
    """Samples responses exactly; every prompt comes equally often, responses to one prompt stand together."""
    prompts = jnp.repeat(jnp.arange(BATCH // case.num_responses, dtype=jnp.int32) % PROMPTS, case.num_responses)
    tokens = jnp.zeros((BATCH, 1 + LENGTH), jnp.int32).at[:, 0].set(prompts)
    log_probs = []
    for t in range(LENGTH):
        logits = policy.apply({"params": params}, tokens, tokens >= 0, method="hidden")[:, t]
        token = jax.random.categorical(jax.random.fold_in(key, t), logits)
        log_probs.append(jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0])
        tokens = tokens.at[:, t + 1].set(token.astype(jnp.int32))
    group = jnp.asarray(GROUPS, jnp.int32)[prompts]
    return Rollout(tokens, jnp.ones_like(tokens, dtype=bool), jnp.stack(log_probs, 1), group)


def start(case: Case, reference: Any, limits: Any, multiplier: Any, iterations: int) -> tuple[Networks, Any, RLState]:
    """Networks, hyperparameters and state: the actor is the reference, the critics are 0."""
    algorithm = ALGORITHMS[case.algorithm]

    def rate(lr: float) -> Any:
        return schedule("hold_linear", lr=lr, warmup_ratio=0.0, total_steps=iterations)

    def adam(lr: float) -> Any:
        return make_optimizer(rate(lr), b2=0.999, max_grad_norm=None)

    constraints = {
        signal: Constraint(
            limit=limits[i],
            lr=rate(0.1),
            multiplier=case.multiplier,
            max_multiplier=10.0,  # log λ runs away where the policy is slower than λ
            slots=tuple(range(case.slots)) if case.slots > 1 else None,
            names=tuple("ab"[: case.slots]) if case.slots > 1 else ("",),
        )
        for i, signal in enumerate(case.signals)
    }
    if case.measure is not None:
        constraints = {k: dataclasses.replace(c, measure=case.measure) for k, c in constraints.items()}
    hp = Hyperparameters(
        prompt_length=1,
        response_length=LENGTH,
        eos_id=-1,
        pad_id=-1,
        num_responses=case.num_responses,
        kl_coeff=BETA,
        constraints=constraints,
        **case.settings,
    )
    policy, score = case.policy(), TableScore()
    costs = case.signals or ("cost",)
    critics = hp.signals if algorithm.baseline is None else ()
    networks = Networks(
        policy, dict.fromkeys(("reward", *costs), score), dict.fromkeys(critics, score), adam(case.lr),
        dict.fromkeys(critics, adam(0.2)),
    )  # fmt: skip
    zeros = {"table": jnp.zeros((int(OFFSETS[-1]),), jnp.float32)}
    state = RLState(
        step=jnp.int32(0),
        actor=init_state(reference, networks.actor_optimizer),
        critics={signal: init_state(zeros, networks.critic_optimizers[signal]) for signal in critics},
        constraints={
            signal: init_constraint(constraint, multiplier=multiplier, window=case.window // case.slots)
            for signal, constraint in constraints.items()
        },
    )
    return networks, hp, state


def score_table(table: Table) -> Any:
    """A whole response's score at its node, 0 elsewhere."""
    return {"params": {"table": np.concatenate([np.zeros(OFFSETS[LENGTH]), table.ravel()]).astype(np.float32)}}


def frozen_of(case: Case, world: World) -> Frozen:
    """Reference and scorers of a world."""
    costs = dict(zip(case.signals or ("cost",), world.costs, strict=False))
    scorers = {signal: score_table(table) for signal, table in ({"reward": world.reward} | costs).items()}
    return Frozen(reference=world.ref_params, scorers=scorers)


def train(case: Case, runs: list[tuple[World, Optimum, float, int]], iterations: int) -> tuple[Any, Any]:
    """Trains every run (world, optimum, λ at the start, seed) at once; returns final parameters and λ by iteration."""

    def one(frozen: Frozen, limits: Any, multiplier: Any, seed: Any) -> tuple[Any, Any]:
        networks, hp, state = start(case, frozen.reference, limits, multiplier, iterations)
        algorithm = ALGORITHMS[case.algorithm]

        def iterate(state: RLState, key: jax.Array) -> tuple[RLState, Any]:
            rollout = respond(networks.policy, state.actor.params, case, key)
            state, _ = step_module.learn(networks, algorithm, hp, state, frozen, rollout, None, key)
            return state, [c.multiplier.read(state.constraints[s].multiplier) for s, c in hp.constraints.items()]

        keys = jax.random.split(jax.random.key(seed), iterations)
        state, multipliers = jax.lax.scan(iterate, state, keys)
        return state.actor.params, multipliers

    frozen = jax.tree.map(lambda *x: jnp.stack(x), *(frozen_of(case, world) for world, *_ in runs))
    limits = jnp.stack([jnp.asarray(optimum.limits, jnp.float32) for _, optimum, *_ in runs])
    multipliers = jnp.asarray([multiplier for *_, multiplier, _ in runs], jnp.float32)
    seeds = jnp.asarray([seed for *_, seed in runs], jnp.int32)
    return jax.device_get(jax.jit(jax.vmap(one))(frozen, limits, multipliers, seeds))


def compare(case: Case, world: World, optimum: Optimum, params: Any, multipliers: Any) -> dict[str, Any]:
    """Exact figures of a trained policy beside those of the optimum."""
    policy = probabilities(case.policy(), params)
    row = {
        name: {"reached": float(function(policy)), "optimum": float(function(optimum.policy))}
        for name, function in {
            "reward": lambda p: expectation(p, world.reward),
            "cost": lambda p: expectation(p, world.costs[0]),
            "kl": lambda p: divergence(p, world.reference),
        }.items()
    }
    regret = divergence(policy, optimum.policy) / divergence(world.reference, optimum.policy)
    out: dict[str, Any] = row | {"regret": regret}
    if case.signals:
        history = np.stack(multipliers)  # [constraints, iterations, slots]
        last = history[:, -history.shape[1] // 10 :]
        reached, exact = history[:, -1], optimum.multipliers
        out |= {
            "limit": optimum.limits.ravel().tolist(),
            "violation": float(np.abs(case.measured(world, policy) - optimum.limits).max()),
            "multiplier": {"reached": reached.ravel().tolist(), "optimum": exact.ravel().tolist()},
            "multiplier_error": float(np.abs(reached / exact - 1.0).max()),
            "oscillation": float((last.std(1) / last.mean(1)).max()),
        }
    return out


def within(case: Case, result: dict[str, Any]) -> bool:
    """Whether a run is as near its optimum as the case demands."""
    names = ("regret", "violation", "multiplier_error", "oscillation")
    return all(result[name] <= getattr(case, name) for name in names if name in result)


def run_case(case: Case, seeds: range, iterations: int = ITERATIONS) -> list[dict[str, Any]]:
    """Trains a case for every seed and start of λ."""
    runs = []
    for seed in seeds:
        world = make_world(seed, case.policy())
        optimum = case.optimum(world)
        runs += [(world, optimum, multiplier, seed) for multiplier in case.starts]
    params, multipliers = train(case, runs, iterations)
    results = []
    for i, (world, optimum, multiplier, seed) in enumerate(runs):
        result = compare(case, world, optimum, *jax.tree.map(lambda x, i=i: x[i], (params, multipliers)))
        result |= {"seed": seed, "start": multiplier}
        results.append(result | {"within": within(case, result)})
    return results


ERRORS = ("regret", "violation", "multiplier_error", "oscillation")


def worst(results: list[dict[str, Any]]) -> dict[str, float]:
    """The largest of each error over the runs."""
    return {name: max(result[name] for result in results) for name in ERRORS if name in results[0]}


def tables(report: dict[str, Any]) -> str:
    """Markdown: the largest errors of every case and fault, and each run of `ppo_lag` beside its optimum."""
    lines = ["| case | within | regret | \\|E[c] − d\\| | λ/λ* − 1 | oscillation of λ |", "|---|---|---|---|---|---|"]
    for name, entry in report["cases"].items():
        cells = []
        for error in ERRORS:
            scale, unit = (1, "") if error == "violation" else (100, " %")
            pair = [scale * entry[key][error] for key in ("worst", "bounds") if error in entry[key]]
            cells.append(f"{pair[0]:.2g}{unit} ({pair[1]:.2g})" if pair else "–")
        within_ = sum(run["within"] for run in entry["runs"])
        lines.append(f"| {name} | {within_} of {len(entry['runs'])} | {' | '.join(cells)} |")
    lines += ["", "| fault planted in `ppo_lag` | regret, least to largest | within |", "|---|---|---|"]
    for name, entry in report["faults"].items():
        regrets = [run["regret"] for run in entry["runs"]]
        within_ = sum(run["within"] for run in entry["runs"])
        lines.append(f"| {name} | {min(regrets):.1%} to {max(regrets):.1%} | {within_} of {len(regrets)} |")
    lines += ["", "| seed | λ at the start | E[r] | E[c] | d | KL | λ | regret |", "|---|---|---|---|---|---|---|---|"]
    for run in report["cases"]["ppo_lag"]["runs"]:
        beside = [f"{run[key]['reached']:.4f} ({run[key]['optimum']:.4f})" for key in ("reward", "cost", "kl")]
        multiplier = f"{run['multiplier']['reached'][0]:.4f} ({run['multiplier']['optimum'][0]:.4f})"
        cells = [*beside[:2], f"{run['limit'][0]:.4f}", beside[2], multiplier, f"{run['regret']:.3%}"]
        lines.append(f"| {run['seed']} | {run['start']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[*CASES, *FAULTS], default=[*CASES, *FAULTS])
    parser.add_argument("--table", type=pathlib.Path, help="print the tables of a finished report, and train nothing")
    args = parser.parse_args()
    if args.table:
        print(tables(json.loads(args.table.read_text())), end="")
        return
    report: dict[str, Any] = {"jax": jax.__version__, "backend": jax.default_backend(), "cases": {}, "faults": {}}
    for name in args.only:
        begun, seeds = time.perf_counter(), range(args.seeds)
        results = run_case(CASES[name], seeds) if name in CASES else run_fault(name, seeds)
        case = CASES.get(name, CASES["ppo_lag"])
        report["cases" if name in CASES else "faults"][name] = {
            "target": (case.optimum.__doc__ or "").split("\n")[0],
            "bounds": {error: getattr(case, error) for error in worst(results)},
            "worst": worst(results),
            "runs": results,
        }
        shown = "  ".join(f"{key} {value:.4f}" for key, value in worst(results).items())
        passed, seconds = sum(r["within"] for r in results), time.perf_counter() - begun
        print(f"{name}: {passed} of {len(results)} within; worst {shown}  ({seconds:.0f} s)", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
