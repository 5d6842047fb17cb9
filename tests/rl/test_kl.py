"""The policy near its reference: losses, the controller, a reference that moves; and the update's switches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safe_rlhf_jax.rl.advantages import whiten
from safe_rlhf_jax.rl.kl import KLControl, adapt, k2, k3, move_reference, start_reference
from safe_rlhf_jax.rl.losses import clipped_surrogate, negative_entropy, policy_ratio
from safe_rlhf_jax.rl.update import distance_terms, kl_coefficient, response_mask, rollout_log_probs
from tests.helpers import compilations
from tests.rl.test_step import KEY, run_learn
from tests.rl.world import fresh, make_rollout, make_world

LOGITS, REFERENCE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7)), jnp.float32)


def gradient_over_all_tokens(loss):
    """E_π[∇ loss(log π, log π_ref)] by the logits, π held fixed in the expectation."""
    weights, ref = jax.nn.softmax(LOGITS), jax.nn.log_softmax(REFERENCE)
    return jax.grad(lambda x: (weights * loss(jax.nn.log_softmax(x), ref)).sum())(LOGITS)


def test_k2_loss_has_the_gradient_of_the_kl_to_the_reference():
    def kl(logits):
        log_probs = jax.nn.log_softmax(logits)
        return (jnp.exp(log_probs) * (log_probs - jax.nn.log_softmax(REFERENCE))).sum()

    actual = gradient_over_all_tokens(lambda log_probs, ref: k2((log_probs - ref)[None])[0])
    np.testing.assert_allclose(actual, jax.grad(kl)(LOGITS), rtol=1e-4, atol=1e-6)


def test_k3_loss_has_the_gradient_of_the_kl_from_the_reference():
    def forward(logits):
        ref = jax.nn.log_softmax(REFERENCE)
        return (jnp.exp(ref) * (ref - jax.nn.log_softmax(logits))).sum()

    actual = gradient_over_all_tokens(lambda log_probs, ref: k3((log_probs - ref)[None])[0])
    np.testing.assert_allclose(actual, jax.grad(forward)(LOGITS), rtol=1e-4, atol=1e-6)


def test_k3_is_an_unbiased_estimate_of_the_kl_and_never_negative():
    log_probs, ref = jax.nn.log_softmax(LOGITS), jax.nn.log_softmax(REFERENCE)
    kl = (jnp.exp(log_probs) * (log_probs - ref)).sum()
    estimate = k3((log_probs - ref)[None])[0]
    np.testing.assert_allclose((jnp.exp(log_probs) * estimate).sum(), kl, rtol=1e-5)
    assert (estimate >= 0).all()


def test_controller_equals_the_formula_and_is_clipped():
    def after(kl):
        return float(adapt(jnp.float32(0.2), jnp.float32(kl), target=2.0, gain=0.1))

    np.testing.assert_allclose(after(2.0), 0.2, rtol=1e-6)
    np.testing.assert_allclose(after(2.2), 0.2 * (1 + 0.1 * 0.1), rtol=1e-6)
    np.testing.assert_allclose(after(50.0), 0.2 * 1.02, rtol=1e-6)
    np.testing.assert_allclose(after(-50.0), 0.2 * 0.98, rtol=1e-6)


def test_refreshed_reference_is_the_actor_every_n_iterations():
    control, reference = KLControl(refresh_every=3), start_reference({"w": jnp.zeros(2)})
    seen = []
    for step in range(1, 8):
        reference = move_reference(control, reference, {"w": jnp.full(2, float(step))}, jnp.int32(step))
        seen.append((float(reference.params["w"][0]), float(reference.age)))
    assert seen == [(0, 1), (0, 2), (3, 0), (3, 1), (3, 2), (6, 0), (6, 1)]


def test_averaged_reference_is_an_exponential_average_and_so_is_its_age():
    control, reference, expected, age = KLControl(average=0.25), start_reference({"w": jnp.zeros(1)}), 0.0, 0.0
    for step in range(1, 30):
        reference = move_reference(control, reference, {"w": jnp.full(1, float(step))}, jnp.int32(step))
        expected, age = 0.75 * expected + 0.25 * step, 0.75 * (age + 1)
    np.testing.assert_allclose([float(reference.params["w"][0]), float(reference.age)], [expected, age], rtol=1e-5)
    np.testing.assert_allclose(age, 3.0, rtol=1e-2)  # (1 − w)/w


# --- through the learner


def changed(a, b):
    """The largest difference between the trained policies of two states."""
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(*map(jax.tree.leaves, (a.actor.params, b.actor.params)), strict=True)
    )


@pytest.fixture(scope="module")
def plain():
    """One update with nothing set."""
    return run_learn(make_world())[0]


def test_kl_as_a_loss_leaves_the_signals_and_enters_the_gradient():
    bare, _ = run_learn(make_world(kl_coeff=0.0))
    state, metrics = run_learn(make_world(kl_coeff=0.5, kl=KLControl(loss=k2)))
    assert changed(bare, state) > 1e-3
    chex.assert_trees_all_close(bare.critics["cost"].params, state.critics["cost"].params, atol=1e-6)
    assert float(metrics["train/kl_loss"]) > 0


def test_coefficient_is_the_controllers_or_follows_its_schedule():
    world = make_world(kl_coeff=0.4, kl=KLControl(schedule=lambda step: 1.0 / (1.0 + step)))
    later = world.state.replace(step=jnp.int32(3))
    np.testing.assert_allclose([kl_coefficient(world.hp, s) for s in (world.state, later)], [0.4, 0.1], rtol=1e-6)
    assert float(kl_coefficient(world.hp, later.replace(kl_coeff=jnp.float32(7.0)))) == 7.0
    assert kl_coefficient(make_world(kl_coeff=0.4).hp, later) == 0.4


@pytest.fixture(scope="module")
def following():
    """Three compiled iterations with a controller and a refreshed reference: the states after each, and the metrics."""
    control = KLControl(target=0.1, refresh_every=2)
    world = make_world(kl_coeff=0.2, kl=control, minibatches=2, optimizer=optax.adamw(1e-2))
    step = jax.jit(world.learn, donate_argnums=0)
    state, states, metrics, compiled = fresh(world.state), [], [], []
    for i in range(3):
        rollout = make_rollout(seed=i)
        with compilations() as found:
            state, measured = step(state, world.frozen, rollout, None, KEY)
        states.append(fresh(state))
        metrics.append(measured)
        compiled.append(bool(found))
    assert compiled == [True, False, False]
    return world, states, metrics


def test_controller_moves_the_coefficient_by_the_measured_kl(following):
    _, states, metrics = following
    coefficient = 0.2
    for state, measured in zip(states, metrics, strict=True):
        np.testing.assert_allclose(measured["train/kl_coeff"], coefficient, rtol=1e-5)
        coefficient = float(adapt(jnp.float32(coefficient), measured["train/kl"], target=0.1, gain=0.1))
        np.testing.assert_allclose(state.kl_coeff, coefficient, rtol=1e-5)


def test_moving_reference_is_donated_logged_and_used(following):
    world, states, metrics = following
    assert [float(m["train/reference_age"]) for m in metrics] == [0.0, 1.0, 0.0]
    chex.assert_trees_all_equal(states[1].reference.params, states[1].actor.params)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(states[2].reference.params, states[2].actor.params)
    assert float(metrics[2]["train/kl"]) == 0.0  # the third rollout is scored against the actor itself
    assert float(metrics[0]["train/kl"]) != 0.0
    chex.assert_trees_all_equal(states[0].reference.params, world.frozen.reference)


# --- switches of the update, each off unless set


# Not Adam, whose first step is g / (|g| + 1e-8): where |g| is 2e-7, it multiplies what rounding makes of g.
STEPS = {"optimizer": optax.sgd(0.02, momentum=0.9)}


@pytest.fixture(scope="module")
def unstopped():
    """By number of updates with a rollout: the state after them, the metrics, and how far π is from the sampler."""
    world, rollout = make_world(**STEPS), make_rollout()

    @jax.jit
    def distance(params):
        mask = response_mask(rollout)
        old, new = (rollout_log_probs(world.networks, world.hp, p, rollout) for p in (world.state.actor.params, params))
        return distance_terms(policy_ratio(new, old, mask), mask).mean()

    found = {0: (world.state, {}, 0.0)}
    for epochs in (1, 2, 3):
        state, metrics = run_learn(make_world(epochs=epochs, **STEPS))
        found[epochs] = state, metrics, float(distance(state.actor.params))
    return found


@pytest.mark.parametrize(("kept", "epochs", "microbatches"), [(0, 1, 1), (1, 4, 4), (2, 4, 1)])
def test_the_update_that_goes_too_far_is_undone_and_ends_the_updates(unstopped, kept, epochs, microbatches):
    (expected, _, before), (_, tried, after) = unstopped[kept], unstopped[kept + 1]
    assert before < after
    stop_kl = (before + after) / 2
    state, metrics = run_learn(make_world(stop_kl=stop_kl, epochs=epochs, microbatches=microbatches, **STEPS))
    assert int(metrics["train/updates"]) == kept == int(state.actor.step)
    assert int(state.step) == 1
    for ours, theirs in (
        (state.actor, expected.actor),
        *((state.critics[k], expected.critics[k]) for k in state.critics),
    ):
        chex.assert_trees_all_close(ours.params, theirs.params, atol=1e-6)
    # What is reported is measured before each update that was tried, the one that was undone included.
    np.testing.assert_allclose(metrics["train/actor_loss"], tried["train/actor_loss"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["train/approx_kl"], tried["train/approx_kl"], rtol=1e-3, atol=1e-7)


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    ratio, mask = jnp.array([[9.0, 9.0, 1.5]]), jnp.ones((1, 3), bool)

    def loss(advantages, **settings):
        return float(clipped_surrogate(ratio, jnp.array([advantages]), mask, clip_range_ratio=0.2, **settings))

    np.testing.assert_allclose(loss([-1.0, 0.0, 0.0]), 9.0 / 3, rtol=1e-6)
    np.testing.assert_allclose(loss([-1.0, 0.0, 0.0], dual_clip=3.0), 3.0 / 3, rtol=1e-6)
    np.testing.assert_allclose(loss([0.0, 2.0, -1.0], dual_clip=3.0), loss([0.0, 2.0, -1.0]), rtol=1e-6)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_response_tokens():
    rng = np.random.default_rng(0)
    mask = jnp.arange(6)[None] < jnp.array([6, 3, 1])[:, None]
    advantages = jnp.where(mask, jnp.asarray(rng.normal(4.0, 3.0, size=(3, 6)), jnp.float32), 1e6)
    white = np.asarray(whiten(advantages, mask))[np.asarray(mask)]
    np.testing.assert_allclose([white.mean(), white.std()], [0.0, 1.0], atol=1e-5)


def test_whitening_covers_the_whole_minibatch_however_it_is_cut(plain):
    whole, _ = run_learn(make_world(whiten=True))
    cut, _ = run_learn(make_world(whiten=True, microbatches=4))
    assert changed(whole, cut) < 1e-5
    assert changed(whole, plain) > 1e-4


def test_entropy_bonus_enters_the_update(plain):
    assert changed(run_learn(make_world(entropy_coeff=0.5))[0], plain) > 1e-4


def test_entropy_term_has_the_gradient_of_the_entropy_off_policy_too():
    old, log_probs = jax.nn.log_softmax(REFERENCE), jax.nn.log_softmax
    mask = jnp.ones((7, 1), bool)

    def estimate(logits):  # every token once, weighed by the sampler's probabilities
        new = log_probs(logits)
        terms = [
            negative_entropy(jnp.exp(new - old)[i].reshape(1, 1), new[i].reshape(1, 1), mask[:1]) for i in range(7)
        ]
        return (jnp.exp(old) * jnp.stack(terms)).sum()

    exact = jax.grad(lambda logits: (jax.nn.softmax(logits) * log_probs(logits)).sum())(LOGITS)
    np.testing.assert_allclose(jax.grad(estimate)(LOGITS), exact, rtol=1e-4, atol=1e-6)


def test_critics_warm_up_alone():
    world = make_world(critic_warmup=1)
    step = jax.jit(world.learn)
    first, _ = step(world.state, world.frozen, make_rollout(), None, KEY)
    chex.assert_trees_all_equal(first.actor, world.state.actor)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first.critics["cost"].params, world.state.critics["cost"].params)
    second, _ = step(first, world.frozen, make_rollout(), None, KEY)
    assert changed(first, second) > 1e-4
