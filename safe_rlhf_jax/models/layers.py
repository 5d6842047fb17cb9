"""Norm, rotary positions, linear maps and the gated MLP. Every parameter names its logical axes."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.sharding import constrain


def logical_param(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...],
                  axes: tuple[str, ...]) -> jax.Array:  # fmt: skip
    """Declares a float32 parameter whose dimensions carry logical axis names."""
    boxed = nn.with_logical_partitioning(init, axes)
    param: jax.Array = module.param(name, boxed, shape, jnp.float32)  # type: ignore[assignment]  # flax unboxes it
    return param


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · w, computed in float32. Source: Zhang & Sennrich 2019, arXiv 1910.07467."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns x scaled to unit mean square, then by the weight."""
        weight = logical_param(self, "weight", nn.initializers.ones, (x.shape[-1],), ("embed",))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


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
        y = x.reshape(-1, inputs) @ kernel.astype(x.dtype).reshape(inputs, -1)
        y = y.reshape(*x.shape[: x.ndim - self.in_ndim], *self.features)
        if self.use_bias:
            bias = logical_param(self, "bias", nn.initializers.zeros, self.features, self.axes[self.in_ndim :])
            y = y + bias.astype(x.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class GatedMLP(nn.Module):
    """(silu(x·W_gate) ⊙ x·W_up)·W_down. Source: Shazeer 2020, arXiv 2002.05202."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Returns float[B, L, D]."""
        c = self.config
        gate = Linear((c.intermediate_size,), ("embed", "mlp"), c, c.mlp_bias, name="gate_proj")(x)
        up = Linear((c.intermediate_size,), ("embed", "mlp"), c, c.mlp_bias, name="up_proj")(x)
        h = constrain(nn.silu(gate) * up, "batch", "length", "mlp")
        return Linear((c.hidden_size,), ("mlp", "embed"), c, c.mlp_bias, name="down_proj")(h)


def rotary_table(
    positions: Int[Array, "B L"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "B 1 L half"], Float[Array, "B 1 L half"]]:
    """Cosine and sine of the rotary angles p·θ^(−2i/C) of position p and pair i.

    Made once per pass: behind the barrier, so that no layer and no head computes them again.

    Args:
        positions: i32[B, L], counted over real tokens.
        head_dim: C.
        theta: θ, base of the frequencies.

    Returns:
        cos and sin, f32[B, 1, L, C/2] each.
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None, :, None] * frequency[None, None, None, :]
    table: tuple[jax.Array, jax.Array] = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
    return table


def rotate(
    x: Float[Array, "B H L C"], cos: Float[Array, "B 1 L half"], sin: Float[Array, "B 1 L half"]
) -> Float[Array, "B H L C"]:
    """Rotary position embedding, half-split layout: pairs are (x_i, x_{i + C/2}).

    Source: Su et al. 2021, arXiv 2104.09864.

    Args:
        x: float[B, H, L, C], queries or keys.
        cos: f32[B, 1, L, C/2], from `rotary_table`.
        sin: f32[B, 1, L, C/2].

    Returns:
        float[B, H, L, C].
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def token_positions(mask: jax.Array) -> jax.Array:
    """Position of each token among the real tokens of its row, i32[B, L]; padding gets 0."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)
