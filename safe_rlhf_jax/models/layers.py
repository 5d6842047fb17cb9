"""Norms, linear maps and the MLP. Every parameter names its logical axes."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from qwix import QArray

from safe_rlhf_jax.models.config import Activation, Lora, ModelConfig
from safe_rlhf_jax.models.products import matmul
from safe_rlhf_jax.models.quantized import quantized_matmul
from safe_rlhf_jax.sharding import constrain


def logical_param(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...],
                  axes: tuple[str, ...]) -> jax.Array | QArray:  # fmt: skip
    """Declares a float32 parameter whose dimensions carry logical axis names; a kernel may be given as a `QArray`."""
    boxed = nn.with_logical_partitioning(init, axes)
    param: jax.Array | QArray = module.param(name, boxed, shape, jnp.float32)  # type: ignore[assignment]  # flax unboxes it
    return param


class Norm(nn.Module):
    """x / √(mean(x²) + ε) · w; with `norm: layer`, x is centred first and a bias added last. Computed in float32.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467; Ba et al. 2016, arXiv 1607.06450.
    """

    config: ModelConfig
    axis: str = "embed"  # what is normalised

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns x scaled to unit mean square, then by the weight (or by one plus the weight, if configured)."""
        c = self.config
        shape = (1,) * (x.ndim - 1) + (-1,)
        init = nn.initializers.zeros if c.norm_unit_offset else nn.initializers.ones
        weight = logical_param(self, "weight", init, (x.shape[-1],), (self.axis,)).astype(jnp.float32).reshape(shape)
        x32 = x.astype(jnp.float32)
        if c.norm == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + c.norm_eps)
        x32 = x32 * (1.0 + weight if c.norm_unit_offset else weight)
        if c.norm == "layer":
            bias = logical_param(self, "bias", nn.initializers.zeros, (x.shape[-1],), (self.axis,))
            x32 = x32 + bias.astype(jnp.float32).reshape(shape)
        return x32.astype(x.dtype)


class Linear(nn.Module):
    """x · W + b over the last `in_ndim` dimensions of x; W keeps the shape of its logical axes."""

    features: tuple[int, ...]
    axes: tuple[str, ...]  # of the kernel: input axes, then output axes
    config: ModelConfig
    use_bias: bool = False
    in_ndim: int = 1
    dtype: str | None = None  # of the result; None: that of x

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns float[..., *features]."""
        shape = x.shape[x.ndim - self.in_ndim :] + self.features
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = logical_param(self, "kernel", init, shape, self.axes)
        dtype = self.dtype or str(x.dtype)
        # As one matrix product: XLA's CPU code runs its gradients 1.6 times faster than those of a batched one.
        inputs = math.prod(x.shape[x.ndim - self.in_ndim :])
        names = (self.axes[0], self.axes[self.in_ndim])
        lora, rows = self.config.lora, x.reshape(-1, inputs)
        adapted = lora is not None and self.name in lora.targets
        out = "float32" if self.use_bias or adapted else dtype  # where something is added, in float32
        if isinstance(kernel, QArray):
            y = quantized_matmul(rows, kernel, self.axes, out)
        else:
            y = matmul(rows, kernel.reshape(inputs, -1), names, out)
        if lora is not None and adapted:
            y = y + lora.scale * self.low_rank(rows, shape[: self.in_ndim], lora)
        y = y.reshape(*x.shape[: x.ndim - self.in_ndim], *self.features)
        if self.use_bias:  # in float32, so that its gradient, a sum over all tokens, is summed so
            bias = logical_param(self, "bias", nn.initializers.zeros, self.features, self.axes[self.in_ndim :])
            y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y.astype(dtype)

    def low_rank(self, rows: Float[Array, "N I"], inputs: tuple[int, ...], lora: Lora) -> Float[Array, "N O"]:
        """Returns (x·A)·B, float32[N, O]; x loses entries to dropout where a key named `dropout` is given."""
        axes = self.axes[: self.in_ndim], self.axes[self.in_ndim :]
        a = adapter_variable(self, "lora_a", lora_a_init, (*inputs, lora.rank), (*axes[0], "rank"))
        b = adapter_variable(self, "lora_b", nn.initializers.zeros, (lora.rank, *self.features), ("rank", *axes[1]))
        if lora.dropout:
            rows = nn.Dropout(lora.dropout, deterministic=not self.has_rng("dropout"))(rows)
        inner = matmul(rows, a.reshape(-1, lora.rank), (axes[0][0], "rank"), str(rows.dtype))
        return matmul(inner, b.reshape(lora.rank, -1), ("rank", axes[1][0]), "float32")


def adapter_variable(module: nn.Module, name: str, init: Any, shape: tuple[int, ...],
                     axes: tuple[str, ...]) -> jax.Array:  # fmt: skip
    """Declares a float32 variable of the collection `adapter`, whose dimensions carry logical axis names."""
    boxed = nn.with_logical_partitioning(init, axes)

    def start() -> Any:
        return boxed(module.make_rng("params"), shape, jnp.float32)

    value: jax.Array = module.variable("adapter", name, start).value
    return value


def lora_a_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns U(−1/√I, 1/√I) for all I inputs, as PEFT starts A."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class MLP(nn.Module):
    """(a(x·W_gate) ⊙ x·W_up)·W_down, or a(x·W_up)·W_down. Source: Shazeer 2020, arXiv 2002.05202."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Returns float[B, L, D]."""
        c = self.config
        activation = ACTIVATIONS[c.activation]
        up = functools.partial(Linear, (c.intermediate_size,), ("embed", "mlp"), c, c.mlp_bias)
        if c.gated:
            h = activation(up(name="gate_proj")(x)) * up(name="up_proj")(x)
        else:
            h = activation(up(name="up_proj")(x))
        h = constrain(h, "batch", "length", "mlp")
        return Linear((c.hidden_size,), ("mlp", "embed"), c, c.mlp_bias, name="down_proj")(h)


def softcap(x: jax.Array, limit: float | None) -> jax.Array:
    """Returns s·tanh(x/s) for the limit s, or x if there is no limit."""
    return x if limit is None else limit * jnp.tanh(x / limit)
