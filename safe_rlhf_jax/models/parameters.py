"""Parameters between stored tensors and the devices that hold them: one tensor in host memory at a time."""

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.safetensors_io import PART, Spec, Tensors
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.models.weights import Path, Shape, Weight, from_stored, layerless, stored_shape, to_stored
from safe_rlhf_jax.types import Params

Index = tuple[slice, ...]


@functools.lru_cache(maxsize=64)  # a run opens a few networks many times, and tracing one takes long
def boxed_variables(module: Any) -> dict[str, Any]:
    """Returns shapes and dtypes of a network's variables, boxed with their axis names."""
    tokens, mask = (jax.ShapeDtypeStruct((1, 2), dtype) for dtype in (jnp.int32, bool))  # the devices may not be here
    variables: dict[str, Any] = jax.eval_shape(module.init, jax.eval_shape(jax.random.key, 0), tokens, mask)
    return variables


def abstract_variables(module: CausalLM | ScoreModel) -> dict[str, Any]:
    """Returns shapes and dtypes of the module's variables."""
    variables: dict[str, Any] = nn.unbox(boxed_variables(module))
    return variables


def fresh_head(shape: Shape, seed: int) -> np.ndarray:
    """Returns a fresh score head: N(0, 1/√(D+1)) weights [D, 1], zero bias [1]."""
    if len(shape) == 1:
        return np.zeros(shape, np.float32)
    return np.asarray((shape[0] + 1) ** -0.5 * jax.random.normal(jax.random.key(seed), shape, jnp.float32))


def reader(
    tensors: Tensors,
    weights: Mapping[str, Weight],
    path: Path,
    shapes: Mapping[Path, Shape],
    dtype: np.dtype,
    adapted: Callable[[str, Path, Index, np.ndarray], np.ndarray],
) -> Callable[[Index], np.ndarray]:
    """Returns read(index): a part of a parameter, from the stored tensors that hold it.

    It raises a ModelError that names the tensor if a number is not finite. Each part of a stored tensor goes through
    `adapted`, which may change it.
    """
    stored = {weight.layer: name for name, weight in weights.items() if path in weight.paths}

    def view(name: str, index: Index) -> np.ndarray:
        part = from_stored(tensors[name], layerless(shapes, weights[name]), weights[name])[path][index]
        return adapted(name, path, index, part)

    def fill(out: np.ndarray, part: np.ndarray, name: str) -> None:
        out[...] = part
        if not finite(out):
            raise ModelError(
                f"{tensors.folder}: tensor {name!r} holds a number that is not finite in {dtype}: the training that "
                "wrote it has diverged, or the file is damaged"
            )

    def read(index: Index) -> np.ndarray:
        if None in stored:
            part = view(stored[None], index)
            out = np.empty(part.shape, dtype)
            fill(out, part, stored[None])
            return out
        layers = range(shapes[path][0])[index[0]]
        out = np.empty((len(layers), *view(stored[layers[0]], index[1:]).shape), dtype)
        for row, layer in zip(out, layers, strict=True):
            fill(row, view(stored[layer], index[1:]), stored[layer])
        return out

    return read


def finite(array: np.ndarray) -> bool:
    """Says whether all numbers of an array are finite.

    Infinities and NaN have all exponent bits set: reading the bits in parts is several times as fast as `np.isfinite`.
    """
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    exponent = np.array(np.inf, array.dtype).view(bits.dtype)
    parts = (bits[i : i + PART] for i in range(0, bits.size, PART))
    return not any(((part & exponent) == exponent).any() for part in parts)


def place(read: Callable[[Index], np.ndarray], shape: Shape, sharding: Any) -> jax.Array:
    """Returns an array whose shards on this process's devices are filled by `read`.

    Shards are read one at a time: each after the previous one is on its device and out of host memory.
    """
    if sharding is None:
        return put(read((slice(None),) * len(shape)))
    shards: dict[str, jax.Array] = {}  # by index: replicated shards are read once
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        source = shards.get(str(index))
        arrays.append(put(read(index) if source is None else source, device))
        shards[str(index)] = arrays[-1]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def put(array: Any, device: jax.Device | None = None) -> jax.Array:
    """Puts an array on a device; returns it once it is there and the host's copy is freed."""
    out = jax.block_until_ready(jax.device_put(array, device))
    gc.collect(0)  # jax keeps the copied host array until Python collects garbage
    return out


def gather(leaf: Any, layer: int | None = None) -> np.ndarray:
    """Returns a parameter, or one layer of it, in host memory; all processes take part."""
    part = leaf if layer is None else leaf[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def stored_specs(leaves: Mapping[Path, Any], weights: Mapping[str, Weight]) -> dict[str, Spec]:
    """Returns a `Spec` for each stored tensor of a model."""
    specs = {}
    for name, weight in weights.items():
        shapes = layerless({path: leaves[path].shape for path in weight.paths}, weight)

        def make(weight: Weight = weight) -> np.ndarray:
            return to_stored({path: gather(leaves[path], weight.layer) for path in weight.paths}, weight)

        specs[name] = Spec(stored_shape(shapes, weight), jnp.dtype(leaves[weight.paths[0]].dtype), make)
    return specs


def is_matrix(params: Params) -> Any:
    """Returns a tree of bools: True for weight matrices and embeddings, False for biases and norm scales.

    It masks the optimizer's weight decay. The integers and scales of a quantised kernel are False.
    """

    def matrix(path: tuple[Any, ...], _: Any) -> bool:
        return getattr(path[-1], "key", "weight") not in ("bias", "score_bias", "weight")

    return jax.tree_util.tree_map_with_path(matrix, params)


def cast_matrices(params: Params, dtype: str) -> Params:
    """Casts weight matrices and embeddings to the compute dtype; biases and norm scales keep theirs.

    Networks cast every matrix to that dtype before they use it, so no result changes, and memory halves with bfloat16.
    """
    return jax.tree.map(lambda x, matrix: x.astype(dtype) if matrix else x, params, is_matrix(params))
