"""The decoder and its two heads: next-token logits and per-token scores."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from safe_rlhf_jax.models.attention import Attention, KVCache, causal_mask, empty_cache
from safe_rlhf_jax.models.config import ModelConfig, ScoreConfig
from safe_rlhf_jax.models.layers import GatedMLP, Linear, RMSNorm, logical_param, rotary_table, token_positions
from safe_rlhf_jax.sharding import constrain

NORMALIZER_EPS = 1e-8
Cache = Any  # a KVCache per layer: a list of them, or one with a leading layer axis when layers are scanned

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: KVCache | None,
        rotary: tuple[jax.Array, jax.Array],
        visible: jax.Array,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the residual stream float[B, q, D] of the last q positions of x, and the layer's cache."""
        c = self.config
        normed = RMSNorm(c.norm_eps, name="input_norm")(x)
        attended, cache = Attention(c, name="attention")(normed, rotary, visible, cache, slot)
        x = x[:, x.shape[1] - visible.shape[1] :] + attended
        x = x + GatedMLP(c, name="mlp")(RMSNorm(c.norm_eps, name="post_attention_norm")(x))
        return constrain(x, "batch", "length", None), cache


class Decoder(nn.Module):
    """Token embedding, layers, final norm."""

    config: ModelConfig

    def setup(self) -> None:
        """Declares parameters and submodules."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embedding = logical_param(self, "embedding", init, (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        layer: Any = Layer
        if c.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        if c.scan_layers:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers = scanned(c)
        else:
            self.layers = [layer(c) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.norm_eps)

    def __call__(
        self,
        tokens: Int[Array, "B l"],
        positions: Int[Array, "B l"],
        visible: Bool[Array, "B l k"],
        cache: Cache = None,
        slot: jax.Array | int = 0,
        first: int = 0,
    ) -> tuple[Float[Array, "B q D"], Cache]:
        """Returns hidden states after the final norm from column `first` on, and the cache.

        What is not read is not computed: where layers are unrolled, the last one works on the columns from `first` only
        (beyond its keys and values).
        """
        x = jnp.take(self.embedding.astype(self.config.dtype), tokens, axis=0)
        x = constrain(x, "batch", "length", None)
        rotary = rotary_table(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)
        if self.config.scan_layers:
            x, cache = self.layers(x, cache, rotary, visible, slot)
            x = x[:, first:]
        else:
            caches = []
            for i, layer in enumerate(self.layers):
                asking = visible[:, first:] if i + 1 == len(self.layers) else visible
                x, layer_cache = layer(x, None if cache is None else cache[i], rotary, asking, slot)
                caches.append(layer_cache)
            cache = None if cache is None else caches
        return self.final_norm(x), cache


class CausalLM(nn.Module):
    """A language model: `apply(variables, tokens, mask)` gives logits f32[B, L, V]."""

    config: ModelConfig

    def setup(self) -> None:
        """Declares parameters and submodules."""
        c = self.config
        self.decoder = Decoder(c)
        if not c.tie_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), c)

    def __call__(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L V"]:
        """Returns next-token logits f32[B, L, V]; padding may stand on either side."""
        return self.unembed(self.hidden(tokens, mask))

    def hidden(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], first: int = 0) -> Float[Array, "B l D"]:
        """Returns the hidden states after the final norm from column `first` on, float[B, L − first, D]."""
        return self.decoder(tokens, token_positions(mask), causal_mask(mask), first=first)[0]

    def unembed(self, hidden: Float[Array, "B l D"]) -> Float[Array, "B l V"]:
        """Returns logits f32[B, l, V] of hidden states."""
        if self.config.tie_embeddings:
            embedding = self.decoder.embedding.astype(hidden.dtype)
            logits = jnp.einsum("bld,vd->blv", hidden, embedding)
        else:
            logits = self.lm_head(hidden)
        return constrain(logits.astype(jnp.float32), "batch", "length", "vocab")

    def prefill(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], length: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads left-padded prompts; returns the logits of the next token f32[B, V] and a cache of `length` columns."""
        c = self.config
        cache: Cache = [empty_cache(c, tokens.shape[0], length) for _ in range(c.num_layers)]
        if c.scan_layers:
            cache = jax.tree.map(lambda *layers: jnp.stack(layers), *cache)
        last = tokens.shape[1] - 1
        hidden, cache = self.decoder(tokens, token_positions(mask), causal_mask(mask), cache, 0, last)
        return self.unembed(hidden)[:, 0], cache

    def decode(
        self,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        visible: Bool[Array, "B L"],
        cache: Cache,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads one token per row into column `slot`; returns the next logits f32[B, V] and the cache."""
        hidden, cache = self.decoder(token[:, None], position[:, None], visible[:, None], cache, slot)
        return self.unembed(hidden)[:, 0], cache


class ScoreModel(nn.Module):
    """A reward model, a cost model or a critic: `apply(variables, tokens, mask)` gives scores f32[B, L].

    The score of a whole sequence is the one at its last real token (`ops.gather_last`). Variables hold, beside
    `params`, the collection `stats` {mean, var, count} unless the model is a critic.
    """

    config: ModelConfig
    score: ScoreConfig

    def setup(self) -> None:
        """Declares parameters and submodules."""
        self.decoder = Decoder(self.config)
        # N(0, 1/√(D+1)): Stiennon et al. 2020, arXiv 2009.01325.
        width = self.config.hidden_size
        init = nn.initializers.normal((width + 1) ** -0.5)
        self.score_kernel = logical_param(self, "score_kernel", init, (width, 1), ("embed", "score"))
        if self.score.bias:
            self.score_bias = logical_param(self, "score_bias", nn.initializers.zeros, (1,), ("score",))
        if self.score.score_type != "critic":
            self.mean = self.variable("stats", "mean", jnp.zeros, (1,), jnp.float32)
            self.var = self.variable("stats", "var", jnp.ones, (1,), jnp.float32)
            self.count = self.variable("stats", "count", jnp.zeros, (1,), jnp.int32)

    def __call__(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], first: int = 0) -> Float[Array, "B l"]:
        """Returns a score for every prefix that ends at column `first` or later, f32[B, L − first].

        They are normalised where `score.normalize` says so.
        """
        scores = self.raw_scores(tokens, mask, first)
        if self.score.score_type != "critic" and self.score.normalize:
            if self.score.score_type == "reward":
                scores = scores - self.mean.value[None]
            scores = scores / (jnp.sqrt(self.var.value[None]) + NORMALIZER_EPS)
        return scores

    def raw_scores(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], first: int = 0) -> Float[Array, "B l"]:
        """Returns the head's output before normalisation, f32[B, L − first]."""
        hidden, _ = self.decoder(tokens, token_positions(mask), causal_mask(mask), first=first)
        scores = jnp.einsum("bld,do->blo", hidden, self.score_kernel.astype(hidden.dtype))[..., 0].astype(jnp.float32)
        return scores + self.score_bias[None] if self.score.bias else scores
