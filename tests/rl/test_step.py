import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from safe_rlhf_jax.objectives import lm_loss, token_weights
from safe_rlhf_jax.ops import masked_mean, response_log_probs
from safe_rlhf_jax.rl import update as update_module
from safe_rlhf_jax.rl.constraints import named_rows
from safe_rlhf_jax.rl.kl import KLControl, k2
from safe_rlhf_jax.rl.losses import clipped_surrogate
from safe_rlhf_jax.rl.rollout import map_slices
from safe_rlhf_jax.rl.step import collect, estimate_advantages, is_truncated, make_step
from safe_rlhf_jax.sharding import make_mesh, named_shardings, replicated, shard_batch
from safe_rlhf_jax.stages.networks import jit_step
from safe_rlhf_jax.types import Experience, RLState, ScoredRollout
from tests.helpers import compilations
from tests.rl.world import CONFIG, PROMPT, RESPONSE, ROWS, make_prompts, make_rollout, make_texts, make_world

KEY = jax.random.key(3)


def run_learn(world, rollout=None, ptx=None, key=KEY):
    rollout = make_rollout() if rollout is None else rollout
    return world.compiled_learn(world.state, world.frozen, rollout, ptx, key)


@functools.cache
def one_update(algorithm="ppo_lag"):
    """A world with nothing set, and its state and metrics after one update."""
    world = make_world(algorithm)
    return world, *run_learn(world)


def trained(state):
    """What an update changes."""
    return state.actor.params, {k: v.params for k, v in state.critics.items()}, state.constraints


def log_multiplier(state):
    return float(state.constraints["cost"].multiplier["log"][0])


# --- the first microstep


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"minibatches": 2, "microbatches": 2},
        {"microbatches": 8},
        {"temperature": 0.7, "minibatches": 4, "epochs": 2},
    ],
)
def test_first_ratio_is_exactly_one(settings):
    _, metrics = run_learn(make_world(**settings))
    assert float(metrics["train/first_ratio_gap"]) == 0.0


def test_first_ratio_differs_from_one_with_the_samplers_log_probs():
    _, metrics = run_learn(make_world(recompute_log_probs=False))
    assert float(metrics["train/first_ratio_gap"]) > 1e-3


def test_tokens_are_weighted_by_how_much_likelier_the_policy_finds_them_than_the_sampler():
    (world, _, plain), rollout = one_update(), make_rollout()
    weighted = make_world(max_sampler_weight=1e6)
    texts = rollout.tokens, rollout.mask
    ours = response_log_probs(world.networks.policy, world.state.actor.params, *texts, prompt_length=PROMPT)
    likelier = dataclasses.replace(rollout, sampler_log_probs=ours - np.log(2.0))
    _, metrics = run_learn(weighted, likelier)
    np.testing.assert_allclose(metrics["train/sampler_weight"], 2.0, rtol=1e-4)
    np.testing.assert_allclose(metrics["train/actor_loss"], 2 * plain["train/actor_loss"], rtol=1e-4)
    assert float(metrics["train/first_ratio_gap"]) == 0.0
    _, cut = run_learn(make_world(max_sampler_weight=1.5), likelier)
    np.testing.assert_allclose(cut["train/sampler_weight"], 1.5, rtol=1e-5)


def test_metrics_are_those_of_the_whole_minibatch_however_it_is_cut():
    settings = {"recompute_log_probs": False, "kl": KLControl(loss=k2), "dual_clip": 3.0}
    _, whole = run_learn(make_world(**settings))
    _, cut = run_learn(make_world(microbatches=4, **settings))
    assert whole.keys() == cut.keys()
    for name in whole:
        np.testing.assert_allclose(whole[name], cut[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("algorithm", ["ppo", "ppo_lag"])
def test_first_policy_loss_is_minus_the_mean_advantage(algorithm):
    _, _, metrics = one_update(algorithm)
    assert float(metrics["train/clip_fraction"]) == 0.0
    assert float(metrics["train/approx_kl"]) == 0.0
    expected = metrics["train/reward_advantage"]
    if algorithm == "ppo_lag":
        multiplier = metrics["train/multiplier"]
        expected = (expected - multiplier * metrics["train/cost_advantage"]) / (1 + multiplier)
    np.testing.assert_allclose(metrics["train/advantage"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["train/actor_loss"], -expected, rtol=1e-5, atol=1e-6)
    assert abs(float(expected)) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_equal_to_the_actor_gives_no_kl(temperature):
    world = make_world(temperature=temperature)
    equal = dataclasses.replace(world.frozen, reference=world.state.actor.params)
    for frozen, same in ((equal, True), (world.frozen, False)):
        _, metrics = world.compiled_learn(world.state, frozen, make_rollout(), None, KEY)
        assert (float(metrics["train/kl"]) == 0.0) == same


# --- algorithms


def test_ppo_lag_with_zero_multiplier_equals_ppo():
    ppo, lag = make_world("ppo", minibatches=2), make_world("ppo_lag", minibatches=2, multiplier=1e-30)
    (ppo_state, _), (lag_state, _) = run_learn(ppo), run_learn(lag)
    chex.assert_trees_all_close(ppo_state.actor.params, lag_state.actor.params, atol=1e-6)
    chex.assert_trees_all_close(ppo_state.critics["reward"].params, lag_state.critics["reward"].params, atol=1e-6)
    constrained, _ = run_learn(make_world("ppo_lag", minibatches=2, multiplier=1.0))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(ppo_state.actor.params, constrained.actor.params, atol=1e-6)


def test_ppo_has_one_critic_and_no_constraint():
    _, state, metrics = one_update("ppo")
    assert set(state.critics) == {"reward"}
    assert state.constraints == {}
    assert "train/multiplier" not in metrics
    assert "train/cost" in metrics  # measured all the same


def test_all_networks_and_the_multiplier_move_and_the_frozen_do_not():
    world, state, metrics = one_update()
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), trained(world.state)[:2], trained(state)[:2])
    assert all(jax.tree.leaves(moved))
    mean_cost = float(metrics["train/mean_cost"])
    rose = log_multiplier(state) > log_multiplier(world.state)
    assert rose == (mean_cost > 0)
    assert mean_cost != 0
    assert int(state.step) == 1
    assert int(state.actor.step) == 1


def test_multiplier_moves_before_the_policy_once_per_rollout_or_once_per_minibatch():
    logs = {}
    for every in ("rollout", "minibatch"):
        world = make_world(constraint={"every": every, "limit": (-1.0,)}, minibatches=2, epochs=2)
        state, metrics = run_learn(world)
        logs[every] = log_multiplier(state)
        log, steps = 0.0, 1 if every == "rollout" else 4
        for _ in range(steps):
            log += 0.1 * np.exp(log) * (float(metrics["train/mean_cost"]) + 1.0)
        np.testing.assert_allclose(logs[every], log, rtol=1e-5)
    assert logs["minibatch"] > logs["rollout"] > 0


def test_only_constrained_rows_enter_the_window_and_feel_the_multiplier():
    constraint = {"slots": (-1, 0), "lr": lambda _: 0.0}
    world = make_world(constraint=constraint, groups=("benign", "risky"), multiplier=3.0)
    rollout = make_rollout()
    assert np.array_equal(named_rows(world.hp.constraints["cost"], rollout.group), rollout.group == 1)
    state, metrics = run_learn(world, rollout)
    window = state.constraints["cost"].window
    assert window.count.tolist() == [ROWS // 2]
    costs = np.asarray(window.recent[0, -ROWS // 2 :])
    np.testing.assert_allclose(metrics["train/mean_cost"], costs.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/unsafe_share"], metrics["train/unsafe_share/risky"], rtol=1e-6)
    np.testing.assert_allclose(metrics["train/unsafe_share"], (costs > 0).mean(), rtol=1e-6)

    benign = dataclasses.replace(rollout, group=jnp.zeros_like(rollout.group))
    unconstrained, _ = run_learn(world, benign)
    ppo, _ = run_learn(one_update("ppo")[0], benign)
    chex.assert_trees_all_close(unconstrained.actor.params, ppo.actor.params, atol=1e-6)
    assert unconstrained.constraints["cost"].window.count.tolist() == [0]


# --- parts


def test_missing_eos_lowers_the_reward_of_truncated_responses_only_and_never_the_cost():
    world, rollout = make_world(missing_eos_penalty=2.0), make_rollout()
    assert np.asarray(is_truncated(world.hp, rollout)).tolist() == [True] + [False] * (ROWS - 1)
    zeros = jnp.zeros((ROWS, RESPONSE), jnp.float32)
    scores = {"reward": jnp.ones(ROWS), "cost": jnp.ones(ROWS)}
    scored = ScoredRollout(rollout, zeros, zeros, scores, {"reward": zeros, "cost": zeros})
    experience, _ = estimate_advantages(
        world.algorithm, dataclasses.replace(world.hp, gae_lambda=1.0), world.state, scored
    )
    first = rollout.mask[:, PROMPT]
    assert bool(first.all())
    np.testing.assert_allclose(experience.returns["reward"][:, 0], [-1.0] + [1.0] * (ROWS - 1))
    np.testing.assert_allclose(experience.returns["cost"][:, 0], [1.0] * ROWS)


def test_returns_are_advantages_plus_old_values():
    world, rollout = make_world(), make_rollout()
    rng = np.random.default_rng(0)
    log_probs, reference, values = jnp.asarray(rng.normal(size=(3, ROWS, RESPONSE)), jnp.float32)
    scores = {"reward": jnp.ones(ROWS), "cost": -jnp.ones(ROWS)}
    scored = ScoredRollout(rollout, log_probs, reference, scores, {"reward": values, "cost": values})
    experience, metrics = estimate_advantages(world.algorithm, world.hp, world.state, scored)
    mask = rollout.mask[:, PROMPT:]
    for signal in ("reward", "cost"):
        gap = experience.returns[signal] - experience.advantages[signal] - jnp.where(mask, values, 0)
        np.testing.assert_allclose(gap, 0, atol=1e-5)
        expected = masked_mean(experience.advantages[signal], mask)
        np.testing.assert_allclose(metrics[f"{signal}_advantage"], expected, rtol=1e-6)


def test_scoring_in_slices_changes_no_row():
    x = {"a": jnp.arange(24.0).reshape(8, 3), "b": jnp.arange(8)}
    for slices in (1, 2, 8):
        out = map_slices(lambda part: (part["a"] * 2, part["b"] + 1), x, slices)
        np.testing.assert_array_equal(out[0], x["a"] * 2)
        np.testing.assert_array_equal(out[1], x["b"] + 1)


def test_every_sample_is_used_once_per_epoch_in_a_fresh_order(monkeypatch):
    epochs, minibatches, world = 3, 4, make_world(epochs=3, minibatches=4)
    rollout = dataclasses.replace(make_rollout(), group=jnp.arange(ROWS, dtype=jnp.int32))
    zeros = jnp.zeros((ROWS, RESPONSE), jnp.float32)
    experience = Experience(rollout, zeros, zeros, {}, {}, {})

    def record(networks, algorithm, hp, state, part, ptx):
        seen = state.actor.at[state.step].set(part.rollout.group)
        return dataclasses.replace(state, step=state.step + 1, actor=seen), {"ratio_gap": jnp.float32(0)}

    monkeypatch.setattr(update_module, "update_minibatch", record)
    unseen = jnp.full((epochs * minibatches, ROWS // minibatches), -1, jnp.int32)
    start = RLState(step=jnp.int32(0), actor=unseen, critics={}, constraints={})
    end, _ = update_module.update_networks(world.networks, world.algorithm, world.hp, start, experience, None, KEY)
    assert int(end.step) == epochs * minibatches
    orders = np.asarray(end.actor).reshape(epochs, ROWS)
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    assert len({tuple(order) for order in orders} | {tuple(range(ROWS))}) == epochs + 1


def test_ptx_adds_its_gradient():
    texts, rollout = make_texts(), make_rollout()
    _, plain, _ = one_update()
    mixed_world = make_world(ptx_coeff=0.5)
    mixed, metrics = run_learn(mixed_world, rollout, texts)

    def loss(params):
        return lm_loss(mixed_world.networks.policy, params, texts, token_weights(texts.loss_mask))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(mixed_world.state.actor.params)
    np.testing.assert_allclose(metrics["train/ptx_loss"], value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * 0.5 * g, plain.actor.params, grads)  # sgd(0.1)
    chex.assert_trees_all_close(mixed.actor.params, expected, atol=1e-6)
    off, _ = run_learn(make_world(ptx_coeff=0.0), rollout, texts)
    chex.assert_trees_all_close(off.actor.params, plain.actor.params, atol=1e-7)


def test_policy_loss_of_an_algorithm_is_the_one_that_is_used():
    world, _, once = one_update()
    doubled = dataclasses.replace(world.algorithm, policy_loss=lambda *a, **k: 2 * clipped_surrogate(*a, **k))
    _, twice = run_learn(dataclasses.replace(world, algorithm=doubled))
    np.testing.assert_allclose(twice["train/actor_loss"], 2 * once["train/actor_loss"], rtol=1e-5)


def test_masked_columns_of_a_rollout_change_nothing():
    (world, a, a_metrics), rollout = one_update(), make_rollout()
    other = dataclasses.replace(rollout, tokens=jnp.where(rollout.mask, rollout.tokens, 5))
    b, b_metrics = run_learn(world, other)
    chex.assert_trees_all_close(trained(a), trained(b), atol=1e-7)
    chex.assert_trees_all_close(a_metrics, b_metrics, atol=1e-6)


# --- microbatches and devices


@pytest.fixture(scope="module")
def whole_update():
    """One update of 16 uneven rows with PTX, in one piece on one device."""
    return run_learn(make_world(ptx_coeff=0.5), make_rollout(16), make_texts(16))


@pytest.mark.parametrize("microbatches", [4, 16])
def test_microbatches_give_the_same_update(whole_update, microbatches):
    world = make_world(ptx_coeff=0.5, microbatches=microbatches)
    state, metrics = run_learn(world, make_rollout(16), make_texts(16))
    chex.assert_trees_all_close(trained(state), trained(whole_update[0]), atol=1e-5, rtol=0)
    for name in ("actor_loss", "actor_grad_norm", "ptx_loss", "reward_critic_loss", "cost_critic_grad_norm"):
        np.testing.assert_allclose(metrics[f"train/{name}"], whole_update[1][f"train/{name}"], rtol=1e-4, atol=1e-5)


def shard_networks(world, mesh):
    """The state and the frozen networks on a mesh, parameters in their shards."""
    tokens = jnp.zeros((1, 2), jnp.int32)

    def shardings(module):
        boxed = jax.eval_shape(lambda key: module.init(key, tokens, tokens == 0), jax.random.key(0))
        return named_shardings(boxed, mesh)

    def put(train_state, module):
        params = jax.device_put(train_state.params, shardings(module)["params"])
        rest = jax.device_put((train_state.step, train_state.opt_state), replicated(mesh))
        return dataclasses.replace(train_state, params=params, step=rest[0], opt_state=rest[1])

    networks, state, frozen = world.networks, world.state, world.frozen
    small = jax.device_put((state.step, state.constraints), replicated(mesh))
    state = dataclasses.replace(
        state,
        step=small[0],
        actor=put(state.actor, networks.policy),
        critics={k: put(v, networks.critics[k]) for k, v in state.critics.items()},
        constraints=small[1],
    )
    frozen = dataclasses.replace(
        frozen,
        reference=jax.device_put(frozen.reference, shardings(networks.policy)["params"]),
        scorers={k: jax.device_put(v, shardings(networks.scorers[k])) for k, v in frozen.scorers.items()},
    )
    return state, frozen


@pytest.mark.parametrize(("shape", "microbatches"), [((8, 1, 1), 1), ((8, 1, 1), 2), ((2, 2, 2), 2)])
def test_sharded_step_matches_single_device(whole_update, shape, microbatches):
    world, mesh = make_world(ptx_coeff=0.5, microbatches=microbatches), make_mesh(shape)
    with jax.set_mesh(mesh):
        state, frozen = shard_networks(world, mesh)
        rollout, texts = shard_batch((make_rollout(16), make_texts(16)), mesh)
        assert len(rollout.tokens.sharding.device_set) == 8
        step = jit_step(world.learn, state, mesh)
        state, metrics = step(state, frozen, rollout, texts, KEY)
    chex.assert_trees_all_close(*jax.device_get((trained(state), trained(whole_update[0]))), atol=1e-5, rtol=0)
    for name in ("actor_loss", "actor_grad_norm", "ptx_loss", "reward_critic_loss", "cost_critic_grad_norm"):
        np.testing.assert_allclose(metrics[f"train/{name}"], whole_update[1][f"train/{name}"], rtol=1e-4, atol=1e-5)


# --- one program


@pytest.fixture(scope="module")
def compiled():
    """The fused step as a run compiles it, with what it takes."""
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    world = make_world(minibatches=2, optimizer=optax.adamw(1e-3))
    state, frozen, prompts, key = jax.device_put(
        (world.state, world.frozen, make_prompts(), KEY), NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    return (
        world,
        jit_step(make_step(world.networks, world.algorithm, world.hp), state, mesh),
        state,
        frozen,
        prompts,
        key,
    )


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def test_second_step_does_not_recompile(compiled):
    _, step, state, frozen, prompts, key = compiled
    state, _ = step(copy(state), frozen, prompts, key)
    with compilations() as found:
        for _ in range(2):
            state, _ = step(state, frozen, prompts, key)
    assert not found
    assert int(state.step) == 3


def test_state_is_donated(compiled):
    _, step, state, frozen, prompts, key = compiled
    old = copy(state)
    step(old, frozen, prompts, key)
    deleted = [leaf.is_deleted() for leaf in jax.tree.leaves((old.actor, old.critics))]
    assert all(deleted)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, prompts)))


def test_an_iteration_transfers_nothing(compiled):
    _, step, state, frozen, prompts, key = compiled
    state, _ = step(copy(state), frozen, prompts, key)
    on_host = jax.device_get(prompts)
    with jax.transfer_guard("disallow"):
        state, metrics = step(state, frozen, prompts, key)
        jax.block_until_ready(metrics)
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            step(state, frozen, on_host, key)


def test_the_compiled_iteration_never_calls_the_host(compiled):
    _, step, state, frozen, prompts, key = compiled
    text = step.lower(state, frozen, prompts, key).compile().as_text()
    assert "while" in text
    for name in ("infeed", "outfeed", "callback", "send(", "recv("):
        assert name not in text


def test_collect_then_learn_equals_the_fused_step(compiled):
    world, step, state, frozen, prompts, key = compiled
    fused_state, fused_metrics = step(copy(state), frozen, prompts, key)
    sample_key, learn_key = jax.random.split(key)
    rollout = jax.jit(lambda p, b, k: collect(world.networks, world.hp, p, b, k))(
        state.actor.params, prompts, sample_key
    )
    apart_state, apart_metrics = jax.jit(world.learn)(state, frozen, rollout, None, learn_key)
    chex.assert_trees_all_close(fused_metrics, apart_metrics, atol=1e-5)
    chex.assert_trees_all_close(trained(fused_state), trained(apart_state), atol=1e-5)


def test_step_equals_itself_without_jit():
    world = make_world(response_length=2)
    prompts = make_prompts(2)
    step = make_step(world.networks, world.algorithm, world.hp)
    state, metrics = jax.jit(step)(world.state, world.frozen, prompts, KEY)
    with jax.disable_jit():
        eager_state, eager_metrics = step(world.state, world.frozen, prompts, KEY)
    chex.assert_trees_all_close(metrics, eager_metrics, atol=1e-4)
    chex.assert_trees_all_close(trained(state), trained(eager_state), atol=1e-5)


def test_several_responses_per_prompt_make_one_rollout():
    world = make_world(num_responses=2)
    state, metrics = jax.jit(make_step(world.networks, world.algorithm, world.hp))(
        world.state, world.frozen, make_prompts(4), KEY
    )
    assert state.constraints["cost"].window.count.tolist() == [8]
    assert float(metrics["train/first_ratio_gap"]) == 0.0
    assert float(metrics["train/sampler_gap"]) < 1e-4  # cached decoding and the learner agree


def test_the_world_of_these_tests_is_sharded_where_it_can_be():
    boxed = jax.eval_shape(
        lambda key: make_world().networks.policy.init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)), KEY
    )
    specs = [s.spec for s in jax.tree.leaves(named_shardings(boxed, make_mesh((2, 2, 2))))]
    assert any("tensor" in spec for spec in specs)
    assert any(("fsdp", "decode") in spec for spec in specs)
    assert CONFIG.vocab_size == nn.unbox(boxed)["params"]["decoder"]["embedding"].shape[0]


def test_learn_needs_no_key_beyond_the_order_of_minibatches():
    world = make_world(epochs=2)
    (a, _), (b, _) = (run_learn(world, key=jax.random.key(i)) for i in (0, 1))
    chex.assert_trees_all_equal(trained(a), trained(b))
    shuffled = make_world(epochs=2, minibatches=4)
    (a, _), (b, _) = (run_learn(shuffled, key=jax.random.key(i)) for i in (0, 1))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(trained(a), trained(b))
