"""Trains in a world with a known constrained optimum, with the learner of language models, and compares.

Networks are tables (or a small MLP), and responses are sampled from the policy's own logits instead of by `generate`.
Everything after sampling is `rl.step.learn`: scoring, windows and λ, advantages, updates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from safe_rlhf_jax.models.adapters import Adapted, on
from safe_rlhf_jax.optim import init_state, make_optimizer, schedule
from safe_rlhf_jax.rl import step
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.constraints import Constraint, init_constraint, rate, rectified, spectral, tail
from safe_rlhf_jax.rl.hyperparameters import Hyperparameters
from safe_rlhf_jax.rl.kl import KL_LOSSES, KLControl
from safe_rlhf_jax.rl.lagrange import LOG, PENALTY, PROJECTED, Multiplier, pid_multiplier
from safe_rlhf_jax.rl.rollout import Networks
from safe_rlhf_jax.testing.optima import (
    POWER,
    cost_at_least,
    feasible,
    reward_at_most,
    unsafe_rate,
    weighted_quantiles,
    worst_of_several,
)
from safe_rlhf_jax.testing.worlds import (
    ALPHA,
    BASE,
    BETA,
    COST_WEIGHT,
    GROUPS,
    LENGTH,
    MLP,
    OFFSETS,
    PROMPTS,
    MLPPolicy,
    Optimum,
    Table,
    TablePolicy,
    TableScore,
    World,
    adapted_mlp,
    divergence,
    expectation,
    make_world,
    mean_cost,
    normalized_groups,
    plain_lagrangian,
    probabilities,
    rectified_cost,
    shaped,
    token_kl,
    two_constraints,
    two_groups,
    unconstrained,
    value_at_risk,
    worst_costs,
)
from safe_rlhf_jax.types import Frozen, RLState, Rollout

ERRORS = ("regret", "violation", "multiplier_error", "oscillation")  # of which a case names the bounds
BATCH = 512  # responses per iteration
ITERATIONS = 800


def mean_of(world: World, policy: Table) -> Any:
    """E[c], f64[1, 1]."""
    return np.array([[expectation(policy, world.costs[0])]])


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm, its expected optimum, and the tolerances."""

    algorithm: str
    optimum: Callable[[World], Optimum]
    starts: tuple[float, ...] = (1.0,)  # λ at the start
    measured: Callable[[World, Table], Any] = mean_of  # the constrained quantity of a policy
    multiplier: Multiplier = LOG
    constraint: dict[str, Any] = dataclasses.field(default_factory=dict)  # what differs from `Constraint`
    signals: tuple[str, ...] = ("cost",)
    slots: int = 1
    num_responses: int = 1
    policy: Callable[[], Any] = TablePolicy
    lr: float = 0.1  # Adam's, of the policy
    window: int = BATCH
    rounding: float | None = None  # the sampler's parameters are multiples of this
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
    # Rounded by up to an eighth of a nat: an 8-bit cache moves a token's log-probability by a hundredth.
    "ppo_lag, rounded sampler": Case("ppo_lag", mean_cost, rounding=0.25, settings={"max_sampler_weight": 2.0}),
    "ppo_lag, MLP policy": Case("ppo_lag", mean_cost, policy=MLPPolicy, lr=0.01, regret=0.006),
    "ppo_lag, MLP policy with adapters": Case(
        "ppo_lag", mean_cost, policy=functools.partial(adapted_mlp, 8, 16.0), lr=0.02, regret=0.006
    ),
    "ppo_lag, MLP policy with adapters of full rank": Case(
        "ppo_lag", mean_cost, policy=functools.partial(adapted_mlp, MLP.hidden_size, float(MLP.hidden_size)), lr=0.01
    ),
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
        constraint={"measure": rectified(0.0)},
        measured=lambda world, policy: np.array([[expectation(policy, np.maximum(world.costs[0], 0.0))]]),
    ),
    "ppo_lag, rate of unsafe responses": Case(
        "ppo_lag",
        unsafe_rate,
        constraint={"measure": rate(0.0)},
        measured=lambda world, policy: np.array([[expectation(policy, world.costs[0] > 0)]]),
    ),
    "ppo_lag, CVaR": Case(
        "ppo_lag",
        worst_costs,
        constraint={"measure": tail(ALPHA)},
        measured=lambda world, policy: np.array([[value_at_risk(policy, world.costs[0])[1]]]),
        # The quantile of finitely many costs jumps between them, and the policy oscillates with it.
        regret=0.01,
        violation=0.06,
        multiplier_error=0.15,
    ),
    "ppo_lag, weighted quantiles": Case(
        "ppo_lag",
        worst_of_several,
        constraint={"measure": spectral(POWER)},
        measured=lambda world, policy: np.array([[weighted_quantiles(policy, world.costs[0])[0]]]),
    ),
    "ppo_lag, exact penalty": Case(
        "ppo_lag",
        mean_cost,
        starts=(5.0,),
        multiplier=PENALTY,
        regret=0.03,  # the policy goes back and forth across the limit
    ),
    "ppo_lag, cost at least": Case("ppo_lag", cost_at_least, constraint={"sign": -1}),
    "ppo_lag, reward at most": Case(
        "ppo_lag",
        reward_at_most,
        constraint={"of": "reward"},
        measured=lambda world, policy: np.array([[expectation(policy, world.reward)]]),
    ),
    "ppo_lag, k2 loss": Case(
        "ppo_lag",
        token_kl,
        settings={"kl": KLControl(loss=KL_LOSSES["k2"])},
        regret=0.005,  # its gradient is noisy even at the optimum, where gradients with KL in the signals vanish
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
    "cgpo": Case("cgpo", feasible, num_responses=8, signals=()),
    "reward_shaping": Case("reward_shaping", shaped, signals=(), settings={"cost_weight": COST_WEIGHT}),
    "ppo": Case("ppo", unconstrained, signals=(), regret=0.003),
}


# --- Training


def respond(policy: Any, params: Any, case: Case, key: jax.Array) -> Rollout:
    """Samples responses exactly; every prompt occurs equally often, responses to one prompt are adjacent."""
    prompts = jnp.repeat(jnp.arange(BATCH // case.num_responses, dtype=jnp.int32) % PROMPTS, case.num_responses)
    tokens = jnp.zeros((BATCH, 1 + LENGTH), jnp.int32).at[:, 0].set(prompts)
    log_probs = []
    for t in range(LENGTH):
        logits: Any = policy.apply({"params": params}, tokens, tokens >= 0, method="hidden")
        token = jax.random.categorical(jax.random.fold_in(key, t), logits[:, t])
        log_probs.append(jnp.take_along_axis(jax.nn.log_softmax(logits[:, t]), token[:, None], 1)[:, 0])
        tokens = tokens.at[:, t + 1].set(token.astype(jnp.int32))
    group = jnp.asarray(GROUPS, jnp.int32)[prompts]
    return Rollout(tokens, jnp.ones_like(tokens, dtype=bool), jnp.stack(log_probs, 1), group)


def of_sampler(case: Case, params: Any) -> Any:
    """Returns the parameters that responses are sampled with."""
    step = case.rounding
    return params if step is None else jax.tree.map(lambda x: step * jnp.round(x / step), params)


def first_actor(policy: Any, frozen: Frozen, key: jax.Array) -> Any:
    """Parameters of the actor before training: the reference's, or an adapter on it that changes nothing yet."""
    if not isinstance(policy, Adapted):
        return frozen.reference
    tokens = jnp.zeros((1, 1 + LENGTH), jnp.int32)
    return nn.unbox(policy.init(key, tokens, tokens == 0))["params"]


def start(case: Case, actor: Any, limits: Any, multiplier: Any, iterations: int) -> tuple[Networks, Any, RLState]:
    """Networks, hyperparameters and state: the actor is as given, the critics are 0."""
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
            max_multiplier=10.0,  # log λ diverges if the policy is slower than λ
            slots=tuple(range(case.slots)) if case.slots > 1 else None,
            names=tuple("ab"[: case.slots]) if case.slots > 1 else ("",),
            **case.constraint,
        )
        for i, signal in enumerate(case.signals)
    }
    hp = Hyperparameters(
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
        actor=init_state(actor, networks.actor_optimizer),
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
    if isinstance(case.policy(), Adapted):  # the reference is the base alone
        return Frozen(reference={}, scorers=scorers, bases={BASE: world.ref_params})
    return Frozen(reference=world.ref_params, scorers=scorers)


def train(case: Case, runs: list[tuple[World, Optimum, float, int]], iterations: int) -> tuple[Any, Any, Any]:
    """Trains every run (world, optimum, λ at the start, seed) at once.

    Returns:
        Final parameters; for each constraint, λ by iteration; for each, the rollout's mean cost by iteration.
    """

    def one(frozen: Frozen, limits: Any, multiplier: Any, seed: Any) -> tuple[Any, Any, Any]:
        actor = first_actor(case.policy(), frozen, jax.random.key(seed))
        networks, hp, state = start(case, actor, limits, multiplier, iterations)
        algorithm, policy = ALGORITHMS[case.algorithm], on(networks.policy, frozen.bases)

        def iterate(state: RLState, key: jax.Array) -> tuple[RLState, Any]:
            rollout = respond(policy, of_sampler(case, state.actor.params), case, key)
            state, metrics = step.learn(networks, algorithm, hp, state, frozen, rollout, None, key)
            multipliers = [c.multiplier.read(state.constraints[s].multiplier) for s, c in hp.constraints.items()]
            return state, (multipliers, [metrics[f"train/{signal}"] for signal in hp.constraints])

        keys = jax.random.split(jax.random.key(seed), iterations)
        state, (multipliers, costs) = jax.lax.scan(iterate, state, keys)
        return state.actor.params, multipliers, costs

    frozen = jax.tree.map(lambda *x: jnp.stack(x), *(frozen_of(case, world) for world, *_ in runs))
    limits = jnp.stack([jnp.asarray(optimum.limits, jnp.float32) for _, optimum, *_ in runs])
    multipliers = jnp.asarray([multiplier for *_, multiplier, _ in runs], jnp.float32)
    seeds = jnp.asarray([seed for *_, seed in runs], jnp.int32)
    # Long to run and short to compile, whatever level the tests have.
    options = {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else None
    return jax.device_get(jax.jit(jax.vmap(one), compiler_options=options)(frozen, limits, multipliers, seeds))


def compare(case: Case, world: World, optimum: Optimum, params: Any, multipliers: Any) -> dict[str, Any]:
    """Exact figures of a trained policy beside those of the optimum."""
    policy = probabilities(on(case.policy(), {BASE: world.ref_params}), params)
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
        }
    if case.signals and case.multiplier is not PENALTY:  # which jumps between 0 and its weight
        out |= {
            "multiplier": {"reached": reached.ravel().tolist(), "optimum": exact.ravel().tolist()},
            "multiplier_error": float(np.abs(reached / exact - 1.0).max()),
            "oscillation": float((last.std(1) / last.mean(1)).max()),
        }
    return out


def within(case: Case, result: dict[str, Any]) -> bool:
    """Says whether a run is within the case's tolerances of its optimum."""
    return all(result[name] <= getattr(case, name) for name in ERRORS if name in result)


def run_case(case: Case, seeds: range, iterations: int = ITERATIONS) -> list[dict[str, Any]]:
    """Trains a case for every seed and start of λ."""
    runs = []
    for seed in seeds:
        world = make_world(seed, case.policy())
        optimum = case.optimum(world)
        runs += [(world, optimum, multiplier, seed) for multiplier in case.starts]
    params, multipliers, _ = train(case, runs, iterations)
    results = []
    for i, (world, optimum, multiplier, seed) in enumerate(runs):
        result = compare(case, world, optimum, *jax.tree.map(lambda x, i=i: x[i], (params, multipliers)))
        result |= {"seed": seed, "start": multiplier}
        results.append(result | {"within": within(case, result)})
    return results
