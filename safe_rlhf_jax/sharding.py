"""Meshes and shardings: one table from the axes that models name to the axes of the device mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis (or axes). Models name logical axes only.
LOGICAL_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "score": None,
}


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes `data`, `fsdp`, `tensor`.

    Args:
        shape: Three sizes; at most one of them may be -1, which takes the devices that remain.
        devices: The devices to use; all of them by default.

    Raises:
        ValueError: If the sizes do not use exactly the devices there are.
    """
    devices = list(devices or jax.devices())
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // known if known else 0
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: {dict(zip(MESH_AXES, shape, strict=True))} needs {math.prod(sizes)} devices, "
            f"{len(devices)} are present. Make the product of the sizes {len(devices)}, or set one size to -1."
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
    """Returns the mesh axes of an array whose dimensions carry these logical names.

    Raises:
        ValueError: If two dimensions land on one mesh axis.
    """
    axes = [None if name is None else LOGICAL_RULES[name] for name in names]
    used = [axis for entry in axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(names)} use a mesh axis twice: {axes}")
    return PartitionSpec(*axes)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the sharding of an activation by the logical names of its dimensions; no effect without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names))


def named_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns the `NamedSharding` of every leaf of a tree whose parameters carry logical axis names."""

    def sharding(leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        return NamedSharding(mesh, partition_spec(names))

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def init_sharded(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Returns `init(*args)` without axis boxes, every array born in its shards.

    Nothing is materialised on one device: shapes come from `eval_shape`, values from a jitted `init` whose
    `out_shardings` are pinned.
    """
    shardings = named_shardings(jax.eval_shape(init, *args), mesh)
    return jax.jit(lambda *a: nn.unbox(init(*a)), out_shardings=shardings)(*args)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a tree of host arrays on the mesh, split along the first dimension."""
    sharding = NamedSharding(mesh, partition_spec(("batch",)))
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x), sharding), batch)
