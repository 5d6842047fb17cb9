"""Norms, linear maps and the MLP. Every parameter names its logical axes."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from safe_rlhf_jax.models.config import Activation, ModelConfig
from safe_rlhf_jax.sharding import constrain, with_scattered_gradient


def logical_param(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...],
                  axes: tuple[str, ...]) -> jax.Array:  # fmt: skip
    """Declares a float32 parameter whose dimensions carry logical axis names."""
    boxed = nn.with_logical_partitioning(init, axes)
    param: jax.Array = module.param(name, boxed, shape, jnp.float32)  # type: ignore[assignment]  # flax unboxes it
    return param


class Norm(nn.Module):
    """x / √(mean(x²) + ε) · w; for `norm: layer` x is centred before and a bias added after. Computed in float32.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467; Ba et al. 2016, arXiv 1607.06450.
    """

    config: ModelConfig
    axis: str = "embed"  # what is normalised

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns x scaled to unit mean square, then by the weight (one plus it, where the config says so)."""
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

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns float[..., *features]."""
        shape = x.shape[x.ndim - self.in_ndim :] + self.features
        init = nn.initializers.normal(self.config.initializer_range)
        kernel = logical_param(self, "kernel", init, shape, self.axes)
        # As one matrix product: XLA's CPU code runs its gradients 1.6 times faster than those of a batched one.
        inputs = math.prod(x.shape[x.ndim - self.in_ndim :])
        matrix = kernel.astype(x.dtype).reshape(inputs, -1)
        matrix = with_scattered_gradient(matrix, (self.axes[0], self.axes[self.in_ndim]))
        y = x.reshape(-1, inputs) @ matrix
        y = y.reshape(*x.shape[: x.ndim - self.in_ndim], *self.features)
        if self.use_bias:
            bias = logical_param(self, "bias", nn.initializers.zeros, self.features, self.axes[self.in_ndim :])
            y = y + bias.astype(x.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


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
    """Returns s·tanh(x/s) for the limit s; x itself where there is none."""
    return x if limit is None else limit * jnp.tanh(x / limit)
