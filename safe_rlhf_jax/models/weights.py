"""The mapping between stored tensors and parameters: shapes in both directions."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

Path = tuple[str, ...]
Shape = tuple[int, ...]
Fusion = Literal["blocks", "heads"]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One stored tensor: its parameters, and the number of their dimensions that are inputs of a linear map.

    Linear maps are stored [out, in] and biases [out], with heads and head dimension as one; the rest unchanged. A fused
    tensor concatenates its parameters along `out`, or, if `fusion` is "heads", within each head.
    """

    paths: tuple[Path, ...]  # of the parameters; more than one for a fused tensor
    layer: int | None = None  # index on the leading axis of a scanned parameter
    in_ndim: int | None = None  # 0 for a bias; None outside linear maps
    fusion: Fusion = "blocks"
    transposed: bool = False  # linear maps are stored [in, out]


def linear_shape(shape: Shape, in_ndim: int) -> Shape:
    """Returns [out, in] of a linear map's kernel, or [out] of its bias."""
    inputs, outputs = shape[:in_ndim], shape[in_ndim:]
    return (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)


def layerless(shapes: Mapping[Path, Shape], weight: Weight) -> dict[Path, Shape]:
    """Returns the shapes of the parameters of a `Weight`, without the layer axis."""
    return {path: shapes[path][weight.layer is not None :] for path in weight.paths}


def stored_shape(shapes: Mapping[Path, Shape], weight: Weight) -> Shape:
    """Returns the stored shape of the parameters of a `Weight`.

    Args:
        shapes: Shape of each of `weight.paths`, without the layer axis.
        weight: The mapping.
    """
    if weight.in_ndim is None:
        (shape,) = (shapes[path] for path in weight.paths)
        return shape
    parts = [linear_shape(shapes[path], weight.in_ndim) for path in weight.paths]
    shape = (sum(part[0] for part in parts), *parts[0][1:])
    return shape[::-1] if weight.transposed else shape


def from_stored(array: np.ndarray, shapes: Mapping[Path, Shape], weight: Weight) -> dict[Path, np.ndarray]:
    """Returns the parameters in a stored tensor.

    Args:
        array: The stored tensor, of `stored_shape`.
        shapes: Shape of each of `weight.paths`, without the layer axis.
        weight: The mapping.
    """
    if weight.in_ndim is None:
        return {weight.paths[0]: array}
    array = array.T if weight.transposed else array
    rows = [linear_shape(shapes[path], weight.in_ndim)[0] for path in weight.paths]
    if weight.fusion == "heads" and len(rows) > 1:
        heads = shapes[weight.paths[0]][weight.in_ndim]
        array = array.reshape(heads, len(rows), -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    parts = np.split(array, np.cumsum(rows)[:-1])
    return {path: part.T.reshape(shapes[path]) for path, part in zip(weight.paths, parts, strict=True)}


def to_stored(arrays: Mapping[Path, np.ndarray], weight: Weight) -> np.ndarray:
    """Returns the stored tensor of the parameters of a `Weight` (without the layer axis)."""
    if weight.in_ndim is None:
        return np.ascontiguousarray(arrays[weight.paths[0]])
    parts = [arrays[path] for path in weight.paths]
    heads = parts[0].shape[weight.in_ndim]
    parts = [part.reshape(linear_shape(part.shape, weight.in_ndim)[::-1]).T for part in parts]
    array = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if weight.fusion == "heads" and len(parts) > 1:
        array = array.reshape(len(parts), heads, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    return np.ascontiguousarray(array.T if weight.transposed else array)
