import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.sharding import (
    constrain,
    decoding_layout,
    init_sharded,
    make_mesh,
    partition_spec,
    parts,
    replicated,
    scattered,
    shard_batch,
)
from tests.helpers import tiny_config


def test_partition_spec_maps_logical_to_mesh_axes():
    assert partition_spec(("batch", "length", None)) == PartitionSpec(("data", "fsdp", "decode"), None, None)
    assert partition_spec(("embed", "mlp")) == PartitionSpec(("fsdp", "decode"), "tensor")
    with decoding_layout():
        assert partition_spec(("batch", "length", None)) == PartitionSpec(("data", "fsdp"), None, None)
        assert partition_spec(("embed", "mlp")) == PartitionSpec("fsdp", ("decode", "tensor"))
    assert partition_spec(("mlp",)) == PartitionSpec("tensor")


@pytest.mark.parametrize("names", [("heads", "mlp"), ("batch", "embed"), ("vocab", "vocab")])
def test_two_dimensions_on_one_mesh_axis_are_refused(names):
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        partition_spec(names)


@pytest.mark.parametrize("shape", [(3, 1, 1), (8, 2, 1), (-1, 3, 1), (0, 8, 1)])
def test_a_mesh_that_does_not_fit_is_refused_with_numbers_and_the_fix(shape):
    with pytest.raises(ValueError, match=r"needs \d+ devices, 8 are present.*sizes 8, or set one size to -1"):
        make_mesh(shape)


def test_a_mesh_takes_the_devices_that_remain():
    assert dict(make_mesh((2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "decode": 1, "tensor": 2}
    assert dict(make_mesh((1, -1, 1), decode=4).shape) == {"data": 1, "fsdp": 2, "decode": 4, "tensor": 1}
    assert dict(make_mesh((1, 1, 1), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "decode": 1, "tensor": 1}


def test_parameters_are_born_in_their_shards():
    module = CausalLM(tiny_config(vocab_size=24, hidden_size=16, intermediate_size=32, num_layers=1, head_dim=4))
    tokens = jnp.zeros((1, 4), jnp.int32)
    init = lambda key: module.init(key, tokens, tokens == 0)  # noqa: E731
    sharded = init_sharded(init, make_mesh((2, 2, 2)), jax.random.key(0))
    embedding = sharded["params"]["decoder"]["embedding"]
    assert embedding.shape == (24, 16)
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(12, 8)}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(sharded))
    whole = nn.unbox(jax.jit(init)(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), jax.device_get(whole))


def test_constrain_has_no_effect_without_a_mesh_and_shards_with_one():
    x = jnp.zeros((8, 4), jnp.float32)
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(make_mesh((8, 1, 1))):
        y = jax.jit(lambda x: constrain(x, "batch", None))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(1, 4)}


@pytest.mark.parametrize("names", [("embed", "mlp"), ("mlp", "embed")])
@pytest.mark.parametrize(("shape", "decode"), [((1, 4, 2), 1), ((2, 4, 1), 1), ((8, 1, 1), 1), ((1, 2, 2), 2)])
def test_gradient_is_scattered_as_named(names, shape, decode):
    x = jnp.arange(32, dtype=jnp.float32).reshape(8, 4)
    with jax.set_mesh(mesh := make_mesh(shape, decode=decode)):
        gradient = jax.jit(lambda x: scattered(2 * x, names))(x)
    np.testing.assert_array_equal(gradient, 2 * x)
    split = [1 if parts("embed", mesh.shape) == 1 else parts(name, mesh.shape) for name in names]
    assert {shard.data.shape for shard in gradient.addressable_shards} == {(8 // split[0], 4 // split[1])}


def test_batches_are_split_along_rows():
    mesh = make_mesh((2, 2, 2))
    batch = shard_batch({"a": np.arange(8), "b": np.ones((8, 3))}, mesh)
    assert {shard.data.shape for shard in batch["a"].addressable_shards} == {(2,)}
    assert {shard.data.shape for shard in batch["b"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["a"], np.arange(8))
    assert jax.device_put(np.ones(3), replicated(mesh)).sharding.is_fully_replicated
