"""A small RL run: six networks, a state and a rollout."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_rlhf_jax.optim import init_state
from safe_rlhf_jax.rl.algorithms import ALGORITHMS, Algorithm
from safe_rlhf_jax.rl.constraints import Constraint, init_constraint
from safe_rlhf_jax.rl.kl import start_reference
from safe_rlhf_jax.rl.rollout import Networks
from safe_rlhf_jax.rl.step import Hyperparameters, learn
from safe_rlhf_jax.types import Frozen, RLState, Rollout, SupervisedBatch
from tests.helpers import make_lm, make_scorer, prompt_batch, right_padded, tiny_config

PROMPT, RESPONSE, ROWS, VOCAB = 5, 6, 8, 24
CONFIG = tiny_config(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4
)


@dataclasses.dataclass(frozen=True)
class World:
    networks: Networks
    algorithm: Algorithm
    hp: Hyperparameters
    state: RLState
    frozen: Frozen

    def learn(self, state: RLState, frozen: Frozen, rollout: Rollout, ptx: Any, key: jax.Array) -> Any:
        return learn(self.networks, self.algorithm, self.hp, state, frozen, rollout, ptx, key)

    @functools.cached_property
    def compiled_learn(self) -> Any:
        """`learn`, compiled once for all updates of this world."""
        return jax.jit(self.learn)


def fresh(params):
    """Copies: a step donates its state, and the networks of `make_lm` are shared."""
    return jax.tree.map(jnp.copy, params)


def make_world(
    algorithm="ppo_lag",
    *,
    optimizer=None,
    multiplier=1.0,
    window=16,
    constraint=None,
    costs=("cost",),
    **hp,
) -> World:
    """Six networks; `constraint` is what differs from the default in each constraint, `costs` are the cost signals."""
    optimizer = optimizer or optax.sgd(0.1)
    record = ALGORITHMS[algorithm]
    policy, actor = make_lm(CONFIG, 0)
    _, reference = make_lm(CONFIG, 7)
    constraints = {signal: Constraint(**(constraint or {})) for signal in costs} if record.constrained else {}
    settings = {"response_length": RESPONSE, "eos_id": 2, "pad_id": 0} | hp
    hp = Hyperparameters(**settings, constraints=constraints)
    scorers, variables, critics, states = {}, {}, {}, {}
    for i, signal in enumerate(("reward", *costs)):
        scorers[signal], variables[signal] = make_scorer(signal.partition("/")[0], CONFIG, 10 + i)
        if record.baseline is None and signal in hp.signals:
            critics[signal], critic = make_scorer("critic", CONFIG, 20 + i)
            states[signal] = init_state(fresh(critic["params"]), optimizer)
    state = RLState(
        step=jnp.int32(0),
        actor=init_state(fresh(actor["params"]), optimizer),
        critics=states,
        constraints={s: init_constraint(c, multiplier=multiplier, window=window) for s, c in constraints.items()},
        kl_coeff=None if hp.kl.target is None else jnp.float32(hp.kl_coeff),
        reference=start_reference(reference["params"]) if hp.kl.moves_reference else None,
    )
    return World(
        networks=Networks(policy, scorers, critics, optimizer, dict.fromkeys(critics, optimizer)),
        algorithm=record,
        hp=hp,
        state=state,
        frozen=Frozen(reference=reference["params"], scorers=variables),
    )


def make_prompts(rows=ROWS, seed=0):
    return prompt_batch(np.random.default_rng(seed), rows, PROMPT, VOCAB)


def make_rollout(rows=ROWS, seed=0) -> Rollout:
    """Random responses of 1 to T tokens, the last one EOS, but the first row, which is cut off."""
    rng = np.random.default_rng(seed)
    prompts = make_prompts(rows, seed)
    response, mask = (np.array(x) for x in right_padded(rng, rows, RESPONSE, VOCAB))
    response[np.arange(1, rows), mask[1:].sum(1) - 1] = 2
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, jnp.asarray(response)], axis=1),
        mask=jnp.concatenate([prompts.mask, jnp.asarray(mask)], axis=1),
        sampler_log_probs=jnp.asarray(rng.normal(-3, 0.3, (rows, RESPONSE)), jnp.float32),
        group=jnp.asarray(np.arange(rows) % 2, jnp.int32),
    )


def make_texts(rows=ROWS, length=9, seed=1) -> SupervisedBatch:
    """Texts of uneven lengths; the loss is on all but the first two tokens."""
    tokens, mask = right_padded(np.random.default_rng(seed), rows, length, VOCAB)
    return SupervisedBatch(tokens=tokens, mask=mask, loss_mask=mask & (jnp.arange(length) > 1)[None])
