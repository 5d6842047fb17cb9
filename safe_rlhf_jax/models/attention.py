"""Grouped-query attention and its key/value cache."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int
from qwix import QArray

from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.fused_attention import attend_fused, kernel_for
from safe_rlhf_jax.models.layers import Linear, Norm, softcap
from safe_rlhf_jax.models.positions import Mask, Rotary, alibi_slopes, config_rotary, rotate
from safe_rlhf_jax.models.products import precision_of
from safe_rlhf_jax.models.quantized import is_quantized, rounded_vectors
from safe_rlhf_jax.sharding import constrain

MASKED = -1e30  # finite, so that a fully masked row stays finite
Cached: TypeAlias = jax.Array | QArray


@struct.dataclass
class KVCache:
    """Keys and values; slot i holds the token in column i, in a ring of L slots the newest one with column ≡ i (mod L).

    Of one layer, or of N scanned ones, which is carried through all of them so that each writes its new columns only.
    With `decode_cache` both are integers with a scale for each vector, f32[B, K, L, 1].
    """

    keys: Cached  # float[B, K, L, C], of scanned layers float[N, B, K, L, C]
    values: Cached  # the same
    layer: jax.Array | None = None  # i32[]  within a scan: the layer that reads and writes
    window: int | None = struct.field(pytree_node=False, default=None)  # a ring that never has more slots

    def write(self, keys: jax.Array, values: jax.Array, column: jax.Array | int) -> "KVCache":
        """Returns the cache with `keys` and `values` float[B, K, l, C] of the layer from `column` on.

        A ring is written from column 0 on, or a column at a time.
        """

        def put(all_columns: Cached, new: jax.Array) -> Cached:
            return jax.tree.map(put_leaf, all_columns, rounded_vectors(new) if is_quantized(all_columns) else new)

        def put_leaf(all_columns: jax.Array, new: jax.Array) -> jax.Array:
            slots, length, start = all_columns.shape[-2], new.shape[-2], column
            if self.window is not None:
                assert length == 1 or not isinstance(column, int) or column == 0, "a ring is written column by column"
                start = column % slots
            if length > slots:  # a prompt, of which the ring keeps the end
                new = jnp.roll(new[..., -slots:, :], length, axis=-2)
            if self.layer is None:
                return jax.lax.dynamic_update_slice(all_columns, new, (0, 0, start, 0))
            return jax.lax.dynamic_update_slice(all_columns, new[None], (self.layer, 0, 0, start, 0))

        return dataclasses.replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def read(self) -> tuple[Cached, Cached]:
        """Returns keys and values of the layer, [B, K, L, C] each."""
        layer = self.layer
        if layer is None:
            return self.keys, self.values
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), (self.keys, self.values))

    def grown(self, columns: int) -> "KVCache":
        """Returns the cache with that many columns, of which a ring has no more than its window."""
        columns = min(columns, self.window or columns)
        keys, values = jax.tree.map(
            lambda x: jnp.pad(x, [(0, columns - x.shape[-2] if axis == x.ndim - 2 else 0) for axis in range(x.ndim)]),
            (self.keys, self.values),
        )
        return dataclasses.replace(self, keys=keys, values=values)

    def next_layer(self) -> "KVCache":
        """Returns the cache for the layer above, within a scan."""
        return self if self.layer is None else dataclasses.replace(self, layer=self.layer + 1)


def empty_cache(config: ModelConfig, batch: int, length: int, window: int | None = None) -> KVCache:
    """Returns an empty cache of a layer for `batch` sequences of at most `length` tokens; with a window, a ring."""
    empty = jnp.zeros((batch, config.num_kv_heads, min(length, window or length), config.head_dim), config.dtype)
    cached = empty if config.decode_cache is None else rounded_vectors(empty)
    return KVCache(cached, cached, window=window)


def empty_caches(config: ModelConfig, batch: int, length: int) -> Any:
    """Returns the empty caches of all layers: a list, of scanned layers a stack; with a trunk, those of both parts."""

    def of(windows: tuple[int | None, ...]) -> Any:
        caches = [empty_cache(config, batch, length, window) for window in windows]
        return jax.tree.map(lambda *layers: jnp.stack(layers), *caches) if config.scan_layers else caches

    rings, trunk = ring_windows(config), config.trunk
    return (of(rings[:trunk]), of(rings[trunk:])) if trunk else of(rings)


def ring_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """Returns the window of each layer whose cache is a ring. Those of scanned layers lie in a stack, and are alike."""
    windows = config.windows or (None,) * config.num_layers
    return windows if not config.scan_layers or len(set(windows)) == 1 else (None,) * config.num_layers


def causal_mask(mask: Mask) -> Bool[Array, "B L L"]:
    """Returns the causal mask: query i attends to key j if j ≤ i and j is a real token, of the same text."""
    length = mask.shape[-1]
    real = mask[:, None, :] if mask.dtype == bool else (mask[:, None, :] == mask[:, :, None]) & (mask > 0)[:, None, :]
    return jnp.tril(jnp.ones((length, length), bool))[None] & real


@struct.dataclass
class AttentionContext:
    """Mask, rotary table and bias shared by all layers of one kind; computed once per forward pass."""

    visible: jax.Array  # bool[B, q, k]  which keys each query may attend to
    rotary: Rotary | None  # cos and sin at every key position
    bias: jax.Array | None  # f32[H, q, k]  added to the scores
    # Set for a full causal pass only, where a fused kernel rebuilds the mask from padding and window:
    real: jax.Array | None = None  # bool[B, k]  columns that are not padding; or i32[B, k], a `Mask`
    window: int | None = struct.field(pytree_node=False, default=None)  # keys per query, its own included

    def for_queries_from(self, first: int) -> "AttentionContext":
        """Returns the context of the queries from column `first` on; keys stay."""
        if first == 0:
            return self
        bias = None if self.bias is None else self.bias[:, first:]
        return AttentionContext(self.visible[:, first:], self.rotary, bias)

    def dense(self) -> "AttentionContext":
        """Returns the context without the fields of fused kernels, so that contexts of several windows stack."""
        return AttentionContext(self.visible, self.rotary, self.bias)


def contexts(
    config: ModelConfig,
    positions: Int[Array, "B l"],
    visible: Bool[Array, "B l k"],
    slot: jax.Array | int,
    real: Mask | None = None,
    *,
    cached: bool = False,
) -> tuple[list[AttentionContext], list[int]]:
    """Returns the distinct attention contexts of a model, and the index of each layer's context.

    Windows and linear biases count columns: the real tokens of a row are contiguous.

    Args:
        config: The model's configuration.
        positions: i32[B, l], counted over real tokens.
        visible: bool[B, l, k], which of the k keys each of the l queries may attend to, before any window.
        slot: Column of the first of the l columns.
        real: bool[B, l] or i32[B, l] if `visible` is its causal mask: fused kernels may then replace `attend`.
        cached: The one query reads a cache: of layers with a ring, the context is that of its slots.
    """
    length, columns = visible.shape[1:]
    distance = (slot + jnp.arange(length, dtype=jnp.int32))[:, None] - jnp.arange(columns, dtype=jnp.int32)[None]
    rings = ring_windows(config) if cached else ()
    kinds: dict[tuple[int | None, bool], int] = {}
    found: list[AttentionContext] = []
    index: list[int] = []
    rotaries: dict[bool, Rotary] = {}
    for window in config.windows or (None,) * config.num_layers:
        local = window is not None and config.local_rope_theta is not None
        kind = (window if window is not None and window < columns else None, local)
        if kind not in kinds:
            kinds[kind] = len(found)
            if config.positions == "rotary" and local not in rotaries:
                rotaries[local] = config_rotary(config, positions, local=local)
            near, back = visible, distance
            if kind[0] is not None and kind[0] in rings:
                assert length == 1, "rings are read by one query at a time"
                back = distance[:, : kind[0]] % kind[0]  # the columns that the slots hold are so far back
                column = slot - back[0]
                near = jnp.take(visible, jnp.maximum(column, 0), axis=-1) & (column >= 0)[None, None]
            elif kind[0] is not None:
                near = visible & (distance < kind[0])[None]
            bias = None
            if config.positions == "alibi":
                bias = -jnp.asarray(alibi_slopes(config.num_heads))[:, None, None] * back.astype(jnp.float32)[None]
            found.append(AttentionContext(near, rotaries.get(local), bias, real, kind[0]))
        index.append(kinds[kind])
    return found, index


def attend(
    queries: Float[Array, "B H q C"],
    keys: Float[Array, "B K k C"] | QArray,
    values: Float[Array, "B K k C"] | QArray,
    visible: Bool[Array, "B q k"],
    *,
    scale: float,
    cap: float | None = None,
    bias: Float[Array, "H q k"] | None = None,
) -> Float[Array, "B H q C"]:
    """softmax(softcap(s·q·kᵀ) + b) · v over the visible keys, softmax in float32.

    Args:
        queries: float[B, H, q, C]; H is a multiple of K, and K consecutive groups of H/K heads share keys.
        keys: float[B, K, k, C], or integers with a scale for each vector.
        values: As the keys.
        visible: bool[B, q, k].
        scale: s.
        cap: Limit of the softcap.
        bias: b, f32[H, q, k].

    Returns:
        float[B, H, q, C].
    """
    batch, heads, length, size = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads * length, size) * scale
    precision = precision_of(queries)
    # Integers are multiplied as they are, and the product is scaled: keys and values in `dtype` are never written.
    keys, key_scale = factors_of_vectors(keys, queries.dtype)
    values, value_scale = factors_of_vectors(values, queries.dtype)
    logits = jnp.einsum("bkqc,bklc->bkql", grouped, keys, precision=precision, preferred_element_type=jnp.float32)
    logits = logits if key_scale is None else logits * key_scale
    logits = softcap(logits.reshape(batch, heads, length, -1), cap)
    if bias is not None:
        logits = logits + bias[None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, MASKED), axis=-1)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads * length, -1)
    weights = (weights if value_scale is None else weights * value_scale).astype(values.dtype)
    out = jnp.einsum("bkql,bklc->bkqc", weights, values, precision=precision)
    return out.reshape(batch, heads, length, size)


def factors_of_vectors(
    vectors: Float[Array, "B K k C"] | QArray, dtype: Any
) -> tuple[Float[Array, "B K k C"], Float[Array, "B K 1 k"] | None]:
    """Returns cached keys or values without their scales, exactly, and the scales, by which columns are multiplied."""
    if not isinstance(vectors, QArray):
        return vectors, None
    return vectors.qvalue.astype(dtype), vectors.scale.swapaxes(-1, -2)


class Attention(nn.Module):
    """Multi-head attention with shared key/value heads (Ainslie et al. 2023)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B l D"],
        context: AttentionContext,
        cache: KVCache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[Float[Array, "B q D"], KVCache | None]:
        """Attends within x, or from x to the cache after writing x's keys and values at `slot`.

        The last q positions of x are queries, all of them are keys: `context.visible` has a row for each query.

        Returns:
            float[B, q, D] and the updated cache (None without one).
        """
        c = self.config
        first = x.shape[1] - context.visible.shape[1]

        def heads(x: jax.Array, count: int, axis: str, name: str) -> jax.Array:
            linear = Linear((count, c.head_dim), ("embed", axis, "head_dim"), c, c.attention_bias, name=f"{name}_proj")
            return constrain(linear(x).swapaxes(1, 2), "batch", axis, "length", "head_dim")

        queries = heads(x[:, first:], c.num_heads, "heads", "q")
        keys, values = (heads(x, c.num_kv_heads, "kv_heads", name) for name in ("k", "v"))
        if c.qk_norm:
            queries = Norm(c, "head_dim", name="q_norm")(queries)
            keys = Norm(c, "head_dim", name="k_norm")(keys)
        if context.rotary is not None:
            cos, sin = context.rotary
            queries = rotate(queries, cos[:, :, first:], sin[:, :, first:], interleaved=c.rotary_interleaved)
            keys = rotate(keys, cos, sin, interleaved=c.rotary_interleaved)
        if cache is not None:
            cache = cache.write(keys, values, slot)
            if context.visible.shape[-1] != keys.shape[2]:  # a decode step; prefill attends only to its own keys
                keys, values = cache.read()
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        cap, real = c.attention_softcap, context.real
        kernel = None if real is None else kernel_for(queries, keys, cap=cap, biased=context.bias is not None)
        if kernel is None or real is None:
            out = attend(queries, keys, values, context.visible, scale=scale, cap=cap, bias=context.bias)
        else:
            out = attend_fused(kernel, queries, keys, values, real, scale=scale, window=context.window, cap=cap,
                               vmapped=c.vmapped)  # fmt: skip
        out = out.swapaxes(1, 2)
        bias = c.attention_bias if c.attention_out_bias is None else c.attention_out_bias
        out = Linear((c.hidden_size,), ("heads", "head_dim", "embed"), c, bias, in_ndim=2, name="o_proj")(out)
        return constrain(out, "batch", "length", None), cache
