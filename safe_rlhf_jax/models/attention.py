"""Grouped-query attention and its key/value cache."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.layers import Linear, rotate
from safe_rlhf_jax.sharding import constrain

MASKED = -1e30  # finite, so that a row in which nothing is visible stays finite


@struct.dataclass
class KVCache:
    """Keys and values of one layer; slot i holds the token in column i."""

    keys: jax.Array  # float[B, K, L, C]
    values: jax.Array  # float[B, K, L, C]

    def write(self, keys: jax.Array, values: jax.Array, slot: jax.Array | int) -> "KVCache":
        """Returns the cache with `keys` and `values` float[B, K, l, C] from column `slot` on."""
        start = (0, 0, slot, 0)
        return KVCache(
            keys=jax.lax.dynamic_update_slice(self.keys, keys, start),
            values=jax.lax.dynamic_update_slice(self.values, values, start),
        )


def empty_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    """Returns zeros for `batch` sequences of at most `length` tokens."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def causal_mask(mask: Bool[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Query i sees key j when j ≤ i and j is a real token."""
    length = mask.shape[-1]
    return jnp.tril(jnp.ones((length, length), bool))[None] & mask[:, None, :]


def attend(
    queries: Float[Array, "B H q C"],
    keys: Float[Array, "B K k C"],
    values: Float[Array, "B K k C"],
    visible: Bool[Array, "B q k"],
) -> Float[Array, "B H q C"]:
    """softmax(q·kᵀ/√C) · v over the visible keys, softmax in float32.

    Args:
        queries: float[B, H, q, C]; H is a multiple of K, and K consecutive groups of H/K heads share keys.
        keys: float[B, K, k, C].
        values: float[B, K, k, C].
        visible: bool[B, q, k].

    Returns:
        float[B, H, q, C].
    """
    batch, heads, length, size = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads * length, size) * size**-0.5
    logits = jnp.einsum("bkqc,bklc->bkql", grouped, keys, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, length, -1)
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, MASKED), axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads * length, -1)
    return jnp.einsum("bkql,bklc->bkqc", weights, values).reshape(batch, heads, length, size)


class Attention(nn.Module):
    """Multi-head attention with rotary positions and shared key/value heads (Ainslie et al. 2023)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B l D"],
        rotary: tuple[Float[Array, "B 1 l half"], Float[Array, "B 1 l half"]],
        visible: Bool[Array, "B q k"],
        cache: KVCache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[Float[Array, "B q D"], KVCache | None]:
        """Attends within x, or from x to the cache after writing x's keys and values at `slot`.

        The last q positions of x ask, all of them answer: `visible` has a row for each that asks.

        Returns:
            float[B, q, D] and the updated cache (None without one).
        """
        c = self.config
        first = x.shape[1] - visible.shape[1]

        def heads(x: jax.Array, count: int, axis: str, name: str) -> jax.Array:
            linear = Linear((count, c.head_dim), ("embed", axis, "head_dim"), c, c.attention_bias, name=name)
            return constrain(linear(x).swapaxes(1, 2), "batch", axis, "length", "head_dim")

        cos, sin = rotary
        queries = heads(x[:, first:], c.num_heads, "heads", "q_proj")
        queries = rotate(queries, cos[:, :, first:], sin[:, :, first:])
        keys = rotate(heads(x, c.num_kv_heads, "kv_heads", "k_proj"), cos, sin)
        values = heads(x, c.num_kv_heads, "kv_heads", "v_proj")
        if cache is not None:
            cache = cache.write(keys, values, slot)
            if visible.shape[-1] != keys.shape[2]:  # a step of decoding; prefill sees only what it brings
                keys, values = cache.keys, cache.values
        out = attend(queries, keys, values, visible).swapaxes(1, 2)
        axes = ("heads", "head_dim", "embed")
        out = Linear((c.hidden_size,), axes, c, c.attention_bias, in_ndim=2, name="o_proj")(out)
        return constrain(out, "batch", "length", None), cache
