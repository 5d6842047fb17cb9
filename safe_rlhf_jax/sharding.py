"""Meshes and shardings: one table from the logical axes of models to the axes of the device mesh."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from safe_rlhf_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "decode", "tensor")
FETCHED_BYTES = 2**28  # of an array that are replicated on every device while it is fetched

Rules = Mapping[str, tuple[str, ...]]

# Logical axis -> mesh axes. Models name logical axes only.
LOGICAL_RULES: Rules = {
    "batch": ("data", "fsdp", "decode"),
    "batch_without_fsdp": ("data",),  # where the width has it
    "length": (),
    "layers": (),
    "embed": ("fsdp", "decode"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "score": (),
    "rank": (),  # of adapters
}
# While responses are generated from gathered parameters: `decode` splits what `tensor` splits, not what `fsdp` does.
DECODING_RULES: Rules = {
    name: ("decode", "tensor") if axes == ("tensor",) else tuple(axis for axis in axes if axis != "decode")
    for name, axes in LOGICAL_RULES.items()
}
# A frozen base that is whole on the devices of `decode`: scoring and updates gather nothing over them.
BASE_RULES: Rules = {**LOGICAL_RULES, "embed": ("fsdp",)}
RULES: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=LOGICAL_RULES)


@contextlib.contextmanager
def layout(rules: Rules) -> Iterator[None]:
    """What is read or traced inside has the shardings of these rules."""
    token = RULES.set(rules)
    try:
        yield
    finally:
        RULES.reset(token)


def decoding_layout() -> contextlib.AbstractContextManager[None]:
    """The shardings of decoding."""
    return layout(DECODING_RULES)


def platform() -> str:
    """Returns the platform of a program traced here: `cpu`, `gpu` or `tpu`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        name: str = mesh.abstract_device.platform
    elif jax.device_count() == 1:
        name = jax.default_backend()
    else:
        name = "cpu"  # without a mesh the sharding of the arrays is unknown: no kernel
    return "gpu" if name == "cuda" else name


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None, decode: int = 1) -> Mesh:
    """Returns a mesh with the axes `data`, `fsdp`, `decode`, `tensor`, laid out along the interconnect of the devices.

    With several slices of devices, only `data` crosses the slower network between them.

    Args:
        shape: The sizes of `data`, `fsdp` and `tensor`; at most one of them may be -1, for the remaining devices.
        devices: The devices to use; all of them by default.
        decode: Size of `decode`.

    Raises:
        ConfigError: If the sizes do not use all devices exactly, or `data` does not divide into the slices.
    """
    devices = list(devices or jax.devices())
    asked = [*shape[:2], decode, shape[2]]
    sizes = list(asked)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // known if known else 0
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh: {dict(zip(MESH_AXES, asked, strict=True))} needs {math.prod(sizes)} devices, "
            f"{len(devices)} are present. Make the product of the sizes {len(devices)}, or set one size to -1."
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=axis_types)
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh: data {sizes[0]} does not divide into the {slices} slices that the devices are in; only data "
            f"crosses the network between slices. Make it a multiple of {slices}."
        )
    within = (sizes[0] // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=axis_types)


def axes_of(name: str) -> tuple[str, ...]:
    """Returns the mesh axes that split a logical axis."""
    return RULES.get()[name]


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
    """Returns the mesh axes of an array whose dimensions have these logical names.

    Raises:
        ValueError: If two dimensions map to one mesh axis.
    """
    axes = [() if name is None else axes_of(name) for name in names]
    used = [axis for entry in axes for axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(names)} use a mesh axis twice: {axes}")
    return PartitionSpec(*(entry or None for entry in axes))


def parts(name: str, mesh: Mapping[str, int]) -> int:
    """Returns the number of parts that a logical axis is split into on a mesh of these sizes; 1 without a mesh."""
    return math.prod(mesh.get(axis, 1) for axis in axes_of(name))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the sharding of an array by the logical names of its dimensions; no effect without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names))


def whole(x: jax.Array, *names: str | None) -> jax.Array:
    """Gathers a parameter over the devices that split its width: `fsdp`, and `decode` while it is trained."""
    return constrain(x, *(None if name == "embed" else name for name in names))


def scattered(gradient: jax.Array, names: tuple[str, str]) -> jax.Array:
    """Reduce-scatters the gradient of a matrix over its width, by the logical names of the matrix.

    By default the compiler all-reduces the gradient of a reshaped parameter on every device, and takes a slice.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or parts("embed", mesh.shape) == 1:
        return gradient
    if names[1] == "embed":  # libtpu scatters over columns only where a slice of them fills its lanes
        return constrain(gradient.T, *reversed(names)).T
    return constrain(gradient, *names)


def named_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns the `NamedSharding` of every leaf of a tree whose parameters have logical axis names."""

    def sharding(leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        return NamedSharding(mesh, partition_spec(names))

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def init_sharded(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Returns `init(*args)` without axis boxes, every array created in its shards.

    Nothing is materialised on one device: shapes come from `eval_shape`, values from a jitted `init` whose
    `out_shardings` are pinned.
    """
    shardings = named_shardings(jax.eval_shape(init, *args), mesh)
    return nn.unbox(jax.jit(init, out_shardings=shardings)(*args))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns arrays without contents: the shapes and dtypes of one tree, the shardings of the other."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def tpu_options(mesh: Mesh) -> dict[str, Any] | None:
    """Returns the options of XLA for a step on a mesh; none but for TPUs.

    On a TPU: no rings of permutes in place of gathers and scatters of parameters. They send as much as these at best,
    and beside a `tensor` axis several times as much.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20}  # the least size of an operand, in MiB


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is split along its first dimension."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def shard_batch(batch: Any, mesh: Mesh, share: tuple[int, int] = (0, 1)) -> Any:
    """Puts a tree of host arrays on the mesh, split along the first dimension.

    Args:
        batch: Arrays [B/n, …] of host memory.
        mesh: The mesh.
        share: (i, n): this process passes the i-th of n equal slices of the rows (see `process_share`).
    """
    sharding = batch_sharding(mesh)
    index, count = share

    def one(x: Any) -> jax.Array:
        rows = np.asarray(x)
        first, total = index * len(rows), count * len(rows)

        def held(at: Any) -> np.ndarray:
            start, stop, _ = at[0].indices(total)
            return rows[start - first : stop - first]

        return jax.make_array_from_callback((total, *rows.shape[1:]), sharding, held)

    return jax.tree.map(one, batch)


def row_shards(mesh: Mesh) -> int:
    """Returns the number of shards that the rows of a batch are split into."""
    return parts("batch", mesh.shape)


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (i, n): the i-th of n equal slices of a batch holds the rows of this process's devices.

    (0, 1), the whole batch, if the mesh scatters the rows of a process.
    """
    shards = row_shards(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    held = sorted({at[0].indices(shards)[0] for at in indices if at is not None})
    size = len(held)
    aligned = shards % size == 0 and held[0] % size == 0 and held == list(range(held[0], held[0] + size))
    return (held[0] // size, shards // size) if aligned else (0, 1)


def fetch(tree: Any) -> Any:
    """Returns a tree of arrays, however sharded, as host arrays in every process."""
    return jax.tree.map(fetch_array, tree)


def fetch_array(x: jax.Array) -> np.ndarray:
    """Returns an array as a host array; shards of other processes are fetched in slices, to save device memory."""
    if x.is_fully_addressable or x.is_fully_replicated or not isinstance(x.sharding, NamedSharding):
        return np.asarray(x)
    rows = min(max(x.shape[0] * FETCHED_BYTES // x.nbytes, 1), x.shape[0])
    out = np.empty(x.shape, x.dtype)
    for start in range(0, x.shape[0], rows):
        start = min(start, x.shape[0] - rows)
        out[start : start + rows] = replicated_rows(x, start, rows, NamedSharding(x.sharding.mesh, PartitionSpec()))
    return out


@functools.partial(jax.jit, static_argnums=(2, 3))
def replicated_rows(x: jax.Array, start: int, rows: int, sharding: NamedSharding) -> jax.Array:
    """Returns `rows` rows of an array, replicated on every device."""
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_slice_in_dim(x, start, rows), sharding)
