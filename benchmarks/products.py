"""Times matrix products of a 135M model on this CPU, in float32 and bfloat16, as XLA is asked for them.

    python benchmarks/products.py [--json benchmarks/results/products_cpu.json]

A product of bfloat16 with a float32 result, as models/products.py asks for it, has a kernel of its own; other
forms are converted to float32 first. GFLOP/s, a multiply-add counted as two; best of ten calls.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rl_step import environment

ROWS, SHAPES = 2048, {"up": (576, 1536), "down": (1536, 576)}  # SmolLM2-135M's MLP


def rate(function: Callable[..., Any], x: jax.Array, matrix: jax.Array) -> float:
    """GFLOP/s of a compiled product."""
    compiled = jax.jit(function).lower(x, matrix).compile()
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, matrix))
        seconds.append(time.perf_counter() - start)
    return 2 * ROWS * matrix.size / min(seconds[1:]) / 1e9


def over(dimension: int, result: Any) -> Callable[..., Any]:
    """A product that sums over this dimension of the matrix."""
    numbers = (((1,), (dimension,)), ((), ()))
    return lambda x, matrix: jax.lax.dot_general(x, matrix, numbers, preferred_element_type=result)


FORMS: dict[str, tuple[int, Any, Any]] = {  # name -> dimension that is summed, dtype of x, product
    "float32": (0, jnp.float32, over(0, jnp.float32)),
    "bfloat16 to bfloat16": (0, jnp.bfloat16, over(0, jnp.bfloat16)),
    "bfloat16 to float32": (0, jnp.bfloat16, over(0, jnp.float32)),
    "float32, transposed": (1, jnp.float32, over(1, jnp.float32)),
    "bfloat16 to float32, transposed by itself": (1, jnp.bfloat16, lambda x, m: over(0, jnp.float32)(x, m.T)),
    "bfloat16 to float32, transposed by the product": (1, jnp.bfloat16, over(1, jnp.float32)),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for form, (dimension, dtype, product) in FORMS.items():
        figures[form] = {}
        for name, (inputs, outputs) in SHAPES.items():
            shape = (outputs, inputs) if dimension else (inputs, outputs)
            x, matrix = (jax.random.normal(jax.random.key(0), s).astype(dtype) for s in ((ROWS, inputs), shape))
            figures[form][name] = round(rate(product, x, matrix), 1)
        print(f"{form:50s} " + "  ".join(f"{name} {value:7.1f}" for name, value in figures[form].items()))
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "gflops": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
