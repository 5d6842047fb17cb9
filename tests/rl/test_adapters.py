"""A step of reinforcement learning whose networks are adapters on a base: what it computes, and what it never does."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safe_rlhf_jax.aot.collectives import find_collectives
from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.evaluation.evaluate import make_respond
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.models.adapters import Adapted, without_adapters
from safe_rlhf_jax.models.config import Lora, ScoreConfig
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.ops import ends_with, gather_last, response_log_probs, sequence_scores, with_ends
from safe_rlhf_jax.optim import init_state
from safe_rlhf_jax.rl.kl import KLControl, k2, start_reference
from safe_rlhf_jax.rl.rollout import score_rollout
from safe_rlhf_jax.sharding import make_mesh, named_shardings, replicated, shard_batch
from safe_rlhf_jax.stages.networks import jit_step
from safe_rlhf_jax.types import Frozen
from tests.helpers import apply, init, prompt_batch
from tests.rl import world as full
from tests.rl.world import PROMPT, fresh, make_rollout

KEY = jax.random.key(3)
LAYERS, ROWS = 2, 32
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_layers": LAYERS}
# Of the matrices of a base, as products see them; no activation and no adapter has such a shape.
MATRICES = {(32, 16), (32, 8), (16, 32), (32, 40), (40, 32), (32, full.VOCAB)}
ALL, LAST = Lora(3, 6.0), Lora(3, 6.0, layers=1)
FORMS = pytest.mark.parametrize("lora", [ALL, LAST], ids=["all layers", "last layer"])
SEEDS = {"base": 0, "safety": 1}  # of bases


def moved(tree, seed):
    """Parameters as after training: B is not 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), tree)


def network(kind, lora, seed, base="base", *, trained=True):
    """A network with adapters and its variables; `kind` is lm, reward, cost or critic."""
    config = dataclasses.replace(full.CONFIG, **SIZES, lora=lora, trunk=LAYERS - (lora.layers or LAYERS))
    net = Adapted(CausalLM(config) if kind == "lm" else ScoreModel(config, ScoreConfig(kind)), base)
    variables = dict(init(net, seed))
    return net, variables | ({"params": moved(variables["params"], seed)} if trained else {})


def make_world(algorithm="ppo_lag", lora=ALL, *, base_of_scorers="base", trained=True, **hp):
    """The world of tests/rl/world.py with adapters; the scorers stand on a base, or (None) are fully trained."""
    world, optimizer = full.make_world(algorithm, **hp), optax.sgd(0.1, momentum=0.9)
    make = functools.partial(network, lora=lora, trained=trained)
    policy, actor = make("lm", seed=0)
    critics = {s: make("critic", seed=20 + i) for i, s in enumerate(world.state.critics)}
    scorers = {s: (world.networks.scorers[s], world.frozen.scorers[s]) for s in world.networks.scorers}
    if base_of_scorers:
        scorers = {s: make(s, seed=10 + i, base=base_of_scorers) for i, s in enumerate(scorers)}
    networks = dataclasses.replace(
        world.networks, policy=policy, scorers={s: net for s, (net, _) in scorers.items()},
        critics={s: net for s, (net, _) in critics.items()},
        actor_optimizer=optimizer, critic_optimizers=dict.fromkeys(critics, optimizer),
    )  # fmt: skip
    state = dataclasses.replace(
        world.state,
        actor=init_state(fresh(actor["params"]), optimizer),
        critics={s: init_state(fresh(variables["params"]), optimizer) for s, (_, variables) in critics.items()},
        reference=start_reference(fresh(actor["params"])) if world.hp.kl.moves_reference else None,
    )
    bases = {name: dict(init(without_adapters(policy.module), SEEDS[name]))["params"]
             for name in {"base", base_of_scorers} - {None}}  # fmt: skip
    frozen = Frozen(reference={}, scorers={s: variables for s, (_, variables) in scorers.items()}, bases=bases)
    return dataclasses.replace(world, networks=networks, state=state, frozen=frozen)


def run_learn(world):
    return jax.jit(world.learn)(world.state, world.frozen, make_rollout(), None, KEY)


def products(text, *scopes):
    """(path in the trace, shape of the result) of the matrix products within scopes."""
    lines = re.findall(r"= f32\[([\d,]*)\]\S* dot\(.*op_name=\"([^\"]*)\"", text)
    found = [(name, tuple(int(n) for n in shape.split(",") if n)) for shape, name in lines]
    return [(name, shape) for name, shape in found if all(scope in name for scope in scopes)]


# --- Scoring


def in_one_pass(world, state, frozen, rollout):
    scored = score_rollout(
        world.networks.on(frozen.bases), state, frozen, rollout, temperature=1.0,
        recompute_log_probs=True, slices=1,
    )  # fmt: skip
    return scored.log_probs, scored.ref_log_probs, scored.scores, scored.values


def in_a_pass_each(world, state, frozen, rollout):
    """The same of networks without adapters: the base, with the heads."""
    base, networks, tokens, mask = frozen.bases["base"], world.networks, rollout.tokens, rollout.mask

    def read(net, params, **stats):
        plain = without_adapters(net.module)
        return plain.apply({"params": base | params["head"]} | stats, tokens, mask, PROMPT - 1)

    policy = without_adapters(networks.policy.module)
    log_probs = response_log_probs(policy, base, tokens, mask, prompt_length=PROMPT)
    scores = {
        s: gather_last(read(net, **frozen.scorers[s]), mask[:, PROMPT - 1 :]) for s, net in networks.scorers.items()
    }
    values = {s: read(net, state.critics[s].params)[:, :-1] for s, net in networks.critics.items()}
    return log_probs, log_probs, scores, values


def check_ends(world):
    """Scorers read an end after the first row of a rollout, which is truncated; nothing else changes."""

    @functools.partial(jax.jit, static_argnames="end_id")
    def scored(rollout, end_id=None):
        networks = world.networks.on(world.frozen.bases)
        return score_rollout(
            networks, world.state, world.frozen, rollout, temperature=1.0, recompute_log_probs=True, slices=2,
            eos_id=2, end_id=end_id,
        )  # fmt: skip

    rollout = make_rollout()
    as_is, ended = scored(rollout), scored(rollout, end_id=7)
    more = jnp.full((len(rollout.tokens), 1), 7), jnp.arange(len(rollout.tokens))[:, None] == 0
    text = tuple(jnp.concatenate(pair, 1) for pair in zip((rollout.tokens, rollout.mask), more, strict=True))
    networks = world.networks.on(world.frozen.bases)
    for signal, scorer in networks.scorers.items():
        expected = jax.jit(functools.partial(sequence_scores, scorer))(world.frozen.scorers[signal], *text)
        np.testing.assert_allclose(ended.scores[signal], expected, atol=1e-5)
        assert abs(float(ended.scores[signal][0] - as_is.scores[signal][0])) > 1e-3
    real = [
        dataclasses.replace(one, scores={}, below=jax.tree.map(lambda x: x[rollout.mask], one.below))
        for one in (as_is, ended)
    ]
    chex.assert_trees_all_close(*real, atol=1e-5)


@FORMS
def test_scorers_read_an_end_after_truncated_responses_and_the_other_adapters_none(lora):
    check_ends(make_world(lora=lora))


def test_scorers_read_an_end_after_truncated_responses_and_the_other_networks_none():
    check_ends(full.make_world())


@functools.cache
def before_training(score, lora):
    """What a way to score returns, and the text of its program."""
    world = make_world(lora=lora, trained=False)
    arguments = world.state, world.frozen, make_rollout()
    program = jax.jit(functools.partial(score, world)).lower(*arguments).compile()
    return program(*arguments), program.as_text()


@FORMS
def test_before_training_every_role_is_its_network_without_adapters(lora):
    """The actor bit for bit; products of the one pass have the rows of all roles, which may round otherwise."""
    ours, theirs = (before_training(score, lora)[0] for score in (in_one_pass, in_a_pass_each))
    assert jnp.array_equal(ours[0], theirs[0])
    chex.assert_trees_all_close(ours, theirs, atol=3e-6, rtol=0)
    np.testing.assert_allclose(ours[0], ours[1], atol=3e-6)  # no KL


@FORMS
def test_the_base_is_read_once_for_the_actor_and_once_for_all_other_roles(lora):
    last = f"layers_{LAYERS - 1 if lora == ALL else 0}/mlp/up_proj/dot_general"
    rows = full.ROWS * (full.RESPONSE + 1)
    sizes = [math.prod(shape) for _, shape in products(before_training(in_one_pass, lora)[1], last)]
    assert sorted(sizes) == [rows * 40, 5 * rows * 40]


# --- One step


@dataclasses.dataclass(frozen=True)
class Learned:
    world: full.World
    text: str
    given: object  # the donated state
    state: object
    metrics: dict


def learned_on(shape, lora, **hp):
    """One step from trained adapters, on a mesh, compiled as a run does."""
    world = make_world(lora=lora, minibatches=2, **hp)
    mesh = make_mesh(shape, jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        state, frozen = on_mesh(world, mesh)
        arguments = state, frozen, shard_batch(make_rollout(ROWS), mesh), None, jax.device_put(KEY, replicated(mesh))
        step = jit_step(world.learn, state, mesh).lower(*arguments).compile()
        after, metrics = step(*arguments)
    return Learned(dataclasses.replace(world, frozen=frozen), step.as_text(), state, *jax.device_get((after, metrics)))


def on_mesh(world, mesh):
    """State and frozen networks, parameters in their shards."""
    tokens = jnp.zeros((1, 2), jnp.int32)

    def placed(module, variables):
        boxed = jax.eval_shape(lambda key: module.init(key, tokens, tokens == 0), KEY)
        return {name: jax.device_put(fresh(variables[name]), s) for name, s in named_shardings(boxed, mesh).items()}

    def start(module, train_state):
        return init_state(placed(module, {"params": train_state.params})["params"], world.networks.actor_optimizer)

    networks, state = world.networks, jax.device_put(world.state, replicated(mesh))
    critics = {s: start(networks.critics[s], critic) for s, critic in world.state.critics.items()}
    state = dataclasses.replace(state, actor=start(networks.policy, world.state.actor), critics=critics)
    state = jax.tree.map(lambda x: x if len(x.sharding.device_set) > 1 else jax.device_put(x, replicated(mesh)), state)
    base = placed(without_adapters(networks.policy.module), {"params": world.frozen.bases["base"]})["params"]
    scorers = {s: placed(networks.scorers[s], variables) for s, variables in world.frozen.scorers.items()}
    return state, dataclasses.replace(world.frozen, scorers=scorers, bases={"base": base})


@functools.cache
def learned(lora):
    return learned_on((1, 1, 1), lora, microbatches=2)


@pytest.fixture(scope="module")
def on_eight_devices():
    return learned_on((1, 8, 1), ALL)


def trained(state):
    """What an update changes."""
    return state.actor.params, {s: critic.params for s, critic in state.critics.items()}, state.constraints


@FORMS
def test_first_ratio_is_exactly_one(lora):
    assert float(learned(lora).metrics["train/first_ratio_gap"]) == 0.0


@FORMS
def test_every_adapter_and_head_moves_and_no_bit_of_a_base(lora):
    after, before = learned(lora), make_world(lora=lora, minibatches=2, microbatches=2)
    chex.assert_trees_all_equal(after.world.frozen, before.frozen)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), trained(after.state)[:2], trained(before.state)[:2])
    assert all(jax.tree.leaves(changed))
    assert set(after.state.actor.params) == {"adapter"}
    assert {frozenset(c.params) for c in after.state.critics.values()} == {frozenset({"adapter", "head"})}


def test_the_state_is_donated_and_the_base_is_not():
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((learned(ALL).given.actor, learned(ALL).given.critics)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(learned(ALL).world.frozen))


def test_no_gradient_or_moment_has_the_shape_of_a_matrix_of_the_base(on_eight_devices):
    of_adapters = {(32, 3), (3, 40), (40, 3)}
    for run in (learned(ALL), on_eight_devices):
        shapes = {shape for _, shape in products(run.text, "/update/")}
        assert shapes >= of_adapters
        assert not shapes & (MATRICES | {shape[::-1] for shape in MATRICES})
    kernels = {leaf.shape for leaf in jax.tree.leaves(learned(ALL).world.frozen.bases) if leaf.ndim > 1}
    assert kernels >= {(32, 40), (32, 4, 4)}
    assert not kernels & {leaf.shape for leaf in jax.tree.leaves(learned(ALL).state)}
    sums = [c for c in find_collectives(Module(on_eight_devices.text), {"data": 1, "fsdp": 8, "tensor": 1})
            if c.kind in ("all-reduce", "reduce-scatter")]  # fmt: skip
    summed = {array.shape for c in sums for array in c.arrays}
    assert summed >= {(32, 3), (40, 3)}
    assert not summed & (MATRICES | kernels)


def test_gradients_of_a_base_would_be_seen():
    module = without_adapters(make_world().networks.policy.module)
    base, rollout = init(module, 0)["params"], make_rollout()

    def loss(params):
        return module.apply({"params": params}, rollout.tokens, rollout.mask).sum()

    text = jax.jit(jax.grad(loss)).lower(base).compile().as_text()
    assert {shape for _, shape in products(text)} >= MATRICES


def test_the_trunk_is_computed_once_in_scoring_and_not_at_all_in_the_update():
    """So none of its activations is kept for a backward pass: what is differentiated is in the update."""
    text = learned(LAST).text
    assert len(products(text, "trunk_0/mlp/up_proj/dot_general")) == 1
    updated = [name for name in re.findall(r'op_name="([^"]*)"', text) if "/update/" in name]
    assert not [name for name in updated if "trunk" in name]
    assert [name for name in updated if "layers_0" in name]


def test_eight_devices_take_the_same_step(on_eight_devices):
    one, eight = learned(ALL), on_eight_devices
    chex.assert_trees_all_close(trained(one.state), trained(eight.state), atol=1e-5, rtol=0)
    for name in ("actor_loss", "actor_grad_norm", "reward_critic_loss", "cost_critic_grad_norm"):
        np.testing.assert_allclose(one.metrics[f"train/{name}"], eight.metrics[f"train/{name}"], rtol=1e-4, atol=1e-5)


# --- Several bases, references and algorithms


def test_fully_trained_scorers_stand_beside_adapters_of_an_algorithm_without_critics():
    world = make_world("rloo_lag", base_of_scorers=None, num_responses=2)
    state, metrics = run_learn(world)
    assert not state.critics
    assert float(metrics["train/first_ratio_gap"]) == 0.0
    rollout = make_rollout()
    for signal, scorer in world.networks.scorers.items():
        scores = apply(scorer, world.frozen.scorers[signal], rollout.tokens, rollout.mask)
        np.testing.assert_allclose(metrics[f"train/{signal}"], gather_last(scores, rollout.mask).mean(), rtol=1e-5)


@pytest.fixture(scope="module")
def following():
    """A step with scorers on a base of their own and a reference that follows the actor."""
    world = make_world("grpo_lag", base_of_scorers="safety", num_responses=4, kl=KLControl(loss=k2, average=0.25))
    return world, *run_learn(world)


def test_adapters_stand_on_several_bases(following):
    world, _, metrics = following
    rollout = make_rollout()
    assert set(world.frozen.bases) == {"base", "safety"}
    for signal, scorer in world.networks.scorers.items():
        read = jax.jit(lambda bases, *arguments, scorer=scorer: scorer.on(bases).apply(*arguments))
        scores = read(world.frozen.bases, world.frozen.scorers[signal], rollout.tokens, rollout.mask)
        np.testing.assert_allclose(metrics[f"train/{signal}"], gather_last(scores, rollout.mask).mean(), rtol=1e-5)


def test_a_moving_reference_is_a_copy_of_the_adapter_that_follows_it(following):
    world, state, metrics = following
    assert float(metrics["train/first_ratio_gap"]) == 0.0
    assert abs(float(metrics["train/kl"])) < 1e-5
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, world.state.actor.params, state.actor.params)
    chex.assert_trees_all_close(state.reference.params, expected, atol=1e-6)


# --- Evaluation


def test_evaluation_reads_each_network_on_its_own_base_and_in_its_own_form():
    """Networks of one base and form share a pass; a policy without an adapter, and a scorer on another base, do not."""
    policy, other = network("lm", ALL, 0)[0], network("lm", LAST, 0)[0]

    def base_of(net):
        return dict(init(without_adapters(net.module), SEEDS[net.base]))["params"]

    def on_base(net, variables):
        return net, {**variables, "params": {**variables["params"], "base": base_of(net)}}

    scorers = {
        "reward": on_base(*network("reward", ALL, 10)),
        "cost": on_base(*network("cost", ALL, 11, "safety")),
        "judge": on_base(*network("cost", LAST, 12)),
    }
    actor = {**network("lm", ALL, 0)[1]["params"], "base": base_of(policy)}
    frozen = Frozen(reference={"base": base_of(other)}, scorers={s: variables for s, (_, variables) in scorers.items()})
    options = {"reference": other, "response_length": 6, "eos_id": 2, "pad_id": 0, "sampling": Sampling()}
    nets = {s: net for s, (net, _) in scorers.items()}
    prompts = prompt_batch(np.random.default_rng(0), 8, PROMPT, full.VOCAB)
    out, ended = (make_respond(policy, nets, **options, end_id=end)(actor, frozen, prompts, KEY) for end in (None, 7))
    mask = jnp.arange(6)[None] < out["length"][:, None]
    tokens = jnp.concatenate([prompts.tokens, out["tokens"]], 1)
    text = tokens, jnp.concatenate([prompts.mask, mask], 1)
    assert not ends_with(*text, 2).all()
    for signal, (net, variables) in scorers.items():
        scores = jax.jit(functools.partial(sequence_scores, net))(variables, *text)
        np.testing.assert_allclose(out[signal], scores, atol=1e-5)
        scores = jax.jit(functools.partial(sequence_scores, net))(variables, *with_ends(*text, 2, 7))
        np.testing.assert_allclose(ended[signal], scores, atol=1e-5)
    np.testing.assert_allclose(ended["kl"], out["kl"], atol=1e-5)
    plain = without_adapters(other.module), base_of(other)
    read = jax.jit(response_log_probs, static_argnames=("module", "prompt_length"))
    ours, theirs = (read(*of, *text, prompt_length=PROMPT) for of in ((policy, actor), plain))
    np.testing.assert_allclose(out["kl"], jnp.where(mask, ours - theirs, 0.0).sum(-1), atol=1e-5)
