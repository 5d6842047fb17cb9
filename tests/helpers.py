"""Small networks and random batches, and what is looked at in many tests."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import ModelConfig, ScoreConfig
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.types import PromptBatch

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_positions=64,
    initializer_range=0.2,  # large enough that logits differ
    scan_layers=False,
)


def tiny_config(**overrides):
    return ModelConfig(**{**vars(TINY), **overrides})


@functools.cache
def init(module, seed=0):
    key = jax.random.key(seed, impl="unsafe_rbg")  # compiles several times faster than the default
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = jax.jit(module.init)(key, tokens, jnp.ones((1, 4), bool))
    return nn.unbox(variables)


def drawn(module, seed=0):
    """Random parameters of a network, weights of norms about 1; `init` takes longer, because it is compiled."""
    tokens, rng = jnp.zeros((1, 4), jnp.int32), np.random.default_rng(seed)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), tokens, tokens == 0))["params"]

    def draw(path, leaf):
        return jnp.asarray((path[-1].key == "weight") + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


def make_lm(config, seed=0):
    module = CausalLM(config)
    return module, dict(init(module, seed))


def make_scorer(score_type, config, seed=0, **score):
    module = ScoreModel(config, ScoreConfig(score_type, **score))
    return module, dict(init(module, seed))


@functools.partial(jax.jit, static_argnames=("module", "method"))
def apply(module, variables, *args, method=None):
    """`module.apply`, compiled: op by op it takes longer."""
    return module.apply(variables, *args, method=method)


@contextlib.contextmanager
def compilations():
    """Collects the seconds of every compilation within the block; a program from the cache on disk is one as well."""
    found = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def stage_of(config, name):
    """The stage of a run's config with a name."""
    return next(stage for stage in config.stages if stage.name == name)


def random_lengths(rng, batch, length):
    """From 1 to `length`, the first row full."""
    return np.concatenate([[length], rng.integers(1, length + 1, batch - 1)])


def prompt_batch(rng, batch, length, vocab):
    """Random left-padded prompts; padding is token 0."""
    tokens, mask = right_padded(rng, batch, length, vocab)
    return PromptBatch(tokens=tokens[:, ::-1], mask=mask[:, ::-1], group=jnp.zeros((batch,), jnp.int32))


def right_padded(rng, batch, length, vocab):
    """Random tokens i32[B, L] and mask bool[B, L]; padding is token 0."""
    mask = np.arange(length) < random_lengths(rng, batch, length)[:, None]
    tokens = np.where(mask, rng.integers(3, vocab, (batch, length)), 0)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


def perturbed(variables, seed=0):
    """Adds noise to every parameter, so that biases are not zero and norm weights not one."""
    rng = np.random.default_rng(seed)
    noise = lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return variables | {"params": jax.tree.map(noise, variables["params"])}


def save_models(folder, policies, config, tokenizer):
    """Saves policies by these names, and models `reward` and `cost`, as Hugging Face folders with random parameters."""
    made = {name: make_lm(config) for name in policies} | {
        kind: make_scorer(kind, config) for kind in ("reward", "cost")
    }
    for seed, (name, (module, variables)) in enumerate(made.items()):
        hf.save(folder / name, module, perturbed(variables, seed), tokenizer)


def in_two_processes(monkeypatch, first, other):
    """Returns the results of two calls as if two processes made them: what the first broadcasts, the other receives."""
    sent, found = [], []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("safe_rlhf_jax.processes.any_process", bool)
    for index, (call, broadcast) in enumerate(
        ((first, lambda value: sent.append(value) or value), (other, lambda _: sent.pop(0)))
    ):
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", broadcast)
        found.append(call())
    return found
