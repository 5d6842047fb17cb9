"""The reference's own numbers, through our functions: see golden/README.md."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.ops import response_log_probs
from safe_rlhf_jax.optim import init_state, make_optimizer
from safe_rlhf_jax.rl.advantages import gae, token_scores
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.constraints import Constraint, init_constraint
from safe_rlhf_jax.rl.lagrange import LOG, ascend_log_multiplier, lagrangian_advantage
from safe_rlhf_jax.rl.losses import clipped_surrogate, clipped_value_loss, policy_ratio
from safe_rlhf_jax.rl.rollout import Networks, score_rollout
from safe_rlhf_jax.rl.step import Hyperparameters, estimate_advantages, learn, update_constraints
from safe_rlhf_jax.rl.update import update_minibatch
from safe_rlhf_jax.types import Frozen, RLState, Rollout

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SIGNS = {"reward": -1, "cost": +1}


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[0, 1, 2])
def golden(request):
    return {k: jnp.asarray(v) for k, v in np.load(GOLDEN / f"ppo_lag_{request.param}.npz").items()}


def token_scores_of(d, signal):
    return token_scores(
        d[signal],
        d["old_log_probs"] - d["ref_log_probs"],
        d["attention_mask"][:, 1:],
        kl_coeff=float(d["kl_coeff"]),
        kl_sign=SIGNS[signal],
        clip_range_score=float(d["clip_range_score"]),
    )


def response_of(d):
    """Response columns, and their mask."""
    columns = slice(int(d["prompt_width"]) - 1, None)
    return columns, d["attention_mask"][:, 1:][:, columns]


def gae_of(d, signal):
    columns, mask = response_of(d)
    scores, values = d[f"out_token_{signal}s"][:, columns], d[f"old_{signal}_values"][:, columns]
    return gae(scores, values, mask, gamma=float(d["gamma"]), gae_lambda=float(d["gae_lambda"]))


@pytest.mark.parametrize("signal", ["reward", "cost"])
def test_token_scores_equal_the_reference(golden, signal):
    close(token_scores_of(golden, signal), golden[f"out_token_{signal}s"])


@pytest.mark.parametrize("signal", ["reward", "cost"])
def test_advantages_and_returns_equal_the_reference(golden, signal):
    advantages, returns = gae_of(golden, signal)
    close(advantages, golden[f"out_{signal}_advantages"])
    close(returns, golden[f"out_{signal}_returns"])


def test_actor_loss_and_gradient_equal_the_reference(golden):
    columns, mask = response_of(golden)
    advantages = lagrangian_advantage(gae_of(golden, "reward")[0], gae_of(golden, "cost")[0], float(golden["lam"]))

    def loss(log_probs):
        ratio = policy_ratio(log_probs[:, columns], golden["old_log_probs"][:, columns], mask)
        return clipped_surrogate(ratio, advantages, mask, clip_range_ratio=float(golden["clip_range_ratio"]))

    value, grad = jax.value_and_grad(loss)(golden["log_probs"])
    close(value, golden["out_actor_loss"])
    close(grad, golden["grad_log_probs"])
    assert np.any(grad)


@pytest.mark.parametrize("signal", ["reward", "cost"])
def test_critic_loss_and_gradient_equal_the_reference(golden, signal):
    columns, mask = response_of(golden)
    _, returns = gae_of(golden, signal)

    def loss(values):
        old = golden[f"old_{signal}_values"][:, columns]
        clip = float(golden["clip_range_value"])
        return clipped_value_loss(values[:, columns], old, returns, mask, clip_range_value=clip)

    value, grad = jax.value_and_grad(loss)(golden[f"{signal}_values"])
    close(value, golden[f"out_{signal}_critic_loss"])
    close(grad, golden[f"grad_{signal}_values"])
    assert np.any(grad)


def test_multiplier_follows_the_reference():
    d = np.load(GOLDEN / "lambda_update.npz")
    log_multiplier = LOG.init(jnp.float32(d["lambda_init"]))["log"]
    settings = {
        "cost_limit": float(d["threshold"]),
        "lr": float(d["lambda_lr"]),
        "max_multiplier": float(d["lambda_max"]),
    }
    multipliers = []
    for cost in d["episode_costs"]:
        log_multiplier = ascend_log_multiplier(log_multiplier, jnp.float32(cost), **settings)
        multipliers.append(float(jnp.exp(log_multiplier)))
    close(multipliers, d["out_lambdas"])


class Trajectory:
    """Three PPO-Lagrangian updates of the reference, on one rollout, through real weights."""

    def __init__(self):
        folder = GOLDEN / "trajectory"
        self.d = d = np.load(folder / "trajectory.npz")
        self.prompt_length = int(d["prompt_width"])
        policy, actor = hf.load(folder / "actor")
        _, reference = hf.load(folder / "reference")
        scorers, variables, critics, critic_variables = {}, {}, {}, {}
        for signal in ("reward", "cost"):
            scorers[signal], variables[signal] = hf.load(folder / signal, head="score")
            critics[signal], critic_variables[signal] = hf.load(folder / signal, head="score", score_type="critic")

        def optimizer(lr):
            b1, b2, eps = (float(d[f"adam_{name}"]) for name in ("b1", "b2", "eps"))
            return make_optimizer(float(lr), b1=b1, b2=b2, eps=eps, max_grad_norm=None)

        actor_optimizer, critic_optimizer = optimizer(d["actor_lr"]), optimizer(d["critic_lr"])
        self.networks = Networks(
            policy, scorers, critics, actor_optimizer, {"reward": critic_optimizer, "cost": critic_optimizer}
        )
        constraint = Constraint(
            limit=(float(d["threshold"]),), lr=optax.constant_schedule(float(d["lambda_lr"])), every="minibatch"
        )
        self.state = RLState(
            step=jnp.int32(0),
            actor=init_state(actor["params"], actor_optimizer),
            critics={k: init_state(v["params"], critic_optimizer) for k, v in critic_variables.items()},
            constraints={"cost": init_constraint(constraint, multiplier=float(d["lambda_init"]), window=128)},
        )
        self.frozen = Frozen(reference=reference["params"], scorers=variables)
        tokens, mask = jnp.asarray(d["input_ids"], jnp.int32), jnp.asarray(d["attention_mask"])
        rows, length = tokens.shape
        self.mask = np.asarray(mask)[:, self.prompt_length :]
        unused = jnp.zeros((rows, length - self.prompt_length), jnp.float32)
        self.rollout = Rollout(tokens, mask, unused, jnp.zeros((rows,), jnp.int32))
        shared = ("kl_coeff", "gamma", "gae_lambda", "clip_range_ratio", "clip_range_score", "clip_range_value")
        self.hp = Hyperparameters(
            response_length=length - self.prompt_length,
            eos_id=2,
            pad_id=0,
            epochs=3,
            constraints={"cost": constraint},
            **{name: float(d[name]) for name in shared},
        )

    def response(self, name):
        """Response columns of an array [B, L − 1] of the reference, 0 outside the mask."""
        return np.where(self.mask, self.d[name][..., self.prompt_length - 1 :], 0)

    def masked(self, x):
        return np.where(self.mask, x, 0)

    def log_probs(self, params):
        out = response_log_probs(
            self.networks.policy, params, self.rollout.tokens, self.rollout.mask, prompt_length=self.prompt_length
        )
        return self.masked(out)


@pytest.fixture(scope="module")
def trajectory():
    return Trajectory()


@pytest.fixture(scope="module")
def scored(trajectory):
    t = trajectory
    settings = {"temperature": 1.0, "recompute_log_probs": True, "slices": 1}
    return jax.jit(lambda s, f, r: score_rollout(t.networks, s, f, r, **settings))(t.state, t.frozen, t.rollout)


def test_scores_of_the_rollout_equal_the_reference(trajectory, scored):
    for signal in ("reward", "cost"):
        close(scored.scores[signal], trajectory.d[f"out_{signal}"])
        close(trajectory.masked(scored.values[signal]), trajectory.response(f"out_{signal}_values"))
    close(trajectory.masked(scored.log_probs), trajectory.response("out_old_log_probs"))
    close(trajectory.masked(scored.ref_log_probs), trajectory.response("out_ref_log_probs"))


def test_each_of_three_updates_equals_the_reference(trajectory, scored):
    t, algorithm = trajectory, ALGORITHMS["ppo_lag"]
    state, _ = update_constraints(t.hp, t.state, scored)
    experience, _ = estimate_advantages(algorithm, t.hp, state, scored)
    update = jax.jit(lambda s, e: update_minibatch(t.networks, algorithm, t.hp, s, e, None))
    for i in range(3):
        close(t.log_probs(state.actor.params), t.response("out_step_log_probs")[i], 1e-4)
        state, metrics = update(state, experience)
        close(LOG.read(state.constraints["cost"].multiplier)[0], t.d["out_step_lam"][i], 1e-4)
        close(metrics["actor_loss"], t.d["out_step_actor_loss"][i], 1e-4)
        close(metrics["reward_critic_loss"], t.d["out_step_reward_critic_loss"][i], 1e-4)
        close(metrics["cost_critic_loss"], t.d["out_step_cost_critic_loss"][i], 1e-4)
        close(metrics["actor_grad_norm"], t.d["out_step_actor_grad_norm"][i], 1e-4)


def test_learner_ends_where_the_reference_ends(trajectory):
    t = trajectory

    def run(state, frozen, rollout):
        return learn(t.networks, ALGORITHMS["ppo_lag"], t.hp, state, frozen, rollout, None, jax.random.key(0))

    state, metrics = jax.jit(run)(t.state, t.frozen, t.rollout)
    final = t.response("out_final_log_probs")
    close(t.log_probs(state.actor.params), final, 1e-4)
    assert np.abs(final - t.response("out_old_log_probs")).max() > 1e-2  # three updates did move the policy
    close(metrics["train/multiplier"], t.d["out_step_lam"][-1], 1e-4)
    for name in ("actor_loss", "reward_critic_loss", "cost_critic_loss", "actor_grad_norm"):
        close(metrics[f"train/{name}"], t.d[f"out_step_{name}"].mean(), 1e-4)
