"""The decoder and its two heads: next-token logits and per-token scores."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.attention import Attention, AttentionContext, KVCache, causal_mask, contexts, empty_caches
from safe_rlhf_jax.models.config import ModelConfig, ScoreConfig
from safe_rlhf_jax.models.layers import MLP, Linear, Norm, logical_param, softcap
from safe_rlhf_jax.models.positions import Mask, token_positions
from safe_rlhf_jax.models.products import matmul
from safe_rlhf_jax.sharding import constrain

NORMALIZER_EPS = 1e-8
EXCLUDED = -1e30  # a logit whose token has probability 0; finite, so that differences are finite
Cache = Any  # a KVCache per layer: a list of them, or one with a leading layer axis when layers are scanned

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream, in the order of `config.block`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, KVCache | None],
        kind: jax.Array | None,
        context: AttentionContext,
        slot: jax.Array | int,
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        """Takes the residual stream x and the cache; returns both, x of its last q positions, float[B, q, D].

        If scanned layers are of several kinds, `context` holds their stacked contexts and `kind` is this layer's index.
        """
        c, (x, cache) = self.config, carry
        if kind is not None:
            context = jax.tree.map(lambda stacked: stacked[kind], context)
        first = x.shape[1] - context.visible.shape[1]
        attention, mlp = Attention(c, name="attention"), MLP(c, name="mlp")
        norms = "input_norm", "post_attention_norm", "attention_output_norm", "mlp_output_norm"
        input_norm, mlp_norm, attention_output_norm, mlp_output_norm = (Norm(c, name=name) for name in norms)

        normed = x if c.block == "post_norm" else input_norm(x)
        attended, cache = attention(normed, context, cache, slot)
        x = x[:, first:]
        match c.block:
            case "parallel":
                x = x + attended + mlp(mlp_norm(x))
            case "parallel_shared":
                x = x + attended + mlp(normed[:, first:])
            case "post_norm":
                x = input_norm(x + attended)
                x = mlp_norm(x + mlp(x))
            case "sandwich":
                x = x + attention_output_norm(attended)
                x = x + mlp_output_norm(mlp(mlp_norm(x)))
            case "pre_norm":
                x = x + attended
                x = x + mlp(mlp_norm(x))
        return (constrain(x, "batch", "length", None), None if cache is None else cache.next_layer()), None


class Decoder(nn.Module):
    """Token embedding, layers, final norm."""

    config: ModelConfig

    def setup(self) -> None:
        """Declares parameters and submodules."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embedding = logical_param(self, "embedding", init, (c.vocab_size, c.embedding_width), ("vocab", "embed"))
        if c.positions == "learned":
            rows = c.max_positions + c.position_offset
            axes = ("length", "embed")
            self.position_embedding = logical_param(self, "position_embedding", init, (rows, c.hidden_size), axes)
        if c.embedding_width != c.hidden_size:  # the width of the residual stream is named as if it were an MLP's
            self.project_in = Linear((c.hidden_size,), ("embed", "mlp"), c)
            self.project_out = Linear((c.embedding_width,), ("mlp", "embed"), c)
        if c.embedding_norm:
            self.embedding_norm = Norm(c)
        layer: Any = Layer
        if c.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        plain = dataclasses.replace(c, lora=None)
        if c.scan_layers:
            scanned = functools.partial(
                nn.scan,
                layer,
                variable_axes={"params": 0, "adapter": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            stack = lambda length: scanned(length=length, unroll=length if c.unroll_layers else 1)  # noqa: E731
            if c.trunk:
                self.trunk = stack(c.trunk)(plain)
            self.layers = stack(c.num_layers - c.trunk)(c)
        else:
            self.trunk = [layer(plain) for _ in range(c.trunk)]
            self.layers = [layer(c) for _ in range(c.num_layers - c.trunk)]
        if c.final_norm:
            self.final_norm = Norm(c)

    def __call__(
        self,
        tokens: Int[Array, "B l"],
        positions: Int[Array, "B l"],
        visible: Bool[Array, "B l k"] | Mask,
        cache: Cache = None,
        slot: jax.Array | int = 0,
        first: int = 0,
        below: Float[Array, "B l D"] | None = None,
    ) -> tuple[Float[Array, "B q W"], Cache]:
        """Returns hidden states after the final norm from column `first` on, and the cache.

        `below` is the output of `read_trunk` for these tokens, computed before.

        `visible` is the attention mask of each query, or a `Mask` of whole texts with causal attention.
        Outputs before column `first` are not computed: with unrolled layers, the last layer computes only keys and
        values there.

        Raises:
            ModelError: If there are more columns than a table of learned positions has rows.
        """
        c = self.config
        kinds, index = self.contexts(positions, visible, slot, cached=cache is not None)
        lower, upper = (None, cache) if cache is None or not c.trunk else (cache[0], cache[1])
        if below is None:
            x = self.embed(tokens, positions, decoding=cache is not None)
            if c.trunk:
                x, lower = self.through(self.trunk, x, lower, kinds, index[: c.trunk], slot)
        else:
            x = below
        x, upper = self.through(self.layers, x, upper, kinds, index[c.trunk :], slot, first)
        cache = upper if lower is None else (lower, upper)
        if c.final_norm:
            x = self.final_norm(x)
        if c.embedding_width != c.hidden_size:
            x = self.project_out(x)
        return x, cache

    def contexts(
        self, positions: Int[Array, "B l"], visible: Bool[Array, "B l k"] | Mask, slot: jax.Array | int,
        *, cached: bool = False,
    ) -> tuple[list[AttentionContext], list[int]]:  # fmt: skip
        """Returns the attention contexts of the layers, and the index of each layer's; `visible` is as in a call.

        Raises:
            ModelError: If there are more columns than a table of learned positions has rows.
        """
        c, real = self.config, None
        if visible.ndim == 2:
            real, visible = visible, causal_mask(visible)
        several = real is not None and real.dtype != bool  # texts in a row, which may have more columns than a text
        if c.positions == "learned" and visible.shape[-1] > c.max_positions and not several:
            raise ModelError(
                f"{visible.shape[-1]} tokens are more than the model's {c.max_positions} learned positions"
            )
        return contexts(c, positions, visible, slot, real, cached=cached and real is None)

    def through(
        self, layers: Any, x: jax.Array, cache: Cache, kinds: list[AttentionContext], index: list[int],
        slot: jax.Array | int, first: int = 0,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """Returns the residual stream from column `first` on, behind consecutive layers, and their cache."""
        if self.config.scan_layers:
            carry = x, None if cache is None else dataclasses.replace(cache, layer=jnp.int32(0))
            if len(kinds) == 1:
                (x, cache), _ = layers(carry, None, kinds[0], slot)
            else:
                stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(kind.dense() for kind in kinds))
                (x, cache), _ = layers(carry, jnp.array(index, jnp.int32), stacked, slot)
            return x[:, first:], None if cache is None else dataclasses.replace(cache, layer=None)
        caches = []
        for i, layer in enumerate(layers):
            context = kinds[index[i]]
            if i + 1 == len(layers):
                context = context.for_queries_from(first)
            (x, layer_cache), _ = layer((x, None if cache is None else cache[i]), None, context, slot)
            caches.append(layer_cache)
        return x, None if cache is None else caches

    def read_trunk(self, tokens: Int[Array, "B L"], mask: Mask) -> Float[Array, "B L D"]:
        """Returns the residual stream behind the trunk, which no adapter changes, float[B, L, D]."""
        positions = token_positions(mask)
        x = self.embed(tokens, positions, decoding=False)
        if not self.config.trunk:
            return x
        kinds, index = self.contexts(positions, mask, 0)
        return self.through(self.trunk, x, None, kinds, index[: self.config.trunk], 0)[0]

    def embed(self, tokens: Int[Array, "B l"], positions: Int[Array, "B l"], decoding: bool) -> Float[Array, "B l D"]:
        """Returns the residual stream that enters the first layer, float[B, l, D]."""
        c = self.config
        # Cast after the lookup: the gradient of a frequent token's row is a long sum, taken in float32.
        x = looked_up(self.embedding, tokens, decoding).astype(c.dtype)
        if c.embedding_width != c.hidden_size:
            x = self.project_in(x)
        if c.scale_embedding:
            x = x * jnp.asarray(c.hidden_size**0.5, c.dtype)
        if c.positions == "learned":
            x = x + looked_up(self.position_embedding, positions + c.position_offset, decoding).astype(c.dtype)
        if c.embedding_norm:
            x = self.embedding_norm(x)
        return constrain(x, "batch", "length", None)


def looked_up(table: Float[Array, "n W"], rows: Int[Array, "B l"], decoding: bool) -> Float[Array, "B l W"]:
    """Returns rows of an embedding, of which each device looks up its columns.

    Where this is left to XLA, and `fsdp` is not the only axis of the mesh, it may give every device the rows of all
    texts, and in the backward pass their gradients. In decoding they are few, and the table may be gathered.
    """
    found = jnp.take(table, rows, axis=0)
    return found if decoding else constrain(found, "batch_without_fsdp", "length", "embed")


def is_within(size: int, ranges: tuple[tuple[int, int], ...]) -> jax.Array:
    """Returns bool[size]: True where the index is in one of the ascending, disjoint ranges [start, stop)."""
    edges = jnp.asarray(ranges, jnp.int32).reshape(-1)
    return jnp.searchsorted(edges, jnp.arange(size, dtype=jnp.int32), side="right", method="scan_unrolled") % 2 == 1


def in_float32(
    hidden: Float[Array, "B l D"], matrix: jax.Array, names: tuple[str, str], over: int = 0
) -> Float[Array, "B l O"]:
    """Returns hidden · W, or with over = 1 hidden · Wᵀ, in float32: 8-bit logits would tie with neighbours."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return matmul(rows, matrix, names, "float32", over).reshape(*hidden.shape[:-1], matrix.shape[1 - over])


class CausalLM(nn.Module):
    """A language model: `apply(variables, tokens, mask)` gives logits f32[B, L, V]."""

    config: ModelConfig

    def setup(self) -> None:
        """Declares parameters and submodules."""
        c = self.config
        self.decoder = Decoder(c)
        if not c.tie_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), c, c.lm_head_bias, dtype="float32")

    def __call__(self, tokens: Int[Array, "B L"], mask: Mask) -> Float[Array, "B L V"]:
        """Returns next-token logits f32[B, L, V]; padding may be on either side."""
        return self.unembed(self.hidden(tokens, mask))

    def hidden(
        self, tokens: Int[Array, "B L"], mask: Mask, first: int = 0,
        below: Float[Array, "B L D"] | None = None,
    ) -> Float[Array, "B l D"]:  # fmt: skip
        """Returns the hidden states after the final norm from column `first` on, float[B, L − first, D].

        `below` is the output of `Decoder.read_trunk` for these tokens, computed before.
        """
        return self.decoder(tokens, token_positions(mask), mask, first=first, below=below)[0]

    def unembed(self, hidden: Float[Array, "B l D"]) -> Float[Array, "B l V"]:
        """Returns logits f32[B, l, V] of hidden states."""
        if self.config.tie_embeddings:
            logits = in_float32(hidden, self.decoder.embedding, ("vocab", "embed"), over=1)
        else:
            logits = self.lm_head(hidden)
        logits = softcap(logits, self.config.logit_softcap)
        if self.config.unused_rows:
            logits = jnp.where(is_within(logits.shape[-1], self.config.unused_rows), EXCLUDED, logits)
        return constrain(logits, "batch", "length", "vocab")

    def prefill(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], length: int, columns: int | None = None
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads left-padded prompts; returns the logits of the next token f32[B, V] and a cache.

        `length` are the columns of prompt and response, `columns` those of the cache, which are as many by default.

        Raises:
            ModelError: If the encoding of the first tokens would depend on the number of later tokens.
        """
        c = self.config
        if c.fixed_length is not None and length > c.fixed_length:
            assert c.rope_scaling is not None
            raise ModelError(
                f"rope_scaling {c.rope_scaling.kind!r}: prompt and response have {length} tokens; beyond "
                f"{c.fixed_length} earlier tokens are encoded by how many follow, which a cache cannot do. Make them "
                "shorter."
            )
        cache: Cache = empty_caches(c, tokens.shape[0], columns or length)
        last = tokens.shape[1] - 1
        hidden, cache = self.decoder(tokens, token_positions(mask), mask, cache, 0, last)
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

    The score of a whole sequence is the one at its last real token (`ops.gather_last`). Variables hold `params` and,
    unless the model is a critic, the collection `stats` {mean, var, count}.
    """

    config: ModelConfig
    score: ScoreConfig

    def setup(self) -> None:
        """Declares parameters and submodules."""
        self.decoder = Decoder(self.config)
        # N(0, 1/√(D+1)): Stiennon et al. 2020, arXiv 2009.01325.
        width = self.config.embedding_width
        init = nn.initializers.normal((width + 1) ** -0.5)
        self.score_kernel = logical_param(self, "score_kernel", init, (width, 1), ("embed", "score"))
        if self.score.bias:
            self.score_bias = logical_param(self, "score_bias", nn.initializers.zeros, (1,), ("score",))
        if self.score.score_type != "critic":
            self.mean = self.variable("stats", "mean", jnp.zeros, (1,), jnp.float32)
            self.var = self.variable("stats", "var", jnp.ones, (1,), jnp.float32)
            self.count = self.variable("stats", "count", jnp.zeros, (1,), jnp.int32)

    def __call__(
        self, tokens: Int[Array, "B L"], mask: Mask, first: int = 0,
        below: Float[Array, "B L D"] | None = None,
    ) -> Float[Array, "B l"]:  # fmt: skip
        """Returns a score for every prefix that ends at column `first` or later, f32[B, L − first].

        Scores are normalised if `score.normalize` is set. `below` is as in `hidden`.
        """
        return self.normalized(self.raw_scores(tokens, mask, first, below))

    def scores(
        self, hidden: Float[Array, "B l D"], tokens: Int[Array, "B L"], mask: Mask, first: int
    ) -> Float[Array, "B l"]:
        """Returns the scores of hidden states from column `first` on, as a call on the tokens does."""
        return self.normalized(self.read_out(hidden, tokens, mask, first))

    def normalized(self, scores: Float[Array, "B l"]) -> Float[Array, "B l"]:
        """Applies the normaliser if `score.normalize` is set."""
        if self.score.score_type != "critic" and self.score.normalize:
            if self.score.score_type == "reward":
                scores = scores - self.mean.value[None]
            scores = scores / (jnp.sqrt(self.var.value[None]) + NORMALIZER_EPS)
        return scores

    def raw_scores(
        self, tokens: Int[Array, "B L"], mask: Mask, first: int = 0,
        below: Float[Array, "B L D"] | None = None,
    ) -> Float[Array, "B l"]:  # fmt: skip
        """Returns the head's output before normalisation, f32[B, L − first]."""
        return self.read_out(self.hidden(tokens, mask, first, below), tokens, mask, first)

    def hidden(
        self, tokens: Int[Array, "B L"], mask: Mask, first: int = 0,
        below: Float[Array, "B L D"] | None = None,
    ) -> Float[Array, "B l D"]:  # fmt: skip
        """Returns the hidden states after the final norm from column `first` on, as `CausalLM.hidden`."""
        return self.decoder(tokens, token_positions(mask), mask, first=first, below=below)[0]

    def read_out(
        self, hidden: Float[Array, "B l D"], tokens: Int[Array, "B L"], mask: Mask, first: int
    ) -> Float[Array, "B l"]:
        """Returns the head's output on hidden states from column `first` on, f32[B, L − first]."""
        scores = in_float32(hidden, self.score_kernel, ("embed", "score"))[..., 0]
        scores = scores + self.score_bias[None] if self.score.bias else scores
        if self.score.pad_id is None:
            return scores
        # The score of the last token that is not padding is repeated after it: it is read there wherever the mask ends.
        index, mask = jnp.arange(scores.shape[1])[None], mask[:, first:]
        real = (mask != 0) & (tokens[:, first:] != self.score.pad_id)
        last = jnp.max(index * real, axis=1, keepdims=True)
        if mask.dtype != bool:  # of each token's own text
            last = jnp.max(jnp.where(mask[:, :, None] == mask[:, None], (index * real)[:, None], 0), axis=2)
        return jnp.where(index > last, jnp.take_along_axis(scores, last, axis=1), scores)
