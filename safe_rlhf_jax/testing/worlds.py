"""A world with a known constrained optimum: networks that are tables or small MLPs, and algorithms' optimal policies.

Four prompts, six tokens, responses of three tokens: 216 responses to each prompt. Reward and cost are random tables
with correlation 0.5, the reference is a random policy with full support. So the optimal policy of an algorithm
can be computed: for Safe RLHF it is π* ∝ π_ref·exp((r − λc)/((1 + λ)β)) with the λ at which E[c] = d.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from safe_rlhf_jax.models.adapters import Adapted, without_adapters
from safe_rlhf_jax.models.config import Lora, ModelConfig
from safe_rlhf_jax.models.layers import Linear
from safe_rlhf_jax.ops import response_log_probs

PROMPTS, TOKENS, LENGTH = 4, 6, 3
RESPONSES = TOKENS**LENGTH
BETA = 0.5
COST_WEIGHT = 1.0  # ν
ALPHA = 0.75  # of CVaR
OFFSETS = np.cumsum([0, *(PROMPTS * TOKENS**depth for depth in range(LENGTH + 1))])  # first node of each depth
MATRICES = ("first", "second", "last")  # of the MLP
BASE = "reference"  # name of the base of an MLP with adapters
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


MLP = ModelConfig(
    vocab_size=TOKENS, hidden_size=128, intermediate_size=128, num_layers=3, num_heads=1, num_kv_heads=1, head_dim=1,
    max_positions=1 + LENGTH, initializer_range=0.12,
)  # fmt: skip


class MLPDecoder(nn.Module):
    """Logits of a small network that reads prompt and tokens so far, so that nodes are not independent.

    It is called as `models.transformer.Decoder` is.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: Any, visible: Any, *, first: int = 0, below: None = None
    ) -> tuple[jax.Array, None]:
        """Logits f32[B, L − first, V] and no cache."""
        c = self.config
        seen = jnp.tril(jnp.ones((LENGTH + 1, LENGTH + 1), jnp.float32))
        features = jax.nn.one_hot(tokens, TOKENS)[:, None] * seen[None, :, :, None]  # [B, column, token, V]
        x = features.reshape(*features.shape[:2], -1)[:, first:]
        *inner, last = MATRICES
        for name in inner:
            x = nn.tanh(Linear((c.hidden_size,), ("embed", "mlp"), c, name=name)(x))
        return Linear((c.vocab_size,), ("mlp", "embed"), c, name=last)(x), None


class MLPPolicy(nn.Module):
    """A language model whose decoder is an MLP; its matrices can have adapters."""

    config: ModelConfig = MLP

    def setup(self) -> None:
        """Declares the decoder."""
        self.decoder = MLPDecoder(self.config)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits f32[B, L, V]."""
        return self.hidden(tokens, mask)

    def hidden(self, tokens: jax.Array, mask: jax.Array, first: int = 0) -> jax.Array:
        """Logits, which `unembed` passes on."""
        return self.decoder(tokens, None, mask, first=first)[0]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits f32[B, l, V]."""
        return hidden


class AdaptedMLP(Adapted):
    """An `MLPPolicy` with adapters."""

    decoder = MLPDecoder


def adapted_mlp(rank: int, alpha: float) -> AdaptedMLP:
    """An `MLPPolicy` with adapters on all of its matrices."""
    return AdaptedMLP(MLPPolicy(dataclasses.replace(MLP, lora=Lora(rank, alpha, MATRICES))), BASE)


class TableScore(nn.Module):
    """A score by node: a scorer or a critic."""

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, first: int = 0) -> jax.Array:
        """Scores f32[B, L − first]."""
        return self.param("table", nn.initializers.zeros, (int(OFFSETS[-1]),))[nodes(tokens)[:, first:]]


# --- The world, and the optimal policies of algorithms


@dataclasses.dataclass(frozen=True)
class World:
    """Tables of one random world."""

    reward: Table
    costs: tuple[Table, Table]  # the second for cases with two constraints
    ref_params: Any
    reference: Table  # its probabilities


def make_world(seed: int, policy: Any) -> World:
    """Unit-variance tables; each cost has correlation 0.5 with the reward: helpful responses tend to be harmful.

    The reference is the policy before training; of one with adapters, its base.
    """
    policy = without_adapters(policy.module) if isinstance(policy, Adapted) else policy
    rng = np.random.default_rng(seed)
    reward, *noise = rng.normal(size=(3, PROMPTS, RESPONSES))
    costs = [0.5 * reward + np.sqrt(0.75) * n for n in noise]
    tokens = jnp.zeros((1, 1 + LENGTH), jnp.int32)
    params = nn.unbox(policy.init(jax.random.key(seed), tokens, tokens == 0, method="hidden")["params"])
    return World(reward, (costs[0], costs[1]), params, probabilities(policy, params))


def all_sequences() -> jax.Array:
    """Every prompt with every response, i32[PROMPTS · RESPONSES, 1 + LENGTH]."""
    grid = np.indices((PROMPTS, *[TOKENS] * LENGTH)).reshape(1 + LENGTH, -1).T
    return jnp.asarray(grid, jnp.int32)


def probabilities(policy: Any, params: Any) -> Table:
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
    """Fixed point of a per-token KL loss: π(a | s) ∝ π_ref(a | s)·exp(E_π[score | s, a]), no KL of later tokens."""
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
    """The root of a decreasing function, 0 if it starts below zero."""
    if excess(low) <= 0:
        return low
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The expected optimum of an algorithm."""

    limits: Any  # f64[constraints, slots]
    multipliers: Any  # f64[constraints, slots]
    policy: Table


Tilt = Callable[[Table, Table], Table]  # (reference, score) -> policy
GROUPS = (0, 0, 1, 1)  # of the prompts, for the case with a λ per group


def combined_score(world: World, cost: Table, multiplier: float, *, divided: bool) -> Table:
    """(r − λc)/((1 + λ)β), or without the division by 1 + λ."""
    return (world.reward - multiplier * cost) / (BETA * (1.0 + multiplier if divided else 1.0))


def one_constraint(world: World, cost: Table, *, divided: bool = True, tilt: Tilt = tilted) -> Optimum:
    """The limit midway between the costs at λ = 0 and at λ → ∞ (of the divided form)."""
    free, bound = tilt(world.reference, world.reward / BETA), tilt(world.reference, -cost / BETA)
    limit = (expectation(free, cost) + expectation(bound, cost)) / 2
    return within_limit(world, cost, limit, divided=divided, tilt=tilt)


def within_limit(world: World, cost: Table, limit: float, *, divided: bool = True, tilt: Tilt = tilted) -> Optimum:
    """E[cost] = limit."""

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
    limits = [sum(expectation(end, cost) for end in ends) / 2 for cost in world.costs]

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
