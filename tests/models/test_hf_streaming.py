"""Weights go from their files into their shards, and back, one tensor at a time."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.sharding import make_mesh
from tests.helpers import make_lm, perturbed, tiny_config

# Divides among eight devices in every way that the table of shardings knows.
CONFIG = tiny_config(vocab_size=96, hidden_size=32, intermediate_size=64, num_heads=8, num_kv_heads=8, head_dim=8)
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (8, 1, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    module, variables = make_lm(CONFIG)
    return hf.save(tmp_path_factory.mktemp("lm"), module, perturbed(variables), max_file_bytes=20_000)


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_device_gets_its_shards_and_nothing_more(folder, mesh, scan_layers):
    _, whole = hf.load(folder, scan_layers=scan_layers)
    _, sharded = hf.load(folder, scan_layers=scan_layers, mesh=make_mesh(mesh))
    assert_trees_equal(sharded, whole)
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(sharded):
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    # Norms are whole everywhere, and what only `fsdp` or only `tensor` splits is whole along the other axis.
    allowed = {(1, 8, 1): 1 / 8 + 0.02, (1, 1, 8): 1 / 8 + 0.02, (2, 2, 2): 1 / 4 + 0.02, (8, 1, 1): 1.0}[mesh]
    assert max(held.values()) <= allowed * total


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A model of 38 MB in files of at most 1 MB, its size and that of its largest parameter."""
    config = tiny_config(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_layers=8, num_heads=8, num_kv_heads=8,
        head_dim=32, scan_layers=True,
    )  # fmt: skip
    shapes = hf.abstract_variables(CausalLM(config))
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)
    folder = tmp_path_factory.mktemp("larger")
    peak, _ = host_bytes(lambda: hf.save(folder, CausalLM(config), variables, max_file_bytes=10**6))
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(variables)]
    return folder, sum(sizes), max(sizes), peak


def host_bytes(function):
    """Most bytes that a call allocates in the host's memory beyond those that it leaves behind, and its result.

    What it leaves behind are parameters: jax on CPU takes an array over without a copy where its address allows.
    """
    tracemalloc.start()
    result = function()
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - left, result


@pytest.mark.parametrize("mesh", [None, (1, 8, 1), (1, 1, 8)], ids=str)
def test_loading_holds_one_shard_of_one_parameter_in_host_memory(larger, mesh):
    folder, total, parameter, _ = larger
    mesh = mesh and make_mesh(mesh)
    hf.load(folder, mesh=mesh)  # what stays in caches does not count
    peak, _ = host_bytes(lambda: hf.load(folder, mesh=mesh))
    shard = parameter / (8 if mesh else 1)
    assert shard <= total / 4
    assert peak < 1.5 * shard + 4 * 2**20  # what tracing and reading the config take


def test_saving_holds_one_stored_tensor_in_host_memory(larger):
    folder, total, _, peak = larger
    tensor = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert tensor < total / 15
    assert peak < 2.5 * tensor


def test_weights_are_split_into_files_that_transformers_knows(folder):
    index = json.loads((folder / hf.INDEX).read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert max((folder / file).stat().st_size for file in files) < 20_000 + 4_000
    stored = {name: array for file in files for name, array in load_file(folder / file).items()}
    assert stored.keys() == index["weight_map"].keys() == hf.weight_map(CONFIG, None).keys()


@pytest.mark.parametrize("score_type", ["reward", "critic"])
def test_statistics_and_fresh_heads_are_put_on_the_mesh(folder, score_type):
    mesh = make_mesh((2, 2, 2))
    _, sharded = hf.load(folder, "score", score_type=score_type, seed=3, mesh=mesh)
    _, whole = hf.load(folder, "score", score_type=score_type, seed=3)
    assert_trees_equal(sharded, whole)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(sharded))
    assert {s.data.shape for s in sharded["params"]["score_kernel"].addressable_shards} == {(16, 1)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sharded_model_is_saved_as_the_whole_one(folder, tmp_path, dtype):
    half = hf.save(tmp_path / "whole", *hf.load(folder, dtype=dtype))
    again = hf.save(tmp_path / "sharded", *hf.load(half, dtype=dtype, mesh=make_mesh((2, 2, 2))))
    for file in ("config.json", hf.WEIGHTS):
        assert (half / file).read_bytes() == (again / file).read_bytes()
    assert json.loads((half / "config.json").read_text())["dtype"] == dtype


def test_a_model_may_be_saved_over_the_folder_it_came_from(tmp_path):
    module, variables = make_lm(CONFIG)
    hf.save(tmp_path, module, variables, max_file_bytes=20_000)
    module, loaded = hf.load(tmp_path)
    hf.save(tmp_path, module, loaded)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == [hf.WEIGHTS]
    assert_trees_equal(loaded, hf.load(tmp_path)[1])


def test_a_save_that_is_killed_leaves_nothing_that_looks_like_a_model(folder, tmp_path):
    module, variables = hf.load(folder)
    saved = hf.save(tmp_path / "saved", module, variables)
    params = flatten_dict(variables["params"])

    class Killed(Exception):
        pass

    class Leaf:  # the last thing that is gathered
        shape, dtype = params["lm_head", "kernel"].shape, jnp.dtype("float32")

        def __array__(self, *args, **kwargs):
            raise Killed

    broken = {"params": variables["params"] | {"lm_head": {"kernel": Leaf()}}}
    for path in (tmp_path / "new", saved):
        with pytest.raises(Killed):
            hf.save(path, module, broken, max_file_bytes=20_000)
        assert list(path.glob("*.safetensors"))
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            hf.load(path)
