"""Frozen networks in 8 or 4 bits: kernels of layers as integers and scales, and products with them.

Only the kernels of a layer's linear maps are quantised: nearly all parameters of a large model, each read once per use.
Embeddings and heads keep their numbers. They are a small part of a large model; a tied embedding is a table as well as
a matrix; and what a head loses, no layer after it averages out. Norms and biases are vectors.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from qwix import QArray

from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.products import product
from safe_rlhf_jax.sharding import whole
from safe_rlhf_jax.types import Params

Kind = Literal["int8", "int4"]  # a scale for each output channel; for each block of inputs of an output channel

# Inputs that share a scale of int4, if they divide the last input axis. Half as long as in GPTQ and AWQ: it divides the
# head dimension of every size of model, so that no block of o_proj spans two heads, and halves of them two devices.
BLOCK = 64

# Input axes of the kernels that are quantised, counted from the last: the layers of a scanned kernel stand first.
INPUT_AXES: dict[str, tuple[int, ...]] = {
    "q_proj": (-3,),  # [D, H, C]
    "k_proj": (-3,),
    "v_proj": (-3,),
    "o_proj": (-3, -2),  # [H, C, D]
    "gate_proj": (-2,),  # [D, F]
    "up_proj": (-2,),
    "down_proj": (-2,),
}


def quantize(params: Params, kind: Kind) -> Params:
    """Returns parameters with the kernels of all layers as `QArray`s, sharded as they were.

    Kernels are quantised one after the other, each where it lies. How does not depend on the mesh: a block of int4 that
    spans devices has its scale on all of them.

    Args:
        params: Parameters of a network, scanned or not, or their shapes and shardings; within a program too.
        kind: The format.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [str(getattr(key, "key", key)) for key in path]
        if names[-1] != "kernel" or names[-2] not in INPUT_AXES:
            return leaf
        inputs = INPUT_AXES[names[-2]]
        if isinstance(leaf, jax.core.Tracer):
            return quantized(leaf, kind, inputs, None)
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.block_until_ready(quantized(leaf, kind, inputs, leaf.sharding))
        shapes = jax.eval_shape(lambda kernel: quantized(kernel, kind, inputs, None), leaf)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=fitted(x.shape, leaf.sharding)), shapes
        )

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.jit, static_argnames=("kind", "inputs", "sharding"))
def quantized(kernel: Float[Array, "..."], kind: Kind, inputs: tuple[int, ...], sharding: Any) -> QArray:
    """Returns a kernel in a format: symmetric, rounded to the nearest in float32, no further off than half a scale."""
    axes = [axis + kernel.ndim for axis in inputs]
    blocks = {axes[-1]: block_size(kernel.shape[axes[-1]])} if kind == "int4" else {}
    shared = axes[-1:] if kind == "int4" else axes
    channels = [axis for axis in range(kernel.ndim) if axis not in shared]
    array = qwix.quantize(kernel.astype(jnp.float32), kind, channelwise_axes=channels, tiled_axes=blocks)
    if not isinstance(sharding, NamedSharding):
        return array
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, fitted(x.shape, sharding)), array)


def rounded_vectors(x: Float[Array, "... C"]) -> QArray:
    """Returns int8[…, C] with a scale for each vector, f32[…, 1]: how a cache keeps keys and values."""
    return qwix.quantize(x.astype(jnp.float32), "int8", channelwise_axes=range(x.ndim - 1))


def block_size(inputs: int) -> int:
    """Returns the largest divisor of a number of inputs that is not above `BLOCK`."""
    return max(size for size in range(1, BLOCK + 1) if inputs % size == 0)


def fitted(shape: tuple[int, ...], sharding: Any) -> Any:
    """Returns a kernel's sharding for its integers or scales: an axis that does not divide among devices is whole."""
    if not isinstance(sharding, NamedSharding):
        return sharding

    def devices(axes: str | tuple[str, ...] | None) -> int:
        return math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))

    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    return NamedSharding(
        sharding.mesh,
        PartitionSpec(*(axes if size % devices(axes) == 0 else None for size, axes in zip(shape, spec, strict=True))),
    )


def is_quantized(x: Any) -> bool:
    """Says whether x is a quantised kernel: the leaf at which walks over parameters stop."""
    return isinstance(x, QArray)


def dequantize(params: Params, dtype: str = "float32") -> Params:
    """Returns parameters without quantised kernels: these as arrays of `dtype`, the others as they are."""
    return jax.tree.map(
        lambda x: qwix.dequantize(x).astype(dtype) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def require_unquantized(params: Params) -> None:
    """Checks that parameters can be trained.

    Raises:
        ModelError: If one is quantised.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized):
        if is_quantized(leaf):
            name = "/".join(str(getattr(key, "key", key)) for key in path)
            raise ModelError(
                f"a quantised base cannot be trained: {name} is {leaf.qvalue.dtype}. Train adapters on it, or open it "
                "unquantised"
            )


def stored_bytes(params: Params) -> int:
    """Returns the size of parameters, quantised or not, on all devices together."""
    return sum(x.size * bits(x.dtype) for x in jax.tree.leaves(params)) // 8


def bits(dtype: Any) -> int:
    """Returns the bits of a number."""
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_matmul(
    x: Float[Array, "N I"],
    kernel: QArray,
    axes: tuple[str, ...],
    dtype: str,
) -> Float[Array, "N O"]:
    """Product x · W in the dtype of x, accumulated in float32 and returned in `dtype`; W is frozen.

    What the backward pass needs of W is kept as integers and scales.

    Args:
        x: float[N, I].
        kernel: W, of any shape [*in, *out] with I inputs.
        axes: Logical axes of the kernel.
        dtype: Of the result.
    """
    matrix, scale = factors(kernel, axes, x.shape[1], x.dtype)
    # A float32 product would be written out for its scale to be applied: twice the memory, to save a rounding.
    y = product(x, matrix, dtype)
    return (y.astype(jnp.float32) * scale).astype(dtype)


def factors(
    kernel: QArray, axes: tuple[str, ...], inputs: int, dtype: Any
) -> tuple[Float[Array, "I O"], Float[Array, "1 _"]]:
    """Returns (M, s) with W = M · diag(s): M in `dtype` and s in float32.

    With a scale for each output M is exact: integers, which compilers convert while they multiply. With blocks M is W,
    rounded to `dtype`, and s is 1: M is written out, one layer's at a time.
    """
    integers = whole(kernel.qvalue, *axes)  # or the matrix would be gathered, several times as large
    outputs = kernel.qvalue.size // inputs
    if kernel.scale.size == outputs:
        return integers.reshape(inputs, outputs).astype(dtype), kernel.scale.reshape(1, outputs)
    sizes = zip(axes, kernel.scale.shape, kernel.qvalue.shape, strict=True)
    scale = whole(kernel.scale, *(name if size == full else None for name, size, full in sizes))
    # With scales in float32 a matrix in float32 would be written out.
    matrix = qwix.dequantize(dataclasses.replace(kernel, qvalue=integers, scale=scale.astype(dtype)))
    return matrix.reshape(inputs, outputs), jnp.ones((1, 1), jnp.float32)


def quantized_matmul_forward(x: jax.Array, kernel: QArray, axes: tuple[str, ...], dtype: str) -> Any:
    """The forward pass of `quantized_matmul`."""
    return quantized_matmul(x, kernel, axes, dtype), (x, kernel)


def quantized_matmul_backward(axes: tuple[str, ...], dtype: str, saved: Any, gradient: jax.Array) -> Any:
    """The backward pass of `quantized_matmul`: a gradient of x, none of W."""
    del dtype
    x, kernel = saved
    matrix, scale = factors(kernel, axes, x.shape[1], x.dtype)
    scaled = (gradient.astype(jnp.float32) * scale).astype(x.dtype)
    return product(scaled, matrix, x.dtype, over=1), None


quantized_matmul.defvjp(quantized_matmul_forward, quantized_matmul_backward)
