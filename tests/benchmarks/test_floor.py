"""Products of a program: found in it wherever they run, and the same written as an einsum."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.floor import Product, products
from safe_rlhf_jax.aot.hlo import Module


def test_products_are_found_with_their_phases_and_executions():
    def program(x, w):
        with jax.named_scope("scoring"):
            x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)
        with jax.named_scope("update"):
            return jnp.einsum("bi,bj->ij", x, x) + 1

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 128), (128, 128)))
    found = list(products(Module(jax.jit(program).lower(*shapes).compile().as_text())))
    flops = 2 * 16 * 128 * 128
    assert sorted((phase, product.flops * times) for phase, product, times in found) == [
        ("scoring", 3 * flops),
        ("update", flops),
    ]


def test_an_equation_is_the_product():
    product = Product((2, 3, 4, 5), (2, 6, 3, 5), ((3,), (3,)), ((0, 1), (0, 2)))
    left, right = (np.random.default_rng(0).normal(size=shape) for shape in (product.left, product.right))
    expected = jax.lax.dot_general(left, right, (product.contracting, product.batch))
    np.testing.assert_allclose(np.einsum(product.equation, left, right), expected, rtol=1e-5)
    assert product.flops == 2 * 2 * 3 * 4 * 5 * 6
