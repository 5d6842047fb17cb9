"""Positions of tokens: rotary angles, ALiBi slopes, positions counted over real tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from safe_rlhf_jax.models.config import ModelConfig, RopeScaling

Rotary = tuple[jax.Array, jax.Array]  # cosine and sine, f32[B, 1, L, pairs]


# Real tokens; or, where several texts share a row, the number of each token's text, 0 in padding.
Mask = Bool[Array, "B L"] | Int[Array, "B L"]


def token_positions(mask: Mask) -> Int[Array, "B L"]:
    """Position of each token among the real tokens of its row, or of its text; padding gets 0."""
    if mask.dtype == bool:
        return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)
    column = jnp.arange(mask.shape[-1], dtype=jnp.int32)[None]
    begins = jnp.pad(mask[:, 1:] != mask[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(mask > 0, column - jax.lax.cummax(jnp.where(begins, column, 0), axis=1), 0)


def rotary_table(
    positions: Int[Array, "B L"], *, rotary_dim: int, theta: float, scaling: RopeScaling | None, max_positions: int
) -> Rotary:
    """Cosine and sine of the rotary angles p·θ^(−2i/C) of position p and pair i, θ^(−2i/C) scaled by `scaling`.

    Computed once per pass: the barrier keeps layers and heads from recomputing them.

    Args:
        positions: i32[B, L], counted over real tokens.
        rotary_dim: C, the rotated dimensions of a head.
        theta: θ, base of the frequencies.
        scaling: Scaling of the frequencies.
        max_positions: Length beyond which `dynamic` scaling begins.

    Returns:
        cos and sin, f32[B, 1, L, C/2] each.
    """
    exponent = np.arange(0, rotary_dim, 2) / rotary_dim
    factor = 1.0
    if scaling is None:
        frequency = jnp.asarray(theta**-exponent, jnp.float32)[None]
    elif scaling.kind in ("linear", "llama3"):
        stretch = llama3_frequencies if scaling.kind == "llama3" else linear_frequencies
        frequency = jnp.asarray(stretch(theta**-exponent, scaling), jnp.float32)[None]
    else:
        length = (positions.max(-1, keepdims=True) + 1).astype(jnp.float32)  # of each row; [B, 1]
        factor = scaling.attention_factor
        if scaling.kind == "dynamic":
            growth = scaling.factor * jnp.maximum(length / max_positions, 1.0) - (scaling.factor - 1.0)
            base = theta * growth ** (rotary_dim / (rotary_dim - 2))
            frequency = base ** -jnp.asarray(exponent, jnp.float32)[None]
        else:
            short, long = (
                jnp.asarray(theta**-exponent / np.array(factors), jnp.float32)[None]
                for factors in (scaling.short_factors, scaling.long_factors)
            )
            frequency = jnp.where(length > scaling.original_positions, long, short)
    angle = positions.astype(jnp.float32)[:, None, :, None] * frequency[:, None, None, :]
    table: Rotary = jax.lax.optimization_barrier((factor * jnp.cos(angle), factor * jnp.sin(angle)))
    return table


def linear_frequencies(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """All frequencies divided by the factor: position interpolation. Source: Chen et al. 2023, arXiv 2306.15595."""
    return frequency / scaling.factor


def llama3_frequencies(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Low frequencies divided by the factor, high ones kept, a ramp between them.

    Source: Llama 3.1 (arXiv 2407.21783) as in transformers' `_compute_llama3_parameters`.
    """
    turns = scaling.original_positions * frequency / (2 * math.pi)  # within the length of pretraining
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def config_rotary(config: ModelConfig, positions: Int[Array, "B L"], *, local: bool) -> Rotary:
    """Returns the rotary table of a model's layers: of those with a separate base (`local`), or of the others."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    rotary_dim = config.rotary_dim or config.head_dim
    return rotary_table(
        positions, rotary_dim=rotary_dim, theta=theta, scaling=scaling, max_positions=config.max_positions
    )


def rotate(
    x: Float[Array, "B H L C"],
    cos: Float[Array, "B 1 L pairs"],
    sin: Float[Array, "B 1 L pairs"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B H L C"]:
    """Rotary position embedding of the leading dimensions; the rest is unchanged.

    Pairs are halves, (x_i, x_{i + pairs}), or neighbours, (x_2i, x_{2i + 1}).

    Source: Su et al. 2021, arXiv 2104.09864.

    Args:
        x: float[B, H, L, C], queries or keys.
        cos: f32[B, 1, L, pairs], from `rotary_table`.
        sin: f32[B, 1, L, pairs].
        interleaved: Pairs are neighbours.

    Returns:
        float[B, H, L, C].
    """
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(turned.shape)
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1) if rest.shape[-1] else turned.astype(x.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of attention with linear biases, f32[H]: a geometric sequence for each power of two of heads.

    Source: Press et al. 2022, arXiv 2108.12409; numbers of heads between powers of two as in their code.
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return np.array(slopes, np.float32)
