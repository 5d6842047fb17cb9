"""Products with parameters: values, gradients, and what a CPU multiplies in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax.models.products import matmul

NAMES = ("embed", "mlp")


def operands(over, dtype="float32"):
    """x [24, 32] and W, [32, 16], or transposed."""
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((24, 32)), rng.standard_normal((32, 16))
    return jnp.asarray(x, dtype), jnp.asarray(matrix.T if over else matrix, jnp.float32)


@pytest.mark.parametrize("over", [0, 1])
def test_product_and_gradients_are_those_of_the_matrix_in_either_order(over):
    x, matrix = operands(over)
    plain = lambda x, matrix: jnp.sin(jnp.matmul(x, matrix.T if over else matrix, precision="highest")).sum()  # noqa: E731
    ours = lambda x, matrix: jnp.sin(matmul(x, matrix, NAMES, "float32", over)).sum()  # noqa: E731
    for actual, expected in zip(jax.grad(ours, (0, 1))(x, matrix), jax.grad(plain, (0, 1))(x, matrix), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("part", ["product", "gradient of x"])
def test_a_cpu_multiplies_bfloat16_as_it_is(over, part):
    """Where XLA has no kernel for a product of bfloat16, it converts both factors, at half the speed."""
    x, matrix = operands(over, "bfloat16")
    product = lambda x: matmul(x, matrix, NAMES, "bfloat16", over)  # noqa: E731
    gradient = lambda x, out: jax.vjp(product, x)[1](out)[0]  # noqa: E731
    traced = jax.jit(product).lower(x) if part == "product" else jax.jit(gradient).lower(x, product(x))
    program = traced.compile().as_text()
    computation = program[: program.index(" dot(")]
    factors = re.findall(r"= (\w+)\[[\d,]*\]\S* parameter", computation[computation.rindex("{\n") :])
    assert factors == ["bf16", "bf16"]
