import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from safe_rlhf_jax.models.parameters import is_matrix
from safe_rlhf_jax.optim import gradient_step, init_state, make_optimizer, schedule, split, stochastically_rounded
from safe_rlhf_jax.sharding import make_mesh

PARAMS = {"kernel": np.array([[1.0, -2.0]], np.float32), "bias": np.array([0.5], np.float32)}
GRADS = {"kernel": np.array([[0.3, -0.1]], np.float32), "bias": np.array([2.0], np.float32)}
SETTINGS = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def adamw_steps(steps, **overrides):
    optimizer = make_optimizer(0.01, **(SETTINGS | {"max_grad_norm": None} | overrides))
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_first_adamw_step_equals_the_formula_and_spares_biases_from_decay():
    params = adamw_steps(1)
    step = {k: g / (np.abs(g) + 1e-8) for k, g in GRADS.items()}  # m̂/√v̂ is the sign of the gradient
    np.testing.assert_allclose(params["kernel"], PARAMS["kernel"] - 0.01 * (step["kernel"] + 0.1 * PARAMS["kernel"]))
    np.testing.assert_allclose(params["bias"], PARAMS["bias"] - 0.01 * step["bias"])


@pytest.mark.reference
def test_adamw_equals_torch():
    import torch

    tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in PARAMS.items()}
    groups = [{"params": [tensors["kernel"]], "weight_decay": 0.1}, {"params": [tensors["bias"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for steps in (1, 2, 3):
        for k, t in tensors.items():
            t.grad = torch.tensor(GRADS[k])
        optimizer.step()
        chex.assert_trees_all_close(adamw_steps(steps), {k: t.detach().numpy() for k, t in tensors.items()}, atol=1e-6)


def test_only_matrices_and_embeddings_decay():
    tree = {"mlp": {"kernel": 0, "bias": 0}, "norm": {"weight": 0}, "embedding": 0, "score_bias": 0, "score_kernel": 0}
    expected = {
        "mlp": {"kernel": True, "bias": False},
        "norm": {"weight": False},
        "embedding": True,
        "score_bias": False,
        "score_kernel": True,
    }
    assert is_matrix(tree) == expected


def test_hold_linear_holds_half_then_falls_to_two_percent():
    rate = schedule("hold_linear", lr=1.0, warmup_ratio=0.0, total_steps=100)
    np.testing.assert_allclose([rate(i) for i in (0, 25, 50)], 1.0)
    np.testing.assert_allclose(rate(75), (1 + 0.02) / 2, rtol=1e-6)
    np.testing.assert_allclose([rate(100), rate(500)], 0.02, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_schedules_pass_through_their_values(name, middle, end):
    rate = schedule(name, lr=1.0, warmup_ratio=0.0, total_steps=100)
    np.testing.assert_allclose([rate(0), rate(50), rate(100)], [1.0, middle, end], atol=1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "hold_linear"])
def test_warmup_counts_updates_and_the_first_one_already_moves(name):
    rate = schedule(name, lr=1.0, warmup_ratio=0.1, total_steps=40)
    np.testing.assert_allclose([rate(i) for i in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    one = schedule(name, lr=1.0, warmup_ratio=0.1, total_steps=10)  # a single step of warm-up
    assert float(one(0)) == 1.0


def test_gradients_are_clipped_to_the_global_norm():
    # With a huge ε Adam's step is proportional to the gradient, so the clipping shows.
    def first_step(max_grad_norm):
        optimizer = make_optimizer(1.0, eps=1e6, max_grad_norm=max_grad_norm)
        return optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0]

    norm = float(optax.global_norm(GRADS))
    ratio = float(optax.global_norm(first_step(0.5)) / optax.global_norm(first_step(None)))
    np.testing.assert_allclose(ratio, 0.5 / norm, rtol=1e-4)
    chex.assert_trees_all_close(first_step(2 * norm), first_step(None))


def test_numbers_are_rounded_to_a_neighbour_and_stay_on_average():
    x = jnp.array([1.0, 1.001, -3.3e-5, 0.0, 1e-40, jnp.inf, -jnp.inf], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    rounded = np.asarray(jax.jit(jax.vmap(lambda key: stochastically_rounded(x, key)))(keys), np.float64)
    nearest = np.asarray(x.astype(jnp.bfloat16), np.float64)
    for number, outcomes, near in zip(np.asarray(x, np.float64), rounded.T, nearest, strict=True):
        found = np.unique(outcomes)
        assert near in found
        assert len(found) <= 2
        if len(found) == 2:
            assert found[0] < number < found[1]
            share = (number - found[0]) / (found[1] - found[0])
            assert abs((outcomes == found[1]).mean() - share) < 4 * (share * (1 - share) / len(keys)) ** 0.5
        else:
            assert found[0] == number


def test_moments_in_bfloat16_follow_those_in_float32_where_rounding_to_the_nearest_stands_still():
    """After a large gradient the second moment falls by a thousandth a step: less than half of a last digit."""
    gradients = [{"kernel": jnp.full((64, 64), 1.0 if i == 0 else 1e-3)} for i in range(1000)]

    def second_moment(optimizer, keep=lambda state: state):
        params = {"kernel": jnp.zeros((64, 64))}

        @jax.jit
        def step(state, gradient):
            return keep(optimizer.update(gradient, state, params)[1])

        state = optimizer.init(params)
        for gradient in gradients:
            state = step(state, gradient)
        moments = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        return moments[1].dtype, float(moments[1].astype(jnp.float32).mean())

    exact, rounded = (make_optimizer(1e-3, b2=0.999, max_grad_norm=None, moments=m) for m in ("float32", "bfloat16"))

    def to_the_nearest(state):
        floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if floating(x) else x, state)

    expected = second_moment(exact)[1]
    dtype, ours = second_moment(rounded)
    assert dtype == jnp.bfloat16
    np.testing.assert_allclose(ours, expected, rtol=0.02)
    assert second_moment(exact, to_the_nearest)[1] > 2 * expected


def test_stochastic_rounding_does_not_depend_on_the_mesh():
    params = {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}
    optimizer = make_optimizer(1e-3, max_grad_norm=None, moments="bfloat16")
    step = jax.jit(lambda params, state: optimizer.update(params, state, params))
    mesh = make_mesh((1, 4, 2))
    split = jax.device_put(params, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    with jax.set_mesh(mesh):
        ours = step(split, optimizer.init(split))
    chex.assert_trees_all_equal(jax.device_get(ours), jax.device_get(step(params, optimizer.init(params))))


def squared_error(params, batch):
    error = jnp.square(batch["x"] @ params["w"] - batch["y"])
    return error.mean(), {"mean": error.mean(), "errors": error}


def linear_problem():
    rng = np.random.default_rng(0)
    batch = {"x": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), "y": jnp.asarray(rng.normal(size=8), jnp.float32)}
    return {"w": jnp.ones(3)}, batch


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_take_the_step_of_the_whole_batch(microbatches):
    params, batch = linear_problem()
    optimizer = optax.sgd(0.1)
    whole, metrics = gradient_step(squared_error, init_state(params, optimizer), batch, optimizer)
    cut, cut_metrics = gradient_step(
        squared_error, init_state(params, optimizer), batch, optimizer, microbatches=microbatches
    )
    chex.assert_trees_all_close(whole.params, cut.params, atol=1e-6)
    for name in ("loss", "grad_norm", "mean"):
        np.testing.assert_allclose(metrics[name], cut_metrics[name], rtol=1e-5)
    np.testing.assert_allclose(np.sort(metrics["errors"]), np.sort(cut_metrics["errors"]), rtol=1e-5)
    assert int(cut.step) == 1  # one optimizer step, however many microbatches


def test_gradient_step_follows_the_gradient_and_reports_its_norm_before_clipping():
    params, batch = linear_problem()
    grads = jax.grad(lambda p: squared_error(p, batch)[0])(params)
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    state, metrics = gradient_step(squared_error, init_state(params, optimizer), batch, optimizer)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(state.params["w"] - params["w"]), 1e-3, rtol=1e-3)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_split_covers_every_row_once(parts):
    out = split({"a": jnp.arange(8), "b": jnp.arange(16).reshape(8, 2)}, parts)
    assert out["a"].shape == (parts, 8 // parts)
    assert sorted(out["a"].ravel().tolist()) == list(range(8))
    np.testing.assert_array_equal(out["b"][..., 0], 2 * out["a"])  # rows stay together
