"""Fused against plain attention on this device: errors against float32, and seconds. A step of benchmarks/device.py."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rl_step import seconds
from safe_rlhf_jax.models import fused_attention
from safe_rlhf_jax.models.attention import attend, causal_mask

# Sequences, heads, key/value heads, tokens, size of a head, window; the last quarter of the rows is half padding.
SHAPES: dict[str, tuple[int, int, int, int, int, int | None]] = {
    "smollm2_135m": (32, 9, 3, 512, 64, None),
    "tinyllama_1b": (16, 32, 4, 1024, 64, None),
    "llama_3_8b": (4, 32, 8, 2048, 128, None),
    "mistral_7b": (4, 32, 8, 2048, 128, 512),
    "quickstart_in_bfloat16": (128, 4, 4, 48, 32, None),
}
SMALL_SHAPES: dict[str, tuple[int, int, int, int, int, int | None]] = {
    "grouped": (4, 4, 2, 64, 16, None),
    "window": (4, 4, 4, 64, 16, 10),
}


def compare(batch: int, heads: int, kv_heads: int, length: int, size: int, window: int | None) -> dict[str, Any]:
    """Errors and seconds of both, forwards and backwards."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, count, length, size) for count in (heads, kv_heads, kv_heads, heads)]
    *arrays, weight = (jax.random.normal(key, one, jnp.bfloat16) for key, one in zip(keys, shapes, strict=True))
    padding = np.where(np.arange(batch) < batch - batch // 4, 0, length // 2)
    real = jnp.asarray(np.arange(length)[None] >= padding[:, None])
    read = real[:, None, :, None]
    column = np.arange(length)
    visible = causal_mask(real) & jnp.asarray(column[:, None] - column[None] < (window or length))
    scale = size**-0.5
    gpu = jax.default_backend() == "gpu"
    implementation: Any = "cudnn" if gpu else "xla"

    def plain(queries: Any, keys: Any, values: Any) -> Any:
        return attend(queries, keys, values, visible, scale=scale) * read

    def fused(queries: Any, keys: Any, values: Any) -> Any:
        out = fused_attention.cudnn(
            queries, keys, values, real, scale=scale, window=window, implementation=implementation
        )
        return out * read

    def gradients(attended: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda *a: (attended(*a) * weight).astype(jnp.float32).sum(), argnums=(0, 1, 2))

    def both(attended: Callable[..., Any], *arrays: Any) -> list[Any]:
        return [attended(*arrays), *gradients(attended)(*arrays)]

    with jax.default_matmul_precision("float32"):
        exact = jax.jit(functools.partial(both, plain))(*(x.astype(jnp.float32) for x in arrays))
    result: dict[str, Any] = {
        "shape": [batch, heads, kv_heads, length, size, window],
        "gpu": gpu,
        "kernel": fused_attention.kernel_for(arrays[0], arrays[1], cap=None, biased=False),
        "implementation": implementation,
    }
    for name, attended in (("plain", plain), ("fused", fused)):
        forward, backward = jax.jit(attended), jax.jit(gradients(attended))
        found = [forward(*arrays), *backward(*arrays)]
        errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
        result[name] = {
            "error": float(np.max(errors)),
            "errors": dict(zip(("output", "queries", "keys", "values"), errors, strict=True)),
            "seconds_forwards": seconds(functools.partial(forward, *arrays), 10),
            "seconds_backwards": seconds(functools.partial(backward, *arrays), 10),
        }
    return result


def relative_error(actual: Any, expected: Any) -> float:
    """‖a − b‖/‖b‖."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
