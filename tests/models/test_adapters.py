"""Networks with adapters: what they compute, what they share, what they leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from safe_rlhf_jax.models.adapters import Adapted, hidden_of_roles, merged, output_of_trunk, unstacked, without_adapters
from safe_rlhf_jax.models.config import TARGETS, Lora, ModelConfig, ScoreConfig
from safe_rlhf_jax.models.families import FAMILIES
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from tests.helpers import apply, drawn, init

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 4, "max_positions": 64,
}  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (3, 10), 0, 61)
MASK = jnp.arange(10)[None] >= jnp.array([0, 2, 5])[:, None]
SHAPES = {
    "llama": {},
    "gpt2": {"positions": "learned", "norm": "layer", "attention_bias": True, "gated": False, "mlp_bias": True,
             "activation": "gelu", "tie_embeddings": True},
    "gemma2": {"block": "sandwich", "windows": (4, None, 4), "norm_unit_offset": True, "attention_softcap": 50.0},
    "qwen3": {"qk_norm": True},
    "phi": {"block": "parallel_shared", "norm": "layer", "attention_bias": True, "gated": False, "mlp_bias": True,
            "rotary_dim": 2},
}  # fmt: skip


def network(lora, scan=True, score=None, **sizes):
    config = ModelConfig(**SIZES | sizes, scan_layers=scan)
    layers = config.num_layers if lora.layers is None else lora.layers
    config = dataclasses.replace(config, lora=lora, trunk=config.num_layers - layers)
    return Adapted(CausalLM(config) if score is None else ScoreModel(config, score), "base")


def opened(net, seed=0, moved=True):
    """A base, and parameters of a network on it; `moved` as after training, else as before."""
    base = drawn(without_adapters(net.module), seed)
    return base, drawn(net, seed + 1) if moved else init(net, seed + 1)["params"]


@functools.partial(jax.jit, static_argnames=("net", "first", "method"))
def applied(net, base, params, tokens=TOKENS, mask=MASK, first=None, below=None, method=None, **stats):
    """The network on its base, compiled: op by op it takes longer."""
    columns = () if first is None else (first,) if below is None else (first, below)
    variables = {"params": params} | stats
    return net.on({"base": base}).apply(variables, tokens, mask, *columns, method=method)


FORMS = [Lora(3, 6.0), Lora(2, 4.0, layers=1), Lora(4, 4.0, ("q_proj", "down_proj"), 2, 0.0, True)]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=["all", "last", "some"])
def test_a_fresh_adapter_changes_no_bit(form, scan):
    net = network(form, scan)
    base, params = opened(net, moved=False)
    plain = apply(without_adapters(net.module), {"params": base}, TOKENS, MASK)
    assert jnp.array_equal(applied(net, base, params), plain)
    assert jnp.array_equal(applied(net, base, {}), plain)


@pytest.mark.parametrize(
    ("shape", "form", "scan"),
    [*((shape, FORMS[1], True) for shape in SHAPES), ("llama", FORMS[0], False), ("gemma2", FORMS[2], True)],
)
def test_merged_is_applied(shape, form, scan):
    net = network(form, scan, **SHAPES[shape])
    base, params = opened(net)
    ours = applied(net, base, params)
    plain, whole = merged(net.on({"base": base}), params)
    assert plain.config.lora is None
    np.testing.assert_allclose(apply(plain, {"params": whole}, TOKENS, MASK), ours, atol=1e-5, rtol=1e-5)
    assert jnp.abs(ours - apply(plain, {"params": base}, TOKENS, MASK)).max() > 1e-3
    plain, apart = merged(*unstacked(net.on({"base": base}), params))
    assert not plain.config.scan_layers
    np.testing.assert_allclose(apply(plain, {"params": apart}, TOKENS, MASK), ours, atol=1e-5, rtol=1e-5)
    for path, leaf in flatten_dict(merged(net.on({"base": base}), params, lazily=True)[1]).items():
        rows = jnp.stack([leaf[i] for i in range(leaf.shape[0])])
        assert rows.dtype == leaf.dtype
        np.testing.assert_allclose(rows, flatten_dict(whole)[path], atol=1e-6)


def test_families_of_these_shapes_exist():
    assert SHAPES.keys() <= FAMILIES.keys()
    assert len(TARGETS) == 7


@pytest.mark.parametrize("form", FORMS, ids=["all", "last", "some"])
def test_one_pass_over_roles_is_a_pass_each(form):
    net = network(form)
    base, first = opened(net)
    _, second = opened(net, seed=7)

    @jax.jit
    def in_one_pass(base, roles):
        bound = net.on({"base": base})
        below = output_of_trunk(bound, TOKENS, MASK)
        return hidden_of_roles(bound, roles, TOKENS, MASK, 4), hidden_of_roles(bound, roles, TOKENS, MASK, 4, below)

    together, above = in_one_pass(base, [{}, first, second])
    for i, params in enumerate([{}, first, second]):
        alone = applied(net, base, params, first=4, method="hidden")
        np.testing.assert_allclose(together[i], alone, atol=1e-5)
        np.testing.assert_allclose(above[i], alone, atol=1e-5)


def test_the_trunk_is_the_same_for_all_and_what_stands_on_it_is_the_network():
    net = network(Lora(2, 4.0, layers=1))
    base, params = opened(net)
    below = jax.jit(lambda base: output_of_trunk(net.on({"base": base}), TOKENS, MASK))(base)
    whole = applied(net, base, params, first=3, method="hidden")
    above = applied(net, base, params, first=3, below=below, method="hidden")
    assert jnp.array_equal(whole, above)


@pytest.mark.parametrize("scan", [True, False])
def test_decoding_with_a_cache_is_the_full_pass(scan):
    net = network(Lora(2, 4.0, layers=2), scan)
    base, params = opened(net)
    tokens, mask = TOKENS, jnp.ones_like(MASK)
    full = applied(net, base, params, mask=mask)
    logits, cache = applied(net, base, params, tokens[:, :6], mask[:, :6], 10, method="prefill")
    decode = jax.jit(lambda base, *args: net.on({"base": base}).apply({"params": params}, *args, method="decode"))
    np.testing.assert_allclose(logits, full[:, 5], atol=1e-5)
    for t in range(6, 10):
        visible = jnp.broadcast_to(jnp.arange(10) <= t, (3, 10))
        position = jnp.full((3,), t)
        logits, cache = decode(base, tokens[:, t], position, visible, cache, jnp.int32(t))
        np.testing.assert_allclose(logits, full[:, t], atol=1e-5)


def test_scanned_and_unrolled_are_one_network():
    form = Lora(3, 6.0, layers=2)
    scanned, unrolled = network(form, True), network(form, False)
    base, params = opened(scanned)
    found, apart = unstacked(scanned.on({"base": base}), params)
    assert found.module == unrolled.module
    ours = applied(scanned, base, params)
    theirs = applied(unrolled, found.bound, apart)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_critic_and_a_scorer_read_their_own_heads_on_one_base():
    lora = Lora(2, 4.0)
    scorer, critic = (network(lora, score=ScoreConfig(kind)) for kind in ("cost", "critic"))
    base, params = opened(scorer)
    stats = {"mean": jnp.zeros(1), "var": jnp.ones(1), "count": jnp.zeros(1, jnp.int32)}
    scores = applied(scorer, base, params, stats=stats)
    values = applied(critic, base, params)
    assert jnp.array_equal(scores, values)
    assert jnp.abs(values).max() > 0


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_are_those_of_the_adapter_and_none_of_the_base_is_computed(remat):
    net = network(Lora(3, 6.0), remat=remat, hidden_size=20, intermediate_size=28)
    base, params = opened(net)

    def loss(params, base):
        return (net.on({"base": base}).apply({"params": params}, TOKENS, MASK) ** 2).mean()

    grads = jax.jit(jax.grad(loss))(params, base)
    assert jax.tree.structure(grads) == jax.tree.structure(params)

    def merged_loss(params, base):
        plain, whole = merged(net.on({"base": base}), params)
        return (plain.apply({"params": whole}, TOKENS, MASK) ** 2).mean()

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3),
        grads,
        jax.jit(jax.grad(merged_loss))(params, base),
    )
    text = jax.jit(jax.grad(loss)).lower(params, base).compile().as_text()
    results = [line.split(" dot(")[0] for line in text.splitlines() if " dot(" in line]
    of_base = [line for line in results if "[20,28]" in line or "[28,20]" in line]
    assert not of_base, of_base


def test_dropout_acts_in_training_only_and_by_its_key():
    net = network(dataclasses.replace(FORMS[0], dropout=0.5))
    base, params = opened(net)
    read = applied(net, base, params)
    train = jax.jit(lambda key: net.on({"base": base}, key).apply({"params": params}, TOKENS, MASK))
    first, again, other = (train(jax.random.key(i)) for i in (0, 0, 1))
    assert jnp.array_equal(first, again)
    assert not jnp.allclose(first, other)
    assert not jnp.allclose(first, read)
