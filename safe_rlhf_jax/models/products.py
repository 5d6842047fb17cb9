"""Products with matrices of parameters: precision, accumulation, and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safe_rlhf_jax.sharding import platform, scattered


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """Returns the precision of products of x: full float32 on every backend, not TF32 or bfloat16 passes."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def product(x: Float[Array, "N I"], matrix: jax.Array, dtype: Any, *, over: int = 0) -> Float[Array, "N O"]:
    """Product of x with a matrix of its dtype, over dimension `over` of the matrix, accumulated in float32.

    XLA's fast CPU kernels for bfloat16 have float32 results, and read x · Wᵀ only if the product itself names the
    dimension: a CPU rounds the result afterwards. Elsewhere the sum over devices may be taken in `dtype`.

    Args:
        x: float[N, I].
        matrix: float[I, O], or with over = 1 float[O, I].
        dtype: Of the result.
        over: Dimension of the matrix that is summed.
    """
    sums = jnp.float32 if platform() == "cpu" else jnp.dtype(dtype)
    y = jax.lax.dot_general(
        x, matrix, (((1,), (over,)), ((), ())), precision=precision_of(x), preferred_element_type=sums
    )
    return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(
    x: Float[Array, "N I"], matrix: jax.Array, names: tuple[str, str], dtype: str, over: int = 0
) -> Float[Array, "N O"]:
    """Product x · W, or with over = 1 x · Wᵀ, in the dtype of x, accumulated in float32 and returned in `dtype`.

    The gradient of W is summed in float32, over rows and devices, for any dtype of x: the cotangent of a bfloat16 copy
    of W would be rounded to 8 bits on every device before the sum.

    Args:
        x: float[N, I].
        matrix: W, a parameter.
        names: Logical axes of the matrix, by which its gradient is scattered.
        dtype: Of the result.
        over: Dimension of the matrix that is summed.
    """
    return product(x, matrix.astype(x.dtype), dtype, over=over)


def matmul_forward(x: jax.Array, matrix: jax.Array, names: tuple[str, str], dtype: str, over: int) -> Any:
    """The forward pass of `matmul`."""
    return matmul(x, matrix, names, dtype, over), (x, matrix)


def matmul_backward(names: tuple[str, str], dtype: str, over: int, saved: Any, gradient: jax.Array) -> Any:
    """The backward pass of `matmul`."""
    del dtype
    x, matrix = saved
    gradient = gradient.astype(x.dtype)
    of_x = product(gradient, matrix.astype(x.dtype), x.dtype, over=1 - over)
    left, right = (gradient, x) if over else (x, gradient)
    of_matrix = jnp.matmul(left.T, right, precision=precision_of(x), preferred_element_type=jnp.float32)
    return of_x, scattered(of_matrix, names).astype(matrix.dtype)


matmul.defvjp(matmul_forward, matmul_backward)
